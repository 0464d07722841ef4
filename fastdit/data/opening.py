"""The data that a training run names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .digits import Digits
from .images import ImageFolder
from .latents import LatentFolder, is_latents
from .shards import TarShards, is_tar
from .synthetic import Synthetic

Data = Digits | ImageFolder | LatentFolder | Synthetic | TarShards

IMAGE_SIZE = 256  # pixels, where nothing says another


def open_data(
    data: str,
    *,
    image_size: int | None = None,
    channels: int = 3,
    horizontal_flip: bool | None = None,
    seed: int = 0,
    on_bad_image: str = "error",
    classes: Sequence[str] | None = None,
) -> Data:
    """The dataset `data`: "digits", "synthetic", or a folder.

    A folder with latents is a `LatentFolder`, one with tar files is `TarShards`, any other an `ImageFolder`; a folder
    of one of the two names is written with a slash. All have `space`, `image_size`, `channels`, `classes`, the keys
    (index, epoch), and `space` "latents" has `latent_size`, `vae` and `moments`: whether the items are moments that
    `sample_latents` takes, or ready latents.

    Arguments:
        image_size: default 256; the stored one of latents and 8 of digits, where another is an error.
        channels: of images in folders.
        horizontal_flip: default True; digits have none, and True is an error with them.
        classes: the class names that a checkpoint was trained with.

    Raises ValueError, ImportError and OSError as the datasets do.
    """
    if not data:
        raise ValueError("data='': expected a folder, 'digits' or 'synthetic'")
    if data == "digits":
        if image_size not in (None, Digits.image_size):
            raise ValueError(f"image_size={image_size}: must be {Digits.image_size} for {data=}")
        if horizontal_flip:
            raise ValueError(f"horizontal_flip=True: must be False for {data=}")
        return Digits(classes=classes)
    if data == "synthetic":
        return Synthetic(IMAGE_SIZE if image_size is None else image_size, classes=classes)
    flip = horizontal_flip is not False
    root = Path(data)
    if root.is_dir() and is_latents(root):
        latents = LatentFolder(root, horizontal_flip=flip, seed=seed, classes=classes)
        if image_size not in (None, latents.image_size):
            raise ValueError(
                f"image_size={image_size}: the latents in {data!r} are of {latents.image_size}"
            )
        return latents
    kind = TarShards if root.is_dir() and _holds_tars(root) else ImageFolder
    return kind(
        root,
        IMAGE_SIZE if image_size is None else image_size,
        channels=channels,
        horizontal_flip=flip,
        seed=seed,
        on_bad_image=on_bad_image,
        classes=classes,
    )


def _holds_tars(root: Path) -> bool:
    """Raises ValueError where the folder holds class folders as well."""
    visible = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    tars = [path.name for path in visible if path.is_file() and is_tar(path.name)]
    folders = [path.name for path in visible if path.is_dir()]
    if tars and folders:
        raise ValueError(
            f"data={str(root)!r}: holds the tar file {tars[0]!r} and the folder {folders[0]!r}; move one of them away"
        )
    return bool(tars)


def loading_processes(wanted: int | None) -> int:
    """How many processes load data, for each that computes: `wanted`, or up to 4."""
    if wanted is not None:
        return wanted
    # More than the cores that this process may use would only take turns.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, cores or 1)
