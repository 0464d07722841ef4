"""Attention at head_dim 64 and 72 with 16 heads, in every backend that takes it; useful FLOPs, of the exact head_dim.

Forward 4 N H T^2 K FLOPs, two products; backward 10, the five that a fused one has, of which none is counted that
padding or tiles add. Ratios are against `sdpa`, torch's own choice, whose row says by `kernels` what it was. A backward
is asked to give the same bits every time, if its backend can; `fastdit` is what `auto` chooses then. q, k and v are
views of one projection. `eager` is the reference, which writes every score.

`padded` is the kernel of `triton` on q, k and v that zeros widened to 128 columns beforehand, which is not timed: what
a kernel that does not split head_dim has to do. Its ratio is against `triton`: 1 / 1.35 where the split makes that 1.35
times faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
from benchmarks.measure import Bench, Candidate, Prepared, kernel_times
from benchmarks.results import Row
from fastdit import ops, reference
from fastdit.attention import BACKENDS, Like

BASELINE = "sdpa"
NAMED = tuple(name for name in BACKENDS if name != "reference")
PADDED = "padded"
PROVIDERS = (*harness.PROVIDERS, *NAMED, PADDED)
MODELS = {"K64": 1024, "K72": 1152}  # with 16 heads: DiT-L's and DiT-XL's
QUICK_MODELS = {"K72": 1152}
TOKENS: tuple[int, ...] = (256, 1024, 4096)
QUICK_TOKENS = (256, 1024)
LARGEST_K = 128  # of the kernel
MOST_TOKENS = 1 << 16  # of a batch; the reference writes T times as many scores for each head


def cases(sizes: Sizes) -> list[Case]:
    """Forward and backward at each head_dim, T and batch; in a trial of the programs at the sizes of that."""
    models, tokens = MODELS, TOKENS
    if sizes == harness.QUICK:
        models, tokens = QUICK_MODELS, QUICK_TOKENS
    elif "tiny" in sizes.widths:
        models, tokens = sizes.widths, sizes.tokens
    return [
        Case(direction, model, width, t, n)
        for model, width in models.items()
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
    if provider not in (*NAMED, PADDED):
        return []
    q = Like(shape_of(case), case.stream, device, case.backward)
    backend = "triton" if provider == PADDED else provider
    return BACKENDS[backend].reasons_not_usable(q, q, q)


class Padded(Comparison):
    """The inputs of another, widened by zeros to 128 columns; the first columns of the results are what it checks."""

    def __init__(self, exact: Comparison) -> None:
        super().__init__(exact.work, exact.bench, exact.backend)
        self.narrow = exact

    @cached_property
    def sets(self) -> list[Inputs]:
        return [{name: widened(x) for name, x in one.items()} for one in self.narrow.sets]

    @cached_property
    def gradients(self) -> list[list[Tensor]]:
        return [[widened(x) for x in arriving] for arriving in self.narrow.gradients]

    def check(self, results: Sequence[Tensor]) -> None:
        head_dim = self.narrow.sets[0]["q"].shape[-1]
        self.narrow.check([x[..., :head_dim] for x in results])

    def prepared(self) -> Prepared:
        scale = self.narrow.sets[0]["q"].shape[-1] ** -0.5
        function = partial(ops.attention, scale=scale, backend="triton")
        return self.prepare(function, self.backend)


def widened(x: Tensor) -> Tensor:
    return F.pad(x, (0, LARGEST_K - x.shape[-1]))


def candidate(comparison: Comparison, provider: str, case: Case) -> Candidate:
    done = comparison.work
    if provider == PADDED:
        prepare: Callable[[], Prepared] = Padded(comparison).prepared
    elif provider in NAMED:
        function: Callable[..., Tensor] = partial(ops.attention, backend=provider)
        prepare = partial(comparison.prepare, function, "auto")
    else:
        return comparison.candidate(provider, case.dtype)
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
        baseline = "triton" if one.provider == PADDED else BASELINE
        results[one.provider] = result_of(row, measured, baseline, "copy")
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
