"""The files of measurements: what is saved is read, merged and refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fastdit.attention import registry
from fastdit.attention.registry import Key, bucket, entries, fastest, file_name, save

KEY = Key("bfloat16", 4, 256, 256, 16, 72, "inference")
GPU = "NVIDIA H200"


def test_what_is_saved_is_read() -> None:
    path = save(GPU, [(KEY, "triton", 2e-4), (KEY, "cudnn", 1e-4)])
    assert path == Path(os.environ["FASTDIT_CACHE"]) / "attention" / "nvidia-h200.json"
    assert fastest(GPU, KEY) == ["cudnn", "triton"]
    assert fastest(GPU, KEY._replace(batch=8)) == []
    assert fastest("NVIDIA H100", KEY) == []


def test_a_key_that_is_measured_again_is_replaced() -> None:
    other = KEY._replace(direction="training")
    save(GPU, [(KEY, "cudnn", 1e-4), (other, "triton", 1e-4)])
    save(GPU, [(KEY, "sdpa", 2e-4)])
    assert fastest(GPU, KEY) == ["sdpa"]
    assert fastest(GPU, other) == ["triton"]


def test_own_measurements_go_before_those_that_are_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = KEY._replace(batch=8)
    shipped = save(GPU, [(KEY, "cudnn", 1e-4), (other, "sdpa", 1e-4)])
    (tmp_path / "shipped").mkdir()
    shipped.rename(tmp_path / "shipped" / shipped.name)
    monkeypatch.setattr(registry, "HERE", tmp_path / "shipped")
    save(GPU, [(KEY, "triton", 1e-4)])
    assert fastest(GPU, KEY) == ["triton"]
    assert fastest(GPU, other) == ["sdpa"]


def test_what_is_shipped_can_be_read() -> None:
    for path in registry.HERE.glob("*.json"):
        device = json.loads(path.read_text())["device"]
        assert path.name == file_name(device)
        assert entries(device)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected measurements of 'NVIDIA H200' in schema 1"),
        ('{"schema": 2, "device": "NVIDIA H200", "entries": []}', "in schema 1"),
        ('{"schema": 1, "device": "other", "entries": []}', "it is of 'other'"),
        ('{"schema": 1, "device": "NVIDIA H200"}', "KeyError: 'entries'"),
        ('{"schema": 1, "device": "NVIDIA H200", "entries": [{"seconds": {}}]}', "KeyError"),
    ],
)
def test_other_files_are_named(text: str, message: str) -> None:
    path = save(GPU, [(KEY, "sdpa", 1.0)])
    path.write_text(text)
    with pytest.raises(ValueError, match=f"nvidia-h200.json: .*{message}"):
        fastest(GPU, KEY)


def test_a_wrong_file_is_named_every_time() -> None:
    save(GPU, [(KEY, "sdpa", 1.0)]).write_text("{}")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"nvidia-h200\.json: expected measurements"):
            entries(GPU)


def test_what_is_half_read_is_seen_by_no_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    read_json, seen = registry.read_json, []

    def reading(path: Path) -> Any:
        seen.append(registry._read.get(GPU))
        return read_json(path)

    save(GPU, [(KEY, "sdpa", 1.0)])
    monkeypatch.setattr(registry, "read_json", reading)
    assert entries(GPU)[KEY] == {"sdpa": 1.0}
    assert seen
    assert not any(found is not None for found in seen)


def test_unknown_direction_is_refused() -> None:
    save(GPU, [(KEY._replace(direction="sideways"), "sdpa", 1.0)])
    with pytest.raises(ValueError, match="direction='sideways'"):
        entries(GPU)


def test_no_cache_folder_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTDIT_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="no measurements of your own"):
        assert fastest(GPU, KEY) == []


@pytest.mark.parametrize(("batch", "size"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_buckets(batch: int, size: int) -> None:
    assert bucket(batch) == size


def test_directions() -> None:
    assert registry.direction(False, True) == registry.direction(False, False) == "inference"
    assert registry.direction(True, True) == "training"
    assert registry.direction(True, False) == "training, any order"
