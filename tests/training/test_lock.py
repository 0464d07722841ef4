"""One writer per run folder, and locks of those that are no more."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdit.training import Trainer, train
from fastdit.training import lock as module
from fastdit.training.lock import DEAD_AFTER, require_unlocked, run_lock

from . import processes
from .helpers import tiny
from .processes import Runs, Server, steps_saved

# No process has it: numbers end at 2**22.
NO_PROCESS = 2**22 + 1


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with processes.served() as server:
        yield server


@pytest.fixture
def runs(server: Server, tmp_path: Path) -> Runs:
    return Runs(server, tmp_path)


def held_by(folder: Path, **changes: Any) -> Path:
    """Leaves a lock as this process would, but for the `changes`."""
    holder = folder / "run.lock" / "holder.json"
    with run_lock(folder):
        record = json.loads(holder.read_text())
    assert not holder.parent.exists()
    holder.parent.mkdir()
    holder.write_text(json.dumps(record | changes))
    return holder


# ------------------------------------------------------------------ in real processes


def test_second_run_names_the_first(runs: Runs) -> None:
    """While the first trains, and once it has ended."""
    (first,) = runs.start("run", steps=100_000, checkpoint_every=10)
    # Any: the first is removed when there are three others.
    while not list((runs.folder / "run").glob("checkpoints/step-*")):
        assert not first.ended(), first.said
        time.sleep(0.01)
    for options in ({"resume": True}, {"auto_resume": True}, {}):
        (second,) = runs.run("second", out=str(runs.folder / "run"), steps=100_000, **options)
        assert second.status == 1
        error = second.said.splitlines()[-1]
        assert error.startswith("FileExistsError: out=")
        assert f"process {first.pid} on {socket.gethostname()}" in error
        assert "trains in it" in error
    first.kill(signal.SIGTERM)
    assert first.wait() == 0, first.said
    run = runs.folder / "run"
    (step,) = steps_saved(run)[-1:]
    assert not (run / "run.lock").exists()
    options = {"steps": step + 2, "resume": True, "checkpoint_every": 10}
    (third,) = runs.run("run", **options)
    assert third.status == 0, third.said
    assert "taken over" not in third.said


def test_two_started_at_once(runs: Runs) -> None:
    """One of them trains; the other says that somebody does, or did."""
    children = runs.start("run", steps=40) + runs.start(
        "other", out=str(runs.folder / "run"), steps=40
    )
    statuses = [child.wait() for child in children]
    assert sorted(statuses) == [0, 1], children[0].said + children[1].said
    loser = children[statuses.index(1)].said.splitlines()[-1]
    assert (
        "trains in it" in loser
        or "another process has trained in it" in loser
        or "holds a run" in loser
    )
    assert steps_saved(runs.folder / "run")[-1] == 40


def test_lock_of_a_killed_process_is_taken_over(runs: Runs) -> None:
    fault = {"kind": "at", "point": "update", "step": 5}
    (child,) = runs.run("run", faults=[fault])
    assert child.status == -signal.SIGKILL
    assert (runs.folder / "run" / "run.lock" / "holder.json").exists()
    (again,) = runs.run("run", resume=True)
    assert again.status == 0, again.said
    assert f"process {child.pid} on {socket.gethostname()}" in again.said
    assert "is no more; the run is taken over" in again.said
    assert list((runs.folder / "run").glob("*run.lock*")) == []


# ------------------------------------------------------------------ in this one


def test_held_and_let_go(tmp_path: Path) -> None:
    require_unlocked(tmp_path)
    with run_lock(tmp_path):
        holder = json.loads((tmp_path / "run.lock" / "holder.json").read_text())
        assert (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid())
        with pytest.raises(FileExistsError, match=rf"process {os.getpid()} on .* trains in it"):
            require_unlocked(tmp_path)
        with pytest.raises(FileExistsError, match=r"trains in it; where .* remove .*run\.lock"):
            run_lock(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_let_go_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def pid_within(folder: Path) -> None:
    with run_lock(folder):
        holder = json.loads((folder / "run.lock" / "holder.json").read_text())
        assert holder["pid"] == os.getpid()


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": NO_PROCESS},
        {"started": "12 another boot"},  # this process' number was another one's
    ],
)
def test_stale_lock_of_this_host(changes: dict[str, Any], tmp_path: Path) -> None:
    held_by(tmp_path, **changes)
    require_unlocked(tmp_path)
    with pytest.warns(
        UserWarning, match=r"run\.lock: process .* is no more; the run is taken over"
    ):
        pid_within(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_lock_of_another_host(tmp_path: Path) -> None:
    """Its processes cannot be looked at: what counts is when it last showed a sign of life."""
    holder = held_by(tmp_path, host="elsewhere", pid=NO_PROCESS)
    with pytest.raises(FileExistsError, match="on elsewhere"):
        require_unlocked(tmp_path)
    with pytest.raises(FileExistsError, match="on elsewhere"):
        run_lock(tmp_path).__enter__()
    past = time.time() - DEAD_AFTER - 1
    os.utime(holder, (past, past))
    require_unlocked(tmp_path)
    with pytest.warns(UserWarning, match="on elsewhere .* is no more"), run_lock(tmp_path):
        assert holder.exists()
    assert list(tmp_path.iterdir()) == []


def test_holder_shows_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT", 0.01)
    with run_lock(tmp_path):
        holder = tmp_path / "run.lock" / "holder.json"
        os.utime(holder, (0, 0))
        while holder.stat().st_mtime == 0:
            time.sleep(0.001)


def test_lock_that_somebody_else_took_over_is_left_to_him(tmp_path: Path) -> None:
    """A process that stood still for longer than its heartbeat may, and goes on."""
    with run_lock(tmp_path):
        lock = tmp_path / "run.lock"
        lock.rename(tmp_path / "gone")
        other = held_by(tmp_path, host="elsewhere")
    assert other.exists(), "it was removed by one that did not hold it"


def test_process_that_stood_still_neither_writes_nor_holds_for_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its thread has no beat: one that has seen its own lock would touch the other's, or find none.
    monkeypatch.setattr(module, "HEARTBEAT", 1e6)
    with run_lock(tmp_path) as require_held:
        require_held()
        own = json.loads((tmp_path / "run.lock" / "holder.json").read_text())
        (tmp_path / "run.lock").rename(tmp_path / "gone")
        other = held_by(tmp_path, host="elsewhere")
        os.utime(other, (0, 0))
        with pytest.raises(FileExistsError, match=r"on elsewhere .* took the run over while"):
            require_held()
        over = iter([False, False, True])
        beats: Any = SimpleNamespace(wait=lambda _: next(over))
        module._keep_alive(tmp_path / "run.lock", own, beats)
        assert list(over) == []
        assert other.stat().st_mtime == 0, "the other's lock would never look abandoned"


def test_a_run_that_was_taken_over_is_not_saved(tmp_path: Path) -> None:
    trainer = Trainer(tiny(tmp_path / "run", steps=4), torch.device("cpu"))
    update = trainer._update

    def taken_over(x0: Any, y: Any) -> None:
        if trainer.step == 2:  # after the first checkpoint
            trainer.saver.join()
            (tmp_path / "run" / "run.lock").rename(tmp_path / "gone")
            held_by(tmp_path / "run", host="elsewhere")
        update(x0, y)

    trainer._update = taken_over  # type: ignore[method-assign]
    with pytest.raises(FileExistsError, match="took the run over"):
        trainer.run()
    assert steps_saved(tmp_path / "run") == [2]


def test_what_was_saved_while_waiting_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process of another node writes its last checkpoint, and lets go."""
    out = tmp_path / "run"
    train(tiny(out, steps=4))
    late, hidden = out / "checkpoints" / "step-00000004", tmp_path / "hidden"
    late.rename(hidden)
    held_by(out, host="elsewhere")

    def sleep(_: float) -> None:
        hidden.rename(late)
        shutil.rmtree(out / "run.lock")

    # Of this module alone: another thread that sleeps would have it happen too.
    monkeypatch.setattr(module, "time", SimpleNamespace(**vars(time) | {"sleep": sleep}))
    train(tiny(out, steps=6, auto_resume=True))
    assert steps_saved(out)[-1] == 6


def test_the_same_name_on_another_machine(tmp_path: Path) -> None:
    """Clones, and containers: the number of the process means nothing here."""
    holder = held_by(tmp_path, machine="another boot, another container", pid=NO_PROCESS)
    with pytest.raises(FileExistsError, match="trains in it"):
        require_unlocked(tmp_path)
    past = time.time() - DEAD_AFTER - 1
    os.utime(holder, (past, past))
    module.wait_for_the_dead(tmp_path)
    require_unlocked(tmp_path)


def test_waiting_for_a_process_that_cannot_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = held_by(tmp_path, host="elsewhere")
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            os.utime(holder, (0, 0))

    monkeypatch.setattr(module, "time", SimpleNamespace(**vars(time) | {"sleep": sleep}))
    module.wait_for_the_dead(tmp_path)
    assert len(waited) == 3
    with run_lock(tmp_path.joinpath("held").mkdir() or tmp_path / "held"):
        module.wait_for_the_dead(tmp_path / "held")  # of this machine: nothing to wait for
    assert len(waited) == 3


def test_what_is_no_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.lock").mkdir()
    (tmp_path / "run.lock" / "x").touch()
    monkeypatch.setattr(module, "PATIENCE", 3)
    with pytest.raises(FileExistsError, match=r"run\.lock: not a lock"):
        run_lock(tmp_path).__enter__()


def test_who_stands_still_while_taking_over_takes_nothing_from_who_was_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_by(tmp_path, pid=NO_PROCESS)
    renamed = module._renamed

    def slowly(lock: Path) -> Path | None:
        monkeypatch.setattr(module, "_renamed", renamed)
        shutil.rmtree(lock)
        held_by(tmp_path, host="elsewhere")
        (tmp_path / ".tmp-run.lock-taken-over").rmdir()  # the turn has run out
        return renamed(lock)

    monkeypatch.setattr(module, "_renamed", slowly)
    with pytest.raises(FileExistsError, match=r"on elsewhere .* trains in it"), run_lock(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_turn_of_one_that_was_killed_in_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be told from one that is at work, until it is old."""
    held_by(tmp_path, pid=NO_PROCESS)
    turn = tmp_path / ".tmp-run.lock-taken-over"
    turn.mkdir()
    age = module.HEARTBEAT - 0.2
    os.utime(turn, (time.time() - age, time.time() - age))
    monkeypatch.setattr(module, "PATIENCE", 3)
    with pytest.warns(UserWarning, match="the run is taken over"), run_lock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_lock_without_a_holder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run.lock").mkdir()
    with run_lock(tmp_path):
        assert (tmp_path / "run.lock" / "holder.json").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"host": "x"}'])
def test_lock_that_says_nothing(text: str, tmp_path: Path) -> None:
    """Of another version, or damaged: an error that names the file, which somebody can then remove."""
    (tmp_path / "run.lock").mkdir()
    (tmp_path / "run.lock" / "holder.json").write_text(text)
    with pytest.raises((ValueError, OSError), match=r"run\.lock"):
        require_unlocked(tmp_path)
    with pytest.raises((ValueError, OSError), match=r"run\.lock"):
        run_lock(tmp_path).__enter__()


def test_many_take_over_one_stale_lock(tmp_path: Path) -> None:
    """Threads here: they are told apart by what they see while they hold it."""
    import threading
    import warnings

    held_by(tmp_path, pid=NO_PROCESS)
    inside, most, errors = [], [], []

    def take() -> None:
        try:
            with run_lock(tmp_path):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.02)
                inside.pop()
        except FileExistsError:
            pass
        except OSError as error:
            errors.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert max(most) == 1
    assert list(tmp_path.iterdir()) == []
