"""Reading and writing weights, and the models of training runs.

Weights are safetensors files under the original's parameter names: reading one cannot run code. A file of weights does
not say which model it belongs to (the number of heads leaves no trace in any shape), so `model.json` lies beside it:

    {"format": 1, "model": DiT.config, "classes": [names], "diffusion": {arguments of create_diffusion},
     "images": {"space": "pixels" or "latents", "image_size": …, "channels": …, "vae": …, "scaling_factor": …}}
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .files import PathLike, atomic_file, read_json
from .models import DiT
from .validation import require_choice

FORMAT = 1
WHICH = ("ema", "model")

_STEP = re.compile(r"step-\d{8}")


def save_weights(model: nn.Module | Mapping[str, Tensor], path: PathLike) -> None:
    """Writes the parameters and buffers of `model`, or a state dict, as a safetensors file, whole or not at all.

    Keys are the original's: the prefixes of DistributedDataParallel (`module.`) and of torch.compile (`_orig_mod.`) are
    left away. Dtypes are kept; tensors are stored contiguously, whatever their strides.

    Raises ValueError for another ending than `.safetensors`, TypeError for what is not a tensor, and OSError.
    """
    _require_safetensors_ending(path)
    state = model.state_dict() if isinstance(model, nn.Module) else model
    tensors = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{key}: expected a tensor, got {type(value).__name__}")
        name = key.replace("_orig_mod.", "").removeprefix("module.")
        tensors[name] = value.detach().cpu().contiguous()
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def load_weights(path: PathLike) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, under their names and in their dtypes.

    Raises FileNotFoundError, and ValueError in one line that names the file and what it is instead: truncated, empty, a
    web page, a Git LFS pointer, another format.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if file.is_dir():
        raise ValueError(f"{path}: expected a .safetensors file, this is a folder")
    with open(file, "rb") as opened:
        reason = _not_weights(opened.read(512))
    if reason:
        raise ValueError(f"{path}: {reason}")
    _require_safetensors_ending(path)
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from None
    return tensors


def load_into(model: nn.Module, weights: Mapping[str, Tensor], *, source: PathLike) -> None:
    """Gives `model` exactly these weights; values are cast to the model's dtype and moved to its device.

    Raises ValueError in one line, beginning with `source`, if a name is missing or unexpected or a shape differs. For a
    DiT it names the constructor argument that differs.
    """
    reason = _mismatch(model, weights)
    if reason:
        raise ValueError(f"{source}: {reason}")
    model.load_state_dict(weights)


def latest_checkpoint(run_folder: PathLike) -> Path:
    """The newest checkpoint folder of a run, `checkpoints/step-XXXXXXXX` with the highest step.

    A checkpoint gets this name when it is complete; other names do not count.

    Raises FileNotFoundError if there is none.
    """
    folder = Path(run_folder) / "checkpoints"
    found = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir()]
    if not found:
        raise FileNotFoundError(f"{run_folder}: no checkpoint, expected checkpoints/step-XXXXXXXX")
    return max(found, key=lambda path: path.name)


def locate(path: PathLike, which: str = "ema") -> tuple[Path, Path]:
    """The files of weights and of the description that `path` stands for, as in `load_model`.

    Raises FileNotFoundError where nothing, or no description, is there.
    """
    given = Path(path)
    if not given.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if given.is_file():
        weights, folder = given, given.parent
    else:
        is_checkpoint = (given / "model.json").exists()
        folder = given if is_checkpoint else latest_checkpoint(given)
        weights = folder / f"{which}.safetensors"
    description = folder / "model.json"
    if not description.exists():
        raise FileNotFoundError(f"{description}: missing; without it the model is not known")
    return weights, description


def load_description(path: PathLike) -> dict[str, Any]:
    """What `model.json` says of the model at `path`: a run folder, a checkpoint folder or a .safetensors file.

    Raises FileNotFoundError, and ValueError naming the file for another format or a missing entry.
    """
    file = locate(path)[1]
    description = read_json(file)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else description
        raise ValueError(f"{file}: format={found!r}, expected {FORMAT}")
    for name, kind in {"model": dict, "classes": list, "diffusion": dict, "images": dict}.items():
        if not isinstance(description.get(name), kind):
            raise ValueError(
                f"{file}: {name}={description.get(name)!r}, expected a {kind.__name__}"
            )
    return description


def load_model(
    path: PathLike,
    *,
    which: Literal["ema", "model"] = "ema",
    device: str | torch.device = "cpu",
) -> DiT:
    """The model at `path`, in float32 and eval mode, on `device`.

    Args:
        path: a run folder (its newest checkpoint is taken), a checkpoint folder, or a .safetensors file with
            `model.json` beside it.
        which: of a folder, the averaged weights (`ema.safetensors`) or the trained ones (`model.safetensors`).
        device: where to.

    Raises FileNotFoundError, and ValueError in one line naming the file.
    """
    require_choice("which", which, WHICH)
    weights_file, description_file = locate(path, which)
    config = load_description(path)["model"]
    try:
        # Without storage, since every value comes from the file: initialising an XL would take seconds.
        with torch.device("meta"):
            model = DiT(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{description_file}: model: {error}") from None
    model.to_empty(device=device)
    load_into(model, load_weights(weights_file), source=weights_file)
    return model.eval()


def _require_safetensors_ending(path: PathLike) -> None:
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: only .safetensors files are read and written")


def _not_weights(start: bytes) -> str | None:
    """Why a file that begins with `start` cannot be safetensors, or None."""
    text = start.lstrip().lower()
    if not start:
        return "the file is empty"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "this is a web page; the download did not give the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return (
            "this is a pickled PyTorch checkpoint; only .safetensors files are read; convert its state dict with "
            "fastdit.save_weights(torch.load(path, weights_only=True), 'x.safetensors')"
        )
    return None


# ------------------------------------------------------------------ why weights do not fit


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
