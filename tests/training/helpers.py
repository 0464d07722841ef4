"""Tiny runs, and what they left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fastdit.files import read_json
from fastdit.training import TrainConfig
from fastdit.training.metrics import read_metrics

TENSORS = ("model", "ema", "optimizer", "rng")


def tiny(out: Path, **changes: Any) -> TrainConfig:
    """A run of seconds on the digits."""
    options: dict[str, Any] = {
        "data": "digits",
        "out": str(out),
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "patch_size": 4,
        "batch_size": 8,
        "steps": 4,
        "lr": 1e-2,
        "ema_decay": 0.9,
        "log_every": 1,
        "sample_every": 0,
        "checkpoint_every": 2,
        "device": "cpu",
    }
    return TrainConfig(**(options | changes))


def checkpoints(run: Path) -> list[str]:
    """Everything in the folder of checkpoints, half-written things included."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint, `file.name` to value."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {
        f"{file}.{name}": value
        for file in TENSORS
        for name, value in load_file(folder / f"{file}.safetensors").items()
    }


def record(run: Path, step: int) -> dict[str, Any]:
    """What a run is apart from its tensors and from how long it took."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    timing = ("seconds", "images_per_second")
    return {
        "metrics": [
            {key: value for key, value in line.items() if key not in timing}
            for line in read_metrics(run / "metrics.jsonl")
        ],
        "state": {k: v for k, v in read_json(folder / "state.json").items() if k not in timing},
        "model": read_json(folder / "model.json"),
    }
