"""The command `fastdit`: train, extract, sample, convert, inspect, bench, info and demo.

Every option is a field of a dataclass, and its docstring the help. A wrong option is answered by the parser, and what
else a user can have done wrong in one line on stderr, with exit status 2 and, after `--traceback` or with
FASTDIT_TRACEBACK=1, where it happened. Ctrl-C exits with 130.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import json
import operator
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import attention, ops
from ._version import __version__
from .backend import active_backend, choose_device, describe
from .data import VAE, ImageFolder, TarShards, extract, loading_processes, open_data
from .demo import demo
from .distributed import OtherProcessError, World, world
from .files import write_json
from .models import DiT, DiT_models
from .ops.operation import OPERATIONS
from .sampling import Sampler, draw_to_disk, measure_sampling, output_kind, weights_digest
from .training import TrainConfig, train
from .validation import nearest, require_choice
from .weights import (
    convert,
    from_pretrained,
    inspect_weights,
    is_run,
    load_description,
    locate,
)

try:
    import tyro
except ImportError:  # `main` says so; the options' annotations are read by tyro alone
    tyro = None  # type: ignore[assignment]

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "triton",
    "diffusers",
    "scikit-learn",
    "pillow",
    "tyro",
)

USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    FloatingPointError,
    OtherProcessError,
)


@dataclass
class ExtractConfig:
    """Encodes all images and their mirror images once, for `train --data OUT`, which then needs no VAE at each step.

    Started again after a kill it goes on. `torchrun --nproc-per-node=8 -m fastdit extract ...` uses 8 GPUs and writes
    the same files. OUT takes about 33 KB an image of 256 pixels in fp16."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """A folder of class folders of images, or of webdataset tar files."""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """A new folder, or the one of the extraction that goes on."""
    vae: str = "stabilityai/sd-vae-ft-ema"
    """The AutoencoderKL, a folder or a name on the Hub."""
    scaling_factor: float = 0.18215
    """What latents are multiplied by to have about unit variance. It is recorded; what is stored is unscaled."""
    image_size: int = 256
    """In pixels; images are scaled and cropped to it."""
    batch_size: int = 64
    """Images that a process encodes together."""
    num_workers: int | None = None
    """Processes that read images, for each that encodes. Default: up to 4."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """What is stored."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the VAE computes in."""
    shard_size: int = 4096
    """Images in a file."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Stop at an image that cannot be used, or leave it out and list it in latents.json."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1. auto is CUDA where there is one."""


@dataclass
class SampleConfig:
    """Draws images of a trained model and writes them to disk, with what was asked for in OUT.json beside them.

    Started again after a kill it goes on, where options and weights are the same. `torchrun --nproc-per-node=8 -m
    fastdit sample ...` draws on 8 GPUs, the same images."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """A run folder, whose newest checkpoint is taken, a checkpoint folder or file, also of facebookresearch/DiT and
    diffusers, a name on the Hub, or DiT-XL-2-256x256 and DiT-XL-2-512x512."""
    num: int = 64
    """How many images."""
    labels: tuple[str, ...] = ()
    """Classes by name or number, separated by spaces or commas, drawn in turn up to --num. Default: all classes."""
    cfg_scale: float = 1.5
    """Guidance: 1 is none, more is closer to the class and less varied."""
    cfg_channels: Literal[3, "all"] = 3
    """Guide the first three channels, as the original does, or all."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only between these fractions of the schedule, 0 clean and 1 noise; the other steps cost half."""
    cuda_graph: Literal["auto"] | bool = "auto"
    """Replay one recorded step on CUDA: auto where that is possible and pays, True insists."""
    steps: int = 250
    """Denoising steps, 1 to 1000."""
    sampler: Literal["ddpm", "ddim", "dpm++"] = "ddpm"
    """How a step is made; dpm++ (DPM-Solver++ 2M) needs 20 to 50."""
    eta: float = 0.0
    """Share of noise in a DDIM step, 0 to 1."""
    seed: int = 0
    """The same seed and batch size give the same images."""
    batch_size: int = 64
    """Images that are drawn together."""
    which: str = "ema"
    """The averaged weights (ema, or ema:0.9999 of several) or the trained ones (model)."""
    num_heads: int | None = None
    """Heads of the attention, where neither the checkpoint nor its size tells."""
    vae: str | None = None
    """The AutoencoderKL that decodes latents, a folder or a name on the Hub. Default: the one of the run; for a
    checkpoint that names none stabilityai/sd-vae-ft-ema."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1. auto is CUDA where there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the model under autocast; the state between the steps is float32 either way."""
    out: str = "samples.png"
    """x.png is a grid, x.npz holds arr_0 uint8 (N, H, W, C) and arr_1 int64 labels, else a new folder of PNGs. A file
    is replaced."""


@dataclass
class ConvertConfig:
    """Writes weights in another format. Values and dtypes stay as they are."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IN")]
    """What `sample` takes too: file, folder, or name."""
    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """The file, or the new folder for diffusers. A file is replaced."""
    to: Literal["safetensors", "diffusers", "original"] = "safetensors"
    """safetensors under the original's names; a folder for diffusers' DiTTransformer2DModel; or a bare state dict in a
    .pt file, as facebookresearch/DiT reads it."""
    which: str = "ema"
    """Which weights, of several: ema, model, or ema:0.9999."""
    num_heads: int | None = None
    """Heads of the attention, where neither the checkpoint nor its size tells."""


@dataclass
class InspectConfig:
    """Shows what a checkpoint holds: architecture, parameters, dtypes, statistics, and what is odd about it."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """What `sample` takes too: file, folder, or name."""
    which: str = "ema"
    """Which weights, of several: ema, model, or ema:0.9999."""
    num_heads: int | None = None
    """Heads of the attention, where neither the checkpoint nor its size tells."""
    json: bool = False
    """Print JSON instead of text."""


@dataclass
class BenchConfig:
    """Measures on this machine. attention: every backend that can run, from which DiT chooses then (with --save)."""

    what: Annotated[
        tyro.conf.Positional[Literal["attention", "sampling"]], tyro.conf.arg(metavar="WHAT")
    ]
    """attention: each backend, forward and backward. sampling: fastdit.sample against plain loops and diffusers."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1. auto is CUDA where there is one."""
    model: str = "DiT-XL/2"
    """The model whose shapes, or which, is measured."""
    image_size: int = 256
    """In pixels; the model sees latents of an eighth."""
    batch: tuple[int, ...] = (8, 64)
    """Images in a batch."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """What is computed in."""
    steps: int = 20
    """Denoising steps in a run of sampling."""
    compile: bool = False
    """Of sampling: also measure what torch.compile makes of the plain loop and of diffusers; minutes."""
    save: bool = False
    """Keep what was measured of attention in the cache folder: `attention="auto"` chooses by it from then on."""
    json: bool = False
    """Print JSON instead of text."""


@dataclass
class InfoConfig:
    """Shows versions, devices, and which backends can run here."""

    json: bool = False
    """Print JSON instead of text."""
    kernels: bool = False
    """Also compile every kernel, as it would run, and show what it takes of the device; minutes, where it is not
    cached. Needs no GPU."""
    capability: tuple[int, ...] = ()
    """Compute capabilities for --kernels, 90 for sm_90. Default: those of the GPUs here or, without one, 80 and 90."""


@dataclass
class DemoConfig:
    """Trains a small model on handwritten digits, draws a grid of them and writes a short report, in a few minutes."""

    out: str = "runs/demo"
    """The run folder. An earlier demo in it is replaced."""
    steps: int = 1800
    """Updates of the weights."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; ends the process by SystemExit unless all went well."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "--traceback" in args or os.environ.get("FASTDIT_TRACEBACK") == "1"
    args = [argument for argument in args if argument != "--traceback"]
    try:
        run(args)
    except KeyboardInterrupt:
        if traceback:
            raise
        print("fastdit: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except USER_ERRORS as error:
        if traceback:
            raise
        print(f"fastdit: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def run(args: Sequence[str]) -> None:
    """Parses and carries out one command."""
    if tyro is None:
        raise ImportError('the command line needs tyro: pip install "fastdit[cli]"')
    if args == ["--version"]:
        print(f"fastdit {__version__}")
        return
    config = parse(args)
    next(function for kind, function in COMMANDS.values() if isinstance(config, kind))(config)


def parse(args: Sequence[str]) -> Any:
    """The options of a command: one of the records in `COMMANDS`."""
    if args and not args[0].startswith("-"):
        require_choice("command", args[0], COMMANDS)
    choices: dict[str, Any] = {
        name: Annotated[config, tyro.conf.subcommand(name)]
        for name, (config, _) in COMMANDS.items()
    }
    if stored := stored_configuration(args):
        choices["train"] = Annotated[TrainConfig, tyro.conf.subcommand("train", default=stored)]
    return tyro.cli(
        functools.reduce(operator.or_, choices.values()),
        prog="fastdit",
        description=f"fastdit {__version__}: Diffusion Transformers. --traceback shows where an error happened.",
        args=args,
    )


def stored_configuration(args: Sequence[str]) -> TrainConfig | None:
    """The configuration of the run that `train --resume --out RUN` continues, so that no option has to be repeated."""
    if args[:1] != ["train"] or "--resume" not in args:
        return None
    run = TrainConfig.out
    for argument, following in zip(args, [*args[1:], ""], strict=True):
        if argument == "--out" or argument.startswith("--out="):
            run = argument.removeprefix("--out=") if "=" in argument else following
    path = Path(run) / "config.json"
    if not path.exists():
        raise ValueError(f"out={run!r}: no run to resume, expected {path}")
    return TrainConfig.from_json(path)


def run_train(config: TrainConfig) -> None:
    folder = train(config)
    if os.environ.get("RANK", "0") == "0":
        print(folder)


def run_demo(config: DemoConfig) -> None:
    demo(config.out, steps=config.steps)


def run_extract(config: ExtractConfig) -> None:
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    with world() as among:
        device = choose_device(config.device)
        if among.size > 1 and device.type == "cuda":
            device = torch.device("cuda", among.local_rank)
        images = open_data(
            config.data, image_size=config.image_size, on_bad_image=config.on_bad_image
        )
        if not isinstance(images, (ImageFolder, TarShards)):
            raise ValueError(f"data={config.data!r}: expected images in class folders or tar files")
        vae = VAE(
            config.vae,
            device=device,
            dtype=dtypes[config.precision],
            scaling_factor=config.scaling_factor,
        )
        folder = extract(
            images,
            vae,
            config.out,
            batch_size=config.batch_size,
            num_workers=loading_processes(config.num_workers),
            dtype=dtypes[config.dtype],
            shard_size=config.shard_size,
            rank=among.rank,
            size=among.size,
            barrier=among.barrier,
        )
        if among.rank == 0:
            print(folder)


# ------------------------------------------------------------------ sample


def run_sample(config: SampleConfig) -> None:
    with world() as among:
        draw(config, among)


def draw(config: SampleConfig, among: World) -> None:
    output_kind(config.out)  # a wrong --out is known before hours of sampling
    if config.num < 1:
        raise ValueError(f"num={config.num}: must be at least 1")
    device = choose_device(config.device)
    if among.size > 1 and device.type == "cuda":
        device = torch.device("cuda", among.local_rank)
    model = from_pretrained(
        config.run, which=config.which, num_heads=config.num_heads, device=device
    )
    description = describe_images(config, model)
    classes = description["classes"] or [str(label) for label in range(model.num_classes)]
    labels = choose_labels(config.labels, classes, config.num)

    space = description["images"]
    decode: Callable[[Tensor], Tensor] = lambda images: images  # noqa: E731
    decoder = None
    if space["space"] == "latents":
        vae = VAE(space["vae"], device=device, scaling_factor=space["scaling_factor"])
        decode, decoder = vae.decode, vae.fingerprint()
    run = is_run(Path(config.run))
    weights = str(locate(config.run, config.which)[0]) if run else config.run
    asked = dataclasses.asdict(config) | {"labels": list(config.labels) or classes}
    written = {"fastdit": __version__, "weights": weights, **asked}
    plan: dict[str, Any] = {}
    if among.rank == 0:  # which alone reads and writes it
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            used = model.attention_in_use(config.batch_size, training=False)
        print("attention runs in", ", ".join(dict.fromkeys(used.values())))
        # Files and folders may hold something else by now, under the same names.
        plan = {
            **written,
            "device": device.type,
            "attention": used,
            "backend": active_backend(),
            "weights_sha256": weights_digest(model),
            "vae_fingerprint": decoder,
            **{name: description[name] for name in ("classes", "diffusion", "images")},
        }
    sampler = Sampler(
        model,
        steps=config.steps,
        sampler=config.sampler,
        eta=config.eta,
        cfg_channels=config.cfg_channels,
        guidance_interval=config.guidance_interval,
        cuda_graph=config.cuda_graph,
        **description["diffusion"],
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        draw_to_disk(
            sampler,
            labels,
            config.out,
            plan=json.loads(json.dumps(plan)),
            decode=decode,
            cfg_scale=config.cfg_scale,
            seed=config.seed,
            batch_size=config.batch_size,
            among=among,
        )
    if among.rank == 0:
        write_json(f"{config.out}.json", written)
        print(config.out)


def describe_images(config: SampleConfig, model: DiT) -> dict[str, Any]:
    """Classes, diffusion and images, as model.json says them; without one as the original was trained."""
    path = Path(config.run)
    described = is_run(path) or (path.parent / "model.json").exists()
    if described:
        description = load_description(path)
        images = description["images"]
        if config.vae is not None and images["space"] != "latents":
            raise ValueError(f"vae={config.vae!r}: {config.run} makes pixels, which need none")
        return {**description, "images": {**images, "vae": config.vae or images.get("vae")}}
    return {
        "classes": [],
        "diffusion": {"noise_schedule": "linear", "learn_sigma": model.learn_sigma},
        "images": {
            "space": "latents",
            "vae": config.vae or "stabilityai/sd-vae-ft-ema",
            "scaling_factor": 0.18215,
        },
    }


def choose_labels(names: Sequence[str], classes: Sequence[str], num: int) -> list[int]:
    """`num` class numbers: those that `names` stand for in turn, or all classes in turn."""
    labels = []
    for name in names:
        # A class name may hold spaces and commas itself.
        for part in [name] if name in classes else filter(None, re.split(r"[,\s]+", name)):
            labels.append(_label(part, classes))
    labels = labels or list(range(len(classes)))
    return [labels[i % len(labels)] for i in range(num)]


def _label(name: str, classes: Sequence[str]) -> int:
    if name in classes:
        return classes.index(name)
    if re.fullmatch(r"-?\d+", name):
        return int(name)
    raise ValueError(f"labels={name!r}: no such class{nearest(name, classes)}")


# ------------------------------------------------------------------ convert and inspect


def run_convert(config: ConvertConfig) -> None:
    notes = convert(
        config.source,
        config.target,
        to=config.to,
        which=config.which,
        num_heads=config.num_heads,
    )
    for note in notes:
        print(note)
    print(config.target)


def run_inspect(config: InspectConfig) -> None:
    found = inspect_weights(config.source, which=config.which, num_heads=config.num_heads)
    print(json.dumps(found, indent=2) if config.json else inspected_as_text(found))


def inspected_as_text(found: dict[str, Any]) -> str:
    dtypes = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in found["dtypes"].items())
    config = ", ".join(f"{name}={value}" for name, value in found["config"].items())
    lines = [
        f"source      {found['source']}",
        f"format      {' '.join(filter(None, (found['format'], found['entry'])))}",
        f"model       {config}",
        f"parameters  {found['parameters']:,} ({dtypes})",
        "",
        f"{'tensor':40}{'count':>6}  {'shape':18}{'rms':>19}  {'largest':>9}",
    ]
    for name, one in found["tensors"].items():
        shape = "x".join(map(str, one["shape"]))
        low, high = (f"{value:.3g}" for value in one["rms"])
        rms = low if one["count"] == 1 else f"{low} .. {high}"
        lines.append(f"{name:40}{one['count']:>6}  {shape:18}{rms:>19}  {one['largest']:>9.3g}")
    for heading in ("notes", "odd"):
        if found[heading]:
            lines += ["", heading, *(f"  {line}" for line in found[heading])]
    return "\n".join(lines)


# ------------------------------------------------------------------ bench


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def run_bench(config: BenchConfig) -> None:
    require_choice("model", config.model, DiT_models)
    if config.save and config.what != "attention":
        raise ValueError(f"save=True: is for attention, this is {config.what}")
    for name, values in {"batch": config.batch, "steps": (config.steps,)}.items():
        if not values or min(values) < 1:
            raise ValueError(f"{name}={values}: must be at least 1")
    device = choose_device(config.device)
    bench = {"attention": bench_attention, "sampling": bench_sampling}[config.what]
    rows, paths = bench(config, device)
    if config.json:
        print(json.dumps(rows, indent=2))
    else:
        print("\n".join(table_lines(rows)))
    for path in paths:
        print(path)


def bench_attention(
    config: BenchConfig, device: torch.device
) -> tuple[list[dict[str, Any]], list[Path]]:
    with torch.device("meta"):
        model = DiT_models[config.model](input_size=config.image_size // 8)
    tokens, heads = model.x_embedder.num_patches, model.num_heads
    head_dim = model.pos_embed.shape[-1] // heads
    cases = [
        attention.Case(n, tokens, heads, head_dim, dtype=DTYPES[config.dtype]) for n in config.batch
    ]
    measured = attention.measure(ops.attention, cases, device=device)
    rows = []
    for row in measured:
        n, t, h, k = row.case[:4]
        # 2 x multiply-adds of two products forward and five backward.
        flops = 2 * n * h * t * t * k * (2 if row.direction == "inference" else 7)
        rows.append(
            {
                "batch": n,
                "tokens": t,
                "heads": f"{h}x{k}",
                "direction": row.direction,
                "backend": row.backend,
                "ms": None if row.seconds is None else round(row.seconds * 1e3, 4),
                "TFLOP/s": None if row.seconds is None else round(flops / row.seconds / 1e12, 3),
                "reason": row.reason or "",
            }
        )
    return rows, attention.save(measured) if config.save else []


def bench_sampling(
    config: BenchConfig, device: torch.device
) -> tuple[list[dict[str, Any]], list[Path]]:
    torch.manual_seed(0)
    model = DiT_models[config.model](input_size=config.image_size // 8)
    for parameter in model.parameters():
        if parameter.requires_grad:  # as initialised, a DiT predicts zero
            torch.nn.init.normal_(parameter, std=0.02)
    model = model.to(device, DTYPES[config.dtype]).eval()
    rows = measure_sampling(model, config.batch, steps=config.steps, compiled=config.compile)
    return rows, []


def table_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    cells = [list(rows[0]), *(["" if v is None else str(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


# ------------------------------------------------------------------ info


def run_info(config: InfoConfig) -> None:
    if config.capability and not config.kernels:
        raise ValueError(f"capability={config.capability}: is for --kernels, which is not given")
    found = information()
    if config.kernels:
        found["kernels"] = kernel_information(config.capability)
    print(json.dumps(found, indent=2) if config.json else as_text(found))


def information() -> dict[str, Any]:
    """Versions, devices and backends of this machine."""
    versions = {"fastdit": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices = [
        {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
    ]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": found.name,
                "capability": f"{found.major}.{found.minor}",
                "memory_GiB": round(found.total_memory / 2**30, 1),
            }
        )
    return {
        "versions": versions,
        "devices": devices,
        "backend": active_backend(),
        "backends": {
            name: {"usable": not reasons, "reasons": reasons} for name, reasons in describe()
        },
        "attention": {
            name: {"usable": not reasons, "reasons": reasons}
            for name, reasons in attention.describe()
        },
        "operations": {
            one.name: one.backends() for one in OPERATIONS if not one.name.endswith("_backward")
        },
    }


def kernel_information(capabilities: Sequence[int]) -> dict[str, Any]:
    """`compiled`, what every kernel takes of devices of these compute capabilities, or `reason`, why it is not known.

    None given: those of the GPUs here or, without one, 80 and 90. Raises ValueError for one that is not known.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return {"reason": "TRITON_INTERPRET=1 has the kernels interpreted", "compiled": []}
    try:
        shipped = importlib.import_module("fastdit.kernels.shipped")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return {"reason": "the package triton is not installed", "compiled": []}
    here = (torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    chosen = capabilities or sorted({10 * major + minor for major, minor in here}) or (80, 90)
    launches = shipped.shipped()
    compiled = tqdm(
        shipped.compile_shipped(launches, chosen),
        total=len(launches) * len(chosen),
        unit="kernel",
        disable=None,
        leave=False,
    )
    return {"reason": None, "compiled": list(compiled)}


def as_text(found: dict[str, Any]) -> str:
    lines = [f"{name:14}{version}" for name, version in found["versions"].items()]
    lines.append("")
    for device in found["devices"]:
        rest = ", ".join(f"{key} {value}" for key, value in device.items() if key != "device")
        lines.append(f"{device['device']:14}{rest}")
    lines += ["", f"{'backend':14}{found['backend']}"]
    for name, backend in found["backends"].items():
        lines.append(
            f"  {name:12}{'usable' if backend['usable'] else '; '.join(backend['reasons'])}"
        )
    lines += ["", "attention, for DiT-XL/2 in bfloat16"]
    for name, backend in found["attention"].items():
        lines.append(
            f"  {name:16}{'usable' if backend['usable'] else '; '.join(backend['reasons'])}"
        )
    lines += ["", "operations and their implementations"]
    for name, backends in found["operations"].items():
        lines.append(f"  {name:36}{', '.join(backends)}")
    if "kernels" in found:
        lines += ["", *kernel_lines(**found["kernels"])]
    return "\n".join(lines)


def kernel_lines(reason: str | None, compiled: Sequence[dict[str, Any]]) -> list[str]:
    """The table of the kernels: registers and bits a thread, bytes of shared memory a program."""
    if reason is not None:
        return [f"{'kernels':14}not compiled: {reason}"]
    heads = "kernel,case,shape,dtype,sm,registers,shared,spills,load,warps"
    rows = [heads.split(",")]
    for one in compiled:
        shape, spilled = "x".join(map(str, one["shape"])), one["stack_bytes"]
        known = [one["kernel"], one["case"], shape, one["dtype"], one["capability"]]
        taken = [one["registers"], one["shared_bytes"], f"{spilled} bytes" if spilled else "none"]
        rows.append([str(cell) for cell in (*known, *taken, one["widest_load"], one["num_warps"])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "train": (TrainConfig, run_train),
    "extract": (ExtractConfig, run_extract),
    "sample": (SampleConfig, run_sample),
    "convert": (ConvertConfig, run_convert),
    "inspect": (InspectConfig, run_inspect),
    "bench": (BenchConfig, run_bench),
    "info": (InfoConfig, run_info),
    "demo": (DemoConfig, run_demo),
}
