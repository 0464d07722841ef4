"""Multi-head attention: `softmax(scale * q k^T) v` per head, no mask, no dropout.

q (N, T, H, K), k and v (N, S, H, K) in one dtype and on one device, out (N, T, H, K); any K, DiT-XL's 72 included. It
runs in torch's `scaled_dot_product_attention`, which takes the fastest exact kernel it has for the device (flash
attention where there is one), or with `use_backend("reference")` in the specification.

Source: Vaswani et al. 2017, section 3.2; Dao et al. 2022 (FlashAttention).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..backend import active_backend
from ..reference import operations as reference
from ..validation import require_floating, require_same_device


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """`softmax(scale * q k^T) v`; q (N, T, H, K), k and v (N, S, H, K), out (N, T, H, K); scale defaults to K ** -0.5.

    Raises TypeError for tensors that are not dense and floating-point or of different dtypes; ValueError for other
    shapes or tensors on different devices.
    """
    for argument, tensor in (("q", q), ("k", k), ("v", v)):
        require_floating(argument, tensor)
        if tensor.dtype != q.dtype:
            raise TypeError(f"{argument}: expected the dtype of q, {q.dtype}, got {tensor.dtype}")
    n, _, heads, head_dim = q.shape if q.dim() == 4 else (0, 0, 0, 0)
    shapes = tuple(tuple(tensor.shape) for tensor in (q, k, v))
    if (
        q.dim() != 4
        or k.shape != v.shape
        or k.dim() != 4
        or shapes[1] != (n, k.shape[1], heads, head_dim)
    ):
        raise ValueError(
            f"q, k, v: expected shapes (N, T, H, K), (N, S, H, K), (N, S, H, K), "
            f"got {shapes[0]}, {shapes[1]}, {shapes[2]}"
        )
    require_same_device(q=q, k=k, v=v)
    if active_backend() == "reference":
        return reference.attention(q, k, v, scale=scale)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
