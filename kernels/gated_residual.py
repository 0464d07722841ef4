"""`x_new = x + gate * branch`: one pass forward, one backward.

Shapes: x, branch, x_new, dx, dbranch (N, T, D) dense; gate (N, D) or (D,), or None for 1. float16, bfloat16 or float32,
each its own, D up to 8192. The product is not rounded before it is added.

Backward: dbranch = gate dx, dgate = sum_T dx branch; the gradient by x is dx itself. A program owns some tokens of one
sample and keeps their sum in registers; a second kernel adds the sums of the programs of a sample. No atomics.
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
    x_new,
    tokens,
    gate_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    added = load_row(branch, row, columns, D)
    if gate is not None:
        added = added * load_vector(gate, row // tokens, gate_stride, columns, D)
    store_row(x_new, row, columns, load_row(x, row, columns, D) + added, D)


@triton.jit
def _backward_kernel(
    dx,
    branch,
    gate,
    dbranch,
    partials,
    tokens,
    slices,
    gate_stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // slices).to(tl.int64)
    first = (program % slices) * ROWS
    columns = tl.arange(0, BLOCK_D)
    factor = load_vector(gate, sample, gate_stride, columns, D)
    dgate = tl.zeros([BLOCK_D], tl.float32)
    end = first + 1 if ROWS == 1 else tl.minimum(first + ROWS, tokens)
    for token in tl.range(first, end, num_stages=STAGES):
        row = sample * tokens + token
        arriving = load_row(dx, row, columns, D)
        dgate += arriving * load_row(branch, row, columns, D)
        store_row(dbranch, row, columns, arriving * factor, D)
    store_partial(partials, program, 0, dgate, columns, 1, D)


def forward(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """x_new in the dtype of x."""
    n, tokens, d = x.shape
    x_new = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gate, gate_stride = vector_stride(gate)
    tile = forward_tile(d)
    launch(
        _forward_kernel,
        (n * tokens,),
        x.contiguous(),
        branch.contiguous(),
        gate,
        x_new,
        tokens,
        gate_stride,
        D=d,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
        maxnreg=tile.maxnreg,
    )
    return x_new


def backward(dx: Tensor, branch: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """dbranch in the dtype of branch, and dgate, or None where there is no gate."""
    if gate is None:  # a copy, which torch does as well
        return dx.to(branch.dtype, copy=True, memory_format=torch.contiguous_format), None
    n, tokens, d = branch.shape
    dbranch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    tile = backward_tile(n, tokens, d)
    slices = triton.cdiv(tokens, tile.rows)
    partials = torch.empty((n * slices, 1, d), dtype=torch.float32, device=branch.device)
    gate_read, gate_stride = vector_stride(gate)
    launch(
        _backward_kernel,
        (n * slices,),
        dx.contiguous(),
        branch.contiguous(),
        gate_read,
        dbranch,
        partials,
        tokens,
        slices,
        gate_stride,
        D=d,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )
    (dgate,) = sum_slices(partials, n, [gate])
    return dbranch, dgate
