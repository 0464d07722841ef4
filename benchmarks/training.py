"""How long a step of training takes: `fastdit`'s loop against bare loops, and against the compiled reference.

    python benchmarks/training.py                            # DiT-XL/2 at 256 tokens, bf16, batches 32, 128 and 256
    python benchmarks/training.py --quick --batch 128        # 40 steps of each instead of 200
    python benchmarks/training.py --largest-batch            # what fits into 24, 40, 80 and 141 GB
    python benchmarks/training.py --device cpu --model DiT-S/2 --batch 8 --dtype fp32

All train on the same random latents, with AdamW and one average of the weights:

    fastdit, loop         `fastdit train`, with its data loader, logs and checks
    fastdit, bare         forward, backward and `AdamWEMA`, and nothing else
    reference, bare       the eager reference with torch's fused AdamW and a loop over its average
    reference, compiled   the same, compiled as a whole; with a memory budget Inductor recomputes activations

A step is timed from launch to result over `--steps` in a row, the providers in turns, `--rounds` times. All are on the
device at once; one that does not fit beside the others is a row with a reason. TFLOP/s are useful ones: three times a
forward, twice the multiply-adds; recomputed products do not count. Every batch has a file of its own, written when it
is measured. Needs torch, numpy and this source tree.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:  # started as a file: the packages lie in the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.compile_matrix import models_of
from benchmarks.measure import FAILURES, WallClock, one_line, side_by_side, timed, times_faster
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

    def close(self) -> None:
        """Ends the processes that load the data."""
        self.batches.close()

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
        self.batch, self.device, self.dtype = batch, device, dtype
        side = 2 * round(self.model.get_parameter("pos_embed").shape[1] ** 0.5)
        self.x0 = torch.randn(batch, 4, side, side, device=device)
        self.y = torch.arange(batch, device=device) % 1000
        self.diffusion = create_diffusion("")
        self.predict: Any = self.model
        if compiled == "blocks":
            for block in self.model.blocks:  # type: ignore[union-attr]
                block.compile()
        elif compiled == "whole":
            self.predict = torch.compile(self.model, backend=inductor(budget))
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        if isinstance(self.model, DiT):
            self.average = averaged_copy(self.model)
            self.optimizer: Any = AdamWEMA(self.model, [(self.average, 0.9999)])
        else:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0, fused=True)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self._step()

    def close(self) -> None:
        """As that of `Loop`; nothing is open."""

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


def inductor(budget: float | None) -> Callable[..., Any]:
    """`torch.compile`'s default backend under a memory budget.

    Each is a function of its own: torch.compile would take what it has compiled under another budget for this one.
    """

    def compiled(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx

        with nullcontext() if budget is None else config.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs)

    return compiled


def providers(
    models: dict[str, nn.Module],
    batch: int,
    device: torch.device,
    dtype: str,
    folder: Path,
    options: argparse.Namespace,
) -> Iterator[tuple[str, Callable[[], Loop | Bare]]]:
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
) -> tuple[list[Row], list[str]]:
    """The rows of a batch, and the providers that failed for another reason than memory."""
    model = models["fastdit"]
    assert isinstance(model, DiT)
    flops = 6 * multiply_adds(model) * batch
    template = replace(template, shape={"N": batch, "T": model.pos_embed.shape[1]}, flops=flops)
    # Else what was compiled for one batch would be compiled for any, which is slower, when it meets the next.
    torch.compiler.reset()
    memory: dict[str, float | str] = {}

    def clock(make: Callable[[], Loop | Bare]) -> WallClock:
        made = make()
        run, warm_up = partial(made.steps, options.steps), partial(made.steps, 3)
        return WallClock(run, options.steps, device, warm_up=warm_up, close=made.close)

    with tempfile.TemporaryDirectory() as folder:
        each = dict(providers(models, batch, device, dtype, Path(folder), options))
        if device.type == "cuda":  # one at a time, for what it takes; they are timed all there
            memory = {name: peak_memory(make, device) for name, make in each.items()}
        turns = side_by_side(
            {name: partial(clock, make) for name, make in each.items()}, options.rounds
        )
    samples = turns.samples
    rows = []
    for name, reason in turns.reasons.items():
        beside = "beside the others: " if name in turns.excused else ""
        rows.append(replace(template, provider=name, reason=beside + reason))
    compiled = [name for name in samples if name.startswith(COMPILED)]
    baseline = compiled[0] if compiled else BARE
    for name, seconds in samples.items():
        base = BARE if name == LOOP and not compiled else baseline
        row = replace(template, provider=name)
        if name != base and base in samples:
            row = replace(row, baseline=base, ratio=times_faster(seconds, samples[base]))
        rows += [timed(row, seconds), timed(replace(row, metric="rate"), seconds)]
        if name == LOOP and BARE in samples:
            share = times_faster(seconds, samples[BARE])
            row = replace(row, case="of the bare loop", baseline=BARE, ratio=share)
            rows.append(timed(row, seconds))
    for name, found in memory.items():
        row = replace(template, provider=name, metric="memory")
        rows.append(
            replace(row, reason=found) if isinstance(found, str) else replace(row, value=found)
        )
    return rows, turns.broken()


def peak_memory(make: Callable[[], Loop | Bare], device: torch.device) -> float | str:
    """GB of three steps at their peak, with weights, averages and moments; or why there is no such number."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        with closing(make()) as made:
            made.steps(3)
    except torch.OutOfMemoryError:
        return "does not fit"
    except FAILURES as failure:
        return one_line(failure)
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
    add("--batch", type=int, nargs="+", default=[32, 128, 256])
    add("--dtype", choices=("bf16", "fp32"), default="bf16")
    add("--steps", type=int, help="in a row, of a sample: 40, with --quick 8")
    add("--rounds", type=int, default=5, help="samples of each (%(default)s)")
    add("--quick", action="store_true", help="40 steps of each in all, and not 200")
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
    if options.steps is None:
        options.steps = 8 if options.quick else 40
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
    environment = environment_of(device)

    def write(part: str, rows: Sequence[Row]) -> None:
        print(table(rows))
        if options.depth is None:
            path = environment.folder(options.output) / f"{part}.json"
            write_rows(path, rows, environment)
            print(path)

    name = folder_name(options.model)
    if options.largest_batch:
        write(
            f"largest_batch-{name}", list(largest_batches(models, device, options.dtype, template))
        )
        return
    broken: list[str] = []
    for batch in options.batch:
        rows, failed = measure(models, batch, device, options.dtype, options, template)
        write(f"training-{name}-{batch}", rows)
        broken += failed
    if broken:
        sys.exit(f"failed: {', '.join(broken)}")


if __name__ == "__main__":
    main()
