"""FlashAttention 4, in CuTe DSL: Hopper and Blackwell, an optional package (flash-attn-4, imported as flash_attn.cute).

On Hopper it is called with tiles of 128 x 128: at head_dim 72 and 256 tokens they execute 1.11 times the exact work,
its own choice of 192 x 144 executes 1.88 times as much. The function that takes a tile has no backward, so the
operators and the `autograd.Function` are here; to a compiler they are opaque.

The calls are tested against stand-ins; on a GPU they were not run.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .limits import HALF, Described, dense, empty, limits, needs_gradient

INTERFACE = "flash_attn.cute.interface"
TILE = (128, 128)

library = torch.library.Library("fastdit", "FRAGMENT")
library.define("flash_attn_4(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)")
library.define(
    "flash_attn_4_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale,"
    " bool deterministic) -> (Tensor, Tensor, Tensor)"
)


def reasons_not_usable(q: Described, k: Described, v: Described) -> list[str]:
    """float16 and bfloat16, head_dim in multiples of 8 up to 128, compute capability 9 or 10, and the package.

    Its backward is deterministic on these only. The package is imported when nothing else stands against it.
    """
    reasons = limits(q, dtypes=HALF, multiple=8, largest=128, capability=(9, 0)) + empty(q, k)
    if not reasons and torch.cuda.get_device_capability(q.device)[0] > 11:
        reasons.append("it needs compute capability 9, 10 or 11")
    if not _is_installed():
        reasons.append("the package flash-attn-4 (flash_attn.cute) is not installed")
    if reasons:
        return reasons
    try:
        forward = importlib.import_module(INTERFACE)._flash_attn_fwd
    except (ImportError, OSError, AttributeError) as error:
        return [f"{INTERFACE} cannot be used: {error}"]
    known = inspect.signature(forward).parameters
    missing = [name for name in ("tile_mn", "return_lse") if name not in known]
    return [f"this version of flash_attn.cute has no {name}" for name in missing]


def is_deterministic(q: Described) -> bool:
    return True


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, deterministic: bool = True
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not needs_gradient(q, k, v):
        return torch.ops.fastdit.flash_attn_4(q, k, v, scale)[0]
    return FlashAttention4.apply(q, k, v, scale, deterministic)


class FlashAttention4(torch.autograd.Function):
    """It keeps q, k, v, the output, and one number a row and head."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, deterministic: bool
    ) -> Tensor:
        out, lse = torch.ops.fastdit.flash_attn_4(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.deterministic = scale, deterministic
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gradients = torch.ops.fastdit.flash_attn_4_backward(
            dout, *ctx.saved_tensors, ctx.scale, ctx.deterministic
        )
        return *gradients, None, None


def _is_installed() -> bool:
    """FlashAttention 4 lies in a folder `cute` of the package flash_attn, with FlashAttention 2 or without."""
    if INTERFACE in sys.modules:
        return sys.modules[INTERFACE] is not None
    try:
        spec = importlib.util.find_spec("flash_attn")
    except (ImportError, ValueError):
        # Somebody forbids the import, or put in a module of his own.
        return False
    folders = [] if spec is None else spec.submodule_search_locations or []
    return any(os.path.isdir(os.path.join(folder, "cute")) for folder in folders)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    interface = sys.modules.get(INTERFACE) or importlib.import_module(INTERFACE)
    hopper = q.device.type == "cuda" and torch.cuda.get_device_capability(q.device)[0] == 9
    out, lse = interface._flash_attn_fwd(
        dense(q),
        dense(k),
        dense(v),
        softmax_scale=scale,
        tile_mn=TILE if hopper else None,
        return_lse=True,
    )[:2]
    return out, lse


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    interface = sys.modules.get(INTERFACE) or importlib.import_module(INTERFACE)
    dq, dk, dv = interface._flash_attn_bwd(
        dense(q),
        dense(k),
        dense(v),
        out,
        dout.contiguous(),
        lse,
        softmax_scale=scale,
        deterministic=deterministic,
    )[:3]
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    n, t, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((n, heads, t), dtype=torch.float32)


def _backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


library.impl("flash_attn_4", _forward, "CompositeExplicitAutograd")
library.impl("flash_attn_4_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastdit::flash_attn_4", _forward_fake, lib=library)
torch.library.register_fake("fastdit::flash_attn_4_backward", _backward_fake, lib=library)
