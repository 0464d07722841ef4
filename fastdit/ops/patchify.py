"""Images to tokens: (N, C, H*P, W*P) -> (N, T, C*P*P), T = H*W, row by row.

The features of a token are ordered (channel, row, column), as in the weight of a convolution with kernel and stride P,
so that `linear(patchify(x), weight.flatten(1))` is that convolution.

Source: Peebles & Xie, section 3.2, "Patchify"; Dosovitskiy et al. 2021 (ViT), section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import operations as reference
from ..validation import require_floating
from .operation import Operation, dtype_limits, needs_gradient


def _forward(x: Tensor, patch_size: int) -> Tensor:
    # A clone, because an operator may not return a view of its input, which patches of one pixel can be.
    return reference.patchify(x, patch_size).clone(memory_format=torch.contiguous_format)


def _fake(x: Tensor, patch_size: int) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty(n, (h // patch_size) * (w // patch_size), c * patch_size**2)


def _backward(dtokens: Tensor, patch_size: int, channels: int, h: int, w: int) -> Tensor:
    p = patch_size
    x = dtokens.reshape(dtokens.shape[0], h, w, channels, p, p).permute(0, 3, 1, 4, 2, 5)
    return x.clone(memory_format=torch.contiguous_format).view(-1, channels, h * p, w * p)


def _backward_fake(dtokens: Tensor, patch_size: int, channels: int, h: int, w: int) -> Tensor:
    return dtokens.new_empty(dtokens.shape[0], channels, h * patch_size, w * patch_size)


FORWARD = Operation("patchify(Tensor x, int patch_size) -> Tensor", reference=_forward, fake=_fake)
BACKWARD = Operation(
    "patchify_backward(Tensor dtokens, int patch_size, int channels, int h, int w) -> Tensor",
    reference=_backward,
    fake=_backward_fake,
)

FORWARD.add_kernel("patchify", "forward", limits=dtype_limits)
BACKWARD.add_kernel("patchify", "backward", limits=dtype_limits)


class Patchify(torch.autograd.Function):
    """The operator and its backward, the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, patch_size: int) -> Tensor:
        _, channels, height, width = x.shape
        ctx.sizes = (patch_size, channels, height // patch_size, width // patch_size)
        return torch.ops.fastdit.patchify(x, patch_size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtokens: Tensor) -> tuple[Tensor, None]:
        return torch.ops.fastdit.patchify_backward(dtokens, *ctx.sizes), None


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """(N, C, H*P, W*P) -> (N, H*W, C*P*P), features ordered (channel, row, column); exact in any dtype.

    Raises TypeError for a tensor that is not dense and floating-point; ValueError unless it is 4-D with height and
    width divisible by `patch_size`; RuntimeError if the chosen backend cannot run. While compiling it is plain torch.
    """
    require_floating("x", x)
    if x.dim() != 4 or patch_size < 1 or x.shape[2] % patch_size or x.shape[3] % patch_size:
        raise ValueError(
            f"x: expected shape (N, C, height, width) with height and width divisible by patch_size={patch_size}, "
            f"got {tuple(x.shape)}"
        )
    # A compiler moves the values together with what is around them; it cannot look into an operator.
    if torch.compiler.is_compiling() or FORWARD.choose(x) == "reference":
        return reference.patchify(x, patch_size)
    if not needs_gradient(x):
        return torch.ops.fastdit.patchify(x, patch_size)
    return Patchify.apply(x, patch_size)
