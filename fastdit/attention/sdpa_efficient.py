"""torch's memory-efficient attention, through `scaled_dot_product_attention` restricted to it: old GPUs, float32.

Its backward may split the keys and then sums in any order, unless `torch.use_deterministic_algorithms(True)`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import sdpa
from .limits import HALF, Described, dense, empty, limits, refusal


def reasons_not_usable(q: Described, k: Described, v: Described) -> list[str]:
    """It takes 16 and 32 bits with rows of whole 16 bytes, from compute capability 5.0 on."""
    dtypes, multiple = (*HALF, torch.float32), 4 if q.dtype is torch.float32 else 8
    reasons = limits(q, dtypes=dtypes, multiple=multiple, largest=1 << 16, capability=(5, 0))
    reasons += empty(q, k)
    return reasons or refusal(torch.backends.cuda.can_use_efficient_attention, q, k, v)


def is_deterministic(q: Described) -> bool:
    return sdpa.is_deterministic(q)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, deterministic: bool = True
) -> Tensor:
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return sdpa.attention(dense(q), dense(k), dense(v), scale)
