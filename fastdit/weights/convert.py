"""Weights in one format to a file or folder in another."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch

from ..files import PathLike, atomic_file
from ..models import DiT
from ..validation import require_choice
from .architecture import load_into
from .formats import write_diffusers_folder
from .pretrained import Pretrained, read_pretrained
from .writing import save_weights

Format = Literal["safetensors", "diffusers", "original"]


def convert(
    source: PathLike,
    target: PathLike,
    *,
    to: Format = "safetensors",
    which: str = "ema",
    num_heads: int | None = None,
) -> list[str]:
    """Writes the weights that `from_pretrained(source)` would load, values and dtypes as they are; notes for the user.

    `to`: "safetensors", one file under the original's names that also says which model it is; "original", a bare state
    dict for torch.load, as facebookresearch/DiT publishes it; "diffusers", a folder for
    `DiTTransformer2DModel.from_pretrained`.

    Raises as `from_pretrained`, and FileExistsError or ValueError where `target` cannot be such a file or folder.
    """
    require_choice("to", to, get_args(Format))
    path = Path(target)
    if to == "original" and path.suffix not in (".pt", ".pth"):
        raise ValueError(f"{target}: expected a name that ends in .pt")
    found = read_pretrained(source, which=which, num_heads=num_heads)
    model = _model(found)
    if to == "diffusers":
        return found.notes + write_diffusers_folder(path, found.weights, found.config)
    if to == "original":
        with atomic_file(path) as temporary:
            torch.save(model.state_dict(), temporary)
    else:
        save_weights(model, path)
    return found.notes


def _model(found: Pretrained) -> DiT:
    """The model of these weights, which checks them, sharing their memory and keeping their dtypes."""
    with torch.device("meta"):
        model = DiT(**found.config)
    load_into(model, found.weights, source=found.source)
    return model
