"""AdamW and moving averages of the weights, all parameters in one pass, in place.

With t = step + 1 and g = clip * grad:

    p <- (1 - lr weight_decay) p
    m <- m + (1 - beta1) (g - m)                    v <- beta2 v + (1 - beta2) g²
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    ema <- ema + (1 - decay) (p - ema)              copy <- p, rounded
    step <- t

or nothing at all where `found_inf` is not zero. Nothing is read from the device, so that a step can be captured in a
CUDA graph. There is no gradient.

Sources: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2; Peebles & Xie 2023, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..backend import active_backend
from ..reference import adamw_ema as reference
from ..validation import require_floating
from .operation import Operation, dtype_limits

_HALF = (torch.bfloat16, torch.float16)


def _forward(
    step: Tensor,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    lr: Tensor,
    clip: Tensor | None,
    found_inf: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decays: Sequence[float],
) -> None:
    n = len(params)
    if not copies and active_backend() != "reference" and _fused_on_cpu(params, grads):
        if found_inf is not None and bool(found_inf):  # nobody waits for a device here
            return
        step.add_(1)
        clipped = list(grads)
        if clip is not None:
            clipped = list(torch._foreach_mul(clipped, clip.to(clipped[0].dtype).reshape(())))
        torch._fused_adamw_(
            list(params),
            clipped,
            list(exp_avgs),
            list(exp_avg_sqs),
            [],
            [step.float().reshape(())] * n,
            lr=float(lr),
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        for i, decay in enumerate(ema_decays):
            torch._foreach_lerp_(list(emas[i * n : (i + 1) * n]), list(params), 1 - decay)
        return
    reference.adamw_ema_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        step,
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
        clip=clip,
        found_inf=found_inf,
        emas=[emas[i * n : (i + 1) * n] for i in range(len(ema_decays))],
        ema_decays=ema_decays,
        copies=copies or None,
    )


def _fused_on_cpu(params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
    """Whether torch's own pass over a parameter does it, which on a CPU is faster than an expression at a time."""
    return all(
        p.device.type == "cpu" and p.dtype is g.dtype is torch.float32 and p.stride() == g.stride()
        for p, g in zip(params, grads, strict=True)
    ) and bool(params)


def _fake(*_: Any) -> None:
    return None


def _limits(
    step: Tensor,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    *_: Any,
) -> list[str]:
    """The states are float32, gradients of any dtype that a kernel takes; `copies` have been checked."""
    states = (*params, *exp_avgs, *exp_avg_sqs, *emas)
    reasons = [f"{t.dtype} is not float32" for t in states if t.dtype is not torch.float32]
    return reasons[:1] + dtype_limits(*grads)


FORWARD = Operation(
    "adamw_ema_(Tensor(a!) step, Tensor(b!)[] params, Tensor[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
    " Tensor(e!)[] emas, Tensor(f!)[] copies, Tensor lr, Tensor? clip, Tensor? found_inf, float beta1, float beta2,"
    " float eps, float weight_decay, float[] ema_decays) -> ()",
    reference=_forward,
    fake=_fake,
)
FORWARD.add_kernel("adamw_ema", "update", limits=_limits)


@torch.no_grad()
def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | Tensor | None = None,
    found_inf: Tensor | None = None,
    emas: Sequence[Sequence[Tensor]] = (),
    ema_decays: Sequence[float] = (),
    copies: Sequence[Tensor] | None = None,
) -> None:
    """One step of `torch.optim.AdamW`, and then of every moving average of the weights, in place.

    All lists are as long as `params`, and their tensors of the same shapes. Any tensor may be a DTensor, of which the
    shard on this device is updated; those of one parameter are then distributed alike. They may be empty. A parameter
    without a gradient is left out of all lists.

    Args:
        params, exp_avgs, exp_avg_sqs: weights and both moments, float32 (float64 in plain torch). Each parameter is
            dense in memory, contiguous or permuted (channels_last), and its moments have its strides.
        grads: one dtype for all, float32, bfloat16 or float16 (float64 with float64 parameters); any strides.
        step: how many steps were done, a tensor of one element on the device, float32 or int64.
        lr: a number, or a tensor of one element on the device, which a captured CUDA graph reads in every replay.
        betas, eps, weight_decay: as of torch.optim.AdamW.
        clip: multiplied onto the gradients, in float32: a number or a tensor as `lr`, or None for 1.
        found_inf: a tensor of one element on the device, or None. Where it is not zero, every tensor stays as it is to
            the last bit, `step` as well.
        emas: the averages, each a list like `params`.
        ema_decays: the decay of each average.
        copies: receive the new weights rounded to their own dtype, bfloat16 or float16, one for all; strides as those
            of the parameters.

    Raises TypeError for other dtypes and what is no tensor; ValueError for lists of other lengths, other shapes,
    strides, devices and values; RuntimeError if the chosen backend cannot run.
    """
    beta1, beta2 = _require_options(betas, eps, weight_decay)
    if len(emas) != len(ema_decays):
        raise ValueError(
            f"ema_decays: expected {len(emas)} values, one for each of emas, got {len(ema_decays)}"
        )
    for i, decay in enumerate(ema_decays):
        if not 0 <= decay <= 1:
            raise ValueError(f"ema_decays[{i}]={decay!r}: must be in [0, 1]")
    _require_scalar("step", step, (torch.float32, torch.int64), None)
    device = step.device
    if found_inf is not None:
        _require_scalar("found_inf", found_inf, None, device)
    lr = _scalar("lr", lr, device)
    clip = None if clip is None else _scalar("clip", clip, device)

    given: dict[str, Sequence[Tensor]] = {
        "params": params,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        **{f"emas[{i}]": ema for i, ema in enumerate(emas)},
        "grads": grads,
    }
    if copies is not None:
        given["copies"] = copies
    local = {name: _local(name, tensors, params) for name, tensors in given.items()}
    weights = local["params"]
    _require_weights(weights, device)
    dtype = weights[0].dtype if weights else torch.float32
    for name, tensors in local.items():
        if name == "grads":
            _require_like(name, tensors, weights, {dtype, torch.float32, *_HALF}, strides=False)
        elif name == "copies":
            _require_like(name, tensors, weights, set(_HALF))
        elif name != "params":
            _require_like(name, tensors, weights, {dtype})

    averages = [t for i in range(len(emas)) for t in local[f"emas[{i}]"]]
    arguments = (
        step,
        weights,
        local["grads"],
        local["exp_avgs"],
        local["exp_avg_sqs"],
        averages,
        local.get("copies", []),
        lr,
        clip,
        found_inf,
        beta1,
        beta2,
        eps,
        weight_decay,
        list(ema_decays),
    )
    if FORWARD.choose(*arguments) == "reference":
        _forward(*arguments)
    else:
        torch.ops.fastdit.adamw_ema_(*arguments)
    if not torch.compiler.is_compiling():
        # What autograd has saved of these for a backward is there no more, and a kernel does not say so.
        del given["grads"], local["grads"]
        changed = [t for lists in (given, local) for tensors in lists.values() for t in tensors]
        increment_version([step, *changed])


def _require_options(
    betas: tuple[float, float], eps: float, weight_decay: float
) -> tuple[float, float]:
    beta1, beta2 = betas
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas={betas!r}: both must be in [0, 1)")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps={eps!r}: must be positive and finite")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay={weight_decay!r}: must be finite and not negative")
    return beta1, beta2


def _require_scalar(
    name: str,
    value: Any,
    dtypes: Sequence[torch.dtype] | None,
    device: torch.device | None,
) -> None:
    """Raises unless `value` is a plain tensor of one element, of one of these dtypes, on this device (None: any)."""
    if not isinstance(value, Tensor) or hasattr(value, "__tensor_flatten__"):
        raise TypeError(f"{name}: expected a plain tensor, got {type(value).__name__}")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {_or(dtypes)}, got {value.dtype}")
    if value.numel() != 1:
        raise ValueError(f"{name}: expected one element, got shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise _another_device(name, value, device)


def _scalar(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    """`value` as a tensor on the device. In float64, for a number shall stay the number that it is."""
    if isinstance(value, Tensor):
        require_floating(name, value)
        _require_scalar(name, value, None, device)
        return value
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value!r}: must be finite and not negative")
    return torch.full((), value, dtype=torch.float64, device=device)


def _another_device(name: str, value: Tensor, device: torch.device) -> ValueError:
    return ValueError(
        f"{name} is on {value.device}, step is on {device}: all must be on one device"
    )


def _local(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of a list as they lie on this device."""
    if isinstance(tensors, Tensor):
        raise TypeError(f"{name}: expected a list of tensors, got a tensor")
    if len(tensors) != len(params):
        raise ValueError(
            f"{name}: expected {len(params)} tensors, as many as params, got {len(tensors)}"
        )
    return [
        t if type(t) is Tensor or type(t) is torch.nn.Parameter else _shard(f"{name}[{i}]", t, p)
        for i, (t, p) in enumerate(zip(tensors, params, strict=True))
    ]


def _shard(name: str, t: Any, p: Tensor) -> Tensor:
    """A tensor itself, and of a DTensor the shard on this device."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if not hasattr(t, "__tensor_flatten__"):
        return t
    # It holds its values in other tensors.
    if torch.distributed.is_available():
        from torch.distributed._functional_collectives import AsyncCollectiveTensor
        from torch.distributed.tensor import DTensor

        if isinstance(t, DTensor):
            if isinstance(p, DTensor) and (t.device_mesh, t.placements) != (
                p.device_mesh,
                p.placements,
            ):
                raise ValueError(
                    f"{name}: is {t.placements} on {t.device_mesh}, its parameter is {p.placements} on "
                    f"{p.device_mesh}: both must be distributed alike"
                )
            local = t.to_local()
            if isinstance(local, AsyncCollectiveTensor):
                return local.wait()
            if not hasattr(local, "__tensor_flatten__"):
                return local
    raise TypeError(f"{name}: expected a plain tensor or a DTensor, got {type(t).__name__}")


def _require_weights(params: list[Tensor], device: torch.device) -> None:
    """Raises unless the parameters are dense, of one dtype, and on the device."""
    allowed = (torch.float32, torch.float64)
    for i, p in enumerate(params):
        if p.dtype not in allowed:
            raise TypeError(
                f"params[{i}]: expected {_or(allowed)}, got {p.dtype}, in which small updates are lost; weights of 16 "
                f"bits are kept as copies"
            )
        if p.dtype is not params[0].dtype:
            raise TypeError(f"params[{i}]: expected {params[0].dtype} as params[0], got {p.dtype}")
        if p.device != device:
            raise _another_device(f"params[{i}]", p, device)
        # `empty_like` keeps the strides of what is dense, and of nothing else.
        if not p.is_contiguous() and torch.empty_like(p, device="meta").stride() != p.stride():
            raise ValueError(
                f"params[{i}]: expected a tensor without gaps or overlaps in memory, got shape {tuple(p.shape)} with "
                f"strides {p.stride()}"
            )


def _require_like(
    name: str,
    tensors: list[Tensor],
    params: list[Tensor],
    dtypes: set[torch.dtype],
    *,
    strides: bool = True,
) -> None:
    """Raises unless the tensors are of one of these dtypes, and like the parameters otherwise."""
    for i, (t, p) in enumerate(zip(tensors, params, strict=True)):
        if t.layout is not torch.strided or t.dtype not in dtypes:
            raise TypeError(
                f"{name}[{i}]: expected a dense tensor of dtype {_or(dtypes)}, got dtype {t.dtype}, layout {t.layout}"
            )
        if t.dtype is not tensors[0].dtype:
            raise TypeError(f"{name}[{i}]: expected {tensors[0].dtype} as {name}[0], got {t.dtype}")
        if t.shape != p.shape:
            raise ValueError(
                f"{name}[{i}]: expected shape {tuple(p.shape)} as params[{i}], got {tuple(t.shape)}"
            )
        if t.device != p.device:
            raise _another_device(f"{name}[{i}]", t, p.device)
        if strides and t.stride() != p.stride() and not (t.is_contiguous() and p.is_contiguous()):
            raise ValueError(
                f"{name}[{i}]: expected strides {p.stride()} as params[{i}], got {t.stride()}"
            )


def _or(dtypes: Sequence[torch.dtype] | set[torch.dtype]) -> str:
    return " or ".join(sorted(map(str, dtypes)))
