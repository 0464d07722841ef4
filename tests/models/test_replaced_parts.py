"""Whoever puts another part into the model, or patches one, gets the original's calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdit
from fastdit.models import DiTBlock, FinalLayer, PatchEmbed, get_2d_sincos_pos_embed, modulate
from fastdit.testing import assert_model_close

from .helpers import make_inputs, make_model, twin


def plain_block(self: DiTBlock, x: Tensor, c: Tensor) -> Tensor:
    """The original's forward, with its two arguments."""
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(
        6, 1
    )
    x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
    return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


def plain_final_layer(self: FinalLayer, x: Tensor, c: Tensor) -> Tensor:
    shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
    return self.linear(modulate(self.norm_final(x), shift, scale))


class OtherFinalLayer(FinalLayer):
    forward = plain_final_layer  # type: ignore[assignment]


class ForeignFinalLayer(nn.Module):
    def __init__(self, inner: FinalLayer) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return plain_final_layer(self.inner, x, c)


def _subclass(model: fastdit.DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    model.final_layer.__class__ = OtherFinalLayer


def _foreign(model: fastdit.DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    model.final_layer = ForeignFinalLayer(model.final_layer)


def _patched_instance(model: fastdit.DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    model.final_layer.forward = lambda x, c: plain_final_layer(model.final_layer, x, c)


def _patched_final_class(model: fastdit.DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FinalLayer, "forward", plain_final_layer)


def _patched_block_class(model: fastdit.DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiTBlock, "forward", plain_block)


@pytest.mark.parametrize(
    "change", [_subclass, _foreign, _patched_instance, _patched_final_class, _patched_block_class]
)
def test_original_forward_in_another_place(
    change: Callable[[fastdit.DiT, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    inputs = make_inputs(model)
    plain = model(*inputs)
    exact = twin(model, torch.float64)(inputs[0].double(), *inputs[1:])
    change(model, monkeypatch)
    assert_model_close("changed", model(*inputs), exact, plain)


def test_label_embedder_of_another_kind_takes_what_it_likes() -> None:
    """Text vectors instead of class numbers."""

    class Text(nn.Module):
        dropout_prob = 0.0

        def forward(self, y: Tensor, train: bool) -> Tensor:
            return y.mean(dim=1)

    model = make_model()
    x, t, y = make_inputs(model)
    table = model.y_embedder.embedding_table.weight
    expected = model(x, t, y)
    model.y_embedder = Text()
    with fastdit.validate("full"):
        out = model(x, t, table[y].unsqueeze(1).expand(-1, 5, -1))
    torch.testing.assert_close(out, expected)


def test_more_input_channels_as_for_inpainting() -> None:
    model = make_model()
    x, t, y = make_inputs(model)
    expected = model(x, t, y)
    wider = nn.Conv2d(9, 48, 2, 2)
    wider.weight.data.zero_()
    wider.weight.data[:, :4] = model.x_embedder.proj.weight.data
    wider.bias = model.x_embedder.proj.bias
    model.x_embedder.proj = wider
    mask = torch.randn(len(x), 5, 8, 8)
    torch.testing.assert_close(model(torch.cat([x, mask], 1), t, y), expected)
    with pytest.raises(ValueError, match=r"in_channels=9 .*got \(3, 4, 8, 8\)"):
        model(x, t, y)


def test_higher_resolution_by_new_embedders() -> None:
    model, large = make_model(), make_model(input_size=16)
    inputs = make_inputs(large)
    embedder = PatchEmbed(16, 2, 4, 48)
    embedder.proj = model.x_embedder.proj
    model.x_embedder = embedder
    position = torch.from_numpy(get_2d_sincos_pos_embed(48, 8)).float().unsqueeze(0)
    model.pos_embed = nn.Parameter(position, requires_grad=False)
    assert torch.equal(model(*inputs), large(*inputs))


@pytest.mark.parametrize("side", [2, 4, 7])
def test_unpatchify_takes_any_square(side: int) -> None:
    model = make_model()
    tokens = torch.randn(2, side * side, 32)
    assert torch.equal(model.unpatchify(tokens), make_model(input_size=2 * side).unpatchify(tokens))
    with pytest.raises(ValueError, match="tokens"):
        model.unpatchify(torch.randn(2, side * side + 1, 32))


def test_longer_processes_say_so() -> None:
    model = make_model()
    x, _, y = make_inputs(model)
    t = torch.tensor([0, 1, 3999])
    with fastdit.validate("full"):
        with pytest.raises(ValueError, match=r"t\[2\]=3999: .*num_timesteps=1000"):
            model(x, t, y)
        model.num_timesteps = 4000
        assert model(x, t, y).isfinite().all()


def test_numbers_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    arguments: dict[str, Any] = {
        "hidden_size": np.int64(48),
        "input_size": np.int32(8),
        "depth": np.int64(3),
    }
    model, same = make_model(**arguments), make_model()
    assert model.config == same.config
    inputs = make_inputs(model, n=4)
    assert torch.equal(
        model.forward_with_cfg(*inputs, np.float32(4)), same.forward_with_cfg(*inputs, 4.0)
    )
    assert (get_2d_sincos_pos_embed(48, np.int64(4)) == get_2d_sincos_pos_embed(48, 4)).all()


def test_guidance_calls_the_model() -> None:
    """Not its `forward`: hooks, `model.compile()` and `fully_shard` on the whole model work for guidance too."""
    model = make_model()
    x, t, y = make_inputs(model, n=4)
    seen: list[torch.Size] = []
    model.register_forward_hook(lambda module, arguments, out: seen.append(out.shape))
    model.forward_with_cfg(x, t, y, 2.0)
    assert seen == [torch.Size((4, 8, 8, 8))]
