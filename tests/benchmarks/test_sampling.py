"""The programs that measure sampling and attention run, and write what they say."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from benchmarks import attention_registry, sampling
from fastdit.attention import registry


def test_sampling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--model", "DiT-S/8", "--batch", "1", "--steps", "1"]
    options += ["--dtype", "fp32", "--no-compile", "--output", str(tmp_path)]
    sampling.main(options)
    (path,) = tmp_path.glob("*/*/sampling-dit-s-8.json")
    rows = json.loads(path.read_text())["rows"]
    providers = [row["provider"] for row in rows]
    assert providers[:3] == ["reference", "eager", "fastdit"]
    assert all(row["value"] > 0 and row["unit"] == "us" for row in rows)
    assert rows[0]["ratio"] == 1
    assert str(path) in capsys.readouterr().out


def test_attention_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Once: the kernels are interpreted here.
    measure = functools.partial(attention_registry.attention.measure, rounds=1)
    monkeypatch.setattr(attention_registry.attention, "measure", measure)
    attention_registry.main(["--device", "cpu", "--small", "--output", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    assert path.name == registry.file_name("cpu")
    entries = json.loads(path.read_text())["entries"]
    assert {entry["direction"] for entry in entries} == set(registry.DIRECTIONS)
    assert all("sdpa" in entry["seconds"] for entry in entries)
    assert "it runs on cuda, not on cpu" in capsys.readouterr().out
