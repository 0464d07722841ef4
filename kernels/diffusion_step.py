"""One step of a sampler: unpatchify, guidance, the guessed x_0, the mean of x_{t-1}, its noise, in one pass.

Shapes: tokens (N, T, P*P*K) or, guided, (2N, T, P*P*K) as [conditional; unconditional], K = C, or 2C with a variance,
features ordered (row, column, channel); x, noise, out (N, C, height, width); table (steps, 5 or 7) float32, its columns
those of `StepCoefficients`; step, one int64; cfg_scale one value or (N,). float16, bfloat16 or float32.

A program owns some pixels of one sample, all channels of them: what a token holds of a pixel is then read in one piece,
and what the images hold of it along the pixels.
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
    """A program's tile: some pixels, the power of two that holds the channels, and the warps that share it."""

    block_pixels: int
    block_channels: int
    num_warps: int


def pixel_tile(channels: int, pixels: int) -> PixelTile:
    """4 values a thread: the images of a small batch shall still occupy the device."""
    block_channels = triton.next_power_of_2(channels)
    block_pixels = min(max(1, 512 // block_channels), triton.next_power_of_2(pixels))
    values = block_pixels * block_channels
    return PixelTile(block_pixels, block_channels, min(4, max(1, values // 128)))


@triton.jit
def _step_kernel(
    tokens,
    x,
    noise,
    table,
    step,
    cfg_scale,
    out,
    samples,
    cfg_number,
    cfg_stride,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GUIDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    CLIP: tl.constexpr,
    P: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks: tl.constexpr = (PIXELS + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    pixel = ((program % blocks) * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    inside = pixel < PIXELS
    if CHANNELS != BLOCK_C:
        inside = inside & (channel < CHANNELS)

    # The loads stand first, so that they overlap, and in the order that costs the fewest barriers: pixels and channels
    # are read in different layouts, between which values are exchanged.
    k = table + tl.load(step) * COLUMNS
    row, column = pixel // WIDTH, pixel % WIDTH
    token = (row // P) * (WIDTH // P) + column // P
    feature = (token * (P * P) + (row % P) * P + column % P) * OUTPUTS + channel
    conditional = tokens + sample * (PIXELS * OUTPUTS)
    output = tl.load(conditional + feature, mask=inside, other=0.0).to(tl.float32)
    if GUIDED > 0:
        # Every channel is read, guided or not: they share a load.
        unconditional = tokens + (sample + samples) * (PIXELS * OUTPUTS)
        uncond = tl.load(unconditional + feature, mask=inside, other=0.0).to(tl.float32)
        scale = cfg_number
        if cfg_scale is not None:
            scale = tl.load(cfg_scale + sample * cfg_stride).to(tl.float32)
    at = sample * (CHANNELS * PIXELS) + (channel * PIXELS + pixel)
    x_t = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if noise is not None:
        if COLUMNS == 7:
            v = tl.load(conditional + (feature + CHANNELS), mask=inside, other=0.0).to(tl.float32)
        z = tl.load(noise + at, mask=inside, other=0.0).to(tl.float32)

    if GUIDED > 0:
        output = tl.where(channel < GUIDED, uncond + scale * (output - uncond), output)
    x0 = tl.load(k) * x_t + tl.load(k + 1) * output
    if CLIP:
        x0 = tl.where(x0 > 1.0, 1.0, tl.where(x0 < -1.0, -1.0, x0))  # a NaN remains one
    next_x = tl.load(k + 2) * x0 + tl.load(k + 3) * x_t
    if noise is not None:
        sigma = tl.load(k + 4)
        if COLUMNS == 7:
            fraction = (v + 1.0) * 0.5
            log_variance = fraction * tl.load(k + 6) + (1.0 - fraction) * tl.load(k + 5)
            sigma *= tl.exp(0.5 * log_variance)
        next_x += sigma * z
    tl.store(out + at, next_x.to(out.dtype.element_ty), mask=inside)


def forward(
    tokens: Tensor,
    x: Tensor,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    cfg_scale: Tensor | None,
    cfg_number: float | None,
    guided_channels: int,
    patch_size: int,
    clip_denoised: bool,
) -> Tensor:
    """x_{t-1}, like x; guided where there is a cfg_scale (one value or (N,)) or a cfg_number."""
    n, channels, height, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    guided = cfg_scale is not None or cfg_number is not None
    tile = pixel_tile(channels, height * width)
    launch(
        _step_kernel,
        (n * triton.cdiv(height * width, tile.block_pixels),),
        tokens.contiguous(),
        x.contiguous(),
        None if noise is None else noise.contiguous(),
        table.contiguous(),
        step,
        cfg_scale,
        out,
        n,
        0.0 if cfg_number is None else float(cfg_number),
        0 if cfg_scale is None or cfg_scale.numel() == 1 else cfg_scale.stride(0),
        CHANNELS=channels,
        OUTPUTS=tokens.shape[-1] // patch_size**2,
        GUIDED=guided_channels if guided else 0,
        COLUMNS=table.shape[1],
        CLIP=clip_denoised,
        P=patch_size,
        WIDTH=width,
        PIXELS=height * width,
        BLOCK_P=tile.block_pixels,
        BLOCK_C=tile.block_channels,
        num_warps=tile.num_warps,
    )
    return out
