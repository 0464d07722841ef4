"""manifest.json: complete or not, and every bit that changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastdit.files import sha256
from fastdit.weights import checkpoints, problems, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step-00000003"
    (folder / "optimizer").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(100)))
    (folder / "optimizer" / "shard-00001.safetensors").write_bytes(b"moments")
    (folder / "empty").write_bytes(b"")
    write_manifest(folder, {"step": 3})
    return folder


def test_says_what_is_there(folder: Path) -> None:
    record = json.loads((folder / "manifest.json").read_text())
    assert record["format"] == 1
    assert record["step"] == 3
    names = ["empty", "model.safetensors", "optimizer/shard-00001.safetensors"]
    assert sorted(record["files"]) == names
    assert record["files"]["model.safetensors"] == {
        "size": 100,
        # sha256sum of the bytes 0 to 99
        "sha256": "bce0aff19cf5aa6a7469a30d61d04e4376e4bbf6381052ee9e7f33925c954d52",
    }
    assert problems(folder) == problems(folder, "size") == []


def test_hash_of_more_than_one_block(tmp_path: Path) -> None:
    import hashlib

    data = bytes(2**22) + b"more"
    (tmp_path / "file").write_bytes(data)
    assert sha256([tmp_path / "file"]) == [hashlib.sha256(data).hexdigest()]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer/shard-00001.safetensors"])
def test_every_flipped_bit_is_found(name: str, folder: Path) -> None:
    path = folder / name
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        (wrong,) = problems(folder)
        assert wrong.startswith(f"{path}: damaged, SHA-256 ")
    assert problems(folder, "size") == []


@pytest.mark.parametrize("verify", ["size", "full"])
def test_missing_truncated_and_longer(verify: Any, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"short")
    assert problems(folder, verify) == [f"{path}: truncated or changed, 5 bytes of 100"]
    path.write_bytes(bytes(101))
    assert problems(folder, verify) == [f"{path}: truncated or changed, 101 bytes of 100"]
    path.unlink()
    assert problems(folder, verify) == [f"{path}: missing"]
    path.mkdir()
    assert problems(folder, verify) == [f"{path}: missing"]


def test_all_problems_are_told(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "empty").write_bytes(b"x")
    assert len(problems(folder)) == 2


def test_without_a_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (wrong,) = problems(folder)
    assert wrong == f"{folder / 'manifest.json'}: missing, so step-00000003 was never finished"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"format": 2, "files": {}}',
        '{"format": 1}',
        '{"format": 1, "files": []}',
        '{"format": 1, "files": {"model.safetensors": {}}}',
        '{"format": 1, "files": {"model.safetensors": 100}}',
        '{"format": 1, "files": {"model.safetensors": {"size": 100}}}',
        '{"format": 1, "files": {"model.safetensors": {"size": 100, "sha256": 5}}}',
    ],
)
def test_manifest_that_is_damaged_itself(text: str, folder: Path) -> None:
    """Is a problem that is told, as any other, for an older checkpoint may be whole."""
    (folder / "manifest.json").write_text(text)
    (wrong, *_) = problems(folder)
    assert wrong.startswith(str(folder / "manifest.json")) or "model.safetensors" in wrong


def test_no_flipped_bit_of_the_manifest_is_an_error_of_the_reader(folder: Path) -> None:
    """What it says of files is either found wrong, or still right."""
    path = folder / "manifest.json"
    data = path.read_bytes()
    described = json.loads(data)["files"]
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        if problems(folder) == []:
            assert json.loads(changed)["files"] == described, f"bit {bit} went unnoticed"


def test_what_counts_as_a_checkpoint(tmp_path: Path) -> None:
    names = [
        "step-00000003",
        "step-00000020",
        "step-3",
        "step-00000004.tmp",
        ".tmp-step-00000005-1-ab",
    ]
    for name in [*names, "step-100000000", "step-00000006"]:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if name != "step-00000006":
            write_manifest(tmp_path / "checkpoints" / name, {})
    found = [path.name for path in checkpoints(tmp_path)]
    assert found == ["step-00000003", "step-00000020"]


def test_newest_is_not_the_largest_nor_the_last_written(tmp_path: Path) -> None:
    from fastdit.weights import latest_checkpoint

    for step, size in ((9, 10), (10, 1), (2, 1_000)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(size))
        write_manifest(folder, {})
    assert latest_checkpoint(tmp_path).name == "step-00000010"
