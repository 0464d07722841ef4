"""Other libraries' names for the weights of a DiT, turned into the original's and back.

Known are the original's own names (also fast-DiT's, SiT's and those of most forks), REPA (the same, and projectors that
serve its training only), and diffusers' DiTTransformer2DModel. LightningDiT's blocks compute something else and are
refused.

diffusers has one difference in what is computed: its sinusoids of the timestep divide by 127 where the original divides
by 128. Its files hold no number for that, so reading and writing one says it in a note.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files import PathLike, atomic_folder, read_json, write_json
from ..models import get_2d_sincos_pos_embed
from .architecture import infer_config
from .reading import read_checkpoint

WEIGHTS_NAME = "diffusion_pytorch_model"

# The line that gives a DiTTransformer2DModel `model` the original's timestep frequencies.
ORIGINAL_FREQUENCIES = (
    "for block in model.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0"
)


@dataclass(frozen=True)
class Converted:
    """Weights under the original's names.

    `extra` holds what is no part of a DiT, `notes` what a user should know, `format` what it was: "original", "repa",
    "diffusers".
    """

    tensors: dict[str, Tensor]
    extra: dict[str, Tensor]
    notes: list[str]
    format: str


def to_original(tensors: Mapping[str, Tensor], *, input_size: int | None = None) -> Converted:
    """The same weights under the original's names.

    Args:
        tensors: a state dict in one of the formats above, with or without the prefixes of DistributedDataParallel
            (`module.`) and torch.compile (`_orig_mod.`).
        input_size: for diffusers' format, whose files do not hold the position embedding and do not show its size:
            `read_diffusers_folder` takes it from config.json.

    Of the original's names nothing is checked here (`infer_config` does). Of diffusers' every name must be there and no
    other, and the copies of the timestep MLP and of the label table that each block has must all be equal.

    Raises ValueError in one line saying which format it is and what does not fit, or that it is none.
    """
    tensors, notes = _without_prefixes(tensors)
    if any(name.startswith("transformer_blocks.") for name in tensors):
        return Converted(_from_diffusers(tensors, input_size), {}, notes, "diffusers")
    if "x_embedder.proj.weight" not in tensors or not any(n.startswith("blocks.") for n in tensors):
        first = ", ".join(list(tensors)[:3])
        raise ValueError(
            f"not the weights of a DiT as the original, REPA or diffusers name them; the first names are: {first}"
        )
    if foreign := _lightning(tensors):
        raise ValueError(
            f"these are LightningDiT's blocks, with {', '.join(foreign)}, which fastdit.DiT does not have"
        )
    extra = {name: value for name, value in tensors.items() if name.startswith("projectors.")}
    if not extra:
        return Converted(tensors, {}, notes, "original")
    own = {name: value for name, value in tensors.items() if name not in extra}
    notes.append(
        f"{len(extra)} tensors of REPA's projectors are set apart; only its training uses them"
    )
    return Converted(own, extra, notes, "repa")


def to_diffusers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the DiT `config` (`DiT.config`) under the names of diffusers' DiTTransformer2DModel.

    Every block gets its own copy of the timestep MLP and of the label table; the position embedding is left out,
    because diffusers computes it. All values are copied, on the CPU.

    Raises ValueError in one line if the weights are not this config's, or if diffusers cannot represent them
    (`diffusers_config`, and a position embedding that is not the sinusoidal one).
    """
    diffusers_config(config)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    size = config["input_size"]
    inferred = infer_config(shapes, num_classes=config["num_classes"], input_size=size).config
    # Any rate has the same table, and the ratio only counts by the width it gives.
    expected = {**config, "class_dropout_prob": 0.1, "mlp_ratio": 4.0}
    for name, value in inferred.items():
        if value != expected[name]:
            raise ValueError(f"weights have {name}={value}, the config has {expected[name]}")
    _position_error(tensors["pos_embed"], size // config["patch_size"])

    out: dict[str, Tensor] = {}
    for end in ("weight", "bias"):
        for own, theirs in _ONCE.items():
            out[f"{theirs}.{end}"] = tensors[f"{own}.{end}"]
        for index in range(config["depth"]):
            block, other = f"blocks.{index}", f"transformer_blocks.{index}"
            for own, theirs in _COPIED.items():
                if f"{own}.{end}" in tensors:
                    out[f"{other}.{theirs}.{end}"] = tensors[f"{own}.{end}"]
            for own, theirs in _BLOCK.items():
                out[f"{other}.{theirs}.{end}"] = tensors[f"{block}.{own}.{end}"]
            thirds = tensors[f"{block}.attn.qkv.{end}"].chunk(3)
            for letter, third in zip("qkv", thirds, strict=True):
                out[f"{other}.attn1.to_{letter}.{end}"] = third
    # Own memory each, because a safetensors file has no two names for one.
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in out.items()}


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of diffusers' DiTTransformer2DModel for `DiT.config`. Its norms get the original's eps, 1e-6.

    Raises ValueError naming the argument that diffusers cannot represent, or that is missing.
    """
    for name in _ARGUMENTS:
        if name not in config:
            raise ValueError(f"config has no {name}; expected what DiT.config gives")
    size, hidden_size = config["input_size"], config["hidden_size"]
    if config["conditioning"] != "adaln_zero":
        raise ValueError(
            f"conditioning={config['conditioning']!r}: diffusers' DiT has 'adaln_zero' only"
        )
    if not config["class_dropout_prob"] > 0:
        raise ValueError("class_dropout_prob=0: diffusers' label table always has a null class")
    if not isinstance(size, int):
        raise ValueError(f"input_size={size!r}: diffusers' DiT takes square images only")
    if int(hidden_size * config["mlp_ratio"]) != 4 * hidden_size:
        raise ValueError(f"mlp_ratio={config['mlp_ratio']}: diffusers' DiT has 4 only")
    if hidden_size % config["num_heads"]:
        raise ValueError(
            f"num_heads={config['num_heads']}: must be a divisor of hidden_size={hidden_size}"
        )
    return {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": hidden_size // config["num_heads"],
        "dropout": 0.0,
        "in_channels": config["in_channels"],
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config["num_heads"],
        "num_embeds_ada_norm": config["num_classes"],
        "num_layers": config["depth"],
        "out_channels": config["in_channels"] * (2 if config["learn_sigma"] else 1),
        "patch_size": config["patch_size"],
        "sample_size": size,
        "upcast_attention": False,
    }


def config_of_diffusers(json: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `DiT` for config.json of diffusers' DiTTransformer2DModel, num_heads included.

    Only these values are read; no text in them chooses code. A key that is not known must be empty (null or false) or
    begin with an underscore. `norm_eps` may be diffusers' default 1e-5, which is also what converted weights of the
    original carry there, although the original has 1e-6, as fastdit does.

    Raises ValueError in one line naming the key, its value and what is allowed.
    """
    if json.get("_class_name") not in _CLASSES:
        allowed = " or ".join(map(repr, _CLASSES))
        raise ValueError(f"_class_name={json.get('_class_name')!r}: expected {allowed}")
    for key in _COUNTS:
        value = json.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}={value!r}: expected a positive integer")
    for key, allowed_values in _FIXED.items():
        if json.get(key, _ABSENT.get(key)) not in allowed_values:
            allowed = " or ".join(map(repr, allowed_values))
            raise ValueError(f"{key}={json.get(key)!r}: fastdit.DiT has {allowed}")
    for key, value in json.items():
        known = key.startswith("_") or key in (*_COUNTS, *_FIXED, "out_channels", "norm_num_groups")
        if not known and value is not None and value is not False:
            raise ValueError(f"{key}={value!r}: no key of a DiT's config that fastdit knows")
    channels = json["in_channels"]
    out_channels = json.get("out_channels")
    if out_channels not in (None, channels, 2 * channels):
        raise ValueError(
            f"out_channels={out_channels!r}: expected {channels}, or {2 * channels} with learned variances"
        )
    return {
        "input_size": json["sample_size"],
        "patch_size": json["patch_size"],
        "in_channels": channels,
        "hidden_size": json["num_attention_heads"] * json["attention_head_dim"],
        "depth": json["num_layers"],
        "num_heads": json["num_attention_heads"],
        "mlp_ratio": 4.0,
        "class_dropout_prob": 0.1,
        "num_classes": json["num_embeds_ada_norm"],
        "learn_sigma": out_channels == 2 * channels,
        "conditioning": "adaln_zero",
    }


def read_diffusers_folder(
    folder: PathLike, *, check_finite: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """The weights under the original's names, the arguments of their `DiT`, and notes.

    `folder` has config.json and diffusion_pytorch_model.safetensors (in one file, or in several with their index; else
    .bin, read without running code), or is that of a DiTPipeline, with model_index.json and the folder `transformer`.
    `check_finite` refuses values that are NaN or infinite.

    Raises FileNotFoundError, and ValueError in one line naming the file and what does not fit.
    """
    folder = _transformer_folder(Path(folder))
    file = folder / "config.json"
    content = _read_object(file)
    tensors, notes = _read_weights(folder, check_finite)
    try:
        config = config_of_diffusers(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    try:
        converted = to_original(tensors, input_size=config["input_size"])
        shapes = {name: tuple(value.shape) for name, value in converted.tensors.items()}
        inferred = infer_config(
            shapes, num_classes=config["num_classes"], input_size=config["input_size"]
        ).config
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    for name, value in inferred.items():
        if config[name] != value:
            raise ValueError(
                f"{folder}: weights have {name}={value}, config.json has {config[name]}"
            )
    eps = content.get("norm_eps", _ABSENT["norm_eps"])
    notes += [
        *converted.notes,
        "fastdit computes as the original does, with timestep frequencies divided by 128 and eps 1e-06; diffusers "
        f"divides by 127 and has norm_eps={eps}: weights that diffusers trained itself give other outputs here",
    ]
    return converted.tensors, config, notes


def read_diffusers_labels(folder: PathLike) -> list[str] | None:
    """The names of the classes in a DiTPipeline's model_index.json, in the order of their labels; None without them.

    Raises ValueError naming the file if they are not numbered 0, 1, 2, ...
    """
    file = Path(folder) / "model_index.json"
    names = _read_object(file).get("id2label") if file.exists() else None
    if names is None:
        return None
    numbers = [str(index) for index in range(len(names))]
    if not isinstance(names, dict) or set(names) != set(numbers):
        raise ValueError(f"{file}: id2label must name the classes 0, 1, 2, ... one by one")
    return [str(names[number]) for number in numbers]


def write_diffusers_folder(
    folder: PathLike, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> list[str]:
    """Writes the DiT `config` (`DiT.config`) for `DiTTransformer2DModel.from_pretrained`, whole or not at all.

    Returns notes: what has to be set in diffusers for the same outputs. Raises FileExistsError if `folder` exists, and
    ValueError as `to_diffusers`.
    """
    converted = to_diffusers(tensors, config)
    with atomic_folder(folder) as temporary:
        write_json(temporary / "config.json", diffusers_config(config))
        save_file(converted, temporary / f"{WEIGHTS_NAME}.safetensors", metadata={"format": "pt"})
    notes = [
        "diffusers divides the timestep's frequencies by 127, the original by 128, so its outputs differ; "
        f"the original's come with: {ORIGINAL_FREQUENCIES}"
    ]
    error = _position_error(tensors["pos_embed"], config["input_size"] // config["patch_size"])
    if error > 0:
        notes.append(
            f"diffusers computes the position embedding itself; these weights' differs from it by up to {error:.1e}"
        )
    if config["num_classes"] != 1000:
        notes.append(
            f"diffusers' DiTPipeline takes 1000 for the null label, this model has {config['num_classes']}: "
            "without guidance only (guidance_scale=1)"
        )
    return notes


# ------------------------------------------------------------------ names

_PREFIX = "module."

# The original's names and diffusers', without ".weight" and ".bias": once in a model,
_ONCE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
# once in the original, but in every block of diffusers,
_COPIED = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
# and in every block of both. attn.qkv is attn1.to_q, to_k and to_v, one above the other.
_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}


def _without_prefixes(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    names = {name: name.replace("_orig_mod.", "") for name in tensors}
    if names and all(name.startswith(_PREFIX) for name in names.values()):
        names = {name: short.removeprefix(_PREFIX) for name, short in names.items()}
    stripped = [name for name, short in names.items() if name != short]
    if len(set(names.values())) < len(names):
        raise ValueError(f"{stripped[0]}: without its prefix, another tensor has the same name")
    note = f"prefixes are left away: {stripped[0]} is {names[stripped[0]]}" if stripped else None
    return {names[name]: value for name, value in tensors.items()}, [note] if note else []


def _lightning(tensors: Mapping[str, Tensor]) -> list[str]:
    """What these weights have of LightningDiT's that a DiT has not."""
    norm = (
        "final_layer.norm_final"  # with a bias it is a layer norm, as in two of the paper's blocks
    )
    parts = {
        "SwiGLU (mlp.w12)": any(".mlp.w12." in name for name in tensors),
        "RMSNorm (norm_final)": f"{norm}.weight" in tensors and f"{norm}.bias" not in tensors,
        "normalised queries (attn.q_norm)": any(".attn.q_norm." in name for name in tensors),
        "rotary positions (feat_rope)": any(name.startswith("feat_rope.") for name in tensors),
    }
    return [part for part, found in parts.items() if found]


def _from_diffusers(tensors: Mapping[str, Tensor], input_size: int | None) -> dict[str, Tensor]:
    """The tensors of a DiTTransformer2DModel under the original's names, in the original's order."""
    left = dict(tensors)

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"diffusers' names: missing {name}")
        return left.pop(name)

    def pair(theirs: str) -> list[tuple[str, Tensor]]:
        return [(end, take(f"{theirs}.{end}")) for end in ("weight", "bias")]

    once = {f"{own}.{end}": value for own, theirs in _ONCE.items() for end, value in pair(theirs)}
    stored_position = left.pop("pos_embed.pos_embed", None)  # of some older versions
    position = _position(once["x_embedder.proj.weight"], stored_position, input_size)
    first: dict[str, Tensor] = {}  # what each block has a copy of
    blocks: dict[str, Tensor] = {}
    indices = {int(n.split(".")[1]) for n in left if re.match(r"transformer_blocks\.\d+\.", n)}
    for index in range(len(indices)):
        block, other = f"blocks.{index}", f"transformer_blocks.{index}"
        for own, theirs in _COPIED.items():
            for end in ("weight",) if own.endswith("table") else ("weight", "bias"):
                name = f"{other}.{theirs}.{end}"
                copy = take(name)
                known = first.setdefault(f"{own}.{end}", copy)
                if copy.dtype != known.dtype or not torch.equal(copy, known):
                    raise ValueError(
                        f"{name} is not equal to that of block 0; the original has one for all blocks"
                    )
        for end in ("weight", "bias"):
            thirds = [take(f"{other}.attn1.to_{letter}.{end}") for letter in "qkv"]
            if len({third.shape for third in thirds}) > 1 or not thirds[0].dim():
                shapes = ", ".join(str(tuple(third.shape)) for third in thirds)
                raise ValueError(f"{other}.attn1: to_q, to_k and to_v have the shapes {shapes}")
            blocks[f"{block}.attn.qkv.{end}"] = torch.cat(thirds)
        for own, theirs in _BLOCK.items():
            blocks |= {f"{block}.{own}.{end}": value for end, value in pair(f"{other}.{theirs}")}
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ValueError(f"diffusers' names: unexpected {next(iter(left))}{more}")
    ends = [name for name in once if name.startswith("final_layer.")]
    return {
        "pos_embed": position,
        "x_embedder.proj.weight": once["x_embedder.proj.weight"],
        "x_embedder.proj.bias": once["x_embedder.proj.bias"],
        **first,
        **blocks,
        **{name: once[name] for name in sorted(ends, reverse=True)},
    }


# ------------------------------------------------------------------ the position embedding


def _position(proj: Tensor, stored: Tensor | None, input_size: int | None) -> Tensor:
    """The position embedding (1, T, D) in the dtype of `proj`, the patches' weight; `stored` must be the same."""
    if proj.dim() != 4 or not all(proj.shape):
        raise ValueError(
            f"pos_embed.proj.weight has shape {tuple(proj.shape)}, expected (D, C, P, P)"
        )
    hidden_size, patch_size = proj.shape[0], proj.shape[-1]
    if stored is not None and stored.dim() == 3:
        input_size = input_size or math.isqrt(stored.shape[1]) * patch_size
    if input_size is None:
        raise ValueError(
            "diffusers' weights do not show input_size; give the folder with config.json, or input_size"
        )
    side = input_size // patch_size
    if stored is not None:
        _position_error(stored, side)
    table = torch.from_numpy(get_2d_sincos_pos_embed(hidden_size, side)).float()
    return table.unsqueeze(0).to(proj.dtype)


def _position_error(stored: Tensor, side: int) -> float:
    """The largest difference of `stored` (1, T, D) from the sinusoids of a grid of side x side, in its own dtype.

    Raises ValueError if they are something else. An average of weights in float32 with a decay of 0.9999 moves even
    what is constant, until its step is rounded away: by up to 2**-25 / 1e-4 = 3e-4 for values up to 1. Narrow dtypes
    round by more.
    """
    hidden_size = stored.shape[-1] if stored.dim() else 0
    if tuple(stored.shape) != (1, side * side, hidden_size):
        raise ValueError(
            f"pos_embed has shape {tuple(stored.shape)}, expected (1, {side * side}, D) for {side}x{side} patches"
        )
    table = torch.from_numpy(get_2d_sincos_pos_embed(hidden_size, side)).float().unsqueeze(0)
    error = float((stored.detach().cpu().double() - table.to(stored.dtype).double()).abs().max())
    if not error <= max(1e-3, torch.finfo(stored.dtype).eps):
        raise ValueError(
            f"pos_embed differs from the sinusoidal one by {error:.1e}; diffusers can only compute that"
        )
    return error


# ------------------------------------------------------------------ diffusers' files

_ARGUMENTS = (
    "input_size",
    "patch_size",
    "in_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_ratio",
    "class_dropout_prob",
    "num_classes",
    "learn_sigma",
    "conditioning",
)
# The class had the second name when the first weights were published.
_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
_COUNTS = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "num_layers",
    "sample_size",
    "patch_size",
    "num_embeds_ada_norm",
)
_FIXED = {
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "attention_type": ("default",),
    "dropout": (0.0,),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-5, 1e-6),
    "norm_type": ("ada_norm_zero",),
    "upcast_attention": (False,),
}
# Keys that some versions do not write, and what they stand for then.
_ABSENT = {"attention_type": "default", "dropout": 0.0, "norm_eps": 1e-5, "upcast_attention": False}


def _read_object(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found a {type(content).__name__}")
    return content


def _transformer_folder(folder: Path) -> Path:
    """The folder of the transformer: `folder`, or `transformer` in a DiTPipeline's."""
    index = folder / "model_index.json"
    if not index.exists():
        return folder
    kind = _read_object(index).get("_class_name")
    if kind != "DiTPipeline":
        raise ValueError(f"{index}: _class_name={kind!r}, expected 'DiTPipeline'")
    return folder / "transformer"


def _read_weights(folder: Path, check_finite: bool) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a folder under diffusers' names, and notes of the reader."""
    index = folder / f"{WEIGHTS_NAME}.safetensors.index.json"
    names = [f"{WEIGHTS_NAME}{ending}" for ending in (".safetensors", ".bin")]
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if index.exists() and (found is None or found.suffix == ".bin"):
        return _read_shards(index, check_finite)
    if found is None:
        raise FileNotFoundError(f"{folder}: no {names[0]}, {index.name} or {names[1]}")
    checkpoint = read_checkpoint(found, check_finite=check_finite)
    return dict(checkpoint.tensors), list(checkpoint.notes)


def _read_shards(index: Path, check_finite: bool) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of all files that `index` names; it must name each tensor of them, and no path."""
    places = _read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index}: weight_map must say in which file each tensor is")
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    for name in sorted(set(places.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} is no name of a .safetensors file beside it")
        checkpoint = read_checkpoint(index.parent / name, check_finite=check_finite)
        expected = {key for key, place in places.items() if place == name}
        different = sorted(expected ^ set(checkpoint.tensors))
        if different:
            raise ValueError(
                f"{index.parent / name}: {different[0]} is in this file or in the index, not in both"
            )
        tensors |= checkpoint.tensors
        notes += checkpoint.notes
    return tensors, notes
