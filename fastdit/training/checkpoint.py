"""Checkpoints: all that a run needs to go on exactly as if it had never stopped.

    checkpoints/step-00001000/
        model.safetensors      the trained weights, under the original's names
        ema.safetensors        their average; of others too, ema-0.999.safetensors
        optimizer/             exp_avg.<parameter>, exp_avg_sq.<parameter> and step, in files of safetensors, which
                               all processes write side by side, and torch.distributed.checkpoint reads into any number
        rng/rank-00000.safetensors     the random generators of a process, uint8
        model.json             what the weights belong to, see `fastdit.weights`
        state.json             {"format": 2, "step": …, and what else the loop counts}
        manifest.json          size and SHA-256 of every file, written last

A folder gets its name when all of it is on the disk, and is never written into again, so a process that is killed
leaves complete checkpoints only. Everything is safetensors or JSON: reading a checkpoint cannot run code.
"""

from __future__ import annotations

import errno
import random
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh

from .. import files
from ..distributed import World
from ..weights import (
    checkpoints,
    load_into,
    load_tensors,
    load_weights,
    problems,
    read_checkpoint,
    save_weights,
    to_original,
    write_manifest,
)
from .optimizer import AdamWEMA

FORMAT = 2
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Trained:
    """What changes while a run goes on: the model, its averages by the name of their file, the optimizer, and the
    generator of timesteps, noise and dropped labels."""

    model: nn.Module
    averages: Mapping[str, nn.Module]
    optimizer: AdamWEMA
    generator: torch.Generator


# ------------------------------------------------------------------ saving


@dataclass
class Staged:
    """A copy of everything, in the memory of the CPU, while training goes on."""

    step: int
    weights: dict[str, Mapping[str, Tensor]]  # by file; in the first process only
    config: dict[str, Any]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    state: dict[str, Any]
    description: dict[str, Any]


class Saver:
    """Writes checkpoints of a run in a thread, one at a time, by all processes together."""

    def __init__(self, run: Path, world: World, keep: int | None, timeout: timedelta) -> None:
        self.run, self.world, self.keep = run, world, keep
        self.group: dist.ProcessGroup | None = None
        if world.size > 1:  # its own, or a message of the thread would be taken for one of the loop
            self.group = dist.new_group(backend="gloo", timeout=timeout)
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(
        self, trained: Trained, state: Mapping[str, Any], description: Mapping[str, Any]
    ) -> None:
        """Copies everything, and writes `checkpoints/step-XXXXXXXX` for `state["step"]` while the caller goes on.

        All processes call it after the same step. Waits for the checkpoint before, and raises what that could not do.
        """
        self.wait()
        staged = self._stage(trained, state, description)
        self.thread = threading.Thread(target=self._run, args=(staged,), name="fastdit-checkpoint")
        self.thread.start()

    def join(self) -> None:
        """Returns when nothing is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def wait(self) -> None:
        """Returns when the last checkpoint is on the disk; raises, in every process, where it could not be written."""
        self.join()
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _stage(
        self, trained: Trained, state: Mapping[str, Any], description: Mapping[str, Any]
    ) -> Staged:
        modules = {"model": trained.model, **trained.averages}
        whole: dict[str, Mapping[str, Tensor]] = {
            name: _whole(module, self.world.rank == 0) for name, module in modules.items()
        }
        optimizer = _on_cpu(trained.optimizer.state(), self.world)
        if trained.generator.device.type == "cuda":
            torch.cuda.synchronize(trained.generator.device)  # now the copies are there
        return Staged(
            step=state["step"],
            weights=whole if self.world.rank == 0 else {},
            config=getattr(trained.model, "config", {}),
            optimizer=optimizer,
            rng=_rng_states(trained.generator),
            state={"format": FORMAT, **state},
            description=dict(description),
        )

    def _run(self, staged: Staged) -> None:
        path = self.run / "checkpoints" / f"step-{staged.step:08d}"
        try:
            self._write(path, staged)
        except OSError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001  `wait` raises it
            # Whatever it is here, in the other processes it is a message: all take it as what the disk did.
            self.error = OSError(f"{path}: not written: {error}")
            self.error.__cause__ = error

    def _write(self, path: Path, staged: Staged) -> None:
        """Each part is done by all, or by the first alone, and begun when the part before was done everywhere."""
        with ExitStack() as unfinished:

            def begin() -> Path:
                path.parent.mkdir(exist_ok=True)
                _require_space(path, checkpoints(self.run))
                folder = unfinished.enter_context(files.atomic_folder(path))
                for name in ("optimizer", "rng"):
                    (folder / name).mkdir()
                return folder

            def finish() -> None:
                written = {"processes": self.world.size, "torch": torch.__version__}
                write_manifest(folder, {"step": staged.step, **written})
                unfinished.close()  # it gets its name
                keep_newest(self.run, self.keep)

            folder: Path = self.world.gathered(self._together(begin, only_first=True), self.group)[
                0
            ]
            self._together(lambda: self._write_own(folder, staged))
            self._together(lambda: self._write_optimizer(folder / "optimizer", staged.optimizer))
            self._together(finish, only_first=True)

    def _together(self, do: Callable[[], Any], *, only_first: bool = False) -> Any:
        """What `do` gives here; raises in all processes where it did in one."""
        value, error = None, None
        try:
            if self.world.rank == 0 or not only_first:
                value = do()
        except Exception as problem:  # noqa: BLE001  raised below, in every process
            error = problem
        self.world.raise_together(error, self.group)
        return value

    def _write_own(self, folder: Path, staged: Staged) -> None:
        rank = self.world.rank
        save_weights(staged.rng, folder / "rng" / f"rank-{rank:05d}.safetensors")
        for name, weights in staged.weights.items():
            save_weights(weights, folder / f"{name}.safetensors", config=staged.config)
        if rank == 0:
            files.write_json(folder / "model.json", staged.description)
            files.write_json(folder / "state.json", staged.state)

    def _write_optimizer(self, folder: Path, state: dict[str, Tensor]) -> None:
        if not any(hasattr(value, "full_tensor") for value in state.values()):
            save_weights(state, folder / f"shard-{self.world.rank + 1:05d}.safetensors")
            return
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            dcp.save(state, storage_writer=writer, process_group=self.group)
        except CheckpointException as error:  # not an Exception, and of many lines
            rank, (problem, _) = min(error.failures.items())
            raise OSError(f"{folder}: rank {rank}: {type(problem).__name__}: {problem}") from error


def _whole(module: nn.Module, wanted: bool) -> dict[str, Tensor]:
    """Copies of all parameters and buffers on the CPU, those in shards put together by all processes.

    Where they are not wanted the process only takes part.
    """
    found = {}
    for name, value in module.state_dict().items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        if wanted:
            found[name] = _copied(value)
    return found


def _copied(value: Tensor) -> Tensor:
    """A copy on the CPU; from a GPU to memory that it writes at full speed, there when the GPU has been waited for."""
    copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
    return copy.copy_(value.detach(), non_blocking=True)


def _on_cpu(state: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Copies of what this process writes: of tensors in shards its own; of others, which all have, every n-th."""
    if not any(hasattr(value, "full_tensor") for value in state.values()):
        names = list(state)[world.rank :: world.size]
        return {name: _copied(state[name]) for name in names}
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (world.size,))
    copies = {}
    for name, value in state.items():
        if not isinstance(value, DTensor):
            copies[name] = _copied(value)  # of which torch.distributed.checkpoint writes one
            continue
        copies[name] = DTensor.from_local(
            _copied(value.to_local()),
            mesh,
            value.placements,
            run_check=False,
            shape=value.shape,
            stride=value.stride(),
        )
    return copies


def _require_space(path: Path, before: list[Path]) -> None:
    """Raises OSError where the disk has less than 1.2 times what the last checkpoint took."""
    if not before:
        return
    need = 1.2 * sum(file.stat().st_size for file in before[-1].rglob("*") if file.is_file())
    free = shutil.disk_usage(path.parent).free
    if free < need:
        raise OSError(
            errno.ENOSPC,
            f"No space left writing {path}: need {need / 2**20:,.0f} MiB, have {free / 2**20:,.0f} MiB",
        )


def keep_newest(run: Path, count: int | None) -> None:
    """Removes all checkpoints of `run` but the newest `count`; None keeps all.

    A folder loses its name before its content, so that half a checkpoint is never taken for one.
    """
    for path in checkpoints(run)[:-count] if count else ():
        try:
            nameless = path.rename(path.with_name(f".tmp-{path.name}-removed"))
        except OSError as error:
            warnings.warn(f"{path}: not removed: {error}", stacklevel=2)
            continue
        shutil.rmtree(nameless, ignore_errors=True)


def make_way(run: Path, step: int) -> None:
    """Removes what a killed process left of checkpoints that it was writing or removing; those after `step`, which are
    damaged, it names damaged-step-XXXXXXXX: the run will come by these steps again."""
    folder = run / "checkpoints"
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("step-*"):
        if re.fullmatch(r"step-\d{8}", path.name) and int(path.name[5:]) > step:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


# ------------------------------------------------------------------ loading


def newest_whole(run: Path) -> Path:
    """The newest checkpoint of `run` whose files are what its manifest says; what is skipped for that is told.

    Raises FileNotFoundError where there is no checkpoint, and ValueError naming a file where all are damaged.
    """
    found = checkpoints(run)
    if not found:
        for path in (run / "checkpoints").glob("step-*"):
            raise ValueError(
                f"{path}: has no manifest.json, so it was not written whole by this version"
            )
        raise FileNotFoundError(f"{run}: no checkpoint, expected checkpoints/step-XXXXXXXX")
    first: str | None = None
    for path in reversed(found):
        wrong = problems(path)
        if not wrong:
            return path
        first = first or wrong[0]
        warnings.warn(f"{path.name} is damaged and passed over: {wrong[0]}", stacklevel=2)
    raise ValueError(f"{first}; no other checkpoint of {run} is whole")


def load_models(path: Path, models: Mapping[str, nn.Module]) -> None:
    """Gives models, by the name of their file, the weights in the checkpoint folder `path`; whole ones, not shards."""
    for name, model in models.items():
        file = path / f"{name}.safetensors"
        load_into(model, load_weights(file), source=file)


def load_progress(path: Path, trained: Trained, world: World) -> None:
    """Gives the optimizer and the random generators of this process the state in the checkpoint folder `path`.

    Raises ValueError in one line naming the file, where a tensor is missing, unexpected or of another shape, and where
    the checkpoint was written on another kind of device, whose random numbers are others.
    """
    _load_optimizer(path / "optimizer", trained.optimizer, world)
    own = path / "rng" / f"rank-{world.rank:05d}.safetensors"
    if own.exists():
        _load_rng_states(own, trained.generator)
    else:  # more processes than before: of the generators only that of the run, which all of them share
        first = path / "rng" / "rank-00000.safetensors"
        _load_rng_states(first, trained.generator, only=("run",))


def load_original(file: Path, model: nn.Module, averages: Iterable[nn.Module]) -> dict[str, Tensor]:
    """Gives the models what a training checkpoint of facebookresearch/DiT holds, and returns AdamW's state in it.

    It is {"model", "ema", "opt", "args"}. Adam's state is by position among all parameters, the position embedding
    included, which is not trained and has none. All averages begin with the one there is.

    Raises ValueError in one line naming the file, where an entry is missing or does not fit.
    """
    found = read_checkpoint(file, which="model", optimizer=True)
    if found.optimizer is None:
        raise ValueError(f"{file}: no entry opt; for the weights alone begin with init_from")
    load_into(model, to_original(found.tensors).tensors, source=file)
    averaged = to_original(read_checkpoint(file, which="ema").tensors).tensors
    for average in averages:
        load_into(average, averaged, source=file)
    every = dict(model.named_parameters())
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
        steps = {int(state["step"]) for state in by_name.values()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: opt is not the state of one AdamW: {error}") from None
    if len(steps) != 1:
        raise ValueError(
            f"{file}: opt: the parameters have made different numbers of steps: {sorted(steps)}"
        )
    tensors["step"] = torch.tensor([float(steps.pop())])
    trained_names = [name for name, value in every.items() if value.requires_grad]
    expected = [f"{moment}.{name}" for moment in MOMENTS for name in trained_names]
    _require_keys(file, tensors, [*expected, "step"])
    for name in expected:
        _require_shape(file, name, tensors[name].shape, every[name.partition(".")[2]].shape)
    return tensors


def load_state(path: Path) -> dict[str, Any]:
    """state.json of the checkpoint folder `path`. Raises ValueError for another format."""
    state = files.read_json(path / "state.json")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else state
        raise ValueError(f"{path / 'state.json'}: format={found!r}, expected {FORMAT}")
    return state


def _load_optimizer(folder: Path, optimizer: AdamWEMA, world: World) -> None:
    state = optimizer.state()
    reader = HuggingFaceStorageReader(str(folder))
    stored = {
        name: value.size
        for name, value in reader.read_metadata().state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
    }
    _require_keys(folder, stored, state)
    for name, value in state.items():
        _require_shape(folder, name, stored[name], value.shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=reader, no_dist=world.size == 1)
    optimizer.load_state(state)


# ------------------------------------------------------------------ random generators


def _rng_states(generator: torch.Generator) -> dict[str, Tensor]:
    """`run`: the run's own generator; the others are global ones, from which parts of a model may draw."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    _, words, next_gauss = random.getstate()
    states = {
        "run": generator.get_state(),
        "cpu": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy.rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor(
            [] if next_gauss is None else [next_gauss], dtype=torch.float64
        ),
    }
    if generator.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(generator.device)
    return states


def _load_rng_states(
    file: Path, generator: torch.Generator, only: Iterable[str] | None = None
) -> None:
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
    if only is not None:
        return
    torch.set_rng_state(states["cpu"])
    position, has_gauss, gauss = states["numpy.rest"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    next_gauss = states["python.gauss"].tolist()
    words = tuple(states["python"].tolist())
    random.setstate((3, words, next_gauss[0] if next_gauss else None))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], generator.device)


def _require_keys(file: Path, found: Iterable[str], expected: Iterable[str]) -> None:
    found, expected = set(found), set(expected)
    for problem, keys in (
        ("missing", sorted(expected - found)),
        ("unexpected", sorted(found - expected)),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{file}: {problem} {keys[0]}{more}")


def _require_shape(file: Path, name: str, found: Iterable[int], expected: Iterable[int]) -> None:
    found, expected = tuple(found), tuple(expected)
    if found != expected:
        raise ValueError(f"{file}: {name} has shape {found}, the model's has {expected}")
