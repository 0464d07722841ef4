"""`ddpm_step` with guidance and a learned variance: from the model's tokens to x_{t-1}, with C = 4 and P = 2.

It reads the tokens of both halves of the batch, bfloat16, except the second half's variance, which is not used, and x_t
and the noise, and writes x_{t-1}, float32: 12 values of 2 bytes and 3 x 4 values of 4 bytes a pixel. Sampling has no
backward, and the shapes do not depend on the width of the model.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from benchmarks.kernels.harness import PROVIDERS, Case, Inputs, Sizes, Work, image_cases
from benchmarks.measure import Bench
from fastdit import create_diffusion
from fastdit.ops.diffusion_step import ddpm_step
from fastdit.reference import diffusion_step as reference

CHANNELS, PATCH = 4, 2


def cases(sizes: Sizes) -> list[Case]:
    return image_cases(sizes, 2 * CHANNELS * PATCH**2, directions=["forward"])


def work(case: Case, bench: Bench) -> Work:
    n, side = case.batch, PATCH * math.isqrt(case.tokens)
    table = create_diffusion("").step_table("ddpm", device=bench.device)
    step = torch.tensor(500, device=bench.device)

    def draw() -> Inputs:
        return {
            "tokens": bench.normal(2 * n, case.tokens, case.width),
            "x": bench.normal(n, CHANNELS, side, side, dtype=torch.float32),
            "noise": bench.normal(n, CHANNELS, side, side, dtype=torch.float32),
            "table": table,
            "step": step,
        }

    return Work(
        reference.ddpm_step,
        ddpm_step,
        draw,
        bytes=n * side**2 * CHANNELS * (3 * 2 + 3 * 4),
        options={"patch_size": PATCH, "cfg_scale": 4.0},
        shared=("tokens", "x", "noise", "table", "step"),
    )


def test_diffusion_step(kernels: Any, benchmark: Any, case: Case, provider: str) -> None:
    kernels.report(benchmark, case, provider, kernels.measure(case, PROVIDERS, work))
