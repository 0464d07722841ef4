"""No test reads or writes the user's measurements, and every test chooses anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastdit.attention import choice, registry


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "_answers", {})
    monkeypatch.setattr(choice, "_said", set())
    monkeypatch.setattr(registry, "_read", {})
    # NaN and Inf are a part of what the kernels compute with; numpy, in which the interpreter computes, would warn.
    with np.errstate(all="ignore"):
        yield
