"""The perceptron of a block, `gelu(x w1^T + b1) w2^T + b2` with the tanh form of GELU, around torch's matrix products.

Shapes: x, out (..., D), w1 (F, D), b1 (F,), w2 (D, F), b2 (D,), the pre-activation (..., F), all in one of float16,
bfloat16 and float32.

Without a backward the GELU runs inside the first product (cuBLASLt's epilogue). With one the pre-activation is kept
instead of the activation, and the backward makes both that and the gradient in one pass, in float32:
gelu(p) = p s(2u) with the logistic function s and u = sqrt(2 / pi) (p + 0.044715 p^3), since (1 + tanh(u)) / 2 = s(2u),
and gelu'(p) = s(2u) + 2 p s(2u) s(-2u) u'. The same pass sums the gradient over the rows, which is that of b1.

Source: Hendrycks & Gimpel 2016 (GELU).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch


@triton.jit
def _gelu_backward_kernel(
    dactivation,
    pre_activation,
    activation,
    partials,
    rows,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Neighbouring programs read neighbouring columns of the same rows.
    blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    group = tl.program_id(0) // blocks
    columns = (tl.program_id(0) % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < F
    first = group * ROWS
    total = tl.zeros([BLOCK_F], tl.float32)
    for i in tl.range(0, tl.minimum(ROWS, rows - first), num_stages=STAGES):
        offsets = (first.to(tl.int64) + i) * F + columns
        p = tl.load(pre_activation + offsets, mask=inside, other=0.0).to(tl.float32)
        arriving = tl.load(dactivation + offsets, mask=inside, other=0.0).to(tl.float32)
        u = 0.7978845608028654 * (p + 0.044715 * p * p * p)
        slope = 0.7978845608028654 * (1.0 + 0.134145 * p * p)
        # (1 + t) / 2 and (1 - t) / 2 with t = tanh(u), each without cancellation.
        upper, lower = tl.sigmoid(2.0 * u), tl.sigmoid(-2.0 * u)
        dpre = arriving * (upper + 2.0 * p * upper * lower * slope)
        element = activation.dtype.element_ty
        tl.store(activation + offsets, (p * upper).to(element), mask=inside)
        # In place: every element is read before it is written, by the same program.
        tl.store(dactivation + offsets, dpre.to(element), mask=inside)
        total += dpre
    tl.store(partials + group.to(tl.int64) * F + columns, total, mask=inside)


@dataclass(frozen=True)
class GeluTile:
    """A program's tile: some rows, one after the other, of `block_f` columns."""

    rows: int
    block_f: int
    num_warps: int
    num_stages: int


def gelu_backward_tile(rows: int) -> GeluTile:
    """8 values a thread; 512 divides the F of every published model. The sums are under 2 % of the traffic."""
    return GeluTile(16 if rows <= 8192 else 64, 512, 2, 3)


def gelu_backward_(dactivation: Tensor, pre_activation: Tensor) -> tuple[Tensor, Tensor]:
    """Turns the gradient (rows, F) by the activation into that by the pre-activation, in place.

    Returns the activation, and the sum of the gradient over the rows in float32.
    """
    rows, f = pre_activation.shape
    tile = gelu_backward_tile(rows)
    groups = triton.cdiv(rows, tile.rows)
    activation = torch.empty_like(pre_activation)
    partials = torch.empty((groups, f), dtype=torch.float32, device=activation.device)
    launch(
        _gelu_backward_kernel,
        (groups * triton.cdiv(f, tile.block_f),),
        dactivation,
        pre_activation,
        activation,
        partials,
        rows,
        F=f,
        ROWS=tile.rows,
        BLOCK_F=tile.block_f,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )
    return activation, partials.sum(0)


def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """out and the pre-activation."""
    pre_activation = F.linear(x, w1, b1)
    out = F.linear(F.gelu(pre_activation, approximate="tanh"), w2, b2)
    return out.contiguous(), pre_activation.contiguous()


def inference(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """out alone."""
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda:
        activation = torch._addmm_activation(b1, rows, w1.t(), use_gelu=True)
    else:  # where that function's GELU is the other one, by erf
        activation = F.gelu(F.linear(rows, w1, b1), approximate="tanh")
    return F.linear(activation, w2, b2).view(x.shape)


def backward(
    dout: Tensor, w1: Tensor, w2: Tensor, pre_activation: Tensor, with_weights: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients by x, by the pre-activation, and, `with_weights`, by b1, w2 and b2."""
    d, f = w2.shape
    dout_rows = dout.reshape(-1, d)
    dpre = (dout_rows @ w2).contiguous()
    activation, db1 = gelu_backward_(dpre, pre_activation.reshape(-1, f).contiguous())
    dx, dpre_shaped = (dpre @ w1).view(dout.shape), dpre.view(pre_activation.shape)
    if not with_weights:
        return dx, dpre_shaped, None, None, None
    return dx, dpre_shaped, db1.to(w1.dtype), dout_rows.mT @ activation, dout_rows.sum(0)
