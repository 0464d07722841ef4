"""Multi-head attention: `softmax(scale * q k^T) v` per head, no mask, no dropout.

q (N, T, H, K), k and v (N, S, H, K) in one dtype and on one device, out (N, T, H, K); any K, DiT-XL's 72 included.
`fastdit.attention` says in which backend it runs. The one in Triton is the operator below; a compiler sees through
torch's own.

The operator keeps lse (N, H, T), `ln sum_S exp(scale * q k^T)`, for its backward: p = exp(scale * q k^T - lse),
dv = p^T dout, ds = p (dout v^T - sum_K out dout), dq = scale ds k, dk = scale ds^T q.

Source: Vaswani et al. 2017, section 3.2; Dao et al. 2022 (FlashAttention).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..attention import CALLABLE, choose
from ..attention.triton import reasons_not_usable
from ..backend import active_backend
from ..validation import require_floating, require_same_device
from .operation import Operation, needs_gradient


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("nthk,nshk->nhts", q * scale, k)
    lse = scores.to(_lse_dtype(q)).logsumexp(dim=-1)
    return torch.einsum("nhts,nshk->nthk", scores.softmax(dim=-1), v), lse


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    n, t, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((n, heads, t), dtype=_lse_dtype(q))


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    scores = torch.einsum("nthk,nshk->nhts", q * scale, k)
    p = (scores.to(lse.dtype) - lse.unsqueeze(-1)).exp()
    delta = torch.einsum("nthk,nthk->nht", dout.to(lse.dtype), out.to(lse.dtype))
    dp = torch.einsum("nthk,nshk->nhts", dout, v)
    ds = (p * (dp - delta.unsqueeze(-1)) * scale).to(q.dtype)
    return (
        torch.einsum("nhts,nshk->nthk", ds, k),
        torch.einsum("nhts,nthk->nshk", ds, q),
        torch.einsum("nhts,nthk->nshk", p.to(q.dtype), dout),
    )


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _packed_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    q, k, v = qkv.unbind(2)
    return torch.stack(_backward(dout, q, k, v, out, lse, scale), dim=2)


def _packed_backward_fake(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype is torch.float64 else torch.float32


class Kernel(Operation):
    """An operator that is called where Triton was chosen already: it runs the kernel wherever that can run."""

    def choose(self, *arguments: Any) -> str:
        forced = active_backend() == "reference"
        if forced or self._reasons("triton", arguments[0].device.type, arguments):
            return super().choose(*arguments)
        return "triton"


def _limits(q: Tensor, k: Tensor, v: Tensor, scale: float) -> list[str]:
    return reasons_not_usable(q, k, v)


def _backward_limits(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[str]:
    return reasons_not_usable(q, k, v)


def _packed_limits(dout: Tensor, qkv: Tensor, *rest: Any) -> list[str]:
    return reasons_not_usable(*qkv.unbind(2))


def _packed_backward_kernel(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    """The kernel writes all three gradients where they belong in one tensor."""
    kernel = importlib.import_module("fastdit.kernels.attention")
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    kernel.backward(dout, *qkv.unbind(2), out, lse, scale, *dqkv.unbind(2))
    return dqkv


FORWARD = Kernel(
    "attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
)
BACKWARD = Kernel(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    reference=_backward,
    fake=_backward_fake,
)
PACKED_BACKWARD = Kernel(
    "attention_qkvpacked_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, float scale) -> Tensor",
    reference=_packed_backward,
    fake=_packed_backward_fake,
)


FORWARD.add_kernel("attention", "forward", limits=_limits)
BACKWARD.add_kernel("attention", "backward", limits=_backward_limits)
PACKED_BACKWARD.implementations["triton"] = _packed_backward_kernel
PACKED_BACKWARD.limits["triton"] = _packed_limits


class Attention(torch.autograd.Function):
    """The operator and its backward. It keeps q, k, v, out, and one number a row and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, lse = torch.ops.fastdit.attention(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return *torch.ops.fastdit.attention_backward(dout, *ctx.saved_tensors, ctx.scale), None


class AttentionQkvPacked(torch.autograd.Function):
    """`Attention` of the three parts of qkv (N, T, 3, H, K), whose gradient is one tensor, too."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: float) -> Tensor:
        out, lse = torch.ops.fastdit.attention(*qkv.unbind(2), scale)
        ctx.save_for_backward(qkv, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return torch.ops.fastdit.attention_qkvpacked_backward(dout, *saved, ctx.scale), None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
    deterministic: bool = True,
) -> Tensor:
    """`softmax(scale * q k^T) v`; q (N, T, H, K), k and v (N, S, H, K), out (N, T, H, K); scale defaults to K ** -0.5.

    `backend` is "auto" or one of `fastdit.attention.BACKENDS`. With `deterministic` the backward gives the same bits
    every time, if the backend can: `auto` then takes none that cannot.

    Raises TypeError for tensors that are not dense and floating-point or of different dtypes; ValueError for other
    shapes, tensors on different devices or an unknown backend; RuntimeError if the chosen backend cannot run.
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
    chosen = choose(q, k, v, backend, deterministic)
    if chosen != "triton":
        return CALLABLE[chosen].attention(q, k, v, scale, deterministic)
    scale = head_dim**-0.5 if scale is None else float(scale)
    if not needs_gradient(q, k, v):
        return torch.ops.fastdit.attention(q, k, v, scale)[0]
    return Attention.apply(q, k, v, scale)


def attention_qkvpacked(
    qkv: Tensor,
    num_heads: int | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
    deterministic: bool = True,
) -> Tensor:
    """`attention` of a fused projection's output, ready for the next projection: (N, T, 3, H, K) -> (N, T, H * K).

    qkv may also be (N, T, 3 * H * K), with `num_heads`; its rows are q of all heads, k of all heads, v of all heads.
    The parts are read as views, without a permutation or a copy; in Triton their gradient is written as one tensor.

    Raises as `attention`, and ValueError for a qkv of another shape.
    """
    require_floating("qkv", qkv)
    if qkv.dim() == 3 and num_heads is not None and qkv.shape[2] % (3 * num_heads) == 0:
        n, t, width = qkv.shape
        qkv = qkv.reshape(n, t, 3, num_heads, width // (3 * num_heads))
    elif qkv.dim() != 5 or qkv.shape[2] != 3 or num_heads not in (None, qkv.shape[3]):
        raise ValueError(
            f"qkv: expected shape (N, T, 3, H, K), or (N, T, 3 * H * K) with num_heads, "
            f"got {tuple(qkv.shape)} and num_heads={num_heads}"
        )
    n, t, _, heads, head_dim = qkv.shape
    q, k, v = qkv.unbind(2)
    chosen = choose(q, k, v, backend, deterministic)
    if chosen != "triton":
        out = CALLABLE[chosen].attention(q, k, v, scale, deterministic)
    else:
        scale = head_dim**-0.5 if scale is None else float(scale)
        if needs_gradient(qkv):
            out = AttentionQkvPacked.apply(qkv, scale)
        else:
            out = torch.ops.fastdit.attention(q, k, v, scale)[0]
    return out.reshape(n, t, heads * head_dim)
