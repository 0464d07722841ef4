from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdit.models import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    get_1d_sincos_pos_embed_from_grid,
    get_2d_sincos_pos_embed,
    get_2d_sincos_pos_embed_from_grid,
)
from fastdit.testing import assert_close


def test_timestep_embedding_by_its_formula() -> None:
    t = [0, 1, 257, 999, 12.5]
    found = TimestepEmbedder.timestep_embedding(torch.tensor(t), 256)
    assert found.dtype == torch.float32
    for row, step in zip(found.tolist(), t, strict=True):
        for k in (0, 1, 64, 127):
            angle = step * 10000 ** (-k / 128)
            # An angle of 999 has a float32 spacing of 6e-5, and its frequency a relative error of about 1e-7.
            assert row[k] == pytest.approx(math.cos(angle), abs=1.5e-4)
            assert row[128 + k] == pytest.approx(math.sin(angle), abs=1.5e-4)
    period = TimestepEmbedder.timestep_embedding(torch.tensor([7]), 4, max_period=100)
    angles = torch.tensor([7.0, 0.7])
    torch.testing.assert_close(period[0], torch.cat([angles.cos(), angles.sin()]))


def test_odd_timestep_embedding_ends_with_zero() -> None:
    odd = TimestepEmbedder.timestep_embedding(torch.tensor([3, 4]), 7)
    even = TimestepEmbedder.timestep_embedding(torch.tensor([3, 4]), 6)
    assert torch.equal(odd, F.pad(even, (0, 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_timesteps_are_embedded_in_float32_for_narrow_models(dtype: torch.dtype) -> None:
    embedder = TimestepEmbedder(32).to(dtype)
    seen = []
    embedder.mlp[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    t = torch.tensor([256, 257, 999, 1000])
    embedder(t)
    assert torch.equal(seen[0], TimestepEmbedder.timestep_embedding(t, 256).to(dtype))
    assert not torch.equal(seen[0][0], seen[0][1])


def test_timestep_embedder_takes_a_wrapped_linear_layer() -> None:
    embedder = TimestepEmbedder(32)
    t = torch.tensor([3, 4])
    expected = embedder(t)
    embedder.mlp[0] = nn.Sequential(embedder.mlp[0])
    assert torch.equal(embedder(t), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_label_dropout_draws_as_the_original(dtype: torch.dtype) -> None:
    embedder = LabelEmbedder(10, 8, 0.3)
    assert embedder.embedding_table.weight.shape == (11, 8)
    labels = (torch.arange(64) % 10).to(dtype)
    torch.manual_seed(5)
    found = embedder(labels, True)
    torch.manual_seed(5)
    dropped = torch.rand(64) < 0.3
    assert 0 < dropped.sum() < 64
    assert torch.equal(found, embedder.embedding_table(labels.masked_fill(dropped, 10)))
    state = torch.get_rng_state()
    assert torch.equal(embedder(labels, False), embedder.embedding_table(labels))
    assert torch.equal(torch.get_rng_state(), state)  # evaluation draws nothing


def test_forced_label_dropout() -> None:
    embedder = LabelEmbedder(10, 8, 0.1)
    labels, force = torch.tensor([1, 2, 3]), torch.tensor([0, 1, 0])
    expected = embedder.embedding_table(torch.tensor([1, 10, 3]))
    for train in (True, False):
        assert torch.equal(embedder(labels, train, force_drop_ids=force), expected)
    assert LabelEmbedder(10, 8, 0.0).embedding_table.weight.shape == (10, 8)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patch_embed_is_a_convolution(patch_size: int) -> None:
    embed = PatchEmbed((4, 8), patch_size, 3, 16)
    assert embed.grid_size == (4 // patch_size, 8 // patch_size)
    x = torch.randn(2, 3, 4, 8)
    exact, plain = (
        nn.Conv2d.forward(embed.proj.to(dtype), x.to(dtype)).flatten(2).transpose(1, 2).detach()
        for dtype in (torch.float64, torch.float32)
    )
    assert_close("patches", embed(x), exact, plain)


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": 1},
        {"stride": 1},
        {"dilation": 2, "padding": 1},
        {"groups": 3},
        {"bias": False},
    ],
    ids=str,
)
def test_patch_embed_with_another_convolution(arguments: dict[str, int]) -> None:
    """Whatever convolution is put there runs as that convolution."""
    embed = PatchEmbed(8, 2, 3, 12)
    embed.proj = nn.Conv2d(3, 12, 2, **{"stride": 2, **arguments})
    x = torch.randn(2, 3, 8, 8)
    expected = embed.proj(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(x), expected)


def test_position_embedding_by_its_formula() -> None:
    embedding = get_2d_sincos_pos_embed(16, (2, 3))
    assert (embedding.shape, embedding.dtype) == ((6, 16), np.float64)
    for row in range(2):
        for column in range(3):
            found = embedding[row * 3 + column]
            for k in range(4):
                omega = 10000 ** (-k / 4)
                expected = [
                    math.sin(column * omega),
                    math.cos(column * omega),
                    math.sin(row * omega),
                    math.cos(row * omega),
                ]
                np.testing.assert_allclose(found[[k, 4 + k, 8 + k, 12 + k]], expected, rtol=1e-14)


def test_position_embedding_helpers() -> None:
    square = get_2d_sincos_pos_embed(8, 3)
    np.testing.assert_array_equal(square, get_2d_sincos_pos_embed(8, (3, 3)))
    extended = get_2d_sincos_pos_embed(8, 3, cls_token=True, extra_tokens=2)
    np.testing.assert_array_equal(extended, np.concatenate([np.zeros((2, 8)), square]))
    grid = np.stack(np.meshgrid(np.arange(3), np.arange(3)))
    np.testing.assert_array_equal(get_2d_sincos_pos_embed_from_grid(8, grid), square)
    line = get_1d_sincos_pos_embed_from_grid(4, np.arange(3))
    np.testing.assert_array_equal(line, square[:3, :4])


def test_position_embedding_rejects_widths() -> None:
    with pytest.raises(ValueError, match="embed_dim=6"):
        get_2d_sincos_pos_embed(6, 2)
    with pytest.raises(ValueError, match="embed_dim=5"):
        get_1d_sincos_pos_embed_from_grid(5, np.arange(2))
