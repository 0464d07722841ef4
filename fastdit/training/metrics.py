"""What a run measures: metrics.jsonl, one line of JSON per log step and never two for the same, and others' tools."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

from .. import files

# Dense bfloat16 with float32 sums, in 1e12 operations a second, as the makers give it; the first that fits counts.
PEAKS = {
    r"H100 PCIe": 756,
    r"H100 NVL": 835,
    r"H[12]00|GH200": 989,
    r"B[23]00|GB[23]00": 2250,
    r"A100\b|A800\b": 312,
    r"L40S": 362,
    r"RTX 4090": 165,
    r"RTX 3090": 71,
    r"A10\b": 125,
}


def peak_flops(device_name: str) -> float | None:
    """Floating-point operations a second that a GPU can do at most in bfloat16, or None where it is not known."""
    for pattern, tera in PEAKS.items():
        if re.search(pattern, device_name):
            return tera * 1e12
    return None


def require_packages(tensorboard: bool, wandb: str | None) -> None:
    """Raises ImportError naming the package that `Reporter` would miss."""
    for wanted, module, asked in (
        (tensorboard, "torch.utils.tensorboard", "tensorboard=True: pip install tensorboard"),
        (wandb is not None, "wandb", f"wandb={wandb!r}: pip install wandb"),
    ):
        if wanted:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ImportError(asked) from error


class Reporter:
    """Writes records to metrics.jsonl in `folder`, and to TensorBoard and Weights & Biases where that is asked for.

    Raises ImportError naming the package that is missing.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        config: dict[str, Any],
        tensorboard: bool,
        wandb: str | None,
    ) -> None:
        require_packages(tensorboard, wandb)
        self.folder = folder
        self.writer: Any = None
        self.run: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # What a killed process wrote after the checkpoint is hidden.
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if wandb is not None:
            package = importlib.import_module("wandb")
            name = re.sub(r"[^\w.-]", "-", str(folder.absolute()))[-100:]
            self.run = package.init(
                project=wandb, id=name, resume="allow", dir=str(folder), config=config
            )

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.run is not None:
            self.run.finish()

    def log(self, record: dict[str, Any]) -> None:
        files.append_jsonl(self.folder / "metrics.jsonl", record)
        values = {k: v for k, v in record.items() if v is not None and k != "step"}
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, record["step"])
        if self.run is not None:
            self.run.log(values, step=record["step"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file in their order; lines that a killed process left unfinished are left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def drop_after(path: Path, step: int) -> None:
    """Removes the records of steps after `step`, which a resumed run goes through again."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    files.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
