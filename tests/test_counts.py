"""Tests that need a GPU are not seen to run here, so that their number is held: one that vanishes is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.counts import GPU_TESTS

COUNTS = Path(__file__).parent / "counts.json"


def test_no_gpu_test_vanishes(request: pytest.FixtureRequest) -> None:
    """After a change of their number: write the number that this test names into counts.json."""
    found = request.config.stash[GPU_TESTS]
    if [Path(a).name for a in request.config.args] != ["tests"]:
        pytest.skip("only some of the tests were collected")
    assert found == json.loads(COUNTS.read_text())["gpu"], f"{found} tests are marked gpu"
