"""The operations of a Diffusion Transformer in plain torch: the specification.

Every faster implementation is held against these functions. They follow the dtype of their inputs, so the same
function called on float64 inputs is the oracle, and on bfloat16 inputs the error that plain torch makes. The
`*_forward` and `*_backward` functions state what a fused kernel saves and returns; autograd of the plain function is
their specification.

Shapes: N batch, T tokens, D hidden, H heads, K head_dim, C channels, P patch. `shift`, `scale` and `gate` are (N, D),
one vector a sample, or (D,), one for all.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def per_token(vector: Tensor) -> Tensor:
    """(N, D) -> (N, 1, D), (D,) as it is: a modulation vector that broadcasts over the tokens of its sample."""
    return vector.unsqueeze(1) if vector.dim() == 2 else vector


def layer_norm_modulate(
    x: Tensor,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`LN(x) * (1 + scale) + shift`, LN without affine parameters over the last dimension; (N, T, D) -> (N, T, D).

    `shift` and `scale` may both be None: plain LN. The result has `out_dtype`, by default the dtype of `x`.
    """
    h = F.layer_norm(x, x.shape[-1:], eps=eps)
    if shift is not None and scale is not None:
        h = h * (1 + per_token(scale)) + per_token(shift)
    return h.to(out_dtype or x.dtype)


def gated_residual(x: Tensor, branch: Tensor, *, gate: Tensor | None = None) -> Tensor:
    """`x + gate * branch`, gate None meaning 1; (N, T, D) -> (N, T, D) in the dtype of `x`."""
    if gate is not None:
        branch = per_token(gate) * branch
    return (x + branch).to(x.dtype)


def gated_residual_layer_norm_modulate(
    x: Tensor,
    branch: Tensor,
    *,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The seam between two branches: `x_new = x + gate * (branch + bias)`, `h = LN(x_new) * (1 + scale) + shift`.

    `x_new` has the dtype of `x` (the residual stream), `h` that of `branch` (what the matrix products compute in).
    `bias` (D,) is that of the linear layer which made `branch`, where the layer has not added it itself.
    """
    x_new = gated_residual(x, branch if bias is None else branch + bias, gate=gate)
    return x_new, layer_norm_modulate(
        x_new, shift=shift, scale=scale, eps=eps, out_dtype=branch.dtype
    )


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """(N, C, H*P, W*P) -> (N, H*W, C*P*P): tokens row by row, features in the order of a convolution's weight."""
    n, c, height, width = x.shape
    p = patch_size
    x = x.reshape(n, c, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(n, (height // p) * (width // p), c * p * p)


def unpatchify(tokens: Tensor, patch_size: int, out_channels: int, grid: tuple[int, int]) -> Tensor:
    """(N, H*W, P*P*C) -> (N, C, H*P, W*P). Features are (row, column, channel), unlike `patchify`'s."""
    n, (h, w), p, c = tokens.shape[0], grid, patch_size, out_channels
    x = tokens.reshape(n, h, w, p, p, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, c, h * p, w * p)


def mlp_gelu(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """`gelu(x w1^T + b1) w2^T + b2` with the tanh form of GELU; (..., D) -> (..., D), w1 (F, D), w2 (D, F)."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """`softmax(scale * q k^T) v` per head, no mask; q (N, T, H, K), k and v (N, S, H, K) -> (N, T, H, K).

    `scale` defaults to `K ** -0.5` (Vaswani et al. 2017, section 3.2.1).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = torch.einsum("nthk,nshk->nhts", q * scale, k).softmax(dim=-1)
    return torch.einsum("nhts,nshk->nthk", weights, v)


# What a fused implementation saves for its backward, and the backward itself.


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def layer_norm_modulate_forward(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_norm_modulate`, and what its backward needs: mean and 1/std of every row, (N, T), float32 or float64."""
    h = layer_norm_modulate(x, shift=shift, scale=scale, eps=eps, out_dtype=out_dtype)
    rows = x.to(_statistics_dtype(x))
    mean = rows.mean(dim=-1)
    variance = (rows - mean.unsqueeze(-1)).square().mean(dim=-1)
    return h, mean, torch.rsqrt(variance + eps)


def sum_to(gradient: Tensor, like: Tensor) -> Tensor:
    """Sums a gradient of shape (N, T, D) over the tokens (and samples) that shared a vector of (N, D) or (D,)."""
    over = (1,) if like.dim() == 2 else (0, 1)
    return gradient.sum(over).to(like.dtype)


def layer_norm_modulate_backward(
    dh: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `layer_norm_modulate` by x, shift and scale.

    With xhat = (x - mean) rstd and g = dh (1 + scale): dx = rstd (g - mean_D(g) - xhat mean_D(g xhat)),
    dshift = sum_T dh, dscale = sum_T dh xhat.
    """
    dtype = _statistics_dtype(x)
    dh = dh.to(dtype)
    xhat = (x.to(dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    g = dh if scale is None else dh * (1 + per_token(scale.to(dtype)))
    dx = g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)
    dshift = None if shift is None else sum_to(dh, shift)
    dscale = None if scale is None else sum_to(dh * xhat, scale)
    return (dx * rstd.unsqueeze(-1)).to(x.dtype), dshift, dscale


def gated_residual_backward(
    dx: Tensor, branch: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `gated_residual` by branch (gate dx) and gate (sum_T dx branch); that by x is `dx` itself."""
    if gate is None:
        return dx.to(branch.dtype), None
    dtype = _statistics_dtype(dx)
    dx = dx.to(dtype)
    dbranch = (dx * per_token(gate.to(dtype))).to(branch.dtype)
    return dbranch, sum_to(dx * branch.to(dtype), gate)


def mlp_gelu_forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`mlp_gelu`, and the pre-activation (..., F), from which the backward recomputes the activation."""
    pre_activation = F.linear(x, w1, b1)
    return F.linear(F.gelu(pre_activation, approximate="tanh"), w2, b2), pre_activation


def mlp_gelu_backward(
    dout: Tensor, w1: Tensor, w2: Tensor, pre_activation: Tensor, *, with_weights: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `mlp_gelu` by x, by the pre-activation, and, `with_weights`, by b1, w2 and b2.

    That by w1 is the product of the second, transposed, and x.
    """
    dpre = torch.ops.aten.gelu_backward(dout @ w2, pre_activation, approximate="tanh")
    if not with_weights:
        return dpre @ w1, dpre, None, None, None
    activation = F.gelu(pre_activation, approximate="tanh")
    dout_rows = dout.reshape(-1, dout.shape[-1])
    dw2 = dout_rows.mT @ activation.reshape(-1, activation.shape[-1])
    return dpre @ w1, dpre, dpre.reshape(-1, dpre.shape[-1]).sum(0), dw2, dout_rows.sum(0)
