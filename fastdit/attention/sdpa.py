"""torch's `scaled_dot_product_attention` with torch's own choice of a kernel; it takes everything, everywhere.

On CUDA its choice is cuDNN's, flash's, the memory-efficient kernel or plain matrix products, by device and version.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .limits import Described


def reasons_not_usable(q: Described, k: Described, v: Described) -> list[str]:
    """None: it has plain matrix products for what no fused kernel takes."""
    return []


def is_deterministic(q: Described) -> bool:
    """On CUDA only under `torch.use_deterministic_algorithms(True)`, which excludes cuDNN's backward."""
    return q.device.type != "cuda" or torch.are_deterministic_algorithms_enabled()


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, deterministic: bool = True
) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
