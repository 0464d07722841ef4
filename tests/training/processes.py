"""Real training processes that cost no import: forked from one process that has imported everything and has no threads.

As a program this file is that process: it reads a line of JSON a command and answers with one. Everything that is done
to a run on purpose (`FAULTS`) is done in the child, by replacing functions; fastdit has no hooks for it.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import faulthandler
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import deserialize

from tests.rendezvous import rendezvous

ROOT = Path(__file__).parents[2]
TIMING = ("seconds", "seconds_since_log", "images_per_second", "seconds_per_step", "mfu")
# Seconds, after which a process hangs. What it does takes a few, and many where the machine is busy.
PATIENCE = 120.0


# ------------------------------------------------------------------ of the tests: processes


class Server:
    """The process that all children are forked from."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[name] = (
                "1"  # results depend on the number of threads, and a fork must have one
            )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.children: list[Child] = []

    def ask(self, **command: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the process that all others are forked from has ended"
        return json.loads(answer)

    def start(self, log: Path, environment: Mapping[str, str], **arguments: Any) -> Child:
        pid = self.ask(start=arguments, log=str(log), environment=dict(environment))
        child = Child(self, pid, log)
        self.children.append(child)
        return child

    def end_children(self) -> None:
        for child in self.children:
            child.kill()
            child.wait()
        self.children.clear()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Child:
    """A training process."""

    def __init__(self, server: Server, pid: int, log: Path) -> None:
        self.server, self.pid, self.log = server, pid, log
        self.status: int | None = None
        self.store: Any = None  # of several processes, which is gone with the last of them

    @property
    def said(self) -> str:
        return self.log.read_text()

    def ended(self) -> bool:
        if self.status is None:
            self.status = self.server.ask(poll=self.pid)
        return self.status is not None

    def wait(self) -> int:
        """Its exit status, negative for a signal. It is killed, and the test fails, if it hangs."""
        until = time.monotonic() + PATIENCE
        while not self.ended():
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGUSR2)  # where it stands is told in its log
                time.sleep(0.1)
                self.kill()
                raise AssertionError(f"still running after {PATIENCE} s:\n{self.said}")
            time.sleep(0.005)
        assert self.status is not None
        return self.status

    def kill(self, number: int = signal.SIGKILL) -> None:
        if not self.ended():
            os.kill(self.pid, number)


class Runs:
    """Runs of one test, below its folder."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder

    def start(
        self,
        name: str,
        *,
        size: int = 1,
        faults: Sequence[Mapping[str, Any]] = (),
        **changes: Any,
    ) -> list[Child]:
        """The processes of a tiny run in the folder `name`: one, or `size` with what torchrun says to them."""
        options = options_of(self.folder / name, **changes)
        environment: dict[str, str] = {}
        store = None
        if size > 1:
            store, environment = rendezvous(size)
        children = []
        # The generators of Python and NumPy begin anywhere; here alike in all runs, and elsewhere where one is resumed.
        seed = 1 + len(list((Path(options["out"]) / "checkpoints").glob("step-*")))
        for rank in range(size):
            if size > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            child = self.server.start(
                self.folder / f"{name}.{rank}.log",
                environment,
                options=options,
                faults=list(faults),
                trace=str(self.folder / f"{name}.{rank}.trace"),
                seed=seed,
            )
            child.store = store
            children.append(child)
        return children

    def run(self, name: str, **options: Any) -> list[Child]:
        """The processes of `start`, after their end."""
        children = self.start(name, **options)
        for child in children:
            child.wait()
        return children

    def finish(self, name: str, **options: Any) -> Path:
        """The folder of a run that nothing went wrong with."""
        for child in self.run(name, **options):
            assert child.status == 0, child.said
        return self.folder / name

    def order(self, name: str, size: int = 1) -> list[list[str]]:
        """Hashes of what every step trained on, of all processes one after the other, as the weights remember it."""
        found: dict[int, list[str]] = {}
        for rank in range(size):
            steps = {}
            for line in (self.folder / f"{name}.{rank}.trace").read_text().splitlines():
                seen = json.loads(line)
                steps[seen["step"]] = seen["items"]  # a step that was gone through again counts
            for step, items in steps.items():
                found.setdefault(step, []).extend(items)
        return [found[step] for step in sorted(found)]


_server: list[Server] = []


@contextmanager
def served() -> Iterator[Server]:
    """The server of this process, which all test files share; its children are ended."""
    if not _server:
        _server.append(Server())
        atexit.register(_server[0].close)
    try:
        yield _server[0]
    finally:
        _server[0].end_children()


def options_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run in which everything that can be forgotten is at work: label dropout, warm-up, cosine, weight decay, two
    averages, clipping, and log intervals that checkpoints cut in two."""
    return {
        "data": "digits",
        "out": str(folder),
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "patch_size": 4,
        "batch_size": 8,
        "steps": 8,
        "lr": 1e-2,
        "lr_schedule": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "gradient_clip": 0.5,
        "class_dropout_prob": 0.4,
        "ema_decay": 0.9,
        "more_ema_decays": (0.5,),
        "log_every": 3,
        "sample_every": 0,
        "checkpoint_every": 2,
        "device": "cpu",
    } | changes


# ------------------------------------------------------------------ of the tests: what runs leave


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def saved(run: Path) -> list[str]:
    """Everything in the folder of checkpoints, half-written things included."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def steps_saved(run: Path) -> list[int]:
    return [int(name[5:]) for name in saved(run) if name.startswith("step-")]


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def content(folder: Path) -> dict[str, Any]:
    """The bytes in every file of a checkpoint, but for how long it took to get there."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    found: dict[str, Any] = {name: _read(path) for name, path in files.items()}
    del found["manifest.json"]  # holds the hash of state.json
    state = json.loads(found["state.json"])
    found["state.json"] = {key: value for key, value in state.items() if key not in TIMING}
    return found


def _read(path: Path) -> Any:
    """Bytes; of safetensors by name, for what their header says besides comes in any order."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    return {name: (str(t["dtype"]), t["shape"], bytes(t["data"])) for name, t in deserialize(data)}


def assert_same_run(found: Path, expected: Path, step: int) -> None:
    """Weights, averages, moments, random generators, counters and metrics, to the last bit."""
    values, reference = content(folder_of(found, step)), content(folder_of(expected, step))
    assert sorted(values) == sorted(reference)
    assert {"model.safetensors", "ema.safetensors", "ema-0.5.safetensors"} <= set(values)
    assert "rng/rank-00000.safetensors" in values
    assert any(name.startswith("optimizer/") for name in values)
    assert [name for name in values if values[name] != reference[name]] == []
    assert metrics(found) == metrics(expected)


def state_of(folder: Path) -> dict[str, Any]:
    """Weights, averages and whole moments of a checkpoint, from however many shards."""
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file

    found = {
        f"{path.stem}.{name}": value
        for path in folder.glob("*.safetensors")
        for name, value in load_file(path).items()
    }
    reader = dcp.HuggingFaceStorageReader(str(folder / "optimizer"))
    moments: dict[str, Any] = {
        name: torch.full(stored.size, torch.nan)
        for name, stored in reader.read_metadata().state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(moments, storage_reader=reader, no_dist=True)
    return found | moments


# ------------------------------------------------------------------ of the child: faults


def _strike(do: str) -> None:
    if do == "raise":
        raise OSError(errno.EIO, "injected")
    # To this thread: to the process it would be taken by any other, and a stop lets this one run on until it is.
    signal.pthread_kill(threading.get_ident(), getattr(signal, f"SIG{do.upper()}"))


def _in_name(wanted: str, path: Any) -> bool:
    return wanted in Path(path).name


def _before_the_folder(name: str, strike: Callable[[], None]) -> None:
    from fastdit.training import checkpoint

    original = checkpoint._require_space

    def require_space(path: Path, before: list[Path]) -> None:
        if path.name == name:
            strike()
        original(path, before)

    checkpoint._require_space = require_space


def _around_the_files(name: str, strike: Callable[[], None], *, after: bool) -> None:
    from fastdit.training.checkpoint import Saver

    first, last = Saver._write_own, Saver._write_optimizer

    def write_own(self: Any, folder: Path, staged: Any) -> None:
        if name in str(folder) and not after:
            strike()
        first(self, folder, staged)

    def write_optimizer(self: Any, folder: Path, state: Any) -> None:
        last(self, folder, state)
        if name in str(folder) and after:
            strike()

    Saver._write_own = write_own  # type: ignore[method-assign]
    Saver._write_optimizer = write_optimizer  # type: ignore[method-assign]


def _file(name: str, strike: Callable[[], None], *, part: str, half: bool) -> None:
    """After the first file whose path holds `part`, or when half of it is there."""
    from fastdit.weights import writing

    original = writing.save_file

    def save_file(tensors: Any, path: Path, metadata: Any = None) -> None:
        original(tensors, path, metadata=metadata)
        if name in str(path) and part in str(path):
            if half:
                os.truncate(path, path.stat().st_size // 2)
            strike()

    writing.save_file = save_file


def _replaced(name: str, strike: Callable[[], None], *, file: str) -> None:
    """Before a small file gets its name."""
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == file and (name in str(target) or file == "config.json"):
            strike()
        original(source, target)

    os.replace = replace  # type: ignore[assignment]


def _renamed(name: str, strike: Callable[[], None], *, after: bool) -> None:
    original = os.rename

    def rename(source: Any, target: Any) -> None:
        here = Path(target).name == name
        if here and not after:
            strike()
        original(source, target)
        if here and after:
            strike()

    os.rename = rename  # type: ignore[assignment]


def _removed(name: str, strike: Callable[[], None], *, begun: bool) -> None:
    """Of an old checkpoint: when it has lost its name, or also a file."""
    original = shutil.rmtree

    def rmtree(path: Any, **options: Any) -> None:
        if _in_name(name, path):
            if begun:
                (Path(path) / "ema.safetensors").unlink()
            strike()
        original(path, **options)

    shutil.rmtree = rmtree  # type: ignore[assignment]


def _update(name: str, strike: Callable[[], None]) -> None:
    """Before the update that leads to the step."""
    from fastdit.training.loop import Trainer

    original = Trainer._update

    def update(self: Any, x0: Any, y: Any) -> None:
        if self.step == int(name[5:]) - 1:
            strike()
        original(self, x0, y)

    Trainer._update = update  # type: ignore[method-assign]


POINTS: dict[str, Callable[[str, Callable[[], None]], None]] = {
    "update": _update,
    "before the folder": _before_the_folder,
    "empty folder": functools.partial(_around_the_files, after=False),
    "first file": functools.partial(_file, part="", half=False),
    "half of the moments": functools.partial(_file, part="optimizer", half=True),
    "half of the weights": functools.partial(_file, part="model", half=True),
    "random generators": functools.partial(_file, part="rng", half=False),
    "all files": functools.partial(_around_the_files, after=True),
    "half of the manifest": functools.partial(_replaced, file="manifest.json"),
    "before the rename": functools.partial(_renamed, after=False),
    "after the rename": functools.partial(_renamed, after=True),
    "removal": functools.partial(_removed, begun=False),
    "removal begun": functools.partial(_removed, begun=True),
    "config.json": functools.partial(_replaced, file="config.json"),
}


def _inject(point: str, step: int, do: str = "kill", rank: int = 0) -> None:
    struck: list[int] = []

    def once() -> None:
        if not struck:
            struck.append(1)
            _strike(do)

    if int(os.environ.get("RANK", "0")) == rank:
        POINTS[point](f"step-{step:08d}", once)


def _saves_at_once() -> None:
    """Every checkpoint is there before the next step, so that it is known which one a run is resumed from."""
    from fastdit.training.checkpoint import Saver

    original = Saver.save

    def save(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        self.join()

    Saver.save = save  # type: ignore[method-assign]


def _nan(steps: Sequence[int], rank: int = 0, where: str = "loss") -> None:
    """NaN in what a process trains on in the updates that lead to `steps`, or in one gradient only."""
    import torch

    from fastdit.training import parallel
    from fastdit.training.loop import Trainer

    if int(os.environ.get("RANK", "0")) != rank:
        return
    original, norm = Trainer._update, parallel.gradient_norm

    def norm_of_spoilt(model: Any) -> Any:  # a hook would not see the gradient of a shard
        model.final_layer.linear.bias.grad.to_local().mul_(torch.nan)
        return norm(model)

    def update(self: Any, x0: Any, y: Any) -> None:
        bad = self.step + 1 in steps
        handle = None
        if bad and where == "loss":
            x0 = x0 * torch.nan
        elif bad and self.sharded:
            parallel.gradient_norm = norm_of_spoilt
        elif bad:
            parameter = self.model.final_layer.linear.bias
            handle = parameter.register_hook(lambda gradient: gradient * torch.nan)
        original(self, x0, y)
        parallel.gradient_norm = norm
        if handle is not None:
            handle.remove()

    Trainer._update = update  # type: ignore[method-assign]


def _largest_file(size: int) -> None:
    """As a disk that is full, or a quota that is used up, without a disk of one's own. Python ignores the signal."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _full_from(step: int) -> None:
    """The file system is full from the checkpoint of `step` on, as far as the library asks."""
    from fastdit.training import checkpoint

    original = checkpoint._require_space

    def require_space(path: Path, before: list[Path]) -> None:
        if int(path.name[5:]) == step:
            used = shutil.disk_usage(path.parent)
            shutil.disk_usage = lambda _: type(used)(used.total, used.total, 0)  # type: ignore[assignment]
        original(path, before)

    checkpoint._require_space = require_space


def _largest_from(step: int, size: int) -> None:
    _inject_call("before the folder", step, lambda: _largest_file(size))


def _inject_call(point: str, step: int, call: Callable[[], None]) -> None:
    POINTS[point](f"step-{step:08d}", call)


def _no_space(step: int, what: str, rank: int = 0) -> None:
    """A writer that says that the disk is full, in one of the ways in which writers do."""
    from safetensors import SafetensorError

    from fastdit.weights import writing

    if int(os.environ.get("RANK", "0")) != rank:
        return
    original = writing.save_file

    def save_file(tensors: Any, path: Path, metadata: Any = None) -> None:
        if f"step-{step:08d}" in str(path):
            if what == "OSError":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            raise SafetensorError(what)
        original(tensors, path, metadata=metadata)

    writing.save_file = save_file


def _no_space_for_shards(step: int, rank: int = 0) -> None:
    """The same, of torch.distributed.checkpoint, which makes an error of its own of it."""
    from fastdit.training import checkpoint

    if int(os.environ.get("RANK", "0")) != rank:
        return

    class Writer(checkpoint.HuggingFaceStorageWriter):
        def write_data(self, *arguments: Any, **options: Any) -> Any:
            if f"step-{step:08d}" in str(self.path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            return super().write_data(*arguments, **options)

    checkpoint.HuggingFaceStorageWriter = Writer


def drawn_weights() -> None:
    """A model none of whose weights begins at zero, behind which most gradients would be zero too."""
    import torch

    from fastdit.training import loop

    original = loop._model

    def model(*arguments: Any) -> Any:
        made = original(*arguments)
        generator = torch.Generator().manual_seed(5)
        for parameter in made.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        return made

    loop._model = model


def _gradients(file: str) -> None:
    """Writes the whole gradients of the first update."""
    from safetensors.torch import save_file

    from fastdit.training.optimizer import AdamWEMA

    original = AdamWEMA.update
    done: list[int] = []

    def update(self: Any, *arguments: Any, **options: Any) -> None:
        if not done:
            done.append(1)
            named = zip(self.names, self.parameters, strict=True)
            found = {
                name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                for name, p in named
            }
            if os.environ.get("RANK", "0") == "0":
                save_file({name: value.clone() for name, value in found.items()}, file)
        original(self, *arguments, **options)

    AdamWEMA.update = update  # type: ignore[method-assign]


def _inputs(file: str) -> None:
    """Has every step be of timestep 999, and writes what arrives: the dtype of the images and of the residual stream at
    every block, and dtype and values of the timesteps where they are embedded. In `file`, by the rank."""
    import torch

    from fastdit.models import DiT
    from fastdit.models.blocks import DiTBlock
    from fastdit.models.embeddings import TimestepEmbedder
    from fastdit.training.loop import Trainer

    embedding, recomputes = TimestepEmbedder.timestep_embedding, DiTBlock._recomputes
    images, timesteps = DiT._embed, Trainer._timesteps

    def note(kind: str, given: Any, *seen: Any) -> None:
        if given.is_meta:  # operations are being counted
            return
        with open(f"{file}.{os.environ.get('RANK', '0')}", "a") as written:
            written.write(json.dumps([kind, str(given.dtype), *seen]) + "\n")

    def embedded(t: Any, dim: int, max_period: float = 10000) -> Any:
        note("timesteps", t, *([] if t.is_meta else t.tolist()))
        return embedding(t, dim, max_period)

    def embedded_images(self: Any, x: Any) -> Any:
        note("images", x)
        return images(self, x)

    def stream(self: Any, x: Any) -> bool:
        note("stream", x)  # every block asks this of its input; its `forward` stays its own
        return recomputes(self, x)

    TimestepEmbedder.timestep_embedding = staticmethod(embedded)  # type: ignore[method-assign]
    DiT._embed = embedded_images  # type: ignore[method-assign]
    DiTBlock._recomputes = stream  # type: ignore[method-assign]
    Trainer._timesteps = lambda self: torch.full_like(timesteps(self), 999)  # type: ignore[method-assign]


def _forgets(what: str) -> None:
    """A resume that does not do all of its work; see `test_kill.test_what_is_forgotten_is_noticed`."""
    from fastdit.training import checkpoint, loop
    from fastdit.training.loop import Trainer

    if what == "average":
        original = checkpoint.load_models

        def load_models(path: Path, models: Any) -> None:
            original(path, {"model": models["model"]})

        checkpoint.load_models = load_models
    elif what == "moments":
        checkpoint._load_optimizer = lambda *_: None
    elif what == "random state":
        checkpoint._load_rng_states = lambda *_, **__: None
    elif what == "order of the data":
        order = Trainer._order
        Trainer._order = lambda self, step, *rank: order(self, 0, *rank)  # type: ignore[method-assign]
    elif what == "learning rate":
        rate, begun = loop.learning_rate, []

        def learning_rate(config: Any, step: int) -> float:
            begun.append(step)
            return rate(config, max(0, step - begun[0]))

        loop.learning_rate = learning_rate
    elif what == "sums since the last line":
        restore = Trainer._restore

        def without(self: Any, path: Path) -> None:
            restore(self, path)
            self.sums.zero_()
            self.summed = 0

        Trainer._restore = without  # type: ignore[method-assign]
    elif what == "number of steps":
        load = checkpoint._load_optimizer

        def one_less(folder: Path, optimizer: Any, world: Any) -> None:
            load(folder, optimizer, world)
            optimizer.step.sub_(1)

        checkpoint._load_optimizer = one_less
    else:
        raise ValueError(what)


def _patient() -> None:
    """As if the second signal came long after the first."""
    from fastdit.training import signals

    signals.ECHO = 0.0


FAULTS: dict[str, Callable[..., None]] = {
    "patient": _patient,
    "at": _inject,
    "saves at once": _saves_at_once,
    "nan": _nan,
    "full": _full_from,
    "largest": _largest_from,
    "no space": _no_space,
    "no space for shards": _no_space_for_shards,
    "gradients": _gradients,
    "drawn weights": drawn_weights,
    "inputs": _inputs,
    "forgets": _forgets,
}


# ------------------------------------------------------------------ of the child: the run


def _traced(trace: str) -> None:
    """Notes a hash of everything that the run trains on."""
    from fastdit.training.loop import Trainer

    original = Trainer._update

    def update(self: Any, x0: Any, y: Any) -> None:
        items = [
            hashlib.sha256(x.numpy().tobytes() + bytes([int(label)])).hexdigest()[:12]
            for x, label in zip(x0, y, strict=True)
        ]
        with open(trace, "a") as file:
            file.write(json.dumps({"step": self.step + 1, "items": items}) + "\n")
        original(self, x0, y)

    Trainer._update = update  # type: ignore[method-assign]


def _train(options: dict[str, Any], faults: list[dict[str, Any]], trace: str, seed: int) -> None:
    import numpy as np

    from fastdit.training import TrainConfig, plots, train

    plots.missing_packages = lambda: ["matplotlib"]  # pictures take longer than the training
    random.seed(seed)
    np.random.seed(seed)
    for fault in faults:
        FAULTS[fault["kind"]](**{key: value for key, value in fault.items() if key != "kind"})
    _traced(trace)  # last, so that it sees what was there before the faults
    train(TrainConfig(**options))


def _child(arguments: dict[str, Any], log: str, environment: dict[str, str]) -> None:
    """Never returns. Ends as an interpreter does, after all threads that it would wait for."""
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)
        os.environ.update(environment)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        output = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.register(signal.SIGUSR2)
        _train(**arguments)
        status = 0
    except BaseException:  # noqa: BLE001 - told, as an interpreter would
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        os._exit(status)


def _threads() -> int:
    """How many this process has, where the system tells."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 1


def _serve() -> None:
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.tensor
    from tqdm.auto import tqdm

    from fastdit.training import TrainConfig, plots, train

    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # is a thread
    missing_packages, plots.missing_packages = plots.missing_packages, lambda: ["matplotlib"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        # Whatever is imported or built by the first run only is there for all children.
        train(TrainConfig(**options_of(Path(folder) / "run", steps=3)))
    plots.missing_packages = missing_packages
    # A thread that was joined has ended for Python; the system may take longer.
    until = time.monotonic() + PATIENCE
    while (threads := _threads()) > 1 and time.monotonic() < until:
        time.sleep(0.001)
    assert threads == 1, f"{threads} threads: a fork would copy one, and the locks of all"
    for line in sys.stdin:
        command = json.loads(line)
        if "start" in command:
            pid = os.fork()
            if pid == 0:
                _child(command["start"], command["log"], command["environment"])
            answer: int | None = pid
        else:
            found, status = os.waitpid(command["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if found else None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
