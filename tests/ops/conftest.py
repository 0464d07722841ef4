"""The ways that a test of an operation runs: see `every_way` in helpers.py."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import fastdit

from .helpers import fill_native, watch_kernels


# First, before they are counted.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No kernel computes in float64: that cases of a kernel in float64 are refused has a test of its own."""
    items[:] = [item for item in items if not _is_kernel_in_float64(item)]


def _is_kernel_in_float64(item: pytest.Item) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return (
        parameters.get("way") in ("interpreter", "cuda")
        and parameters.get("dtype") is torch.float64
    )


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Which way the public function of the test module's `MODULE` takes."""
    way: str = request.param
    calls: list[str] = []
    if way == "operator":
        calls = fill_native(monkeypatch, request.module.MODULE)
    elif way in ("interpreter", "cuda"):
        calls = watch_kernels(monkeypatch, request.module.MODULE)
    with (
        fastdit.use_backend("triton" if way in ("interpreter", "cuda") else "auto"),
        torch.device("cuda" if way == "cuda" else "cpu"),
        # NaN and Inf are part of the tests; numpy, in which the interpreter computes, would warn.
        np.errstate(all="ignore"),
    ):
        yield way
    assert bool(calls) == (way != "plain")
