"""A resumed run is the run that never stopped, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdit.files import read_json, write_json
from fastdit.training import TrainConfig, train
from fastdit.training.loop import Trainer
from fastdit.training.metrics import read_metrics

from .helpers import checkpoints, record, tensors, tiny


def _exact(out: Path, data: Path, **changes: Any) -> TrainConfig:
    """A run in which everything that can be forgotten is at work: three steps an epoch, flips, label dropout, warm-up,
    cosine, weight decay, clipping, and log intervals that checkpoints cut in two.
    """
    options: dict[str, Any] = {
        "data": str(data),
        "image_size": 8,
        "batch_size": 6,
        "steps": 20,
        "class_dropout_prob": 0.4,
        "warmup_steps": 5,
        "lr_schedule": "cosine",
        "weight_decay": 0.1,
        "gradient_clip": 0.5,
        "log_every": 4,
        "checkpoint_every": 10,
        "num_workers": 0,
    }
    return tiny(out, **(options | changes))


def _stopped_at(step: int, monkeypatch: pytest.MonkeyPatch, config: TrainConfig) -> None:
    """Trains until the update after `step` is interrupted."""
    original = Trainer._update

    def update(trainer: Trainer, x0: Tensor, y: Tensor) -> None:
        if trainer.step == step:
            raise KeyboardInterrupt
        original(trainer, x0, y)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", update)
        with pytest.raises(KeyboardInterrupt):
            train(config)


def _assert_same_run(found: Path, expected: Path, step: int) -> None:
    values, reference = tensors(found, step), tensors(expected, step)
    assert values.keys() == reference.keys()
    differing = [name for name in values if not torch.equal(values[name], reference[name])]
    assert differing == []
    assert record(found, step) == record(expected, step)


@pytest.fixture
def uninterrupted(folder_of_images: Path, tmp_path: Path) -> Path:
    return train(_exact(tmp_path / "uninterrupted", folder_of_images))


@pytest.mark.parametrize(
    ("saved", "stopped"),
    [
        (10, 13),  # in the middle of an epoch
        (9, 9),  # between two epochs
        (7, 20),  # 7, then again at 14
    ],
)
def test_resumed_run_is_the_uninterrupted_one(
    saved: int,
    stopped: int,
    uninterrupted: Path,
    folder_of_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = _exact(tmp_path / "run", folder_of_images, checkpoint_every=saved)
    _stopped_at(min(stopped, 19), monkeypatch, config)
    torch.manual_seed(123)  # what the process drew meanwhile has no say
    run = train(_exact(tmp_path / "run", folder_of_images, checkpoint_every=saved, resume=True))
    _assert_same_run(run, uninterrupted, 20)


def test_run_resumed_twice_with_other_numbers_of_workers(
    uninterrupted: Path, folder_of_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"checkpoint_every": 4}
    _stopped_at(5, monkeypatch, _exact(tmp_path / "run", folder_of_images, **options))
    options["resume"] = True
    second = _exact(tmp_path / "run", folder_of_images, num_workers=1, **options)
    _stopped_at(9, monkeypatch, second)
    run = train(_exact(tmp_path / "run", folder_of_images, **options))
    _assert_same_run(run, uninterrupted, 20)


def test_two_times_ten_steps_are_twenty(folder_of_images: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr_schedule": "constant"}
    whole = train(_exact(tmp_path / "whole", folder_of_images, **options))
    train(_exact(tmp_path / "run", folder_of_images, steps=10, **options))
    run = train(_exact(tmp_path / "run", folder_of_images, resume=True, **options))
    values, reference = tensors(run, 20), tensors(whole, 20)
    assert all(torch.equal(values[name], reference[name]) for name in reference)
    assert read_json(run / "config.json") == read_json(whole / "config.json") | {"out": str(run)}


def test_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "run"))
    before, names = record(run, 4), checkpoints(run)
    assert train(tiny(tmp_path / "run", resume=True)) == run
    assert (record(run, 4), checkpoints(run)) == (before, names)


def test_interrupted_run_is_saved_after_the_step_under_way(
    folder_of_images: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first Ctrl-C, here in the middle of the third step, loses nothing."""
    config = _exact(tmp_path / "run", folder_of_images)
    update, steps = Trainer._update, []

    def interrupted_update(self: Trainer, x0: Tensor, y: Tensor) -> None:
        steps.append(self.step)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        update(self, x0, y)

    monkeypatch.setattr(Trainer, "_update", interrupted_update)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert steps == [0, 1, 2]
    assert checkpoints(tmp_path / "run")[-1] == "step-00000003"
    assert signal.getsignal(signal.SIGINT) is handler
    train(_exact(tmp_path / "run", folder_of_images, resume=True))
    assert steps == list(range(config.steps))
    _assert_same_run(tmp_path / "run", uninterrupted, config.steps)


def test_second_interrupt_acts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def update(self: Trainer, x0: Tensor, y: Tensor) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(Trainer, "_update", update)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(tmp_path / "run"))
    assert checkpoints(tmp_path / "run") == []


def test_run_that_is_further_than_asked_for(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", steps=4))
    stored = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(ValueError, match=r"steps=3: the run in .* is at step 4"):
        train(tiny(tmp_path / "run", steps=3, resume=True))
    assert (tmp_path / "run" / "config.json").read_text() == stored


def test_fine_tuning_is_resumed_without_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = train(tiny(tmp_path / "source", seed=1))
    whole = train(tiny(tmp_path / "whole", init_from=str(source)))
    _stopped_at(3, monkeypatch, tiny(tmp_path / "run", init_from=str(source)))
    shutil.rmtree(source)
    run = train(tiny(tmp_path / "run", init_from=str(source), resume=True))
    _assert_same_run(run, whole, 4)


def test_run_without_checkpoint_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(tiny(tmp_path / "whole"))
    _stopped_at(1, monkeypatch, tiny(tmp_path / "run"))
    run = train(tiny(tmp_path / "run", resume=True))
    assert "no checkpoint yet: the run begins at step 0" in capsys.readouterr().out
    _assert_same_run(run, whole, 4)


def test_unfinished_line_and_left_over_folders_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tiny(tmp_path / "whole"))
    _stopped_at(3, monkeypatch, tiny(tmp_path / "run"))
    run = tmp_path / "run"
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    (run / "checkpoints" / ".tmp-step-00000004-1-00").mkdir()
    (run / "checkpoints" / "step-4").mkdir()  # not a checkpoint's name
    train(tiny(run, resume=True))
    assert checkpoints(run) == ["step-00000002", "step-00000004", "step-4"]
    _assert_same_run(run, whole, 4)


# ------------------------------------------------------------------ what may change, and what not


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "resume: hidden_size 32 -> 64: model and data"),
        ({"depth": 3, "seed": 1}, "resume: depth 2 -> 3, seed 0 -> 1"),
        ({"conditioning": "adaln"}, "conditioning 'adaln_zero' -> 'adaln'"),
        ({"batch_size": 16}, "batch_size 8 -> 16"),
        ({"data": "images"}, "data 'digits' -> '.*/images'"),
        ({"noise_schedule": "squaredcos_cap_v2"}, "noise_schedule 'linear' -> 'squaredcos_cap_v2'"),
    ],
)
def test_model_and_data_cannot_change(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = train(tiny(tmp_path / "run"))
    before = read_json(run / "config.json"), record(run, 4)
    with pytest.raises(ValueError, match=message):
        train(tiny(run, resume=True, steps=8, **changes))
    assert (read_json(run / "config.json"), record(run, 4)) == before


def test_what_may_change_is_told_and_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tiny(tmp_path / "run"))
    capsys.readouterr()
    changed = tiny(run, resume=True, steps=6, lr=1e-3, weight_decay=0.1)
    train(changed)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Changed")]
    assert said == [
        "Changed since the run was begun: steps 4 -> 6",
        "Changed since the run was begun: lr 0.01 -> 0.001",
        "Changed since the run was begun: weight_decay 0.0 -> 0.1",
    ]
    rates = [line["learning_rate"] for line in read_metrics(run / "metrics.jsonl")]
    assert rates == [1e-2] * 4 + [1e-3] * 2
    stored = read_json(run / "config.json")
    assert stored == changed.to_dict() | {"resume": False}


def test_classes_cannot_change(folder_of_images: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": str(folder_of_images), "image_size": 8, "num_workers": 0}
    run = train(tiny(tmp_path / "run", **options))
    resumed = tiny(run, resume=True, steps=6, **options)

    (folder_of_images / "bee").rename(folder_of_images / "wasp")
    with pytest.raises(ValueError, match="missing 'bee'; extra 'wasp'"):
        train(resumed)
    (folder_of_images / "wasp").rename(folder_of_images / "bee")

    (folder_of_images / "ant" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"has 19 images, the run in .* was begun with 20"):
        train(resumed)
    assert checkpoints(run) == ["step-00000002", "step-00000004"]


# ------------------------------------------------------------------ damaged checkpoints


def _edit(file: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        values = load_file(folder / file)
        change(values)
        save_file(values, folder / file)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _edit("model.safetensors", lambda v: v.pop("pos_embed")),
            r"model.safetensors: missing pos_embed",
        ),
        (
            _edit("ema.safetensors", lambda v: v.update(extra=torch.ones(1))),
            "ema.safetensors: unexpected extra",
        ),
        (
            _edit("optimizer.safetensors", lambda v: v.pop("exp_avg.final_layer.linear.bias")),
            "optimizer.safetensors: missing exp_avg.final_layer.linear.bias",
        ),
        (
            _edit("optimizer.safetensors", lambda v: v.update({"exp_avg.pos_embed": torch.ones(1)})),
            "optimizer.safetensors: unexpected exp_avg.pos_embed",
        ),
        (
            _edit(
                "optimizer.safetensors",
                lambda v: v.update({"exp_avg_sq.final_layer.linear.bias": torch.ones(3)}),
            ),
            r"exp_avg_sq.final_layer.linear.bias has shape \(3,\), the model's has \(32,\)",
        ),
        (
            _edit("rng.safetensors", lambda v: v.pop("run")),
            "rng.safetensors: missing run",
        ),
        (
            _edit("rng.safetensors", lambda v: v.update(cuda=v["cpu"].clone())),
            "rng.safetensors: written on cuda, this run is on cpu",
        ),
        (lambda folder: (folder / "ema.safetensors").unlink(), "ema.safetensors: no such file"),
        (lambda folder: os.truncate(folder / "optimizer.safetensors", 999), "truncated"),
        (
            lambda folder: write_json(folder / "state.json", {"format": 2}),
            "state.json: format=2, expected 1",
        ),
        (
            lambda folder: write_json(folder / "state.json", []),
            r"state.json: format=\[\], expected 1",
        ),
    ],
)  # fmt: skip
def test_damaged_checkpoint_is_named(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    run = train(tiny(tmp_path / "run", steps=2))
    damage(run / "checkpoints" / "step-00000002")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        train(tiny(run, resume=True))
    assert "\n" not in str(caught.value)


# A run that saves at steps 2 and 4, killed at a point of the second save, or when the first is removed after it.
KILLED = """
import os, shutil, sys
from pathlib import Path
from fastdit import files
from fastdit.training import TrainConfig, checkpoint, train

point, config = sys.argv[1:]
saves = 0
save_weights, rename, rmtree = checkpoint.save_weights, os.rename, shutil.rmtree

def save(model, path):
    global saves
    saves += 1
    save_weights(model, path)
    if point == "files" and saves == 4 + 3:
        os.truncate(path, 100)
        os._exit(137)

def renamed(source, target):
    if point == "rename" and Path(target).name == "step-00000004":
        os._exit(137)
    rename(source, target)

def removed(path, **options):
    if point == "removal" and "step-00000002" in Path(path).name:
        os.unlink(Path(path) / "ema.safetensors")
        os._exit(137)
    rmtree(path, **options)

checkpoint.save_weights, os.rename, shutil.rmtree = save, renamed, removed
train(TrainConfig.from_json(config))
"""


def test_killed_while_saving_or_removing(folder_of_images: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 6, "keep_checkpoints": 1, "num_workers": 0}
    options |= {"data": str(folder_of_images), "image_size": 8}
    expected = train(tiny(tmp_path / "whole", **options))
    left = {
        "files": ["step-00000002"],
        "rename": ["step-00000002"],
        "removal": ["step-00000004"],
    }
    processes = {}
    for point in left:
        config = tiny(tmp_path / point, **options)
        write_json(tmp_path / f"{point}.json", config.to_dict())
        arguments = [sys.executable, "-c", KILLED, point, str(tmp_path / f"{point}.json")]
        processes[point] = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    for point, process in processes.items():
        output, _ = process.communicate()
        assert process.returncode == 137, output
        names = checkpoints(tmp_path / point)
        assert [name for name in names if not name.startswith(".tmp-")] == left[point]
        assert len(names) == 2, names

        run = train(tiny(tmp_path / point, **options, resume=True))
        assert checkpoints(run) == ["step-00000006"]
        _assert_same_run(run, expected, 6)
