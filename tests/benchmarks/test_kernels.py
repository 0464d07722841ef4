"""The benchmarks of single operations: complete rows on tiny shapes, wrong results refused, bytes counted by hand."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import harness
from benchmarks.kernels.harness import FULL, QUICK, SMALL, Case, Comparison, Result, Sizes, Work
from benchmarks.measure import Bench
from benchmarks.results import Row
from fastdit import ops, reference
from fastdit.kernels.launch import recording
from fastdit.testing import relative_rms

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
FILES = sorted((ROOT / "benchmarks/kernels").glob("test_*.py"))
OPERATIONS = [path.stem.removeprefix("test_") for path in FILES if path.stem != "test_dispatch"]
# Fewer rows than SMALL has: the interpreter takes milliseconds for each.
TINY = Sizes({"tiny": 32}, (4,), (2,), (), rounds=1)


def module_of(operation: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.kernels.test_{operation}")


def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The benchmarks in a process of their own, without the interpreter of the kernels."""
    # As a user runs it: kernels compiled, and not as one of several workers, for whom nothing is timed.
    kept = (name for name in os.environ if not name.startswith(("TRITON_INTERPRET", "PYTEST_")))
    environment = {name: os.environ[name] for name in kept}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--benchmark-only"]
    return subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=check,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    saved = f"--benchmark-json={folder / 'benchmark.json'}"
    run("benchmarks/kernels", "--small", "--save", "--output", str(folder), saved)
    return folder


def test_one_file_an_operation() -> None:
    assert OPERATIONS == [
        "adamw_ema",
        "attention",
        "diffusion_step",
        "gated_residual",
        "gated_residual_layer_norm_modulate",
        "layer_norm_modulate",
        "mlp_gelu",
        "patchify",
        "unpatchify",
    ]


def test_every_file_writes_complete_rows(folder: Path) -> None:
    paths = sorted(folder.glob("*/*/*.json"))
    assert [path.name for path in paths] == [
        f"kernels-{path.stem.removeprefix('test_')}.json" for path in FILES
    ]
    assert {path.parent for path in paths} == {paths[0].parent}
    if not torch.cuda.is_available():
        assert paths[0].parents[1].name.startswith("cpu-")
    assert paths[0].parent.name.endswith("-small")
    for path in paths:
        document = json.loads(path.read_text())
        assert document["schema"] == 1
        for row in document["rows"]:
            assert row["suite"] == "kernels"
            assert row["case"].split()[0] == path.stem.removeprefix("kernels-")
            assert row["device"].endswith(", trial")
            assert row["value"] > 0, row
            assert row["reason"] is None
            if "dispatch" not in row["case"]:
                assert row["bytes"] > 0
                assert row["fraction_of_ceiling"] > 0
                assert row["unit"] == ("TFLOP/s" if row["flops"] else "GB/s")
                assert row["kernels"]
            parameters = {"D", "blocks", "parameters"}
            assert set(row["shape"]) == (parameters if "adamw" in row["case"] else {"N", "T", "D"})


def test_every_provider_of_every_case_is_there(folder: Path) -> None:
    found = defaultdict(set)
    for path in folder.glob("*/*/*.json"):
        for row in json.loads(path.read_text())["rows"]:
            found[path.stem, row["case"], row["dtype"]].add(row["provider"])
    expected = {"copy", "eager", "fastdit"} | ({"compile"} if torch.cuda.is_available() else set())
    for operation in OPERATIONS:
        module = module_of(operation)
        for case in module.cases(SMALL):
            place = (f"kernels-{operation}", f"{operation} {case.direction}", case.dtype)
            more = {"mlp_gelu": {"products"}, "adamw_ema": {"fused"}}.get(operation, set())
            if (
                operation == "attention"
            ):  # every backend, whether it can run or not, by a row or its reason
                assert found.pop(place) >= expected | {"sdpa", "sdpa_flash"}
            else:
                assert found.pop(place) == expected | more
    assert {case for _, case, _ in found} == {
        "dispatch no gradient",
        "dispatch forward",
        "dispatch forward + backward",
    }
    for providers in found.values():
        assert providers == {"eager", "fastdit", "register_autograd"}


def test_pytest_benchmark_reports_the_samples(folder: Path) -> None:
    """What it calls the median is that of the rows."""
    # Two cases may give the same value to the last bit: twice the bytes in twice the time.
    rows = defaultdict(list)
    for path in folder.glob("*/*/*.json"):
        for row in json.loads(path.read_text())["rows"]:
            rows[row["case"].split()[0], row["provider"], row["value"]].append(row)
    report = json.loads((folder / "benchmark.json").read_text())
    assert len(report["benchmarks"]) == sum(map(len, rows.values()))

    def seconds_of(row: dict[str, Any]) -> float:
        work = {"GB/s": (row["bytes"] or 0) / 1e9, "TFLOP/s": (row["flops"] or 0) / 1e12}
        return row["value"] / 1e6 if row["unit"] == "us" else work[row["unit"]] / row["value"]

    for entry in report["benchmarks"]:
        operation, provider = entry["group"].split()[0], entry["params"]["provider"]
        info, median = entry["extra_info"], entry["stats"]["median"]
        (unit,) = info.keys() & {"GB/s", "TFLOP/s", "us"}
        candidates = rows[operation, provider, info[unit]]
        fitting = [row for row in candidates if seconds_of(row) == pytest.approx(median)]
        assert fitting, (entry["name"], median, candidates)
        row = fitting[0]
        assert info["fraction of ceiling"] == row["fraction_of_ceiling"]
        if operation != "dispatch":
            assert info["fraction of copy"] > 0
            assert entry["stats"]["rounds"] == SMALL.rounds


# ---------------------------------------------------------------------------------------- what is right


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_kernels_are_measured(operation: str) -> None:
    """The benchmark's own way to the Triton kernels, their backward repeated, and its check of them."""
    module, bench = module_of(operation), Bench(CPU, 1, math.inf)
    for case in module.cases(TINY):
        if operation == "adamw_ema":
            candidates = module.candidates(replace(case, width=8), bench, "triton")
        else:
            comparison = Comparison(module.work(case, bench), bench, "triton")
            candidates = [comparison.candidate(name, case.dtype) for name in ("copy", "fastdit")]
        candidates = [each for each in candidates if each.provider in ("copy", "fastdit")]
        results = harness.measure(operation, case, candidates, bench, "copy")
        assert results["fastdit"].row.reason is None
        assert results["fastdit"].row.value > 0


@pytest.mark.parametrize("change", ["params", "ema", "exp_avg_sqs", "copies", "step"])
def test_a_wrong_step_of_adamw_is_not_reported(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of("adamw_ema")
    (case,) = module.cases(TINY)

    def wrong(*lists: Any, **options: Any) -> None:
        if change == "step":
            lists = (*lists[:4], lists[4] + 1)
        module.reference.adamw_ema_(*lists, **options)
        changed = {"params": lists[0], "exp_avg_sqs": lists[3]}
        changed |= {"ema": options["emas"][0], "copies": options["copies"]}
        if change in changed:
            changed[change][-1].mul_(1.01)

    monkeypatch.setattr(module, "adamw_ema_", wrong)
    bench = Bench(CPU, 1, math.inf)
    results = harness.measure("x", case, module.candidates(case, bench, "auto")[2:], bench, "copy")
    assert results["fastdit"].row.reason.startswith("wrong result: ")
    assert results["eager"].row.reason is results["fused"].row.reason is None


def work_of(operation: Any, *, backward: bool) -> Work:
    bench = Bench(CPU, 1, math.inf)
    case = Case("backward" if backward else "forward", "tiny", 16, 4, 3, torch.float32)
    work = module_of("layer_norm_modulate").work(case, bench)
    return Work(
        work.reference, operation, work.draw, work.bytes, options=work.options, backward=backward
    )


def shifted(x: Tensor, *, shift: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    return ops.layer_norm_modulate(x, shift=shift + 0.05, scale=scale, out_dtype=out_dtype)


def swapped(x: Tensor, *, shift: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    return ops.layer_norm_modulate(x, shift=scale, scale=shift, out_dtype=out_dtype)


def not_a_number(x: Tensor, *, shift: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    out = ops.layer_norm_modulate(x, shift=shift, scale=scale, out_dtype=out_dtype)
    return out * torch.where(torch.arange(16) == 3, math.nan, 1.0).to(out_dtype)


@pytest.mark.parametrize(
    ("operation", "backward"),
    [(shifted, False), (swapped, True), (not_a_number, False), (not_a_number, True)],
)
def test_wrong_numbers_are_not_reported(operation: Any, backward: bool) -> None:
    work, bench = work_of(operation, backward=backward), Bench(CPU, 1, math.inf)
    case = Case("forward", "tiny", 16, 4, 3)
    comparison = Comparison(work, bench, "auto")
    candidates = [comparison.candidate(name, "bfloat16") for name in ("copy", "eager", "fastdit")]
    results = harness.measure("layer_norm_modulate", case, candidates, bench, "copy")
    assert results["eager"].row.value is not None
    assert results["fastdit"].row.value is None
    assert results["fastdit"].seconds == []
    assert not results["fastdit"].excused
    assert results["fastdit"].row.reason.startswith("wrong result: ")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), None])
def test_a_lack_of_memory_or_time_is_no_failure(error: Exception | None) -> None:
    def operation(*_: object, **__: object) -> Tensor:
        raise error

    bench = Bench(CPU, 1, math.inf if error else -1)
    comparison = Comparison(work_of(operation, backward=False), bench, "auto")
    case = Case("forward", "tiny", 16, 4, 3)
    results = harness.measure("x", case, [comparison.candidate("fastdit", "")], bench, "copy")
    assert results["fastdit"].excused
    assert ("CUDA out of memory" if error else "time limit") in results["fastdit"].row.reason


def test_a_mistake_in_one_provider_leaves_the_others_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def mistaken(*_: object, **__: object) -> Tensor:
        raise KeyError("a mistake")

    bench = Bench(CPU, 1, math.inf)
    comparison = Comparison(work_of(mistaken, backward=False), bench, "auto")
    candidates = [comparison.candidate(name, "") for name in ("copy", "eager", "fastdit")]
    results = harness.measure("x", Case("forward", "tiny", 16, 4, 3), candidates, bench, "copy")
    assert results["fastdit"].row.reason == "'a mistake'"
    assert not results["fastdit"].excused
    assert results["eager"].row.fraction_of_ceiling > 0
    assert "in mistaken" in capsys.readouterr().err


@pytest.mark.parametrize("operation", ["mlp_gelu", "gated_residual_layer_norm_modulate"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_float64_is_the_same_in_chunks(
    operation: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the gradients of weights, which are sums over all samples."""
    bench = Bench(CPU, 1, math.inf)
    work = module_of(operation).work(Case(direction, "tiny", 8, 4, 5), bench)
    comparison = Comparison(work, bench, "auto")
    whole = comparison.exact
    del comparison.exact
    monkeypatch.setattr(harness, "CHUNK", 2 * 4 * 8)  # two samples
    calls = []
    original = reference.mlp_gelu if operation == "mlp_gelu" else work.reference
    object.__setattr__(work, "reference", lambda *a, **k: calls.append(1) or original(*a, **k))
    for chunked, expected in zip(comparison.exact, whole, strict=True):
        assert relative_rms(chunked, expected) < 1e-14
    assert len(calls) == 3
    assert {out.dtype for out in whole} == {torch.float64}


def test_results_stay_alive_until_their_set_is_used_again() -> None:
    addresses = []
    run = harness.rotated(lambda i: torch.full((4,), float(i)), 3)
    for i in range(9):
        out = run(i)
        assert out[0] == i % 3
        addresses.append(out.data_ptr())
        del out
    assert all(len(set(addresses[i : i + 3])) == 3 for i in range(7))


# --------------------------------------------------------------------------------------- what is counted


def test_sizes() -> None:
    assert FULL.widths == {"S": 384, "B": 768, "L": 1024, "XL": 1152}
    assert (FULL.tokens, FULL.batches) == ((256, 1024), (8, 64, 256))
    assert (QUICK.widths, QUICK.tokens, QUICK.batches) == ({"XL": 1152}, (256,), (8, 64))
    names = [str(case) for case in module_of("layer_norm_modulate").cases(QUICK)]
    assert names == [
        "forward-XL-256x8",
        "backward-XL-256x8",
        "forward-XL-256x64",
        "backward-XL-256x64",
        "forward-XL-256x64-float32_stream",
        "backward-XL-256x64-float32_stream",
    ]
    assert len(module_of("layer_norm_modulate").cases(FULL)) == 4 * 2 * 3 * 2 * 2
    assert len(module_of("patchify").cases(FULL)) == 2 * 3 * 2
    attention = module_of("attention").cases(QUICK)
    assert {(case.model, case.tokens) for case in attention} == {("K72", 256), ("K72", 1024)}


def bytes_of(operation: str, direction: str, stream: torch.dtype) -> int:
    case = Case(direction, "tiny", 16, 4, 3, stream)
    return module_of(operation).work(case, Bench(CPU, 1, math.inf)).bytes


WIDE, NARROW = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("operation", "direction", "stream", "a_token", "a_sample"),
    [
        # x, h; shift, scale
        ("layer_norm_modulate", "forward", NARROW, 2 + 2, 4),
        ("layer_norm_modulate", "forward", WIDE, 4 + 2, 4),
        # dh, x, dx; scale, dshift, dscale
        ("layer_norm_modulate", "backward", NARROW, 2 + 2 + 2, 6),
        ("layer_norm_modulate", "backward", WIDE, 2 + 4 + 4, 6),
        # x, branch, x_new; gate
        ("gated_residual", "forward", NARROW, 2 + 2 + 2, 2),
        ("gated_residual", "forward", WIDE, 4 + 2 + 4, 2),
        # dx, branch, dbranch; gate, dgate
        ("gated_residual", "backward", NARROW, 2 + 2 + 2, 4),
        ("gated_residual", "backward", WIDE, 4 + 2 + 2, 4),
        # x, branch, x_new, h; gate, shift, scale: 16 D a layer of two seams, with a float32 stream 24 D
        ("gated_residual_layer_norm_modulate", "forward", NARROW, 16 // 2, 6),
        ("gated_residual_layer_norm_modulate", "forward", WIDE, 24 // 2, 6),
        # dx_new, dh, x_new, branch, dx, dbranch; gate, scale and three gradients
        ("gated_residual_layer_norm_modulate", "backward", NARROW, 6 + 3 * 2, 10),
        ("gated_residual_layer_norm_modulate", "backward", WIDE, 6 + 3 * 4, 10),
    ],
)
def test_bytes_of_rows(
    operation: str, direction: str, stream: torch.dtype, a_token: int, a_sample: int
) -> None:
    assert bytes_of(operation, direction, stream) == 3 * 16 * (4 * a_token + a_sample)


def test_bytes_of_the_others() -> None:
    bench = Bench(CPU, 1, math.inf)
    for operation, channels in (("patchify", 4), ("unpatchify", 8)):
        for case in module_of(operation).cases(TINY):
            work = module_of(operation).work(case, bench)
            (inputs,) = work.draw().values()
            assert inputs.numel() == 2 * channels * 4 * 4
            assert work.bytes == 2 * inputs.nbytes
    n, t, d, f = 3, 4, 16, 64
    forward = module_of("mlp_gelu").work(Case("forward", "tiny", d, t, n), bench)
    assert forward.bytes == 2 * (n * t * d + f * d + f + d * f + d + n * t * d)
    assert forward.flops == 2 * (n * t * d * f) * 2
    backward = module_of("mlp_gelu").work(Case("backward", "tiny", d, t, n), bench)
    read = n * t * d + n * t * d + n * t * f + 2 * d * f
    assert backward.bytes == 2 * (read + n * t * d + 2 * d * f + f + d)
    assert backward.flops == 2 * forward.flops
    (case,) = module_of("adamw_ema").cases(TINY)
    assert case.parameters == 2 * (18 * 32**2 + 15 * 32)
    adamw = module_of("adamw_ema").candidates(case, bench, "auto")
    assert {each.bytes for each in adamw} == {(2 * 16 + 4 + 2) * case.parameters}
    (case,) = module_of("diffusion_step").cases(TINY)
    step = module_of("diffusion_step").work(case, bench)
    inputs = step.draw()
    read = inputs["tokens"].nbytes * 3 // 4 + inputs["x"].nbytes + inputs["noise"].nbytes
    assert step.bytes == read + inputs["x"].nbytes


# ----------------------------------------------------------------------------------------------- dispatch


def test_dispatch_measures_the_ways_that_it_names() -> None:
    dispatch = module_of("dispatch")
    x, vector = torch.randn(1, 1, 8), torch.randn(1, 8)
    leaf = x.clone().requires_grad_()
    recorded = {
        "eager": "AddBackward0",
        "fastdit": "LayerNormModulateBackward",
        "register_autograd": "GeneratedBackwardFor_fastdit_benchmark_layer_norm_modulate",
    }
    with dispatch.empty_slots(CPU):
        for provider, function in dispatch.FUNCTIONS.items():
            assert function(x, shift=vector, scale=vector).grad_fn is None
            out = function(leaf, shift=vector, scale=vector)
            assert recorded[provider] in out.grad_fn.name()
            (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
            assert gradient.shape == x.shape


def test_dispatch_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch = module_of("dispatch")
    calls: list[str] = []
    for name in ("allocate", "allocate_gradients"):
        original = getattr(dispatch, name)

        def watched(*arguments: Any, name: str = name, original: Any = original) -> Any:
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(dispatch, name, watched)
    x, vector = torch.randn(1, 1, 8, requires_grad=True), torch.randn(1, 8)
    with dispatch.empty_slots(CPU), recording() as launches:
        ops.layer_norm_modulate(x, shift=vector, scale=vector).sum().backward()
    assert calls == ["allocate", "allocate_gradients"]
    assert launches == []


# ----------------------------------------------------------------------------------------- what is said


class Benchmark:
    """Stands in for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.rounds = 0

    def pedantic(self, target: Any, rounds: int) -> None:
        for _ in range(rounds):
            target()
        self.rounds = rounds


def test_reports() -> None:
    conftest = importlib.import_module("benchmarks.kernels.conftest")
    kernels = conftest.Kernels("patchify", Bench(CPU, 1, math.inf), with_compile=False)
    case, benchmark = Case("forward", "tiny", 16, 4, 3), Benchmark()
    row = Row("kernels", "patchify forward", "fastdit", case.shape, "bfloat16", "bandwidth", 5.0)
    before = conftest.replayed_time()
    kernels.report(benchmark, case, "fastdit", {"fastdit": Result(row, [1.0, 2.0], False, 0.9)})
    assert conftest.replayed_time() - before == 3.0
    assert benchmark.rounds == 2
    assert benchmark.extra_info["GB/s"] == 5.0
    assert benchmark.extra_info["fraction of copy"] == 0.9

    refused = Result(replace(row, value=None, reason="wrong result: x"), [], False, None)
    with pytest.raises(pytest.fail.Exception, match="wrong result: x"):
        kernels.report(benchmark, case, "fastdit", {"fastdit": refused})
    with pytest.raises(pytest.skip.Exception, match="wrong result: x"):
        kernels.report(benchmark, case, "fastdit", {"fastdit": refused._replace(excused=True)})
    with pytest.raises(pytest.skip.Exception, match="--compile"):
        kernels.report(benchmark, case, "compile", {})


def test_a_case_is_measured_once() -> None:
    conftest = importlib.import_module("benchmarks.kernels.conftest")
    kernels = conftest.Kernels("patchify", Bench(CPU, 1, math.inf), with_compile=False)
    module = module_of("patchify")
    forward, backward = module.cases(TINY)
    results = kernels.measure(forward, module.PROVIDERS, module.work)
    assert list(results) == ["copy", "eager", "fastdit"]
    assert kernels.measure(forward, module.PROVIDERS, module.work) is results
    assert kernels.measure(backward, module.PROVIDERS, module.work) is not results


# ------------------------------------------------------------------------------------------- on the whole


@pytest.mark.slow
def test_torch_compile_on_a_cpu(tmp_path: Path) -> None:
    """Inductor's backward, too, run more than once on what its forward saved."""
    run(
        "benchmarks/kernels/test_layer_norm_modulate.py",
        "--compile",
        "--save",
        "--output",
        str(tmp_path),
    )
    (path,) = tmp_path.glob("*/*/*.json")
    rows = json.loads(path.read_text())["rows"]
    ratios = [row["ratio"] for row in rows if row["provider"] == "fastdit"]
    assert len(ratios) == 4
    assert all(ratio > 0 for ratio in ratios)
    assert {row["baseline"] for row in rows if row["provider"] != "compile"} == {"compile"}


@pytest.mark.gpu
def test_all_providers_on_a_gpu(tmp_path: Path) -> None:
    # What the torch that is there warns of when it is imported is not tested here.
    options = ["-o", "filterwarnings=default", "--save", "--output", str(tmp_path)]
    run("benchmarks/kernels", "--small", *options)
    for path in tmp_path.glob("*/*/*.json"):
        for row in json.loads(path.read_text())["rows"]:
            assert row["value"] is not None, row
            if row["provider"] == "fastdit" and "dispatch" not in row["case"]:
                assert row["ratio"] > 0
