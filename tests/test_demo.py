"""The demo, in a few steps: everything is written, and its two measurements measure what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdit import cli, demo
from fastdit.data import Digits
from fastdit.sampling import to_uint8
from fastdit.weights import from_pretrained


@pytest.fixture(scope="module")
def real() -> tuple[np.ndarray, np.ndarray]:
    digits = Digits()
    return to_uint8(digits.images), digits.labels.numpy()


def test_a_short_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "SAMPLING_STEPS", 2)
    folder = tmp_path / "runs" / "demo"
    demo.demo(folder, steps=12)
    (folder / "leftover").touch()
    report = demo.demo(folder, steps=10)  # an earlier demo is replaced
    assert not (folder / "leftover").exists()

    assert {path.name for path in folder.iterdir()} >= {
        *("config.json", "metrics.jsonl", "loss.png", "checkpoints"),
        *("samples.png", "demo.png", "report.md", "report.json"),
    }
    assert report == json.loads((folder / "report.json").read_text())
    assert report["steps"] == 10
    assert report["samples"] == 100
    assert report["parameters"] == sum(p.numel() for p in from_pretrained(folder).parameters())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert report["loss"] == metrics[-1]["loss"]  # the last tenth of ten lines

    text = (folder / "report.md").read_text()
    assert text in capsys.readouterr().out
    for told in (f"{report['parameters']:,}", f"{report['loss']:.3f}", f"sample {folder}"):
        assert told in text
    with Image.open(folder / "samples.png") as grid:
        assert grid.size == (534, 534)
    with Image.open(folder / "demo.png") as picture:
        assert picture.size == (900, 582)


def test_the_same_demo_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SAMPLING_STEPS", 2)
    first, second = (demo.demo(tmp_path / name, steps=2) for name in "ab")
    timed = ("run", "training_seconds", "steps_per_second", "sampling_seconds")
    assert {k: v for k, v in first.items() if k not in timed} == {
        k: v for k, v in second.items() if k not in timed
    }
    assert (tmp_path / "a/samples.png").read_bytes() == (tmp_path / "b/samples.png").read_bytes()


@pytest.mark.parametrize("content", [None, "[]", "{", '{"data": "digits", "hidden_size": 64}'])
def test_other_folders_are_not_replaced(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "thesis.tex").touch()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileExistsError, match="holds something else than an earlier demo"):
        demo.demo(tmp_path, steps=2)
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_missing_is_known_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "missing_packages", lambda: ["matplotlib"])
    with pytest.raises(ImportError, match=r'matplotlib: pip install "fastdit\[demo\]"'):
        demo.demo(tmp_path, steps=2)
    assert not list(tmp_path.iterdir())


def test_label_agreement(real: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = real
    assert demo.label_agreement(images, labels) > 0.99
    wrong = labels.copy()
    wrong[:300] = (wrong[:300] + 1) % 10
    share = 300 / len(labels)
    assert abs(demo.label_agreement(images, wrong) - (1 - share)) < 0.01
    assert demo.label_agreement(255 - images, labels) < 0.5  # ink and paper are not the same


def test_copies_are_found(real: tuple[np.ndarray, np.ndarray]) -> None:
    images, _ = real
    found = demo.nearest_neighbours(images[:50])
    assert found["median_to_real"] == pytest.approx(
        0, abs=1e-4
    )  # sqrt of the rounding of sums near 1e4
    assert found["share_nearer_than_closest_real_pair"] == 1


def test_distances_by_hand(real: tuple[np.ndarray, np.ndarray]) -> None:
    images, _ = real
    noise = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    pixels = torch.from_numpy(images.reshape(-1, 64) / 255 * 16)
    to_real = torch.cdist(torch.from_numpy(noise.reshape(-1, 64) / 255 * 16), pixels).amin(1)
    between = (torch.cdist(pixels, pixels) + 1e9 * torch.eye(len(pixels))).amin(1)
    found = demo.nearest_neighbours(noise)
    assert found["median_to_real"] == pytest.approx(float(np.median(to_real)))
    assert found["median_between_real"] == pytest.approx(float(np.median(between)))
    assert found["share_nearer_than_closest_real_pair"] == 0
    assert found["median_to_real"] > found["median_between_real"]


@pytest.mark.slow
def test_the_full_demo_draws_what_is_asked_for(tmp_path: Path) -> None:
    report = demo.demo(tmp_path / "demo")
    assert report["label_agreement"] >= 0.95
    # Not copies: drawn digits are as far from the real ones as those are from each other.
    assert report["neighbours"]["share_nearer_than_closest_real_pair"] <= 0.01
    assert (
        report["neighbours"]["median_to_real"] > 0.9 * report["neighbours"]["median_between_real"]
    )

    out = tmp_path / "digits.npz"
    cli.main(
        ["sample", str(tmp_path / "demo"), "--num", "500", "--cfg-scale", "2", "--out", str(out)]
    )
    with np.load(out) as opened:
        images, labels = opened["arr_0"], opened["arr_1"]
    assert np.bincount(labels).tolist() == [50] * 10
    assert demo.label_agreement(images, labels) >= 0.95
