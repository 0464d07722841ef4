"""Faults that the tests of the kernels must find: each is put into a copy of the source, where a test must then fail.

    python tests/kernels/mutations.py [--only NAME ...] [--jobs 2]

prints which test killed which mutation, and exits with 1 where one survives, where a text that is to be replaced is not
there exactly once, or where the tests fail without a mutation. A test kills by an assertion or, where the fault breaks
the process, by its end; any other exception is a fault of the list. Mutations that change nothing that can be observed
are not in it.

Importing torch and triton takes longer than the tests. Every run is therefore a fork of one process that has imported
them, and nothing of fastdit.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COPIED = ("fastdit", "kernels", "tests", "benchmarks", "pyproject.toml")
SECONDS = 120  # that a run may take
PRELOADED = (
    "numpy",
    "pytest",
    "safetensors.torch",
    "torch._dynamo",
    "triton.experimental.gluon",
    "triton.runtime.interpreter",
)
KILLED_BY = ("AssertionError", "Failed")  # pytest.raises and pytest.fail raise the latter


@dataclass(frozen=True)
class Mutation:
    """`old`, which `file` holds exactly once, becomes `new`; at least one of `tests` must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a run of pytest ended: its exit status (negative: the signal), and what failed by which exception."""

    status: int
    failed: list[tuple[str, str]]
    seconds: float
    log: str


ROWS, NORM, GATED = "kernels/rows.py", "kernels/layer_norm_modulate.py", "kernels/gated_residual.py"
SEAM = "kernels/gated_residual_layer_norm_modulate.py"
GELU, STEP, ADAMW = "kernels/mlp_gelu.py", "kernels/diffusion_step.py", "kernels/adamw_ema.py"
ATTENTION = "kernels/attention.py"
PATCHIFY, UNPATCHIFY = "kernels/patchify.py", "kernels/unpatchify.py"
RECOMPUTED = "fastdit/ops/recomputed.py"


def _tests(stem: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/ops/test_{stem}.py::{name}" for name in names)


def _norm(name: str) -> tuple[str, ...]:
    return _tests("layer_norm_modulate", f"{name}-interpreter]")


def _gated(name: str) -> tuple[str, ...]:
    return _tests("gated_residual", f"{name}-interpreter]")


def _seam(name: str) -> tuple[str, ...]:
    return _tests("gated_residual_layer_norm_modulate", f"{name}-interpreter]")


def _gelu(name: str) -> tuple[str, ...]:
    return _tests("mlp_gelu", f"{name}-interpreter]")


def _patchify(size: str) -> tuple[str, ...]:
    return _tests("patchify", f"test_kernel_sizes[{size}-float32-interpreter]")


def _unpatchify(size: str) -> tuple[str, ...]:
    return _tests("unpatchify", f"test_kernel_sizes[{size}-float32-interpreter]")


def _step(case: int) -> tuple[str, ...]:
    return _tests("diffusion_step", f"test_kernel_matches_the_sampler[{case}-dtype0-interpreter]")


def _adamw(name: str) -> tuple[str, ...]:
    return _tests("adamw_ema", f"{name}-interpreter]")


def _attention(*names: str) -> tuple[str, ...]:
    cases = (f"{n[:-1]}-interpreter]" if n.endswith("]") else f"{n}[interpreter]" for n in names)
    return tuple(f"tests/kernels/test_attention.py::{case}" for case in cases)


def _offsets(stem: str) -> tuple[str, ...]:
    return _tests("kernels", f"test_offsets_are_computed_in_64_bits[{stem}]")


def _image_offsets(stem: str, dimension: int, patch_size: int) -> tuple[str, ...]:
    case = f"{stem}-{dimension}-{patch_size}"
    return _tests("kernels", f"test_offsets_in_an_image_are_computed_in_64_bits[{case}]")


def _recomputed(name: str) -> tuple[str, ...]:
    case = f"interpreter-{name}-torch.float32-torch.float32"
    return _tests("recomputed", f"test_numbers[{case}]")


# Without `-interpreter`: `_norm` and its like append it.
SMALL, SLICES = "test_kernel_sizes[(2, 3, 3)-float32", "test_kernel_sizes[(2, 17, 72)-float32"

# In the kernel of adamw_ema: the weights before the update, from those after it.
BEFORE = "(p + step_size * m / (tl.sqrt_rn(v) * correction2 + eps)) / decay"

# The first of every file is what `make test` runs.
MUTATIONS = (
    # rows.py, which the kernels over rows share.
    Mutation(
        "rows: no mask of a row's load",
        ROWS,
        "tl.load(pointer + row * D + columns, mask=columns < D, other=0.0)",
        "tl.load(pointer + row * D + columns)",
        _norm(SMALL),
    ),
    Mutation(
        "rows: no mask of a vector's load",
        ROWS,
        "tl.load(pointer + sample * stride + columns, mask=columns < D, other=0.0)",
        "tl.load(pointer + sample * stride + columns)",
        _tests("gated_residual_layer_norm_modulate", "test_memory[interpreter]"),
    ),
    Mutation(
        "rows: no mask of a row's store",
        ROWS,
        "value.to(pointer.dtype.element_ty), mask=columns < D)",
        "value.to(pointer.dtype.element_ty))",
        _tests("gated_residual", "test_nothing_is_written_outside_of_the_results[interpreter]"),
    ),
    Mutation(
        "rows: no mask of a partial sum's store",
        ROWS,
        "tl.store(partials + row * D + columns, value, mask=columns < D)",
        "tl.store(partials + row * D + columns, value)",
        _tests("gated_residual", "test_nothing_is_written_outside_of_the_results[interpreter]"),
    ),
    Mutation(
        "rows: a row is not widened",
        ROWS,
        "row * D + columns, mask=columns < D, other=0.0).to(tl.float32)",
        "row * D + columns, mask=columns < D, other=0.0)",
        _tests("layer_norm_modulate", "test_largest_numbers_of_float16[interpreter]"),
    ),
    Mutation(
        "rows: eps outside of the root",
        ROWS,
        "rstd = 1.0 / tl.sqrt_rn(variance + eps)",
        "rstd = 1.0 / (tl.sqrt_rn(variance) + eps)",
        _norm("test_eps_and_out_dtype[1e-05"),
    ),
    Mutation(
        "rows: mean over BLOCK_D",
        ROWS,
        "mean = tl.sum(x, axis=0) / D",
        "mean = tl.sum(x, axis=0) / x.shape[0]",
        _norm(SMALL),
    ),
    Mutation(
        "rows: variance over BLOCK_D",
        ROWS,
        "variance = tl.sum(centred * centred, axis=0) / D",
        "variance = tl.sum(centred * centred, axis=0) / x.shape[0]",
        _norm(SMALL),
    ),
    Mutation(
        "rows: variance without the mean",
        ROWS,
        "variance = tl.sum(centred * centred, axis=0) / D",
        "variance = tl.sum(x * x, axis=0) / D",
        _norm(SMALL),
    ),
    Mutation(
        "rows: variance as E[x²] - E[x]²",
        ROWS,
        "variance = tl.sum(centred * centred, axis=0) / D",
        "variance = tl.sum(x * x, axis=0) / D - mean * mean",
        _tests("layer_norm_modulate", "test_large_mean_does_not_cancel[interpreter]"),
    ),
    Mutation(
        "rows: no second centring",
        ROWS,
        "    centred = tl.where(columns < D, centred - tl.sum(centred, axis=0) / D, 0.0)\n",
        "",
        _tests("layer_norm_modulate", "test_rounding_of_a_large_mean_does_not_show[interpreter]"),
    ),
    Mutation(
        "rows: centred past the end of a row",
        ROWS,
        "centred = tl.where(columns < D, x - mean, 0.0)",
        "centred = x - mean",
        _norm(SMALL),
    ),
    Mutation(
        "rows: backward over BLOCK_D",
        ROWS,
        "rstd * (g - tl.sum(g, axis=0) / D",
        "rstd * (g - tl.sum(g, axis=0) / g.shape[0]",
        _norm(SMALL),
    ),
    Mutation(
        "rows: backward without the variance's term",
        ROWS,
        " - xhat * (tl.sum(g * xhat, axis=0) / D))",
        ")",
        _norm(SMALL),
    ),
    Mutation(
        "rows: stride of a chunk ignored",
        ROWS,
        "vector.stride(0) if vector.dim() == 2 else 0",
        "vector.shape[1] if vector.dim() == 2 else 0",
        _gated(SMALL),
    ),
    Mutation(
        "rows: stride within a vector ignored",
        ROWS,
        "        vector = vector.contiguous()\n",
        "        pass\n",
        _seam("test_layouts_of_the_kernel[chunks"),
    ),
    Mutation(
        "rows: (D,) not summed over samples",
        ROWS,
        "total.sum(0).to(vector.dtype)",
        "total[0].to(vector.dtype)",
        _gated(SLICES),
    ),
    Mutation(
        "rows: last slice not summed",
        ROWS,
        "inside = (s < slices)[:, None]",
        "inside = (s < tl.maximum(slices - 1, 1))[:, None]",
        _gated(SLICES),
    ),
    Mutation(
        "rows: only the first slices summed",
        ROWS,
        "for start in range(0, slices, BLOCK_S):",
        "for start in range(0, BLOCK_S, BLOCK_S):",
        _gated("test_sums_of_many_slices[(N, D)"),
    ),
    Mutation(
        "rows: slices past the last one summed",
        ROWS,
        "inside = (s < slices)[:, None] & (columns < D)[None, :]",
        "inside = (s >= 0)[:, None] & (columns < D)[None, :]",
        _gated(SLICES),
    ),
    Mutation(
        "rows: slices summed in float16",
        ROWS,
        "out = out0",
        "out = out0\n            total = total.to(tl.float16)",
        _gated("test_sums_of_many_slices[(N, D)"),
    ),
    Mutation(
        "rows: place of a partial sum in 32 bits",
        ROWS,
        "row = program.to(tl.int64) * COUNT + index",
        "row = program * COUNT + index",
        _offsets("gated_residual"),
    ),
    Mutation(
        "rows: slices of a sample in 32 bits",
        ROWS,
        "sample = tl.program_id(0).to(tl.int64)",
        "sample = tl.program_id(0)",
        _offsets("gated_residual"),
    ),
    # layer_norm_modulate.py
    Mutation(
        "norm: scale instead of 1 + scale",
        NORM,
        "y = y * (1.0 + load_vector(scale, sample, scale_stride, columns, D))",
        "y = y * load_vector(scale, sample, scale_stride, columns, D)",
        _norm(SMALL),
    ),
    Mutation(
        "norm: shift and scale swapped",
        NORM,
        "(1.0 + load_vector(scale, sample, scale_stride, columns, D))\n"
        "        y = y + load_vector(shift, sample, shift_stride, columns, D)",
        "(1.0 + load_vector(shift, sample, shift_stride, columns, D))\n"
        "        y = y + load_vector(scale, sample, scale_stride, columns, D)",
        _norm(SMALL),
    ),
    Mutation(
        "norm: row % tokens",
        NORM,
        "sample = row // tokens",
        "sample = row % tokens",
        _norm(SMALL),
    ),
    Mutation(
        "norm: a row's offset in 32 bits",
        NORM,
        "row = tl.program_id(0).to(tl.int64)",
        "row = tl.program_id(0)",
        _offsets("layer_norm_modulate"),
    ),
    Mutation(
        "norm: a row's offset in 32 bits, backward",
        NORM,
        "sample = (program // slices).to(tl.int64)",
        "sample = program // slices",
        _offsets("layer_norm_modulate"),
    ),
    Mutation(
        "norm: scale instead of 1 + scale, backward",
        NORM,
        "    factor = 1.0\n",
        "    factor = 0.0\n",
        _norm(SMALL),
    ),
    Mutation(
        "norm: dscale without the last row",
        NORM,
        "dscale += arriving * xhat",
        "dscale += tl.where(token < tokens - 1, arriving * xhat, 0.0)",
        _norm(SMALL),
    ),
    Mutation(
        "norm: dscale in float16",
        NORM,
        "dscale += arriving * xhat",
        "dscale = (dscale + arriving * xhat).to(tl.float16)",
        _norm(SMALL),
    ),
    Mutation(
        "norm: dscale by g",
        NORM,
        "dscale += arriving * xhat",
        "dscale += arriving * factor * xhat",
        _norm(SMALL),
    ),
    Mutation(
        "norm: last rows not in a slice",
        NORM,
        "slices = triton.cdiv(tokens, tile.rows)",
        "slices = max(1, tokens // tile.rows)",
        _norm("test_sums_of_several_slices[(N, D)"),
    ),
    Mutation(
        "norm: sums of all slices in one place",
        NORM,
        "store_partial(partials, program, 1, dscale",
        "store_partial(partials, sample * slices, 1, dscale",
        _norm("test_sums_of_several_slices[(N, D)"),
    ),
    Mutation(
        "norm: a gradient's strides ignored",
        NORM,
        "dh.contiguous(),",
        "dh,",
        _norm("test_layouts_of_the_kernel[chunks"),
    ),
    Mutation(
        "norm: x's strides ignored",
        NORM,
        "(n * tokens,),\n        x.contiguous(),",
        "(n * tokens,),\n        x,",
        _norm("test_layouts_of_the_kernel[chunks"),
    ),
    # gated_residual.py
    Mutation(
        "gated: no gate in the backward",
        GATED,
        "arriving * factor, D)",
        "arriving, D)",
        _gated(SMALL),
    ),
    Mutation(
        "gated: no gate in the forward",
        GATED,
        "added = added * load_vector(gate, row // tokens, gate_stride, columns, D)",
        "pass",
        _gated(SMALL),
    ),
    Mutation(
        "gated: row % tokens",
        GATED,
        "load_vector(gate, row // tokens,",
        "load_vector(gate, row % tokens,",
        _gated(SMALL),
    ),
    Mutation(
        "gated: a row's offset in 32 bits",
        GATED,
        "row = tl.program_id(0).to(tl.int64)",
        "row = tl.program_id(0)",
        _offsets("gated_residual"),
    ),
    Mutation(
        "gated: a row's offset in 32 bits, backward",
        GATED,
        "sample = (program // slices).to(tl.int64)",
        "sample = program // slices",
        _offsets("gated_residual"),
    ),
    Mutation(
        "gated: dgate in float16",
        GATED,
        "dgate += arriving * load_row(branch, row, columns, D)",
        "dgate = (dgate + arriving * load_row(branch, row, columns, D)).to(tl.float16)",
        _gated(SLICES),
    ),
    Mutation(
        "gated: a gradient's strides ignored",
        GATED,
        "dx.contiguous(),",
        "dx,",
        _tests("gated_residual", "test_expanded_inputs[interpreter]"),
    ),
    Mutation(
        "gated: the branch's strides ignored, backward",
        GATED,
        "branch.contiguous(),\n        gate_read,",
        "branch,\n        gate_read,",
        _tests("gated_residual", "test_expanded_inputs[interpreter]"),
    ),
    Mutation(
        "gated: last token missing",
        GATED,
        "tl.minimum(first + ROWS, tokens)",
        "tl.minimum(first + ROWS, tokens - 1)",
        _gated(SMALL),
    ),
    # gated_residual_layer_norm_modulate.py
    Mutation(
        "seam: no bias in dgate",
        SEAM,
        "dgate += dstream * load_vector(bias, 0, 0, columns, D)",
        "pass",
        _seam(SMALL),
    ),
    Mutation(
        "seam: the stream is not widened",
        SEAM,
        "normalise(stream.to(tl.float32), columns, eps, D)",
        "normalise(stream, columns, eps, D)",
        _tests(
            "gated_residual_layer_norm_modulate", "test_largest_numbers_of_float16[interpreter]"
        ),
    ),
    Mutation(
        "seam: no bias in the forward",
        SEAM,
        "added += load_vector(bias, 0, 0, columns, D)",
        "pass",
        _seam(SMALL),
    ),
    Mutation(
        "seam: gate before bias",
        SEAM,
        "    if bias is not None:\n"
        "        added += load_vector(bias, 0, 0, columns, D)\n"
        "    if gate is not None:\n"
        "        added *= load_vector(gate, sample, gate_stride, columns, D)\n",
        "    if gate is not None:\n"
        "        added *= load_vector(gate, sample, gate_stride, columns, D)\n"
        "    if bias is not None:\n"
        "        added += load_vector(bias, 0, 0, columns, D)\n",
        _seam(SMALL),
    ),
    Mutation(
        "seam: no gate in dbias",
        SEAM,
        "dstream *= gating",
        "pass",
        _seam(SMALL),
    ),
    Mutation(
        "seam: no gate in the backward",
        SEAM,
        "stream * gating, D)",
        "stream, D)",
        _seam(SMALL),
    ),
    Mutation(
        "seam: gradient of the stream not added",
        SEAM,
        "stream += load_row(dx_new, row, columns, D)",
        "pass",
        _seam(SMALL),
    ),
    Mutation(
        "seam: stream not rounded before the norm",
        SEAM,
        "+ added).to(x_new.dtype.element_ty)",
        "+ added)",
        _tests(
            "gated_residual_layer_norm_modulate",
            "test_statistics_are_those_of_the_rounded_stream[interpreter]",
        ),
    ),
    Mutation(
        "seam: scale instead of 1 + scale",
        SEAM,
        "y = y * (1.0 + load_vector(scale, sample, scale_stride, columns, D))",
        "y = y * load_vector(scale, sample, scale_stride, columns, D)",
        _seam(SMALL),
    ),
    Mutation(
        "seam: row % tokens",
        SEAM,
        "sample = row // tokens",
        "sample = row % tokens",
        _seam(SMALL),
    ),
    Mutation(
        "seam: a row's offset in 32 bits",
        SEAM,
        "row = tl.program_id(0).to(tl.int64)",
        "row = tl.program_id(0)",
        _offsets("gated_residual_layer_norm_modulate"),
    ),
    Mutation(
        "seam: a row's offset in 32 bits, backward",
        SEAM,
        "sample = (program // slices).to(tl.int64)",
        "sample = program // slices",
        _offsets("gated_residual_layer_norm_modulate"),
    ),
    Mutation(
        "seam: order of partial sums swapped",
        SEAM,
        "store_partial(partials, program, 0, dshift, columns, COUNT, D)\n"
        "        store_partial(partials, program, 1, dscale, columns, COUNT, D)",
        "store_partial(partials, program, 0, dscale, columns, COUNT, D)\n"
        "        store_partial(partials, program, 1, dshift, columns, COUNT, D)",
        _seam(SMALL),
    ),
    Mutation(
        "seam: order of summed vectors swapped",
        SEAM,
        '"gate": gate, "bias": bias}',
        '"bias": bias, "gate": gate}',
        _seam(SMALL),
    ),
    Mutation(
        "seam: dgate in dshift's place",
        SEAM,
        "2 if scale is not None else 0, dgate",
        "0, dgate",
        _seam(SMALL),
    ),
    Mutation(
        "seam: dgate in float16",
        SEAM,
        "dgate += stream * load_row(branch, row, columns, D)",
        "dgate = (dgate + stream * load_row(branch, row, columns, D)).to(tl.float16)",
        _seam(SMALL),
    ),
    Mutation(
        "seam: dscale without the last row",
        SEAM,
        "dscale += arriving * xhat",
        "dscale += tl.where(token < tokens - 1, arriving * xhat, 0.0)",
        _seam(SMALL),
    ),
    Mutation(
        "seam: a gradient's strides ignored",
        SEAM,
        "        dh.contiguous(),",
        "        dh,",
        _seam("test_layouts_of_the_kernel[chunks"),
    ),
    Mutation(
        "seam: the stream's gradient's strides ignored",
        SEAM,
        "else dx_new.contiguous(),",
        "else dx_new,",
        _seam("test_layouts_of_the_kernel[chunks"),
    ),
    Mutation(
        "seam: h without shift in the backward",
        SEAM,
        "y += load_vector(shift, sample, shift_stride, columns, D)",
        "pass",
        _seam("test_backward_gives_h_again[(N, D)"),
    ),
    # mlp_gelu.py
    Mutation(
        "gelu: by erf, backward",
        GELU,
        "upper, lower = tl.sigmoid(2.0 * u), tl.sigmoid(-2.0 * u)",
        "upper = 0.5 * (1.0 + tl.erf(p * 0.7071067811865476))\n        lower = 1.0 - upper",
        _gelu(SMALL),
    ),
    Mutation(
        "gelu: by erf, forward",
        GELU,
        'out = F.linear(F.gelu(pre_activation, approximate="tanh"), w2, b2)',
        "out = F.linear(F.gelu(pre_activation), w2, b2)",
        _gelu(SMALL),
    ),
    Mutation(
        "gelu: by erf, inference",
        GELU,
        'activation = F.gelu(F.linear(rows, w1, b1), approximate="tanh")',
        "activation = F.gelu(F.linear(rows, w1, b1))",
        _tests("mlp_gelu", "test_without_a_backward[interpreter]"),
    ),
    Mutation(
        "gelu: derivative without its second term",
        GELU,
        "(upper + 2.0 * p * upper * lower * slope)",
        "upper",
        _gelu(SMALL),
    ),
    Mutation(
        "gelu: 1 - s(2u) instead of s(-2u)",
        GELU,
        "tl.sigmoid(-2.0 * u)",
        "1.0 - tl.sigmoid(2.0 * u)",
        _gelu("test_kernel_sizes[(2, 2, 1152)-float32"),
    ),
    Mutation(
        "gelu: db1 without the last group",
        GELU,
        "return activation, partials.sum(0)",
        "return activation, partials[: max(1, groups - 1)].sum(0)",
        _gelu(SLICES),
    ),
    Mutation(
        "gelu: db1 in float16",
        GELU,
        "total += dpre",
        "total = (total + dpre).to(tl.float16)",
        _gelu(SLICES),
    ),
    Mutation(
        "gelu: gradient overwritten before it is read",
        GELU,
        "        arriving = tl.load(dactivation",
        "        tl.store(dactivation + offsets, p.to(dactivation.dtype.element_ty), mask=inside)\n"
        "        arriving = tl.load(dactivation",
        _gelu(SMALL),
    ),
    Mutation(
        "gelu: activation in the gradient's place",
        GELU,
        "activation = torch.empty_like(pre_activation)",
        "activation = dactivation",
        _gelu(SMALL),
    ),
    Mutation(
        "gelu: mask of columns one too wide",
        GELU,
        "inside = columns < F",
        "inside = columns <= F",
        _tests("mlp_gelu", "test_memory[interpreter]"),
    ),
    Mutation(
        "gelu: a row past the last one",
        GELU,
        "tl.minimum(ROWS, rows - first)",
        "tl.minimum(ROWS, rows - first + 1)",
        _tests("mlp_gelu", "test_memory[interpreter]"),
    ),
    Mutation(
        "gelu: a row's offset in 32 bits",
        GELU,
        "offsets = (first.to(tl.int64) + i) * F + columns",
        "offsets = (first + i) * F + columns",
        _offsets("mlp_gelu"),
    ),
    Mutation(
        "gelu: place of a partial sum in 32 bits",
        GELU,
        "group.to(tl.int64) * F + columns, total",
        "group * F + columns, total",
        _offsets("mlp_gelu"),
    ),
    Mutation(
        "gelu: only the first block of columns",
        GELU,
        "columns = (tl.program_id(0) % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)",
        "columns = tl.arange(0, BLOCK_F)",
        _gelu("test_kernel_sizes[(2, 2, 1152)-float32"),
    ),
    # patchify.py
    Mutation(
        "patchify: features as (row, column, channel)",
        PATCHIFY,
        "channel = (feature // (P * P)).to(tl.int64)\n"
        "    row = (feature // P % P).to(tl.int64)\n"
        "    column = (feature % P).to(tl.int64)",
        "channel = (feature % C).to(tl.int64)\n"
        "    row = (feature // (C * P)).to(tl.int64)\n"
        "    column = (feature // C % P).to(tl.int64)",
        _patchify("(2, 5, 9, 6)-3"),
    ),
    Mutation(
        "patchify: row and column of a patch swapped",
        PATCHIFY,
        "row = (feature // P % P).to(tl.int64)\n    column = (feature % P).to(tl.int64)",
        "row = (feature % P).to(tl.int64)\n    column = (feature // P % P).to(tl.int64)",
        _patchify("(2, 5, 9, 6)-3"),
    ),
    Mutation(
        "patchify: tokens column by column",
        PATCHIFY,
        "first_row = (token // W * P).to(tl.int64)\n"
        "    first_column = (token % W * P).to(tl.int64)",
        "first_row = (token % H * P).to(tl.int64)\n"
        "    first_column = (token // H * P).to(tl.int64)",
        _patchify("(2, 5, 9, 6)-3"),
    ),
    Mutation(
        "patchify: no mask of tokens",
        PATCHIFY,
        "inside = (token < H * W) & (feature < C * P * P)",
        "inside = (token >= 0) & (feature < C * P * P)",
        _tests("patchify", "test_nothing_is_written_outside_of_the_results[interpreter]"),
    ),
    Mutation(
        "patchify: no mask of features",
        PATCHIFY,
        "inside = (token < H * W) & (feature < C * P * P)",
        "inside = (token < H * W) & (feature >= 0)",
        _tests("patchify", "test_nothing_is_written_outside_of_the_results[interpreter]"),
    ),
    Mutation(
        "patchify: strides of the images ignored",
        PATCHIFY,
        "        *images.stride(),",
        "        c * height * width,\n        height * width,\n        width,\n        1,",
        _tests("patchify", "test_layouts[interpreter]"),
    ),
    Mutation(
        "patchify: a gradient's strides ignored",
        PATCHIFY,
        "_move(dx, dtokens.contiguous(),",
        "_move(dx, dtokens,",
        _tests("patchify", "test_layouts[interpreter]"),
    ),
    Mutation(
        "patchify: a sample's offset in 32 bits",
        PATCHIFY,
        "sample = (tl.program_id(0) // slices).to(tl.int64)",
        "sample = tl.program_id(0) // slices",
        _offsets("patchify"),
    ),
    Mutation(
        "patchify: a channel's offset in 32 bits",
        PATCHIFY,
        "channel = (feature // (P * P)).to(tl.int64)",
        "channel = feature // (P * P)",
        _image_offsets("patchify", 1, 32),
    ),
    Mutation(
        "patchify: a row's offset in 32 bits",
        PATCHIFY,
        "row = (feature // P % P).to(tl.int64)",
        "row = feature // P % P",
        _image_offsets("patchify", 2, 32),
    ),
    Mutation(
        "patchify: a column's offset in 32 bits",
        PATCHIFY,
        "column = (feature % P).to(tl.int64)",
        "column = feature % P",
        _image_offsets("patchify", 3, 32),
    ),
    Mutation(
        "patchify: a token's row's offset in 32 bits",
        PATCHIFY,
        "first_row = (token // W * P).to(tl.int64)",
        "first_row = token // W * P",
        _image_offsets("patchify", 2, 1),
    ),
    Mutation(
        "patchify: a token's column's offset in 32 bits",
        PATCHIFY,
        "first_column = (token % W * P).to(tl.int64)",
        "first_column = token % W * P",
        _image_offsets("patchify", 3, 1),
    ),
    # unpatchify.py
    Mutation(
        "unpatchify: features as patchify has them",
        UNPATCHIFY,
        "(token * (P * P) + row * P + column % P) * C + channel",
        "(token * C + channel) * (P * P) + row * P + column % P",
        _unpatchify("2-3-5-(3, 2)"),
    ),
    Mutation(
        "unpatchify: row and column of a patch swapped",
        UNPATCHIFY,
        "row * P + column % P)",
        "column % P * P + row)",
        _unpatchify("2-3-5-(3, 2)"),
    ),
    Mutation(
        "unpatchify: tokens column by column",
        UNPATCHIFY,
        "token = (sample * H + h) * W + column // P",
        "token = sample * H * W + column // P * H + h",
        _unpatchify("2-3-5-(3, 2)"),
    ),
    Mutation(
        "unpatchify: no mask of pixels",
        UNPATCHIFY,
        "inside = (pixel < P * W * P) & (channel < C)",
        "inside = (pixel >= 0) & (channel < C)",
        _tests("unpatchify", "test_nothing_is_written_outside_of_the_results[interpreter]"),
    ),
    Mutation(
        "unpatchify: no mask of channels",
        UNPATCHIFY,
        "inside = (pixel < P * W * P) & (channel < C)",
        "inside = (pixel < P * W * P) & (channel >= 0)",
        _tests("unpatchify", "test_nothing_is_written_outside_of_the_results[interpreter]"),
    ),
    Mutation(
        "unpatchify: strides of a gradient ignored",
        UNPATCHIFY,
        "        *images.stride(),",
        "        c * height * width,\n        height * width,\n        width,\n        1,",
        _tests("unpatchify", "test_layouts_of_the_gradient[interpreter]"),
    ),
    Mutation(
        "unpatchify: strides of the tokens ignored",
        UNPATCHIFY,
        "_move(images, tokens.contiguous(),",
        "_move(images, tokens,",
        _tests("unpatchify", "test_layouts[interpreter]"),
    ),
    Mutation(
        "unpatchify: a sample's offset in 32 bits",
        UNPATCHIFY,
        "sample = (tl.program_id(0) // H).to(tl.int64)",
        "sample = tl.program_id(0) // H",
        _offsets("unpatchify"),
    ),
    Mutation(
        "unpatchify: a channel's offset in 32 bits",
        UNPATCHIFY,
        "channel.to(tl.int64) * stride_c",
        "channel * stride_c",
        _image_offsets("unpatchify", 1, 1),
    ),
    Mutation(
        "unpatchify: a row's offset in 32 bits",
        UNPATCHIFY,
        "y = (h * P + row).to(tl.int64)",
        "y = h * P + row",
        _image_offsets("unpatchify", 2, 1),
    ),
    Mutation(
        "unpatchify: a column's offset in 32 bits",
        UNPATCHIFY,
        "column.to(tl.int64) * stride_x",
        "column * stride_x",
        _image_offsets("unpatchify", 3, 1),
    ),
    # diffusion_step.py
    Mutation(
        "step: log variances swapped",
        STEP,
        "fraction * tl.load(k + 6) + (1.0 - fraction) * tl.load(k + 5)",
        "fraction * tl.load(k + 5) + (1.0 - fraction) * tl.load(k + 6)",
        _step(0),
    ),
    Mutation(
        "step: noise at t = 0",
        STEP,
        "sigma *= tl.exp(0.5 * log_variance)",
        "sigma = tl.exp(0.5 * log_variance)",
        _tests("diffusion_step", "test_no_noise_at_the_last_step[ddpm-interpreter]"),
    ),
    Mutation(
        "step: the next step's coefficients",
        STEP,
        "k = table + tl.load(step) * COLUMNS",
        "k = table + (tl.load(step) + 1) * COLUMNS",
        _step(0),
    ),
    Mutation(
        "step: guidance of all channels",
        STEP,
        "output = tl.where(channel < GUIDED, uncond + scale * (output - uncond), output)",
        "output = uncond + scale * (output - uncond)",
        _step(0),
    ),
    Mutation(
        "step: sign of the guidance",
        STEP,
        "uncond + scale * (output - uncond)",
        "uncond + scale * (uncond - output)",
        _step(0),
    ),
    Mutation(
        "step: guidance from the conditional half",
        STEP,
        "uncond + scale * (output - uncond)",
        "output + scale * (output - uncond)",
        _step(0),
    ),
    Mutation(
        "step: halves swapped",
        STEP,
        "conditional = tokens + sample * (PIXELS * OUTPUTS)\n",
        "conditional = tokens + (sample + samples) * (PIXELS * OUTPUTS)\n",
        _step(0),
    ),
    Mutation(
        "step: variance of the unconditional half",
        STEP,
        "v = tl.load(conditional + (feature + CHANNELS)",
        "v = tl.load(unconditional + (feature + CHANNELS)",
        _step(0),
    ),
    Mutation(
        "step: v not moved to 0 .. 1",
        STEP,
        "fraction = (v + 1.0) * 0.5",
        "fraction = v",
        _step(0),
    ),
    Mutation(
        "step: one scale for all samples",
        STEP,
        "tl.load(cfg_scale + sample * cfg_stride)",
        "tl.load(cfg_scale)",
        _step(10),
    ),
    Mutation(
        "step: not clamped",
        STEP,
        "        x0 = tl.where(x0 > 1.0, 1.0, tl.where(x0 < -1.0, -1.0, x0))  # a NaN remains one\n",
        "        x0 = x0\n",
        _step(16),
    ),
    Mutation(
        "step: a clamped NaN is a number",
        STEP,
        "tl.where(x0 > 1.0, 1.0, tl.where(x0 < -1.0, -1.0, x0))",
        "tl.where(x0 > 1.0, 1.0, tl.where(x0 > -1.0, x0, -1.0))",
        _tests("diffusion_step", "test_a_clamped_nan_is_a_nan[interpreter]"),
    ),
    Mutation(
        "step: coefficients of the mean swapped",
        STEP,
        "tl.load(k + 2) * x0 + tl.load(k + 3) * x_t",
        "tl.load(k + 3) * x0 + tl.load(k + 2) * x_t",
        _step(22),
    ),
    Mutation(
        "step: row and column of a patch swapped",
        STEP,
        "(row % P) * P + column % P)",
        "(column % P) * P + row % P)",
        _step(0),
    ),
    Mutation(
        "step: no mask of pixels",
        STEP,
        "inside = pixel < PIXELS",
        "inside = pixel >= 0",
        _tests("diffusion_step", "test_nothing_is_written_outside_of_the_results[interpreter]"),
    ),
    Mutation(
        "step: no mask of channels",
        STEP,
        "inside = inside & (channel < CHANNELS)",
        "pass",
        _tests("diffusion_step", "test_nothing_is_written_outside_of_the_results[interpreter]"),
    ),
    Mutation(
        "step: strides of the tokens ignored",
        STEP,
        "tokens.contiguous(),",
        "tokens,",
        _tests("diffusion_step", "test_layouts[ddpm-interpreter]"),
    ),
    Mutation(
        "step: a sample's offset in 32 bits",
        STEP,
        "sample = (program // blocks).to(tl.int64)",
        "sample = program // blocks",
        _offsets("diffusion_step"),
    ),
    # adamw_ema.py
    Mutation(
        "adamw: bias correction one step late",
        ADAMW,
        "t = before + 1.0",
        "t = before + 2.0",
        _adamw("test_kernel_sizes[[(17,)]-float32"),
    ),
    Mutation(
        "adamw: bias correction in float32",
        ADAMW,
        "tl.full((), BETA2, tl.float64)",
        "tl.full((), BETA2, tl.float32)",
        _adamw("test_bias_corrections_do_not_cancel[1"),
    ),
    Mutation(
        "adamw: weight decay in the gradient, too",
        ADAMW,
        "        g *= clip\n",
        "        g = g * clip + (1.0 - decay) * p\n",
        _adamw("test_kernel_sizes[[(17,)]-float32"),
    ),
    Mutation(
        "adamw: no weight decay",
        ADAMW,
        "p = p * decay - step_size",
        "p = p - step_size",
        _adamw("test_kernel_sizes[[(17,)]-float32"),
    ),
    Mutation(
        "adamw: average of the weights before the update",
        ADAMW,
        "_lerp(ema, p, ema_weights[index])",
        f"_lerp(ema, {BEFORE}, ema_weights[index])",
        _adamw("test_kernel_sizes[[(17,)]-float32"),
    ),
    Mutation(
        "adamw: average weighted the other way",
        ADAMW,
        "_lerp(ema, p, ema_weights[index])",
        "_lerp(p, ema, ema_weights[index])",
        _adamw("test_options[{'clip': 0.37}"),
    ),
    Mutation(
        "adamw: update on a bad step",
        ADAMW,
        "    if tl.load(scalars) == 0.0:\n        return\n",
        "",
        _adamw("test_a_bad_step_changes_nothing[flag0"),
    ),
    Mutation(
        "adamw: average on a bad step",
        ADAMW,
        "    if tl.load(scalars) == 0.0:\n        return\n",
        "    if tl.load(scalars) == 0.0:\n"
        "        for index in tl.static_range(len(ema_weights)):\n"
        "            p = tl.load(tl.load(parameters).to(tl.pointer_type(tl.float32)))\n"
        "            ema = tl.load(emas[index]).to(tl.pointer_type(tl.float32))\n"
        "            tl.store(ema, _lerp(tl.load(ema), p, ema_weights[index]))\n"
        "        return\n",
        _adamw("test_a_bad_step_changes_nothing[flag0"),
    ),
    Mutation(
        "adamw: step counted on a bad step",
        ADAMW,
        "tl.store(step, (before + good)",
        "tl.store(step, (before + 1.0)",
        _adamw("test_a_bad_step_changes_nothing[flag0"),
    ),
    Mutation(
        "adamw: clip ignored",
        ADAMW,
        "        g *= clip\n",
        "",
        _adamw("test_options[{'clip': 0.37}"),
    ),
    Mutation(
        "adamw: copy of the weights before the update",
        ADAMW,
        "+ at, p.to(COPY), mask=inside)",
        f"+ at, ({BEFORE}).to(COPY), mask=inside)",
        _adamw("test_kernel_sizes[[(17,)]-float32"),
    ),
    Mutation(
        "adamw: last chunk dropped",
        ADAMW,
        "(len(chunks),),",
        "(max(1, len(chunks) - 1),),",
        _adamw("test_kernel_sizes[[(4097,)]-float32"),
    ),
    # attention.py
    Mutation(
        "attention: scale not in the scores",
        ATTENTION,
        "    return scale * LOG2_E.value",
        "    return LOG2_E.value",
        _attention("test_scale[2.0]"),
    ),
    Mutation(
        "attention: scale without log2(e)",
        ATTENTION,
        "    return scale * LOG2_E.value",
        "    return scale",
        _attention("test_sizes[3-3-72-float16]"),
    ),
    Mutation(
        "attention: no scale of dq",
        ATTENTION,
        "_scaled(sums, scale), dq_at",
        "sums, dq_at",
        _attention("test_sizes[3-3-72-float16]"),
    ),
    Mutation(
        "attention: no scale of dk",
        ATTENTION,
        "_scaled(dk_sums, scale), dkv_at",
        "dk_sums, dkv_at",
        _attention("test_sizes[3-3-72-float16]"),
    ),
    Mutation(
        "attention: keys past the last have a score",
        ATTENTION,
        'score = tl.where(inside[None, :], score, float("-inf"))',
        "pass",
        _attention("test_sizes[3-3-72-float16]"),
    ),
    Mutation(
        "attention: keys past the last have a score of zero",
        ATTENTION,
        'score = tl.where(inside[None, :], score, float("-inf"))',
        "score = tl.where(inside[None, :], score, 0.0)",
        _attention("test_sizes[3-3-72-float16]"),
    ),
    Mutation(
        "attention: keys past the last have a weight, backward",
        ATTENTION,
        "            p = tl.where((tl.arange(0, BLOCK_S) < keys - start)[None, :], p, 0.0)\n",
        "            pass\n",
        _attention("test_very_negative_scores[37-float32]"),
    ),
    Mutation(
        "attention: no mask of rows",
        ATTENTION,
        "inside = inside & (tl.arange(0, ROWS) < rows)[:, None]",
        "pass",
        _attention("test_tokens_beyond_a_slice_are_not_read_and_not_written"),
    ),
    Mutation(
        "attention: no mask of columns",
        ATTENTION,
        "inside = inside & (tl.arange(0, WIDTH) < COLUMNS)[None, :]",
        "pass",
        _attention("test_heads_and_samples_are_not_mixed", "test_sizes[3-3-72-float16]"),
    ),
    Mutation(
        "attention: tail of K not in the scores",
        ATTENTION,
        '        product = tl.dot(a[1], tl.trans(b[1]), product, input_precision="ieee")\n',
        "        pass\n",
        _attention("test_sizes[3-3-72-float16]"),
    ),
    Mutation(
        "attention: tail of K from the first columns",
        ATTENTION,
        "rows + MAIN + tl.arange(0, TAIL)[None, :]",
        "rows + tl.arange(0, TAIL)[None, :]",
        _attention("test_sizes[3-3-72-float16]"),
    ),
    Mutation(
        "attention: tail of K not in delta",
        ATTENTION,
        "row_delta += tl.sum(arriving[1].to(tl.float32) * gave[1].to(tl.float32), 1)",
        "pass",
        _attention("test_sizes[3-3-72-float16]"),
    ),
    Mutation(
        "attention: heads and samples swapped",
        ATTENTION,
        "sample = (program // H).to(tl.int64)\n    return pointer + sample * sample_stride * 8 + (program % H)",
        "sample = (program % H).to(tl.int64)\n    return pointer + sample * sample_stride * 8 + (program // H)",
        _attention("test_heads_and_samples_are_not_mixed"),
    ),
    Mutation(
        "attention: one head for all",
        ATTENTION,
        "(program % H).to(tl.int64) * HEAD",
        "0 * HEAD",
        _attention("test_sizes[3-3-72-float16]"),
    ),
    Mutation(
        "attention: lse in base 2",
        ATTENTION,
        "(largest + tl.log2(total)) / LOG2_E",
        "largest + tl.log2(total)",
        _attention("test_equal_scores_are_a_mean"),
    ),
    Mutation(
        "attention: lse without the sum",
        ATTENTION,
        "(largest + tl.log2(total)) / LOG2_E",
        "largest / LOG2_E",
        _attention("test_equal_scores_are_a_mean"),
    ),
    Mutation(
        "attention: lse taken in base 2 for dq",
        ATTENTION,
        "mask=token < tokens, other=0.0) * LOG2_E",
        "mask=token < tokens, other=0.0)",
        _attention("test_sizes[3-3-72-float16]"),
    ),
    Mutation(
        "attention: lse taken in base 2 for dk and dv",
        ATTENTION,
        "tokens, BLOCK_T, WHOLE_T) * LOG2_E",
        "tokens, BLOCK_T, WHOLE_T)",
        _attention("test_sizes[3-3-72-float16]"),
    ),
    Mutation(
        "attention: no delta in dq",
        ATTENTION,
        "(_inner(arriving, value) - row_delta[:, None])",
        "_inner(arriving, value)",
        _attention("test_sizes[3-3-72-float16]"),
    ),
    Mutation(
        "attention: no delta in dk",
        ATTENTION,
        "(_inner(value, arriving) - row_delta)",
        "_inner(value, arriving)",
        _attention("test_sizes[3-3-72-float16]"),
    ),
    Mutation(
        "attention: what was summed is not rescaled",
        ATTENTION,
        "_add_product(_scaled(attended, shrink[:, None]), p, value)",
        "_add_product(attended, p, value)",
        _attention("test_increasing_scores"),
    ),
    Mutation(
        "attention: the sum is not rescaled",
        ATTENTION,
        "total = total * shrink + tl.sum(p, 1)",
        "total = total + tl.sum(p, 1)",
        _attention("test_increasing_scores"),
    ),
    Mutation(
        "attention: the largest score is not kept",
        ATTENTION,
        "largest = tl.maximum(before, tl.max(score, 1) * scale_log2)",
        "largest = tl.max(score, 1) * scale_log2",
        _attention("test_increasing_scores"),
    ),
    Mutation(
        "attention: no largest score is taken off",
        ATTENTION,
        "largest = tl.maximum(before, tl.max(score, 1) * scale_log2)",
        "largest = tl.zeros([BLOCK_T], tl.float32)",
        _attention("test_large_scores[float32]"),
    ),
    Mutation(
        "attention: the first keys only",
        ATTENTION,
        "attended = _zeros(BLOCK_T, MAIN, TAIL)\n    for start in range(0, keys, BLOCK_S):",
        "attended = _zeros(BLOCK_T, MAIN, TAIL)\n    for start in range(0, BLOCK_S, BLOCK_S):",
        _attention("test_increasing_scores"),
    ),
    Mutation(
        "attention: weights are not rounded to the inputs' dtype",
        ATTENTION,
        "    weights = weights.to(x[0].dtype)\n",
        "    weights = weights.to(tl.float16)\n",
        _attention("test_sizes[100-100-64-float32]"),
    ),
    Mutation(
        "attention: dv from ds",
        ATTENTION,
        "dv_sums = _add_product(dv_sums, p, arriving)",
        "dv_sums = _add_product(dv_sums, p * 0.5, arriving)",
        _attention("test_sizes[3-3-72-float16]"),
    ),
    Mutation(
        "attention: a sample's offset in 32 bits",
        ATTENTION,
        "sample = (program // H).to(tl.int64)",
        "sample = program // H",
        _offsets("attention"),
    ),
    Mutation(
        "attention: strides of v are not those of k",
        ATTENTION,
        "(k, v) if k.stride() == v.stride() else (k.contiguous(), v.contiguous())",
        "(k, v)",
        _attention("test_strides"),
    ),
    Mutation(
        "attention: strides are not divided by 8",
        ATTENTION,
        "stride % STRIDE == 0 for size",
        "True for size",
        _attention("test_strides"),
    ),
    Mutation(
        "attention: a gradient's strides ignored",
        ATTENTION,
        "dout, out, lse, q = dout.contiguous(), out",
        "dout, out, lse, q = dout, out",
        _attention("test_strides"),
    ),
    Mutation(
        "attention: whole blocks where there are none",
        ATTENTION,
        '"WHOLE_S": k.shape[1] % tile.block_s == 0',
        '"WHOLE_S": True',
        _attention("test_sizes[3-3-72-float16]"),
    ),
    Mutation(
        "attention: all queries are taken as whole blocks",
        ATTENTION,
        '"WHOLE_T": q.shape[1] % tile.block_t == 0',
        '"WHOLE_T": True',
        _attention("test_tokens_beyond_a_slice_are_not_read_and_not_written"),
    ),
    # recomputed.py
    Mutation(
        "recomputed: h without shift",
        RECOMPUTED,
        "h = torch.ops.fastdit.layer_norm_modulate(x, shift, scale, ctx.eps, weight.dtype)[0]",
        "h = torch.ops.fastdit.layer_norm_modulate(x, 0 * shift, scale, ctx.eps, weight.dtype)[0]",
        _recomputed("layer_norm_modulate_linear"),
    ),
    Mutation(
        "recomputed: h with another eps",
        RECOMPUTED,
        "ctx.eps = eps",
        "ctx.eps = 1e-2",
        _recomputed("layer_norm_modulate_linear"),
    ),
    Mutation(
        "recomputed: bias's gradient not summed",
        RECOMPUTED,
        "return dy.reshape(-1, dy.shape[-1]).sum(0)",
        "return dy.reshape(-1, dy.shape[-1])[0]",
        _recomputed("layer_norm_modulate_linear"),
    ),
    Mutation(
        "recomputed: weight's gradient by the stream",
        RECOMPUTED,
        "dweight = weight_gradient(dy, h) if with_weight else None",
        "dweight = weight_gradient(dy, seam[0]) if with_weight else None",
        _recomputed("gated_residual_layer_norm_modulate_linear"),
    ),
    Mutation(
        "recomputed: gradient of the stream dropped",
        RECOMPUTED,
        "seam_backward(dx_new, dy @ weight, *seam,",
        "seam_backward(None, dy @ weight, *seam,",
        _recomputed("gated_residual_layer_norm_modulate_linear"),
    ),
    Mutation(
        "recomputed: gradient of the stream dropped, perceptron",
        RECOMPUTED,
        "seam_backward(dx_new, dh, *seam,",
        "seam_backward(None, dh, *seam,",
        _recomputed("gated_residual_layer_norm_modulate_mlp_gelu"),
    ),
    Mutation(
        "recomputed: w1's gradient by the branch",
        RECOMPUTED,
        "weight_gradient(dpre, h)",
        "weight_gradient(dpre, seam[1])",
        _recomputed("gated_residual_layer_norm_modulate_mlp_gelu"),
    ),
)


def misplaced(mutations: Iterable[Mutation]) -> list[str]:
    """What the list says of the source that is not so; empty if nothing is."""
    found = []
    for mutation in mutations:
        count = (ROOT / mutation.file).read_text().count(mutation.old)
        if count != 1:
            found.append(f"{mutation.name}: {mutation.file} holds the text {count} times, not once")
    return found


def assert_fits(mutations: Sequence[Mutation]) -> None:
    """What is to be replaced is there once, what comes of it is Python, and the tests that are named exist."""
    assert misplaced(mutations) == []
    assert [name for name, count in Counter(m.name for m in mutations).items() if count > 1] == []
    for mutation in mutations:
        source = (ROOT / mutation.file).read_text()
        ast.parse(source.replace(mutation.old, mutation.new), mutation.name)
        assert mutation.new != mutation.old, mutation.name
        for test in mutation.tests:
            file, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), test


def run_all(
    runs: Sequence[tuple[Mutation | None, tuple[str, ...]]], jobs: int
) -> Iterator[tuple[int, Outcome]]:
    """Runs tests with a mutation, or with None for the source as it is, `jobs` at a time.

    Gives the index of a run and its outcome, as they end.
    """
    waiting = list(enumerate(runs))
    running: dict[int, tuple[int, Path, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    index, (mutation, tests) = waiting.pop(0)
                    copy = Path(folder) / str(index)
                    _copy(copy, mutation)
                    running[_fork(copy, tests)] = index, copy, time.monotonic()
                pid, status = os.wait()
                index, copy, start = running.pop(pid)
                yield index, _outcome(copy, status, time.monotonic() - start)
                shutil.rmtree(copy)
        finally:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _copy(folder: Path, mutation: Mutation | None) -> None:
    """The working tree, mutated, in a new folder."""
    folder.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, folder / name)
    if mutation is not None:
        file = folder / mutation.file
        file.write_text(file.read_text().replace(mutation.old, mutation.new))


def _fork(copy: Path, tests: tuple[str, ...]) -> int:
    """The id of a new process that runs these tests in `copy`, and leaves log.txt and failed.json there."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 3  # pytest's own of an internal error
    try:
        signal.alarm(SECONDS)
        log = os.open(copy / "log.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(copy)
        sys.path[:] = [str(copy), *(path for path in sys.path if Path(path) != ROOT)]
        status = _run_pytest(copy, tests)
    finally:
        sys.stdout.flush()
        os._exit(status)


def _run_pytest(copy: Path, tests: tuple[str, ...]) -> int:
    import pytest

    class Failures:
        def __init__(self) -> None:
            self.found: list[tuple[str, str]] = []

        def pytest_exception_interact(
            self, node: pytest.Item, call: pytest.CallInfo[Any], report: pytest.TestReport
        ) -> None:
            self.found.append((node.nodeid, _kind(call.excinfo.value)))

    failures = Failures()
    status = pytest.main(["-q", "--assert=plain", "-p", "no:cacheprovider", *tests], [failures])
    (copy / "failed.json").write_text(json.dumps(failures.found))
    return int(status)


def _kind(error: BaseException) -> str:
    """The name of the exception; Triton's interpreter wraps those of a kernel in its own."""
    while type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
        error = error.__cause__
    return type(error).__name__


def _outcome(copy: Path, status: int, seconds: float) -> Outcome:
    failed = copy / "failed.json"
    found = json.loads(failed.read_text()) if failed.exists() else []
    log = (copy / "log.txt").read_text(errors="replace")
    return Outcome(os.waitstatus_to_exitcode(status), found, seconds, log)


def verdict(outcome: Outcome) -> tuple[bool, str]:
    """Whether the mutation was killed, and by what."""
    if outcome.status == 0:
        return False, "SURVIVED"
    if outcome.status == -signal.SIGALRM:
        return False, f"NO END in {SECONDS} s"
    if outcome.status < 0:
        return True, signal.Signals(-outcome.status).name
    others = {kind for _, kind in outcome.failed} - set(KILLED_BY)
    if outcome.status != 1 or others or not outcome.failed:
        return False, f"BROKEN: exit status {outcome.status} {', '.join(sorted(others))}"
    return True, ", ".join(dict.fromkeys(node.rpartition("/")[2] for node, _ in outcome.failed))


def _preload() -> None:
    """Imports what all runs import, so that none has to, and sets what they have in common."""
    sys.dont_write_bytecode = True
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "TRITON_INTERPRET": "1",
    }
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # a collection in a fork would otherwise go over all of this


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutations")
    parser.add_argument("--jobs", type=int, default=1, help="how many run at the same time")
    options = parser.parse_args(arguments)
    unknown = set(options.only or ()) - {mutation.name for mutation in MUTATIONS}
    if unknown:
        parser.error(f"--only: no such mutation: {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTATIONS if options.only is None or m.name in options.only]
    faults = misplaced(chosen)
    if faults:
        print("\n".join(faults))
        return 1

    _preload()
    selections = list(dict.fromkeys(mutation.tests for mutation in chosen))
    for index, outcome in run_all([(None, tests) for tests in selections], options.jobs):
        if outcome.status != 0:
            print(f"{outcome.log}\nexit status {outcome.status} unmutated: {selections[index]}")
            return 1

    survivors = 0
    print(f"{'mutation':56} {'file':46} seconds  killed by")
    for index, outcome in run_all([(m, m.tests) for m in chosen], options.jobs):
        killed, by = verdict(outcome)
        mutation = chosen[index]
        print(f"{mutation.name:56} {mutation.file:46} {outcome.seconds:7.1f}  {by}", flush=True)
        if not killed:
            survivors += 1
            print(outcome.log)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
