"""`gated_residual`. With r bytes an element of the residual stream, and all else in bfloat16:

forward reads x (r) and the branch (2) and writes x (r): (2 + 2 r) D bytes a token; backward reads dx (r) and the branch
(2) and writes dbranch (2): (4 + r) D, the gradient by x being dx itself. Each reads the gate, backward writes its
gradient, 2 D a sample.
"""

from __future__ import annotations

from typing import Any

from benchmarks.kernels.harness import (
    BOTH_STREAMS,
    PROVIDERS,
    Case,
    Inputs,
    Sizes,
    Work,
    token_cases,
)
from benchmarks.measure import Bench
from fastdit import ops, reference


def cases(sizes: Sizes) -> list[Case]:
    return token_cases(sizes, streams=BOTH_STREAMS)


def work(case: Case, bench: Bench) -> Work:
    n, t, d = case.batch, case.tokens, case.width

    def draw() -> Inputs:
        _, _, gate, *_ = bench.normal(n, 6 * d).chunk(6, dim=1)  # as adaLN_modulation returns it
        x = bench.normal(n, t, d, dtype=case.stream)
        return {"x": x, "branch": bench.normal(n, t, d), "gate": gate}

    r = case.stream.itemsize
    a_token, a_sample = (4 + r, 4) if case.backward else (2 + 2 * r, 2)
    return Work(
        reference.gated_residual,
        ops.gated_residual,
        draw,
        bytes=n * d * (t * a_token + a_sample),
        backward=case.backward,
    )


def test_gated_residual(kernels: Any, benchmark: Any, case: Case, provider: str) -> None:
    kernels.report(benchmark, case, provider, kernels.measure(case, PROVIDERS, work))
