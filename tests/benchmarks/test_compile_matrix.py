"""The matrix of compilers on a tiny model: the same work in every cell, wrong cells refused, honest conclusions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import compile_matrix
from benchmarks.compile_matrix import CASES, FAMILIES, MODES, Cell, Check, Inputs, Matrix
from benchmarks.results import UNITS
from fastdit.reference.dit import Attention

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
MODEL = {"hidden_size": 32, "depth": 2, "num_heads": 2}
CELLS = [f"{family}, {mode}" for family in FAMILIES for mode in MODES]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing is compiled, which would take seconds a cell; says what would have been."""
    asked: list[str] = []

    def compile_model(model: Any, backend: str) -> Any:
        asked.append(f"model, {backend}")
        return model

    def compile_block(block: nn.Module, backend: str) -> None:
        asked.append(f"{type(block).__module__.split('.')[1]} {type(block).__name__}, {backend}")

    monkeypatch.setattr(torch, "compile", compile_model)
    monkeypatch.setattr(nn.Module, "compile", compile_block)
    return asked


def run(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    compile_matrix.main(["--device", "cpu", "--output", str(folder), *arguments])
    (path,) = folder.glob("*/*/compile_matrix.json")
    assert path.parent.name.endswith("-small")
    document = json.loads(path.read_text())
    assert document["schema"] == 1
    return document["rows"]


def test_every_cell_is_measured(
    tmp_path: Path, no_compiler: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(tmp_path)
    metrics: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        assert row["suite"] == "compile_matrix"
        assert row["reason"] is None
        assert row["unit"] == UNITS[row["metric"]]
        assert row["shape"] == {"N": 4, "T": 16, "D": 32, "L": 2}
        assert row["device"].endswith(", trial")
        assert row["dtype"] == "bfloat16 autocast, aot_eager"
        metrics.setdefault((row["case"], row["provider"]), set()).add(row["metric"])
        if row["metric"] == "time":
            assert row["value"] > 0
            assert row["spread"] >= 0
            assert row["kernels"]
            first = row["provider"] == compile_matrix.BASELINE
            assert (row["baseline"], row["ratio"] is None) == (
                (None, True) if first else (compile_matrix.BASELINE, False)
            )
    assert metrics.keys() == {(case, cell) for case in CASES for cell in CELLS}
    for (_, cell), found in metrics.items():
        again = set() if "eager" in cell else {"recompiles", "last_batch"}
        assert found == {"cold_start", "graphs", "time"} | again
    shown = capsys.readouterr().out
    assert shown.count("fastdit without a compiler is") == 2
    assert shown.count("compiled fastdit is at least") == 2
    assert "a trial of the program" in shown


def test_the_modes_compile_what_they_name(tmp_path: Path, no_compiler: list[str]) -> None:
    run(tmp_path, "--compiler", "eager", "--depth", "3", "--time-limit", "-1")
    assert no_compiler == [
        "model, eager",  # the compiler's own start
        *["reference AdaLNBlock, eager"] * 3,
        "model, eager",
        *["models DiTBlock, eager"] * 3,
        "model, eager",
    ]


@pytest.fixture
def matrix(no_compiler: list[str]) -> Matrix:
    torch.manual_seed(0)
    return Matrix(compile_matrix.SMALL, (4, 16), CPU, "eager", deadline=float("inf"))


def test_all_cells_have_the_same_weights_in_the_same_memory(matrix: Matrix) -> None:
    places = [
        {name: p.data_ptr() for name, p in cell.model.named_parameters()} for cell in matrix.cells
    ]
    assert all(place == places[0] for place in places)
    assert len({id(cell.model) for cell in matrix.cells}) == 6
    for name, parameter in matrix.cells[0].model.named_parameters():
        zero = name.endswith("bias") and "adaLN" not in name and "final" not in name
        assert zero or bool(parameter.any()), name
    assert [p.requires_grad for p in matrix.cells[0].model.parameters()] == [
        p.requires_grad for p in matrix.cells[3].model.parameters()
    ]


def test_a_wrong_cell_is_not_timed(
    tmp_path: Path, no_compiler: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the fastdit cells the compiled ones: wrong outputs in one, wrong gradients in the other."""
    step = Cell.step

    def wrong_step(cell: Cell, case: str, inputs: Inputs) -> torch.Tensor:
        out = step(cell, case, inputs)
        if cell.name == "fastdit, whole":
            return out * 1.1
        if cell.name == "fastdit, blocks" and case != "forward":
            cell.model.get_parameter("blocks.0.attn.qkv.weight").grad.mul_(1.2)
        return out

    monkeypatch.setattr(Cell, "step", wrong_step)
    rows = run(tmp_path)
    reasons = {
        (row["case"], row["provider"]): row["reason"] for row in rows if row["metric"] == "time"
    }
    assert "wrong output" in reasons.pop(("forward", "fastdit, whole"))
    assert "wrong output" in reasons.pop(("forward + backward", "fastdit, whole"))
    assert "wrong gradient of blocks.0.attn.qkv.weight" in reasons.pop(
        ("forward + backward", "fastdit, blocks")
    )
    assert set(reasons.values()) == {None}
    assert len(reasons) == 9
    for row in rows:
        if row["provider"] == "fastdit, whole":
            assert (row["metric"], row["value"]) == ("time", None)


def test_not_a_number_is_wrong(matrix: Matrix) -> None:
    cell, check = matrix.cells[0], matrix.check
    check(cell, "forward")
    with torch.no_grad():
        cell.model.get_parameter("final_layer.linear.bias").fill_(float("nan"))
    with pytest.raises(RuntimeError, match="wrong output: relative error nan"):
        check(cell, "forward")


def test_the_check_sees_the_whole_batch_run(matrix: Matrix) -> None:
    """The gradients of the first samples alone, from a call with all: no other batch size is compiled for the check."""
    sizes = []
    for cell in matrix.cells[:1]:
        call = cell.call
        cell.call = lambda x, t, y, call=call: sizes.append(len(x)) or call(x, t, y)
        for case in CASES:
            matrix.check(cell, case)
    assert sizes == [4, 4]
    assert all(p.grad is None for p in matrix.cells[0].parameters)
    assert len(Check(matrix.cells[0].model, matrix.inputs).exact) > 20


def test_the_reference_attends_as_its_specification() -> None:
    torch.manual_seed(0)
    written_out = Attention(24, 2).double()
    fused = compile_matrix.SdpaAttention(24, 2).double()
    fused.load_state_dict(written_out.state_dict())
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(fused(x), written_out(x))
    models = compile_matrix.models_of(MODEL, 16, CPU)
    attentions = [block.attn for block in models["reference"].blocks]
    assert {type(attention) for attention in attentions} == {compile_matrix.SdpaAttention}


def test_nothing_is_started_after_the_time_limit(tmp_path: Path, no_compiler: list[str]) -> None:
    rows = run(tmp_path, "--time-limit", "-1")
    assert len(rows) == 12
    assert {row["reason"] for row in rows} == {"the time limit was reached"}


def samples(**cells: float) -> dict[str, list[float]]:
    return {name.replace("_", ", "): [value, value * 2] for name, value in cells.items()}


def test_statements() -> None:
    reference = samples(reference_eager=1.0, reference_blocks=4.0, reference_whole=5.0)
    fastdit = samples(fastdit_eager=4.0, fastdit_blocks=4.0, fastdit_whole=4.02)
    text = compile_matrix.without_compiler(reference | fastdit)
    assert "is 1.000 times as fast as the compiled reference (reference, blocks)" in text
    assert text.endswith(": holds")
    text = compile_matrix.with_compiler(reference | fastdit)
    assert "is at least 0.995 times as fast" in text
    assert "(fastdit, whole against fastdit, eager)" in text
    assert text.endswith(": holds")

    fastdit = samples(fastdit_eager=4.1, fastdit_blocks=4.2, fastdit_whole=4.1)
    text = compile_matrix.without_compiler(reference | fastdit)
    assert "0.976" in text
    assert text.endswith("DOES NOT HOLD")
    text = compile_matrix.with_compiler(reference | fastdit)
    assert "(fastdit, blocks against fastdit, eager)" in text
    assert text.endswith("DOES NOT HOLD")

    for missing in ("reference, whole", "fastdit, eager"):
        few = {name: seconds for name, seconds in (reference | fastdit).items() if name != missing}
        assert "not all cells" in compile_matrix.without_compiler(few)
    del fastdit["fastdit, whole"]
    assert "not all cells" in compile_matrix.with_compiler(fastdit)
    assert "not all cells" in compile_matrix.with_compiler({})


def test_peak_memory_and_recompiles_are_differences(
    matrix: Matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 10**9)
    assert matrix.peak_memory(matrix.cells[0], "forward + backward") == 2.0
    assert all(p.grad is None for p in matrix.cells[0].parameters)
    counted = iter([3, 7])
    monkeypatch.setattr(compile_matrix, "graphs", lambda: next(counted))
    recompiles, seconds = matrix.last_batch("forward", matrix.cells[1])
    assert (recompiles.value, recompiles.unit) == (4, "graphs")
    assert seconds.value > 0


@pytest.mark.slow
def test_starts_from_the_source_tree(tmp_path: Path) -> None:
    """With Dynamo, in a process of its own: one graph for equal blocks, one more for another batch size."""
    script = str(ROOT / "benchmarks/compile_matrix.py")
    options = ["--small", "--depth", "1", "--compiler", "eager", "--device", "cpu"]
    command = [sys.executable, script, *options, "--output", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    (path,) = tmp_path.glob("*/*/compile_matrix.json")
    rows = json.loads(path.read_text())["rows"]
    counts = {
        (row["case"], row["provider"], row["metric"]): row["value"]
        for row in rows
        if row["unit"] == "graphs"
    }
    for case in CASES:
        for cell in CELLS:
            assert counts[case, cell, "graphs"] == (0 if "eager" in cell else 1)
            if "eager" not in cell:
                assert counts[case, cell, "recompiles"] == 1


@pytest.mark.gpu
def test_small_on_a_gpu(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks/compile_matrix.py")
    command = [sys.executable, script, "--small", "--output", str(tmp_path)]
    subprocess.run(command, capture_output=True, check=True)
    (path,) = tmp_path.glob("*/*/compile_matrix.json")
    rows = json.loads(path.read_text())["rows"]
    assert all(row["reason"] is None for row in rows)
    assert {row["metric"] for row in rows} >= {"time", "cold_start", "memory", "recompiles"}
