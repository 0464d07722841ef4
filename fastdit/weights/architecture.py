"""What the shapes of weights tell of the model they belong to, and why they do not fit another.

Shapes show every argument of DiT but two: the number of heads, and whether the label table's last row is the null
class. Both are taken from what is recorded, or asked for; where a convention decides, that is said.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..files import PathLike
from ..models import DiT

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """What shapes tell: `config`, the arguments of DiT but num_heads, and `notes`, what was assumed."""

    config: dict[str, Any]
    notes: list[str]


def infer_config(
    shapes: Shapes,
    *,
    num_classes: int | None = None,
    input_size: int | tuple[int, int] | None = None,
) -> Architecture:
    """The arguments of `DiT`, num_heads left out, whose state dict has exactly these names and shapes.

    Args:
        shapes: of a state dict under the original's names.
        num_classes: decides whether the label table's last row is the null class. Without it the table of a published
            model, 1001 rows, has one; 1000 rows have none; any other is taken to have one, because the original's
            training always writes it, and a note says so.
        input_size: of images that are not square, which no shape shows: 16 positions are taken for 4 x 4, not 2 x 8.

    `class_dropout_prob` is 0.1 with a null class and 0 without. Raises ValueError in one line saying what does not fit.
    """
    _require_whole_blocks(shapes)
    told = _arguments(shapes)
    for argument, name in _TOLD_BY.items():
        if argument not in told:
            found = f"has shape {tuple(shapes[name])}" if name in shapes else "is missing"
            raise ValueError(f"{argument} cannot be told: {name} {found}")
    rows = shapes["final_layer.linear.weight"][0]
    plain = told["in_channels"] * told["patch_size"] ** 2
    if rows not in (plain, 2 * plain):
        raise ValueError(
            f"final_layer.linear.weight has {rows} rows; with in_channels={told['in_channels']} and "
            f"patch_size={told['patch_size']} it has {plain} (learn_sigma=False) or {2 * plain} (learn_sigma=True)"
        )
    if input_size is not None:
        told["input_size"] = input_size
    elif isinstance(told["input_size"], str):
        raise ValueError(
            f"pos_embed has {shapes['pos_embed'][1]} positions, which is no square number; "
            "pass input_size=(height, width)"
        )
    classes, dropout, notes = _classes(told["num_classes"], num_classes)
    config = {
        "input_size": told["input_size"],
        "patch_size": told["patch_size"],
        "in_channels": told["in_channels"],
        "hidden_size": told["hidden_size"],
        "depth": told["depth"],
        "mlp_ratio": told["mlp_ratio"],
        "class_dropout_prob": dropout,
        "num_classes": classes,
        "learn_sigma": told["learn_sigma"],
        "conditioning": told["conditioning"],
    }
    reason = _difference(_expected(config), shapes)
    if reason:
        raise ValueError(f"not the weights of a {told['conditioning']} DiT: {reason}")
    return Architecture(config, notes)


# The models of the paper, table 1: hidden_size, depth and num_heads of each letter, all of them with patches of
# 2, 4 and 8. SiT and REPA took over these sizes and names.
_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
_PATCHES = (2, 4, 8)
_MODEL_NAME = re.compile(r"\b[DS]iT-(S|B|L|XL)[-/](\d+)\b")


def known_heads(config: Mapping[str, Any]) -> int | None:
    """The heads of the published model with this hidden_size, depth and patch_size, or None if there is none."""
    if config["patch_size"] not in _PATCHES:
        return None
    sizes = (config["hidden_size"], config["depth"])
    return next((heads for *size, heads in _SIZES.values() if tuple(size) == sizes), None)


class HeadsUnknown(ValueError):
    """Nothing tells the number of heads."""


def resolve_heads(
    config: Mapping[str, Any],
    *,
    num_heads: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    source: PathLike = "checkpoint",
) -> int:
    """The number of heads of the model `config` (of `infer_config`), which no shape shows. It is never guessed.

    In this order: `num_heads`; what the checkpoint records in `metadata`, "num_heads" or a name such as "DiT-XL/2" as
    "model", there or in its "args"; a name in the path `source`; a published size (`known_heads`).

    Raises ValueError in one line beginning with `source` if none of them says it, if the record says otherwise than the
    argument or the weights, or if hidden_size is not divisible by it. Warns where the argument is not what the size was
    published with, since nothing else would show the mistake.
    """
    recorded = _recorded_heads(config, metadata or {}, source)
    claims = recorded if num_heads is None else {"the argument": num_heads, **recorded}
    heads: int | None
    published = known_heads(config)
    if claims:
        origin, heads = next(iter(claims.items()))
    else:
        origin, heads = "its size", _heads_of_name(str(source), config) or published
    hidden_size = config["hidden_size"]
    if heads is None:
        raise HeadsUnknown(
            f"{source}: num_heads is not recorded and no shape shows it; pass num_heads, a divisor of "
            f"hidden_size={hidden_size}"
        )
    for where, said in claims.items():
        if said != heads:
            raise ValueError(f"{source}: num_heads={heads!r} by {origin}, but {said} by {where}")
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or hidden_size % heads:
        raise ValueError(
            f"{source}: num_heads={heads!r}: must be a positive divisor of hidden_size={hidden_size}"
        )
    if not recorded and published not in (None, heads):
        warnings.warn(
            f"{source}: num_heads={heads}, but the published model of this size has {published}",
            stacklevel=2,
        )
    return heads


def load_into(model: nn.Module, weights: Mapping[str, Tensor], *, source: PathLike) -> list[str]:
    """Gives `model` exactly these weights; values are cast to the model's dtype and moved to its device.

    A model on the meta device has no values to write into: it takes over these very tensors, in their own dtypes.

    Returns what a user should know: that values were cast.

    Raises ValueError in one line, beginning with `source`, if a name is missing or unexpected or a shape differs. For a
    DiT it names the constructor argument that differs.
    """
    reason = _mismatch(model, weights)
    if reason:
        raise ValueError(f"{source}: {reason}")
    own = model.state_dict()
    if all(value.is_meta for value in own.values()):
        model.load_state_dict(weights, assign=True)
        return []
    casts = {
        f"{value.dtype} weights are cast to the model's {own[key].dtype}".replace("torch.", "")
        for key, value in weights.items()
        if value.dtype != own[key].dtype
    }
    model.load_state_dict(weights)
    return sorted(casts)


def _mismatch(model: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    """Why `weights` do not fit, in one line, or None."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    if expected != found and isinstance(model, DiT):
        null = int(model.null_label is not None)
        in_model, in_checkpoint = _arguments(expected), _arguments(found)
        for name, value in in_checkpoint.items():
            if name in in_model and in_model[name] != value:
                own = in_model[name]
                if name != "num_classes":
                    return f"checkpoint has {name}={value}, model has {own}"
                reason = f"checkpoint has {name}={value - null}, model has {own - null}"
                if abs(value - own) == 1:
                    reason += " (or only one of the two has a null class)"
                return reason
    return _difference(expected, found)


def _difference(expected: Shapes, found: Shapes) -> str | None:
    """The first difference in names or shapes, in one line, or None."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    if missing or unexpected:
        parts = [f"missing {_first(missing)}"] if missing else []
        parts += [f"unexpected {_first(unexpected)}"] if unexpected else []
        return "; ".join(parts)
    for key, shape in expected.items():
        if tuple(found[key]) != shape:
            return f"{key} has shape {tuple(found[key])}, the model's has {shape}"
    return None


def _first(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"


# Which tensor shows which argument, for `infer_config`; one of another number of dimensions shows nothing.
_TOLD_BY = {
    "hidden_size": "blocks.0.mlp.fc1.weight",
    "mlp_ratio": "blocks.0.mlp.fc1.weight",
    "conditioning": "blocks.0.adaLN_modulation.1.weight",
    "num_classes": "y_embedder.embedding_table.weight",
    "in_channels": "x_embedder.proj.weight",
    "patch_size": "x_embedder.proj.weight",
    "learn_sigma": "final_layer.linear.weight",
    "input_size": "pos_embed",
}


def _arguments(shapes: Shapes) -> dict[str, Any]:
    """What the shapes of a DiT tell of its constructor's arguments, as far as the names are there.

    "num_classes" is the number of rows of the label table, the null class included. A number of positions that is no
    square makes "input_size" a text that names it.
    """
    arguments: dict[str, Any] = {}

    def shape(name: str, dimensions: int) -> tuple[int, ...] | None:
        found = tuple(shapes.get(name, ()))
        return found if len(found) == dimensions and all(found) else None

    if "blocks.0.cross_attn.q.weight" in shapes:
        arguments["conditioning"] = "cross_attention"
    elif "blocks.0.norm1.weight" in shapes:
        arguments["conditioning"] = "in_context"
    elif modulation := shape("blocks.0.adaLN_modulation.1.weight", 2):
        gated = modulation[0] == 6 * modulation[1]
        arguments["conditioning"] = "adaln_zero" if gated else "adaln"
    arguments["depth"] = max(_block_indices(shapes), default=-1) + 1
    if fc1 := shape("blocks.0.mlp.fc1.weight", 2):
        arguments |= {"hidden_size": fc1[1], "mlp_ratio": _mlp_ratio(*fc1)}
    if table := shape("y_embedder.embedding_table.weight", 2):
        arguments["num_classes"] = table[0]
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


def _mlp_ratio(hidden: int, width: int) -> float:
    """The ratio with `int(width * ratio) == hidden`; rounding may have left the quotient just below it."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _block_indices(shapes: Shapes) -> set[int]:
    return {int(key.split(".")[1]) for key in shapes if re.match(r"blocks\.\d+\.", key)}


def _require_whole_blocks(shapes: Shapes) -> None:
    indices = _block_indices(shapes)
    if not indices:
        raise ValueError("depth cannot be told: no name begins with blocks.0.")
    missing = next(index for index in range(len(indices) + 1) if index not in indices)
    if missing < len(indices):
        raise ValueError(
            f"depth cannot be told: blocks.{missing} is missing, though blocks.{max(indices)} is there"
        )


def _classes(rows: int, num_classes: int | None) -> tuple[int, float, list[str]]:
    """num_classes and class_dropout_prob of a label table with `rows` rows, and what was assumed."""
    if num_classes is not None:
        if rows - num_classes not in (0, 1):
            raise ValueError(
                f"num_classes={num_classes}: the label table has {rows} rows, expected {num_classes}, or "
                f"{num_classes + 1} with the null class"
            )
        return num_classes, 0.1 if rows > num_classes else 0.0, []
    if rows == 1001:
        return 1000, 0.1, []
    if rows in (1, 1000):
        note = f"the label table of {rows} rows is taken for {rows} classes and no null class, hence no guidance"
        return rows, 0.0, [note]
    note = (
        f"the label table of {rows} rows is taken for {rows - 1} classes and the null class; "
        f"num_classes={rows} says that it has none"
    )
    return rows - 1, 0.1, [note]


def _expected(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the DiT `config`, whatever its heads."""
    try:
        # All blocks are alike, so one is made; no shape depends on the heads.
        with torch.device("meta"):
            model = DiT(**{**config, "depth": 1, "num_heads": 1})
    except ValueError as error:
        raise ValueError(f"no DiT has these shapes: {error}") from None
    expected = {}
    for key, value in model.state_dict().items():
        if key.startswith("blocks.0."):
            for index in range(config["depth"]):
                expected[f"blocks.{index}.{key.removeprefix('blocks.0.')}"] = tuple(value.shape)
        else:
            expected[key] = tuple(value.shape)
    return expected


def _recorded_heads(
    config: Mapping[str, Any], metadata: Mapping[str, Any], source: PathLike
) -> dict[str, int]:
    """What the metadata, and the training's arguments in it, say: by where they say it."""
    heads: dict[str, int] = {}
    args = metadata.get("args")
    args = args if isinstance(args, Mapping) else getattr(args, "__dict__", {})
    records: dict[str, Mapping[str, Any]] = {"its metadata": metadata, "its args": args}
    for where, record in records.items():
        value = record.get("num_heads")
        if value is not None:
            if not re.fullmatch(r"[1-9]\d*", str(value)):  # safetensors stores text
                raise ValueError(f"{source}: num_heads={value!r} in {where} is no number of heads")
            heads[where] = int(value)
        name = record.get("model")
        if isinstance(name, str) and _MODEL_NAME.search(name):
            found = _heads_of_name(name, config)
            if found is None:
                own = ", ".join(
                    f"{key}={config[key]}" for key in ("hidden_size", "depth", "patch_size")
                )
                raise ValueError(f"{source}: model={name!r} in {where}, but the weights have {own}")
            heads[f"model={name!r} in {where}"] = found
    return heads


def _heads_of_name(text: str, config: Mapping[str, Any]) -> int | None:
    """The heads of the model that `text` names, as "DiT-XL/2" or "SiT-XL-2-256x256", if `config` has its sizes."""
    for letter, patch_size in _MODEL_NAME.findall(text):
        hidden_size, depth, heads = _SIZES[letter]
        if (hidden_size, depth, int(patch_size)) == tuple(
            config[key] for key in ("hidden_size", "depth", "patch_size")
        ):
            return heads
    return None
