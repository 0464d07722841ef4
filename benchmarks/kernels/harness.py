"""What the benchmarks of single operations have in common: sizes, providers, checks, and what is reported.

Providers of a case, all on the same inputs and timed in turns:

- `eager`: the function of `fastdit.reference`;
- `compile`: `torch.compile(fullgraph=True, dynamic=False)` of that function, the baseline of all ratios;
- `fastdit`: the public operation;
- `copy`: `copy_` of as many bytes as the operation has to move, the ceiling.

A backward is `torch.autograd.grad` with `retain_graph=True` on graphs that were made before, one for each set of
inputs: what a user's backward runs, without the forward that would hide it. Inductor may then not overwrite what its
forward saved ("donated buffers"), which changes where its results lie, not what it moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

import fastdit
from benchmarks.calibrate import copy_prepare
from benchmarks.measure import (
    Bench,
    Candidate,
    Measured,
    Prepared,
    kernel_times,
    timed,
    times_faster,
)
from benchmarks.results import Row
from fastdit.testing import assert_close, assert_gradient_close

SUITE = "kernels"
PROVIDERS = ("compile", "copy", "eager", "fastdit")
BASELINE = "compile"
# The float64 results are computed for so many elements at a time, or their graph would not fit.
CHUNK = 1 << 24

# ------------------------------------------------------------------------------------------------ sizes


@dataclass(frozen=True)
class Sizes:
    """The shapes of one run."""

    widths: dict[str, int]  # of the residual stream, by model
    tokens: tuple[int, ...]
    batches: tuple[int, ...]
    wide_batches: tuple[int, ...]  # those that are measured with a float32 residual stream, too
    rounds: int  # samples of each provider


BATCHES = (8, 64, 256)
FULL = Sizes({"S": 384, "B": 768, "L": 1024, "XL": 1152}, (256, 1024), BATCHES, BATCHES, rounds=15)
QUICK = Sizes({"XL": 1152}, (256,), (8, 64), (64,), rounds=15)
SMALL = Sizes({"tiny": 64}, (16,), (2,), (2,), rounds=3)


@dataclass(frozen=True)
class Case:
    """One operation at one size, in one direction."""

    direction: str  # forward or backward
    model: str
    width: int  # D
    tokens: int  # T
    batch: int  # N
    stream: torch.dtype = torch.bfloat16  # of the residual stream; all else is bfloat16

    @property
    def backward(self) -> bool:
        return self.direction == "backward"

    @property
    def shape(self) -> dict[str, int]:
        return {"N": self.batch, "T": self.tokens, "D": self.width}

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.stream is torch.bfloat16 else "bfloat16, float32 stream"

    def __str__(self) -> str:
        stream = "" if self.stream is torch.bfloat16 else "-float32_stream"
        return f"{self.direction}-{self.model}-{self.tokens}x{self.batch}{stream}"


def token_cases(sizes: Sizes, *, streams: Sequence[torch.dtype] = (torch.bfloat16,)) -> list[Case]:
    """Forward and backward at every width, number of tokens and batch, and residual stream."""
    return [
        Case(direction, model, width, tokens, batch, stream)
        for model, width in sizes.widths.items()
        for tokens in sizes.tokens
        for batch in sizes.batches
        for stream in streams
        for direction in ("forward", "backward")
        if stream is torch.bfloat16 or batch in sizes.wide_batches
    ]


BOTH_STREAMS = (torch.bfloat16, torch.float32)


def image_cases(
    sizes: Sizes, features: int, directions: Sequence[str] = ("forward", "backward")
) -> list[Case]:
    """What does not depend on the width of a model, but on the features of a token."""
    return [
        Case(direction, "images", features, tokens, batch)
        for tokens in sizes.tokens
        for batch in sizes.batches
        for direction in directions
    ]


# ------------------------------------------------------------------------------------------------- work

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Work:
    """What an operation computes in one case, and what that takes at least.

    `reference` and `operation` take the same arguments: those that `draw` makes, and `options`. Every input has the
    samples in its first dimension, except those named in `shared`. `bytes` are those of one call: each input read
    once, each output written once; the two statistics of a row that a backward may read are not counted.
    """

    reference: Callable[..., Any]
    operation: Callable[..., Any]
    draw: Callable[[], Inputs]
    bytes: int
    flops: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    backward: bool = False
    # What bounds it from below besides the copy: a candidate that is then the ceiling.
    bound: Candidate | None = None

    @property
    def ceiling(self) -> str:
        return "copy" if self.bound is None else self.bound.provider


class Comparison:
    """The providers of one case. All get the same inputs, in as many sets as the cache needs to forget one."""

    def __init__(self, work: Work, bench: Bench, backend: str) -> None:
        self.work, self.bench, self.backend = work, bench, backend

    def candidate(self, provider: str, dtype: str) -> Candidate:
        work = self.work
        if work.bound is not None and provider == work.bound.provider:
            return work.bound
        prepare: dict[str, Callable[[], Prepared]] = {
            "copy": copy_prepare(self.bench, work.bytes),
            "eager": lambda: self.prepare(work.reference, "reference"),
            "compile": lambda: self.prepare(compiled(work.reference), "reference"),
            "fastdit": lambda: self.prepare(work.operation, self.backend),
        }
        return Candidate(provider, dtype, prepare[provider], work.bytes, work.flops)

    def prepare(self, function: Callable[..., Any], backend: str) -> Prepared:
        """`function` with the implementations of a backend, ready to be checked and to be timed."""
        with fastdit.use_backend(backend):
            work = self.backward_of(function) if self.work.backward else self.forward_of(function)

        def run(i: int) -> list[Tensor]:
            with fastdit.use_backend(backend):
                return work(i)

        def error() -> float:
            try:
                self.check(run(0))
            except AssertionError as wrong:
                raise RuntimeError(f"wrong result: {wrong}") from wrong
            return 0.0

        return Prepared(rotated(run, len(self.sets)), error)

    def forward_of(self, function: Callable[..., Any]) -> Callable[[int], list[Tensor]]:
        def run(i: int) -> list[Tensor]:
            with torch.no_grad():
                return as_list(function(**self.sets[i], **self.work.options))

        return run

    def backward_of(
        self, function: Callable[..., Any], sets: Sequence[Inputs] | None = None
    ) -> Callable[[int], list[Tensor]]:
        graphs = []
        for inputs in self.sets if sets is None else sets:
            leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
            outputs = as_list(function(**leaves, **self.work.options))
            graphs.append((outputs, list(leaves.values())))

        def run(i: int) -> list[Tensor]:
            outputs, leaves = graphs[i]
            gradients = self.gradients[i]
            return list(torch.autograd.grad(outputs, leaves, gradients, retain_graph=True))

        return run

    @cached_property
    def sets(self) -> list[Inputs]:
        return [self.work.draw() for _ in self.bench.sets(self.work.bytes)]

    @cached_property
    def gradients(self) -> list[list[Tensor]]:
        """What arrives at every output, for each set."""
        outputs = self.forward_of(self.work.reference)(0)
        return [
            [self.bench.normal(*output.shape, dtype=output.dtype) for output in outputs]
            for _ in self.sets
        ]

    # What the results of set 0 are held against: outputs or, backward, the gradients of the inputs.

    @cached_property
    def plain(self) -> list[Tensor]:
        function = self.work.reference
        one = self.sets[:1]
        run = self.backward_of(function, one) if self.work.backward else self.forward_of(function)
        return run(0)

    @cached_property
    def exact(self) -> list[Tensor]:
        """The reference in float64, some samples at a time; gradients of shared inputs add up over them."""
        work, inputs = self.work, self.sets[0]
        options = {
            name: torch.float64 if isinstance(value, torch.dtype) else value
            for name, value in work.options.items()
        }
        shared = {name: in_float64(inputs[name], work.backward) for name in work.shared}
        split = [name for name in inputs if name not in shared]
        samples = len(inputs[split[0]]) if split else 1
        largest = max((inputs[name].numel() for name in split), default=1)
        size = max(1, CHUNK * samples // largest)
        chunks: list[list[Any]] = []
        for start in range(0, samples, size):
            part = slice(start, start + size)
            leaves = {name: in_float64(inputs[name][part], work.backward) for name in split}
            outputs = as_list(work.reference(**shared, **leaves, **options))
            if work.backward:
                torch.autograd.backward(outputs, [g[part].double() for g in self.gradients[0]])
                chunks.append([leaves[name].grad for name in split])
            else:
                chunks.append(outputs)
        joined = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
        if not work.backward:
            return joined
        found: dict[str, Any] = {name: leaf.grad for name, leaf in shared.items()}
        found |= dict(zip(split, joined, strict=True))
        return [found[name] for name in inputs]

    def check(self, results: Sequence[Tensor]) -> None:
        """Raises AssertionError unless they are as near to float64 as plain torch is (`fastdit.testing`)."""
        if not self.work.backward:
            for i, (out, exact, plain) in enumerate(self.expected(results)):
                assert_close(f"output {i}", out, exact, plain)
            return
        gradient = self.gradients[0][0]
        rows = gradient.numel() // gradient.shape[-1]
        for name, (out, exact, plain) in zip(self.sets[0], self.expected(results), strict=True):
            summed = rows if name in self.work.shared else gradient.numel() // exact.numel()
            assert_gradient_close(f"gradient of {name}", out, exact, plain, summed=summed)

    def expected(self, results: Sequence[Tensor]) -> zip[tuple[Tensor, Tensor, Tensor]]:
        return zip(results, self.exact, self.plain, strict=True)


def rotated(run: Callable[[int], Any], count: int) -> Callable[[int], Any]:
    """`run` for any i, on `count` sets in turn; its results live until their set is used again.

    If they did not, each call would write to the memory that the call before has left in the cache.
    """
    kept: list[Any] = [None] * count

    def run_and_keep(i: int) -> Any:
        kept[i % count] = results = run(i % count)
        return results

    return run_and_keep


def as_list(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def in_float64(value: Tensor, needs_gradient: bool) -> Tensor:
    """A leaf in float64; integers stay what they are."""
    return (
        value.detach().double().requires_grad_(needs_gradient)
        if value.is_floating_point()
        else value
    )


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """For one size: what was compiled for the case before would make it compile for any size."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


# ------------------------------------------------------------------------------------------- measuring


class Result(NamedTuple):
    """What was measured of one provider in one case."""

    row: Row
    seconds: list[float]  # its samples, none where the row has a reason
    excused: bool  # the reason is no fault of the provider's
    fraction_of_copy: float | None


def measure(
    operation: str, case: Case, candidates: Sequence[Candidate], bench: Bench, ceiling: str
) -> dict[str, Result]:
    """The candidates by provider, measured in turns."""
    # A backward that is to run again must leave alone what its forward saved.
    with functorch_config.patch(donated_buffer=False):
        # A mistake in one provider, which fails its test, shall not cost the numbers of the others.
        measured = bench.measure(candidates, failures=(Exception,))
    results = {}
    for candidate in candidates:
        name = candidate.provider
        metric = "bandwidth" if candidate.flops is None else "rate"
        row = Row(SUITE, f"{operation} {case.direction}", name, case.shape, case.dtype, metric)
        row = replace(row, bytes=candidate.bytes, flops=candidate.flops)
        if name in measured.runs:
            row = replace(row, kernels=list(kernel_times(measured.runs[name], bench.device)))
        results[name] = result_of(row, measured, BASELINE, ceiling)
    return results


def result_of(row: Row, measured: Measured, baseline: str, ceiling: str | None = None) -> Result:
    """The row with its value, held against the two others; or with the reason why it has none."""
    name, samples = row.provider, measured.samples
    if name not in samples:
        reason = measured.reasons[name]
        return Result(replace(row, reason=reason), [], name in measured.excused, None)
    seconds = samples[name]
    row = timed(row, seconds)
    if ceiling in samples:
        row = replace(row, fraction_of_ceiling=times_faster(seconds, samples[ceiling]))
    if baseline in samples and name != baseline:
        ratio = times_faster(seconds, samples[baseline])
        row = replace(row, baseline=baseline, ratio=ratio)
    copy = times_faster(seconds, samples["copy"]) if "copy" in samples else None
    return Result(row, seconds, False, copy)
