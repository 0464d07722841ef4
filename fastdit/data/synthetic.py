"""Latents that are random numbers: a training run without a disk, for measuring everything else.

They are drawn when the data is opened, so that an item costs little more than its memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .classes import renumbering
from .sampler import Key, split_key

IMAGENET = 1_281_167  # images of the training part
DIFFERENT = 1021  # images that differ; a prime, so that they meet every label


class Synthetic(Dataset[tuple[Tensor, int]]):
    """Standard normal numbers in the shape of scaled latents, as many as ImageNet has images.

    `dataset[index]` and `dataset[index, epoch]` give (latents float32 (latent_channels, s, s), index % num_classes)
    with s = `latent_size` = image_size / downsample_factor; a pure function of the index, of which every 1021st has the
    same latents. `moments` is False: these are latents, and nothing has to be sampled from them. `vae` is None: no
    decoder makes images of them.

    Raises ValueError where image_size cannot be divided, for numbers below one, and for other `classes` than were
    trained ("0", "1", ...).
    """

    space = "latents"
    moments = False
    vae = None

    def __init__(
        self,
        image_size: int = 256,
        *,
        num_classes: int = 1000,
        latent_channels: int = 4,
        downsample_factor: int = 8,
        length: int = IMAGENET,
        classes: Sequence[str] | None = None,
    ) -> None:
        numbers = {
            "image_size": image_size,
            "num_classes": num_classes,
            "latent_channels": latent_channels,
            "downsample_factor": downsample_factor,
            "length": length,
        }
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if image_size % downsample_factor:
            raise ValueError(f"image_size={image_size}: must be divisible by {downsample_factor}")
        self.image_size = image_size
        self.channels = latent_channels
        self.latent_size = image_size // downsample_factor
        self.length = length
        names = [str(label) for label in range(num_classes)]
        self.classes, self._renumbered = renumbering("data='synthetic'", names, classes)
        shape = (DIFFERENT, self.channels, self.latent_size, self.latent_size)
        self._latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        index, _ = split_key(key, len(self))
        latents = self._latents[index % DIFFERENT].clone()
        return latents, self._renumbered[index % len(self.classes)]
