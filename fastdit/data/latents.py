"""Folders of latents: what the VAE makes of all images, computed once.

    latents.json                the data: classes, VAE, statistics, and every shard with its SHA-256; written last
    plan.json                   what is to be computed; written first
    latents-00000.safetensors   items 0, 1, ... as
        moments   (n, 2C, h, w)   mean and standard deviation of the posterior of each image, unscaled
        mirrored  (n, 2C, h, w)   the same of its mirror image
        labels    (n,)            int64

Moments, and not samples of them, because training draws a new sample of the posterior each time, and mirrors half of
the images: with both stored, nothing of that is lost.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ..files import read_json, sha256
from .classes import renumbering
from .sampler import Key, is_flipped, split_key

logger = logging.getLogger(__name__)

FORMAT = "fastdit latents 1"
DTYPES = {"float16": "F16", "float32": "F32"}  # as latents.json and as safetensors name them
PROBED = 64  # items that are read at the start
LIKELY_STD = (0.5, 2.0)  # of scaled latents, which have about 1


@dataclass(frozen=True)
class Shard:
    """One file of a folder of latents: what its header says."""

    path: Path
    items: int
    record: dict[str, Any]
    """`plan`, a hash; `first` and `last` + 1 of the images; `sums`; `skipped`, pairs of number and reason."""


class LatentFolder(Dataset[tuple[Tensor, int]]):
    """The latents that `extract` wrote, with the keys, order and flips of `ImageFolder`.

    `dataset[index, epoch]` gives (moments float32 (2C, h, w), label), `dataset[index]` that of epoch 0: unscaled mean
    and standard deviation of the VAE's posterior, for half of all (seed, epoch, index) of the mirror image.
    `sample_latents(moments, noise, dataset.vae["scaling_factor"])` makes latents of them. Shards are mapped into
    memory when an item is first read, in each process: none is ever read as a whole.

    `image_size` is that of the images in pixels, `latent_size` = h = w, `channels` = C; `vae` has the VAE's `name`,
    `scaling_factor`, `fingerprint`, `latent_channels` and `downsample_factor`; `statistics` has `mean` and `std` of
    scaled latents, one number for each channel; `skipped` the bad images that were left out.

    Arguments:
        vae_fingerprint: `VAE.fingerprint()` of the VAE that is going to decode; another than the stored one is refused.
        classes: the class names that a checkpoint was trained with. The same names must be there; labels are their
            positions in this list.

    Raises ValueError naming the file and what is wrong: an extraction that is not finished; a shard that is missing,
    truncated, of another extraction, of other shape, dtype or length than the rest, or with labels outside of the
    classes; values that are not finite (all statistics, and some items, at the start; every item when it is read);
    another VAE. Logs a warning for a shard without items, which is skipped, and where the latents' standard deviation
    is far from 1, as with a scaling factor that was forgotten or applied twice.
    """

    space = "latents"
    moments = True

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        horizontal_flip: bool = True,
        seed: int = 0,
        classes: Sequence[str] | None = None,
        vae_fingerprint: str | None = None,
    ) -> None:
        self.root = Path(root)
        self.horizontal_flip = horizontal_flip
        self.seed = seed
        record = read_record(self.root)
        self._record = record
        self.image_size: int = record["image_size"]
        self.vae: dict[str, Any] = record["vae"]
        self.statistics: dict[str, Any] = record["statistics"]
        self.skipped: dict[str, str] = record["skipped"]
        self.channels: int = self.vae["latent_channels"]
        self.latent_size: int = self.image_size // self.vae["downsample_factor"]
        if vae_fingerprint is not None:
            self.require_vae(vae_fingerprint)

        self._maps: dict[int, Any] = {}
        self._paths: list[Path] = []
        self._starts = [0]
        sums, labels = [], []
        for stored in record["shards"]:
            shard = self._open_shard(stored)
            sums.append(shard.record["sums"])
            if not shard.items:
                logger.warning("%s: holds no items, skipped", shard.path)
                continue
            labels.append(_labels(shard, len(record["classes"])))
            self._paths.append(shard.path)
            self._starts.append(self._starts[-1] + shard.items)
        if not labels:
            raise ValueError(f"{self.root / 'latents.json'}: none of the shards holds an item")
        self.classes, renumbered = renumbering(f"root={str(root)!r}", record["classes"], classes)
        self.labels = torch.tensor(renumbered)[torch.from_numpy(np.concatenate(labels))]
        self._check_statistics(sums)
        for index in sorted({step * len(self) // PROBED for step in range(PROBED)}):
            self._read(index, mirrored=False)
        self._maps.clear()  # each process maps its own

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        index, epoch = split_key(key, len(self))
        mirrored = self.horizontal_flip and is_flipped(self.seed, epoch, index)
        return self._read(index, mirrored), int(self.labels[index])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def require_vae(self, fingerprint: str) -> None:
        """Raises ValueError unless the latents were made by the VAE with this fingerprint."""
        if fingerprint != self.vae["fingerprint"]:
            raise ValueError(
                f"{self.root / 'latents.json'}: made by the VAE {self.vae['name']!r} with fingerprint"
                f" {self.vae['fingerprint']}, and not by one with {fingerprint}; extract the latents again"
            )

    def verify(self) -> None:
        """Reads all shards once. Raises ValueError naming the first whose SHA-256 is not the one in latents.json."""
        paths = [self.root / stored["file"] for stored in self._record["shards"]]
        for stored, path, found in zip(self._record["shards"], paths, sha256(paths), strict=True):
            if found != stored["sha256"]:
                raise ValueError(
                    f"{path}: SHA-256 {found}, latents.json has {stored['sha256']}; the shard was changed"
                )

    def _open_shard(self, stored: dict[str, Any]) -> Shard:
        path = self.root / stored["file"]
        if not path.exists():
            raise ValueError(f"{path}: the shard is missing; extract again to make it")
        size = path.stat().st_size
        if size != stored["bytes"]:
            raise ValueError(
                f"{path}: {size} bytes, latents.json has {stored['bytes']}; truncated or changed"
            )
        side = self.latent_size
        shard = open_shard(path, (2 * self.channels, side, side), self._record["dtype"])
        if shard.items != stored["items"]:
            raise ValueError(f"{path}: {shard.items} items, latents.json has {stored['items']}")
        return shard

    def _check_statistics(self, sums: list[dict[str, Any]]) -> None:
        path = self.root / "latents.json"
        found = combine_statistics(sums, self.vae["scaling_factor"])
        # The numbers of JSON come back as they were, and their sums are exact. What is not finite equals nothing.
        if found != self.statistics:
            raise ValueError(
                f"{path}: the statistics are not those of the shards: mean {_short(self.statistics.get('mean'))},"
                f" the shards have {_short(found['mean'])}"
            )
        means = np.array(found["mean"])
        std = math.sqrt(np.mean(np.square(found["std"]) + means**2) - np.mean(means) ** 2)
        if not LIKELY_STD[0] <= std <= LIKELY_STD[1]:
            logger.warning(
                "%s: the scaled latents have a standard deviation of %.3g, expected about 1: is"
                " scaling_factor=%s forgotten, applied twice, or another VAE's?",
                path,
                std,
                self.vae["scaling_factor"],
            )

    def _read(self, index: int, mirrored: bool) -> Tensor:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        if number not in self._maps:
            file = safe_open(self._paths[number], "np")
            self._maps[number] = [file.get_slice(name) for name in ("moments", "mirrored")]
        item = self._maps[number][mirrored][index - self._starts[number]].astype(np.float32)
        if not np.isfinite(item).all():
            raise ValueError(
                f"{self._paths[number]}: item {index - self._starts[number]} of"
                f" {'mirrored' if mirrored else 'moments'} is not finite"
            )
        return torch.from_numpy(item)


def read_record(root: Path) -> dict[str, Any]:
    """What `latents.json` holds. Raises ValueError where it is missing, unreadable, or not of this format."""
    path = root / "latents.json"
    if not root.is_dir():
        raise ValueError(f"root={str(root)!r}: no such folder")
    if not path.exists():
        if is_latents(root):
            raise ValueError(
                f"root={str(root)!r}: the extraction is not finished; start it again to go on"
            )
        raise ValueError(f"root={str(root)!r}: holds no latents.json")
    if (found := _format_of(path)) != FORMAT:
        raise ValueError(f"{path}: format={found!r}, expected {FORMAT!r}")
    record: dict[str, Any] = read_json(path)
    return record


def is_latents(root: Path) -> bool:
    """Whether the folder holds latents, finished or not."""
    return any(root.glob("latents-*.safetensors")) or any(
        (root / name).exists() and _format_of(root / name) == FORMAT
        for name in ("latents.json", "plan.json")
    )


def _format_of(path: Path) -> Any:
    record = read_json(path)
    return record.get("format") if isinstance(record, dict) else None


def open_shard(path: Path, shape: tuple[int, int, int], dtype: str) -> Shard:
    """Reads the header of a shard whose items have `shape`.

    Raises ValueError naming the file where it is truncated, no shard, or its tensors are of other shapes or dtypes.
    """
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in found.items()}
            dtypes = {name: part.get_dtype() for name, part in found.items()}
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or damaged: {error}") from error
    if "fastdit" not in metadata or set(shapes) != {"moments", "mirrored", "labels"}:
        raise ValueError(
            f"{path}: not a shard of latents, it holds {', '.join(shapes) or 'nothing'}"
        )
    if shapes["moments"][1:2] != shape[:1]:
        raise ValueError(
            f"{path}: moments has shape {shapes['moments']}, expected {shape[0]} channels, means and standard"
            f" deviations of {shape[0] // 2}"
        )
    items = shapes["moments"][0]
    for name in ("moments", "mirrored"):
        if shapes[name] != (items, *shape):
            raise ValueError(f"{path}: {name} has shape {shapes[name]}, expected {(items, *shape)}")
        if dtypes[name] != DTYPES[dtype]:
            raise ValueError(f"{path}: {name} is {dtypes[name]}, expected {DTYPES[dtype]}")
    if shapes["labels"] != (items,) or dtypes["labels"] != "I64":
        raise ValueError(
            f"{path}: {items} latents and labels of shape {shapes['labels']}, {dtypes['labels']};"
            f" expected ({items},), I64"
        )
    return Shard(path, items, json.loads(metadata["fastdit"]))


def combine_statistics(sums: list[dict[str, Any]], scaling_factor: float) -> dict[str, Any]:
    """Mean and standard deviation, for each channel, of z = scaling_factor * (mean + std * noise).

        E z = s E[mean]        Var z = s^2 (E[mean^2] + E[std^2] - E[mean]^2)

    over all pixels of all items and their mirror images, of the shards' `sums`. These are added exactly (fsum), so that
    the result does not depend on how they were computed.
    """
    values = sum(part["values"] for part in sums)
    mean, squares, variance = (
        [
            math.fsum(channel) / max(values, 1)
            for channel in zip(*(p[name] for p in sums), strict=True)
        ]
        for name in ("mean", "mean_squared", "variance")
    )
    std = [
        scaling_factor * math.sqrt(max(m2 + v - m * m, 0.0)) if math.isfinite(m2 + v) else math.nan
        for m, m2, v in zip(mean, squares, variance, strict=True)
    ]
    return {"mean": [scaling_factor * m for m in mean], "std": std, "values": values}


def _labels(shard: Shard, classes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    with safe_open(shard.path, "np") as file:
        labels = file.get_tensor("labels")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"{shard.path}: labels from {labels.min()} to {labels.max()}, allowed are 0 to {classes - 1}"
        )
    return labels


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
