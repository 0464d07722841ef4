from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit import ops, reference
from fastdit.testing import (
    Guarded,
    assert_row_local,
    assert_same_bits,
    poisoned_memory,
)

from .helpers import (
    assert_gradcheck,
    assert_layouts_do_not_matter,
    both_ways,
    draw,
    each_dtype,
    every_way,
    kernels_only,
)

MODULE = importlib.import_module("fastdit.ops.patchify")
OPERATOR = torch.ops.fastdit.patchify.default
BACKWARD = torch.ops.fastdit.patchify_backward.default

each_size = pytest.mark.parametrize(
    ("shape", "patch_size"),
    [
        ((2, 4, 8, 8), 2),
        ((3, 3, 6, 9), 3),
        ((2, 1, 4, 12), 4),
        ((1, 5, 7, 3), 1),
        ((2, 4, 2, 2), 2),
        ((0, 4, 4, 4), 2),
    ],
    ids=str,
)
# For the kernel: all batches and patches, grids of one row and one column, more tokens than a tile has, and features on
# both sides of a power of two.
each_kernel_size = pytest.mark.parametrize(
    ("shape", "patch_size"),
    [
        ((1, 1, 1, 1), 1),
        ((2, 3, 5, 7), 1),
        ((3, 32, 6, 9), 1),
        ((5, 4, 2, 10), 2),
        ((2, 4, 18, 16), 2),
        ((3, 17, 6, 2), 2),
        ((2, 5, 9, 6), 3),
        ((1, 7, 4, 12), 4),
        ((2, 3, 10, 5), 5),
        ((3, 2, 7, 21), 7),
        ((1, 8, 16, 24), 8),
        ((2, 3, 16, 32), 16),
        ((2, 5, 16, 16), 16),
        ((2, 1, 34, 30), 1),
        ((2, 0, 4, 4), 2),
        ((2, 3, 0, 4), 2),
    ],
    ids=str,
)


@every_way
@each_dtype
@each_size
def test_forward_and_backward_move_bits(
    dtype: torch.dtype, shape: tuple[int, ...], patch_size: int
) -> None:
    assert_moves_bits(dtype, shape, patch_size)


@kernels_only
@each_dtype
@each_kernel_size
def test_kernel_sizes(dtype: torch.dtype, shape: tuple[int, ...], patch_size: int) -> None:
    assert_moves_bits(dtype, shape, patch_size)


def assert_moves_bits(dtype: torch.dtype, shape: tuple[int, ...], patch_size: int) -> None:
    x = draw(*shape, dtype=dtype).requires_grad_()
    tokens = ops.patchify(x, patch_size)
    weight = torch.randn(tokens.shape).to(dtype)
    (dx,) = torch.autograd.grad(tokens, x, weight)
    assert (tokens.dtype, dx.dtype) == (dtype, dtype)
    if not x.numel():
        assert (len(tokens), tokens.numel(), dx.shape) == (len(x), 0, x.shape)
        return
    # What unfold gives is what a convolution multiplies with its weight: channel, row, column.
    unfolded = F.unfold(x.detach().double(), patch_size, stride=patch_size).mT.to(dtype)
    assert_same_bits("tokens", tokens, unfolded)
    folded = F.fold(weight.double().mT, shape[2:], patch_size, stride=patch_size).to(dtype)
    assert_same_bits("gradient", dx, folded)


@both_ways
def test_gradcheck() -> None:
    assert_gradcheck(lambda x: ops.patchify(x, 2), {"x": draw(2, 3, 4, 6)})


@every_way
def test_layouts() -> None:
    x = draw(2, 3, 4, 6)
    assert_layouts_do_not_matter(lambda x: ops.patchify(x, 2), {"x": x}, summed={})
    variants = {
        "channels last": x.to(memory_format=torch.channels_last),
        "one sample": x[:1].expand(3, -1, -1, -1),
        "one channel": x[:, :1].expand(-1, 3, -1, -1),
        "one row": x[:, :, :1].expand(-1, -1, 4, -1),
        "cropped": draw(2, 3, 9, 9)[:, :, 2:6, 1:7],
    }
    for name, variant in variants.items():
        assert_same_bits(name, ops.patchify(variant, 2), ops.patchify(variant.contiguous(), 2))


@every_way
def test_rows_and_memory() -> None:
    x = draw(3, 2, 4, 4)
    assert_row_local("x", lambda x: ops.patchify(x, 2), x, 1)
    assert_row_local("dtokens", lambda tokens: BACKWARD(tokens, 2, 2, 2, 2), draw(3, 4, 8), 1)
    guard = Guarded(x)
    with poisoned_memory():
        tokens = ops.patchify(guard.tensor.requires_grad_(), 2)
        tokens.sum().backward()
    guard.check("x")
    assert_same_bits("tokens", tokens, reference.patchify(x, 2))
    assert_same_bits("gradient", guard.tensor.grad, torch.ones_like(x))


@kernels_only
def test_nothing_is_written_outside_of_the_results() -> None:
    with poisoned_memory():
        OPERATOR(draw(2, 3, 6, 10), 2)
        BACKWARD(draw(2, 15, 12), 2, 3, 3, 5)


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(96.0).view(2, 3, 4, 4),
        torch.arange(96.0).view(2, 4, 4, 3).permute(0, 3, 1, 2),
        torch.arange(48.0).view(1, 3, 4, 4).expand(2, -1, -1, -1),
        torch.empty(0, 3, 4, 4),
        torch.ones(2, 3, 4, 4, dtype=torch.bfloat16),
    ],
    ids=["plain", "channels last", "expanded", "batch 0", "bfloat16"],
)
@pytest.mark.parametrize("patch_size", [1, 2])
def test_opcheck(x: Tensor, patch_size: int) -> None:
    torch.library.opcheck(OPERATOR, (x, patch_size))
    tokens = OPERATOR(x, patch_size).mT.contiguous().mT
    grid = 4 // patch_size
    torch.library.opcheck(BACKWARD, (tokens, patch_size, 3, grid, grid))


def test_fake_shapes() -> None:
    x = torch.empty(2, 3, 4, 6, device="meta")
    tokens = OPERATOR(x, 2)
    assert tokens.shape == (2, 6, 12)
    assert BACKWARD(tokens, 2, 3, 2, 3).shape == x.shape


@pytest.mark.parametrize(
    ("x", "patch_size", "error", "message"),
    [
        (torch.ones(3, 4, 4), 2, ValueError, r"x: expected shape \(N, C, .*got \(3, 4, 4\)"),
        (torch.ones(1, 3, 5, 4), 2, ValueError, r"divisible by patch_size=2, got \(1, 3, 5, 4\)"),
        (torch.ones(1, 3, 4, 5), 2, ValueError, r"divisible by patch_size=2, got \(1, 3, 4, 5\)"),
        (torch.ones(1, 3, 4, 4), 0, ValueError, "patch_size=0"),
        (torch.ones(1, 3, 4, 4).int(), 2, TypeError, "x: .*torch.int32"),
        (None, 2, TypeError, "x: expected a tensor, got NoneType"),
    ],
    ids=["3-D", "height", "width", "patch 0", "integers", "none"],
)
def test_bad_input(x: Tensor, patch_size: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.patchify(x, patch_size)
