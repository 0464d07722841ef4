"""Result files, the name of the commit, and the arithmetic of the ceilings."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import Ceilings, Environment, Row, read_rows, with_fractions, write_rows

HERE = Environment("NVIDIA H200", "580.1", "2.13.0", None, "abc", "2026-01-31")
COPY = Row("copy", "copy", "copy_", {"bytes": 10**6}, "bfloat16", "bandwidth", 100.0, bytes=10**6)
PRODUCT = Row("matmul", "square", "mm", {"M": 8}, "bfloat16", "rate", 500.0, flops=1024)
OTHER = Row("other", "case", "provider", {"N": 2}, "bfloat16", "time")
MEASURED = [
    COPY,
    replace(COPY, bytes=10**8, value=300.0),
    replace(COPY, bytes=10**9, value=None, reason="out of memory"),
    PRODUCT,
    replace(PRODUCT, value=400.0),
    replace(PRODUCT, dtype="float8_e4m3fn", value=900.0),
]


@pytest.mark.parametrize(
    ("device", "folder"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("CPU x86_64", "cpu-x86-64"),
        ("../Evil (TM)/", "evil-tm"),
    ],
)
def test_a_device_gives_a_folder_name(device: str, folder: str) -> None:
    assert results.folder_name(device) == folder
    assert replace(HERE, device=device).folder(Path("r")) == Path("r") / folder / "2026-01-31-abc"


def test_commit_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = (
            "-c",
            "user.name=n",
            "-c",
            "user.email=e@example.org",
            "-c",
            "commit.gpgsign=false",
        )
        subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True
        )

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results.commit_name(tmp_path) == "unknown"
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    commit = results.commit_name(tmp_path)
    assert len(commit) == 10
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/new.json").write_text("{}")
    (tmp_path / "fastdit/attention").mkdir(parents=True)
    (tmp_path / "fastdit/attention/nvidia-h200.json").write_text("{}")
    assert results.commit_name(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert results.commit_name(tmp_path) == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert results.commit_name(tmp_path) == "unknown"


def test_rows_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "copy.json"
    write_rows(path, MEASURED, HERE)
    assert read_rows(path) == MEASURED
    document = json.loads(path.read_text())
    assert document["schema"] == 1
    assert document["rows"][0]["unit"] == "GB/s"
    assert document["rows"][0]["driver"] == "580.1"
    assert [p.name for p in path.parent.iterdir()] == ["copy.json"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "copy.json"
    write_rows(path, [COPY], HERE)
    with pytest.raises(ValueError, match="JSON"):
        write_rows(path, [replace(COPY, value=math.nan)], HERE)
    assert read_rows(path) == [COPY]
    assert [p.name for p in tmp_path.iterdir()] == ["copy.json"]


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "copy.json"
    path.write_text('{"schema": 2, "rows": []}')
    with pytest.raises(ValueError, match="schema=2: allowed is 1"):
        read_rows(path)


@pytest.mark.parametrize(
    ("size", "rate"), [(10**5, 100), (10**6, 100), (10**7, 200), (10**8, 300), (10**9, 300)]
)
def test_a_copy_between_two_sizes_is_interpolated(size: int, rate: float) -> None:
    assert Ceilings.of(MEASURED).copy_rate(size) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("row", "fraction"),
    [
        (COPY, 100 / 300),  # a copy: against the best one
        (PRODUCT, 1.0),
        (replace(PRODUCT, dtype="float8_e4m3fn", value=450.0), 0.5),
        (replace(PRODUCT, dtype="float16"), None),
        (replace(OTHER, metric="bandwidth", value=150.0, bytes=10**7), 150 / 200),
        # 10 MB at 200 GB/s are 50 us, 10 GFLOP at 500 TFLOP/s are 20 us
        (replace(OTHER, value=100.0, bytes=10**7, flops=10**10), 0.5),
        # 100 GFLOP are 200 us
        (replace(OTHER, value=400.0, bytes=10**7, flops=10**11), 0.5),
        (replace(OTHER, value=100.0, flops=10**10), 0.2),
        (replace(OTHER, value=100.0), None),
        (replace(OTHER, bytes=10**7), None),  # not measured
    ],
)
def test_fraction_of_ceiling(row: Row, fraction: float | None) -> None:
    found = Ceilings.of(MEASURED).fraction(row)
    assert found == (None if fraction is None else pytest.approx(fraction, rel=1e-12))


def test_without_a_ceiling_there_is_no_fraction() -> None:
    bandwidth = replace(OTHER, metric="bandwidth", value=150.0, bytes=10**7)
    rate = replace(PRODUCT, value=250.0)
    both = replace(OTHER, value=100.0, bytes=10**7, flops=10**10)
    rows = [bandwidth, rate, both]
    assert [row.fraction_of_ceiling for row in with_fractions(rows, [])] == [None, None, None]
    assert [row.fraction_of_ceiling for row in with_fractions(rows, [COPY])] == [1.5, None, None]
    assert [row.fraction_of_ceiling for row in with_fractions(rows, [PRODUCT])] == [None, 0.5, None]


def test_table() -> None:
    rows = [
        replace(PRODUCT, shape={"M": 512, "K": 8}, fraction_of_ceiling=0.5),
        replace(PRODUCT, shape={"M": 2048, "K": 8}, value=123.456, ratio=1.5, baseline="x"),
        replace(OTHER, reason="no such backend"),
        replace(OTHER, shape={"N": 3}, reason="no such backend"),
    ]
    product, other, missing = results.table(rows).splitlines()
    assert " ".join(product.split()) == "matmul square mm TFLOP/s M=512 500 50% M=2048 123.5 x1.50"
    assert " ".join(other.split()) == "other case provider us N=2 - N=3 -"
    assert missing == "not measured, 2 x other provider: no such backend"
