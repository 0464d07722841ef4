"""`patchify` of latents (N, 4, H, W) with P = 2, and its backward: every value read once and written once.

Its shapes do not depend on the width of the model.
"""

from __future__ import annotations

import math
from typing import Any

from benchmarks.kernels.harness import PROVIDERS, Case, Sizes, Work, image_cases
from benchmarks.measure import Bench
from fastdit import ops, reference

CHANNELS, PATCH = 4, 2


def cases(sizes: Sizes) -> list[Case]:
    return image_cases(sizes, CHANNELS * PATCH**2)


def work(case: Case, bench: Bench) -> Work:
    side = PATCH * math.isqrt(case.tokens)
    shape = (case.batch, CHANNELS, side, side)
    return Work(
        reference.patchify,
        ops.patchify,
        lambda: {"x": bench.normal(*shape)},
        bytes=2 * 2 * math.prod(shape),
        options={"patch_size": PATCH},
        backward=case.backward,
    )


def test_patchify(kernels: Any, benchmark: Any, case: Case, provider: str) -> None:
    kernels.report(benchmark, case, provider, kernels.measure(case, PROVIDERS, work))
