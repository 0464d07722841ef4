"""The specification, in plain torch: every dtype, every device, T * S numbers a head kept for the backward."""

from __future__ import annotations

from torch import Tensor

from ..reference import operations
from .limits import Described


def reasons_not_usable(q: Described, k: Described, v: Described) -> list[str]:
    return []


def is_deterministic(q: Described) -> bool:
    return True


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, deterministic: bool = True
) -> Tensor:
    return operations.attention(q, k, v, scale=scale)
