"""torch's flash attention, through `scaled_dot_product_attention` restricted to it; on CPU torch has one, too.

On CUDA it is FlashAttention-2, which sums dq by atomics, in any order, unless
`torch.use_deterministic_algorithms(True)`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import sdpa
from .limits import HALF, Described, dense, empty, limits, refusal


def reasons_not_usable(q: Described, k: Described, v: Described) -> list[str]:
    """On CUDA float16 and bfloat16, head_dim up to 256, from compute capability 8.0 on; on CPU any floats."""
    if q.device.type == "cpu":
        wide = (torch.float32, torch.float64)
        return [*limits(q, dtypes=(*HALF, *wide), largest=1 << 16), *empty(q, k)]
    reasons = limits(q, dtypes=HALF, largest=256, capability=(8, 0)) + empty(q, k)
    return reasons or refusal(torch.backends.cuda.can_use_flash_attention, q, k, v)


def is_deterministic(q: Described) -> bool:
    return sdpa.is_deterministic(q)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, deterministic: bool = True
) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa.attention(dense(q), dense(k), dense(v), scale)
