"""One writer per run folder."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from .. import files

HEARTBEAT = 10.0  # seconds between two signs of life
DEAD_AFTER = 12 * HEARTBEAT  # without one, for a process that cannot be looked at
PATIENCE = 100  # looks at a lock that says nothing, 10 ms apart


@contextmanager
def run_lock(folder: Path) -> Iterator[Callable[[], None]]:
    """Holds `folder`/run.lock/holder.json, {"host", "machine", "pid", "started", "since"}, while the body runs.

    A lock whose process is gone is taken over with a warning: of this machine (host, boot and container), where no
    process has its number, or the one that has it started at another time; of another, where there was no sign of life
    for two minutes (a thread touches the file every ten seconds). A process that is suspended gives none, and goes on
    without its lock: what this yields raises FileExistsError then.

    Raises FileExistsError naming the holder where there is one, and OSError where the folder cannot be written.
    """
    lock = folder / "run.lock"
    own = {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    for _ in range(PATIENCE):
        if _acquired(lock, own):
            break
        _remove_if_stale(lock)
        time.sleep(0.01)
    else:
        raise FileExistsError(f"{lock}: not a lock; where nobody trains in {folder}, remove it")
    over = threading.Event()
    alive = threading.Thread(target=_keep_alive, args=(lock, own, over), daemon=True)
    alive.start()
    try:
        yield partial(_require_held, lock, own)
    finally:
        over.set()
        alive.join()
        if _read(lock) == own and (released := _renamed(lock)) is not None:
            shutil.rmtree(released, ignore_errors=True)


def require_unlocked(folder: Path) -> None:
    """Raises FileExistsError naming the process that holds `folder`, where there is one."""
    lock = folder / "run.lock"
    if (holder := _read(lock)) is not None and _alive(lock, holder):
        raise _held(lock, holder)


def wait_for_the_dead(folder: Path) -> None:
    """Returns where `folder` is not locked, or by a process that can be looked at; else when it is, or gave no sign of
    life for long enough: as after a restart in another container or on another node."""
    lock, until = folder / "run.lock", time.monotonic() + DEAD_AFTER + 2 * HEARTBEAT
    while (holder := _read(lock)) is not None and not _is_here(holder) and _alive(lock, holder):
        if time.monotonic() > until:
            return
        time.sleep(1)


def _acquired(lock: Path, record: dict[str, Any]) -> bool:
    """A folder that holds something is never replaced by a rename, so the lock is there whole, and once."""
    own = _temporary(lock)
    own.mkdir()
    try:
        files.write_json(own / "holder.json", record)
        own.rename(lock)
        return True
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _remove_if_stale(lock: Path) -> None:
    """Raises FileExistsError where somebody holds it."""
    holder = _read(lock)
    if holder is None:
        return  # let go meanwhile
    if _alive(lock, holder):
        raise _held(lock, holder)
    # One at a time: who comes late would remove the lock of who took it over first.
    turn = lock.with_name(f".tmp-{lock.name}-taken-over")
    try:
        turn.mkdir()
    except FileExistsError:
        until = time.monotonic() + HEARTBEAT
        with suppress(FileNotFoundError):
            while time.time() - turn.stat().st_mtime < HEARTBEAT and time.monotonic() < until:
                time.sleep(0.01)
            turn.rmdir()  # of one that was killed in it
        return
    try:
        if _read(lock) != holder or (stale := _renamed(lock)) is None:
            return
        if _read(stale) != holder:  # this process stood still in between, and another was faster
            with suppress(OSError):
                stale.rename(lock)
            return
        warnings.warn(f"{lock}: {_who(holder)} is no more; the run is taken over", stacklevel=4)
        shutil.rmtree(stale, ignore_errors=True)
    finally:
        with suppress(FileNotFoundError):
            turn.rmdir()


def _who(holder: dict[str, Any]) -> str:
    return "process {pid} on {host} (since {since})".format(**holder)


def _held(lock: Path, holder: dict[str, Any]) -> FileExistsError:
    return FileExistsError(
        f"out={str(lock.parent)!r}: {_who(holder)} trains in it; where that process is no more, remove {lock}"
    )


def _alive(lock: Path, holder: dict[str, Any]) -> bool:
    if _is_here(holder):
        return bool(holder["started"] == _started(holder["pid"]))
    try:
        return time.time() - (lock / "holder.json").stat().st_mtime < DEAD_AFTER
    except FileNotFoundError:
        return False


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether its process would be seen from here."""
    return bool(holder["host"] == socket.gethostname() and holder["machine"] == _machine())


def _machine() -> str:
    """Names the boot of this machine and the container (pid namespace), where the system tells."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process of this machine started, which no other of the same number did then; None where there is none."""
    try:
        # The name in parentheses may hold spaces. The start time is field 22.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] in ("Z", "X"):  # ended, and only its parent has not noticed
            return None
        return fields[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
        return "running"
    except ProcessLookupError:
        return None
    except PermissionError:
        return "running"


def _read(lock: Path) -> dict[str, Any] | None:
    """Who holds it, or None where nobody does. Raises FileExistsError for what is not a lock."""
    file = lock / "holder.json"
    try:
        record = files.read_json(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise FileExistsError(
            f"{error}; where nobody trains in {lock.parent}, remove {lock}"
        ) from None
    if (
        not isinstance(record, dict)
        or {"host", "machine", "pid", "started", "since"} - record.keys()
    ):
        raise FileExistsError(
            f"{file}: not a lock; where nobody trains in {lock.parent}, remove {lock}"
        )
    return record


def _require_held(lock: Path, own: dict[str, Any]) -> None:
    if (holder := _read(lock)) is not None and holder != own:
        raise FileExistsError(
            f"out={str(lock.parent)!r}: {_who(holder)} took the run over while this process stood still"
        )


def _keep_alive(lock: Path, own: dict[str, Any], over: threading.Event) -> None:
    while not over.wait(HEARTBEAT):
        try:
            if _read(lock) == own:
                with suppress(FileNotFoundError):  # taken over since
                    os.utime(lock / "holder.json")
        except OSError as error:
            warnings.warn(f"{lock}: {error}", stacklevel=2)


def _renamed(lock: Path) -> Path | None:
    """The lock under another name, or None where it is not there."""
    other = _temporary(lock)
    try:
        return lock.rename(other)
    except FileNotFoundError:
        return None


def _temporary(lock: Path) -> Path:
    return lock.with_name(f".tmp-{lock.name}-{os.getpid()}-{secrets.token_hex(4)}")
