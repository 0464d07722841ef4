"""What the kernels over rows have in common: tiles, loads, layer norm, sums over the tokens of a sample.

A row is a token: x (N, T, D) has N*T rows of D values, dense. A modulation vector is (N, D), one for the tokens of a
sample, or (D,), one for all: its stride between samples is then 0. Everything is computed in float32: values are
widened right after they are loaded and rounded when they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

LARGEST_D = 8192


@dataclass(frozen=True)
class RowTile:
    """A program's tile over one row: the power of two that holds D, and the warps that share it."""

    block_d: int
    num_warps: int
    maxnreg: int | None


def forward_tile(d: int, itemsize: int = 2) -> RowTile:
    """One row a program. Up to 2048 a single warp holds the row: its sums need no barrier, and 16 rows fit an SM.

    `itemsize` is that of a second tensor in the row. Where both are float32 the registers of one warp do not do.
    """
    block_d = max(32, triton.next_power_of_2(d))
    num_warps = {2048: itemsize // 2, 4096: 4, 8192: 16}.get(block_d, 1)
    return RowTile(block_d, num_warps, 64 if block_d == 8192 else None)


@dataclass(frozen=True)
class SliceTile:
    """A program's tile over `rows` tokens of one sample, one row after the other, with its sums in registers."""

    block_d: int
    rows: int
    num_warps: int
    num_stages: int


def backward_tile(n: int, tokens: int, d: int) -> SliceTile:
    """8 values a thread and sum. Longer slices write fewer partial sums, but need as many rows to fill the device."""
    block_d = max(32, triton.next_power_of_2(d))
    rows = 16 if n * tokens <= 8192 else 32
    # The sums of the widest rows do not fit the registers: one row a program has sums that are written at once.
    rows = 1 if block_d > 4096 else min(rows, triton.next_power_of_2(max(tokens, 1)))

    # What is in flight of the widest rows has to fit the 99 KiB of shared memory of the smallest GPUs.
    num_stages = {4096: 2, 8192: 1}.get(block_d, 3)
    return SliceTile(block_d, rows, min(32, max(1, block_d // 256)), num_stages)


def most_registers(wanted: int, num_warps: int) -> int:
    """The registers a thread may have: `wanted`, or what an SM has for so many warps.

    Left to itself the assembler spills now and then to fit one program more, or lets a program take the whole SM.
    """
    return min(wanted, 65536 // (32 * num_warps))


def vector_stride(vector: Tensor | None) -> tuple[Tensor | None, int]:
    """A vector as the kernels read it, its last dimension dense, and its stride between samples.

    What `modulation.chunk(6, dim=1)` gives is read where it lies.
    """
    if vector is None:
        return None, 0
    if vector.stride(-1) != 1:
        vector = vector.contiguous()
    return vector, vector.stride(0) if vector.dim() == 2 else 0


@triton.jit
def load_row(pointer, row, columns, D: tl.constexpr):
    """Row `row` of a dense (…, D) tensor in float32, zero past its end."""
    return tl.load(pointer + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def store_row(pointer, row, columns, value, D: tl.constexpr):
    tl.store(pointer + row * D + columns, value.to(pointer.dtype.element_ty), mask=columns < D)


@triton.jit
def load_vector(pointer, sample, stride, columns, D: tl.constexpr):
    """The vector of a sample, in float32."""
    return tl.load(pointer + sample * stride + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def normalise(x, columns, eps, D: tl.constexpr):
    """(xhat, mean, 1/std) of a row, from centred values, which a large mean does not cancel.

    Centred twice: the rounding of a large mean would shift the whole row.
    """
    mean = tl.sum(x, axis=0) / D
    centred = tl.where(columns < D, x - mean, 0.0)
    centred = tl.where(columns < D, centred - tl.sum(centred, axis=0) / D, 0.0)
    variance = tl.sum(centred * centred, axis=0) / D
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    return centred * rstd, mean, rstd


@triton.jit
def normalise_backward(g, xhat, rstd, D: tl.constexpr):
    """The gradient by x of xhat, where g arrives: rstd (g - mean(g) - xhat mean(g xhat))."""
    return rstd * (g - tl.sum(g, axis=0) / D - xhat * (tl.sum(g * xhat, axis=0) / D))


@triton.jit
def store_partial(partials, program, index, value, columns, COUNT: tl.constexpr, D: tl.constexpr):
    """Sum `index` of COUNT sums of a program, in partials (programs, COUNT, D)."""
    row = program.to(tl.int64) * COUNT + index
    tl.store(partials + row * D + columns, value, mask=columns < D)


@triton.jit
def _sum_slices_kernel(
    partials,
    out0,
    out1,
    out2,
    out3,
    slices,
    D: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    for index in tl.static_range(COUNT):
        total = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, slices, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            rows = (sample * slices + s) * COUNT + index
            inside = (s < slices)[:, None] & (columns < D)[None, :]
            total += tl.sum(
                tl.load(partials + rows[:, None] * D + columns[None, :], mask=inside, other=0.0), 0
            )
        if index == 0:
            out = out0
        elif index == 1:
            out = out1
        elif index == 2:
            out = out2
        else:
            out = out3
        if out is not None:
            store_row(out, sample, columns, total, D)


def sum_slices(partials: Tensor, n: int, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The second stage of the sums: partials (N * slices, COUNT, D) to the gradient of each vector, like the vector.

    Always in the same order, so a repeated call gives the same bits. COUNT is at most 4.
    """
    programs, count, d = partials.shape
    sums: list[Tensor | None] = []
    for vector in vectors:
        if vector is None:
            sums.append(None)
            continue
        each_sample = vector.dim() == 2
        sums.append(
            partials.new_empty((n, d), dtype=vector.dtype if each_sample else torch.float32)
        )
    block_d = 128
    launch(
        _sum_slices_kernel,
        (n, triton.cdiv(d, block_d)),
        partials,
        *sums,
        *[None] * (4 - count),
        programs // n if n else 0,
        D=d,
        COUNT=count,
        BLOCK_S=8,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return [
        total if vector is None or vector.dim() == 2 else total.sum(0).to(vector.dtype)
        for vector, total in zip(vectors, sums, strict=True)
    ]
