"""How a kernel is launched, or recorded instead.

Recording gives, without a device, exactly what a launcher would run: `recording()` around a launcher called on tensors
of the meta device. Compiling ahead of time and its checks are built on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One launch: the `@triton.jit` function, its grid, its arguments by position, its constants, its options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    maxnreg: int | None


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects what would be launched inside of the block, and launches nothing."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int,
    num_stages: int = 3,
    maxnreg: int | None = None,
    **constants: Any,
) -> None:
    """Runs `kernel[grid](*arguments, **constants)` on the device of the first tensor, on its current stream.

    A grid with a zero runs nothing. `maxnreg` limits the registers of a thread. Multiplications and additions contract
    to one rounding (fma) in every kernel.
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, constants, num_warps, num_stages, maxnreg))
        return
    if 0 in grid:
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    # A launch goes to the current device, whatever its tensors say.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _run(kernel, grid, arguments, constants, num_warps, num_stages, maxnreg)
    else:
        _run(kernel, grid, arguments, constants, num_warps, num_stages, maxnreg)


def _run(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
    maxnreg: int | None,
) -> None:
    kernel[grid](
        *arguments,
        **constants,
        num_warps=num_warps,
        num_stages=num_stages,
        maxnreg=maxnreg,
        enable_fp_fusion=True,
    )
