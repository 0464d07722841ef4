"""Every test of an operation runs twice: in plain torch, and through the registered operator with its own backward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .helpers import fill_native


@pytest.fixture(params=["plain", "operator"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Which way the public function of the test module's `MODULE` takes."""
    empty = request.node.callspec.params.get("size") == (0, 4, 8)
    if empty and request.param == "operator" and "layer_norm" in request.module.__name__:
        request.applymarker(
            pytest.mark.xfail(strict=True, reason="var_mean warns of an empty batch")
        )
    calls = []
    if request.param == "operator":
        calls = fill_native(monkeypatch, request.module.MODULE)
    yield request.param
    assert bool(calls) == (request.param == "operator")
