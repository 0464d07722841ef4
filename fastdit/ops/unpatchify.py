"""Tokens to images: (N, T, P*P*C) -> (N, C, H*P, W*P), T = H*W, row by row.

The features of a token are ordered (row, column, channel), the order of the final layer's rows: not that of `patchify`.

Source: Peebles & Xie, section 3.2, "Transformer decoder".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import operations as reference
from ..validation import require_floating
from .operation import Operation, dtype_limits, needs_gradient


def _forward(tokens: Tensor, patch_size: int, out_channels: int, h: int, w: int) -> Tensor:
    images = reference.unpatchify(tokens, patch_size, out_channels, (h, w))
    return images.clone(memory_format=torch.contiguous_format)


def _fake(tokens: Tensor, patch_size: int, out_channels: int, h: int, w: int) -> Tensor:
    return tokens.new_empty(tokens.shape[0], out_channels, h * patch_size, w * patch_size)


def _backward(dimages: Tensor, patch_size: int) -> Tensor:
    n, c, height, width = dimages.shape
    p, h, w = patch_size, height // patch_size, width // patch_size
    x = dimages.reshape(n, c, h, p, w, p).permute(0, 2, 4, 3, 5, 1)
    return x.clone(memory_format=torch.contiguous_format).view(n, h * w, p * p * c)


def _backward_fake(dimages: Tensor, patch_size: int) -> Tensor:
    n, c, height, width = dimages.shape
    return dimages.new_empty(n, (height // patch_size) * (width // patch_size), patch_size**2 * c)


FORWARD = Operation(
    "unpatchify(Tensor tokens, int patch_size, int out_channels, int h, int w) -> Tensor",
    reference=_forward,
    fake=_fake,
)
BACKWARD = Operation(
    "unpatchify_backward(Tensor dimages, int patch_size) -> Tensor",
    reference=_backward,
    fake=_backward_fake,
)

FORWARD.add_kernel("unpatchify", "forward", limits=dtype_limits)
BACKWARD.add_kernel("unpatchify", "backward", limits=dtype_limits)


class Unpatchify(torch.autograd.Function):
    """The operator and its backward, the inverse permutation."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, patch_size: int, out_channels: int, h: int, w: int
    ) -> Tensor:
        ctx.patch_size = patch_size
        return torch.ops.fastdit.unpatchify(tokens, patch_size, out_channels, h, w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dimages: Tensor) -> tuple[Tensor, None, None, None, None]:
        dtokens = torch.ops.fastdit.unpatchify_backward(dimages, ctx.patch_size)
        return dtokens, None, None, None, None


def unpatchify(tokens: Tensor, patch_size: int, out_channels: int, grid: tuple[int, int]) -> Tensor:
    """(N, H*W, P*P*C) -> (N, C, H*P, W*P), `grid` (H, W), features ordered (row, column, channel); exact in any dtype.

    Raises TypeError for a tensor that is not dense and floating-point; ValueError unless its shape is
    (N, H*W, P*P*out_channels); RuntimeError if the chosen backend cannot run. While compiling it is plain torch.
    """
    require_floating("tokens", tokens)
    h, w = grid
    if tokens.dim() != 3 or tuple(tokens.shape[1:]) != (h * w, patch_size**2 * out_channels):
        raise ValueError(
            f"tokens: expected shape (N, {h * w}, {patch_size**2 * out_channels}) for grid={grid}, "
            f"patch_size={patch_size}, out_channels={out_channels}, got {tuple(tokens.shape)}"
        )
    # A compiler moves the values together with what is around them; it cannot look into an operator.
    if torch.compiler.is_compiling() or FORWARD.choose(tokens) == "reference":
        return reference.unpatchify(tokens, patch_size, out_channels, grid)
    if not needs_gradient(tokens):
        return torch.ops.fastdit.unpatchify(tokens, patch_size, out_channels, h, w)
    return Unpatchify.apply(tokens, patch_size, out_channels, h, w)
