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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import files

HEARTBEAT = 60.0  # seconds between two signs of life
DEAD_AFTER = 15 * HEARTBEAT  # without one, for a process of another host


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds `folder`/run.lock/holder.json, {"host", "pid", "started", "since"}, while the body runs.

    A lock whose process is gone is taken over with a warning: of this host, where no process has its number, or the one
    that has it started at another time; of another host, where there was no sign of life for 15 minutes (a thread
    touches the file every minute).

    Raises FileExistsError naming the holder where there is one, and OSError where the folder cannot be written.
    """
    lock = folder / "run.lock"
    own = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    while not _acquired(lock, own):
        _remove_if_stale(lock)
    over = threading.Event()
    alive = threading.Thread(target=_keep_alive, args=(lock, over), daemon=True)
    alive.start()
    try:
        yield
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
    warnings.warn(f"{lock}: {_who(holder)} is no more; the run is taken over", stacklevel=4)
    taken = _renamed(lock)
    if taken is None:
        return
    if _read(taken) != holder:  # somebody else took it over first
        taken.rename(lock)
        return
    shutil.rmtree(taken, ignore_errors=True)


def _who(holder: dict[str, Any]) -> str:
    return "process {pid} on {host} (since {since})".format(**holder)


def _held(lock: Path, holder: dict[str, Any]) -> FileExistsError:
    return FileExistsError(
        f"out={str(lock.parent)!r}: {_who(holder)} trains in it; where that process is no more, remove {lock}"
    )


def _alive(lock: Path, holder: dict[str, Any]) -> bool:
    if holder["host"] == socket.gethostname():
        return bool(holder["started"] == _started(holder["pid"]))
    try:
        return time.time() - (lock / "holder.json").stat().st_mtime < DEAD_AFTER
    except FileNotFoundError:
        return False


def _started(pid: int) -> str | None:
    """When a process of this host started, in a form that no other process of the same number has; None without it."""
    try:
        # The name in parentheses may hold spaces. The start time is field 22, the boot makes it unique.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] in ("Z", "X"):  # ended, and only its parent has not noticed
            return None
        return fields[19] + " " + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
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
    if not isinstance(record, dict) or {"host", "pid", "started", "since"} - record.keys():
        raise FileExistsError(
            f"{file}: not a lock; where nobody trains in {lock.parent}, remove {lock}"
        )
    return record


def _keep_alive(lock: Path, over: threading.Event) -> None:
    while not over.wait(HEARTBEAT):
        try:
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
