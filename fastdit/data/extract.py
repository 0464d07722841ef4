"""Latents of all images, by any number of processes, going on after a kill.

Shard k holds images k * shard_size ..., and process r of n makes shards r, r + n, ...; the batches of a shard are the
same whoever makes it, so that any number of processes, and any number of kills, leave the same bytes. `latents.py`
describes the folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..files import atomic_file, read_json, sha256, write_json
from ..validation import require_choice
from .decoding import BadImage
from .images import Images
from .latents import (
    DTYPES,
    FORMAT,
    Shard,
    combine_statistics,
    open_shard,
    read_record,
)
from .vae import VAE

logger = logging.getLogger(__name__)


def extract(
    images: Images,
    vae: VAE,
    out: str | os.PathLike[str],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    dtype: torch.dtype = torch.float16,
    shard_size: int = 4096,
    rank: int = 0,
    size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: bool = True,
) -> Path:
    """Writes the moments of all `images` and of their mirror images to the folder `out`, for `LatentFolder`.

    Started again, with any `rank` and `size`, it keeps the shards that are there and makes the others. A shard's bytes
    depend on `batch_size` only as far as the VAE's rounding does.

    Arguments:
        images: `ImageFolder` or `TarShards`; its `horizontal_flip` is of no matter, its `on_bad_image` says whether a
            bad image ends the extraction or is left out and listed.
        dtype: of what is stored, float16 or float32.
        shard_size: images in a shard.
        rank, size: this process, of how many. `barrier` waits for the others; rank 0 then finishes the folder. Without
            a barrier rank 0 has to be the last one.

    Returns `out`. Raises ValueError where `out` holds an extraction of something else, for images that the VAE does not
    take, for a bad image, and for a value that is not finite in `dtype`, naming the image.
    """
    _check_arguments(images, vae, batch_size, dtype, shard_size, rank, size)
    out = Path(out)
    plan = _plan(images, vae, dtype, shard_size)
    _begin(out, plan)
    barrier()
    _require_same_plan(out, plan)
    if _is_finished(out):
        return out

    shards = math.ceil(len(images) / shard_size)
    for k in range(rank, shards, size):  # what a killed process left of shards that no other makes
        for left in out.glob(f".tmp-{_shard_path(out, k).name}-*"):
            left.unlink()
    wanted = [k for k in range(rank, shards, size) if _kept(out, k, plan) is None]
    missing = [(k, range(k * shard_size, min((k + 1) * shard_size, len(images)))) for k in wanted]
    batches = [list(batch) for _, shard in missing for batch in _batches(shard, batch_size)]
    loader: DataLoader[Any] = DataLoader(
        _Unflipped(images),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        generator=torch.Generator(),
    )
    loaded = iter(loader) if batches else iter(())
    total = sum(map(len, batches))
    try:
        with tqdm(total=total, unit="image", disable=not progress or rank != 0) as bar:
            for k, shard in missing:
                made = _Made()
                for batch in _batches(shard, batch_size):
                    _encode(next(loaded), images, vae, dtype, made)
                    bar.update(len(batch))
                _write_shard(_shard_path(out, k), made, shard, plan)
    finally:
        del loaded  # Its workers end now, and not when the garbage collector comes by, which takes them seconds.
    barrier()
    if rank == 0:
        _finish(out, plan, images, vae, shards)
    barrier()
    return out


class _Made:
    """What was computed of a shard so far."""

    def __init__(self) -> None:
        self.moments: list[Tensor] = []
        self.mirrored: list[Tensor] = []
        self.labels: list[int] = []
        self.skipped: list[tuple[int, str]] = []


class _Unflipped(Dataset[Any]):
    """Image `index` as (index, tensor, label); for a bad image a BadImage stands in place of the tensor, so that the
    process that writes decides about it, and not a worker."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor | BadImage, int]:
        try:
            return index, self.images.load(index), self.images.labels[index]
        except BadImage as error:
            return index, BadImage(error.name, error.reason), self.images.labels[index]


Batch = tuple[list[int], Tensor, list[int], list[tuple[int, BadImage]]]


def _collate(items: list[tuple[int, Tensor | BadImage, int]]) -> Batch:
    """Numbers, images and labels of the good images, and the bad ones."""
    good = [(index, item, label) for index, item, label in items if isinstance(item, Tensor)]
    bad = [(index, item) for index, item, _ in items if isinstance(item, BadImage)]
    stacked = torch.stack([item for _, item, _ in good]) if good else torch.empty(0)
    return [index for index, _, _ in good], stacked, [label for _, _, label in good], bad


def _batches(shard: range, batch_size: int) -> Iterator[range]:
    for first in range(0, len(shard), batch_size):
        yield shard[first : first + batch_size]


def _encode(batch: Batch, images: Images, vae: VAE, dtype: torch.dtype, made: _Made) -> None:
    indices, pixels, labels, bad = batch
    for index, error in bad:
        if images.on_bad_image == "error":
            raise error
        logger.warning("Skipped: %s", error)
        made.skipped.append((index, error.reason))
    if not indices:
        return
    pixels = pixels.to(next(vae.model.parameters()).device)
    for flipped, parts in ((False, made.moments), (True, made.mirrored)):
        moments = vae.moments(pixels.flip(-1) if flipped else pixels).cpu()
        stored = moments.to(dtype)
        finite = stored.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            number = int(finite.logical_not().nonzero()[0])
            largest = moments[number].abs().max().item()
            reason = (
                f"latents up to {largest:.6g} do not fit into dtype={dtype}; use float32"
                if math.isfinite(largest)
                else "the VAE gave values that are not finite"
            )
            raise ValueError(f"{images.name(indices[number])}: {reason}")
        parts.append(stored)
    made.labels += labels


# ------------------------------------------------------------------ the plan


def _check_arguments(
    images: Images,
    vae: VAE,
    batch_size: int,
    dtype: torch.dtype,
    shard_size: int,
    rank: int,
    size: int,
) -> None:
    if not isinstance(images, Images):
        raise TypeError(
            f"images: expected an ImageFolder or TarShards, got {type(images).__name__}"
        )
    for name, value in {"batch_size": batch_size, "shard_size": shard_size, "size": size}.items():
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    if not 0 <= rank < size:
        raise ValueError(f"rank={rank}: allowed are 0 to {size - 1}")
    require_choice("dtype", str(dtype).removeprefix("torch."), DTYPES)
    if images.channels != vae.image_channels:
        raise ValueError(f"images: {images.channels} channels, the VAE takes {vae.image_channels}")
    if images.image_size % vae.downsample_factor:
        raise ValueError(
            f"image_size={images.image_size}: must be divisible by {vae.downsample_factor}, which the VAE makes it"
            " smaller by"
        )


def _plan(images: Images, vae: VAE, dtype: torch.dtype, shard_size: int) -> dict[str, Any]:
    """All that decides what is written. Where images and VAE lie does not."""
    keys = hashlib.sha256()
    for index, label in enumerate(images.labels):
        keys.update(f"{images.key(index)}\t{label}\n".encode("utf-8", "surrogateescape"))
    return {
        "format": FORMAT,
        "images": len(images),
        "keys": keys.hexdigest(),
        "classes": images.classes,
        "image_size": images.image_size,
        "mirrored": True,
        "dtype": str(dtype).removeprefix("torch."),
        "shard_size": shard_size,
        "vae": {
            "fingerprint": vae.fingerprint(),
            "scaling_factor": vae.scaling_factor,
            "latent_channels": vae.latent_channels,
            "downsample_factor": vae.downsample_factor,
            "dtype": str(vae.model.dtype).removeprefix("torch."),
        },
    }


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Writes the plan where there is none. Every process may: they all write the same, or are told of it below."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "plan.json").exists():
        return
    others = [path.name for path in out.iterdir() if not path.name.startswith((".", "plan.json"))]
    if others and not (out / "plan.json").exists():  # another process may have written both by now
        raise ValueError(
            f"out={str(out)!r}: holds {min(others)!r} and no plan.json; choose a new or empty folder"
        )
    write_json(out / "plan.json", plan)


def _require_same_plan(out: Path, plan: dict[str, Any]) -> None:
    before = read_json(out / "plan.json")
    for name, value in plan.items():
        found = before.get(name)
        if found == value:
            continue
        if isinstance(value, dict) and isinstance(found, dict):
            key = next(key for key in value if value[key] != found.get(key))
            name, value, found = f"{name} {key}", value[key], found.get(key)
        what = f"{name}={found!r} and not {value!r}"
        if name in ("keys", "classes"):
            what = f"other {'images or labels' if name == 'keys' else 'classes'}"
        raise ValueError(
            f"out={str(out)!r}: holds an extraction with {what}; remove it, or choose another out"
        )


def _plan_hash(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------ shards


def _shard_path(out: Path, number: int) -> Path:
    return out / f"latents-{number:05d}.safetensors"


def _kept(out: Path, number: int, plan: dict[str, Any]) -> Shard | None:
    """The shard, if it is there and whole. Raises ValueError where it is of another extraction."""
    path = _shard_path(out, number)
    if not path.exists():
        return None
    side = plan["image_size"] // plan["vae"]["downsample_factor"]
    try:
        shard = open_shard(path, (2 * plan["vae"]["latent_channels"], side, side), plan["dtype"])
    except ValueError as error:
        logger.warning("Made again: %s", error)
        return None
    if shard.record["plan"] != _plan_hash(plan):
        raise ValueError(f"{path}: is of another extraction than plan.json; remove it")
    return shard


def _write_shard(path: Path, made: _Made, images: range, plan: dict[str, Any]) -> None:
    side = plan["image_size"] // plan["vae"]["downsample_factor"]
    none = torch.empty(
        (0, 2 * plan["vae"]["latent_channels"], side, side), dtype=getattr(torch, plan["dtype"])
    )
    moments, mirrored = torch.cat([none, *made.moments]), torch.cat([none, *made.mirrored])
    record = {
        "plan": _plan_hash(plan),
        "first": images.start,
        "last": images.stop - 1,
        "sums": _sums(moments, mirrored),
        "skipped": made.skipped,
    }
    tensors = {
        "moments": moments,
        "mirrored": mirrored,
        "labels": torch.tensor(made.labels, dtype=torch.int64),
    }
    with atomic_file(path) as temporary:
        # One entry: safetensors writes several in any order, and the bytes should be the same each time.
        save_file(tensors, temporary, metadata={"fastdit": json.dumps(record)})


def _sums(moments: Tensor, mirrored: Tensor) -> dict[str, Any]:
    """For each channel the sums of mean, mean^2 and std^2 over all items, as `combine_statistics` needs them.

    Each item is added up in float64 by NumPy, which uses one thread, and the items exactly: the number of threads or
    processes changes no bit.
    """
    rows: dict[str, list[Any]] = {"mean": [], "mean_squared": [], "variance": []}
    for item in (*moments.numpy(), *mirrored.numpy()):
        mean, std = np.split(item.astype(np.float64), 2)
        for name, pixels in (("mean", mean), ("mean_squared", mean**2), ("variance", std**2)):
            rows[name].append(pixels.sum(axis=(1, 2)))
    channels = moments.shape[1] // 2
    values = (len(moments) + len(mirrored)) * moments.shape[2] * moments.shape[3]
    added = {
        name: [math.fsum(row[channel] for row in found) for channel in range(channels)]
        for name, found in rows.items()
    }
    return {"values": values, **added}


# ------------------------------------------------------------------ the end


def _is_finished(out: Path) -> bool:
    if not (out / "latents.json").exists():
        return False
    shards = [(out / shard["file"], shard["bytes"]) for shard in read_record(out)["shards"]]
    return all(path.exists() and path.stat().st_size == size for path, size in shards)


def _finish(out: Path, plan: dict[str, Any], images: Images, vae: VAE, count: int) -> None:
    shards = []
    for number in range(count):
        shard = _kept(out, number, plan)
        if shard is None:
            raise ValueError(
                f"{_shard_path(out, number)}: is missing; start the process that makes it, and then rank 0 again"
            )
        shards.append(shard)
    hashes = sha256([shard.path for shard in shards])
    items = sum(shard.items for shard in shards)
    if items == 0:
        raise ValueError(f"root={str(images.root)!r}: none of the {len(images)} images can be used")
    skipped = {
        images.key(index): reason for shard in shards for index, reason in shard.record["skipped"]
    }
    write_json(
        out / "latents.json",
        {
            **plan,
            "vae": {"name": vae.name, **plan["vae"]},
            "items": items,
            "statistics": combine_statistics(
                [shard.record["sums"] for shard in shards], vae.scaling_factor
            ),
            "skipped": skipped,
            "shards": [
                {
                    "file": shard.path.name,
                    "items": shard.items,
                    "bytes": shard.path.stat().st_size,
                    "sha256": digest,
                }
                for shard, digest in zip(shards, hashes, strict=True)
            ],
        },
    )
