"""Latents that are random numbers."""

from __future__ import annotations

import pickle

import pytest
import torch

from fastdit.data import Synthetic
from tests.data.helpers import require_workers_and_a_resume_change_nothing


def test_items_are_normal_numbers_in_the_shape_of_latents() -> None:
    data = Synthetic(256)
    assert (data.space, data.moments, data.vae) == ("latents", False, None)
    assert (data.image_size, data.latent_size, data.channels, len(data)) == (256, 32, 4, 1_281_167)
    assert data.classes == [str(label) for label in range(1000)]
    items = torch.stack([data[index][0] for index in range(50)])
    assert items.shape == (50, 4, 32, 32)
    assert items.dtype == torch.float32
    # 204,800 numbers: five standard errors of the mean, and of the standard deviation.
    assert abs(items.mean()) < 5 / 204_800**0.5
    assert abs(items.std() - 1) < 5 / (2 * 204_800) ** 0.5


def test_items_are_a_function_of_the_index() -> None:
    data, other = Synthetic(32, num_classes=3, length=7), Synthetic(32, num_classes=3, length=9)
    for index in range(7):
        assert torch.equal(data[index][0], other[index, 5][0])
        assert data[index][1] == index % 3
    assert len({tuple(data[index][0].flatten().tolist()) for index in range(7)}) == 7
    with pytest.raises(IndexError, match="index=7: allowed are 0 to 6"):
        data[7]


def test_what_is_done_to_an_item_stays_with_it() -> None:
    data = Synthetic(32, length=5000)
    before = data[3][0].clone()
    data[3][0].zero_()
    assert torch.equal(data[3][0], before)
    latents, label = data[3 + 1021]
    assert torch.equal(latents, before)
    assert label == 24


def test_pickle() -> None:
    data = Synthetic(32, length=7)
    assert torch.equal(pickle.loads(pickle.dumps(data))[3][0], data[3][0])  # noqa: S301


# Python 3.12 warns of every fork in a process with threads, and torch has threads.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_and_a_resume_change_nothing() -> None:
    require_workers_and_a_resume_change_nothing(Synthetic(32, length=13))


@pytest.mark.parametrize("count", [1, 1001])
def test_any_number_of_classes(count: int) -> None:
    assert len(Synthetic(32, num_classes=count).classes) == count


def test_stored_classes() -> None:
    assert Synthetic(32, num_classes=3, classes=["2", "0", "1"])[3][1] == 1
    with pytest.raises(
        ValueError, match=r"data='synthetic' does not have the 3 .*missing none; extra '3'"
    ):
        Synthetic(32, num_classes=4, classes=["0", "1", "2"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": 36}, "image_size=36: must be divisible by 8"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"latent_channels": 0}, "latent_channels=0"),
        ({"downsample_factor": 0}, "downsample_factor=0"),
        ({"length": 0}, "length=0"),
    ],
)
def test_bad_arguments(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Synthetic(**options)
