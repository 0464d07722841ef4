"""The order of batches: every index once per epoch, and the same after a resume."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest

from fastdit.data import EpochBatchSampler
from fastdit.data.sampler import derived_seed, split_key


def batches(count: int, **options: Any) -> list[list[tuple[int, int]]]:
    options = {"num_items": 23, "batch_size": 5, "seed": 0, **options}
    num_items, batch_size = options.pop("num_items"), options.pop("batch_size")
    return list(islice(EpochBatchSampler(num_items, batch_size, **options), count))


def test_every_index_at_most_once_per_epoch() -> None:
    for epoch in range(3):
        keys = [key for batch in batches(12)[4 * epoch : 4 * epoch + 4] for key in batch]
        assert {epoch_of for _, epoch_of in keys} == {epoch}
        indices = [index for index, _ in keys]
        assert len(set(indices)) == 20
        assert set(indices) <= set(range(23))


def test_every_index_once_where_batches_fill_the_epoch() -> None:
    keys = [key for batch in batches(10, num_items=20, batch_size=4) for key in batch]
    assert sorted(keys) == [(index, epoch) for index in range(20) for epoch in range(2)]


def test_epochs_and_seeds_have_their_own_order() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        batch = batches(epoch + 1, num_items=50, batch_size=50, seed=seed)[epoch]
        return tuple(index for index, _ in batch)

    # A seed that is seed + epoch would give only five different orders.
    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9
    assert order(0, 0) != tuple(range(50))


@pytest.mark.parametrize("start_step", [1, 3, 4, 5, 8, 11])
def test_resumed_order_is_the_uninterrupted_one(start_step: int) -> None:
    assert batches(15 - start_step, start_step=start_step) == batches(15)[start_step:]


@pytest.mark.parametrize("size", [2, 3])
def test_parts_of_all_processes_are_the_batch(size: int) -> None:
    whole = batches(7, batch_size=6)
    parts = [batches(7, batch_size=6, rank=rank, size=size) for rank in range(size)]
    for batch, each in zip(whole, zip(*parts, strict=True), strict=True):
        assert [key for part in each for key in part] == batch


def test_start_at_a_far_step_is_immediate() -> None:
    [batch] = batches(1, start_step=4 * 10**12 + 1)
    assert {epoch for _, epoch in batch} == {10**12}


def test_iterating_again_starts_again() -> None:
    sampler = EpochBatchSampler(23, 5, seed=0, start_step=2)
    assert list(islice(sampler, 5)) == list(islice(sampler, 5))


def test_steps_per_epoch() -> None:
    assert EpochBatchSampler(23, 5, seed=0).steps_per_epoch == 4
    assert EpochBatchSampler(5, 5, seed=0).steps_per_epoch == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_items": 4}, r"num_items=4 .*batch_size=5"),
        ({"num_items": 0}, r"num_items=0: .*empty"),
        ({"batch_size": 0}, r"batch_size=0: "),
        ({"start_step": -1}, r"start_step=-1: "),
    ],
)
def test_bad_arguments(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(1, **options)


def test_derived_seeds_differ() -> None:
    numbers = [(a, b) for a in range(20) for b in range(20)] + [(1, 2, 3), (1, 23)]
    seeds = [derived_seed(*pair) for pair in numbers]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Runs resume on other versions of everything: these numbers may never change.
    assert derived_seed(0, 0) == 5046677104938694277


@pytest.mark.parametrize(("key", "expected"), [(3, (3, 0)), ((3, 7), (3, 7)), ((0, 0), (0, 0))])
def test_keys(key: Any, expected: tuple[int, int]) -> None:
    assert split_key(key, 4) == expected


@pytest.mark.parametrize("key", [4, -1, (4, 0), (-1, 3)])
def test_keys_out_of_range(key: Any) -> None:
    with pytest.raises(IndexError, match="allowed are 0 to 3"):
        split_key(key, 4)
