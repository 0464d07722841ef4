from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdit import ops
from fastdit.testing import Guarded, assert_row_local, assert_same_bits, poisoned_memory

from .helpers import (
    assert_gradcheck,
    assert_layouts_do_not_matter,
    both_ways,
    draw,
    each_dtype,
    every_way,
    kernels_only,
)

MODULE = importlib.import_module("fastdit.ops.unpatchify")
OPERATOR = torch.ops.fastdit.unpatchify.default
BACKWARD = torch.ops.fastdit.unpatchify_backward.default

each_size = pytest.mark.parametrize(
    ("n", "patch_size", "channels", "grid"),
    [
        (2, 2, 8, (4, 4)),
        (3, 3, 3, (2, 3)),
        (2, 4, 1, (3, 1)),
        (1, 1, 5, (7, 3)),
        (2, 2, 4, (1, 1)),
        (0, 2, 4, (2, 2)),
    ],
)
# For the kernel: all batches and patches, grids of one row and one column, more pixels than a tile has, and channels on
# both sides of a power of two.
each_kernel_size = pytest.mark.parametrize(
    ("n", "patch_size", "channels", "grid"),
    [
        (1, 1, 1, (1, 1)),
        (2, 1, 3, (5, 7)),
        (3, 1, 32, (6, 9)),
        (5, 2, 8, (1, 5)),
        (2, 2, 8, (9, 3)),
        (3, 2, 17, (3, 1)),
        (2, 3, 5, (3, 2)),
        (1, 4, 7, (1, 3)),
        (2, 4, 32, (2, 5)),
        (2, 5, 3, (2, 1)),
        (3, 7, 2, (1, 3)),
        (1, 8, 8, (2, 5)),
        (2, 16, 6, (1, 2)),
        (2, 16, 9, (1, 1)),
        (2, 2, 0, (2, 2)),
        (2, 2, 3, (0, 2)),
        (2, 2, 3, (2, 0)),
    ],
    ids=str,
)


def move(tokens: Tensor, p: int, c: int, grid: tuple[int, int]) -> Tensor:
    """`out[c, p h + i, p w + j] = tokens[h W + w, (p i + j) C + c]`, element by element."""
    h, w = grid
    out = tokens.new_empty(len(tokens), c, h * p, w * p)
    for row in range(h * p):
        for column in range(w * p):
            token = (row // p) * w + column // p
            first = (p * (row % p) + column % p) * c
            out[:, :, row, column] = tokens[:, token, first : first + c]
    return out


@every_way
@each_dtype
@each_size
def test_forward_and_backward_move_bits(
    dtype: torch.dtype, n: int, patch_size: int, channels: int, grid: tuple[int, int]
) -> None:
    assert_moves_bits(dtype, n, patch_size, channels, grid)


@kernels_only
@each_dtype
@each_kernel_size
def test_kernel_sizes(
    dtype: torch.dtype, n: int, patch_size: int, channels: int, grid: tuple[int, int]
) -> None:
    assert_moves_bits(dtype, n, patch_size, channels, grid)


def assert_moves_bits(
    dtype: torch.dtype, n: int, patch_size: int, channels: int, grid: tuple[int, int]
) -> None:
    tokens = draw(n, grid[0] * grid[1], patch_size**2 * channels, dtype=dtype).requires_grad_()
    images = ops.unpatchify(tokens, patch_size, channels, grid)
    assert_same_bits("images", images, move(tokens.detach(), patch_size, channels, grid))
    weight = torch.randn(tokens.shape).to(dtype)
    # The gradient goes the way back: what is moved forwards comes home.
    arriving = move(weight, patch_size, channels, grid)
    (gradient,) = torch.autograd.grad(images, tokens, arriving)
    assert_same_bits("gradient", gradient, weight)
    assert (images.dtype, gradient.dtype) == (dtype, dtype)


@both_ways
def test_order_of_features_is_not_that_of_patchify() -> None:
    x = draw(2, 3, 4, 6)
    tokens = ops.patchify(x, 2)
    assert not torch.equal(ops.unpatchify(tokens, 2, 3, (2, 3)), x)
    swapped = tokens.view(2, 6, 3, 4).mT.reshape(2, 6, 12)  # (C, P P) to (P P, C)
    assert_same_bits("round trip", ops.unpatchify(swapped, 2, 3, (2, 3)), x)


@both_ways
def test_gradcheck() -> None:
    assert_gradcheck(
        lambda tokens: ops.unpatchify(tokens, 2, 3, (2, 3)), {"tokens": draw(2, 6, 12)}
    )


@every_way
def test_layouts() -> None:
    tokens = draw(2, 6, 12)
    assert_layouts_do_not_matter(
        lambda tokens: ops.unpatchify(tokens, 2, 3, (2, 3)), {"tokens": tokens}, summed={}
    )
    for name, variant in {
        "one sample": tokens[:1].expand(3, -1, -1),
        "one token": tokens[:, :1].expand(-1, 6, -1),
        "one feature": tokens[:, :, :1].expand(-1, -1, 12),
    }.items():
        expected = ops.unpatchify(variant.contiguous(), 2, 3, (2, 3))
        assert_same_bits(name, ops.unpatchify(variant, 2, 3, (2, 3)), expected)


@every_way
def test_layouts_of_the_gradient() -> None:
    dimages = draw(2, 3, 4, 6)
    for name, variant in {
        "channels last": dimages.to(memory_format=torch.channels_last),
        "one channel": dimages[:, :1].expand(-1, 3, -1, -1),
        "one row": dimages[:, :, :1].expand(-1, -1, 4, -1),
        "cropped": draw(2, 3, 9, 9)[:, :, 2:6, 1:7],
    }.items():
        tokens = draw(2, 6, 12).requires_grad_()
        (gradient,) = torch.autograd.grad(ops.unpatchify(tokens, 2, 3, (2, 3)), tokens, variant)
        assert_same_bits(name, gradient, BACKWARD(variant.contiguous(), 2))
        assert_same_bits(name, move(gradient, 2, 3, (2, 3)), variant)


@every_way
def test_rows_and_memory() -> None:
    tokens = draw(3, 4, 8)
    assert_row_local("tokens", lambda z: ops.unpatchify(z, 2, 2, (2, 2)), tokens, 1)
    assert_row_local("dimages", lambda images: BACKWARD(images, 2), draw(3, 2, 4, 4), 1)
    guard = Guarded(tokens)
    with poisoned_memory():
        images = ops.unpatchify(guard.tensor.requires_grad_(), 2, 2, (2, 2))
        images.sum().backward()
    guard.check("tokens")
    assert_same_bits("images", images, move(tokens, 2, 2, (2, 2)))
    assert_same_bits("gradient", guard.tensor.grad, torch.ones_like(tokens))


@kernels_only
def test_nothing_is_written_outside_of_the_results() -> None:
    with poisoned_memory():
        OPERATOR(draw(2, 15, 12), 2, 3, 3, 5)
        BACKWARD(draw(2, 3, 6, 10), 2)


@pytest.mark.parametrize(
    "tokens",
    [
        torch.arange(96.0).view(2, 4, 12),
        torch.arange(96.0).view(2, 12, 4).mT,
        torch.arange(48.0).view(1, 4, 12).expand(2, -1, -1),
        torch.empty(0, 4, 12),
        torch.ones(2, 4, 12, dtype=torch.bfloat16),
    ],
    ids=["plain", "transposed", "expanded", "batch 0", "bfloat16"],
)
@pytest.mark.parametrize(("patch_size", "channels"), [(1, 12), (2, 3)])
def test_opcheck(tokens: Tensor, patch_size: int, channels: int) -> None:
    torch.library.opcheck(OPERATOR, (tokens, patch_size, channels, 2, 2))
    images = OPERATOR(tokens, patch_size, channels, 2, 2).to(memory_format=torch.channels_last)
    torch.library.opcheck(BACKWARD, (images, patch_size))


def test_fake_shapes() -> None:
    tokens = torch.empty(2, 6, 12, device="meta")
    images = OPERATOR(tokens, 2, 3, 2, 3)
    assert images.shape == (2, 3, 4, 6)
    assert BACKWARD(images, 2).shape == tokens.shape


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.ones(4, 12), ValueError, r"tokens: expected shape \(N, 4, 12\).*got \(4, 12\)"),
        (torch.ones(1, 5, 12), ValueError, r"\(N, 4, 12\) for grid=\(2, 2\).*got \(1, 5, 12\)"),
        (torch.ones(1, 4, 16), ValueError, r"out_channels=3, got \(1, 4, 16\)"),
        (torch.ones(1, 4, 12).long(), TypeError, "tokens: .*torch.int64"),
        ([1.0], TypeError, "tokens: expected a tensor, got list"),
    ],
    ids=["2-D", "tokens", "features", "integers", "list"],
)
def test_bad_input(tokens: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.unpatchify(tokens, 2, 3, (2, 2))
