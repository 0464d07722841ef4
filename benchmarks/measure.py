"""How the benchmarks measure: correct first, in turns, on data that is not in the cache.

A `Candidate` is one way to do the work of a case. `Bench.compare` checks the result of each, then times
them A B B A ..., and makes one row of each.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType

from benchmarks.results import Row

try:
    from triton.errors import TritonError
except ModuleNotFoundError:  # triton has wheels for Linux only
    TritonError = RuntimeError

# Rounding of bf16 operands gives errors up to 1e-2; a wrong scale, layout or formula 1e-1 and more.
LARGEST_ERROR = 5e-2
# What torch and triton raise for what a device or a build cannot do. Running out of memory, and a
# compilation that fails, are RuntimeErrors.
FAILURES = (RuntimeError, NotImplementedError, ValueError, TritonError)


class OutOfTime(RuntimeError):
    """A candidate was not measured, because the time for all of them was over."""


class Prepared(NamedTuple):
    """`run(i)` does the work on the i-th set of inputs; `error()` is its relative error on set 0."""

    run: Callable[[int], Any]
    error: Callable[[], float]


@dataclass(frozen=True)
class Candidate:
    """One way to do the work. `prepare` allocates and may fail: that is a row with a reason."""

    provider: str
    dtype: str
    prepare: Callable[[], Prepared]
    bytes: int | None = None
    flops: int | None = None
    repeats: int = 1  # how often one call of `run` does the work


class Watch(Protocol):
    """Gives the seconds of one sample."""

    def sample(self) -> float: ...


class Stopwatch:
    """Seconds per call of `run`, without the time that the CPU needs to launch it.

    On a GPU a sleeping kernel goes first, so that all calls of a sample wait in the queue when the
    first of them starts. If the GPU woke before the last launch, the sample is thrown away and the
    sleep made longer.
    """

    SAMPLE_SECONDS = 3e-3
    MOST_CALLS = 32
    SHORTEST_SLEEP, LONGEST_SLEEP = 1 << 18, 1 << 26  # cycles: about 0.15 ms and 35 ms

    def __init__(self, run: Callable[[int], Any], device: torch.device) -> None:
        self.run = run
        self.on_gpu = device.type == "cuda"
        self.calls = self.MOST_CALLS if self.on_gpu else 1
        self.sleep = self.SHORTEST_SLEEP
        self.next_set = 0
        self.sample()  # warm-up: handles, allocations, clocks
        most = self.calls if self.on_gpu else self.MOST_CALLS
        self.calls = max(1, min(most, round(self.SAMPLE_SECONDS / max(self.sample(), 1e-9))))

    def sample(self) -> float:
        """Seconds per call, the mean of a few calls in a row.

        Raises RuntimeError if not even one call can be launched ahead, because it waits for the GPU.
        """
        if not self.on_gpu:
            start = time.perf_counter()
            self._call()
            return (time.perf_counter() - start) / self.calls
        while (seconds := self._queued_sample()) is None:
            self.sleep *= 2
            if self.sleep > self.LONGEST_SLEEP:  # the queue is full before all calls are in it
                if self.calls == 1:
                    raise RuntimeError("cannot be launched ahead of the GPU: it synchronises")
                self.calls, self.sleep = max(1, self.calls // 4), self.SHORTEST_SLEEP
        return seconds / self.calls

    def _queued_sample(self) -> float | None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self.sleep)
        start.record()
        self._call()
        launched_ahead = not start.query()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 if launched_ahead else None

    def _call(self) -> None:
        for _ in range(self.calls):
            self.run(self.next_set)
            self.next_set += 1


class WallClock:
    """Seconds a step, of a run of `steps` that is timed from an idle device to an idle device.

    `warm_up` is a shorter run (by default `run`), `close` gives back what runs hold.
    """

    def __init__(
        self,
        run: Callable[[], Any],
        steps: int,
        device: torch.device,
        *,
        warm_up: Callable[[], Any] | None = None,
        close: Callable[[], Any] | None = None,
    ) -> None:
        self.run, self.steps, self.device = run, steps, device
        self.warm_up = warm_up or run
        self.close = close or (lambda: None)

    def sample(self) -> float:
        wait_for(self.device)
        begun = time.perf_counter()
        self.run()
        wait_for(self.device)
        return (time.perf_counter() - begun) / self.steps


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Measured(NamedTuple):
    """By provider: how it runs and the seconds of its samples, or why it was not measured."""

    runs: dict[str, Callable[[int], Any]]
    samples: dict[str, list[float]]
    reasons: dict[str, str]
    excused: set[str]  # those whose reason is a lack of memory or time, and no fault of theirs


class Bench:
    """Measures on one device: `rounds` samples of every candidate, nothing new after `time_limit` s."""

    def __init__(self, device: torch.device, rounds: int, time_limit: float) -> None:
        self.device = device
        self.rounds = rounds
        self.time_limit = time_limit
        self.deadline = time.monotonic() + time_limit
        gpu = device.type == "cuda"
        self.cache = torch.cuda.get_device_properties(device).L2_cache_size if gpu else 0
        torch.manual_seed(0)

    def sets(self, size: int) -> range:
        """For so many sets of `size` bytes each that a set has left the L2 cache when it is used again."""
        return range(min(64, max(2, math.ceil(4 * self.cache / size))))

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Random data: products of zeros take less power and time than real ones."""
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def compare(
        self,
        suite: str,
        case: str,
        shape: dict[str, int],
        metric: str,
        candidates: Sequence[Candidate],
    ) -> list[Row]:
        """One row per candidate; ratios are against the first one.

        A candidate that cannot run, or whose result is wrong, is a row with a reason and no value.
        """
        runs, samples, reasons, _ = self.measure(candidates)
        rows = []
        for candidate in candidates:
            name, first = candidate.provider, candidates[0].provider
            row = Row(suite, case, name, shape, candidate.dtype, metric)
            row = replace(
                row, bytes=candidate.bytes, flops=candidate.flops, reason=reasons.get(name)
            )
            if name in samples:
                kernels = list(kernel_times(runs[name], self.device))
                row = timed(row, [seconds / candidate.repeats for seconds in samples[name]])
                row = replace(row, kernels=kernels)
            if name in samples and first in samples and name != first:
                ratio = times_faster(samples[name], samples[first])
                row = replace(row, baseline=first, ratio=ratio)
            rows.append(row)
        say(f"  {case} {shape}: {', '.join(map(result, rows))}")
        return rows

    def measure(
        self,
        candidates: Sequence[Candidate],
        failures: tuple[type[Exception], ...] = FAILURES,
    ) -> Measured:
        """Samples of every candidate that runs and gives the right result, taken in turns.

        `failures` are what may keep one from running; whatever else it raises ends them all.
        """
        measured = Measured({}, {}, {}, set())
        watches: dict[str, Watch] = {}
        for candidate in candidates:
            name = candidate.provider
            try:
                run = self._checked(candidate)
                watches[name] = Stopwatch(run, self.device)
                measured.runs[name] = run
            except failures as failure:
                if not isinstance(failure, FAILURES):
                    traceback.print_exception(failure)
                measured.reasons[name] = one_line(failure)
                if isinstance(failure, (torch.OutOfMemoryError, OutOfTime)):
                    measured.excused.add(name)
        measured.samples.update(in_turns(watches, self.rounds))
        return measured

    def _checked(self, candidate: Candidate) -> Callable[[int], Any]:
        if time.monotonic() > self.deadline:
            raise OutOfTime(f"the time limit of {self.time_limit:g} s was reached")
        run, error = candidate.prepare()
        if not (found := error()) <= LARGEST_ERROR:  # NaN, too, is wrong
            allowed = f"allowed is {LARGEST_ERROR:.0e}"
            raise RuntimeError(f"wrong result: relative error {found:.1e}, {allowed}")
        return run


def in_turns(watches: Mapping[str, Watch], rounds: int) -> dict[str, list[float]]:
    """`rounds` samples of each, A B B A A B ...: a drift of the clock rate meets all of them alike."""
    samples: dict[str, list[float]] = {name: [] for name in watches}
    for turn in range(rounds):
        for name in list(watches)[:: 1 if turn % 2 == 0 else -1]:
            samples[name].append(watches[name].sample())
    return samples


class Turns(NamedTuple):
    """By provider: the seconds of its samples, or why there are none."""

    samples: dict[str, list[float]]
    reasons: dict[str, str]
    excused: set[str]  # those whose reason is a lack of memory

    def broken(self) -> list[str]:
        """Those that were not measured, and memory is not the reason."""
        return [name for name in self.reasons if name not in self.excused]


def side_by_side(make: Mapping[str, Callable[[], WallClock]], rounds: int) -> Turns:
    """`in_turns` of all that can be made and run beside all the others; the rest gets a reason. All are closed."""
    turns = Turns({}, {}, set())
    clocks: dict[str, WallClock] = {}

    def attempt(name: str, work: Callable[[], Any]) -> None:
        try:
            work()
        except FAILURES as failure:
            if name in clocks:
                clocks.pop(name).close()
            turns.reasons[name] = one_line(failure)
            if isinstance(failure, torch.OutOfMemoryError):
                turns.excused.add(name)
            else:
                traceback.print_exception(failure)
        torch.cuda.empty_cache()

    def add(name: str) -> None:
        clocks[name] = make[name]()

    try:
        for name in make:
            attempt(name, partial(add, name))
        # Twice: what fitted at first may no longer fit beside what the later ones have allocated.
        for name in 2 * list(clocks):
            if name in clocks:
                attempt(name, clocks[name].warm_up)
        turns.samples.update(in_turns(clocks, rounds))
    finally:
        for clock in clocks.values():
            clock.close()
    return turns


def times_faster(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """How many times faster than the baseline: the median over the turns, which one slow turn does not move."""
    return statistics.median(b / s for s, b in zip(seconds, baseline, strict=True))


def timed(row: Row, seconds: Sequence[float]) -> Row:
    """`row` with the median of the samples in its unit, and their spread."""
    low, median, high = (float(value) for value in np.percentile(seconds, (25, 50, 75)))
    if row.metric == "time":
        value = median * 1e6
    elif row.metric == "bandwidth":
        value = (row.bytes or 0) / median / 1e9
    else:
        value = (row.flops or 0) / median / 1e12
    return replace(row, value=value, spread=(high - low) / median)


def kernel_times(
    run: Callable[[int], Any], device: torch.device, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds of every launch by kernel name, in order of appearance; on a CPU by operator name."""
    gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profile:
        for i in range(calls):
            run(i)
        if gpu:
            torch.cuda.synchronize(device)
    times: dict[str, list[float]] = {}
    for event in profile.events():
        on_gpu = event.device_type == DeviceType.CUDA and not event.is_user_annotation
        if on_gpu if gpu else event.name.startswith("aten::"):
            times.setdefault(event.name, []).append(event.time_range.elapsed_us() * 1e-6)
    return times


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest ||actual - expected|| / ||expected|| of the pairs; NaN stays NaN."""
    with torch.no_grad():
        pairs = [(a.double(), e.double()) for a, e in zip(actual, expected, strict=True)]
        return float(torch.stack([(a - e).norm() / e.norm() for a, e in pairs]).max())


def one_line(failure: Exception) -> str:
    return " ".join(str(failure).split())[:300] or type(failure).__name__


def result(row: Row) -> str:
    return f"{row.provider} {'-' if row.value is None else f'{row.value:.4g} {row.unit}'}"


def say(line: str) -> None:
    """Progress, apart from the result that goes to the standard output."""
    print(line, file=sys.stderr, flush=True)
