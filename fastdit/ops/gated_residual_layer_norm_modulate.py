"""The seam between two branches of a block: the residual of the first and the normalised input of the second.

`x_new = x + gate * (branch + bias)`, `h = LN(x_new) * (1 + scale) + shift`.

x (N, T, D), the residual stream; branch (N, T, D); gate, shift and scale (N, D) or (D,), or None (gate 1, plain LN),
bias (D,) or None, each in its own dtype. x_new has the dtype of x, h that of branch; statistics in float32 or wider.

Source: Peebles & Xie, section 3.2, "adaLN-Zero block".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import operations as reference
from ..validation import require_floating, require_same_device
from .gated_residual import require_branch
from .operation import (
    Operation,
    needs_gradient,
    require_both_or_neither,
    require_modulation,
    require_tokens,
    row_limits,
    without_none,
)


def _forward(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    branch_biased = branch if bias is None else branch + bias
    x_new = reference.gated_residual(x, branch_biased, gate=gate)
    return x_new, *reference.layer_norm_modulate_forward(x_new, shift, scale, eps, branch.dtype)


def _fake(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = torch.float64 if x.dtype is torch.float64 else torch.float32
    rows = x.new_empty(x.shape[:-1], dtype=statistics)
    return x.new_empty(x.shape), branch.new_empty(branch.shape), rows, torch.empty_like(rows)


def _backward(
    dh: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    with_h: bool,
) -> tuple[Tensor, ...]:
    through_norm, dshift, dscale = reference.layer_norm_modulate_backward(
        dh, x_new, shift, scale, mean, rstd
    )
    dx = through_norm if dx_new is None else dx_new + through_norm
    branch_biased = branch if bias is None else branch + bias
    dbranch, dgate = reference.gated_residual_backward(dx, branch_biased, gate)
    dbias = None if bias is None else reference.sum_to(dbranch, bias)
    h = None
    if with_h:
        xhat = (x_new.to(mean.dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
        if shift is not None and scale is not None:
            xhat = xhat * (1 + reference.per_token(scale)) + reference.per_token(shift)
        h = xhat.to(branch.dtype)
    dbranch = dbranch.clone() if dbranch is dx else dbranch
    return without_none((dx, dbranch, dgate, dshift, dscale, dbias, h))


def _backward_fake(
    dh: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    with_h: bool,
) -> tuple[Tensor, ...]:
    like = (x_new, branch, gate, shift, scale, bias, branch if with_h else None)
    return without_none(tuple(None if v is None else v.new_empty(v.shape) for v in like))


FORWARD = Operation(
    "gated_residual_layer_norm_modulate(Tensor x, Tensor branch, Tensor? gate, Tensor? shift, Tensor? scale,"
    " Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_forward,
    fake=_fake,
)
BACKWARD = Operation(
    "gated_residual_layer_norm_modulate_backward(Tensor dh, Tensor? dx_new, Tensor x_new, Tensor branch, Tensor? gate,"
    " Tensor? shift, Tensor? scale, Tensor? bias, Tensor mean, Tensor rstd, bool with_h)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_backward,
    fake=_backward_fake,
)
FORWARD.add_kernel("gated_residual_layer_norm_modulate", "forward", limits=row_limits)
BACKWARD.add_kernel(
    "gated_residual_layer_norm_modulate", "backward", limits=row_limits, adapt=without_none
)


class GatedResidualLayerNormModulate(torch.autograd.Function):
    """The operator and its backward. It keeps x_new, branch and two numbers a row; h is not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor,
        gate: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        x_new, h, mean, rstd = torch.ops.fastdit.gated_residual_layer_norm_modulate(
            x, branch, gate, shift, scale, bias, eps
        )
        ctx.save_for_backward(x_new, branch, gate, shift, scale, bias, mean, rstd)
        # The stream of the last block goes nowhere: no zeros are made for its gradient.
        ctx.set_materialize_grads(False)
        return x_new, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_new: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*seam_backward(dx_new, dh, *ctx.saved_tensors)[:6], None)


def seam_backward(
    dx_new: Tensor | None,
    dh: Tensor | None,
    x_new: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    with_h: bool = False,
) -> tuple[Any, ...]:
    """Gradients by x, branch, gate, shift, scale and bias, and h where it is asked for; None for what is not there."""
    if dh is None:
        dh = torch.zeros_like(branch)
    results = torch.ops.fastdit.gated_residual_layer_norm_modulate_backward(
        dh, dx_new, x_new, branch, gate, shift, scale, bias, mean, rstd, with_h
    )
    given = (x_new, branch, gate, shift, scale, bias, branch if with_h else None)
    return tuple(None if g is None else r for g, r in zip(given, results, strict=True))


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
    """`x_new = x + gate * (branch + bias)`, `h = LN(x_new) * (1 + scale) + shift`; returns (x_new, h), both (N, T, D).

    x and branch (N, T, D); gate, shift and scale (N, D) or (D,); gate None means 1, shift and scale None a plain LN.
    bias (D,) or None: that of the linear layer which made `branch` without it; its gradient, a sum over all tokens,
    then costs no pass of its own. x_new has the dtype of x, h that of branch.

    Raises TypeError for tensors that are not dense and floating-point; ValueError for other shapes, tensors on
    different devices, or only one of shift and scale; RuntimeError if the chosen backend cannot run.
    """
    require_seam(x, branch, gate, shift, scale, bias)
    if FORWARD.choose(x, branch, gate, shift, scale, bias) == "reference":
        return reference.gated_residual_layer_norm_modulate(
            x, branch, gate=gate, shift=shift, scale=scale, bias=bias, eps=eps
        )
    arguments = (x, branch, gate, shift, scale, bias)
    if not needs_gradient(*arguments):
        return torch.ops.fastdit.gated_residual_layer_norm_modulate(*arguments, eps)[:2]
    return GatedResidualLayerNormModulate.apply(*arguments, eps)


def require_seam(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Raises unless these are the inputs of a seam."""
    require_tokens("x", x)
    require_branch(x, branch)
    require_both_or_neither(shift, scale)
    require_modulation(x, gate=gate, shift=shift, scale=scale)
    if bias is not None:
        require_floating("bias", bias)
        if tuple(bias.shape) != (x.shape[-1],):
            raise ValueError(
                f"bias: expected shape ({x.shape[-1]},) for x of shape {tuple(x.shape)}, got {tuple(bias.shape)}"
            )
        require_same_device(x=x, bias=bias)
