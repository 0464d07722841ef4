"""Checked before it is timed, timed in turns, and on a GPU without the time of the launches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import Bench, Candidate, Prepared, Stopwatch
from benchmarks.results import Row

CPU = torch.device("cpu")


def candidate(
    name: str, run: Callable[[int], Any] = lambda i: None, error: float = 0.0, **counts: int
) -> Candidate:
    return Candidate(name, "bfloat16", lambda: Prepared(run, lambda: error), **counts)


def refused(message: str) -> Candidate:
    def prepare() -> Prepared:
        raise RuntimeError(message)

    return Candidate("refused", "bfloat16", prepare)


def compare(
    *candidates: Candidate, time_limit: float = math.inf, metric: str = "time"
) -> dict[str, Row]:
    rows = Bench(CPU, 3, time_limit).compare("suite", "case", {"N": 2}, metric, candidates)
    assert [row.provider for row in rows] == [each.provider for each in candidates]
    return {row.provider: row for row in rows}


class FixedWatch:
    """Stands in for a stopwatch: `run` gives the seconds of the next sample."""

    def __init__(self, run: Callable[[int], Any], device: torch.device) -> None:
        self.sample = lambda: run(0)


def test_what_fails_or_is_wrong_has_a_reason_and_no_value() -> None:
    rows = compare(
        candidate("right", error=0.01),
        candidate("wrong", error=0.1),
        candidate("not finite", error=math.nan),
        refused("No available kernel.\n  Aborting   execution."),
    )
    assert rows["right"].value is not None
    assert rows["right"].reason is None
    for name in ("wrong", "not finite", "refused"):
        assert rows[name].value is rows[name].spread is rows[name].ratio is None
    assert rows["wrong"].reason == "wrong result: relative error 1.0e-01, allowed is 5e-02"
    assert "nan" in str(rows["not finite"].reason)
    assert rows["refused"].reason == "No available kernel. Aborting execution."


def test_a_programming_error_is_not_hidden() -> None:
    def prepare() -> Prepared:
        raise TypeError("a mistake")

    with pytest.raises(TypeError, match="a mistake"):
        compare(Candidate("broken", "bfloat16", prepare))


def test_nothing_is_started_after_the_time_limit() -> None:
    rows = compare(candidate("late"), time_limit=-1)
    assert rows["late"].value is None
    assert rows["late"].reason == "the time limit of -1 s was reached"


def test_value_spread_and_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = {"slow": [4e-6, 8e-6, 16e-6], "fast": [2e-6, 2e-6, 4e-6]}
    monkeypatch.setattr(measure, "Stopwatch", FixedWatch)
    monkeypatch.setattr(measure, "kernel_times", lambda run, device: {"kernel": [1.0]})
    times = {name: iter(seconds) for name, seconds in samples.items()}
    rows = compare(
        candidate("slow", lambda i: next(times["slow"]), repeats=2),
        candidate("fast", lambda i: next(times["fast"]), repeats=2),
    )
    slow, fast = rows["slow"], rows["fast"]
    assert (slow.value, slow.spread) == (pytest.approx(4.0), pytest.approx((12 - 6) / 8))
    assert (slow.baseline, slow.ratio) == (None, None)
    assert (fast.value, fast.baseline, fast.ratio) == (
        pytest.approx(1.0),
        "slow",
        pytest.approx(4.0),
    )
    assert fast.kernels == ["kernel"]


def test_no_ratio_without_the_baseline() -> None:
    rows = compare(refused("absent"), candidate("other"))
    assert rows["other"].value is not None
    assert rows["other"].baseline is rows["other"].ratio is None


@pytest.mark.parametrize(("metric", "value"), [("time", 2000.0), ("bandwidth", 3.0), ("rate", 4.0)])
def test_units(metric: str, value: float) -> None:
    row = Row("s", "c", "p", {}, "bfloat16", metric, bytes=6 * 10**6, flops=8 * 10**9)
    timed = measure.timed(row, [2e-3])
    assert timed.value == pytest.approx(value, rel=1e-12)
    assert timed.spread == 0


def test_turns_go_back_and_forth() -> None:
    order: list[str] = []
    watches = {
        name: FixedWatch(lambda i, name=name: order.append(name) or 1.0, CPU) for name in "ABC"
    }
    samples = measure.in_turns(watches, 3)  # type: ignore[arg-type]
    assert "".join(order) == "ABCCBAABC"
    assert samples == {"A": [1.0] * 3, "B": [1.0] * 3, "C": [1.0] * 3}


def test_inputs_rotate_until_they_have_left_the_cache() -> None:
    bench = Bench(CPU, 3, 60)
    assert len(bench.sets(10)) == 2
    bench.cache = 50_000_000
    assert len(bench.sets(20_000_000)) == 10
    assert len(bench.sets(10**9)) == 2
    assert len(bench.sets(100)) == 64
    seen: list[int] = []
    watch = Stopwatch(seen.append, CPU)
    watch.sample()
    assert seen == list(range(len(seen)))


def test_the_largest_error_counts() -> None:
    one, two = torch.ones(4), torch.full((4,), 2.0)
    assert measure.relative_error([one, two], [one, one]) == 1.0
    assert math.isnan(measure.relative_error([one, one * math.nan], [one, one]))


class Queue:
    """A GPU in slow motion: the sleep is over when more than `sleep` ticks have passed; a launch takes `cost`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: int, room: int = 10**9) -> None:
        self.cost, self.room = cost, room
        self.queued, self.awake_at, self.now, self.launches = 0, 0, 0, 0
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def sleep(self, ticks: int) -> None:
        self.queued, self.awake_at = 0, self.now + ticks

    def run(self, i: int) -> None:
        self.queued += 1
        self.launches += 1
        self.now += (
            self.cost if self.queued <= self.room else 10**12
        )  # a full queue waits for the GPU


class Event:
    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return self.queue.now >= self.queue.awake_at

    def elapsed_time(self, end: Event) -> float:
        return 0.5 * self.queue.queued  # ms; half a millisecond a call


def test_launches_are_hidden_behind_a_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(monkeypatch, cost=100_000)
    watch = Stopwatch(queue.run, torch.device("cuda"))
    assert watch.sample() == pytest.approx(5e-4)
    assert watch.calls == 6  # 3 ms of them
    assert watch.sleep > 32 * 100_000


def test_fewer_calls_where_the_queue_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(monkeypatch, cost=100, room=3)
    watch = Stopwatch(queue.run, torch.device("cuda"))
    assert watch.calls == 2
    assert watch.sample() == pytest.approx(5e-4)


def test_what_waits_for_the_gpu_cannot_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(monkeypatch, cost=100, room=0)
    with pytest.raises(RuntimeError, match="it synchronises"):
        Stopwatch(queue.run, torch.device("cuda"))


def test_side_by_side() -> None:
    """Who cannot be made, or no longer runs beside the others, gets a reason; all are closed."""
    closed = []
    runs: list[str] = []

    def clock(name: str, failure: Exception | None = None, after: int = 0) -> measure.WallClock:
        def run() -> None:
            runs.append(name)
            if failure is not None and runs.count(name) > after:
                raise failure

        def close() -> None:
            closed.append(name)

        return measure.WallClock(run, 2, torch.device("cpu"), close=close)

    def unmade() -> measure.WallClock:
        raise ValueError("cannot\nbe made")

    turns = measure.side_by_side(
        {
            "good": lambda: clock("good"),
            "unmade": unmade,
            "late": lambda: clock("late", torch.OutOfMemoryError("no room"), after=1),
            "other": lambda: clock("other"),
        },
        rounds=3,
    )
    assert {name: len(seconds) for name, seconds in turns.samples.items()} == {
        "good": 3,
        "other": 3,
    }
    assert turns.reasons == {"unmade": "cannot be made", "late": "no room"}
    assert turns.broken() == ["unmade"]
    assert closed == ["late", "good", "other"]
    assert runs[-6:] == ["good", "other", "other", "good", "good", "other"]
