"""Attention at head_dim 64 and 72 with 16 heads, in every backend that takes it; useful FLOPs, of the exact head_dim.

Forward 4 N H T^2 K FLOPs, two products; backward 10, the five that a fused one has, of which none is counted that
padding or tiles add. Ratios are against `sdpa`, torch's own choice, whose row says by `kernels` what it was. A backward
is asked to give the same bits every time, if its backend can; `fastdit` is what `auto` chooses then. q, k and v are
views of one projection. `eager` is the reference, which writes every score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks.calibrate import attention_cost
from benchmarks.kernels import harness
from benchmarks.kernels.harness import (
    SUITE,
    Case,
    Comparison,
    Inputs,
    Result,
    Sizes,
    Work,
    result_of,
)
from benchmarks.measure import Bench, Candidate, kernel_times
from benchmarks.results import Row
from fastdit import ops, reference
from fastdit.attention import BACKENDS, Like

BASELINE = "sdpa"
NAMED = tuple(name for name in BACKENDS if name != "reference")
PROVIDERS = (*harness.PROVIDERS, *NAMED)
MODELS = {"K64": 1024, "K72": 1152}  # with 16 heads: DiT-L's and DiT-XL's
TOKENS = (256, 1024, 4096)
MOST_TOKENS = 1 << 16  # of a batch; the reference writes T times as many scores for each head


def cases(sizes: Sizes) -> list[Case]:
    """Forward and backward at each head_dim, T and batch; in a trial of the programs at the sizes of that."""
    trial = "tiny" in sizes.widths
    quick = sizes.tokens == (256,)
    tokens = sizes.tokens if trial or quick else TOKENS
    return [
        Case(direction, model, width, t, n)
        for model, width in (sizes.widths if trial else MODELS).items()
        for t in tokens
        for n in sizes.batches
        for direction in ("forward", "backward")
        if n * t <= MOST_TOKENS
    ]


def shape_of(case: Case) -> tuple[int, int, int, int]:
    """(N, T, H, K)."""
    heads = 2 if case.model == "tiny" else 16
    return case.batch, case.tokens, heads, case.width // heads


def work(case: Case, bench: Bench) -> Work:
    n, t, heads, head_dim = shape_of(case)

    def draw() -> Inputs:
        q, k, v = bench.normal(n, t, 3, heads, head_dim).unbind(2)
        return {"q": q, "k": k, "v": v}

    size, flops = attention_cost(n, heads, t, head_dim, backward=case.backward)
    return Work(reference.attention, ops.attention, draw, size, flops, backward=case.backward)


def reasons(case: Case, provider: str, device: torch.device) -> list[str]:
    """Why a backend cannot be measured there."""
    if provider not in NAMED:
        return []
    q = Like(shape_of(case), case.stream, device, case.backward)
    return BACKENDS[provider].reasons_not_usable(q, q, q)


def candidate(comparison: Comparison, provider: str, case: Case) -> Candidate:
    if provider not in NAMED:
        return comparison.candidate(provider, case.dtype)
    function: Callable[..., Tensor] = partial(ops.attention, backend=provider)
    done = comparison.work
    prepare = partial(comparison.prepare, function, "auto")
    return Candidate(provider, case.dtype, prepare, done.bytes, done.flops)


def measure(case: Case, bench: Bench, providers: list[str]) -> dict[str, Result]:
    """The providers by name, measured in turns."""
    # `auto` and not the kernels alone: which backend that means is what is measured.
    comparison = Comparison(work(case, bench), bench, "auto")
    candidates = [candidate(comparison, name, case) for name in providers]
    # A backward that is to run again must leave alone what its forward saved.
    with functorch_config.patch(donated_buffer=False):
        measured = bench.measure(candidates, failures=(Exception,))
    results = {}
    for one in candidates:
        row = Row(SUITE, f"attention {case.direction}", one.provider, case.shape, one.dtype, "rate")
        row = replace(row, bytes=one.bytes, flops=one.flops)
        if one.provider in measured.runs:
            kernels = list(kernel_times(measured.runs[one.provider], bench.device))
            row = replace(row, kernels=kernels)
        results[one.provider] = result_of(row, measured, BASELINE, "copy")
    return results


def test_attention(kernels: Any, benchmark: Any, case: Case, provider: str) -> None:
    device = kernels.bench.device
    if found := reasons(case, provider, device):
        pytest.skip("; ".join(found))
    asked = [
        name
        for name in PROVIDERS
        if not reasons(case, name, device) and (name != "compile" or kernels.with_compile)
    ]
    results = kernels.once(case, lambda: measure(case, kernels.bench, asked))
    kernels.report(benchmark, case, provider, results)
