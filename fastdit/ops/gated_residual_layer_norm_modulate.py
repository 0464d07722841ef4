"""The seam between two branches of a block: the residual of the first and the normalised input of the second.

`x_new = x + gate * branch`, `h = LN(x_new) * (1 + scale) + shift`.

x (N, T, D), the residual stream; branch (N, T, D); gate, shift and scale (N, D) or (D,), or None (gate 1, plain LN),
each in its own dtype. x_new has the dtype of x, h that of branch; statistics in float32 or wider.

Source: Peebles & Xie, section 3.2, "adaLN-Zero block".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import operations as reference
from .gated_residual import require_branch
from .operation import (
    Operation,
    absent,
    require_both_or_neither,
    require_modulation,
    require_tokens,
)


def _forward(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_new = reference.gated_residual(x, branch, gate=gate)
    return x_new, *reference.layer_norm_modulate_forward(x_new, shift, scale, eps, branch.dtype)


def _fake(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = torch.float64 if x.dtype is torch.float64 else torch.float32
    rows = x.new_empty(x.shape[:-1], dtype=statistics)
    return x.new_empty(x.shape), branch.new_empty(branch.shape), rows, torch.empty_like(rows)


def _backward(
    dx_new: Tensor,
    dh: Tensor,
    x_new: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    through_norm, dshift, dscale = reference.layer_norm_modulate_backward(
        dh, x_new, shift, scale, mean, rstd
    )
    dx = dx_new + through_norm
    dbranch, dgate = reference.gated_residual_backward(dx, branch, gate)
    dbranch = dbranch.clone() if dbranch is dx else dbranch
    vectors = (absent(dx) if d is None else d for d in (dgate, dshift, dscale))
    return dx, dbranch, *vectors  # type: ignore[return-value]


def _backward_fake(
    dx_new: Tensor,
    dh: Tensor,
    x_new: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    vectors = (absent(x_new) if v is None else v.new_empty(v.shape) for v in (gate, shift, scale))
    return x_new.new_empty(x_new.shape), branch.new_empty(branch.shape), *vectors  # type: ignore[return-value]


FORWARD = Operation(
    "gated_residual_layer_norm_modulate(Tensor x, Tensor branch, Tensor? gate, Tensor? shift, Tensor? scale,"
    " float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_forward,
    fake=_fake,
)
BACKWARD = Operation(
    "gated_residual_layer_norm_modulate_backward(Tensor dx_new, Tensor dh, Tensor x_new, Tensor branch, Tensor? gate,"
    " Tensor? shift, Tensor? scale, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_backward,
    fake=_backward_fake,
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
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        x_new, h, mean, rstd = torch.ops.fastdit.gated_residual_layer_norm_modulate(
            x, branch, gate, shift, scale, eps
        )
        ctx.save_for_backward(x_new, branch, gate, shift, scale, mean, rstd)
        return x_new, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_new: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        x_new, branch, gate, shift, scale, mean, rstd = ctx.saved_tensors
        dx, dbranch, dgate, dshift, dscale = (
            torch.ops.fastdit.gated_residual_layer_norm_modulate_backward(
                dx_new, dh, x_new, branch, gate, shift, scale, mean, rstd
            )
        )
        return (
            dx,
            dbranch,
            None if gate is None else dgate,
            None if shift is None else dshift,
            None if scale is None else dscale,
            None,
        )


def gated_residual_layer_norm_modulate(
    x: Tensor,
    branch: Tensor,
    *,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`x_new = x + gate * branch`, `h = LN(x_new) * (1 + scale) + shift`; returns (x_new, h), both (N, T, D).

    x and branch (N, T, D); gate, shift and scale (N, D) or (D,); gate None means 1, shift and scale None a plain LN.
    x_new has the dtype of x, h that of branch.

    Raises TypeError for tensors that are not dense and floating-point; ValueError for other shapes, tensors on
    different devices, or only one of shift and scale; RuntimeError if the chosen backend cannot run.
    """
    require_tokens("x", x)
    require_branch(x, branch)
    require_both_or_neither(shift, scale)
    require_modulation(x, gate=gate, shift=shift, scale=scale)
    if FORWARD.choose(x, branch, gate, shift, scale) == "reference":
        return reference.gated_residual_layer_norm_modulate(
            x, branch, gate=gate, shift=shift, scale=scale, eps=eps
        )
    return GatedResidualLayerNormModulate.apply(x, branch, gate, shift, scale, eps)
