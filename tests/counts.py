"""How many tests need a GPU, counted when they are collected: see test_counts.py."""

from __future__ import annotations

import pytest

GPU_TESTS = pytest.StashKey[int]()
