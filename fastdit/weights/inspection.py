"""What a file of weights holds, before it is trusted: architecture, dtypes, statistics, and what is odd about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..files import PathLike
from ..models import get_2d_sincos_pos_embed
from .pretrained import Pretrained, read_pretrained

# Zero when training begins; zero afterwards means that it never began (Peebles & Xie, section 3.2).
_ZERO_AT_FIRST = re.compile(r"final_layer\.linear\.weight|.*adaLN_modulation\.1\.weight")


def inspect_weights(
    path_or_name: PathLike, *, which: str = "ema", num_heads: int | None = None
) -> dict[str, Any]:
    """What `from_pretrained` with these arguments would load; NaN and infinities are reported instead of refused.

    Returns source, format, entry (of a training checkpoint, "ema" or "model"), config (arguments of DiT), parameters,
    bytes, dtypes (bytes by dtype), tensors (one entry for each name, the blocks together: count, shape, rms from
    smallest to largest, largest magnitude), notes and odd (one line each). Raises as `from_pretrained`.
    """
    found = read_pretrained(
        path_or_name, which=which, num_heads=num_heads, check_finite=False, heads_required=False
    )
    dtypes: dict[str, int] = {}
    for value in found.weights.values():
        name = str(value.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + value.nbytes
    return {
        "source": str(found.source),
        "format": found.format,
        "entry": found.entry,
        "config": found.config,
        "parameters": sum(value.numel() for value in found.weights.values()),
        "bytes": sum(dtypes.values()),
        "dtypes": dtypes,
        "tensors": _statistics(found.weights),
        "notes": found.notes,
        "odd": _odd(found),
    }


def _statistics(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[Tensor]] = {}
    for name, value in weights.items():
        groups.setdefault(re.sub(r"^blocks\.\d+\.", "blocks.*.", name), []).append(value)
    table = {}
    for name, values in groups.items():
        rms = [value.float().square().mean().sqrt().item() for value in values]
        table[name] = {
            "count": len(values),
            "shape": list(values[0].shape),
            "rms": [min(rms), max(rms)],
            "largest": max(value.abs().max().item() for value in values),
        }
    return table


def _odd(found: Pretrained) -> list[str]:
    weights, config = found.weights, found.config
    odd = []
    for name, value in weights.items():
        broken = int((~torch.isfinite(value)).sum())
        if broken:
            odd.append(f"{name}: {broken:,} of {value.numel():,} values are NaN or infinite")
    zero = [name for name, value in weights.items() if not value.any() and name.endswith("weight")]
    initial = [name for name in weights if _ZERO_AT_FIRST.fullmatch(name)]
    if zero and set(zero) == set(initial):
        odd.append("as initialised: nothing has been trained, every output is zero")
    elif zero:
        odd.append(f"{len(zero)} weights are zero throughout, the first is {zero[0]}")
    if len({value.dtype for value in weights.values()}) > 1:
        odd.append("dtypes are mixed")
    position, size = weights["pos_embed"].float(), config["input_size"]
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    grid = (sides[0] // config["patch_size"], sides[1] // config["patch_size"])
    sincos = torch.from_numpy(get_2d_sincos_pos_embed(config["hidden_size"], grid)).float()
    error = (position[0] - sincos).abs().max().item()
    # Averaging in float32 has moved it by 1.6e-4 after 50,000 steps, and 16 bits round it.
    if not error <= max(1e-3, torch.finfo(weights["pos_embed"].dtype).eps):
        odd.append(f"the position embedding differs from the sinusoidal one by up to {error:.2g}")
    if config["class_dropout_prob"] == 0:
        odd.append("no null class: sampling without guidance only")
    if config["num_heads"] is None:
        odd.append(
            "num_heads is not recorded, and no shape shows it: it has to be given to load this"
        )
    if found.extra:
        odd.append(
            f"{len(found.extra)} tensors are no part of a DiT, the first is {next(iter(found.extra))}"
        )
    return odd
