"""Files and folders that are there whole or not at all.

Everything is written under a temporary name beside its target, brought to the disk (fsync), and renamed. A reader, and
a run that starts after a crash, sees the old file or the new one, never a part of it. What a killed process leaves
behind has a name that starts with `.tmp-`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]


@contextmanager
def atomic_file(path: PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`, with its suffix, for the caller to write; then it becomes `path`.

    The file gets the mode 0666 & ~umask, whatever the writer chose. A symbolic link is followed, so that its target is
    replaced and not the link. If the body raises, the temporary is removed and an earlier file stays as it was.

    Raises FileNotFoundError or NotADirectoryError without a parent folder, IsADirectoryError where `path` is a folder,
    FileExistsError where it is a device or a pipe, and OSError with ENOSPC naming `path` where the disk is full.
    """
    target = Path(os.path.realpath(path))
    _require_parent(path, target)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "Expected a file, this is a folder", str(path))
    if target.exists() and not target.is_file():
        raise FileExistsError(errno.EEXIST, "Only a regular file can be replaced", str(path))
    temporary = _temporary_beside(target, target.suffix)
    with _full_disk_named(path, target):
        # Made here, and not by the writer, because that shows at once whether the folder can be written, and which
        # mode the umask leaves (a process cannot read its umask without changing it for its other threads).
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        try:
            yield temporary
            os.chmod(temporary, mode)
            _sync(temporary)
            os.replace(temporary, target)
            _sync(target.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(path: PathLike) -> Iterator[Path]:
    """Yields a temporary folder `.tmp-<name>-<pid>-<random>` beside `path` to be filled; then it becomes `path`.

    All files in it get the mode 0666 & ~umask. If the body raises, the temporary is removed.

    Raises FileExistsError where `path` exists, before the body runs (and again before the rename, should somebody have
    made it meanwhile), FileNotFoundError or NotADirectoryError without a parent folder, and OSError with ENOSPC naming
    `path` where the disk is full.
    """
    target = Path(os.path.abspath(path))
    _require_parent(path, target)
    _require_absent(path, target)
    temporary = _temporary_beside(target)
    with _full_disk_named(path, target):
        os.mkdir(temporary)
        mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666
        try:
            yield temporary
            for folder, _, files in os.walk(temporary, topdown=False):
                for name in files:
                    os.chmod(Path(folder, name), mode)
                    _sync(Path(folder, name))
                _sync(Path(folder))
            _require_absent(path, target)
            os.rename(temporary, target)
            _sync(target.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_bytes(path: PathLike, data: bytes) -> None:
    """Writes `data` as the file `path`, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: PathLike, text: str) -> None:
    """Writes `text` as the UTF-8 file `path`, atomically, its line ends as they are."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, atomically.

    Raises ValueError for NaN and infinities, which JSON does not have, and TypeError for what has no form in JSON.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error
    write_text(path, text + "\n")


def read_json(path: PathLike) -> Any:
    """What the JSON file `path` holds. Raises ValueError naming the file and the place where it is not JSON."""
    data = Path(path).read_bytes()
    if not data.strip():
        raise ValueError(f"{path}: expected JSON, the file is empty")
    try:
        return json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error


def append_jsonl(path: PathLike, record: dict[str, Any]) -> None:
    """Appends `record` as one line of JSON; NaN and infinities are written as null.

    A line that an earlier process left unfinished is ended first, so that it spoils no other.
    """
    line = (json.dumps(_finite(record), allow_nan=False) + "\n").encode()
    with _full_disk_named(path, Path(os.path.abspath(path))), open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)


def sha256(paths: Sequence[PathLike]) -> list[str]:
    """The SHA-256 of files, as hexadecimal digits, several files at a time."""

    def of_one(path: PathLike) -> str:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
        return digest.hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(of_one, paths))


def cache_folder() -> Path:
    """Where downloads and measurements are kept: $FASTDIT_CACHE, $XDG_CACHE_HOME/fastdit, or ~/.cache/fastdit.

    It is made with mode 0700: what lies in it is used without being asked for again, so only its owner may write it.

    Raises PermissionError where it is not this user's, or others can write to it.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("FASTDIT_CACHE") or Path(base) / "fastdit")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if os.name == "posix":
        if found.st_uid != os.getuid():
            raise PermissionError(
                f"{folder}: belongs to another user; set FASTDIT_CACHE to a folder of yours"
            )
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            mode = stat.filemode(found.st_mode)
            raise PermissionError(
                f"{folder}: others can write to it ({mode}); chmod 700, or set FASTDIT_CACHE"
            )
    return folder


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _temporary_beside(target: Path, suffix: str = "") -> Path:
    return target.with_name(f".tmp-{target.name}-{os.getpid()}-{secrets.token_hex(4)}{suffix}")


def _require_parent(path: PathLike, target: Path) -> None:
    parent = target.parent
    if not parent.exists():
        raise FileNotFoundError(errno.ENOENT, f"No folder {parent} to write into", str(path))
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{parent} is not a folder", str(path))


def _require_absent(path: PathLike, target: Path) -> None:
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "Exists already and is never overwritten", str(path))


@contextmanager
def _full_disk_named(path: PathLike, target: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Writers in other languages (safetensors) give the system's text and no errno.
        number = getattr(error, "errno", None)
        if number not in (errno.ENOSPC, errno.EDQUOT) and "No space left" not in str(error):
            raise
        free = shutil.disk_usage(target.parent).free / 2**20
        text = f"No space left writing {path}: {free:.1f} MiB free in {target.parent}"
        raise OSError(errno.ENOSPC, text) from error


def _sync(path: Path) -> None:
    """Returns once the file or the folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
