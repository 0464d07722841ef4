"""FlashAttention 3 where it is installed and the GPU is Hopper, else FlashAttention 2: optional packages.

`flash_attn_interface` is FlashAttention 3, `fa3_fwd_interface` (the package fa3-fwd) its forward alone without float16,
`flash_attn` is FlashAttention 2. Versions 2 and 3 round head_dim 72 up to 96. They are called with `deterministic`, by
which the backward sums dq in a fixed order. A compiler sees the operators that they register themselves.

The calls are tested against stand-ins; on a GPU they were not run.

Source: Dao 2023 (FlashAttention-2), Shah et al. 2024 (FlashAttention-3).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .limits import HALF, Described, dense, empty, is_installed, limits, needs_gradient

PACKAGES = ("flash_attn_interface", "fa3_fwd_interface", "flash_attn")  # in the order of preference

# What was asked for and found: the function by device, dtype, and whether a backward follows.
_found: dict[tuple[torch.device, torch.dtype, bool], Any] = {}


def reasons_not_usable(q: Described, k: Described, v: Described) -> list[str]:
    """float16 and bfloat16, head_dim in multiples of 8 up to 256, from compute capability 8.0 on, and a package.

    The package is imported when nothing else stands against it.
    """
    reasons = limits(q, dtypes=HALF, multiple=8, largest=256, capability=(8, 0)) + empty(q, k)
    installed = [package for package in PACKAGES if is_installed(package)]
    if not installed:
        reasons.append(f"none of the packages {', '.join(PACKAGES)} is installed")
    if reasons:
        return reasons
    training = needs_gradient(q, k, v)
    hopper = torch.cuda.get_device_capability(q.device)[0] == 9
    for package in installed:
        if package != "flash_attn" and not hopper:
            reasons.append(f"{package} is for compute capability 9")
        elif package == "fa3_fwd_interface" and (training or q.dtype is torch.float16):
            reasons.append(f"{package} has no {'backward' if training else 'float16'}")
        else:
            try:
                module = importlib.import_module(package)
                _found[q.device, q.dtype, training] = module.flash_attn_func
                return []
            except (ImportError, OSError, AttributeError) as error:
                reasons.append(f"{package} cannot be used: {error}")
    return reasons


def is_deterministic(q: Described) -> bool:
    return True


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, deterministic: bool = True
) -> Tensor:
    function: Callable[..., Any] = _found[q.device, q.dtype, needs_gradient(q, k, v)]
    out = function(dense(q), dense(k), dense(v), softmax_scale=scale, deterministic=deterministic)
    return out[0] if isinstance(out, tuple) else out  # early versions of 3 return lse, too
