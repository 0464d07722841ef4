"""Checkpoints: all that a run needs to go on exactly as if it had never stopped.

    checkpoints/step-00001000/
        model.safetensors      the trained weights           ema.safetensors   their average
        optimizer.safetensors  exp_avg.<parameter>, exp_avg_sq.<parameter>, step.<parameter>
        rng.safetensors        the state of every random generator, uint8
        model.json             what the weights belong to, see `fastdit.weights`
        state.json             {"format": 1, "step": …, and what else the loop counts}

A folder gets its name when all of it is on the disk, so a process that is killed leaves complete checkpoints only.
Everything is safetensors or JSON: reading a checkpoint cannot run code.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import files
from ..weights import (
    FORMAT,
    load_into,
    load_tensors,
    load_weights,
    read_checkpoint,
    save_weights,
    to_original,
)

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class Trained:
    """What changes while a run goes on: the two models, the optimizer, and the generator of timesteps and noise."""

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator


def save_checkpoint(
    run: Path, trained: Trained, state: Mapping[str, Any], description: Mapping[str, Any]
) -> Path:
    """Writes `run/checkpoints/step-XXXXXXXX` for `state["step"]`, whole or not at all, and returns it.

    Raises FileExistsError where it is there already, and OSError where it cannot be written.
    """
    path = run / "checkpoints" / f"step-{state['step']:08d}"
    path.parent.mkdir(exist_ok=True)
    with files.atomic_folder(path) as folder:
        save_weights(trained.model, folder / "model.safetensors")
        save_weights(trained.ema, folder / "ema.safetensors")
        save_weights(_optimizer_state(trained), folder / "optimizer.safetensors")
        save_weights(_rng_states(trained.generator), folder / "rng.safetensors")
        files.write_json(folder / "model.json", dict(description))
        files.write_json(folder / "state.json", {"format": FORMAT, **state})
    return path


def load_checkpoint(path: Path, trained: Trained) -> None:
    """Gives `trained` and the random generators of this process the state in the checkpoint folder `path`.

    Raises ValueError in one line naming the file, where a tensor is missing, unexpected or of another shape, and where
    the checkpoint was written on another kind of device, whose random numbers are others.
    """
    for name, model in (("model", trained.model), ("ema", trained.ema)):
        file = path / f"{name}.safetensors"
        load_into(model, load_weights(file), source=file)
    _load_optimizer_state(path / "optimizer.safetensors", trained)
    _load_rng_states(path / "rng.safetensors", trained.generator)


def load_original(file: Path, trained: Trained) -> int:
    """Gives `trained` what a training checkpoint of facebookresearch/DiT holds, and returns how many steps that took.

    It is {"model", "ema", "opt", "args"}. Adam's state is by position among all parameters, the position embedding
    included, which is not trained and has none. The number of steps is Adam's.

    Raises ValueError in one line naming the file, where an entry is missing or does not fit.
    """
    found = read_checkpoint(file, which="model", optimizer=True)
    if found.optimizer is None:
        raise ValueError(f"{file}: no entry opt; for the weights alone begin with init_from")
    load_into(trained.model, to_original(found.tensors).tensors, source=file)
    averaged = read_checkpoint(file, which="ema")
    load_into(trained.ema, to_original(averaged.tensors).tensors, source=file)
    every = [name for name, _ in trained.model.named_parameters()]
    try:
        (group,) = found.optimizer["param_groups"]
        positions, states = list(group["params"]), found.optimizer["state"]
        if len(positions) != len(every):
            raise ValueError(f"{len(positions)} parameters, the model has {len(every)}")
        by_name = {
            name: states[position]
            for position, name in zip(positions, every, strict=True)
            if position in states
        }
        tensors = {
            f"{moment}.{name}": torch.as_tensor(state[moment], dtype=torch.float32)
            for moment in MOMENTS
            for name, state in by_name.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: opt is not the state of one AdamW: {error}") from None
    _set_optimizer_state(file, tensors, trained)
    steps = {int(state["step"]) for state in by_name.values()}
    if len(steps) != 1:
        raise ValueError(
            f"{file}: opt: the parameters have made different numbers of steps: {sorted(steps)}"
        )
    return steps.pop()


def load_state(path: Path) -> dict[str, Any]:
    """state.json of the checkpoint folder `path`. Raises ValueError for another format."""
    state = files.read_json(path / "state.json")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else state
        raise ValueError(f"{path / 'state.json'}: format={found!r}, expected {FORMAT}")
    return state


def keep_newest(run: Path, count: int | None) -> None:
    """Removes all checkpoints of `run` but the newest `count`; None keeps all.

    A folder loses its name before its content, so that half a checkpoint is never taken for one.
    """
    folder = run / "checkpoints"
    found = sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8}", path.name))
    for path in found[:-count] if count else ():
        nameless = path.rename(path.with_name(f".tmp-{path.name}-removed"))
        shutil.rmtree(nameless, ignore_errors=True)


def remove_unfinished(run: Path) -> None:
    """Removes what a killed process left of checkpoints that it was writing or removing."""
    for path in (run / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


# ------------------------------------------------------------------ optimizer and random generators


def _trained_parameters(model: nn.Module) -> list[str]:
    """Names in the order of the optimizer's parameters."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _optimizer_state(trained: Trained) -> dict[str, Tensor]:
    state = trained.optimizer.state_dict()["state"]
    return {
        f"{moment}.{name}": state[index][moment]
        for moment in MOMENTS
        for index, name in enumerate(_trained_parameters(trained.model))
    }


def _load_optimizer_state(file: Path, trained: Trained) -> None:
    _set_optimizer_state(file, load_tensors(file), trained)


def _set_optimizer_state(file: Path, tensors: Mapping[str, Tensor], trained: Trained) -> None:
    names = _trained_parameters(trained.model)
    _require_keys(file, tensors, [f"{moment}.{name}" for moment in MOMENTS for name in names])
    shapes = {name: value.shape for name, value in trained.model.named_parameters()}
    for moment, name in ((moment, name) for moment in MOMENTS[:2] for name in names):
        if tensors[f"{moment}.{name}"].shape != shapes[name]:
            found = tuple(tensors[f"{moment}.{name}"].shape)
            raise ValueError(
                f"{file}: {moment}.{name} has shape {found}, the model's has {tuple(shapes[name])}"
            )
    state = {
        index: {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS}
        for index, name in enumerate(names)
    }
    # The groups hold the learning rate and the weight decay, which a resumed run may change.
    groups = trained.optimizer.state_dict()["param_groups"]
    trained.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _rng_states(generator: torch.Generator) -> dict[str, Tensor]:
    """`run`: the run's own generator; `cpu` and `cuda`: the global ones, from which labels are dropped."""
    states = {"run": generator.get_state(), "cpu": torch.get_rng_state()}
    if generator.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(generator.device)
    return states


def _load_rng_states(file: Path, generator: torch.Generator) -> None:
    states = load_tensors(file)
    expected = _rng_states(generator)
    written, here = ("cuda" if "cuda" in found else "cpu" for found in (states, expected))
    if written != here:
        raise ValueError(
            f"{file}: written on {written}, this run is on {here}, where the random numbers are others; resume on the "
            "same kind of device, or begin a new run with init_from"
        )
    _require_keys(file, states, expected)
    generator.set_state(states["run"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], generator.device)


def _require_keys(file: Path, found: Iterable[str], expected: Iterable[str]) -> None:
    found, expected = list(found), list(expected)
    for problem, keys in (
        ("missing", [key for key in expected if key not in found]),
        ("unexpected", [key for key in found if key not in expected]),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{file}: {problem} {keys[0]}{more}")
