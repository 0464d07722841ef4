"""A resumed run is the run that never stopped, bit for bit."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdit.files import read_json, write_json
from fastdit.training import TrainConfig, plots, signals, train
from fastdit.training.loop import Trainer
from fastdit.training.metrics import read_metrics
from fastdit.training.signals import STOPPING

from .helpers import FORKS, checkpoints, declare_whole, record, tensors, tiny, write_images


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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From a folder of its own, with the images of `folder_of_images`."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "missing_packages", lambda: ["matplotlib"])
        return train(_exact(folder / "run", write_images(folder / "images")))


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


@FORKS
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


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_run_that_is_asked_to_stop_is_saved_after_the_step_under_way(
    name: str,
    folder_of_images: Path,
    tmp_path: Path,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first signal, here in the middle of the third step, loses nothing."""
    number = getattr(signal, name)
    config = _exact(tmp_path / "run", folder_of_images)
    update, steps = Trainer._update, []

    def interrupted_update(self: Trainer, x0: Tensor, y: Tensor) -> None:
        steps.append(self.step)
        if len(steps) == 3:
            signal.raise_signal(number)
        update(self, x0, y)

    monkeypatch.setattr(Trainer, "_update", interrupted_update)
    handlers = {each: signal.getsignal(each) for each in STOPPING}
    with pytest.raises(KeyboardInterrupt) if name == "SIGINT" else nullcontext():
        assert train(config) == tmp_path / "run"
    assert steps == [0, 1, 2]
    assert "stopped after step 3, which is saved" in capsys.readouterr().out
    assert checkpoints(tmp_path / "run")[-1] == "step-00000003"
    assert {each: signal.getsignal(each) for each in STOPPING} == handlers
    assert not (tmp_path / "run" / "run.lock").exists()
    train(_exact(tmp_path / "run", folder_of_images, resume=True))
    assert steps == list(range(config.steps))
    _assert_same_run(tmp_path / "run", uninterrupted, config.steps)


def test_a_repeated_request_is_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler signals every process, and torchrun hands its own on: within `ECHO`, as long as this clock stands."""
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: 0.0))
    update = Trainer._update

    def signalled(self: Trainer, x0: Tensor, y: Tensor) -> None:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        update(self, x0, y)

    monkeypatch.setattr(Trainer, "_update", signalled)
    train(tiny(tmp_path / "run"))
    assert checkpoints(tmp_path / "run") == ["step-00000001"]


def test_speed_after_a_resume_is_that_of_all_of_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within a log interval: the time before counts as its steps do."""
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    options: dict[str, Any] = {"steps": 8, "log_every": 8, "checkpoint_every": 6}
    _stopped_at(6, monkeypatch, tiny(tmp_path / "run", **options))
    state = read_json(tmp_path / "run" / "checkpoints" / "step-00000006" / "state.json")
    assert state["seconds_since_log"] > 0
    run = train(tiny(tmp_path / "run", resume=True, **options))
    (line,) = read_metrics(run / "metrics.jsonl")
    assert line["seconds"] > state["seconds_since_log"]
    assert line["images_per_second"] == pytest.approx(8 * 8 / line["seconds"])


def test_data_that_moved_is_the_same_data(folder_of_images: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"image_size": 8, "num_workers": 0}
    run = train(tiny(tmp_path / "run", data=str(folder_of_images), **options))
    moved = folder_of_images.rename(tmp_path / "elsewhere")
    train(tiny(run, data=str(moved), resume=True, steps=6, **options))
    whole = train(tiny(tmp_path / "whole", data=str(moved), steps=6, **options))
    _assert_same_run(run, whole, 6)


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
    # A checkpoint's name, and all of its files but the manifest.
    shutil.copytree(run / "checkpoints/step-00000002", run / "checkpoints/step-00000003")
    (run / "checkpoints/step-00000003/manifest.json").unlink()
    train(tiny(run, resume=True))
    left = ["damaged-step-00000003", "step-00000002", "step-00000004", "step-4"]
    assert checkpoints(run) == left
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


OPTIMIZER = "optimizer/shard-00001.safetensors"
RNG = "rng/rank-00000.safetensors"


def _edit(file: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        values = load_file(folder / file)
        change(values)
        save_file(values, folder / file)

    return damage


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint. Each test damages a copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "missing_packages", lambda: ["matplotlib"])
        return train(tiny(tmp_path_factory.mktemp("runs") / "run", steps=2))


INSIDE: list[tuple[Callable[[Path], object], str]] = [
    (
        _edit("model.safetensors", lambda v: v.pop("pos_embed")),
        r"model.safetensors: missing pos_embed",
    ),
    (
        _edit("ema.safetensors", lambda v: v.update(extra=torch.ones(1))),
        "ema.safetensors: unexpected extra",
    ),
    (
        _edit(OPTIMIZER, lambda v: v.pop("exp_avg.final_layer.linear.bias")),
        "optimizer: missing exp_avg.final_layer.linear.bias",
    ),
    (
        _edit(OPTIMIZER, lambda v: v.update({"exp_avg.pos_embed": torch.ones(1)})),
        "optimizer: unexpected exp_avg.pos_embed",
    ),
    (
        _edit(OPTIMIZER, lambda v: v.update({"exp_avg_sq.final_layer.linear.bias": torch.ones(3)})),
        r"exp_avg_sq.final_layer.linear.bias has shape \(3,\), the model's has \(32,\)",
    ),
    (_edit(RNG, lambda v: v.pop("run")), "rank-00000.safetensors: missing run"),
    (
        _edit(RNG, lambda v: v.update(cuda=v["cpu"].clone())),
        "rank-00000.safetensors: written on cuda, this run is on cpu",
    ),
    (lambda folder: (folder / "ema.safetensors").unlink(), "ema.safetensors: no such file"),
    (
        lambda folder: write_json(folder / "state.json", {"format": 1}),
        "state.json: format=1, expected 2",
    ),
    (
        lambda folder: write_json(folder / "state.json", []),
        r"state.json: format=\[\], expected 2",
    ),
]


@pytest.mark.parametrize(("damage", "message"), INSIDE, ids=[message for _, message in INSIDE])
def test_checkpoint_that_does_not_fit_is_named(
    damage: Callable[[Path], object], message: str, two_steps: Path, tmp_path: Path
) -> None:
    """Its files are what its manifest says, but they are not those of such a run."""
    run = tmp_path / "run"
    shutil.copytree(two_steps, run)
    folder = run / "checkpoints" / "step-00000002"
    damage(folder)
    declare_whole(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        train(tiny(run, resume=True))
    assert "\n" not in str(caught.value)


def _flip_a_bit(folder: Path, file: str) -> None:
    content = bytearray((folder / file).read_bytes())
    content[-1] ^= 1
    (folder / file).write_bytes(content)


DAMAGED: list[tuple[str, Callable[[Path], object], str]] = [
    *(
        (f"a bit of {file}", partial(_flip_a_bit, file=file), f"{file}: damaged, SHA-256")
        for file in ("model.safetensors", "ema.safetensors", OPTIMIZER, RNG, "state.json")
    ),
    (
        "truncated",
        lambda folder: os.truncate(folder / OPTIMIZER, 999),
        f"{OPTIMIZER}: truncated or changed, 999 bytes of",
    ),
    ("missing", lambda folder: (folder / RNG).unlink(), f"{RNG}: missing"),
    (
        "no manifest that can be read",
        lambda folder: (folder / "manifest.json").write_text("{"),
        "manifest.json: not valid JSON",
    ),
    (
        "another manifest",
        lambda folder: write_json(folder / "manifest.json", {"format": 7}),
        "manifest.json: damaged, or not a manifest of format 1",
    ),
]


@pytest.mark.parametrize(
    ("damage", "message"),
    [(damage, message) for _, damage, message in DAMAGED],
    ids=[name for name, _, _ in DAMAGED],
)
def test_damaged_checkpoint_is_an_error_where_there_is_no_other(
    damage: Callable[[Path], object], message: str, two_steps: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(two_steps, run)
    folder = run / "checkpoints" / "step-00000002"
    damage(folder)
    before = sorted(run.rglob("*")), read_metrics(run / "metrics.jsonl")
    with (
        pytest.warns(UserWarning, match=re.escape(message)),
        pytest.raises(ValueError, match=re.escape(message)) as caught,
    ):
        train(tiny(run, resume=True))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert (sorted(run.rglob("*")), read_metrics(run / "metrics.jsonl")) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [(damage, message) for name, damage, message in DAMAGED if name != "another manifest"],
    ids=[name for name, _, _ in DAMAGED if name != "another manifest"],
)
def test_damaged_checkpoint_is_passed_over_for_an_older_one(
    damage: Callable[[Path], object],
    message: str,
    whole_and_stopped: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    whole, stopped = whole_and_stopped
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    damage(run / "checkpoints" / "step-00000004")
    with pytest.warns(UserWarning, match=f"step-00000004 is damaged.*{re.escape(message)}"):
        train(tiny(run, steps=6, resume=True))
    _assert_same_run(run, whole, 6)


@pytest.fixture(scope="module")
def whole_and_stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of six steps, and one that was asked to stop after the fourth."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "missing_packages", lambda: ["matplotlib"])
        whole = train(tiny(folder / "whole", steps=6))
        patch.setattr(Trainer, "_agreed_to_stop", lambda trainer: trainer.step == 4)
        stopped = train(tiny(folder / "stopped", steps=6))
    assert checkpoints(stopped) == ["step-00000002", "step-00000004"]
    return whole, stopped


def test_auto_resume_begins_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_and_stopped: tuple[Path, Path]
) -> None:
    whole, _ = whole_and_stopped
    config = tiny(tmp_path / "run", steps=6, auto_resume=True)
    _stopped_at(1, monkeypatch, config)  # before there is a checkpoint
    _stopped_at(5, monkeypatch, config)
    run = train(config)
    _assert_same_run(run, whole, 6)
    assert read_json(run / "config.json")["auto_resume"] is False
    before = record(run, 6)
    assert train(config) == run
    assert record(run, 6) == before
    with pytest.raises(ValueError, match="hidden_size 32 -> 64"):
        train(tiny(run, steps=6, auto_resume=True, hidden_size=64))
