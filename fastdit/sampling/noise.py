"""Where the noise of sampling comes from: always the same numbers for the same seed, whatever runs beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Noise(Protocol):
    """The noise of one block of images, drawn in order: first x_T, then that of every step."""

    def start(self) -> Tensor:
        """x_T, (N, C, H, W)."""

    def step(self, out: Tensor) -> None:
        """The noise of the next step, into `out` (N, C, H, W)."""


class BlockNoise:
    """From one generator for a whole block; a block that is not full draws for a full one, and leaves the rest."""

    def __init__(
        self, generator: torch.Generator, shape: tuple[int, ...], count: int, dtype: torch.dtype
    ) -> None:
        self.generator, self.shape, self.count, self.dtype = generator, shape, count, dtype

    def start(self) -> Tensor:
        drawn = torch.randn(
            self.shape, generator=self.generator, device=self.generator.device, dtype=self.dtype
        )
        return drawn[: self.count]

    def step(self, out: Tensor) -> None:
        out.copy_(self.start())


class SampleNoise:
    """From one generator for each image, so that an image does not depend on those it is drawn with."""

    def __init__(
        self, generators: Sequence[torch.Generator], shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.generators, self.shape, self.dtype = generators, shape, dtype

    def start(self) -> Tensor:
        return torch.stack(
            [
                torch.randn(self.shape, generator=each, device=each.device, dtype=self.dtype)
                for each in self.generators
            ]
        )

    def step(self, out: Tensor) -> None:
        for row, each in zip(out, self.generators, strict=True):
            row.copy_(torch.randn(self.shape, generator=each, device=each.device, dtype=self.dtype))


def block_generator(seed: int, block: int, device: torch.device) -> torch.Generator:
    """The source of all noise of a block: seeded with 64 bits of NumPy's SeedSequence([seed, block]).

    The hash keeps the blocks of seed 0 apart from those of seed 1, which seed + block would not.
    """
    hashed = np.random.SeedSequence([seed, block]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(hashed[0]))


def sample_generator(seed: int, device: torch.device) -> torch.Generator:
    """The source of all noise of an image that has a seed of its own, by NumPy's SeedSequence([seed])."""
    hashed = np.random.SeedSequence([seed]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(hashed[0]))
