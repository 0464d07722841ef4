"""Real images that need no download: the handwritten digits that scikit-learn ships."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .classes import renumbering
from .sampler import Key, split_key


class Digits(Dataset[tuple[Tensor, int]]):
    """1,797 handwritten digits of 8x8 pixels (UCI "Optical Recognition of Handwritten Digits", test part).

    `dataset[index]` and `dataset[index, epoch]` give (image float32 (1, 8, 8) in [-1, 1], label); no digit is ever
    flipped, so that the epoch changes nothing. `images` (1797, 1, 8, 8) and `labels` (1797,) hold all of them.
    `classes` are the names that a checkpoint was trained with, if any: labels are their positions in it.

    Raises ImportError without scikit-learn, and ValueError for other classes.
    """

    space = "pixels"
    image_size = 8
    channels = 1

    def __init__(self, *, classes: Sequence[str] | None = None) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                'The built-in digits need scikit-learn: pip install "fastdit[demo]"'
            ) from error
        pixels, labels = load_digits(return_X_y=True)
        names = [str(digit) for digit in range(10)]
        self.classes, renumbered = renumbering("data='digits'", names, classes)
        # Pixels are whole numbers from 0 to 16, so that this is exact.
        self.images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
        self.labels = torch.tensor(renumbered)[torch.from_numpy(labels).long()]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        index, _ = split_key(key, len(self))
        return self.images[index], int(self.labels[index])
