"""Every test of an operation runs twice: in plain torch, and through the registered operator with its own backward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .helpers import fill_native


@pytest.fixture(params=["plain", "operator"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Which way the public function of the test module's `MODULE` takes."""
    calls = []
    if request.param == "operator":
        calls = fill_native(monkeypatch, request.module.MODULE)
    yield request.param
    assert bool(calls) == (request.param == "operator")
