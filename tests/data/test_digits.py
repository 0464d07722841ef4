"""The built-in digits."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch

from fastdit.data import Digits

sklearn_datasets = pytest.importorskip("sklearn.datasets")


def test_digits_are_scikit_learns_in_the_range_of_the_model() -> None:
    digits = Digits()
    raw = sklearn_datasets.load_digits()
    assert len(digits) == 1797
    assert digits.classes == ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
    for index in (0, 1, 900, 1796):
        image, label = digits[index]
        assert image.dtype == torch.float32
        assert image.shape == (digits.channels, digits.image_size, digits.image_size) == (1, 8, 8)
        assert torch.equal((image[0].double() + 1) * 8, torch.from_numpy(raw.images[index]))
        assert label == raw.target[index]
    assert digits.images.min() == -1
    assert digits.images.max() == 1
    assert digits.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_epoch_changes_nothing() -> None:
    digits = Digits()
    for epoch in range(5):
        image, label = digits[7, epoch]
        assert torch.equal(image, digits[7][0])
        assert label == digits[7][1]


def test_index_out_of_range() -> None:
    with pytest.raises(IndexError, match="index=1797: allowed are 0 to 1796"):
        Digits()[1797]


def test_pickle() -> None:
    copy = pickle.loads(pickle.dumps(Digits()))  # noqa: S301
    assert torch.equal(copy.images, Digits().images)


def test_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "fastdit\[demo\]"'):
        Digits()
