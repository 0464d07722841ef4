"""`unpatchify` to images (N, 8, H, W), noise and variance, with P = 2, and its backward: a read and a write of all.

Its shapes do not depend on the width of the model.
"""

from __future__ import annotations

import math
from typing import Any

from benchmarks.kernels.harness import PROVIDERS, Case, Sizes, Work, image_cases
from benchmarks.measure import Bench
from fastdit import ops, reference

CHANNELS, PATCH = 8, 2


def cases(sizes: Sizes) -> list[Case]:
    return image_cases(sizes, CHANNELS * PATCH**2)


def work(case: Case, bench: Bench) -> Work:
    side = math.isqrt(case.tokens)
    shape = (case.batch, case.tokens, case.width)
    return Work(
        reference.unpatchify,
        ops.unpatchify,
        lambda: {"tokens": bench.normal(*shape)},
        bytes=2 * 2 * math.prod(shape),
        options={"patch_size": PATCH, "out_channels": CHANNELS, "grid": (side, side)},
        backward=case.backward,
    )


def test_unpatchify(kernels: Any, benchmark: Any, case: Case, provider: str) -> None:
    kernels.report(benchmark, case, provider, kernels.measure(case, PROVIDERS, work))
