"""What torch.compile does for the reference and for fastdit: DiT-XL/2 under bf16 autocast.

    python benchmarks/compile_matrix.py --quick           # batch 32 at 256 tokens
    python benchmarks/compile_matrix.py --quick --depth 4

Six cells: {reference, fastdit} x {eager, every block compiled, the whole model compiled}, forward and
forward + backward. Two things shall hold: fastdit without a compiler is at least as fast as the compiled
reference, and no compiled fastdit is slower than 0.99 of fastdit's best cell.

Times are wall times with the launches in them, all cells in turns; a cell whose results are wrong is not
timed. The reference is `fastdit.reference.DiT` with torch's `scaled_dot_product_attention`, as the
original's blocks have it. Needs torch, triton, numpy and this source tree.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if not __package__:  # started as a file: the package `benchmarks` lies in the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import fastdit
from benchmarks.measure import (
    FAILURES,
    OutOfTime,
    in_turns,
    kernel_times,
    one_line,
    say,
    timed,
    times_faster,
    wait_for,
)
from benchmarks.results import Row, environment_of, write_rows
from fastdit import reference
from fastdit.reference.dit import Attention

RESULTS = Path(__file__).resolve().parent / "results"
SUITE = "compile_matrix"
FAMILIES = ("reference", "fastdit")
MODES = ("eager", "blocks", "whole")
BASELINE = "reference, whole"
CASES = ("forward", "forward + backward")
# A cell may be twice as wrong as the eager reference, as rule N1 has it, and by one rounding to bfloat16 more.
LARGEST_FACTOR, ROUNDING = 2.0, 2.0**-8
CHECKED = 2  # samples of the batch that are computed in float64
SLOWEST_COMPILED = 0.99


@dataclass(frozen=True)
class Sizes:
    """The shapes of one run."""

    model: dict[str, Any]  # arguments of DiT
    shapes: tuple[tuple[int, int], ...]  # N, T
    rounds: int  # samples of each cell
    sample_seconds: float


XL = {"hidden_size": 1152, "depth": 28, "num_heads": 16}
FULL = Sizes(XL, ((32, 256), (128, 256), (8, 1024)), rounds=15, sample_seconds=0.2)
QUICK = Sizes(XL, ((32, 256),), rounds=11, sample_seconds=0.2)
SMALL = Sizes({"hidden_size": 32, "depth": 2, "num_heads": 2}, ((4, 16),), 3, sample_seconds=0)

# ------------------------------------------------------------------------------------------- the models


class SdpaAttention(Attention):
    """The reference's attention by torch's kernel for it, which keeps no (N, H, T, T) scores."""

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.num_heads, d // self.num_heads)
        out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        return self.proj(out.transpose(1, 2).reshape(n, t, d))


def models_of(sizes: dict[str, Any], tokens: int, device: torch.device) -> dict[str, nn.Module]:
    """The model of either family, with the same weights in the same memory; no layer starts as zero."""
    side = 2 * round(tokens**0.5)
    with torch.device(device):
        model = fastdit.DiT(input_size=side, **sizes)
        original = reference.DiT(input_size=side, **sizes)
        for block in original.blocks:
            block.attn = SdpaAttention(sizes["hidden_size"], sizes["num_heads"])
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or "final_layer" in name:
            nn.init.normal_(parameter, std=0.02)
    original.load_state_dict(model.state_dict(), assign=True)
    # Evaluation mode in the backward, too: no label is dropped, so all cells compute the same.
    return {"reference": original.eval(), "fastdit": model.eval()}


@dataclass(frozen=True)
class Inputs:
    """A batch, and the gradient that arrives at the model's output."""

    x: Tensor
    t: Tensor
    y: Tensor
    gradient: Tensor

    @classmethod
    def draw(cls, n: int, tokens: int, device: torch.device) -> Inputs:
        side = 2 * round(tokens**0.5)
        return cls(
            torch.randn(n, 4, side, side, device=device),
            torch.randint(1000, (n,), device=device),
            torch.randint(1000, (n,), device=device),
            # As it arrives in bfloat16, so that float64 is given the same.
            torch.randn(n, 8, side, side, device=device).bfloat16().float(),
        )

    def first(self, n: int) -> Inputs:
        return Inputs(self.x[:n], self.t[:n], self.y[:n], self.gradient[:n])

    def of_first_samples(self, n: int) -> Inputs:
        """The whole batch, of which only the first samples have a gradient."""
        gradient = torch.zeros_like(self.gradient)
        gradient[:n] = self.gradient[:n]
        return replace(self, gradient=gradient)


class Cell:
    """A model in one of the modes. The cells of a family share their weights, not their modules."""

    def __init__(self, family: str, mode: str, model: nn.Module, compiler: str) -> None:
        self.name, self.mode = f"{family}, {mode}", mode
        shared = {id(parameter): parameter for parameter in model.parameters()}
        self.model = copy.deepcopy(model, shared)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.call: Callable[..., Any] = self.model
        if mode == "blocks":
            blocks = self.model.blocks
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                block.compile(backend=compiler)
        elif mode == "whole":
            self.call = torch.compile(self.model, backend=compiler)

    def step(self, case: str, inputs: Inputs) -> Tensor:
        """One forward, or one forward and backward, after which the gradients are in the parameters."""
        backward = case != "forward"
        autocast = torch.autocast(inputs.x.device.type, torch.bfloat16)
        with nullcontext() if backward else torch.no_grad(), autocast:
            out: Tensor = self.call(inputs.x, inputs.t, inputs.y)
        if backward:
            out.backward(inputs.gradient.to(out.dtype))
        return out.detach()

    def forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None}


# -------------------------------------------------------------------------------------------- the check


class Check:
    """Holds cells against the reference in float64, by the first samples of a batch."""

    def __init__(self, original: nn.Module, inputs: Inputs) -> None:
        few = inputs.first(CHECKED)
        few = replace(few, x=few.x.double(), gradient=few.gradient.double())
        model = copy.deepcopy(original).double()
        out = model(few.x, few.t, few.y)
        out.backward(few.gradient)
        self.exact = {"output": out.detach()}
        self.exact |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        self.inputs = inputs.of_first_samples(CHECKED)
        self.allowed: dict[str, dict[str, float]] = {}

    def __call__(self, cell: Cell, case: str) -> None:
        """Raises RuntimeError if the output or the gradient of a parameter is wrong.

        It is if its distance to float64 is over twice that of the first cell that is checked, the eager reference.
        """
        found = {"output": cell.step(case, self.inputs)[:CHECKED]} | cell.gradients()
        cell.forget()
        names = list(self.exact) if case != "forward" else ["output"]
        errors = {name: distance(found[name], self.exact[name]) for name in names}
        allowed = self.allowed.setdefault(
            case, {name: LARGEST_FACTOR * error + ROUNDING for name, error in errors.items()}
        )
        for name, error in errors.items():
            if not error <= allowed[name]:  # NaN, too, is wrong
                what = name if name == "output" else f"gradient of {name}"
                raise RuntimeError(
                    f"wrong {what}: relative error {error:.1e}, allowed is {allowed[name]:.1e}"
                )


def distance(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||"""
    return float((found.double() - exact).norm() / exact.norm())


# ------------------------------------------------------------------------------------------- measuring


class WallClock:
    """Seconds of a step, from launch to result: the mean of some steps in a row, at least `seconds` long."""

    def __init__(self, run: Callable[[], Any], device: torch.device, seconds: float) -> None:
        self.run, self.device, self.steps = run, device, 1
        self.sample()  # warm-up
        self.steps = max(1, round(seconds / self.sample()))

    def sample(self) -> float:
        wait_for(self.device)
        start = time.perf_counter()
        for _ in range(self.steps):
            self.run()
        wait_for(self.device)
        return (time.perf_counter() - start) / self.steps


def graphs() -> int:
    """How many graphs have been compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


class Matrix:
    """The six cells at one shape, and the rows of what is measured of them."""

    def __init__(
        self,
        sizes: Sizes,
        shape: tuple[int, int],
        device: torch.device,
        compiler: str,
        deadline: float,
    ) -> None:
        self.sizes, self.device, self.deadline = sizes, device, deadline
        n, tokens = shape
        self.shape = {
            "N": n,
            "T": tokens,
            "D": sizes.model["hidden_size"],
            "L": sizes.model["depth"],
        }
        self.dtype = "bfloat16 autocast" + ("" if compiler == "inductor" else f", {compiler}")
        torch.compiler.reset()
        models = models_of(sizes.model, tokens, device)
        self.inputs = Inputs.draw(n, tokens, device)
        self.check = Check(models["reference"], self.inputs)
        self.cells = [
            Cell(family, mode, models[family], compiler) for family in FAMILIES for mode in MODES
        ]
        self.samples: dict[str, dict[str, list[float]]] = {}

    def row(self, case: str, cell: Cell, metric: str, value: float | None = None) -> Row:
        return Row(SUITE, case, cell.name, self.shape, self.dtype, metric, value)

    def rows(self) -> Iterator[Row]:
        """First calls, then times, then memory, then what another batch size costs, which changes what is compiled."""
        measured: dict[str, list[Cell]] = {case: [] for case in CASES}
        for cell in self.cells:
            for case in CASES:
                try:
                    self.require_time()
                    seconds, compiled = self.first_step(cell, case, self.inputs)
                    self.check(cell, case)
                except FAILURES as failure:
                    say(f"  {cell.name}, {case}: {one_line(failure)}")
                    yield replace(self.row(case, cell, "time"), reason=one_line(failure))
                    continue
                say(f"  {cell.name}, {case}: first call {seconds:.1f} s, {compiled} graphs")
                measured[case].append(cell)
                yield self.row(case, cell, "cold_start", seconds)
                yield self.row(case, cell, "graphs", compiled)
        for case, cells in measured.items():
            yield from self.times(case, cells)
        for case, cells in measured.items():
            for cell in cells:
                if self.device.type == "cuda":
                    yield self.row(case, cell, "memory", self.peak_memory(cell, case))
        # Whole models take longest: where time is short, it is theirs that is not measured.
        for mode in ("blocks", "whole"):
            for case, cells in measured.items():
                for cell in cells:
                    if cell.mode == mode:
                        yield from self.last_batch(case, cell)

    def require_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTime("the time limit was reached")

    def first_step(self, cell: Cell, case: str, inputs: Inputs) -> tuple[float, int]:
        """Its seconds, and how many graphs it compiled."""
        before = graphs()
        wait_for(self.device)
        start = time.perf_counter()
        cell.step(case, inputs)
        wait_for(self.device)
        seconds = time.perf_counter() - start
        cell.forget()
        return seconds, graphs() - before

    def times(self, case: str, cells: Sequence[Cell]) -> Iterator[Row]:
        def run(cell: Cell, i: int = 0) -> None:
            cell.step(case, self.inputs)
            cell.forget()

        seconds = self.sizes.sample_seconds
        clocks = {cell.name: WallClock(partial(run, cell), self.device, seconds) for cell in cells}
        samples = self.samples[case] = in_turns(clocks, self.sizes.rounds)
        for cell in cells:
            row = timed(self.row(case, cell, "time"), samples[cell.name])
            row = replace(row, kernels=list(kernel_times(partial(run, cell), self.device)))
            if BASELINE in samples and cell.name != BASELINE:
                ratio = times_faster(samples[cell.name], samples[BASELINE])
                row = replace(row, baseline=BASELINE, ratio=ratio)
            yield row

    def peak_memory(self, cell: Cell, case: str) -> float:
        """GB that a step takes at its peak, besides weights and inputs."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        cell.step(case, self.inputs)
        cell.forget()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e9

    def last_batch(self, case: str, cell: Cell) -> Iterator[Row]:
        """A smaller batch, as an epoch may end with: how many graphs are compiled again, and how long that takes."""
        try:
            self.require_time()
            smaller = self.inputs.first(self.shape["N"] * 3 // 4)
            seconds, compiled = self.first_step(cell, case, smaller)
        except FAILURES as failure:
            yield replace(self.row(case, cell, "recompiles"), reason=one_line(failure))
            return
        yield self.row(case, cell, "recompiles", compiled)
        yield self.row(case, cell, "last_batch", seconds)

    # What shall hold, in words and numbers.

    def statements(self) -> Iterator[str]:
        for case in CASES:
            samples = self.samples.get(case, {})
            yield f"{case}, {self.shape}: {without_compiler(samples)}"
            yield f"{case}, {self.shape}: {with_compiler(samples)}"


def fastest(samples: dict[str, list[float]]) -> str:
    """The name of the cell that is fastest in the median of the turns."""
    return min(samples, key=lambda name: float(torch.tensor(samples[name]).median()))


def without_compiler(samples: dict[str, list[float]]) -> str:
    compiled = {name: samples[name] for name in samples if name in compiled_cells("reference")}
    if len(compiled) < 2 or "fastdit, eager" not in samples:
        return (
            "fastdit without a compiler against the compiled reference: not all cells were measured"
        )
    best = fastest(compiled)
    ratio = times_faster(samples["fastdit, eager"], compiled[best])
    return (
        f"fastdit without a compiler is {ratio:.3f} times as fast as the compiled reference ({best}), at least 1 is to "
        f"be: {'holds' if ratio >= 1 else 'DOES NOT HOLD'}"
    )


def with_compiler(samples: dict[str, list[float]]) -> str:
    cells = {name: samples[name] for name in samples if name.startswith("fastdit")}
    if len(cells) < len(MODES):
        return "compiled fastdit against its best cell: not all cells were measured"
    best = fastest(cells)
    ratios = {name: times_faster(cells[name], cells[best]) for name in compiled_cells("fastdit")}
    worst = min(ratios, key=lambda name: ratios[name])
    return (
        f"compiled fastdit is at least {ratios[worst]:.3f} times as fast as its best cell ({worst} against {best}), at "
        f"least {SLOWEST_COMPILED} is to be: {'holds' if ratios[worst] >= SLOWEST_COMPILED else 'DOES NOT HOLD'}"
    )


def compiled_cells(family: str) -> list[str]:
    return [f"{family}, {mode}" for mode in MODES if mode != "eager"]


# ------------------------------------------------------------------------------------------ command line


def matrix_table(rows: Sequence[Row]) -> str:
    """A line per shape, case and cell, with everything that was measured of it."""
    lines: dict[tuple[Any, ...], list[str]] = {}
    for row in sorted(rows, key=lambda row: (*row.shape.values(), CASES.index(row.case))):
        place = (*row.shape.items(), row.case, row.provider)
        shown = (
            f"{row.metric} -" if row.value is None else f"{row.metric} {row.value:.4g} {row.unit}"
        )
        if row.ratio is not None:
            shown += f" x{row.ratio:.3f}"
        lines.setdefault(place, []).append(shown)
    table = [
        f"{','.join(f'{k}={v}' for k, v in place[:-2]):24} {place[-2]:18} {place[-1]:18} {'  '.join(shown)}"
        for place, shown in lines.items()
    ]
    reasons = [f"{row.case}, {row.provider}: {row.reason}" for row in rows if row.reason]
    return "\n".join([*table, *(f"not measured: {reason}" for reason in reasons)])


@contextmanager
def cold_caches() -> Iterator[None]:
    """In here compilers find nothing that was compiled before, and no limit to how often they do it again.

    Dynamo counts compilations by the code of a function, and the blocks of both families run that of `nn.Module`.
    """
    from torch._dynamo import config

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TRITON_CACHE_DIR": str(Path(folder) / "triton"),
        }
        with mock.patch.dict(os.environ, caches), config.patch(recompile_limit=64):
            yield


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    device = torch.device("cpu")
    if options.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    elif options.device == "cuda":
        parser().error("--device cuda: torch sees no GPU; allowed here are auto and cpu")
    small = options.small or device.type == "cpu"
    sizes = SMALL if small else QUICK if options.quick else FULL
    if options.depth is not None:
        sizes = replace(sizes, model=sizes.model | {"depth": options.depth})
    compiler = options.compiler or ("inductor" if device.type == "cuda" else "aot_eager")
    deadline = time.monotonic() + options.time_limit
    environment = environment_of(device)
    folder = environment.folder(options.output)
    if small:  # a trial never stands in for a measurement
        folder = folder.with_name(f"{folder.name}-small")
        environment = replace(environment, device=f"{environment.device}, trial")
    path = folder / "compile_matrix.json"

    rows: list[Row] = []
    statements: list[str] = []
    torch.manual_seed(0)
    with cold_caches():
        # The compiler's own start belongs to no cell.
        torch.compile(lambda x: x + 1, backend=compiler)(torch.ones(8, device=device))
        for shape in sizes.shapes:
            say(f"compile_matrix: N, T = {shape}, {sizes.model} on {environment.device}")
            matrix = Matrix(sizes, shape, device, compiler, deadline)
            for row in matrix.rows():
                rows.append(row)
                write_rows(path, rows, environment)
            statements += matrix.statements()
    print(matrix_table(rows))
    if small:
        print("This was a trial of the program: its times mean nothing.")
    print("\n".join(statements))
    say(f"compile_matrix: {path}")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = options.add_argument
    add("--quick", action="store_true", help="batch 32 at 256 tokens alone")
    add("--small", action="store_true", help="a tiny model, to try the program; on a CPU always")
    add("--depth", type=int, help="blocks of the model (28; fewer compile faster)")
    compilers = ("inductor", "aot_eager", "eager")
    add(
        "--compiler", choices=compilers, help="inductor; on a CPU aot_eager, which compiles no code"
    )
    add("--output", type=Path, default=RESULTS, help="folder for the results (%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    limit = "seconds; what would start later is a row without a value (%(default)s)"
    add("--time-limit", type=float, default=360, help=limit)
    return options


if __name__ == "__main__":
    main()
