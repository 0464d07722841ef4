"""`h = LN(x) * (1 + scale) + shift`: adaptive layer normalisation without a gate.

x (N, T, D) in float16, bfloat16, float32 or float64; shift and scale (N, D) or (D,), any strides, their own dtype, both
None for a plain LN; LN over D without affine parameters, statistics in float32 or wider; h (N, T, D) in `out_dtype`.

Source: Peebles & Xie, section 3.2, "adaLN block"; Perez et al. 2018 (FiLM).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import operations as reference
from .operation import (
    Operation,
    absent,
    needs_gradient,
    require_both_or_neither,
    require_modulation,
    require_tokens,
    row_limits,
    without_none,
)


def _fake(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = torch.float64 if x.dtype is torch.float64 else torch.float32
    rows = x.new_empty(x.shape[:-1], dtype=statistics)
    return x.new_empty(x.shape, dtype=out_dtype), rows, torch.empty_like(rows)


def _backward(
    dh: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return without_none(reference.layer_norm_modulate_backward(dh, x, shift, scale, mean, rstd))


def _backward_fake(
    dh: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    return (
        dx,
        absent(x) if shift is None else shift.new_empty(shift.shape),
        absent(x) if scale is None else scale.new_empty(scale.shape),
    )


FORWARD = Operation(
    "layer_norm_modulate(Tensor x, Tensor? shift, Tensor? scale, float eps, ScalarType out_dtype)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.layer_norm_modulate_forward,
    fake=_fake,
)
BACKWARD = Operation(
    "layer_norm_modulate_backward(Tensor dh, Tensor x, Tensor? shift, Tensor? scale, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)",
    reference=_backward,
    fake=_backward_fake,
)


FORWARD.add_kernel("layer_norm_modulate", "forward", limits=row_limits)
BACKWARD.add_kernel("layer_norm_modulate", "backward", limits=row_limits, adapt=without_none)


class LayerNormModulate(torch.autograd.Function):
    """The operator and its backward. It keeps x and two numbers a row; h is not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        eps: float,
        out_dtype: torch.dtype,
    ) -> Tensor:
        h, mean, rstd = torch.ops.fastdit.layer_norm_modulate(x, shift, scale, eps, out_dtype)
        ctx.save_for_backward(x, shift, scale, mean, rstd)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, scale, mean, rstd = ctx.saved_tensors
        dx, dshift, dscale = torch.ops.fastdit.layer_norm_modulate_backward(
            dh, x, shift, scale, mean, rstd
        )
        modulated = shift is not None
        return dx, dshift if modulated else None, dscale if modulated else None, None, None


def layer_norm_modulate(
    x: Tensor,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`LN(x) * (1 + scale) + shift`; x (N, T, D), shift and scale (N, D) or (D,) or both None, out (N, T, D).

    The result has `out_dtype`, by default the dtype of `x`: a float32 residual stream asks for what its linear layers
    compute in.

    Raises TypeError for tensors that are not dense and floating-point; ValueError for other shapes, tensors on
    different devices, or only one of shift and scale; RuntimeError if the chosen backend cannot run.
    """
    require_tokens("x", x)
    require_both_or_neither(shift, scale)
    require_modulation(x, shift=shift, scale=scale)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if FORWARD.choose(x, shift, scale) == "reference":
        return reference.layer_norm_modulate(
            x, shift=shift, scale=scale, eps=eps, out_dtype=out_dtype
        )
    if not needs_gradient(x, shift, scale):
        return torch.ops.fastdit.layer_norm_modulate(x, shift, scale, eps, out_dtype)[0]
    return LayerNormModulate.apply(x, shift, scale, eps, out_dtype)
