"""What is saved while training goes on, and old checkpoints that cannot be removed."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdit import weights
from fastdit.files import read_json
from fastdit.training import train
from fastdit.training.checkpoint import Saver, Staged, newest_whole
from fastdit.training.loop import Trainer
from fastdit.weights import problems

from .helpers import checkpoints, tensors, tiny

CPU = torch.device("cpu")


def _now(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all that a checkpoint has to hold, under the names of `tensors`."""
    found: dict[str, Tensor] = {"rng.run": trainer.generator.get_state()}
    for file, module in {"model": trainer.model, **trainer.trained.averages}.items():
        found |= {f"{file}.{name}": value for name, value in module.state_dict().items()}
    found |= {f"optimizer.{name}": value for name, value in trainer.optimizer.state().items()}
    return {name: value.detach().clone() for name, value in found.items()}


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writing of step 2 is held until updates 3 and 4 are done. What it writes is the state of step 2 all the same,
    and the next save waits for it."""
    begun, released = threading.Event(), threading.Event()
    waited_for: list[int] = []
    done_while_held: list[tuple[int, list[str]]] = []
    expected: dict[int, dict[str, Tensor]] = {}
    sums: dict[int, list[float]] = {}
    write, save, update = Saver._write, Saver.save, Trainer._update

    def held(self: Saver, path: Path, staged: Staged) -> None:
        # Whoever saves goes on at once, unless it waits for this thread.
        if staged.step == 2 and not (begun.wait(20) and released.wait(120)):
            waited_for.append(staged.step)
        write(self, path, staged)

    def noted(self: Saver, trained: Any, state: Any, description: Any) -> None:
        expected[state["step"]] = _now(trainer)
        sums[state["step"]] = trainer.sums.tolist()
        save(self, trained, state, description)
        begun.set()

    def counted(self: Trainer, x0: Tensor, y: Tensor) -> None:
        update(self, x0, y)
        if 2 in expected:
            done_while_held.append((self.step + 1, checkpoints(tmp_path / "run")))
        if self.step + 1 == 4:
            released.set()

    monkeypatch.setattr(Saver, "_write", held)
    monkeypatch.setattr(Saver, "save", noted)
    monkeypatch.setattr(Trainer, "_update", counted)
    config = tiny(tmp_path / "run", log_every=3, more_ema_decays=(0.5,), keep_checkpoints=None)
    trainer = Trainer(config, CPU)
    run = trainer.run()

    assert waited_for == []
    assert done_while_held == [(3, []), (4, [])]
    assert checkpoints(run) == ["step-00000002", "step-00000004"]
    for step, values in expected.items():
        found = tensors(run, step)
        assert values.keys() <= found.keys()
        assert [name for name, value in values.items() if not torch.equal(found[name], value)] == []
        state = read_json(run / "checkpoints" / f"step-{step:08d}" / "state.json")
        assert (state["step"], state["sums_since_log"]) == (step, sums[step])
    # It could have been told: all of it has moved on meanwhile, but for what is not trained.
    same = {name for name, value in expected[4].items() if torch.equal(expected[2][name], value)}
    assert same == {f"{file}.pos_embed" for file in ("model", "ema", "ema-0.5")}


def test_global_generators_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's data or model may draw from any of them; here a step does, and of those that draw normal numbers in
    pairs the checkpoint is in the middle of one."""
    update = Trainer._update

    def drawing(self: Trainer, x0: Tensor, y: Tensor) -> None:
        if self.step == stop:
            raise KeyboardInterrupt
        drawn = float(torch.randn(())) + np.random.standard_normal() + random.gauss(0, 1)
        update(self, x0 * (1 + 0.1 * drawn), y)

    monkeypatch.setattr(Trainer, "_update", drawing)
    options: dict[str, Any] = {"steps": 5, "checkpoint_every": 3}
    stop = -1
    whole = train(tiny(tmp_path / "whole", **options))
    stop = 4
    with pytest.raises(KeyboardInterrupt):
        train(tiny(tmp_path / "run", **options))
    stop = -1
    run = train(tiny(tmp_path / "run", resume=True, **options))
    found, expected = tensors(run, 5), tensors(whole, 5)
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def test_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    """The manifest is written last, so all else may be there."""
    run = train(tiny(tmp_path / "run", steps=4))
    first, last = (run / "checkpoints" / f"step-0000000{step}" for step in (2, 4))
    assert weights.checkpoints(run) == [first, last]
    (last / "manifest.json").unlink()
    assert weights.checkpoints(run) == [first]
    assert newest_whole(run) == first
    assert problems(last) == [f"{last}/manifest.json: missing, so {last.name} was never finished"]


# ------------------------------------------------------------------ old checkpoints that stay


def test_checkpoint_that_cannot_be_renamed_is_told_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its name and all of its files. Once it can be removed it is, by the next checkpoint."""
    options: dict[str, Any] = {"checkpoint_every": 1, "keep_checkpoints": 1}
    rename = Path.rename

    def refused(self: Path, target: Any) -> Path:
        if self.name == "step-00000001":
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        with pytest.warns(UserWarning, match="not removed") as caught:
            run = train(tiny(tmp_path / "run", steps=3, **options))
    first = run / "checkpoints" / "step-00000001"
    told = [str(warning.message) for warning in caught]
    assert told == [f"{first}: not removed: [Errno 13] Permission denied: '{first}'"] * 2
    assert checkpoints(run) == ["step-00000001", "step-00000003"]
    for name in checkpoints(run):
        assert problems(run / "checkpoints" / name) == []
    train(tiny(run, steps=4, resume=True, **options))
    assert checkpoints(run) == ["step-00000004"]


def test_checkpoint_that_cannot_be_emptied_has_lost_its_name_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of it is no checkpoint, and the next start removes it."""
    options: dict[str, Any] = {"checkpoint_every": 1, "keep_checkpoints": 1}

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(
            39, "Directory not empty"
        )  # as of a network file system, where somebody reads in it

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refused)
        run = train(tiny(tmp_path / "run", steps=3, **options))
    left = [f".tmp-step-0000000{step}-removed" for step in (1, 2)]
    assert checkpoints(run) == [*left, "step-00000003"]
    train(tiny(run, steps=4, resume=True, **options))
    assert checkpoints(run) == ["step-00000004"]
