"""`from_pretrained`: a model from whatever holds its weights, and the folders that hold one model.

A folder of `save_pretrained` has `config.json`, {"architecture": "fastdit.DiT", and the arguments of DiT}, and
`model.safetensors`. A string in a file never chooses code: of a description only the arguments of DiT are taken.
"""

from __future__ import annotations

import inspect
import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import PathLike, read_json, write_json
from ..models import DiT, get_2d_sincos_pos_embed
from ..validation import nearest
from . import manifest
from .architecture import HeadsUnknown, infer_config, load_into, resolve_heads
from .formats import read_diffusers_folder, to_original
from .hub import locate_pretrained, upload
from .reading import read_checkpoint
from .runs import is_run, load_description, locate
from .writing import CONFIG_KEY, save_weights

ARCHITECTURE = "fastdit.DiT"
LABEL_TABLE = "y_embedder.embedding_table.weight"

# What may differ from the weights' own model, because what they decide can be made anew.
OVERRIDES = (
    "num_classes",
    "input_size",
    "class_dropout_prob",
    "residual_dtype",
    "attention",
    "attention_deterministic",
)
# How a model runs is for its user to say, not for a file.
_NOT_IN_FILES = OVERRIDES[3:]


@dataclass(frozen=True)
class Pretrained:
    """Weights under the original's names, the arguments of the DiT they belong to, and what a user should know."""

    source: Path
    weights: dict[str, Tensor]
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Tensor] = field(
        default_factory=dict
    )  # what is no part of a DiT, as REPA's projectors
    format: str = "original"
    entry: str = ""  # of a training checkpoint, which set of weights


def from_pretrained(
    path_or_name: PathLike,
    *,
    which: str = "ema",
    num_heads: int | None = None,
    device: str | torch.device = "cpu",
    check_finite: bool = True,
    **overrides: Any,
) -> DiT:
    """The model of a checkpoint, in float32 and eval mode.

    Args:
        path_or_name: a file (safetensors, or the original's .pt: a bare state dict or a training checkpoint, also of
            fast-DiT, SiT and REPA), a folder (a run or a checkpoint of `fastdit train`, `save_pretrained`, diffusers'
            DiTTransformer2DModel or DiTPipeline), a name on the Hub (`org/name`), or one that the original published:
            `DiT-XL-2-256x256`, `DiT-XL-2-512x512` (downloaded once; their licence is CC-BY-NC 4.0).
        which: where there are several sets of weights: "ema", "model", or "ema:0.9999".
        num_heads: heads of the attention, which no shape shows. Needed where neither the file nor a published size
            says it; an error where that says otherwise.
        device: where to.
        check_finite: refuse weights that are NaN or infinite.
        overrides: for fine-tuning: `num_classes` (the label table is drawn anew, as `class_dropout_prob` where it adds
            or removes the null label), `input_size` (the position embedding is computed for the new grid, as the
            original does, without rescaling), `residual_dtype`, `attention`. A warning says what was made anew.

    Raises FileNotFoundError, and ValueError or TypeError in one line that names the file and the reason.
    """
    found = read_pretrained(
        path_or_name, which=which, num_heads=num_heads, check_finite=check_finite
    )
    for name in overrides:
        if name not in OVERRIDES:
            allowed = ", ".join(OVERRIDES)
            raise TypeError(f"{name}={overrides[name]!r}: allowed overrides are {allowed}")
    config = {**found.config, **overrides}
    try:
        # Without storage, since every value comes from the file: initialising an XL would take seconds.
        with torch.device("meta"):
            model = DiT(**config)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{found.source}: {error}") from None
    weights, made_anew = adapted(found, model)
    load_into(model.to_empty(device=device), weights, source=found.source)
    for note in [*found.notes, *made_anew]:
        warnings.warn(f"{found.source}: {note}", stacklevel=2)
    return model.eval()


def read_pretrained(
    path_or_name: PathLike,
    *,
    which: str = "ema",
    num_heads: int | None = None,
    check_finite: bool = True,
    heads_required: bool = True,
) -> Pretrained:
    """The weights at `path_or_name` and the arguments of their model; arguments and errors of `from_pretrained`.

    Where nothing tells the number of heads it is an error or, without `heads_required`, None in `config`.
    """
    path = locate_pretrained(path_or_name)
    if path.is_file():
        return _read_file(path, which, num_heads, check_finite, heads_required)
    if is_run(path):
        file, _ = locate(path, which)
        written = (file.parent / manifest.NAME).exists()
        if written and (wrong := manifest.problems(file.parent, only=(file.name, "model.json"))):
            raise ValueError(wrong[0])
        return _read_file(file, which, num_heads, check_finite, heads_required)
    if (path / "model_index.json").exists() or _is_diffusers(path / "config.json"):
        weights, config, notes = read_diffusers_folder(path, check_finite=check_finite)
        _require_heads(path, config["num_heads"], num_heads)
        return Pretrained(path, weights, config, notes, format="diffusers")
    if (path / "config.json").exists():
        return _read_saved(path, num_heads, check_finite)
    raise ValueError(
        f"{path}: no weights in this folder; expected a run (checkpoints/), model.json, config.json with "
        "model.safetensors, or model_index.json"
    )


def adapted(found: Pretrained, model: DiT) -> tuple[dict[str, Tensor], list[str]]:
    """The weights for a model with other labels or another grid, and what of them is made anew."""
    weights, notes = dict(found.weights), []
    there, here = found.config, model.config
    state = model.state_dict()
    if _labels(there) != _labels(here):
        own = state[LABEL_TABLE]  # as it was initialised, unless the model has no storage yet
        weights[LABEL_TABLE] = torch.normal(0.0, 0.02, tuple(own.shape)) if own.is_meta else own
        notes.append(
            f"the label table is drawn anew: the checkpoint has {_labels(there)}, the model {_labels(here)}"
        )
    if there["input_size"] != here["input_size"]:
        rows, columns = model.x_embedder.grid_size
        table = get_2d_sincos_pos_embed(here["hidden_size"], (rows, columns))
        weights["pos_embed"] = torch.from_numpy(table).float().unsqueeze(0)
        notes.append(f"the position embedding is computed for {rows}x{columns} tokens")
    return weights, notes


def _labels(config: Mapping[str, Any]) -> str:
    null = "a" if config["class_dropout_prob"] > 0 else "no"
    return f"num_classes={config['num_classes']} and {null} null label"


def save_pretrained(model: DiT, folder: PathLike) -> None:
    """Writes `config.json` and `model.safetensors` into `folder`, made if need be; `from_pretrained` reads it."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_weights(model, target / "model.safetensors")
    write_json(target / "config.json", {"architecture": ARCHITECTURE, **model.config})


def push_to_hub(
    model: DiT, repo_id: str, *, private: bool | None = None, commit_message: str
) -> str:
    """Uploads what `save_pretrained` writes to the Hub as `org/name`; the address of the commit.

    Raises ImportError without huggingface_hub, and what that raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        return upload(folder, repo_id, private=private, message=commit_message)


# ------------------------------------------------------------------ one kind of source each


def _read_file(
    path: Path, which: str, num_heads: int | None, check_finite: bool, heads_required: bool
) -> Pretrained:
    """A file of weights: its model is in model.json beside it, in the file, or in the shapes."""
    found = read_checkpoint(path, which=which, check_finite=check_finite)
    try:
        converted = to_original(found.tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    notes = [*found.notes, *converted.notes]
    stored = _stored_config(path, found.metadata)
    if stored is not None:
        config = stored
        _require_heads(path, config["num_heads"], num_heads)
    else:
        shapes = {name: tuple(value.shape) for name, value in converted.tensors.items()}
        try:
            inferred = infer_config(shapes, num_classes=_integer(found.metadata.get("num_classes")))
            config = dict(inferred.config)
            config["num_heads"] = resolve_heads(
                config, num_heads=num_heads, metadata=found.metadata, source=path
            )
        except HeadsUnknown:
            if heads_required:
                raise
            config["num_heads"] = None
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from None
        notes += inferred.notes
    return Pretrained(
        path,
        converted.tensors,
        config,
        notes,
        dict(converted.extra),
        converted.format,
        found.entry,
    )


def _read_saved(folder: Path, num_heads: int | None, check_finite: bool) -> Pretrained:
    file = folder / "config.json"
    content = read_json(file)
    if not isinstance(content, dict) or content.get("architecture") != ARCHITECTURE:
        kind = content.get("architecture") if isinstance(content, dict) else content
        raise ValueError(f"{file}: architecture={kind!r}, expected {ARCHITECTURE!r}")
    config = _checked(file, {k: v for k, v in content.items() if k != "architecture"})
    _require_heads(file, config["num_heads"], num_heads)
    found = read_checkpoint(folder / "model.safetensors", which="model", check_finite=check_finite)
    return Pretrained(folder, found.tensors, config, found.notes)


def _stored_config(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """What model.json beside a file says of the model, or the file itself; None if nothing does."""
    if (path.parent / "model.json").exists():
        return _checked(path.parent / "model.json", load_description(path)["model"])
    if CONFIG_KEY not in metadata:
        return None
    try:
        return _checked(path, json.loads(metadata[CONFIG_KEY]))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {CONFIG_KEY} in its metadata is not JSON: {error}") from None


def _checked(file: Path, config: Any) -> dict[str, Any]:
    """`config` if it has nothing but arguments of DiT, and num_heads among them."""
    if not isinstance(config, dict):
        raise ValueError(f"{file}: model={config!r}, expected the arguments of DiT")
    parameters = inspect.signature(DiT).parameters.items()
    defaults = {name: p.default for name, p in parameters if name not in _NOT_IN_FILES}
    allowed = list(defaults)
    for name in config:
        if name not in allowed:
            raise ValueError(f"{file}: {name} is no argument of DiT{nearest(name, allowed)}")
    if not isinstance(config.get("num_heads"), int):
        raise ValueError(f"{file}: num_heads={config.get('num_heads')!r}, expected an integer")
    # What an older file does not say is what DiT assumes.
    return {name: config.get(name, default) for name, default in defaults.items()}


def _require_heads(source: Path, stored: int, given: int | None) -> None:
    if given is not None and given != stored:
        raise ValueError(f"{source}: num_heads={given}, the checkpoint was trained with {stored}")


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _is_diffusers(file: Path) -> bool:
    if not file.exists():
        return False
    content = read_json(file)
    return isinstance(content, dict) and "_class_name" in content
