"""xFormers' `memory_efficient_attention`, an optional package that chooses among several kernels itself.

The calls are tested against stand-ins; on a GPU they were not run.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from .limits import HALF, Described, dense, empty, is_installed, limits

# What was asked for and found.
_found: dict[str, object] = {}


def reasons_not_usable(q: Described, k: Described, v: Described) -> list[str]:
    """16 and 32 bits with rows of whole 16 bytes, head_dim up to 256, compute capability 7.5 on, and the package.

    The package is imported when nothing else stands against it.
    """
    dtypes, multiple = (*HALF, torch.float32), 4 if q.dtype is torch.float32 else 8
    reasons = limits(q, dtypes=dtypes, multiple=multiple, largest=256, capability=(7, 5))
    reasons += empty(q, k)
    if not is_installed("xformers"):
        reasons.append("the package xformers is not installed")
    if reasons:
        return reasons
    try:
        _found["function"] = importlib.import_module("xformers.ops").memory_efficient_attention
    except (ImportError, OSError, AttributeError) as error:
        return [f"xformers.ops cannot be used: {error}"]
    return []


def is_deterministic(q: Described) -> bool:
    """It promises none."""
    return False


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, deterministic: bool = True
) -> Tensor:
    function = _found["function"]
    assert callable(function)
    return function(dense(q), dense(k), dense(v), scale=scale)
