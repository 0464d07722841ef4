"""Checks of arguments, and how much of them is done.

Shape, dtype and device are checked on every call, because that costs nothing. Values (label range, finiteness) have to
be read from the device, so they are checked once at the entry of a sampling or training run, and on every call only
under `validate("full")`; never while compiling or capturing a graph.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

MODES = ("shapes", "full")


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for a misspelt `name`, or nothing."""
    match = difflib.get_close_matches(name, list(allowed), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def require_choice(argument: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        hint = (
            nearest(value, [a for a in allowed if isinstance(a, str)])
            if isinstance(value, str)
            else ""
        )
        raise ValueError(f"{argument}={value!r}: allowed are {', '.join(map(repr, allowed))}{hint}")


def require_floating(argument: str, value: Any) -> None:
    """Raises TypeError unless `value` is a dense, real floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_quantized or not value.dtype.is_floating_point:
        raise TypeError(
            f"{argument}: expected a dense floating-point tensor, got dtype {value.dtype}, layout {value.layout}"
        )


def require_same_device(**tensors: Tensor | None) -> None:
    """Raises ValueError unless all tensors are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} is on {device}" for name, device in devices.items())
        raise ValueError(f"{found}: all must be on one device")


# Asked once, because not every compiler can trace the question.
_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla")
_WITH_AUTOCAST = frozenset(kind for kind in _DEVICES if torch.amp.is_autocast_available(kind))


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for this type of device (`meta` and others have none)."""
    return device.type in _WITH_AUTOCAST and torch.is_autocast_enabled(device.type)


class validate:
    """How much is checked from now on: `"shapes"` (default) or `"full"`, which also reads values on every call.

    Call it to set the mode for the process, or use it in a `with` statement to set it for a block. The environment
    variable `FASTDIT_VALIDATE` sets the initial mode.

    Raises ValueError for another mode.
    """

    _mode: str | None = None

    def __init__(self, mode: str) -> None:
        require_choice("mode", mode, MODES)
        self._previous = validate._mode
        validate._mode = mode

    def __enter__(self) -> validate:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        validate._mode = self._previous


def checks_values(x: Tensor) -> bool:
    """Whether values are to be read and checked in this call with `x`, which has none on `meta`."""
    if torch.compiler.is_compiling() or x.is_meta:
        return False
    if validate._mode is None:
        mode = os.environ.get("FASTDIT_VALIDATE", "shapes")
        require_choice("FASTDIT_VALIDATE", mode, MODES)
        validate._mode = mode
    if validate._mode != "full":
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
