"""The program that measures training runs, and writes what it says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import training
from benchmarks.results import read_rows

pytestmark = pytest.mark.filterwarnings("ignore:Creating a tensor from a list")


def test_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = training.models_of(
        {"patch_size": 2, "hidden_size": 32, "depth": 1, "num_heads": 2},
        4,
        training.torch.device("cpu"),
    )
    monkeypatch.setattr(training, "models_of", lambda sizes, tokens, device: small)
    loops = []
    close = training.Loop.close
    monkeypatch.setattr(training.Loop, "close", lambda loop: loops.append(loop) or close(loop))  # type: ignore[func-returns-value]
    options = ["--device", "cpu", "--model", "DiT-S/2", "--batch", "2", "--dtype", "fp32"]
    options += ["--steps", "1", "--rounds", "2", "--no-compile", "--output", str(tmp_path)]
    training.main(options)
    (path,) = tmp_path.glob("*/*/training-dit-s-2-2.json")
    rows = read_rows(path)
    times = {(row.case, row.provider): row for row in rows if row.metric == "time"}
    assert [provider for _, provider in times] == [
        training.LOOP,
        training.LOOP,
        training.BARE,
        training.REFERENCE,
    ]
    loop = times["of the bare loop", training.LOOP]
    assert loop.baseline == training.BARE
    assert (loop.ratio or 0) > 0
    rate = next(row for row in rows if row.metric == "rate" and row.provider == training.BARE)
    bare = times["DiT-S/2", training.BARE]
    assert rate.value == pytest.approx(bare.flops / bare.value / 1e6)  # type: ignore[operator]
    assert str(path) in capsys.readouterr().out
    (closed,) = loops
    with pytest.raises(StopIteration):
        next(closed.batches)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_memory_budget_compiles_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is not what torch.compile has made for the first."""
    from torch._functorch import config
    from torch._inductor import compile_fx

    seen = []

    def stand_in(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        seen.append(config.activation_memory_budget)
        return graph.forward

    monkeypatch.setattr(compile_fx, "compile_fx", stand_in)
    torch.compiler.reset()
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
    for budget in (1.0, 0.75):
        torch.compile(copy.deepcopy(layers), backend=training.inductor(budget))(torch.ones(2, 8))
    assert seen == [1.0, 0.75]


def test_the_memory_of_a_cpu_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        training.main(["--device", "cpu", "--largest-batch"])
    assert "--largest-batch: is about the memory of a GPU" in capsys.readouterr().err
