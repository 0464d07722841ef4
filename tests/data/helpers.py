"""What several tests of the data need: random images, a small VAE, and what two DataLoaders give."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastdit.data import EpochBatchSampler

Members = list[tuple[str, bytes]]


def png(seed: int, size: tuple[int, int] = (16, 16)) -> bytes:
    """An image of random pixels, as a file."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def save_animals(root: Path) -> Path:
    """Three classes, thirteen images."""
    for label, name in enumerate(("cat", "dog", "owl")):
        (root / name).mkdir(parents=True)
        for number in range(4 + (label == 1)):
            (root / name / f"{number}.png").write_bytes(png(10 * label + number, (18, 16)))
    return root


def tar_bytes(members: Members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def save_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))
    return path


def save_vae(path: Path, diffusers: Any, **options: Any) -> Path:
    """A saved autoencoder with three stages (8x8 pixels of an image to 2x2 latents) and random weights."""
    torch.manual_seed(0)
    config = {
        "block_out_channels": (8, 8, 16),
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    diffusers.AutoencoderKL(**{**config, **options}).save_pretrained(path)
    return path


def batches(
    dataset: Any, workers: int, count: int, start_step: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a training run is given, from `start_step` on."""
    sampler = EpochBatchSampler(len(dataset), 4, seed=1, start_step=start_step)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
    yield from islice(((items, labels) for items, labels in loader), count)


def require_workers_and_a_resume_change_nothing(dataset: Any) -> None:
    expected = list(batches(dataset, 0, 8))
    again = [*batches(dataset, 0, 5), *batches(dataset, 2, 3, start_step=5)]
    for found in (list(batches(dataset, 2, 8)), again):
        for (items, labels), (expected_items, expected_labels) in zip(found, expected, strict=True):
            assert torch.equal(items, expected_items)
            assert torch.equal(labels, expected_labels)
