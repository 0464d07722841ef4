"""The devices that graphs are tested on: the CPU, where recordings stand for them, and a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastdit.sampling.engine import Engine

from .recording import Recording


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """In place of CUDA graphs; all that are made."""
    monkeypatch.setattr(Engine, "capture", Recording)
    monkeypatch.setattr(Recording, "made", [])
    monkeypatch.setattr(Recording, "fail", False)
    return Recording.made


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """With recordings on the CPU, with CUDA graphs on a GPU."""
    if request.param == "cpu":
        request.getfixturevalue("recordings")
    yield request.param
    if request.param == "cuda":
        torch.cuda.synchronize()  # an illegal access belongs to the test that made it
