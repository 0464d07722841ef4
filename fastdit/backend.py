"""Which implementation of an operation runs.

Every operation in `fastdit.ops` has one slot a backend:

- `reference`: plain torch, on every device; what a compiler sees through and fuses itself;
- `native`: the compiled extension (`csrc/`);
- `triton`: the fused kernels (`kernels/`), on CUDA.

`auto` takes the fastest slot that is filled and can run here. A backend named by `use_backend` or by the environment
variable `FASTDIT_BACKEND` runs or raises: it never falls back.
"""

from __future__ import annotations

import importlib.util
import os
import re
from types import TracebackType

import torch

from .validation import require_choice

BACKENDS = ("reference", "native", "triton")
CHOICES = ("auto", *BACKENDS)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        # Somebody forbids the import, by a finder or by None in sys.modules.
        return False


# What can be imported does not change while a process runs; and a compiler cannot trace the look.
_FOUND = {package: _is_installed(package) for package in ("triton", "fastdit._C")}

_active = os.environ.get("FASTDIT_BACKEND", "auto")
require_choice("FASTDIT_BACKEND", _active, CHOICES)


class use_backend:
    """Chooses the backend of every operation: `"auto"` (default), `"reference"`, `"native"` or `"triton"`.

    Call it to set the backend for the process, or use it in a `with` statement to set it for a block.

    Raises ValueError for another name. A chosen backend that cannot run raises RuntimeError with the reasons when an
    operation is called, not here, since that depends on the operation and the device.
    """

    def __init__(self, name: str) -> None:
        global _active
        require_choice("name", name, CHOICES)
        self._previous = _active
        _active = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _active
        _active = self._previous


def active_backend() -> str:
    """The backend that was asked for: one of `CHOICES`."""
    return _active


def reasons_not_usable(backend: str, device_type: str | None = None) -> list[str]:
    """Why `backend` cannot run on this machine (or on this type of device); empty if it can."""
    require_choice("backend", backend, BACKENDS)
    reasons = []
    if backend == "native" and not _FOUND["fastdit._C"]:
        reasons.append("the compiled extension fastdit._C is not built")
    if backend == "triton":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if not _FOUND["triton"]:
            reasons.append("the package triton is not installed")
        if not torch.cuda.is_available() and not interpreted:
            reasons.append("there is no CUDA device, and TRITON_INTERPRET=1 is not set")
        elif device_type is not None and device_type != "cuda" and not interpreted:
            reasons.append(f"it runs on cuda, not on {device_type}")
    return reasons


def choose_device(name: str) -> torch.device:
    """The device that an option names: "cpu", "cuda", "cuda:1", or "auto", which is CUDA where there is one.

    Raises ValueError for another name and for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device={name!r}: allowed are 'auto', 'cpu', 'cuda', 'cuda:1'")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def describe() -> list[tuple[str, list[str]]]:
    """Every backend with the reasons why it cannot run on this machine."""
    return [(backend, reasons_not_usable(backend)) for backend in BACKENDS]
