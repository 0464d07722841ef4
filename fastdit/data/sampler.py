"""Which item is in which batch: a pure function of (seed, step), so that a run resumes exactly where it stopped."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator
from typing import SupportsIndex

import torch
from torch.utils.data import Sampler

Key = SupportsIndex | tuple[SupportsIndex, SupportsIndex]
"""How a dataset of this package is indexed: an index (of epoch 0), or a pair (index, epoch)."""


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Endless global batches of `(index, epoch)` keys, to be given to a DataLoader as `batch_sampler`.

    Each epoch is a permutation of `num_items` indices, drawn from (seed, epoch) alone; the `num_items % batch_size`
    indices at its end are left out. Step s takes batch `s % steps_per_epoch` of epoch `s // steps_per_epoch`, and
    `start_step=s` begins there without replaying what came before. Of `size` processes each gives the batches' keys
    of its own: the one of `rank` the rank-th part of every batch.

    Raises ValueError where `num_items` is 0 or smaller than `batch_size`: no batch would ever be full; and where
    `batch_size` is not divisible by `size`.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        *,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        if num_items < 1:
            raise ValueError(f"num_items={num_items}: the dataset is empty")
        if num_items < batch_size:
            raise ValueError(
                f"num_items={num_items} is smaller than batch_size={batch_size}: no batch would ever be full;"
                f" use a batch_size of at most {num_items}"
            )
        if start_step < 0:
            raise ValueError(f"start_step={start_step}: must be at least 0")
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        if batch_size % size:
            raise ValueError(
                f"batch_size={batch_size}: must be divisible by the number of processes, {size}"
            )
        self.part = slice(rank * batch_size // size, (rank + 1) * batch_size // size)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_items // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, first = divmod(self.start_step, self.steps_per_epoch)
        while True:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
            order = torch.randperm(self.num_items, generator=generator)
            for batch in range(first, self.steps_per_epoch):
                indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
                yield [(index, epoch) for index in indices[self.part].tolist()]
            epoch, first = epoch + 1, 0


def derived_seed(*numbers: int) -> int:
    """A seed in [0, 2**63) that is a hash of `numbers`.

    Not their sum: epoch 1 of seed 0 must not be epoch 0 of seed 1.
    """
    text = ",".join(str(operator.index(number)) for number in numbers)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def is_flipped(seed: int, epoch: int, index: int) -> bool:
    """Whether an item is mirrored in an epoch: half of them are. Pixels and stored latents share this rule."""
    return derived_seed(seed, epoch, index) % 2 == 1


def split_key(key: Key, length: int) -> tuple[int, int]:
    """`(index, epoch)` of a dataset's key. Raises IndexError outside of [0, length)."""
    index, epoch = key if isinstance(key, tuple) else (key, 0)
    index, epoch = operator.index(index), operator.index(epoch)
    if not 0 <= index < length:
        raise IndexError(f"index={index}: allowed are 0 to {length - 1}")
    return index, epoch
