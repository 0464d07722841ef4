"""Runs of these tests draw no pictures unless they ask for them: that takes longer than the training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdit.training import plots


@pytest.fixture
def pictures() -> None:
    """Ask for this to have the pictures drawn."""


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(plots, "missing_packages", lambda: ["matplotlib"])


@pytest.fixture
def folder_of_images(tmp_path: Path) -> Path:
    """20 RGB images of 12x10 pixels in the classes ant, bee and cat."""
    random = np.random.default_rng(0)
    root = tmp_path / "images"
    for name, count in {"ant": 7, "bee": 7, "cat": 6}.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = random.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root
