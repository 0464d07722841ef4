"""`adamw_ema_`: AdamW, one moving average and bfloat16 copies of the parameters of two blocks, in one pass.

Weights, both moments and the average are read and written, gradients read (all float32), copies written (2 bytes): 38
bytes a parameter. Two blocks are 48 million parameters at the width of DiT-XL; a whole model has more of the same.

`fused` is what torch has: AdamW(fused=True), then one foreach for the average and one for the copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastdit
from benchmarks.calibrate import copy_prepare
from benchmarks.kernels import harness
from benchmarks.kernels.harness import Case, Result, Sizes, compiled
from benchmarks.measure import Bench, Candidate, Prepared, relative_error
from fastdit.ops.adamw_ema import adamw_ema_
from fastdit.reference import adamw_ema as reference

PROVIDERS = (*harness.PROVIDERS, "fused")
BLOCKS = 2
BYTES = 4 * 2 * 4 + 4 + 2  # read and written, a parameter
STORED = 5 * 4 + 2
# So few steps that both corrections of the bias matter.
STEPS, LR, BETAS, EPS, DECAY = 3.0, 1e-3, (0.9, 0.999), 1e-8, 0.99
# Float32 keeps a change of a weight, about LR, to 1e-5 of it.
LARGEST_ERROR = 1e-3


@dataclass(frozen=True)
class Step(Case):
    """A case without batch and tokens."""

    @property
    def shape(self) -> dict[str, int]:
        return {"D": self.width, "blocks": BLOCKS, "parameters": self.parameters}

    @property
    def dtype(self) -> str:
        return "float32"

    @property
    def parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the weights and biases of the linear layers, which are all that a block has."""
        d = self.width
        block: list[tuple[int, ...]] = []
        for n, k in ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d), (6 * d, d)):
            block += [(n, k), (n,)]
        return block * BLOCKS

    def __str__(self) -> str:
        return self.model


def cases(sizes: Sizes) -> list[Step]:
    return [Step("step", model, width, 0, 0) for model, width in sizes.widths.items()]


@dataclass(frozen=True)
class State:
    """What a step reads and writes; all lists are like `params`."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    ema: list[Tensor]
    copies: list[Tensor]
    step: Tensor

    @classmethod
    def draw(cls, case: Step, device: torch.device) -> State:
        """The same for every provider."""
        generator = torch.Generator(device).manual_seed(0)

        def normal() -> list[Tensor]:
            options: dict[str, Any] = {"generator": generator, "device": device}
            return [torch.randn(shape, **options) for shape in case.shapes]

        params = [0.02 * p for p in normal()]
        return cls(
            params,
            grads=normal(),
            exp_avgs=normal(),
            exp_avg_sqs=[v.square_() for v in normal()],
            ema=[p + 0.02 * noise for p, noise in zip(params, normal(), strict=True)],
            copies=[p.bfloat16() for p in params],
            step=torch.tensor(STEPS, device=device),
        )

    def double(self) -> State:
        def wide(tensors: list[Tensor]) -> list[Tensor]:
            return [t.double() for t in tensors]

        return State(
            wide(self.params),
            wide(self.grads),
            wide(self.exp_avgs),
            wide(self.exp_avg_sqs),
            wide(self.ema),
            wide(self.copies),
            self.step.double(),
        )

    def written(self) -> list[Tensor]:
        """Everything but the copies as one tensor a list, to be compared."""
        lists = (self.params, self.exp_avgs, self.exp_avg_sqs, self.ema)
        return [torch.cat([t.flatten() for t in tensors]) for tensors in lists]


def update(function: Callable[..., None]) -> Callable[[State], Callable[[], None]]:
    """A step by a function with the arguments of `adamw_ema_`."""

    def of(state: State) -> Callable[[], None]:
        return lambda: function(
            state.params,
            state.grads,
            state.exp_avgs,
            state.exp_avg_sqs,
            state.step,
            lr=LR,
            betas=BETAS,
            eps=EPS,
            emas=[state.ema],
            ema_decays=[DECAY],
            copies=state.copies,
        )

    return of


def fused(state: State) -> Callable[[], None]:
    params = [torch.nn.Parameter(p) for p in state.params]
    options: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(params, **options, fused=True)
    for i, (p, grad) in enumerate(zip(params, state.grads, strict=True)):
        p.grad = grad
        moments = {"exp_avg": state.exp_avgs[i], "exp_avg_sq": state.exp_avg_sqs[i]}
        optimizer.state[p] = {"step": state.step.clone(), **moments}

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        torch._foreach_lerp_(state.ema, state.params, 1 - DECAY)
        torch._foreach_copy_(state.copies, state.params)

    return step


def prepare(
    make: Callable[[State], Callable[[], None]], case: Step, bench: Bench, backend: str
) -> Prepared:
    """Steps on states of its own: what one provider changed is not what another begins with."""
    states = [State.draw(case, bench.device) for _ in bench.sets(STORED * case.parameters)]
    steps = [make(state) for state in states]

    def run(i: int) -> None:
        with fastdit.use_backend(backend):
            steps[i % len(steps)]()

    def error() -> float:
        """Of the changes, which are small against what is changed."""
        state = states[0]
        before = [values.double() for values in state.written()]
        expected = state.double()
        update(reference.adamw_ema_)(expected)()
        run(0)
        changes = [a.double() - b for a, b in zip(state.written(), before, strict=True)]
        exact = [a - b for a, b in zip(expected.written(), before, strict=True)]
        found = relative_error(changes, exact)
        if not found <= LARGEST_ERROR:
            raise RuntimeError(f"wrong result: relative error of the changes {found:.1e}")
        for copy, p in zip(state.copies, state.params, strict=True):
            if not torch.equal(copy, p.bfloat16()):
                raise RuntimeError("wrong result: a copy is not the rounded weight")
        return found

    return Prepared(run, error)


def candidates(case: Step, bench: Bench, backend: str) -> list[Candidate]:
    size = BYTES * case.parameters

    def candidate(
        provider: str, make: Callable[[], Callable[[State], Callable[[], None]]], backend: str
    ) -> Candidate:
        prepared = lambda: prepare(make(), case, bench, backend)  # noqa: E731
        return Candidate(provider, case.dtype, prepared, size)

    return [
        candidate("compile", lambda: update(compiled(reference.adamw_ema_)), "reference"),
        Candidate("copy", case.dtype, copy_prepare(bench, size), size),
        candidate("eager", lambda: update(reference.adamw_ema_), "reference"),
        candidate("fastdit", lambda: update(adamw_ema_), backend),
        candidate("fused", lambda: fused, "reference"),
    ]


def test_adamw_ema(kernels: Any, benchmark: Any, case: Step, provider: str) -> None:
    def measure() -> dict[str, Result]:
        asked = [
            candidate
            for candidate in candidates(case, kernels.bench, kernels.backend)
            if candidate.provider != "compile" or kernels.with_compile
        ]
        return harness.measure("adamw_ema", case, asked, kernels.bench, "copy")

    kernels.report(benchmark, case, provider, kernels.once(case, measure))
