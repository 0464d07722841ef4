"""The result files of all benchmarks: one row per measured number, and what the device can do at most.

A run writes `results/<device>/<date>-<commit>/<part>.json`: `{"schema": 1, "rows": [...]}`. Every row
names the machine and the source it was measured with, so it is understood outside its file, too.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

SCHEMA = 1
UNITS = {
    "bandwidth": "GB/s",
    "rate": "TFLOP/s",
    "time": "us",
    "cold_start": "s",  # of a first call, in which something is compiled
    "last_batch": "s",  # of the first call with a smaller batch
    "graphs": "graphs",  # compiled in the first call
    "recompiles": "graphs",  # compiled in the first call with a smaller batch
    "memory": "GB",
    "batch": "images",
    "wall_time": "s",  # from the first image's noise to the last one on the disk
    "throughput": "images/s",
}
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """One measured number, or the reason why there is none.

    `spread` is the interquartile range of the samples over their median. `ratio` says how many times
    faster than the provider `baseline` this one is, both measured in turns. `bytes` and `flops` are
    what one call has to move (each input read once, each output written once) and to compute (twice
    the multiply-adds). `kernels` are the names of what ran on the device.
    """

    suite: str
    case: str
    provider: str
    shape: dict[str, int]
    dtype: str
    metric: str
    value: float | None = None
    spread: float | None = None
    baseline: str | None = None
    ratio: float | None = None
    fraction_of_ceiling: float | None = None
    bytes: int | None = None
    flops: int | None = None
    kernels: list[str] = field(default_factory=list)
    reason: str | None = None

    @property
    def unit(self) -> str:
        return UNITS[self.metric]


# ------------------------------------------------------------------------------- where it was measured


@dataclass(frozen=True)
class Environment:
    """The machine and the source that a row was measured with."""

    device: str
    driver: str | None
    torch: str
    triton: str | None
    commit: str
    date: str

    def folder(self, output: Path) -> Path:
        """Where the files of this device, day and commit lie below `output`."""
        return output / folder_name(self.device) / f"{self.date}-{self.commit}"


def environment_of(device: torch.device) -> Environment:
    gpu = device.type == "cuda"
    return Environment(
        device=torch.cuda.get_device_name(device) if gpu else f"CPU {platform.machine()}",
        driver=driver_version() if gpu else None,
        torch=torch.__version__,
        triton=triton_version(),
        commit=commit_name(ROOT),
        date=datetime.now(timezone.utc).date().isoformat(),
    )


def folder_name(device: str) -> str:
    """`"NVIDIA H200"` becomes `"nvidia-h200"`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def driver_version() -> str | None:
    answer = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0].strip() if answer else None


def triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def commit_name(root: Path) -> str:
    """What is checked out at `root`, with `-dirty` if files differ from it; `unknown` without git."""
    commit = _output("git", "-C", str(root), "rev-parse", "--short=10", "HEAD")
    if not commit:
        return "unknown"
    # Results are written while measuring; they do not change what is measured.
    written = (":!benchmarks/results", ":!fastdit/attention/*.json")
    status = ("status", "--porcelain", "--", ".", *written)
    changes = _output("git", "-C", str(root), *status)
    return commit.strip() + ("" if changes == "" else "-dirty")


def _output(*command: str) -> str | None:
    """What the command prints, or None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


# ------------------------------------------------------------------------------------------- the files


def write_rows(path: Path, rows: Iterable[Row], environment: Environment) -> None:
    """Writes the whole file or nothing: under a temporary name first, then moved into place."""
    records = [{**asdict(row), "unit": row.unit, **asdict(environment)} for row in rows]
    text = json.dumps({"schema": SCHEMA, "rows": records}, indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_rows(path: Path) -> list[Row]:
    """The rows of one file, without the environment they were measured in.

    Raises ValueError for a file of another schema.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema={document.get('schema')!r}: allowed is {SCHEMA}")
    names = [each.name for each in fields(Row)]
    return [Row(**{name: record[name] for name in names}) for record in document["rows"]]


# ---------------------------------------------------------------------------------------- the ceilings


@dataclass(frozen=True)
class Ceilings:
    """The best a device was seen to do: copies in GB/s by bytes moved, products in TFLOP/s by dtype."""

    copy: dict[int, float]
    matmul: dict[str, float]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Ceilings:
        copy: dict[int, float] = {}
        matmul: dict[str, float] = {}
        for row in rows:
            if row.suite == "copy" and row.bytes and row.value:
                copy[row.bytes] = max(row.value, copy.get(row.bytes, 0.0))
            if row.suite == "matmul" and row.value:
                matmul[row.dtype] = max(row.value, matmul.get(row.dtype, 0.0))
        return cls(copy, matmul)

    def copy_rate(self, size: int) -> float | None:
        """GB/s of a copy that moves `size` bytes, interpolated over the logarithm of the size.

        A short kernel is held against a short copy, which does not reach full bandwidth either.
        """
        if not self.copy:
            return None
        sizes = sorted(self.copy)
        logarithms = [math.log(each) for each in sizes]
        return float(np.interp(math.log(size), logarithms, [self.copy[each] for each in sizes]))

    def fraction(self, row: Row) -> float | None:
        """What part of the ceiling `row` reaches, or None where the ceiling has not been measured.

        A bandwidth is held against the copy of the same size (a copy against the best copy), a rate
        against the best product of its dtype, a time against the longer of the two times that its
        bytes and its FLOPs need.
        """
        if row.value is None:
            return None
        if row.suite == "copy":
            return row.value / max(self.copy.values())
        copy = self.copy_rate(row.bytes) if row.bytes else None
        matmul = self.matmul.get(row.dtype) if row.flops else None
        if row.metric == "bandwidth":
            return row.value / copy if copy else None
        if row.metric == "rate":
            return row.value / matmul if matmul else None
        copy_us = (row.bytes or 0) / copy / 1e3 if copy else None
        matmul_us = (row.flops or 0) / matmul / 1e6 if matmul else None
        if (row.bytes and copy_us is None) or (row.flops and matmul_us is None):
            return None
        floor = max(copy_us or 0.0, matmul_us or 0.0)
        return floor / row.value if floor else None


def with_fractions(rows: Sequence[Row], measured: Iterable[Row]) -> list[Row]:
    """`rows` with their fraction_of_ceiling, the ceilings being the best of `measured`."""
    ceilings = Ceilings.of(measured)
    return [replace(row, fraction_of_ceiling=ceilings.fraction(row)) for row in rows]


# ------------------------------------------------------------------------------------------ to be read


def table(rows: Sequence[Row]) -> str:
    """A line per case and provider, its shapes side by side, then the reasons for what is missing."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.suite, row.case, row.provider, row.unit), []).append(row)
    lines = []
    for (suite, case, provider, unit), members in groups.items():
        cells = "  ".join(_cell(row, members) for row in members)
        lines.append(f"{suite:9} {case[:48]:18} {provider:17} {unit:7} {cells}")
    missing = Counter(f"{row.suite} {row.provider}: {row.reason}" for row in rows if row.reason)
    return "\n".join([*lines, *(f"not measured, {n} x {reason}" for reason, n in missing.items())])


def _cell(row: Row, members: list[Row]) -> str:
    """`M=512 420 x1.06 55%`: what sets the row apart, its value, ratio and fraction of the ceiling."""
    varying = [key for key in row.shape if len({each.shape.get(key) for each in members}) > 1]
    parts = [",".join(f"{key}={row.shape[key]}" for key in varying)] if varying else []
    parts.append("-" if row.value is None else f"{row.value:.4g}")
    if row.ratio is not None:
        parts.append(f"x{row.ratio:.2f}")
    if row.fraction_of_ceiling is not None:
        parts.append(f"{row.fraction_of_ceiling:.0%}")
    return " ".join(parts)
