"""Tokens to images and back: `images[n, c, h P + i, w P + j] = tokens[n, h W + w, (i P + j) C + c]`.

Shapes: tokens (N, H W, P P C) dense, images (N, C, H P, W P) in any strides. Values are moved as they are.

A program moves a row of tokens, or a part of it, in either direction: P rows of pixels in every channel. Its tile is
(pixels, channels), so that the compiler can read it along the side that is dense in one tensor and write it along the
side that is dense in the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch


@dataclass(frozen=True)
class PixelTile:
    """A program's tile: some pixels of a row of tokens, and the power of two that holds their channels."""

    block_k: int
    block_c: int
    num_warps: int


def pixel_tile(pixels: int, channels: int) -> PixelTile:
    """At most 2048 elements, as long as that is a pixel, and 8 a thread."""
    block_c = triton.next_power_of_2(max(channels, 1))
    block_k = min(max(1, 2048 // block_c), triton.next_power_of_2(max(pixels, 1)))
    return PixelTile(block_k, block_c, min(8, max(1, block_k * block_c // 256)))


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
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    pixel = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    inside = (pixel < P * W * P) & (channel < C)

    row = pixel // (W * P)
    column = pixel % (W * P)
    y = (h * P + row).to(tl.int64)
    at_images = images + sample * stride_n + (y * stride_y + column.to(tl.int64) * stride_x)
    at_images += channel.to(tl.int64) * stride_c
    token = (sample * H + h) * W + column // P
    at_tokens = tokens + (token * (P * P) + row * P + column % P) * C + channel
    if TO_TOKENS:
        tl.store(at_tokens, tl.load(at_images, mask=inside), mask=inside)
    else:
        tl.store(at_images, tl.load(at_tokens, mask=inside), mask=inside)


def _move(images: Tensor, tokens: Tensor, p: int, *, to_tokens: bool) -> None:
    n, c, height, width = images.shape
    h, w = height // p, width // p
    tile = pixel_tile(p * width, c)
    launch(
        _move_kernel,
        (n * h, triton.cdiv(p * width, tile.block_k)),
        images,
        tokens,
        *images.stride(),
        C=c,
        H=h,
        W=w,
        P=p,
        TO_TOKENS=to_tokens,
        BLOCK_K=tile.block_k,
        BLOCK_C=tile.block_c,
        num_warps=tile.num_warps,
    )


def forward(tokens: Tensor, patch_size: int, out_channels: int, h: int, w: int) -> Tensor:
    """images (N, C, H P, W P) of tokens (N, T, P P C)."""
    shape = (tokens.shape[0], out_channels, h * patch_size, w * patch_size)
    images = torch.empty(shape, dtype=tokens.dtype, device=tokens.device)
    _move(images, tokens.contiguous(), patch_size, to_tokens=False)
    return images


def backward(dimages: Tensor, patch_size: int) -> Tensor:
    """dtokens (N, T, P P C) of dimages (N, C, H P, W P): the way back."""
    n, c, height, width = dimages.shape
    p = patch_size
    shape = (n, (height // p) * (width // p), p * p * c)
    dtokens = torch.empty(shape, dtype=dimages.dtype, device=dimages.device)
    _move(dimages, dtokens, p, to_tokens=True)
    return dtokens
