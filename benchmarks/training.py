"""How long a step of training takes: `fastdit`'s loop against bare loops, and against the compiled reference.

    python benchmarks/training.py --quick                    # DiT-XL/2 at 256 tokens, bf16, batches 32 and 128
    python benchmarks/training.py --largest-batch            # what fits into 24, 40, 80 and 141 GB
    python benchmarks/training.py --device cpu --model DiT-S/2 --batch 8 --dtype fp32

All train on the same random latents, with AdamW and one average of the weights:

    fastdit, loop         `fastdit train`, with its data loader, logs and checks
    fastdit, bare         forward, backward and `AdamWEMA`, and nothing else
    reference, bare       the eager reference with torch's fused AdamW and a loop over its average
    reference, compiled   the same, compiled as a whole; with a memory budget Inductor recomputes activations

A step is timed from launch to result over some in a row, the providers in turns. TFLOP/s are useful ones: three times a
forward, twice the multiply-adds; recomputed products do not count. Needs torch, numpy and this source tree.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:  # started as a file: the packages lie in the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.compile_matrix import models_of
from benchmarks.measure import in_turns, timed, times_faster
from benchmarks.results import Row, environment_of, folder_name, table, write_rows
from fastdit import DiT, DiT_models, create_diffusion
from fastdit.data import Synthetic
from fastdit.models import multiply_adds
from fastdit.training import AdamWEMA, TrainConfig, Trainer, averaged_copy

RESULTS = Path(__file__).resolve().parent / "results"
SUITE = "training"
LOOP, BARE = "fastdit, loop", "fastdit, bare"
REFERENCE, COMPILED = "reference, bare", "reference, compiled"
GIGABYTES = (24, 40, 80, 141)


class Enough(Exception):
    """Ends a segment of a loop that would go on."""


class Loop:
    """`fastdit.training.Trainer`, as many steps at a time as are asked for."""

    def __init__(
        self, model: DiT, folder: Path, batch: int, device: torch.device, **options: Any
    ) -> None:
        side = model.input_size[0]
        dataset = Synthetic(8 * side, latent_channels=model.in_channels)
        config = TrainConfig(
            data="synthetic",
            out=tempfile.mkdtemp(dir=folder),
            batch_size=batch,
            steps=10**7,
            log_every=10,
            sample_every=0,
            checkpoint_every=10**7,
            device=str(device),
            num_workers=0 if device.type == "cpu" else None,  # they would take its cores
            **options,
        )
        self.trainer = Trainer(config, device, model=copy.deepcopy(model), dataset=dataset)
        self.trainer.reporter = None
        self.trainer._begin()
        self.batches = self.trainer._batches()

    def steps(self, count: int) -> None:
        def some() -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(count):
                yield next(self.batches)
            raise Enough

        try:
            self.trainer._loop(some())
        except Enough:
            return


class Bare:
    """Forward, backward and update of one batch that is always the same."""

    def __init__(
        self,
        model: nn.Module,
        batch: int,
        device: torch.device,
        dtype: str,
        *,
        compiled: str = "off",
        budget: float | None = None,
    ) -> None:
        self.model = copy.deepcopy(model).train()
        self.batch, self.device, self.dtype, self.budget = batch, device, dtype, budget
        side = 2 * round(self.model.get_parameter("pos_embed").shape[1] ** 0.5)
        self.x0 = torch.randn(batch, 4, side, side, device=device)
        self.y = torch.arange(batch, device=device) % 1000
        self.diffusion = create_diffusion("")
        self.predict: Any = self.model
        if compiled == "blocks":
            for block in self.model.blocks:  # type: ignore[union-attr]
                block.compile()
        elif compiled == "whole":
            self.predict = torch.compile(self.model)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        if isinstance(self.model, DiT):
            self.average = averaged_copy(self.model)
            self.optimizer: Any = AdamWEMA(self.model, [(self.average, 0.9999)])
        else:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0, fused=True)

    def steps(self, count: int) -> None:
        with self._budget():
            for _ in range(count):
                self._step()

    def _budget(self) -> Any:
        if self.budget is None:
            return nullcontext()
        from torch._functorch import config

        return config.patch(activation_memory_budget=self.budget)

    def _step(self) -> None:
        t = torch.randint(1000, (self.batch,), device=self.device)

        def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
                output: Tensor = self.predict(x, t, y)
            return output

        terms = self.diffusion.training_losses(predict, self.x0, t, {"y": self.y})
        terms["loss"].mean().backward()
        if isinstance(self.optimizer, AdamWEMA):
            self.optimizer.update(1e-4)
            self.optimizer.zero_grad()
            return
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            averages: list[Tensor] = list(self.average.parameters())
            torch._foreach_lerp_(averages, list[Tensor](self.model.parameters()), 1e-4)


class Watch:
    """Seconds of a step: the mean of `count` in a row."""

    def __init__(self, run: Callable[[int], None], count: int, device: torch.device) -> None:
        self.run, self.count, self.device = run, count, device
        run(3)

    def sample(self) -> float:
        wait_for(self.device)
        begun = time.perf_counter()
        self.run(self.count)
        wait_for(self.device)
        return (time.perf_counter() - begun) / self.count


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def providers(
    models: dict[str, nn.Module],
    batch: int,
    device: torch.device,
    dtype: str,
    folder: Path,
    options: argparse.Namespace,
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """By name, what makes each."""
    compiled = "off" if options.no_compile else "blocks"
    model, reference = models["fastdit"], models["reference"]
    assert isinstance(model, DiT)
    yield (
        LOOP,
        partial(Loop, model, folder, batch, device, precision=dtype, compile=compiled),
    )
    yield BARE, partial(Bare, model, batch, device, dtype, compiled=compiled)
    yield REFERENCE, partial(Bare, reference, batch, device, dtype)
    if not options.no_compile:
        for budget in (1.0, 0.75):
            yield (
                f"{COMPILED}, memory budget {budget}",
                partial(Bare, reference, batch, device, dtype, compiled="whole", budget=budget),
            )


def measure(
    models: dict[str, nn.Module],
    batch: int,
    device: torch.device,
    dtype: str,
    options: argparse.Namespace,
    template: Row,
) -> Iterator[Row]:
    model = models["fastdit"]
    assert isinstance(model, DiT)
    flops = 6 * multiply_adds(model) * batch
    template = replace(template, shape={"N": batch, "T": model.pos_embed.shape[1]}, flops=flops)
    watches: dict[str, Watch] = {}
    memory: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        each = list(providers(models, batch, device, dtype, Path(folder), options))
        if (
            device.type == "cuda"
        ):  # first one at a time, for what it takes; they are timed in turns, all there
            memory = {name: peak_memory(make, device) for name, make in each}
        for name, make in each:
            try:
                watches[name] = Watch(make().steps, options.steps, device)
            except torch.OutOfMemoryError as error:
                reason = str(error).split("\n")[0]
                yield replace(template, provider=name, reason=f"beside the others: {reason}")
            torch.cuda.empty_cache()
        samples = in_turns(watches, options.rounds)
    compiled = [name for name in samples if name.startswith(COMPILED)]
    baseline = BARE if not compiled else f"{COMPILED}, memory budget 1.0"
    for name, seconds in samples.items():
        base = BARE if name == LOOP and not compiled else baseline
        ratio = None if name == base else times_faster(seconds, samples[base])
        named = replace(
            template, provider=name, baseline=None if ratio is None else base, ratio=ratio
        )
        yield timed(named, seconds)
        yield timed(replace(named, metric="rate"), seconds)
        if name == LOOP:
            share = times_faster(seconds, samples[BARE])
            yield timed(
                replace(named, case="of the bare loop", baseline=BARE, ratio=share), seconds
            )
    for name, gigabytes in memory.items():
        row = replace(template, provider=name, metric="memory")
        fits = math.isfinite(gigabytes)
        yield replace(row, value=gigabytes) if fits else replace(row, reason="does not fit")


def peak_memory(make: Callable[[], Any], device: torch.device) -> float:
    """GB of three steps at their peak, with weights, averages and moments; infinite where they do not fit."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        make().steps(3)
    except torch.OutOfMemoryError:
        return math.inf
    return (torch.cuda.max_memory_allocated(device) - before) / 1e9


def largest_batches(
    models: dict[str, nn.Module], device: torch.device, dtype: str, template: Row
) -> Iterator[Row]:
    """The largest multiple of 8 whose step fits into so many GB, which torch is held to."""
    total = torch.cuda.get_device_properties(device).total_memory / 1e9
    model = models["fastdit"]
    for gigabytes in GIGABYTES:
        for recompute in (False, True):
            name = f"{BARE}, recompute_blocks" if recompute else BARE
            row = replace(template, case=f"largest batch in {gigabytes} GB", provider=name)
            if gigabytes > total:
                yield replace(row, reason=f"the device has {total:.0f} GB")
                continue
            torch.cuda.set_per_process_memory_fraction(gigabytes / total, device)
            low, high = 0, 8
            while fits(model, high, device, dtype, recompute):
                low, high = high, 2 * high
            while high - low > 8:
                middle = (low + high) // 16 * 8
                if fits(model, middle, device, dtype, recompute):
                    low = middle
                else:
                    high = middle
            yield replace(row, metric="batch", value=float(low))
    torch.cuda.set_per_process_memory_fraction(1.0, device)


def fits(model: nn.Module, batch: int, device: torch.device, dtype: str, recompute: bool) -> bool:
    try:
        bare = Bare(model, batch, device, dtype)
        bare.model.recompute_blocks = recompute  # type: ignore[assignment]
        bare.steps(2)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        bare = None  # type: ignore[assignment]
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add(
        "--model",
        help="demo: the sizes of `make demo`, 16 tokens",
        choices=[*(name for name in DiT_models if name.endswith("/2")), "demo"],
        default="DiT-XL/2",
    )
    add("--tokens", type=int, choices=(256, 1024), default=256)
    add("--batch", type=int, nargs="+", help="32 128 256, with --quick the first two")
    add("--dtype", choices=("bf16", "fp32"), default="bf16")
    add("--steps", type=int, default=10, help="in a row, of a sample (%(default)s)")
    add("--rounds", type=int, default=5, help="samples of each (%(default)s)")
    add("--quick", action="store_true", help="fewer batches")
    add("--largest-batch", action="store_true", help="what fits into 24, 40, 80 and 141 GB")
    add("--depth", type=int, help="blocks, fewer to try the program: no file is written")
    add("--no-compile", action="store_true", help="leave what is compiled out")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--output", type=Path, default=RESULTS, help="folder for the results (%(default)s)")
    options = parser.parse_args(arguments)
    device = torch.device("cpu")
    if options.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", 0)
    elif options.device == "cuda":
        parser.error("--device cuda: torch sees no GPU; allowed here are auto and cpu")
    if options.largest_batch and device.type == "cpu":
        parser.error("--largest-batch: is about the memory of a GPU, torch sees none")
    torch.manual_seed(0)
    if options.model == "demo":
        options.tokens = 16
        sizes = {"patch_size": 2, "hidden_size": 128, "depth": 4, "num_heads": 4}
    else:
        with torch.device("meta"):
            config = DiT_models[options.model](input_size=32).config
        sizes = {name: config[name] for name in ("patch_size", "hidden_size", "depth", "num_heads")}
    if options.depth is not None:
        sizes["depth"] = options.depth
    models = models_of(sizes, options.tokens, device)
    template = Row(SUITE, options.model, "", {"T": options.tokens}, options.dtype, "time")
    rows: list[Row] = []
    if options.largest_batch:
        rows += largest_batches(models, device, options.dtype, template)
    else:
        for batch in options.batch or ([32, 128] if options.quick else [32, 128, 256]):
            rows += measure(models, batch, device, options.dtype, options, template)
    print(table(rows))
    if options.depth is None:
        environment = environment_of(device)
        part = "largest_batch" if options.largest_batch else "training"
        path = environment.folder(options.output) / f"{part}-{folder_name(options.model)}.json"
        write_rows(path, rows, environment)
        print(path)


if __name__ == "__main__":
    main()
