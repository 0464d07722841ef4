"""Tiny runs, and what they left."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from fastdit.files import read_json
from fastdit.training import TrainConfig
from fastdit.training.metrics import read_metrics
from fastdit.weights import write_manifest

# What differs from one run to the next because one took longer.
TIMING = ("seconds", "seconds_since_log", "seconds_per_step", "images_per_second")
# Python 3.12 warns of every fork in a process with threads, and torch has threads.
FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


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


def write_images(root: Path) -> Path:
    """20 RGB images of 12x10 pixels in the classes ant, bee and cat."""
    random = np.random.default_rng(0)
    for name, count in {"ant": 7, "bee": 7, "cat": 6}.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = random.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def checkpoints(run: Path) -> list[str]:
    """Everything in the folder of checkpoints, half-written things included."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint: `model.…`, `ema.…`, `optimizer.…` (put together from its shards), `rng.…`."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    weights = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    ranks = sorted((folder / "rng").iterdir())
    rng = {"rng": load_file(ranks[0])} | {
        f"{p.parent.name}.{p.stem}": load_file(p) for p in ranks[1:]
    }
    files = {**weights, "optimizer": optimizer_tensors(folder), **rng}
    return {
        f"{file}.{name}": value for file, found in files.items() for name, value in found.items()
    }


def optimizer_tensors(folder: Path) -> dict[str, Tensor]:
    """The optimizer's state in the checkpoint `folder`, by however many processes it was written."""
    reader = HuggingFaceStorageReader(str(folder / "optimizer"))
    stored = reader.read_metadata().state_dict_metadata
    found = {name: torch.full(value.size, torch.nan) for name, value in stored.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def record(run: Path, step: int) -> dict[str, Any]:
    """What a run is apart from its tensors and from how long it took."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {
        "metrics": [
            {key: value for key, value in line.items() if key not in TIMING}
            for line in read_metrics(run / "metrics.jsonl")
        ],
        "not finite": read_metrics(run / "not_finite.jsonl"),
        "state": {k: v for k, v in read_json(folder / "state.json").items() if k not in TIMING},
        "model": read_json(folder / "model.json"),
    }


def declare_whole(folder: Path) -> None:
    """Makes the manifest of a checkpoint say of its files what they are now."""
    (folder / "manifest.json").unlink()
    write_manifest(folder, {})
