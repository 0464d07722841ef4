"""What the backends say about themselves: which inputs they take, and what has to be installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


class Described(Protocol):
    """What of a tensor decides about a backend; tensors have it, and `Like` has no more."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def requires_grad(self) -> bool: ...


class Like(NamedTuple):
    """Stands in for a tensor where there is none, or only a compiler's."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False


def needs_gradient(*tensors: Described) -> bool:
    """Whether a backward follows."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def limits(
    q: Described,
    *,
    dtypes: Sequence[torch.dtype],
    multiple: int = 1,
    largest: int,
    capability: tuple[int, int] | None = None,
) -> list[str]:
    """Why a backend with these limits on dtype, head_dim and, on CUDA, compute capability does not take q."""
    reasons = []
    if capability is not None:
        if q.device.type != "cuda":
            reasons.append(f"it runs on cuda, not on {q.device.type}")
        elif not torch.cuda.is_available():
            reasons.append("there is no CUDA device")
        elif (found := torch.cuda.get_device_capability(q.device)) < capability:
            needed = ".".join(map(str, capability))
            reasons.append(f"it needs compute capability {needed}, this is {found[0]}.{found[1]}")
    if q.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        reasons.append(f"{q.dtype} is not one of {names}")
    head_dim = q.shape[-1]
    if head_dim % multiple or head_dim > largest:
        multiples = "" if multiple == 1 else f"multiples of {multiple} "
        reasons.append(f"head_dim={head_dim}: it takes {multiples}up to {largest}")
    return reasons


def empty(q: Described, k: Described) -> list[str]:
    """For those that take no empty tensors."""
    if 0 not in q.shape and 0 not in k.shape:
        return []
    return [f"q {tuple(q.shape)}, k {tuple(k.shape)}: it takes no empty tensors"]


def refusal(usable: Any, q: Described, k: Described, v: Described) -> list[str]:
    """What torch says of real tensors on CUDA, by one of `torch.backends.cuda.can_use_..._attention`."""
    if type(q) is not Tensor or type(k) is not Tensor or type(v) is not Tensor:
        return []
    if q.device.type != "cuda":
        return []
    parameters: Any = torch.backends.cuda.SDPAParams
    heads_first = [dense(tensor).transpose(1, 2) for tensor in (q, k, v)]
    asked = parameters(*heads_first, None, 0.0, False, False)  # no mask, no dropout, not causal
    return [] if usable(asked) else [f"torch.backends.cuda.{usable.__name__} says no"]


def is_installed(package: str) -> bool:
    """Whether a top-level package can be found. It is not imported."""
    if package in sys.modules:
        return sys.modules[package] is not None
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        # Somebody forbids the import, by a finder.
        return False


def dense(x: Tensor) -> Tensor:
    """x with a dense last dimension, which every fused kernel wants; a copy only where it has none."""
    return x if x.stride(-1) == 1 else x.contiguous()
