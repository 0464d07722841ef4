"""What the shapes of weights tell of the model they belong to, and why they do not fit another."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..files import PathLike
from ..models import DiT


def load_into(model: nn.Module, weights: Mapping[str, Tensor], *, source: PathLike) -> None:
    """Gives `model` exactly these weights; values are cast to the model's dtype and moved to its device.

    Raises ValueError in one line, beginning with `source`, if a name is missing or unexpected or a shape differs. For a
    DiT it names the constructor argument that differs.
    """
    reason = _mismatch(model, weights)
    if reason:
        raise ValueError(f"{source}: {reason}")
    model.load_state_dict(weights)


def _mismatch(model: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    """Why `weights` do not fit, in one line, or None."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    if expected == found:
        return None
    if isinstance(model, DiT):
        null = model.null_label is not None
        in_model, in_checkpoint = _arguments(expected, null), _arguments(found, null)
        for name, value in in_checkpoint.items():
            if name in in_model and in_model[name] != value:
                reason = f"checkpoint has {name}={value}, model has {in_model[name]}"
                if name == "num_classes" and abs(value - in_model[name]) == 1:
                    reason += " (or only one of the two has a null class)"
                return reason
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    if missing or unexpected:
        parts = [f"missing {_first(missing)}"] if missing else []
        parts += [f"unexpected {_first(unexpected)}"] if unexpected else []
        return "; ".join(parts)
    key = next(key for key in expected if expected[key] != found[key])
    return f"{key} has shape {found[key]}, the model's has {expected[key]}"


def _first(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"


def _arguments(shapes: Mapping[str, tuple[int, ...]], null: bool) -> dict[str, Any]:
    """What the shapes of a DiT tell of its constructor's arguments, as far as the names are there.

    Whether the label table's last row is the null class cannot be seen; `null` says what to assume.
    """
    arguments: dict[str, Any] = {}

    def shape(name: str, dimensions: int) -> tuple[int, ...] | None:
        found = shapes.get(name, ())
        return found if len(found) == dimensions else None

    if "blocks.0.cross_attn.q.weight" in shapes:
        arguments["conditioning"] = "cross_attention"
    elif "blocks.0.norm1.weight" in shapes:
        arguments["conditioning"] = "in_context"
    elif modulation := shape("blocks.0.adaLN_modulation.1.weight", 2):
        gated = modulation[0] == 6 * modulation[1]
        arguments["conditioning"] = "adaln_zero" if gated else "adaln"
    blocks = [int(key.split(".")[1]) for key in shapes if re.match(r"blocks\.\d+\.", key)]
    arguments["depth"] = max(blocks, default=-1) + 1
    if fc1 := shape("blocks.0.mlp.fc1.weight", 2):
        arguments |= {"hidden_size": fc1[1], "mlp_ratio": fc1[0] / fc1[1]}
    if table := shape("y_embedder.embedding_table.weight", 2):
        arguments["num_classes"] = table[0] - null
    if proj := shape("x_embedder.proj.weight", 4):
        _, channels, patch_size, _ = proj
        arguments |= {"in_channels": channels, "patch_size": patch_size}
        if final := shape("final_layer.linear.weight", 2):
            arguments["learn_sigma"] = final[0] == 2 * channels * patch_size**2
        if position := shape("pos_embed", 3):
            side = math.isqrt(position[1])
            square = side * side == position[1]
            arguments["input_size"] = side * patch_size if square else f"({position[1]} tokens)"
    return arguments
