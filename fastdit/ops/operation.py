"""One fused operation behind `torch.library`: its schema, its fake, and a slot for every backend.

The public functions call the reference directly when it is what would run, so that autograd and compilers see through
it; any other backend is called through the registered operator, which is opaque and has its own backward.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backend import BACKENDS, active_backend, reasons_not_usable
from ..validation import require_floating, require_same_device

library = torch.library.Library("fastdit", "DEF")

# The order in which `auto` tries the slots.
_PREFERENCE = {"cuda": ("triton", "native"), "cpu": ("native",)}

# What the kernels compute in; float64 is for the reference.
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What `auto` has said already: (operation, reason).
_said: set[tuple[str, str]] = set()

Limits = Callable[..., list[str]]

OPERATIONS: list[Operation] = []  # all of them, as they were registered


class Operation:
    """`torch.ops.fastdit.<name>`, registered for every device, and what runs behind it."""

    def __init__(
        self, schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]
    ) -> None:
        self.name = schema[: schema.index("(")]
        self.implementations: dict[str, Callable[..., Any]] = {"reference": _contiguous(reference)}
        self.limits: dict[str, Limits] = {}
        OPERATIONS.append(self)
        library.define(schema)
        library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastdit::{self.name}", fake, lib=library)

    def add_kernel(
        self,
        module: str,
        function: str,
        *,
        limits: Limits,
        adapt: Callable[[Any], Any] = lambda results: results,
    ) -> None:
        """Fills the Triton slot with `fastdit.kernels.<module>.<function>`, which is imported when it is first called.

        The kernel takes the operator's arguments; `adapt` makes the operator's results of its results. `limits` says
        why the kernel cannot take these arguments; empty if it can.
        """
        kernel: Callable[..., Any] | None = None

        def run(*arguments: Any) -> Any:
            nonlocal kernel
            if kernel is None:
                kernel = getattr(importlib.import_module(f"fastdit.kernels.{module}"), function)
            return adapt(kernel(*arguments))

        self.implementations["triton"] = run
        self.limits["triton"] = limits

    def choose(self, *arguments: Any) -> str:
        """The backend that runs for these arguments, the first of which is a tensor.

        Raises RuntimeError with every reason if the backend that was asked for cannot run this operation there.
        """
        wanted = active_backend()
        if wanted == "reference":
            return wanted
        device_type = arguments[0].device.type
        if wanted != "auto":
            reasons = self._reasons(wanted, device_type, arguments)
            if reasons:
                raise RuntimeError(
                    f"backend {wanted!r} cannot run {self.name}: {'; '.join(reasons)}"
                )
            return wanted
        for backend in _PREFERENCE.get(device_type, ()):
            if backend in self.implementations:
                reasons = self._reasons(backend, device_type, arguments)
                if not reasons:
                    return backend
                if backend == "triton":
                    _say_once(self.name, "; ".join(reasons))
        return "reference"

    def backends(self) -> list[str]:
        """The filled slots."""
        return [backend for backend in BACKENDS if backend in self.implementations]

    def _reasons(self, backend: str, device_type: str, arguments: tuple[Any, ...]) -> list[str]:
        reasons = reasons_not_usable(backend, device_type)
        if backend not in self.implementations:
            reasons = [f"it has no {backend} implementation", *reasons]
        if backend in self.limits:
            reasons = [*reasons, *self.limits[backend](*arguments)]
        return reasons

    def _run(self, *arguments: Any) -> Any:
        return self.implementations[self.choose(*arguments)](*arguments)


def _say_once(name: str, reason: str) -> None:
    """Warns, once, that `auto` leaves the kernel for plain torch on a GPU."""
    if not torch.compiler.is_compiling() and (name, reason) not in _said:
        _said.add((name, reason))
        warnings.warn(f"fastdit: {name} runs in plain torch: {reason}", stacklevel=4)


def row_limits(x: Tensor, *others: Any) -> list[str]:
    """What the kernels over rows of x (…, D) cannot take: other dtypes than 16 and 32 bits, D above 8192."""
    reasons = dtype_limits(x, *others)
    if not 1 <= x.shape[-1] <= 8192:
        reasons.append(f"D={x.shape[-1]}: the kernels take 1 .. 8192")
    return reasons


def dtype_limits(*arguments: Any) -> list[str]:
    """The dtypes among the tensors of `arguments` that no kernel takes."""
    dtypes = {a.dtype for a in arguments if isinstance(a, Tensor)}
    return [
        f"{dtype} is not one of float32, bfloat16, float16"
        for dtype in dtypes
        if dtype not in _KERNEL_DTYPES
    ]


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records anything for these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _contiguous(reference: Callable[..., Any]) -> Callable[..., Any]:
    """`reference` with contiguous results, whatever the strides of its inputs: the layout that the fakes promise."""

    def run(*arguments: Any) -> Any:
        results = reference(*arguments)
        if results is None:  # it works in place
            return None
        if isinstance(results, Tensor):
            return results.contiguous()
        return tuple(result.contiguous() for result in results)

    return run


def require_tokens(argument: str, x: Tensor) -> None:
    """Raises unless `x` is a dense floating-point tensor (N, T, D)."""
    require_floating(argument, x)
    if x.dim() != 3:
        raise ValueError(f"{argument}: expected shape (N, T, D), got {tuple(x.shape)}")


def require_modulation(x: Tensor, **vectors: Tensor | None) -> None:
    """Raises unless every vector is None, (N, D) or (D,), floating-point, and on the device of `x`."""
    n, _, d = x.shape
    for argument, vector in vectors.items():
        if vector is None:
            continue
        require_floating(argument, vector)
        if tuple(vector.shape) not in ((n, d), (d,)):
            raise ValueError(
                f"{argument}: expected shape ({n}, {d}) or ({d},) for x of shape {tuple(x.shape)}, "
                f"got {tuple(vector.shape)}"
            )
    require_same_device(x=x, **vectors)


def require_both_or_neither(shift: Tensor | None, scale: Tensor | None) -> None:
    if (shift is None) != (scale is None):
        missing = "shift" if shift is None else "scale"
        raise ValueError(f"{missing}=None: shift and scale are given together or not at all")


def absent(like: Tensor) -> Tensor:
    """What an operator returns where there is no gradient: it cannot return None."""
    return like.new_empty(0)


def without_none(results: tuple[Tensor | None, ...]) -> Any:
    """The results of an operator, the first of which is there: an `absent` one for each that is None."""
    first = results[0]
    return tuple(absent(first) if each is None else each for each in results)  # type: ignore[arg-type]


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient by the weight (out, in) of `y = x weight^T`; dy (..., out), x (..., in)."""
    return dy.reshape(-1, dy.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
