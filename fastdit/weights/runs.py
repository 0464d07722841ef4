"""The models of training runs.

A file of weights does not say which model it belongs to (the number of heads leaves no trace in any shape), so
`model.json` lies beside it:

    {"format": 1, "model": DiT.config, "classes": [names], "diffusion": {arguments of create_diffusion},
     "images": {"space": "pixels" or "latents", "image_size": …, "channels": …, "vae": …, "scaling_factor": …}}
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..files import PathLike, read_json
from . import manifest

FORMAT = 1

_STEP = re.compile(r"step-\d{8}")


def latest_checkpoint(run_folder: PathLike) -> Path:
    """The newest checkpoint folder of a run, `checkpoints/step-XXXXXXXX` with the highest step.

    Raises FileNotFoundError if there is none.
    """
    found = checkpoints(run_folder)
    if not found:
        raise FileNotFoundError(f"{run_folder}: no checkpoint, expected checkpoints/step-XXXXXXXX")
    return found[-1]


def checkpoints(run_folder: PathLike) -> list[Path]:
    """All checkpoint folders of a run, the newest last: of this name, and with a manifest, which is written last."""
    folder = Path(run_folder) / "checkpoints"
    found = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted(path for path in found if (path / manifest.NAME).is_file())


def is_run(folder: Path) -> bool:
    """Whether `folder` is that of a run, or of one of its checkpoints."""
    return (folder / "model.json").exists() or (folder / "checkpoints").is_dir()


def locate(path: PathLike, which: str = "ema") -> tuple[Path, Path]:
    """The files of weights and of the description that `path` stands for, as in `from_pretrained`.

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
        weights = folder / f"{which.replace(':', '-')}.safetensors"
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
