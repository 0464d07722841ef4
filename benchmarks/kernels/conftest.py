"""The options and the reports of the benchmarks of single operations.

    pytest benchmarks/kernels --benchmark-only           # all shapes, on a GPU
    pytest benchmarks/kernels --benchmark-only --quick   # DiT-XL at 256 tokens, attention at 1024, too; batch 8 and 64
    pytest benchmarks/kernels --benchmark-only           # without a GPU: tiny shapes, a trial of the programs

A test is one provider of one case. Its case is measured as a whole when the first of its providers is asked for, all
providers in turns; what pytest-benchmark then reports are the samples taken there.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels import harness
from benchmarks.kernels.harness import Case, Comparison, Result, Sizes, Work
from benchmarks.measure import Bench
from benchmarks.results import Environment, environment_of, write_rows

HERE = Path(__file__).resolve().parent
QUICK_SECONDS = 210.0  # the last case may begin then, and the whole stays under four minutes


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels")
    add = group.addoption
    add("--quick", action="store_true", help="DiT-XL at 256 tokens, batch 8 and 64, in 4 minutes")
    add(
        "--small",
        action="store_true",
        help="tiny shapes, to try the programs; without a GPU always",
    )
    add("--compile", action="store_true", help="measure torch.compile without a GPU, too")
    add("--save", action="store_true", help="write the rows to --output")
    add("--output", type=Path, default=HERE.parent / "results", help="folder for the results")
    add("--time-limit", type=float, help="seconds; a case that starts later is skipped")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.benchmark(timer=replayed_time))
            # What torch and Inductor warn of is not this project's.
            item.add_marker(pytest.mark.filterwarnings("default"))
    # Once used, the profiler slows launches down, which the others do not measure.
    items.sort(key=lambda item: item.path != HERE / "test_dispatch.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module: Any = metafunc.module
    metafunc.parametrize("case", module.cases(sizes_of(metafunc.config)), ids=str)
    metafunc.parametrize("provider", module.PROVIDERS)


def option(config: pytest.Config, name: str) -> Any:
    """None where pytest was started on a folder above this one, and so knows nothing of these options."""
    return config.getoption(name, default=None)


def sizes_of(config: pytest.Config) -> Sizes:
    if option(config, "small") or not torch.cuda.is_available():
        return harness.SMALL
    return harness.QUICK if option(config, "quick") else harness.FULL


# ------------------------------------------------------------------------------------- pytest-benchmark

_now = 0.0


def replayed_time() -> float:
    """The clock of the reports: it moves only while samples are replayed."""
    return _now


def replay(benchmark: Any, seconds: list[float]) -> None:
    """Gives pytest-benchmark samples that were taken before, as its rounds."""
    samples = iter(seconds)

    def one_round() -> None:
        global _now
        _now += next(samples)

    benchmark.pedantic(one_round, rounds=len(seconds))


class Kernels:
    """The results of one file: measured case by case, reported one provider a test."""

    def __init__(self, operation: str, bench: Bench, with_compile: bool) -> None:
        self.operation, self.bench, self.with_compile = operation, bench, with_compile
        self.on_gpu = bench.device.type == "cuda"
        self.backend = "triton" if self.on_gpu else "auto"
        self.results: dict[Case, dict[str, Result]] = {}

    def measure(
        self, case: Case, providers: Sequence[str], work: Callable[[Case, Bench], Work]
    ) -> dict[str, Result]:
        """The results of a case by provider."""

        def measure() -> dict[str, Result]:
            comparison = Comparison(work(case, self.bench), self.bench, self.backend)
            asked = [name for name in providers if name != "compile" or self.with_compile]
            candidates = [comparison.candidate(name, case.dtype) for name in asked]
            ceiling = comparison.work.ceiling
            return harness.measure(self.operation, case, candidates, self.bench, ceiling)

        return self.once(case, measure)

    def once(self, case: Case, measure: Callable[[], dict[str, Result]]) -> dict[str, Result]:
        """What `measure` returns when the first provider of the case asks for it."""
        if case not in self.results:
            self.results[case] = measure()
            gc.collect()
            if self.on_gpu:
                torch.cuda.empty_cache()
        return self.results[case]

    def report(self, benchmark: Any, case: Case, provider: str, results: dict[str, Result]) -> None:
        """Hands a result to pytest-benchmark. Fails if it is wrong or cannot be had, skips what was not asked for."""
        if provider not in results:
            pytest.skip("Inductor takes long on a CPU: only with --compile")
        row, seconds, excused, fraction_of_copy = results[provider]
        if row.reason is not None and excused:
            pytest.skip(row.reason)
        if row.reason is not None:
            pytest.fail(row.reason, pytrace=False)
        benchmark.group = f"{self.operation} {case}"
        benchmark.extra_info.update(
            {
                row.unit: row.value,
                "fraction of copy": fraction_of_copy,
                "fraction of ceiling": row.fraction_of_ceiling,
                "baseline": row.baseline,
                "ratio": row.ratio,
                "kernels": row.kernels,
            }
        )
        replay(benchmark, seconds)


@pytest.fixture(scope="session")
def bench(pytestconfig: pytest.Config) -> Bench:
    """Measures on the GPU if there is one. The time runs from the first test on."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    limit = option(pytestconfig, "time_limit")
    if limit is None:
        limit = QUICK_SECONDS if option(pytestconfig, "quick") else math.inf
    return Bench(device, sizes_of(pytestconfig).rounds, limit)


@pytest.fixture(scope="session")
def environment(bench: Bench) -> Environment:
    return environment_of(bench.device)


@pytest.fixture(scope="module")
def kernels(
    request: pytest.FixtureRequest, bench: Bench, environment: Environment
) -> Iterator[Kernels]:
    """What measures the operation of the test's file; its rows are written when the file is done."""
    config = request.config
    operation = request.path.stem.removeprefix("test_")
    on_gpu = bench.device.type == "cuda"
    kernels = Kernels(operation, bench, with_compile=on_gpu or option(config, "compile"))
    yield kernels
    if option(config, "save"):
        rows = [result.row for case in kernels.results.values() for result in case.values()]
        folder = environment.folder(option(config, "output"))
        if sizes_of(config) is harness.SMALL:  # a trial never stands in for a measurement
            folder = folder.with_name(f"{folder.name}-small")
            environment = replace(environment, device=f"{environment.device}, trial")
        write_rows(folder / f"kernels-{operation}.json", rows, environment)
