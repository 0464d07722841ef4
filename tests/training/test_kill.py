"""Runs that are killed, stopped, or whose disk is full: what is on the disk stays whole, and the end is the same."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastdit.weights.manifest import problems

from . import processes
from .processes import Runs, Server, assert_same_run, folder_of, metrics, saved, steps_saved

SAVED = {"kind": "saves at once"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with processes.served() as server:
        yield server


@pytest.fixture
def runs(server: Server, tmp_path: Path) -> Runs:
    return Runs(server, tmp_path)


@pytest.fixture(scope="module")
def kept(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Holds `undisturbed`: 8 steps, with checkpoints at 2, 4, 6 and 8."""
    runs = Runs(server, tmp_path_factory.mktemp("kept"))
    runs.finish("undisturbed", keep_checkpoints=None)
    return runs


@pytest.fixture
def undisturbed(kept: Runs) -> Path:
    return kept.folder / "undisturbed"


def killed(runs: Runs, point: str, step: int, **options: Any) -> Path:
    faults = [SAVED, {"kind": "at", "point": point, "step": step}]
    (child,) = runs.run("run", faults=faults, **options)
    assert child.status == -signal.SIGKILL, child.said
    return runs.folder / "run"


def assert_resumed(runs: Runs, kept: Runs, **options: Any) -> None:
    run = runs.finish("run", resume=True, **options)
    assert_same_run(run, kept.folder / "undisturbed", 8)
    assert runs.order("run") == kept.order("undisturbed")
    assert [path.name for path in run.iterdir() if path.name.startswith(".tmp-")] == []
    assert [name for name in saved(run) if not name.startswith("step-")] == []
    assert problems(folder_of(run, 8)) == []


# ------------------------------------------------------------------ killed


@pytest.mark.parametrize(
    "step", [pytest.param(s, marks=() if s in (1, 6) else pytest.mark.slow) for s in range(1, 9)]
)
def test_killed_in_a_step(step: int, runs: Runs, kept: Runs) -> None:
    killed(runs, "update", step)
    assert_resumed(runs, kept)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_any_moment(seed: int, runs: Runs, kept: Runs) -> None:
    """From outside, three times, wherever it is by then; `auto_resume` is the command of every start."""
    pause = random.Random(seed)
    for _ in range(3):
        (child,) = runs.start("run", auto_resume=True)
        time.sleep(pause.uniform(0.1, 1.0))
        child.kill()
        child.wait()
    runs.finish("run", auto_resume=True)
    assert_same_run(runs.folder / "run", kept.folder / "undisturbed", 8)


# What is left of the checkpoint of step 4, the second: whether it is whole, and whether the first is there still.
POINTS = {
    "before the folder": ([2], True),
    "empty folder": ([2], True),
    "first file": ([2], True),
    "half of the moments": ([2], False),
    "half of the weights": ([2], True),
    "random generators": ([2], True),
    "all files": ([2], True),
    "half of the manifest": ([2], False),
    "before the rename": ([2], False),
    "after the rename": ([2, 4], True),
}


@pytest.mark.parametrize(
    "point",
    [pytest.param(point, marks=pytest.mark.slow if POINTS[point][1] else ()) for point in POINTS],
)
def test_killed_while_saving(point: str, runs: Runs, kept: Runs) -> None:
    run = killed(runs, point, 4, keep_checkpoints=1)
    assert steps_saved(run) == POINTS[point][0]
    for step in steps_saved(run):
        assert problems(folder_of(run, step)) == []
    assert_resumed(runs, kept, keep_checkpoints=1)
    assert steps_saved(run) == [8]


@pytest.mark.parametrize(
    "point", [pytest.param("removal", marks=pytest.mark.slow), "removal begun"]
)
def test_killed_while_removing(point: str, runs: Runs, kept: Runs) -> None:
    run = killed(runs, point, 2, keep_checkpoints=1)
    assert steps_saved(run) == [4]
    assert problems(folder_of(run, 4)) == []
    assert_resumed(runs, kept, keep_checkpoints=1)
    assert steps_saved(run) == [8]


def test_killed_before_there_is_a_configuration(runs: Runs, kept: Runs) -> None:
    """One command for every start: it may not need somebody who removes a folder."""
    run = killed(runs, "config.json", 0, auto_resume=True)
    assert not (run / "config.json").exists()
    runs.finish("run", auto_resume=True)
    assert_same_run(run, kept.folder / "undisturbed", 8)


@pytest.mark.parametrize(
    ("batch_size", "steps"),
    [
        (256, (3, 5)),  # twice in an epoch of seven steps
        pytest.param(512, (3, 4), marks=pytest.mark.slow),  # in the last of an epoch, and in the first of the next
    ],
)  # fmt: skip
def test_killed_twice(batch_size: int, steps: tuple[int, int], runs: Runs) -> None:
    options = {"batch_size": batch_size, "checkpoint_every": 1}
    whole = runs.finish("whole", **options)
    first, second = steps
    killed(runs, "update", first, **options)
    killed(runs, "update", second, resume=True, **options)
    run = runs.finish("run", resume=True, **options)
    assert_same_run(run, whole, 8)
    assert runs.order("run") == runs.order("whole")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_resumed_with_other_workers(workers: int, runs: Runs, kept: Runs) -> None:
    killed(runs, "update", 6, num_workers=workers)
    assert_resumed(runs, kept)


FORGOTTEN = ["average", "moments", "number of steps", "random state", "order of the data",
             "learning rate", "sums since the last line"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", FORGOTTEN)
def test_what_is_forgotten_is_noticed(what: str, runs: Runs, undisturbed: Path) -> None:
    """These tests compare enough: a resume that leaves one thing out does not pass them."""
    killed(runs, "update", 6)
    run = runs.finish("run", resume=True, faults=[{"kind": "forgets", "what": what}])
    with pytest.raises(AssertionError):
        assert_same_run(run, undisturbed, 8)


# ------------------------------------------------------------------ asked to stop


@pytest.mark.parametrize(
    ("point", "step"), [("update", 3), ("first file", 4), pytest.param("all files", 4, marks=pytest.mark.slow)]
)  # fmt: skip
def test_asked_to_stop(point: str, step: int, runs: Runs, kept: Runs) -> None:
    """In a step, or while a checkpoint is being written: it is whole, the last step is saved, the status is 0."""
    fault = {"kind": "at", "point": point, "step": step, "do": "term"}
    (child,) = runs.run("run", faults=[fault])
    assert child.status == 0, child.said
    run = runs.folder / "run"
    last = steps_saved(run)[-1]
    assert last >= step
    assert f"stopped after step {last}, which is saved" in child.said or last == 8
    assert all(problems(folder_of(run, step)) == [] for step in steps_saved(run))
    assert not (run / "run.lock").exists()
    assert_resumed(runs, kept)


def test_asked_to_stop_at_once(runs: Runs, kept: Runs) -> None:
    """A second signal while a checkpoint is written: nothing half-written is taken for one."""
    faults = [
        {"kind": "patient"},
        {"kind": "at", "point": "first file", "step": 4, "do": "term"},
        {"kind": "at", "point": "random generators", "step": 4, "do": "usr1"},
    ]
    (child,) = runs.run("run", faults=faults)
    assert child.status in (-signal.SIGTERM, -signal.SIGUSR1), child.said  # whichever is seen last
    run = runs.folder / "run"
    assert steps_saved(run)[0] == 2
    assert all(problems(folder_of(run, step)) == [] for step in steps_saved(run))
    assert_resumed(runs, kept)


# ------------------------------------------------------------------ damaged


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": _flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage: str, undisturbed: Path, tmp_path: Path) -> None:
    """Of every file of a checkpoint."""
    import shutil

    from fastdit.training.checkpoint import newest_whole

    names = [
        path.relative_to(folder_of(undisturbed, 8))
        for path in folder_of(undisturbed, 8).rglob("*")
        if path.is_file()
    ]
    assert len(names) == 8
    run = tmp_path / "copy"
    for name in names:
        shutil.copytree(folder_of(undisturbed, 6), folder_of(run, 6))
        shutil.copytree(folder_of(undisturbed, 8), folder_of(run, 8))
        DAMAGE[damage](folder_of(run, 8) / name)
        (wrong, *_) = problems(folder_of(run, 8))
        # Where the middle of the manifest says something else now, that file is what does not fit.
        assert wrong.startswith(str(folder_of(run, 8)))
        if name.name != "manifest.json":
            assert str(name) in wrong
        if (damage, name.name) == ("missing", "manifest.json"):
            assert newest_whole(run) == folder_of(run, 6)
        else:
            with pytest.warns(UserWarning, match="step-00000008 is damaged and passed over"):
                assert newest_whole(run) == folder_of(run, 6)
        shutil.rmtree(run)


@pytest.mark.parametrize("keep", [None, 1])
def test_damaged_checkpoint_is_passed_over(keep: int | None, runs: Runs, kept: Runs) -> None:
    """The run goes on from the one before, through the step of the damaged one again, to the same end."""
    run = killed(runs, "update", 7)
    assert steps_saved(run) == [2, 4, 6]
    _flip(folder_of(run, 6) / "ema.safetensors")
    (child,) = runs.run("run", resume=True, keep_checkpoints=keep)
    assert "step-00000006 is damaged and passed over" in child.said
    assert child.status == 0, child.said
    assert_same_run(run, kept.folder / "undisturbed", 8)
    for step in steps_saved(run):
        assert problems(folder_of(run, step)) == [], "is counted among those that are kept"


def test_damaged_checkpoint_takes_no_place(runs: Runs) -> None:
    """What is kept is the newest whole one: a damaged one of a later step does not outlive it."""
    run = killed(runs, "update", 7, keep_checkpoints=2)
    _flip(folder_of(run, 6) / "ema.safetensors")
    fault = {"kind": "at", "point": "update", "step": 6}
    options = {"keep_checkpoints": 1, "checkpoint_every": 1, "resume": True}
    (child,) = runs.run("run", faults=[SAVED, fault], **options)
    assert child.status == -signal.SIGKILL, child.said
    assert 5 in steps_saved(run)
    assert problems(folder_of(run, 5)) == []


def test_all_are_damaged(runs: Runs) -> None:
    run = killed(runs, "update", 5)
    for step in steps_saved(run):
        _flip(folder_of(run, step) / "model.safetensors")
    (child,) = runs.run("run", auto_resume=True)
    assert child.status == 1
    assert "model.safetensors: damaged, SHA-256" in child.said
    assert steps_saved(run) == [2, 4]


# ------------------------------------------------------------------ no space

LIMIT = 100 * 2**10  # smaller than the weights of the tiny model, larger than what else is written


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on the size of files")
@pytest.mark.parametrize("on_save_error", ["error", "warn"])
def test_file_that_cannot_be_written_whole(on_save_error: str, runs: Runs) -> None:
    fault = {"kind": "largest", "step": 4, "size": LIMIT}
    (child,) = runs.run("run", faults=[fault], on_save_error=on_save_error)
    run = runs.folder / "run"
    assert saved(run) == ["step-00000002"]
    assert problems(folder_of(run, 2)) == []
    assert "File too large" in child.said
    assert "step-00000004" in child.said, "the error does not say what could not be written"
    if on_save_error == "error":
        assert child.status == 1
        assert metrics(run)[-1]["step"] < 8
    else:
        assert "NOT SAVED, the run goes on" in child.said
        assert metrics(run)[-1]["step"] == 8


@pytest.mark.parametrize("on_save_error", ["error", "warn"])
def test_too_little_space_is_seen_before(on_save_error: str, runs: Runs) -> None:
    fault = {"kind": "full", "step": 4}
    (child,) = runs.run("run", faults=[fault], on_save_error=on_save_error)
    run = runs.folder / "run"
    assert saved(run) == ["step-00000002"]
    assert "No space left writing" in child.said
    assert "step-00000004: need" in child.said
    assert child.status == (1 if on_save_error == "error" else child.status)
    if on_save_error == "warn":
        assert "NOT SAVED, the run goes on" in child.said
        assert metrics(run)[-1]["step"] == 8


def test_last_checkpoint_that_cannot_be_written_is_an_error(runs: Runs) -> None:
    """There is nothing that could go on, and the status must not say that the run is done."""
    (child,) = runs.run("run", faults=[{"kind": "full", "step": 8}], on_save_error="warn")
    assert child.status == 1, child.said


def test_stop_that_could_not_be_saved_does_not_say_that_it_is(runs: Runs) -> None:
    faults = [
        {"kind": "full", "step": 5},
        {"kind": "at", "point": "update", "step": 5, "do": "term"},
    ]
    (child,) = runs.run("run", faults=faults, on_save_error="warn")
    assert "No space left" in child.said
    assert "which is saved" not in child.said


@pytest.mark.parametrize("what", ["OSError", "Error while serializing: No space left on device"])
def test_disk_that_is_full_while_writing(what: str, runs: Runs) -> None:
    faults = [{"kind": "no space", "step": 4, "what": what}]
    (child,) = runs.run("run", faults=faults, on_save_error="warn", keep_checkpoints=None)
    assert child.status == 0, child.said
    assert steps_saved(runs.folder / "run") == [2, 6, 8]
    assert "No space left writing" in child.said


# ------------------------------------------------------------------ folders


def test_folders_that_can_be_written(runs: Runs, undisturbed: Path) -> None:
    out = runs.folder / "missing parent" / "läuft, 🙂" / "run"
    runs.finish("spaces", out=str(out))
    assert_same_run(out, undisturbed, 8)
    (child,) = runs.run("relative", out=os.path.relpath(runs.folder / "there", processes.ROOT))
    assert child.status == 0, child.said
    assert_same_run(runs.folder / "there", undisturbed, 8)


def _file(folder: Path) -> Path:
    (folder / "file").write_text("x")
    return folder / "file"


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (_file, r"out='{}': expected a folder, this is a file"),
        (lambda folder: _file(folder) / "run", "{}"),
        pytest.param(
            lambda _: Path("/proc/run"),
            "{}",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="no folder that root cannot write"),
        ),
    ],
    ids=["file", "below a file", "cannot be written"],
)  # fmt: skip
def test_folders_that_cannot_be_written(
    out: Callable[[Path], Path], message: str, runs: Runs
) -> None:
    """An error that names the folder, before the first step and not at the first checkpoint."""
    folder = out(runs.folder)
    (child,) = runs.run("run", out=str(folder))
    assert child.status == 1
    assert message.format(folder) in child.said.splitlines()[-1], child.said
    assert not list(runs.folder.glob("*.trace"))


# ------------------------------------------------------------------ what is not finite


@pytest.mark.parametrize(("step", "killed_in"), [(3, 6), (4, 5)])
def test_step_that_was_not_finite_is_counted_across_a_kill(
    step: int, killed_in: int, runs: Runs
) -> None:
    """Step 4 is the one that is saved: the host would read of it only in the next, which is not done."""
    fault: dict[str, Any] = {"kind": "nan", "steps": [step]}
    whole = runs.finish("whole", faults=[fault])
    kill = {"kind": "at", "point": "update", "step": killed_in}
    (child,) = runs.run("run", faults=[SAVED, fault, kill])
    assert child.status == -signal.SIGKILL
    run = runs.finish("run", resume=True)
    records = [
        [json.loads(line) for line in (each / "not_finite.jsonl").read_text().splitlines()]
        for each in (run, whole)
    ]
    assert [record["step"] for record in records[1]] == [step]
    assert records[0] == records[1]
    assert_same_run(run, whole, 8)


def test_too_many_in_a_row_across_a_kill(runs: Runs) -> None:
    """Three of them, around a checkpoint at step 4 and a kill."""
    fault: dict[str, Any] = {"kind": "nan", "steps": [3, 4, 5]}
    kill = {"kind": "at", "point": "update", "step": 5}
    (child,) = runs.run("run", faults=[SAVED, fault, kill], nonfinite_steps=3)
    assert child.status == -signal.SIGKILL, child.said
    (child,) = runs.run("run", faults=[fault], nonfinite_steps=3, resume=True)
    assert child.status == 1, child.said
    assert "FloatingPointError: step 5" in child.said
