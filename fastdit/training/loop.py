"""The training loop: one process, on the CPU or one GPU.

    x_t = q_sample(x0, t, noise),  t uniform over the timesteps
    loss = mean over the batch of mse + vb            (Nichol & Dhariwal 2021, eq. 16, as DiT is trained)
    AdamW (betas 0.9, 0.999);  ema <- decay · ema + (1 - decay) · weights        (Peebles & Xie, section 4)

A step reads nothing back from the device: the loss and the norm of the gradient are summed there, and read every
`log_every` steps. All randomness comes from generators whose states are in every checkpoint, and the order of the data
is a function of (seed, step), so a resumed run goes on bit for bit.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .. import files
from ..backend import choose_device
from ..data import VAE, Digits, EpochBatchSampler, ImageFolder
from ..data.sampler import derived_seed
from ..diffusion import create_diffusion
from ..models import DiT, DiT_models, multiply_adds
from ..sampling import sample, save_grid, to_uint8
from ..weights import (
    FORMAT,
    adapted,
    latest_checkpoint,
    load_description,
    load_into,
    read_pretrained,
)
from . import checkpoint, plots
from .checkpoint import Trained
from .config import FIXED, SIZES, TrainConfig
from .ema import EMA
from .metrics import drop_after, read_metrics


def train(config: TrainConfig) -> Path:
    """Trains a DiT as `config` says, and returns the run folder.

    The folder holds config.json, metrics.jsonl (one line every `log_every` steps), loss.png, samples/ (grids drawn from
    the averaged weights) and checkpoints/. The random state of the process is left as it was.

    Raises ValueError or TypeError naming what does not fit (a run that exists and is not to be resumed, a resumed run
    whose model, data or classes changed, data smaller than a batch), and FloatingPointError where the loss or the
    gradient stops being finite; the checkpoints that were written before stay.
    """
    device = choose_device(config.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return Trainer(config, device).run()


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of the update that follows `step` updates.

    It rises linearly to `lr` over the first `warmup_steps` updates and then stays, or with "cosine" falls as
    lr · (1 + cos(pi · u)) / 2, where u goes from 0 at the end of the warm-up to 1 after the last update.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    u = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.lr * (1 + math.cos(math.pi * u)) / 2


class Trainer:
    """A run: what `train` needs at hand. Made once; `run()` goes through the steps."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.folder = Path(config.out)
        previous = _open_run(config)

        torch.manual_seed(config.seed)
        self.dataset = _dataset(config, load_description(previous)["classes"] if previous else None)
        self.vae = VAE(config.vae, device=device) if config.vae is not None else None
        # Made on the CPU, so that a seed gives the same weights on every device.
        model = _model(config, self.dataset, self.vae)
        if config.init_from is not None and previous is None:
            _initialise(model, config.init_from)
        self.model = model.to(device)
        self.ema = EMA(self.model, config.ema_decay)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=config.lr,
            betas=(0.9, 0.999),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.diffusion_options: dict[str, Any] = {
            "noise_schedule": config.noise_schedule,
            "learn_sigma": config.learn_sigma,
        }
        self.diffusion = create_diffusion("", **self.diffusion_options)
        # Not the seed itself: the noise would repeat the numbers that the weights were drawn from.
        self.generator = torch.Generator(device).manual_seed(derived_seed(config.seed, 0))

        names = ("loss", "mse", "vb") if config.learn_sigma else ("loss", "mse")
        self.measured = (*names, "gradient_norm")
        self.sums = torch.zeros(len(self.measured), device=device)
        self.summed = 0
        self.step = 0
        self.seconds = 0.0
        self.since = 0.0  # where the clock stood when the current log interval began
        self.trained = Trained(self.model, self.ema.model, self.optimizer, self.generator)
        if previous is not None:
            self._restore(previous)
        elif config.resume_from_original is not None:
            source = Path(config.resume_from_original)
            self.step = checkpoint.load_original(source, self.trained)
            print(f"Weights, averages and moments are those of {source}, step {self.step:,}")
        if self.step > config.steps:
            raise ValueError(
                f"steps={config.steps}: the run in {config.out} is at step {self.step}"
            )

        self.predict = self._compiled()
        self.pictures = not plots.missing_packages()

    def run(self) -> Path:
        """Goes through the steps that are left, and returns the run folder."""
        config = self.config
        if self.step == config.steps:
            print(
                f"{self.folder} is at step {self.step:,} of {config.steps:,}: nothing is left to do"
            )
            return self.folder
        batches = self._batches()
        # Read before anything is written, so that unusable data leaves no run behind.
        batches = itertools.chain([next(batches)], batches)
        self._begin()
        self.since = time.perf_counter()
        with (
            tqdm(initial=self.step, total=config.steps, unit="step", disable=None) as bar,
            _interrupts() as interrupted,
        ):
            while self.step < config.steps:
                self._update(*next(batches))
                self.step += 1
                if self._due(config.log_every):
                    self._log(bar)
                if self._due(config.sample_every):
                    self._draw_samples()
                if self._due(config.checkpoint_every) or interrupted:
                    self._save()
                if interrupted:
                    print(f"interrupted after step {self.step:,}, which is saved", flush=True)
                    raise KeyboardInterrupt
                if self._due(config.sample_every) or self._due(config.checkpoint_every):
                    self._draw_loss_curve()
                bar.update()
        return self.folder

    # ------------------------------------------------------------------ a step

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(x0, labels) on the device, from the batch of the current step on, without end."""
        config = self.config
        sampler = EpochBatchSampler(
            len(self.dataset), config.batch_size, seed=config.seed, start_step=self.step
        )
        loader = DataLoader(
            self.dataset,
            batch_sampler=sampler,
            num_workers=_num_workers(config),
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_interrupts_to_the_loop,
            generator=torch.Generator(),  # else the loader would draw from the global one, once a start
        )
        checked = False
        for images, labels in loader:
            x0 = images.to(self.device, non_blocking=True)
            y = labels.to(self.device, non_blocking=True)
            if self.vae is not None:
                x0 = self.vae.encode(x0, self.generator)
            if not checked:
                self.model.check_values(x0, None, y)
                checked = True
            yield x0, y

    def _update(self, x0: Tensor, y: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        t = torch.randint(
            self.diffusion.num_timesteps, (len(x0),), generator=self.generator, device=self.device
        )
        noise = torch.randn(x0.shape, generator=self.generator, device=self.device)
        terms = self.diffusion.training_losses(self._predict, x0, t, {"y": y}, noise)
        means = {name: value.mean() for name, value in terms.items()}
        means["loss"].backward()
        means["gradient_norm"] = self._gradient_norm()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        self.sums += torch.stack([means[name].detach() for name in self.measured])
        self.summed += 1

    def _predict(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with self._autocast():
            output: Tensor = self.predict(x, t, y)
        return output

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        )

    def _gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, which is then clipped if the configuration says so."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.gradient_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.gradient_clip, norm)
        return norm

    def _compiled(self) -> Any:
        """What predicts. Compiled in a way that leaves the model itself, and the names of its weights, as they are."""
        if self.config.compile == "whole":
            return torch.compile(self.model)
        if self.config.compile == "blocks":
            for block in self.model.blocks:
                block.compile()
        return self.model

    # ------------------------------------------------------------------ between the steps

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def _means(self) -> dict[str, float]:
        """The means since the last log line, read from the device. Raises FloatingPointError where one is not finite.

        Read before anything is written too, so that no checkpoint comes after a broken step.
        """
        if not self.summed:
            return {}
        sums = self.sums.tolist()
        means = {name: total / self.summed for name, total in zip(self.measured, sums, strict=True)}
        for name, value in means.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"step {self.step}: {name}={value}, the mean of the last {self.summed} steps, is not finite; a "
                    f"lower lr={self.config.lr} or a gradient_clip may help. Checkpoints before this step are kept in "
                    f"{self.folder / 'checkpoints'}"
                )
        return means

    def _log(self, bar: tqdm[Any]) -> None:
        means = self._means()
        now = time.perf_counter()
        elapsed, self.since = now - self.since, now
        self.seconds += elapsed
        record = {
            "step": self.step,
            **means,
            "learning_rate": learning_rate(self.config, self.step - 1),
            "images_per_second": self.summed * self.config.batch_size / elapsed,
            "seconds": self.seconds,
        }
        files.append_jsonl(self.folder / "metrics.jsonl", record)
        self.sums.zero_()
        self.summed = 0
        told = f"loss {means['loss']:.4f}, {record['images_per_second']:,.0f} images/s"
        if bar.disable:
            print(f"step {self.step:,} of {self.config.steps:,}: {told}", flush=True)
        else:
            bar.set_postfix_str(told)

    @contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """For what is not training: the time in here does not count into images per second."""
        self._means()  # waits for the steps that the device has not finished
        begun = time.perf_counter()
        yield
        self.since += time.perf_counter() - begun

    def _draw_samples(self) -> None:
        """samples/step-XXXXXXXX.png from the averaged weights, one column for each of the first ten classes."""
        if not self.pictures:
            return
        with self._off_the_clock():
            columns = min(len(self.dataset.classes), 10)
            with self._autocast():
                images = sample(
                    self.ema.model,
                    list(range(columns)) * 4,
                    steps=self.config.sample_steps,
                    cfg_scale=1.0 if self.model.null_label is None else self.config.cfg_scale,
                    seed=self.config.seed,
                    progress=False,
                    **self.diffusion_options,
                )
            if self.vae is not None:
                images = self.vae.decode(images)
            path = self.folder / "samples" / f"step-{self.step:08d}.png"
            path.parent.mkdir(exist_ok=True)
            save_grid(to_uint8(images), path, columns=columns)

    def _draw_loss_curve(self) -> None:
        records = read_metrics(self.folder / "metrics.jsonl")
        if not records or not self.pictures:
            return
        with self._off_the_clock():
            title = f"{_name(self.config)}, {_parameters(self.model)}"
            plots.draw_loss_curve(records, self.folder / "loss.png", title)

    def _save(self) -> None:
        with self._off_the_clock():
            state = {
                "step": self.step,
                "images": len(self.dataset),
                "seconds": self.seconds,
                "learning_rate": learning_rate(self.config, self.step - 1),
                "sums_since_log": self.sums.tolist(),
                "steps_since_log": self.summed,
                "torch": torch.__version__,
            }
            checkpoint.save_checkpoint(self.folder, self.trained, state, self._description())
            checkpoint.keep_newest(self.folder, self.config.keep_checkpoints)

    # ------------------------------------------------------------------ beginning and resuming

    def _begin(self) -> None:
        """Says what is about to run, and makes the run folder."""
        config, model = self.config, self.model
        height, width = model.input_size
        device = str(self.device)
        if self.device.type == "cuda":
            device += f" ({torch.cuda.get_device_name(self.device)})"
        classes = len(self.dataset.classes)
        print(
            f"model   {_name(config)}, {_parameters(model)}, "
            f"{multiply_adds(model) / 1e6:,.1f} million multiply-adds per image of "
            f"{model.in_channels}x{height}x{width}\n"
            f"data    {config.data}, {len(self.dataset):,} images in {classes:,} classes"
            f"{'' if config.vae is None else f', latents of {config.vae}'}\n"
            f"device  {device}, {config.precision}, compile {config.compile}, attention in {self._attention()}\n"
            f"run     {self.folder}, step {self.step:,} of {config.steps:,}",
            flush=True,
        )
        if not self.pictures:
            missing = " and ".join(plots.missing_packages())
            print(
                f'No pictures are drawn: {missing} missing (pip install "fastdit[cli]")', flush=True
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        checkpoint.remove_unfinished(self.folder)
        drop_after(self.folder / "metrics.jsonl", self.step)
        files.write_json(self.folder / "config.json", _stored(config))

    def _attention(self) -> str:
        with self._autocast():
            used = self.model.attention_in_use(self.config.batch_size, training=True)
        return ", ".join(dict.fromkeys(used.values()))

    def _restore(self, path: Path) -> None:
        state = checkpoint.load_state(path)
        if state["images"] != len(self.dataset):
            raise ValueError(
                f"data={self.config.data!r}: has {len(self.dataset)} images, the run in {self.folder} was begun with "
                f"{state['images']}"
            )
        checkpoint.load_checkpoint(path, self.trained)
        self.step, self.seconds = state["step"], state["seconds"]
        self.sums.copy_(torch.tensor(state["sums_since_log"]))
        self.summed = state["steps_since_log"]

    def _description(self) -> dict[str, Any]:
        vae = self.vae
        return {
            "format": FORMAT,
            "model": self.model.config,
            "classes": self.dataset.classes,
            "diffusion": self.diffusion_options,
            "images": {
                "space": "pixels" if vae is None else "latents",
                "image_size": self.dataset.image_size,
                "channels": self.model.in_channels,
                "vae": self.config.vae,
                "scaling_factor": None if vae is None else vae.scaling_factor,
            },
        }


def _leave_interrupts_to_the_loop(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; without its workers the step under way could not end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that is empty until the first Ctrl-C, which waits for the step under way; the second acts at once."""
    pressed: list[int] = []

    def note(signal_number: int, frame: FrameType | None) -> None:
        pressed.append(signal_number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield pressed  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------ what a configuration stands for


def _num_workers(config: TrainConfig) -> int:
    if config.num_workers is not None:
        return config.num_workers
    # More than the cores that this process may use would only take turns; the digits are in memory.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 0 if config.data == "digits" else min(4, cores or 1)


def _dataset(config: TrainConfig, classes: list[str] | None) -> Digits | ImageFolder:
    if config.data == "digits":
        return Digits()
    return ImageFolder(
        config.data,
        256 if config.image_size is None else config.image_size,
        horizontal_flip=config.horizontal_flip is not False,
        seed=config.seed,
        on_bad_image=config.on_bad_image,
        classes=classes,
    )


def _model(config: TrainConfig, dataset: Digits | ImageFolder, vae: VAE | None) -> DiT:
    classes = len(dataset.classes)
    if config.num_classes is not None and config.num_classes < classes:
        raise ValueError(f"num_classes={config.num_classes}: the data has {classes} classes")
    factor = 1 if vae is None else vae.downsample_factor
    if dataset.image_size % factor:
        raise ValueError(
            f"image_size={dataset.image_size}: must be divisible by {factor}, which the VAE makes it smaller by"
        )
    arguments: dict[str, Any] = {
        "input_size": dataset.image_size // factor,
        "in_channels": dataset.channels if vae is None else vae.latent_channels,
        "class_dropout_prob": config.class_dropout_prob,
        "num_classes": classes if config.num_classes is None else config.num_classes,
        "learn_sigma": config.learn_sigma,
        "conditioning": config.conditioning,
    }
    if config.hidden_size is not None:
        return DiT(**arguments, **{name: getattr(config, name) for name in SIZES})
    return DiT_models[config.model or "DiT-S/2"](**arguments)


def _name(config: TrainConfig) -> str:
    if config.hidden_size is None:
        return config.model or "DiT-S/2"
    return (
        f"DiT of width {config.hidden_size}, depth {config.depth}, {config.num_heads} heads, "
        f"patch {config.patch_size}"
    )


def _parameters(model: DiT) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{count / 1e6:.2f}M parameters" if count >= 1e6 else f"{count:,} parameters"


def _initialise(model: DiT, source: str) -> None:
    """Gives `model` the averaged weights of `source`, and says so; see `TrainConfig.init_from`."""
    found = read_pretrained(source, num_heads=model.num_heads)
    changed = ("num_classes", "class_dropout_prob", "input_size")
    for name, value in model.config.items():
        if name not in changed and found.config[name] != value:
            raise ValueError(
                f"init_from={source!r}: checkpoint has {name}={found.config[name]!r}, model has {value!r}"
            )
    weights, notes = adapted(found, model)
    load_into(model, weights, source=source)
    for note in [f"Weights are those of {source}", *found.notes, *notes]:
        print(note)


def _open_run(config: TrainConfig) -> Path | None:
    """The checkpoint from which `out` is resumed, or None where the run begins at step 0. Changes nothing."""
    folder = Path(config.out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={config.out!r}: expected a folder, this is a file")
    exists = (folder / "config.json").exists()
    if not config.resume:
        if exists or (folder / "checkpoints").exists():
            raise ValueError(
                f"out={config.out!r}: holds a run already; resume=True continues it, another out begins a new one"
            )
        return None
    if not exists:
        raise ValueError(f"out={config.out!r}: no run to resume, expected {folder / 'config.json'}")
    _require_resumable(config, TrainConfig.from_json(folder / "config.json"))
    try:
        return latest_checkpoint(folder)
    except FileNotFoundError:
        print(f"{folder} has no checkpoint yet: the run begins at step 0")
        return None


def _stored(config: TrainConfig) -> dict[str, Any]:
    """What config.json holds: valid in another working directory too."""
    record = config.to_dict() | {"resume": False}
    if config.data != "digits":
        record["data"] = str(Path(config.data).absolute())
    return record


def _require_resumable(config: TrainConfig, stored: TrainConfig) -> None:
    """Raises ValueError where model or data changed, and prints what else did."""
    before, now = _stored(stored), _stored(config)
    changed = {
        name: f"{before[name]!r} -> {value!r}"
        for name, value in now.items()
        if name not in ("out", "resume") and before[name] != value
    }
    fixed = [f"{name} {change}" for name, change in changed.items() if name in FIXED]
    if fixed:
        raise ValueError(
            f"resume: {', '.join(fixed)}: model and data of the run in {config.out} cannot change; begin a new one, "
            "with init_from for its weights"
        )
    for name, change in changed.items():
        print(f"Changed since the run was begun: {name} {change}")
