"""The CPU time of a call of `layer_norm_modulate` for one token, whose kernels do nothing.

They allocate their results only, so what is left is checks, dispatch and autograd. `fastdit` is the public function:
the registered operator and, where a gradient is wanted, an `autograd.Function` outside of it. `register_autograd` is
the same operator, its backward registered by `torch.library.register_autograd` instead. `eager` is the expression in
plain torch, which does compute.

Three cases: under `no_grad`, with a gradient to be recorded, and that followed by the backward.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastdit
from benchmarks.kernels.harness import SUITE, Case, Result, Sizes, result_of
from benchmarks.measure import Measured, in_turns
from benchmarks.results import Row
from fastdit import ops, reference
from fastdit.ops.layer_norm_modulate import BACKWARD, FORWARD
from fastdit.ops.operation import require_both_or_neither, require_modulation, require_tokens

PROVIDERS = ("eager", "fastdit", "register_autograd")
EPS = 1e-6


def cases(sizes: Sizes) -> list[Case]:
    directions = ("no gradient", "forward", "forward + backward")
    return [Case(direction, "one token", 64, 1, 1) for direction in directions]


def allocate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=out_dtype, device=x.device), mean, torch.empty_like(mean)


def allocate_gradients(
    dh: Tensor, x: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(shift), torch.empty_like(scale)


@contextmanager
def empty_slots(device: torch.device) -> Iterator[None]:
    """In here the kernels of the operation compute nothing."""
    # Without a GPU only the interpreter makes the slot usable; it is not called.
    environment = {} if device.type == "cuda" else {"TRITON_INTERPRET": "1"}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.dict(FORWARD.implementations, triton=allocate),
        mock.patch.dict(BACKWARD.implementations, triton=allocate_gradients),
        fastdit.use_backend("triton"),
    ):
        yield


@cache
def registered() -> tuple[torch.library.Library, Callable[..., Any]]:
    """The operator once more, with its backward registered; it lives as long as the library."""
    library = torch.library.Library("fastdit_benchmark", "DEF")
    schema = str(torch.ops.fastdit.layer_norm_modulate.default._schema)
    library.define(schema.removeprefix("fastdit::"))
    library.impl("layer_norm_modulate", FORWARD._run, "CompositeExplicitAutograd")

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, shift, scale, _, _ = inputs
        ctx.save_for_backward(x, shift, scale, *output[1:])

    def backward(ctx: Any, dh: Tensor, dmean: Tensor, drstd: Tensor) -> tuple[Tensor | None, ...]:
        return *torch.ops.fastdit.layer_norm_modulate_backward(dh, *ctx.saved_tensors), None, None

    name = "fastdit_benchmark::layer_norm_modulate"
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)
    return library, torch.ops.fastdit_benchmark.layer_norm_modulate


def through_register_autograd(x: Tensor, *, shift: Tensor, scale: Tensor) -> Tensor:
    """The checks of the public function, then the operator."""
    require_tokens("x", x)
    require_both_or_neither(shift, scale)
    require_modulation(x, shift=shift, scale=scale)
    FORWARD.choose(x, shift, scale)
    h: Tensor = registered()[1](x, shift, scale, EPS, x.dtype)[0]
    return h


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "eager": reference.layer_norm_modulate,
    "fastdit": ops.layer_norm_modulate,
    "register_autograd": through_register_autograd,
}


class Clock:
    """CPU time of a call: unlike wall time, what else runs on the machine does not change it."""

    CALLS, ROUNDS = 50, 15

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        self.sample()  # warm-up

    def sample(self) -> float:
        start = time.process_time()
        for _ in range(self.CALLS):
            self.run()
        return (time.process_time() - start) / self.CALLS


def prepare(provider: str, case: Case, device: torch.device) -> Callable[[], Any]:
    function, gradient = FUNCTIONS[provider], case.direction != "no gradient"
    x, dh = (torch.randn(1, 1, case.width, device=device) for _ in range(2))
    shift, scale = (torch.randn(1, case.width, device=device) for _ in range(2))
    leaves = [leaf.requires_grad_(gradient) for leaf in (x, shift, scale)]

    def call() -> Tensor:
        with torch.set_grad_enabled(gradient):
            return function(x, shift=shift, scale=scale)

    def call_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(), leaves, dh)

    return call_and_backward if "backward" in case.direction else call


def measure(case: Case, device: torch.device) -> dict[str, Result]:
    with empty_slots(device):
        clocks = {name: Clock(prepare(name, case, device)) for name in PROVIDERS}
        samples = in_turns(clocks, Clock.ROUNDS)
    rows = (
        Row(SUITE, f"dispatch {case.direction}", name, case.shape, "float32", "time")
        for name in PROVIDERS
    )
    measured = Measured({}, samples, {}, set())
    return {row.provider: result_of(row, measured, baseline="eager") for row in rows}


def test_dispatch(kernels: Any, benchmark: Any, case: Case, provider: str) -> None:
    results = kernels.once(case, lambda: measure(case, kernels.bench.device))
    kernels.report(benchmark, case, provider, results)
