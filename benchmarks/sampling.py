"""How long a step of sampling takes: `fastdit.Sampler` against plain loops, compiled ones, and diffusers.

    python benchmarks/sampling.py --quick              # DiT-XL/2 at 256 tokens, bf16 weights, batches 1 and 32
    python benchmarks/sampling.py --device cpu --model DiT-S/2 --batch 8 --dtype fp32

The providers are those of `fastdit.sampling.measure_sampling`, timed in turns; what is made before the steps has rows
of its own. Needs torch, numpy and this source tree, and diffusers for its rows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

if not __package__:  # started as a file: the packages lie in the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.results import Row, environment_of, folder_name, write_rows
from fastdit import DiT, DiT_models, create_diffusion
from fastdit.sampling import measure_sampling

RESULTS = Path(__file__).resolve().parent / "results"
DEMO: dict[str, Any] = {
    "tokens": 16,
    "model": {
        "input_size": 8,
        "patch_size": 2,
        "in_channels": 1,
        "hidden_size": 128,
        "depth": 4,
        "num_heads": 4,
        "num_classes": 10,
    },
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def shares(model: DiT, labels: int, steps: int) -> dict[str, float]:
    """Milliseconds a run for what is made before its steps: all modulations, for so many labels and the null label, 16
    steps at a time, and the table of coefficients."""
    device = next(model.parameters()).device
    diffusion = create_diffusion(str(steps), learn_sigma=model.learn_sigma)
    t = torch.tensor(diffusion.timestep_map, device=device)
    y = torch.arange(labels + 1, device=device) % (model.num_classes + 1)

    def table() -> None:
        with torch.no_grad():
            for some in t.split(16):
                model.modulations(some.repeat_interleave(len(y)), y.repeat(len(some)))

    found = {}
    for name, make in {
        "conditioning table": table,
        "step table": lambda: diffusion.step_table("ddpm", device=device),
    }.items():
        times = []
        for _ in range(4):
            begun = time.perf_counter()
            make()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        found[name] = 1e3 * statistics.median(times[1:])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--model", choices=(*DiT_models, "demo"), default="DiT-XL/2", help="demo: of `make demo`")
    add("--tokens", type=int, choices=(256, 1024), default=256)
    add("--batch", type=int, nargs="+", default=[1, 8, 32, 64])
    add("--dtype", choices=tuple(DTYPES), default="bf16")
    add("--steps", type=int, default=20)
    add("--quick", action="store_true", help="batches 1 and 32")
    add(
        "--depth",
        type=int,
        help="blocks of the model, fewer to try the program: no file is written",
    )
    add("--no-compile", action="store_true", help="leave what is compiled out")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--output", type=Path, default=RESULTS, help="folder for the results (%(default)s)")
    options = parser.parse_args(arguments)
    device = torch.device("cpu")
    if options.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", 0)
    elif options.device == "cuda":
        parser.error("--device cuda: torch sees no GPU; allowed here are auto and cpu")
    torch.manual_seed(0)
    if options.model == "demo":
        options.tokens = DEMO["tokens"]
        model = DiT(**DEMO["model"])
    else:
        model = DiT_models[options.model](input_size=32 if options.tokens == 256 else 64)
    if options.depth is not None:
        model.blocks = model.blocks[: options.depth]
    for parameter in model.parameters():
        if parameter.requires_grad:  # as initialised, a DiT predicts zero
            torch.nn.init.normal_(parameter, std=0.02)
    model = model.to(device, DTYPES[options.dtype]).eval()
    measured = measure_sampling(
        model,
        [1, 32] if options.quick else options.batch,
        steps=options.steps,
        compiled=not options.no_compile,
    )
    template = Row("sampling", options.model, "", {}, options.dtype, "time")
    rows = [
        replace(
            template,
            provider=row["provider"],
            shape={"N": row["batch"], "T": options.tokens, "steps": options.steps},
            value=1e3 * row["ms a step"],
            baseline="reference",
            ratio=row["ratio"],
        )
        for row in measured
    ]
    for batch in [1, 32] if options.quick else options.batch:
        for name, milliseconds in shares(
            model, min(batch, model.num_classes), options.steps
        ).items():
            shape = {"N": batch, "T": options.tokens, "steps": options.steps}
            a_step = 1e3 * milliseconds / options.steps
            rows.append(replace(template, provider=f"fastdit, {name}", shape=shape, value=a_step))
            print(f"batch {batch}  {name} {milliseconds / options.steps:.3f} ms a step")
    for row in measured:
        print(*(f"{name} {value}" for name, value in row.items()), sep="  ")
    if options.depth is None:
        environment = environment_of(device)
        path = environment.folder(options.output) / f"sampling-{folder_name(options.model)}.json"
        write_rows(path, rows, environment)
        print(path)


if __name__ == "__main__":
    main()
