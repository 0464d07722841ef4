"""The program that measures training runs, and writes what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    options = ["--device", "cpu", "--model", "DiT-S/2", "--batch", "2", "--dtype", "fp32"]
    options += ["--steps", "1", "--rounds", "2", "--no-compile", "--output", str(tmp_path)]
    training.main(options)
    (path,) = tmp_path.glob("*/*/training-dit-s-2.json")
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


def test_the_memory_of_a_cpu_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        training.main(["--device", "cpu", "--largest-batch"])
    assert "--largest-batch: is about the memory of a GPU" in capsys.readouterr().err
