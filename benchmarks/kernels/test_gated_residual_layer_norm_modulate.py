"""`gated_residual_layer_norm_modulate`, the seam of a block. With r bytes an element of the residual stream:

forward reads x (r) and the branch (2) and writes x_new (r) and h (2): (4 + 2 r) D bytes a token; backward reads dx_new
(r), dh (2), x_new (r) and the branch (2) and writes dx (r) and dbranch (2): (6 + 3 r) D. Forward reads gate, shift and
scale, backward reads gate and scale and writes the gradients of all three, 2 D a sample each.
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
        # As a block has them: the gate of its attention, shift and scale of its MLP.
        _, _, gate, shift, scale, _ = bench.normal(n, 6 * d).chunk(6, dim=1)
        x = bench.normal(n, t, d, dtype=case.stream)
        return {
            "x": x,
            "branch": bench.normal(n, t, d),
            "gate": gate,
            "shift": shift,
            "scale": scale,
        }

    r = case.stream.itemsize
    a_token, a_sample = (6 + 3 * r, 10) if case.backward else (4 + 2 * r, 6)
    return Work(
        reference.gated_residual_layer_norm_modulate,
        ops.gated_residual_layer_norm_modulate,
        draw,
        bytes=n * d * (t * a_token + a_sample),
        backward=case.backward,
    )


def test_gated_residual_layer_norm_modulate(
    kernels: Any, benchmark: Any, case: Case, provider: str
) -> None:
    kernels.report(benchmark, case, provider, kernels.measure(case, PROVIDERS, work))
