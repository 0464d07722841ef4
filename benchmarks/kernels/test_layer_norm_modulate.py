"""`layer_norm_modulate`. With r bytes an element of the residual stream, and all else in bfloat16:

forward reads x (r) and writes h (2): (2 + r) D bytes a token; backward reads dh (2) and x (r) and writes dx (r):
(2 + 2 r) D. Forward reads shift and scale, backward reads scale and writes the gradients of both, 2 D a sample each.
"""

from __future__ import annotations

from typing import Any

import torch

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
        # As the model has them: cut out of what adaLN_modulation returns.
        shift, scale, *_ = bench.normal(n, 6 * d).chunk(6, dim=1)
        return {"x": bench.normal(n, t, d, dtype=case.stream), "shift": shift, "scale": scale}

    r = case.stream.itemsize
    a_token, a_sample = (2 + 2 * r, 6) if case.backward else (2 + r, 4)
    return Work(
        reference.layer_norm_modulate,
        ops.layer_norm_modulate,
        draw,
        bytes=n * d * (t * a_token + a_sample),
        options={"out_dtype": torch.bfloat16},
        backward=case.backward,
    )


def test_layer_norm_modulate(kernels: Any, benchmark: Any, case: Case, provider: str) -> None:
    kernels.report(benchmark, case, provider, kernels.measure(case, PROVIDERS, work))
