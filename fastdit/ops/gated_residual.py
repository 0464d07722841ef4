"""`x_new = x + gate * branch`: the end of a residual branch of adaLN-Zero.

x (N, T, D), the residual stream; branch (N, T, D), gate (N, D) or (D,) or None for 1, each in its own dtype; x_new has
the dtype of x.

Source: Peebles & Xie, section 3.2, "adaLN-Zero block".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import operations as reference
from ..validation import require_same_device
from .operation import (
    Operation,
    absent,
    needs_gradient,
    require_modulation,
    require_tokens,
    row_limits,
    without_none,
)


def _forward(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return reference.gated_residual(x, branch, gate=gate)


def _fake(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _backward(dx: Tensor, branch: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    dbranch, dgate = reference.gated_residual_backward(dx, branch, gate)
    # An operator may not return its own input, which dbranch is where nothing has to be computed.
    dbranch = dbranch.clone() if dbranch is dx else dbranch
    return without_none((dbranch, dgate))


def _backward_fake(dx: Tensor, branch: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    dgate = absent(branch) if gate is None else gate.new_empty(gate.shape)
    return branch.new_empty(branch.shape), dgate


FORWARD = Operation(
    "gated_residual(Tensor x, Tensor branch, Tensor? gate) -> Tensor",
    reference=_forward,
    fake=_fake,
)
BACKWARD = Operation(
    "gated_residual_backward(Tensor dx, Tensor branch, Tensor? gate) -> (Tensor, Tensor)",
    reference=_backward,
    fake=_backward_fake,
)

FORWARD.add_kernel("gated_residual", "forward", limits=row_limits)
BACKWARD.add_kernel("gated_residual", "backward", limits=row_limits, adapt=without_none)


class GatedResidual(torch.autograd.Function):
    """The operator and its backward. It keeps branch and gate, and nothing where there is no gate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
        ctx.branch_dtype = branch.dtype
        ctx.save_for_backward(*(() if gate is None else (branch, gate)))
        return torch.ops.fastdit.gated_residual(x, branch, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        saved = ctx.saved_tensors  # once: checkpointing unpacks them at every look
        if not saved:
            return dx, dx.to(ctx.branch_dtype), None
        dbranch, dgate = torch.ops.fastdit.gated_residual_backward(dx, *saved)
        return dx, dbranch, dgate


def require_branch(x: Tensor, branch: Tensor) -> None:
    """Raises unless `branch` is a floating-point tensor of the shape of `x` on its device."""
    require_tokens("branch", branch)
    if branch.shape != x.shape:
        raise ValueError(
            f"branch: expected the shape of x, {tuple(x.shape)}, got {tuple(branch.shape)}"
        )
    require_same_device(x=x, branch=branch)


def gated_residual(x: Tensor, branch: Tensor, *, gate: Tensor | None = None) -> Tensor:
    """`x + gate * branch`; x and branch (N, T, D), gate (N, D) or (D,) or None for 1, out (N, T, D) in x's dtype.

    Raises TypeError for tensors that are not dense and floating-point; ValueError for other shapes or tensors on
    different devices; RuntimeError if the chosen backend cannot run. While compiling it is plain torch.
    """
    require_tokens("x", x)
    require_branch(x, branch)
    require_modulation(x, gate=gate)
    # A compiler fuses this with what is around it; it cannot look into an operator.
    if torch.compiler.is_compiling() or FORWARD.choose(x, branch, gate) == "reference":
        return reference.gated_residual(x, branch, gate=gate)
    if not needs_gradient(x, branch, gate):
        return torch.ops.fastdit.gated_residual(x, branch, gate)
    return GatedResidual.apply(x, branch, gate)
