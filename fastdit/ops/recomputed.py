"""A seam together with what follows it, so that its normalised output is not kept for the backward but made again.

- `layer_norm_modulate_linear`: `h w^T + b` with `h = LN(x) * (1 + scale) + shift`;
- `gated_residual_layer_norm_modulate_linear`: the seam, `x_new = x + gate * (branch + branch_bias)` and h of it, then
  `h w^T + b`;
- `gated_residual_layer_norm_modulate_mlp_gelu`: the seam, then `gelu(h w1^T + b1) w2^T + b2`.

Each is the operations of its name, one after the other, with the numbers that they have; only the backward differs. In
that of a seam h costs one more write of the pass that is made anyway, because the gradient of the weight, which needs
h, can wait until after it. Per token, layer and byte of D this keeps 28 instead of 40 (float32 stream, bfloat16 else).

Shapes: x, branch, x_new, h (N, T, D); gate, shift, scale (N, D) or (D,) or None; branch_bias (D,) or None. Weights are
cast to what the products compute in: the dtype of `branch`, or of `shift` where there is no branch.

Source: Peebles & Xie, section 3.2; Chen et al. 2016 (recomputation).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..validation import require_floating
from .gated_residual_layer_norm_modulate import FORWARD as SEAM
from .gated_residual_layer_norm_modulate import (
    gated_residual_layer_norm_modulate,
    require_seam,
    seam_backward,
)
from .layer_norm_modulate import FORWARD as NORM
from .layer_norm_modulate import layer_norm_modulate
from .mlp_gelu import mlp_gelu
from .operation import needs_gradient, weight_gradient


def recomputes(x: Tensor) -> bool:
    """Whether these functions differ from the operations that they consist of: a backward follows, by kernels."""
    return torch.is_grad_enabled() and SEAM.choose(x) != "reference"


class LayerNormModulateLinear(torch.autograd.Function):
    """It keeps x, two numbers a row, and the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        h, mean, rstd = torch.ops.fastdit.layer_norm_modulate(x, shift, scale, eps, weight.dtype)
        ctx.save_for_backward(x, shift, scale, weight, mean, rstd)
        ctx.eps = eps
        return F.linear(h, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, scale, weight, mean, rstd = ctx.saved_tensors
        dx, dshift, dscale = torch.ops.fastdit.layer_norm_modulate_backward(
            dy @ weight, x, shift, scale, mean, rstd
        )
        dweight = None
        if ctx.needs_input_grad[3]:
            h = torch.ops.fastdit.layer_norm_modulate(x, shift, scale, ctx.eps, weight.dtype)[0]
            dweight = weight_gradient(dy, h)
        vectors = (None, None) if shift is None else (dshift, dscale)
        return dx, *vectors, dweight, _sum_of_rows(dy) if ctx.needs_input_grad[4] else None, None


class SeamLinear(torch.autograd.Function):
    """It keeps x_new, branch, two numbers a row, and the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor,
        gate: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
        branch_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        x_new, h, mean, rstd = torch.ops.fastdit.gated_residual_layer_norm_modulate(
            x, branch, gate, shift, scale, branch_bias, eps
        )
        ctx.save_for_backward(x_new, branch, gate, shift, scale, branch_bias, mean, rstd, weight)
        ctx.set_materialize_grads(False)
        return x_new, F.linear(h, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_new: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        *seam, weight = ctx.saved_tensors
        if dy is None:
            return *seam_backward(dx_new, None, *seam)[:6], None, None, None
        with_weight, with_bias = ctx.needs_input_grad[6:8]
        *gradients, h = seam_backward(dx_new, dy @ weight, *seam, with_h=with_weight)
        dweight = weight_gradient(dy, h) if with_weight else None
        return *gradients, dweight, _sum_of_rows(dy) if with_bias else None, None


class SeamMlpGelu(torch.autograd.Function):
    """It keeps x_new, branch, two numbers a row, the weights and the pre-activation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor,
        gate: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
        branch_bias: Tensor | None,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        x_new, h, mean, rstd = torch.ops.fastdit.gated_residual_layer_norm_modulate(
            x, branch, gate, shift, scale, branch_bias, eps
        )
        out, pre_activation = torch.ops.fastdit.mlp_gelu(h, w1, b1, w2, b2)
        seam = (x_new, branch, gate, shift, scale, branch_bias, mean, rstd)
        ctx.save_for_backward(*seam, w1, w2, pre_activation)
        ctx.set_materialize_grads(False)
        return x_new, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_new: Tensor | None, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        *seam, w1, w2, pre_activation = ctx.saved_tensors
        if dout is None:
            return *seam_backward(dx_new, None, *seam)[:6], None, None, None, None, None
        with_weights = any(ctx.needs_input_grad[6:10])
        dh, dpre, db1, dw2, db2 = torch.ops.fastdit.mlp_gelu_backward(
            dout, w1, w2, pre_activation, with_weights
        )
        *gradients, h = seam_backward(dx_new, dh, *seam, with_h=with_weights)
        if not with_weights:
            return *gradients, None, None, None, None, None
        return *gradients, weight_gradient(dpre, h), db1, dw2, db2, None


def _sum_of_rows(dy: Tensor) -> Tensor:
    return dy.reshape(-1, dy.shape[-1]).sum(0)


def layer_norm_modulate_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """`h weight^T + bias` with `h = LN(x) * (1 + scale) + shift` in the dtype of shift; (N, T, D) -> (N, T, out).

    weight (out, D), bias (out,) or None. Raises as `layer_norm_modulate`, and ValueError for a weight or bias of
    another shape.
    """
    _require_linear(x, "weight", weight, "bias", bias)
    arguments = (x, shift, scale, weight, bias)
    if not needs_gradient(*arguments) or NORM.choose(*arguments) == "reference":
        h = layer_norm_modulate(x, shift=shift, scale=scale, eps=eps, out_dtype=shift.dtype)
        return F.linear(h, weight, bias)
    linear = _cast(shift.dtype, weight, bias)
    return LayerNormModulateLinear.apply(x, shift, scale, *linear, eps)


def gated_residual_layer_norm_modulate_linear(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    branch_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """(x_new, `h weight^T + bias`) with (x_new, h) of `gated_residual_layer_norm_modulate`; (N, T, D), (N, T, out).

    weight (out, D), bias (out,) or None. Raises as `gated_residual_layer_norm_modulate`, and ValueError for a weight or
    bias of another shape.
    """
    _require_linear(x, "weight", weight, "bias", bias)
    seam = (x, branch, gate, shift, scale, branch_bias)
    if not needs_gradient(*seam, weight, bias) or SEAM.choose(*seam) == "reference":
        x_new, h = gated_residual_layer_norm_modulate(
            x, branch, gate=gate, shift=shift, scale=scale, bias=branch_bias, eps=eps
        )
        return x_new, F.linear(h, weight, bias)
    require_seam(*seam)
    return SeamLinear.apply(*seam, *_cast(branch.dtype, weight, bias), eps)


def gated_residual_layer_norm_modulate_mlp_gelu(
    x: Tensor,
    branch: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    branch_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """(x_new, `mlp_gelu(h, w1, b1, w2, b2)`) with (x_new, h) of `gated_residual_layer_norm_modulate`, both (N, T, D).

    w1 (F, D), b1 (F,), w2 (D, F), b2 (D,). Raises as these two.
    """
    _require_linear(x, "w1", w1, "b1", b1)
    seam, weights = (x, branch, gate, shift, scale, branch_bias), (w1, b1, w2, b2)
    if not needs_gradient(*seam, *weights) or SEAM.choose(*seam) == "reference":
        x_new, h = gated_residual_layer_norm_modulate(
            x, branch, gate=gate, shift=shift, scale=scale, bias=branch_bias, eps=eps
        )
        return x_new, mlp_gelu(h, *weights)
    require_seam(*seam)
    if tuple(w2.shape) != (x.shape[-1], w1.shape[0]) or tuple(b2.shape) != (x.shape[-1],):
        raise ValueError(
            f"w2, b2: expected shapes ({x.shape[-1]}, {w1.shape[0]}) and ({x.shape[-1]},), "
            f"got {tuple(w2.shape)} and {tuple(b2.shape)}"
        )
    return SeamMlpGelu.apply(*seam, *_cast(branch.dtype, *weights), eps)


def _cast(dtype: torch.dtype, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if weight is None else weight.to(dtype) for weight in weights)


def _require_linear(
    x: Tensor, weight_name: str, weight: Tensor, bias_name: str, bias: Tensor | None
) -> None:
    require_floating(weight_name, weight)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{weight_name}: expected shape (out, {x.shape[-1]}) for x of shape {tuple(x.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None:
        require_floating(bias_name, bias)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"{bias_name}: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}"
            )
