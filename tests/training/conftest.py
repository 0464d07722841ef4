"""Runs of these tests draw no pictures unless they ask for them: that takes longer than the training."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdit.training import plots

from .helpers import write_images


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
    return write_images(tmp_path / "images")
