"""cuDNN's attention, through torch's `scaled_dot_product_attention` restricted to it.

Its backward is not deterministic in torch, whatever cuDNN could do, and torch refuses it under
`torch.use_deterministic_algorithms(True)` (torch's notes on reproducibility).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import sdpa
from .limits import HALF, Described, dense, empty, limits, refusal


def reasons_not_usable(q: Described, k: Described, v: Described) -> list[str]:
    """It takes float16 and bfloat16, head_dim in multiples of 8 up to 128, from compute capability 8.0 on."""
    reasons = limits(q, dtypes=HALF, multiple=8, largest=128, capability=(8, 0))
    if torch.are_deterministic_algorithms_enabled():
        reasons.append("torch.use_deterministic_algorithms(True) excludes it")
    reasons += empty(q, k)
    return reasons or refusal(torch.backends.cuda.can_use_cudnn_attention, q, k, v)


def is_deterministic(q: Described) -> bool:
    return False


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, deterministic: bool = True
) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa.attention(dense(q), dense(k), dense(v), scale)
