"""The kernel of `kernels/attention.py`. Its operator and its backward are in `fastdit/ops/attention.py`, which runs it.

It reads a packed projection through strides, writes the gradient of one packed, and has no atomics.
"""

from __future__ import annotations

import torch

from .. import backend
from .limits import HALF, Described, limits


def reasons_not_usable(q: Described, k: Described, v: Described) -> list[str]:
    """It takes 16 and 32 bits and head_dim in multiples of 8 up to 128, on CUDA or in Triton's interpreter."""
    reasons = backend.reasons_not_usable("triton", q.device.type)
    reasons += limits(q, dtypes=(*HALF, torch.float32), multiple=8, largest=128)
    if not k.shape[1] and 0 not in q.shape:
        reasons.append(f"k {tuple(k.shape)}: there is nothing to attend to")
    return reasons


def is_deterministic(q: Described) -> bool:
    return True
