"""Files and folders that are there whole or not at all: crashes, full disks, modes, names."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from fastdit.files import (
    append_jsonl,
    atomic_file,
    atomic_folder,
    read_json,
    write_bytes,
    write_json,
    write_text,
)

ROOT = Path(__file__).parent.parent
both = pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
Atomic = Callable[[Path], AbstractContextManager[Path]]


def fill(temporary: Path) -> None:
    """Writes into what either context yields."""
    (temporary / "inside" if temporary.is_dir() else temporary).write_bytes(b"new")


def run_child(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


# ---------------------------------------------------------------- what is written


def test_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "value.bin"
    write_bytes(path, b"first")
    assert path.read_bytes() == b"first"
    write_bytes(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["value.bin"]


def test_text_keeps_its_characters_and_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "Zürich\r\n日本\n")
    assert (tmp_path / "text").read_bytes() == "Zürich\r\n日本\n".encode()


def test_temporary_file_lies_beside_its_target_and_has_its_suffix(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "grid.png") as temporary:
        assert temporary.parent == tmp_path.resolve()
        assert temporary.name.startswith(".tmp-")
        assert temporary.suffix == ".png"
        assert not (tmp_path / "grid.png").exists()


def test_temporary_folder_lies_beside_its_target(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "step-1") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(f".tmp-step-1-{os.getpid()}-")
        assert not (tmp_path / "step-1").exists()
        (temporary / "deep").mkdir()
        (temporary / "deep" / "file").write_text("x")
    assert (tmp_path / "step-1" / "deep" / "file").read_text() == "x"
    assert os.listdir(tmp_path) == ["step-1"]


def test_writer_that_renames_its_own_file_into_place(tmp_path: Path) -> None:
    # As safetensors does, which leaves the mode 0600.
    with atomic_file(tmp_path / "weights") as temporary:
        own = tmp_path / "own"
        own.write_text("x")
        own.chmod(0o600)
        own.rename(temporary)
    assert (tmp_path / "weights").read_text() == "x"
    assert os.listdir(tmp_path) == ["weights"]
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_mode_honours_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    previous = os.umask(umask)
    try:
        with atomic_file(tmp_path / "file") as temporary:
            temporary.write_text("x")
            temporary.chmod(0o640)
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / "file").write_text("x")
            (temporary / "deep" / "file").chmod(0o400)
        assert os.umask(umask) == umask
    finally:
        os.umask(previous)
    for name in ("file", "folder/deep/file"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("name", ["with space", "Zürich 日本", "a'b\"c", "no.dot."])
def test_odd_names(tmp_path: Path, name: str) -> None:
    parent = tmp_path / name
    with atomic_folder(parent) as temporary:
        fill(temporary)
    write_json(parent / name, [1])
    assert read_json(parent / name) == [1]
    assert sorted(os.listdir(parent)) == sorted(["inside", name])


@both
def test_relative_path_survives_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atomic: Atomic
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with atomic(Path("target")) as temporary:
        fill(temporary)
        os.chdir("elsewhere")
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "target"]
    assert os.listdir(tmp_path / "elsewhere") == []


def test_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("old")
    (tmp_path / "link").symlink_to("real/file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"


# ---------------------------------------------------------------- what goes wrong


@both
def test_everything_is_on_disk_before_the_rename_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atomic: Atomic
) -> None:
    events: list[Any] = []
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.fstat(fd).st_ino))
    for name in ("replace", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda a, b, real=real: (events.append("rename"), real(a, b))[1]
        )
    with atomic(tmp_path / "target") as temporary:
        fill(temporary)
        written = [temporary, *temporary.rglob("*")]
        inodes = {path.stat().st_ino for path in written}
    renamed = events.index("rename")
    assert set(events[:renamed]) == inodes
    assert events[renamed:] == ["rename", tmp_path.stat().st_ino]


@both
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_removes_the_temporary(
    tmp_path: Path, atomic: Atomic, error: type[BaseException]
) -> None:
    def write() -> None:
        with atomic(tmp_path / "target") as temporary:
            fill(temporary)
            raise error("stop")

    with pytest.raises(error, match="stop"):
        write()
    assert os.listdir(tmp_path) == []


def test_exception_keeps_the_old_file(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_file(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    write_text(tmp_path / "file", "old")
    with pytest.raises(RuntimeError, match="stop"):
        write()
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


CRASH = """
import os
from fastdit.files import atomic_file, atomic_folder
{when}
with atomic_{kind}("target") as temporary:
    (temporary / "inside" if temporary.is_dir() else temporary).write_text("new")
    {then}
"""
POINTS = {
    "in the body": ("", "os._exit(9)"),
    "before the rename": ("os.replace = os.rename = lambda a, b: os._exit(9)", ""),
}


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("point", POINTS)
def test_killed_process_leaves_what_was_there(tmp_path: Path, kind: str, point: str) -> None:
    if kind == "file":
        write_text(tmp_path / "target", "old")
    when, then = POINTS[point]
    child = run_child(CRASH.format(kind=kind, when=when, then=then), tmp_path)
    assert child.returncode == 9, child.stderr
    left = [name for name in os.listdir(tmp_path) if not name.startswith(".tmp-target-")]
    assert left == (["target"] if kind == "file" else [])
    if kind == "file":
        assert (tmp_path / "target").read_text() == "old"
    assert len(os.listdir(tmp_path)) == len(left) + 1  # the temporary: the child did write


LIMITED = """
import resource, signal
from fastdit.files import atomic_folder, write_bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    if {folder}:
        with atomic_folder("folder") as temporary:
            (temporary / "large").write_bytes(bytes(2**21))
    else:
        write_bytes("file", bytes(2**21))
except OSError as error:
    print(error.errno)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no file size limit on this system")
@pytest.mark.parametrize("folder", [False, True])
def test_file_that_cannot_grow(tmp_path: Path, folder: bool) -> None:
    write_text(tmp_path / "file", "old")
    child = run_child(LIMITED.format(folder=folder), tmp_path)
    assert child.stdout.split() == [str(errno.EFBIG)], child.stderr
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@both
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_is_named(tmp_path: Path, atomic: Atomic, error: Exception) -> None:
    def write() -> None:
        with atomic(tmp_path / "target") as temporary:
            fill(temporary)
            raise error

    with pytest.raises(OSError, match=r"No space left writing .*/target: [\d.]+ MiB") as caught:
        write()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.__cause__ is error
    assert os.listdir(tmp_path) == []


@both
def test_parent_that_is_missing(tmp_path: Path, atomic: Atomic) -> None:
    with (
        pytest.raises(FileNotFoundError, match=r"No folder .*/runs to write into.*runs/target"),
        atomic(tmp_path / "runs" / "target"),
    ):
        pytest.fail("must not start")
    assert os.listdir(tmp_path) == []


@both
def test_parent_that_is_a_file(tmp_path: Path, atomic: Atomic) -> None:
    write_text(tmp_path / "file", "")
    with (
        pytest.raises(NotADirectoryError, match=r"/file is not a folder.*file/target"),
        atomic(tmp_path / "file" / "target"),
    ):
        pytest.fail("must not start")


def test_file_where_a_folder_is(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"this is a folder: '.*/folder'"):
        write_text(tmp_path / "folder", "x")
    assert os.listdir(tmp_path) == ["folder"]


def test_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match=r"Only a regular file.*/pipe'"):
        write_text(tmp_path / "pipe", "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_folder_is_never_overwritten(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("old")
    elif kind == "folder":
        target.mkdir()
    else:
        target.symlink_to("nowhere")
    with pytest.raises(FileExistsError, match=r"never overwritten: '.*/target'"):  # noqa: SIM117
        with atomic_folder(target):
            pytest.fail("must not start")
    assert os.listdir(tmp_path) == ["target"]


def test_folder_that_somebody_else_made_meanwhile(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "target") as temporary:
            fill(temporary)
            (tmp_path / "target").mkdir()  # empty: a bare rename would replace it

    with pytest.raises(FileExistsError, match="never overwritten"):
        write()
    assert os.listdir(tmp_path) == ["target"]
    assert os.listdir(tmp_path / "target") == []


# ---------------------------------------------------------------- JSON


def test_json_is_indented_and_ends_with_a_line(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "Zürich", "list": [1]})
    text = (tmp_path / "a.json").read_text()
    assert text == '{\n  "name": "Z\\u00fcrich",\n  "list": [\n    1\n  ]\n}\n'
    assert read_json(tmp_path / "a.json") == {"name": "Zürich", "list": [1]}


@pytest.mark.parametrize(
    ("value", "error"), [(math.nan, ValueError), ([math.inf], ValueError), (object(), TypeError)]
)
def test_what_json_cannot_hold(tmp_path: Path, value: Any, error: type[Exception]) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(error, match=r"/a\.json: "):
        write_json(tmp_path / "a.json", {"value": value})
    assert read_json(tmp_path / "a.json") == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b'{"a": 1', r"not valid JSON: .*line 1 column 8"),
        (b"\xff\xfe\x00{", "not valid JSON: "),
    ],
)
def test_damaged_json_is_named(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match=rf"/a\.json: .*{reason}"):
        read_json(tmp_path / "a.json")


def test_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"/a\.json"):
        read_json(tmp_path / "a.json")


def test_lines_are_appended_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"step": 1, "loss": math.nan, "norms": (1.0, -math.inf), "more": {"a": 2.5}})
    append_jsonl(path, {"step": 2})
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": None, "norms": [1.0, None], "more": {"a": 2.5}},
        {"step": 2},
    ]
    assert path.read_text().endswith('{"step": 2}\n')


def test_line_after_one_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    append_jsonl(path, {"step": 2})
    assert path.read_text() == '{"step": 1}\n{"st\n{"step": 2}\n'
