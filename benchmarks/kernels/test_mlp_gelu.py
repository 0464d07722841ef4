"""`mlp_gelu` with F = 4 D, bounded by its matrix products: two forward, four backward, 2 N T D F FLOPs each.

The ceiling is `products`: torch's products of these shapes alone, without biases and GELU. The bytes, and with them the
copy, count the pre-activation (N, T, F) that a backward reads, but no activation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import harness
from benchmarks.kernels.harness import Case, Inputs, Sizes, Work, rotated, token_cases
from benchmarks.measure import Bench, Candidate, Prepared, relative_error
from fastdit import ops, reference

PROVIDERS = (*harness.PROVIDERS, "products")
WEIGHTS = ("w1", "b1", "w2", "b2")


def cases(sizes: Sizes) -> list[Case]:
    return token_cases(sizes)


def work(case: Case, bench: Bench) -> Work:
    n, t, d, f = case.batch, case.tokens, case.width, 4 * case.width

    def draw() -> Inputs:
        return {
            "x": bench.normal(n, t, d),
            "w1": bench.normal(f, d) * d**-0.5,
            "b1": bench.normal(f),
            "w2": bench.normal(d, f) * f**-0.5,
            "b2": bench.normal(d),
        }

    weights, biases = 2 * d * f, d + f
    # Forward reads x and writes out; backward reads dout, x and the pre-activation, writes dx, and reads and writes
    # the weights and their gradients.
    forward = 2 * n * t * d + weights + biases
    backward = n * t * (3 * d + f) + 2 * weights + biases
    flops = (4 if case.backward else 2) * 2 * n * t * d * f
    size = 2 * (backward if case.backward else forward)
    return Work(
        reference.mlp_gelu,
        ops.mlp_gelu,
        draw,
        bytes=size,
        flops=flops,
        shared=WEIGHTS,
        backward=case.backward,
        bound=Candidate("products", "bfloat16", lambda: products(case, bench, size), size, flops),
    )


def products(case: Case, bench: Bench, size: int) -> Prepared:
    """x W1^T and a W2^T; backward dy W2, dy^T a, dp W1 and dp^T x."""
    m, d, f = case.batch * case.tokens, case.width, 4 * case.width
    sets = [
        (bench.normal(m, d), bench.normal(m, f), bench.normal(f, d), bench.normal(d, f))
        for _ in bench.sets(size)
    ]

    def run(i: int) -> list[Tensor]:
        narrow, wide, w1, w2 = sets[i]
        if case.backward:
            pairs = [(narrow, w2), (narrow.t(), wide), (wide, w1), (wide.t(), narrow)]
        else:
            pairs = [(narrow, w1.t()), (wide, w2.t())]
        return [torch.mm(a, b) for a, b in pairs]

    def error() -> float:
        """Of some rows of the first product."""
        narrow, _, w1, w2 = (tensor.float() for tensor in sets[0])
        exact = narrow[:64] @ (w2 if case.backward else w1.t())
        return relative_error([run(0)[0][:64]], [exact])

    return Prepared(rotated(run, len(sets)), error)


def test_mlp_gelu(kernels: Any, benchmark: Any, case: Case, provider: str) -> None:
    kernels.report(benchmark, case, provider, kernels.measure(case, PROVIDERS, work))
