"""The seam of every block: `x_new = x + gate * (branch + bias)`, `h = LN(x_new) * (1 + scale) + shift`, in one pass.

Shapes: x, branch, x_new, h (N, T, D) dense; gate, shift, scale (N, D) or (D,), each may be None (shift and scale only
together); bias (D,) or None; mean and rstd (N, T) in float32. x and x_new have one dtype, branch and h another or the
same: float16, bfloat16 or float32. D up to 8192. x_new is rounded before it is normalised, so that the backward sees
the numbers that the forward saw.

Backward in one pass over the rows, with xhat = (x_new - mean) rstd and g = dh (1 + scale):
dx = dx_new + rstd (g - mean_D(g) - xhat mean_D(g xhat)), dbranch = gate dx, dgate = sum_T dx (branch + bias),
dshift = sum_T dh, dscale = sum_T dh xhat, dbias = sum_{N,T} gate dx, and h once more where it is asked for. A program
owns some tokens of one sample and keeps their sums in registers; a second kernel adds the sums of the programs of a
sample. There are no atomics, and nothing is summed across samples but dbias.
"""

from __future__ import annotations

from typing import NamedTuple

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
    branch,
    gate,
    shift,
    scale,
    bias,
    x_new,
    h,
    mean,
    rstd,
    tokens,
    gate_stride,
    shift_stride,
    scale_stride,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sample = row // tokens
    columns = tl.arange(0, BLOCK_D)
    added = load_row(branch, row, columns, D)
    if bias is not None:
        added += load_vector(bias, 0, 0, columns, D)
    if gate is not None:
        added *= load_vector(gate, sample, gate_stride, columns, D)
    stream = (load_row(x, row, columns, D) + added).to(x_new.dtype.element_ty)
    store_row(x_new, row, columns, stream, D)
    y, row_mean, row_rstd = normalise(stream.to(tl.float32), columns, eps, D)
    if scale is not None:
        y = y * (1.0 + load_vector(scale, sample, scale_stride, columns, D))
        y = y + load_vector(shift, sample, shift_stride, columns, D)
    store_row(h, row, columns, y, D)
    tl.store(mean + row, row_mean)
    tl.store(rstd + row, row_rstd)


@triton.jit
def _backward_kernel(
    dh,
    dx_new,
    x_new,
    branch,
    gate,
    shift,
    scale,
    bias,
    mean,
    rstd,
    dx,
    dbranch,
    h,
    partials,
    tokens,
    slices,
    gate_stride,
    shift_stride,
    scale_stride,
    COUNT: tl.constexpr,
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
    if gate is not None:
        gating = load_vector(gate, sample, gate_stride, columns, D)
    dgate = tl.zeros([BLOCK_D], tl.float32)
    dshift = tl.zeros([BLOCK_D], tl.float32)
    dscale = tl.zeros([BLOCK_D], tl.float32)
    dstream = tl.zeros([BLOCK_D], tl.float32)
    end = first + 1 if ROWS == 1 else tl.minimum(first + ROWS, tokens)
    for token in tl.range(first, end, num_stages=STAGES):
        row = sample * tokens + token
        arriving = load_row(dh, row, columns, D)
        row_rstd = tl.load(rstd + row)
        xhat = (load_row(x_new, row, columns, D) - tl.load(mean + row)) * row_rstd
        xhat = tl.where(columns < D, xhat, 0.0)
        stream = normalise_backward(arriving * factor, xhat, row_rstd, D)
        if dx_new is not None:
            stream += load_row(dx_new, row, columns, D)
        store_row(dx, row, columns, stream, D)
        dshift += arriving
        dscale += arriving * xhat
        if gate is not None:
            store_row(dbranch, row, columns, stream * gating, D)
            dgate += stream * load_row(branch, row, columns, D)
        else:
            store_row(dbranch, row, columns, stream, D)
        if bias is not None:
            dstream += stream
        if h is not None:
            y = xhat * factor
            if shift is not None:
                # Loaded anew for every row: the cache has it, and a register for it would be one too many.
                y += load_vector(shift, sample, shift_stride, columns, D)
            store_row(h, row, columns, y, D)
    # The order of `_summed`.
    if scale is not None:
        store_partial(partials, program, 0, dshift, columns, COUNT, D)
        store_partial(partials, program, 1, dscale, columns, COUNT, D)
    if gate is not None:
        if bias is not None:
            dgate += dstream * load_vector(bias, 0, 0, columns, D)
        store_partial(partials, program, 2 if scale is not None else 0, dgate, columns, COUNT, D)
    if bias is not None:
        if gate is not None:
            dstream *= gating
        store_partial(partials, program, COUNT - 1, dstream, columns, COUNT, D)


def forward(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_new in the dtype of x, h in that of branch, mean and 1/std of every row of x_new."""
    n, tokens, d = x.shape
    x_new = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty(x.shape, dtype=branch.dtype, device=x.device)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    gate, gate_stride = vector_stride(gate)
    shift, shift_stride = vector_stride(shift)
    scale, scale_stride = vector_stride(scale)
    bias, _ = vector_stride(bias)
    tile = forward_tile(d, branch.element_size())
    launch(
        _forward_kernel,
        (n * tokens,),
        x.contiguous(),
        branch.contiguous(),
        gate,
        shift,
        scale,
        bias,
        x_new,
        h,
        mean,
        rstd,
        tokens,
        gate_stride,
        shift_stride,
        scale_stride,
        eps,
        D=d,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
        maxnreg=tile.maxnreg,
    )
    return x_new, h, mean, rstd


class Gradients(NamedTuple):
    """What `backward` returns; None where there is nothing to return."""

    dx: Tensor
    dbranch: Tensor
    dgate: Tensor | None
    dshift: Tensor | None
    dscale: Tensor | None
    dbias: Tensor | None
    h: Tensor | None


def backward(
    dh: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    with_h: bool,
) -> Gradients:
    """The gradients; `dx_new` None means that nobody used x_new. `with_h` also gives h, computed again."""
    n, tokens, d = x_new.shape
    dx = torch.empty(x_new.shape, dtype=x_new.dtype, device=x_new.device)
    dbranch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    h = torch.empty_like(dbranch) if with_h else None
    tile = backward_tile(n, tokens, d)
    slices = triton.cdiv(tokens, tile.rows)
    summed = _summed(gate, shift, scale, bias)
    partials = None
    if summed:
        size = (n * slices, len(summed), d)
        partials = torch.empty(size, dtype=torch.float32, device=x_new.device)
    gate_read, gate_stride = vector_stride(gate)
    shift_read, shift_stride = vector_stride(shift)
    scale_read, scale_stride = vector_stride(scale)
    bias_read, _ = vector_stride(bias)
    launch(
        _backward_kernel,
        (n * slices,),
        dh.contiguous(),
        None if dx_new is None else dx_new.contiguous(),
        x_new.contiguous(),
        branch.contiguous(),
        gate_read,
        shift_read,
        scale_read,
        bias_read,
        mean.contiguous(),
        rstd.contiguous(),
        dx,
        dbranch,
        h,
        partials,
        tokens,
        slices,
        gate_stride,
        shift_stride,
        scale_stride,
        COUNT=len(summed),
        D=d,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        maxnreg=most_registers(128, tile.num_warps),
    )
    sums: dict[str, Tensor | None] = {}
    if partials is not None:
        sums = dict(zip(summed, sum_slices(partials, n, list(summed.values())), strict=True))
    return Gradients(
        dx, dbranch, sums.get("gate"), sums.get("shift"), sums.get("scale"), sums.get("bias"), h
    )


def _summed(
    gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, bias: Tensor | None
) -> dict[str, Tensor]:
    """The vectors whose gradients are sums over tokens, in the order in which the kernel writes them."""
    vectors = {"shift": shift, "scale": scale, "gate": gate, "bias": bias}
    return {name: vector for name, vector in vectors.items() if vector is not None}
