"""Images to tokens and back: `tokens[n, h W + w, (c P + i) P + j] = images[n, c, h P + i, w P + j]`.

Shapes: images (N, C, H P, W P) in any strides, tokens (N, H W, C P P) dense. Values are moved as they are.

A program moves some tokens of one sample, whole, in either direction: what it touches on the side of the images are
then whole rows of pixels, or nearly, so that no byte is fetched for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch


@dataclass(frozen=True)
class TokenTile:
    """A program's tile: some tokens of one sample, and the power of two that holds their features."""

    tokens: int
    block_f: int
    num_warps: int


def token_tile(tokens: int, features: int) -> TokenTile:
    """1024 elements, as long as that is a token, and 8 a thread."""
    block_f = triton.next_power_of_2(max(features, 1))
    tokens = min(max(1, 1024 // block_f), triton.next_power_of_2(max(tokens, 1)))
    return TokenTile(tokens, block_f, min(8, max(1, tokens * block_f // 256)))


@triton.jit
def _move_kernel(
    images,
    tokens,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    TO_TOKENS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    slices = (H * W + TOKENS - 1) // TOKENS
    sample = (tl.program_id(0) // slices).to(tl.int64)
    token = ((tl.program_id(0) % slices) * TOKENS + tl.arange(0, TOKENS))[:, None]
    feature = tl.arange(0, BLOCK_F)[None, :]
    inside = (token < H * W) & (feature < C * P * P)

    channel = (feature // (P * P)).to(tl.int64)
    row = (feature // P % P).to(tl.int64)
    column = (feature % P).to(tl.int64)
    first_row = (token // W * P).to(tl.int64)
    first_column = (token % W * P).to(tl.int64)
    at_images = images + sample * stride_n + (first_row * stride_y + first_column * stride_x)
    at_images += channel * stride_c + row * stride_y + column * stride_x
    at_tokens = tokens + (sample * H * W + token) * (C * P * P) + feature
    if TO_TOKENS:
        tl.store(at_tokens, tl.load(at_images, mask=inside), mask=inside)
    else:
        tl.store(at_images, tl.load(at_tokens, mask=inside), mask=inside)


def _move(images: Tensor, tokens: Tensor, p: int, *, to_tokens: bool) -> None:
    n, c, height, width = images.shape
    h, w = height // p, width // p
    tile = token_tile(h * w, c * p * p)
    launch(
        _move_kernel,
        (n * triton.cdiv(h * w, tile.tokens),),
        images,
        tokens,
        *images.stride(),
        C=c,
        H=h,
        W=w,
        P=p,
        TO_TOKENS=to_tokens,
        TOKENS=tile.tokens,
        BLOCK_F=tile.block_f,
        num_warps=tile.num_warps,
    )


def forward(x: Tensor, patch_size: int) -> Tensor:
    """tokens (N, T, C P P) of x (N, C, H P, W P)."""
    n, c, height, width = x.shape
    p = patch_size
    shape = (n, (height // p) * (width // p), c * p * p)
    tokens = torch.empty(shape, dtype=x.dtype, device=x.device)
    _move(x, tokens, p, to_tokens=True)
    return tokens


def backward(dtokens: Tensor, patch_size: int, channels: int, h: int, w: int) -> Tensor:
    """dx (N, C, H P, W P) of dtokens (N, T, C P P): the way back."""
    shape = (dtokens.shape[0], channels, h * patch_size, w * patch_size)
    dx = torch.empty(shape, dtype=dtokens.dtype, device=dtokens.device)
    _move(dx, dtokens.contiguous(), patch_size, to_tokens=False)
    return dx
