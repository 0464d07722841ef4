"""One fused operation behind `torch.library`: its schema, its fake, and a slot for every backend.

The public functions call the reference directly when it is what would run, so that autograd and compilers see through
it; any other backend is called through the registered operator, which is opaque and has its own backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backend import BACKENDS, active_backend, reasons_not_usable
from ..validation import require_floating, require_same_device

library = torch.library.Library("fastdit", "DEF")

# The order in which `auto` tries the slots.
_PREFERENCE = {"cuda": ("triton", "native"), "cpu": ("native",)}


OPERATIONS: list[Operation] = []  # all of them, as they were registered


class Operation:
    """`torch.ops.fastdit.<name>`, registered for every device, and what runs behind it."""

    def __init__(
        self, schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]
    ) -> None:
        self.name = schema[: schema.index("(")]
        self.implementations: dict[str, Callable[..., Any]] = {"reference": _contiguous(reference)}
        OPERATIONS.append(self)
        library.define(schema)
        library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastdit::{self.name}", fake, lib=library)

    def choose(self, device: torch.device) -> str:
        """The backend that runs on `device`.

        Raises RuntimeError with every reason if the backend that was asked for cannot run this operation there.
        """
        wanted = active_backend()
        if wanted == "reference":
            return wanted
        if wanted == "auto":
            for backend in _PREFERENCE.get(device.type, ()):
                if backend in self.implementations and not reasons_not_usable(backend, device.type):
                    return backend
            return "reference"
        reasons = reasons_not_usable(wanted, device.type)
        if wanted not in self.implementations:
            reasons = [f"it has no {wanted} implementation", *reasons]
        if reasons:
            raise RuntimeError(f"backend {wanted!r} cannot run {self.name}: {'; '.join(reasons)}")
        return wanted

    def backends(self) -> list[str]:
        """The filled slots."""
        return [backend for backend in BACKENDS if backend in self.implementations]

    def _run(self, first: Tensor, *others: Any) -> Any:
        return self.implementations[self.choose(first.device)](first, *others)


def _contiguous(reference: Callable[..., Any]) -> Callable[..., Any]:
    """`reference` with contiguous results, whatever the strides of its inputs: the layout that the fakes promise."""

    def run(*arguments: Any) -> Any:
        results = reference(*arguments)
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
