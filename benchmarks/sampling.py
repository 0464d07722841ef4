"""How long a step of sampling takes, and how long images take to the disk.

    python benchmarks/sampling.py --quick              # DiT-XL/2 at 256 tokens, bf16 weights, batches 1 and 32
    python benchmarks/sampling.py --images 512         # 250 steps, decoding and writing, in batches of 64
    python benchmarks/sampling.py --device cpu --model DiT-S/2 --batch 8 --dtype fp32

A step: the providers of `fastdit.sampling.measure_sampling`, and on CUDA the eager reference with float32 weights under
autocast to bfloat16, timed in turns. What is made before the steps has rows of its own. Ratios are against the eager
reference, in rows of their own also against the one under autocast and the compiled one.

Images: the wall time of what `fastdit sample` does with a model that is loaded, from the first noise to the .npz, after
one batch that is not timed. Needs torch, numpy and this source tree, and diffusers for its rows and for the VAE.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:  # started as a file: the packages lie in the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measure import Turns, WallClock, side_by_side, timed, times_faster, wait_for
from benchmarks.results import Row, environment_of, folder_name, table, write_rows
from fastdit import DiT, DiT_models, create_diffusion
from fastdit.backend import use_backend
from fastdit.data import VAE
from fastdit.distributed import World
from fastdit.sampling import Sampler, draw_to_disk
from fastdit.sampling.measuring import plain_loop, providers_of

RESULTS = Path(__file__).resolve().parent / "results"
DEMO: dict[str, Any] = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "hidden_size": 128,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 10,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


CFG_SCALE = 1.5
REFERENCE, AUTOCAST, COMPILED = "reference", "reference, autocast", "reference, compiled"
# The autoencoder that DiT's latents come from, of Stable Diffusion.
STABLE_DIFFUSION: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
}


# ------------------------------------------------------------------------------------------------ a step


def step_rows(
    model: DiT, batches: Sequence[int], options: argparse.Namespace, template: Row
) -> tuple[list[Row], list[str]]:
    """Rows of all providers and shares, and the providers that failed for another reason than memory."""
    device = next(model.parameters()).device
    draws = providers_of(model, options.steps, CFG_SCALE, not options.no_compile)
    if device.type == "cuda":
        draws[AUTOCAST] = under_autocast(model, options.steps)
    rows: list[Row] = []
    broken: list[str] = []
    for batch in batches:
        # Else what was compiled for one batch would be compiled for any, which is slower, when it meets the next.
        torch.compiler.reset()
        shape = {"N": batch, "T": model.x_embedder.num_patches, "steps": options.steps}
        of_batch = replace(template, shape=shape)
        labels = torch.arange(batch, device=device) % model.num_classes
        turns = side_by_side(
            {
                name: partial(WallClock, partial(draw, labels), options.steps, device)
                for name, draw in draws.items()
            },
            options.rounds,
        )
        for name in draws:
            row = replace(of_batch, provider=name, reason=turns.reasons.get(name))
            if name not in turns.samples:
                rows.append(row)
                continue
            row = timed(row, turns.samples[name])
            rows.append(compared(row, REFERENCE, turns))
            for baseline in (AUTOCAST, COMPILED):
                if baseline in turns.samples and name.startswith("fastdit"):
                    against = replace(row, case=f"{row.case} against {baseline}")
                    rows.append(compared(against, baseline, turns))
        for name, seconds in shares(model, min(batch, model.num_classes), options).items():
            rows.append(timed(replace(of_batch, provider=f"fastdit, {name}"), seconds))
        broken += turns.broken()
    return rows, broken


def compared(row: Row, baseline: str, turns: Turns) -> Row:
    if baseline not in turns.samples or baseline == row.provider:
        return row
    ratio = times_faster(turns.samples[row.provider], turns.samples[baseline])
    return replace(row, baseline=baseline, ratio=ratio)


def under_autocast(model: DiT, steps: int) -> Callable[[Tensor], Tensor]:
    """The loop of the eager reference as it is run after training: float32 weights, autocast to bfloat16."""
    wide = copy.deepcopy(model).float()
    device = next(wide.parameters()).device

    def draw(labels: Tensor) -> Tensor:
        with use_backend("reference"), torch.autocast(device.type, torch.bfloat16):
            return plain_loop(wide, wide, labels, steps, CFG_SCALE)

    return draw


def shares(model: DiT, labels: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a step for what is made before the steps: all modulations, for so many labels and the null label, 16
    steps at a time, and the table of coefficients."""
    device = next(model.parameters()).device
    diffusion = create_diffusion(str(options.steps), learn_sigma=model.learn_sigma)
    t = torch.tensor(diffusion.timestep_map, device=device)
    y = torch.arange(labels + 1, device=device) % (model.num_classes + 1)

    def conditioning() -> None:
        with torch.no_grad():
            for some in t.split(16):
                model.modulations(some.repeat_interleave(len(y)), y.repeat(len(some)))

    each: dict[str, Callable[[], Any]] = {
        "conditioning table": conditioning,
        "step table": lambda: diffusion.step_table("ddpm", device=device),
    }
    found = {}
    for name, make in each.items():
        clock = WallClock(make, options.steps, device)
        clock.warm_up()
        found[name] = [clock.sample() for _ in range(options.rounds)]
    return found


# ------------------------------------------------------------------------------------- images to the disk


def image_rows(
    model: DiT, batches: Sequence[int], options: argparse.Namespace, template: Row
) -> list[Row]:
    """Seconds and images/s of `options.images` images, all of them drawn; a reason without diffusers."""
    device = next(model.parameters()).device
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        decode, said = decoder(model, options, Path(folder), device)
        for batch in batches:
            shape = {"images": options.images, "N": batch, "T": model.x_embedder.num_patches}
            row = replace(
                template,
                case=f"{template.case}, {options.images} images to disk, {said}",
                provider="fastdit",
                shape={**shape, "steps": options.steps},
                metric="wall_time",
            )
            if decode is None:
                rows.append(replace(row, reason=said))
                continue
            sampler = Sampler(model, steps=options.steps, learn_sigma=model.learn_sigma)

            def draw(count: int, sampler: Sampler = sampler, batch: int = batch) -> None:
                draw_to_disk(
                    sampler,
                    [i % model.num_classes for i in range(count)],
                    str(Path(folder) / f"{batch}-{count}.npz"),
                    plan={},
                    decode=decode,
                    cfg_scale=CFG_SCALE,
                    seed=0,
                    batch_size=batch,
                    among=World(),
                    progress=False,
                )

            draw(min(batch, options.images))  # kernels are compiled, graphs recorded
            wait_for(device)
            begun = time.perf_counter()
            draw(options.images)
            seconds = time.perf_counter() - begun
            sampler.release()
            rows.append(replace(row, value=seconds))
            rows.append(replace(row, metric="throughput", value=options.images / seconds))
    return rows


def decoder(
    model: DiT, options: argparse.Namespace, folder: Path, device: torch.device
) -> tuple[Callable[[Tensor], Tensor] | None, str]:
    """What makes images of what the model draws, and what that is; None and a reason where it cannot be had."""
    if options.model == "demo":
        return (lambda images: images), "pixels, no VAE"
    name = options.vae
    said = f"VAE {name}"
    try:
        if name is None:
            from diffusers import AutoencoderKL

            name, said = (
                str(folder / "vae"),
                "VAE of Stable Diffusion's architecture, random weights",
            )
            made: Any = AutoencoderKL(**STABLE_DIFFUSION)
            made.save_pretrained(name)
        return VAE(name, device=device).decode, f"{said}, float32"  # as `fastdit sample` has it
    except ImportError as error:
        return None, f"the VAE needs diffusers: {error}"


# --------------------------------------------------------------------------------------------- the program


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--model", choices=(*DiT_models, "demo"), default="DiT-XL/2", help="demo: of `make demo`")
    add("--tokens", type=int, choices=(256, 1024), default=256, help="of patches of 2 x 2")
    add("--batch", type=int, nargs="+", help="1 8 32 64; with --quick 1 32; with --images 64")
    add("--dtype", choices=tuple(DTYPES), default="bf16")
    add("--steps", type=int, help="of an image: 20, with --images 250")
    add("--rounds", type=int, default=5, help="samples of each (%(default)s)")
    add("--quick", action="store_true", help="batches 1 and 32")
    add("--images", type=int, metavar="N", help="measure N images to disk instead of a step")
    add("--vae", help="folder or name on the hub, for --images; default: made here, random weights")
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
    if options.images is not None and options.images < 1:
        parser.error(f"--images {options.images}: must be at least 1")
    if options.steps is None:
        options.steps = 20 if options.images is None else 250
    torch.manual_seed(0)
    if options.model == "demo":
        model = DiT(**DEMO)
    else:
        model = DiT_models[options.model](input_size=32 if options.tokens == 256 else 64)
    if options.depth is not None:
        model.blocks = model.blocks[: options.depth]
    for parameter in model.parameters():
        if parameter.requires_grad:  # as initialised, a DiT predicts zero
            torch.nn.init.normal_(parameter, std=0.02)
    model = model.to(device, DTYPES[options.dtype]).eval()
    template = Row("sampling", options.model, "", {}, options.dtype, "time")
    broken: list[str] = []
    if options.images is not None:
        rows = image_rows(model, options.batch or [64], options, template)
    else:
        batches = options.batch or ([1, 32] if options.quick else [1, 8, 32, 64])
        rows, broken = step_rows(model, batches, options, template)
    print(table(rows))
    if options.depth is None:
        environment = environment_of(device)
        part = "sampling" if options.images is None else "images"
        path = environment.folder(options.output) / f"{part}-{folder_name(options.model)}.json"
        write_rows(path, rows, environment)
        print(path)
    if broken:
        sys.exit(f"failed: {', '.join(broken)}")


if __name__ == "__main__":
    main()
