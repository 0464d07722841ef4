"""`h = LN(x) * (1 + scale) + shift`: one pass over x forward, one backward.

Shapes: x, dh, h, dx (N, T, D) dense; shift and scale (N, D) or (D,), both None for a plain LN; mean and rstd (N, T) in
float32. float16, bfloat16 or float32, D up to 8192.

Backward, with xhat = (x - mean) rstd and g = dh (1 + scale): dx = rstd (g - mean_D(g) - xhat mean_D(g xhat)),
dshift = sum_T dh, dscale = sum_T dh xhat. A program owns some tokens of one sample and keeps their sums in registers; a
second kernel adds the sums of the programs of a sample. There are no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .rows import (
    backward_tile,
    forward_tile,
    load_row,
    load_vector,
    most_registers,
    normalise,
    normalise_backward,
    store_partial,
    store_row,
    sum_slices,
    vector_stride,
)


@triton.jit
def _forward_kernel(
    x,
    shift,
    scale,
    h,
    mean,
    rstd,
    tokens,
    shift_stride,
    scale_stride,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sample = row // tokens
    columns = tl.arange(0, BLOCK_D)
    y, row_mean, row_rstd = normalise(load_row(x, row, columns, D), columns, eps, D)
    if scale is not None:
        y = y * (1.0 + load_vector(scale, sample, scale_stride, columns, D))
        y = y + load_vector(shift, sample, shift_stride, columns, D)
    store_row(h, row, columns, y, D)
    tl.store(mean + row, row_mean)
    tl.store(rstd + row, row_rstd)


@triton.jit
def _backward_kernel(
    dh,
    x,
    scale,
    mean,
    rstd,
    dx,
    partials,
    tokens,
    slices,
    scale_stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // slices).to(tl.int64)
    first = (program % slices) * ROWS
    columns = tl.arange(0, BLOCK_D)
    factor = 1.0
    if scale is not None:
        factor += load_vector(scale, sample, scale_stride, columns, D)
    dshift = tl.zeros([BLOCK_D], tl.float32)
    dscale = tl.zeros([BLOCK_D], tl.float32)
    end = first + 1 if ROWS == 1 else tl.minimum(first + ROWS, tokens)
    for token in tl.range(first, end, num_stages=STAGES):
        row = sample * tokens + token
        arriving = load_row(dh, row, columns, D)
        row_rstd = tl.load(rstd + row)
        xhat = (load_row(x, row, columns, D) - tl.load(mean + row)) * row_rstd
        xhat = tl.where(columns < D, xhat, 0.0)
        store_row(dx, row, columns, normalise_backward(arriving * factor, xhat, row_rstd, D), D)
        dshift += arriving
        dscale += arriving * xhat
    if scale is not None:
        store_partial(partials, program, 0, dshift, columns, 2, D)
        store_partial(partials, program, 1, dscale, columns, 2, D)


def forward(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """h in `out_dtype`, mean and 1/std of every row."""
    n, tokens, d = x.shape
    h = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    shift, shift_stride = vector_stride(shift)
    scale, scale_stride = vector_stride(scale)
    tile = forward_tile(d)
    launch(
        _forward_kernel,
        (n * tokens,),
        x.contiguous(),
        shift,
        scale,
        h,
        mean,
        rstd,
        tokens,
        shift_stride,
        scale_stride,
        eps,
        D=d,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
        maxnreg=tile.maxnreg,
    )
    return h, mean, rstd


def backward(
    dh: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, and dshift and dscale, or None where there is none."""
    n, tokens, d = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = backward_tile(n, tokens, d)
    slices = triton.cdiv(tokens, tile.rows)
    partials = None
    if scale is not None:
        partials = torch.empty((n * slices, 2, d), dtype=torch.float32, device=x.device)
    scale_read, scale_stride = vector_stride(scale)
    launch(
        _backward_kernel,
        (n * slices,),
        dh.contiguous(),
        x.contiguous(),
        scale_read,
        mean.contiguous(),
        rstd.contiguous(),
        dx,
        partials,
        tokens,
        slices,
        scale_stride,
        D=d,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        maxnreg=most_registers(96, tile.num_warps),
    )
    if partials is None:
        return dx, None, None
    dshift, dscale = sum_slices(partials, n, [shift, scale])
    return dx, dshift, dscale
