"""The training loop: one process on the CPU or a GPU, or many that `torchrun` has started.

    x_t = q_sample(x0, t, noise),  t uniform over the timesteps
    loss = mean over the batch of mse + vb            (Nichol & Dhariwal 2021, eq. 16, as DiT is trained)
    AdamW (betas 0.9, 0.999);  ema <- decay · ema + (1 - decay) · weights        (Peebles & Xie, section 4)

A step waits for nothing that the device computes: losses, the norm of the gradient, and whether they are finite are
decided and summed there; the host reads what it needs one step late. A step that is not finite changes nothing.

Everything random is drawn for the whole batch by every process, from generators whose states are in every checkpoint,
and the order of the data is a function of (seed, step). So a resumed run goes on bit for bit, and the number of
processes changes the order of sums and nothing else.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .. import files
from ..backend import choose_device
from ..data import VAE, EpochBatchSampler, loading_processes, open_data, sample_latents
from ..data.sampler import derived_seed
from ..diffusion import create_diffusion
from ..distributed import World, started_by_torchrun, world
from ..models import DiT, DiT_models, multiply_adds
from ..sampling import sample, save_grid, to_uint8
from ..weights import FORMAT, adapted, checkpoints, load_description, load_into, read_pretrained
from . import checkpoint, parallel, plots
from .checkpoint import Saver, Trained
from .config import FIXED, SIZES, TrainConfig
from .lock import require_unlocked, run_lock, wait_for_the_dead
from .metrics import Reporter, drop_after, peak_flops, read_metrics, require_packages
from .optimizer import AdamWEMA, averaged_copy
from .signals import leave_to_the_loop, stop_signals

BUILT_IN = ("digits", "synthetic")
MOST_TOKENS = 4096  # of the paper's models at 512 pixels: 1024


def train(config: TrainConfig) -> Path:
    """Trains a DiT as `config` says, and returns the run folder.

    The folder holds config.json, metrics.jsonl (one line every `log_every` steps), loss.png, samples/ (grids drawn from
    the averaged weights) and checkpoints/. The random state of the process is left as it was.

    In each of torchrun's processes this is called once; they are one run. After SIGTERM or SIGUSR1, to any of them, the
    run is saved and this returns; after Ctrl-C it is saved too, and KeyboardInterrupt is raised.

    Raises ValueError or TypeError naming what does not fit (a run that exists and is not to be resumed, a resumed run
    whose model, data or classes changed, data smaller than a batch), FileExistsError where another process trains in
    the folder, and FloatingPointError where too many steps in a row were not finite; the checkpoints that were written
    before stay.
    """
    device = choose_device(config.device)
    if started_by_torchrun() and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=config.collective_timeout)
    with world(device, timeout) as among, _restored_generators(device):
        return Trainer(config, device, among).run()


@contextmanager
def _restored_generators(device: torch.device) -> Iterator[None]:
    """Leaves the global random generators as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


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
    """A run: what `train` needs at hand. Made once; `run()` goes through the steps.

    Other data or another model than `config` names can be given: `dataset`, like what `fastdit.data.open_data` gives,
    and `model`, a DiT that fits it. Who writes a loop of his own finds its parts in `AdamWEMA` and `averaged_copy`.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        among: World | None = None,
        *,
        model: DiT | None = None,
        dataset: Any = None,
    ) -> None:
        self.config, self.device = config, device
        self.world = World() if among is None else among
        self.folder = Path(config.out)
        self.found, self.previous = self._together(lambda: _open_run(config), decided_by_first=True)
        share = config.batch_size // self.world.size
        if config.batch_size % self.world.size or share % config.accumulate:
            raise ValueError(
                f"batch_size={config.batch_size}: must be divisible by the processes, {self.world.size}, times "
                f"accumulate={config.accumulate}"
            )
        self.part = slice(self.world.rank * share, (self.world.rank + 1) * share)

        # All global ones: data or a model that somebody gives may draw from them.
        torch.default_generator.manual_seed(config.seed)
        if device.type == "cuda":
            with torch.cuda.device(device):  # `torch.manual_seed` is for every GPU
                torch.cuda.manual_seed(config.seed)
        np.random.seed(config.seed % 2**32)
        random.seed(config.seed)
        classes = load_description(self.previous)["classes"] if self.previous else None
        self.dataset = self._opened(classes) if dataset is None else dataset
        self.vae = VAE(config.vae, device=device) if config.vae is not None else None
        # Made on the CPU, so that a seed gives the same weights on every device.
        self.model = _model(config, self.dataset, self.vae) if model is None else model
        self.diffusion_options: dict[str, Any] = {
            "noise_schedule": config.noise_schedule,
            "learn_sigma": config.learn_sigma,
        }
        self.diffusion = create_diffusion("", **self.diffusion_options)
        # Not the seed itself: the noise would repeat the numbers that the weights were drawn from.
        self.generator = torch.Generator(device).manual_seed(derived_seed(config.seed, 0))

        names = ("loss", "mse", "vb") if config.learn_sigma else ("loss", "mse")
        self.measured = (*names, "gradient_norm")
        # Of the steps since the last log line that were finite: the sums, and how many.
        self.sums = torch.zeros(len(self.measured) + 1, device=device)
        self.summed = 0
        self.step = 0
        self.seconds = 0.0
        self.since = 0.0  # where the clock stood when the current log interval began
        self.before = 0.0  # seconds of that interval which were spent before the run was stopped
        self.bad_in_a_row = 0
        self.stop_seen = False
        self.flags: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self.received: list[int] = []
        self._start_from_what_there_is()
        if self.step > config.steps:
            raise ValueError(
                f"steps={config.steps}: the run in {config.out} is at step {self.step}"
            )
        self.predict = self._compiled()
        self._settle()
        require_packages(config.tensorboard, config.wandb)
        # Of all processes alike: those of a sharded model draw together.
        self.pictures = self.world.from_first(not plots.missing_packages())
        timeout = timedelta(seconds=config.collective_timeout)
        self.saver = Saver(self.folder, self.world, config.keep_checkpoints, timeout)

    def _opened(self, classes: list[str] | None) -> Any:
        """The data. The first process opens it before the others, who then find its index of tar files."""
        config, found = self.config, None
        for turn in (True, False):
            if (self.world.rank == 0) is turn:
                found = self._together(lambda: _dataset(config, classes))
            else:
                self._together(lambda: None)
        return found

    def _start_from_what_there_is(self) -> None:
        """Weights, averages, moments and random state: new ones, those of a checkpoint, or the original's."""
        config, model = self.config, self.model
        if config.init_from is not None and self.previous is None:
            _initialise(model, config.init_from)
        decays = (config.ema_decay, *config.more_ema_decays)
        names = ["ema", *(f"ema-{decay}" for decay in config.more_ema_decays)]
        averages = {name: averaged_copy(model) for name in names}
        self.ema = averages["ema"]
        moments: dict[str, Tensor] | None = None
        # Whole models get their weights, then each process takes its shards.
        if self.previous is not None:
            checkpoint.load_models(self.previous, {"model": model, **averages})
        elif config.resume_from_original is not None:
            source = Path(config.resume_from_original)
            moments = checkpoint.load_original(source, model, list(averages.values()))
        model.train()
        model.y_embedder.eval()  # labels are dropped by the loop, for the whole batch
        model.recompute_blocks = config.recompute_blocks
        self.sharded = config.parallel == "fsdp" and self.world.size > 1
        for each in (model, *averages.values()):
            each.to(self.device)
        if self._compile() == "blocks":
            for block in model.blocks:
                block.compile()
        if self.sharded:
            for each in (model, *averages.values()):
                parallel.shard(each, self.device, bf16=config.precision == "bf16")
        self.optimizer = AdamWEMA(
            model,
            list(zip(averages.values(), decays, strict=True)),
            weight_decay=config.weight_decay,
        )
        self.trained = Trained(model, averages, self.optimizer, self.generator)
        if self.previous is not None:
            self._restore(self.previous)
        elif moments is not None:
            self.optimizer.load_state(moments)
            self.step = int(moments["step"])
            self._tell(
                f"Weights, averages and moments are those of {config.resume_from_original}, step {self.step:,}"
            )

    def run(self) -> Path:
        """Goes through the steps that are left, and returns the run folder."""
        config = self.config
        if self.step == config.steps:
            self._tell(
                f"{self.folder} is at step {self.step:,} of {config.steps:,}: nothing is left to do"
            )
            return self.folder
        with self._precision(), closing(self._batches()) as batches:
            # Read before anything is written, so that unusable data leaves no run behind.
            first = self._together(lambda: next(batches))
            self._run(itertools.chain([first], batches))
        if signal.SIGINT in self.received:
            raise KeyboardInterrupt
        return self.folder

    def _run(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        self._together(lambda: self.folder.mkdir(parents=True, exist_ok=True), only_first=True)
        with self._locked():
            self._begin()
            with self._reporter() as self.reporter, stop_signals() as self.received:
                try:
                    self._loop(batches)
                finally:
                    # An error of the loop is what is raised, not that a checkpoint was cut short by it.
                    self.saver.join()
                self._wait_for_checkpoint(last=True)

    def _loop(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        config = self.config
        self.since, self.before = time.perf_counter() - self.before, 0.0
        hidden = True if self.world.rank else None  # None: where stderr is no terminal
        with tqdm(initial=self.step, total=config.steps, unit="step", disable=hidden) as bar:
            while self.step < config.steps:
                self._update(*next(batches))
                self.step += 1
                stop = self._agreed_to_stop()
                if self._due(config.log_every):
                    self._log(bar)
                if self._due(config.checkpoint_every) or stop:
                    self._save()
                if self._due(config.sample_every):
                    self._draw_samples()
                if stop:
                    self._wait_for_checkpoint(last=True)
                    self._tell(f"stopped after step {self.step:,}, which is saved")
                    return
                if self._due(config.sample_every) or self._due(config.checkpoint_every):
                    self._draw_loss_curve()
                bar.update()

    # ------------------------------------------------------------------ a step

    def _batches(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """This process's part of (x0, labels) on the device, from the batch of the current step on, without end."""
        loader = DataLoader(
            self.dataset,
            batch_sampler=self._order(self.step),
            num_workers=_num_workers(self.config),
            pin_memory=self.device.type == "cuda",
            worker_init_fn=leave_to_the_loop,
            generator=torch.Generator(),  # else the loader would draw from the global one, once a start
        )
        loaded = iter(loader)
        checked = False
        try:
            for images, labels in loaded:
                x0 = self._x0(images.to(self.device, non_blocking=True))
                y = labels.to(self.device, non_blocking=True)
                if not checked:
                    self.model.check_values(x0, None, y)
                    checked = True
                yield x0, y
        finally:
            del loaded  # ends its processes now; the garbage collector would take seconds for it

    def _order(self, step: int, rank: int | None = None) -> EpochBatchSampler:
        return EpochBatchSampler(
            len(self.dataset),
            self.config.batch_size,
            seed=self.config.seed,
            start_step=step,
            rank=self.world.rank if rank is None else rank,
            size=self.world.size,
        )

    def _x0(self, items: Tensor) -> Tensor:
        """What is trained on: the items themselves, or latents drawn from the posterior of the VAE."""
        if self.vae is not None:
            moments, factor = self.vae.moments(items), self.vae.scaling_factor
        elif getattr(self.dataset, "moments", False):
            moments, factor = items.float(), self.dataset.vae["scaling_factor"]
        else:
            return items
        return sample_latents(moments, self._drawn(torch.randn, *_latent_shape(moments)), factor)

    def _drawn(self, draw: Callable[..., Tensor], *shape: int) -> Tensor:
        """This process's part of random numbers for the whole batch, which all processes draw alike."""
        size = (self.config.batch_size, *shape)
        return draw(size, generator=self.generator, device=self.device)[self.part]

    def _timesteps(self) -> Tensor:
        count = self.diffusion.num_timesteps
        if self.config.timestep_sampling == "uniform":
            whole = torch.randint(
                count, (self.config.batch_size,), generator=self.generator, device=self.device
            )
            return whole[self.part]
        return (self._drawn(torch.randn).sigmoid() * count).long().clamp(max=count - 1)

    def _dropped(self, y: Tensor) -> Tensor:
        """Labels, some of them replaced by the null label."""
        if self.model.null_label is None:
            return y
        drop = self._drawn(torch.rand) < self.config.class_dropout_prob
        return torch.where(drop, self.model.null_label, y)

    def _update(self, x0: Tensor, y: Tensor) -> None:
        """One update of the weights with this process's part of the batch."""
        t = self._timesteps()
        noise = self._drawn(torch.randn, *x0.shape[1:])
        y = self._dropped(y)
        parts = self.config.accumulate
        means: dict[str, Tensor] = {}
        for index, (x, ts, labels, eps) in enumerate(
            zip(*(each.chunk(parts) for each in (x0, t, y, noise)), strict=True)
        ):
            with self._without_reduction(index < parts - 1):
                terms = self.diffusion.training_losses(self._predict, x, ts, {"y": labels}, eps)
                (terms["loss"].mean() / parts).backward()
            for name, value in terms.items():
                means[name] = means.get(name, 0) + value.detach().mean() / parts
        norm = parallel.gradient_norm(self.model)
        losses, asked, broken = self._agree(
            torch.stack([means[name] for name in self.measured[:-1]])
        )
        values = torch.cat([losses, norm.reshape(1), torch.ones_like(norm.reshape(1))])
        finite = values.isfinite().all()
        clip = None
        if self.config.gradient_clip is not None:
            clip = (self.config.gradient_clip / (norm + 1e-6)).clamp(max=1)
        rate = learning_rate(self.config, self.step)
        self.optimizer.update(rate, clip=clip, found_inf=~finite)
        self.optimizer.zero_grad()
        self.sums += torch.where(finite, values, 0)
        self.summed += 1
        self._send_flags(torch.cat([torch.stack([~finite, asked > 0]), broken > 0]))

    def _predict(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with self._autocast():
            output: Tensor = self.predict(x, t, y)
        return output

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        )

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """TF32 in the products of float32, where it was asked for."""
        if self.config.precision != "tf32":
            yield
            return
        matmul: Any = torch.backends.cuda.matmul
        try:
            before, newer = torch.get_float32_matmul_precision(), False
            torch.set_float32_matmul_precision("high")
        except RuntimeError:  # it was set by the newer switch; torch refuses to mix the two
            before, newer = matmul.fp32_precision, True
            matmul.fp32_precision = "tf32"
        try:
            yield
        finally:
            if newer:
                matmul.fp32_precision = before
            else:
                torch.set_float32_matmul_precision(before)

    def _without_reduction(self, wanted: bool) -> Any:
        """Gradients are reduced among the processes once, after the last part of a batch."""
        if self.sharded:
            self.model.set_requires_gradient_sync(not wanted)  # type: ignore[operator]
            return nullcontext()
        return self.ddp.no_sync() if wanted and self.ddp is not None else nullcontext()

    def _agree(self, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean losses of all processes; how many were asked to stop; and by rank, whose losses are not finite."""
        size, rank = self.world.size, self.world.rank
        told = losses.new_zeros(len(losses) + 1 + size)
        told[: len(losses)] = losses / size
        told[len(losses)] = float(bool(self.received))
        told[len(losses) + 1 + rank] = (~losses.isfinite().all()).float()
        if size > 1:
            dist.all_reduce(told)
        return told[: len(losses)], told[len(losses)], told[len(losses) + 1 :]

    def _send_flags(self, flags: Tensor) -> None:
        """Starts the copy of a step's flags to the host, and reads those of the step before."""
        before, event = self.flags, None
        if flags.is_cuda:
            host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            host.copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(flags.device))
        else:
            host = flags
        self.flags = (self.step, host, event)
        if before is not None:
            self._read_flags(*before)

    def _read_flags(self, step: int, flags: Tensor, event: torch.cuda.Event | None) -> None:
        """Raises FloatingPointError after too many steps that were not finite: in all processes, after the same one."""
        if event is not None:
            event.synchronize()
        bad, stop, *broken = flags.tolist()
        self.stop_seen |= stop
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        if not bad:
            return
        ranks = [rank for rank, each in enumerate(broken) if each]
        what = f"the loss in rank {', '.join(map(str, ranks))}" if ranks else "the gradient"
        if self.world.rank == 0:
            parts = [self._order(step, rank) for rank in (ranks or range(self.world.size))]
            indices = [index for part in parts for index, _ in next(iter(part))]
            record = {"step": step + 1, "not_finite": what, "ranks": ranks, "images": indices}
            files.append_jsonl(self.folder / "not_finite.jsonl", record)
        if self.bad_in_a_row >= self.config.nonfinite_steps:
            raise FloatingPointError(
                f"step {step + 1}: {what} is not finite, in {self.bad_in_a_row} steps in a row, which changed nothing; "
                f"a lower lr={self.config.lr} or a gradient_clip may help, and not_finite.jsonl names the images. "
                f"Checkpoints are kept in {self.folder / 'checkpoints'}"
            )

    def _read_pending_flags(self) -> None:
        if self.flags is not None:
            before, self.flags = self.flags, None
            self._read_flags(*before)

    def _agreed_to_stop(self) -> bool:
        """Whether all processes stop after this step. One that stopped alone would leave the others waiting for it."""
        return bool(self.received) if self.world.size == 1 else self.stop_seen

    def _compile(self) -> str:
        automatic = "blocks" if self.device.type == "cuda" else "off"
        return automatic if self.config.compile == "auto" else self.config.compile

    def _compiled(self) -> Any:
        """What predicts. Compiled in a way that leaves the model itself, and the names of its weights, as they are."""
        self.ddp: nn.parallel.DistributedDataParallel | None = None
        predict: Any = self.model
        if self.world.size > 1 and not self.sharded:
            predict = self.ddp = parallel.replicate(self.model, self.device)
        return torch.compile(predict) if self._compile() == "whole" else predict

    def _settle(self) -> None:
        """DDP puts gradients into other buckets after its first step, and so sums them in another order: of a run that
        is resumed that step would differ. So there is one before, without a trace."""
        if self.ddp is None:
            return
        count = self.config.batch_size // self.world.size // self.config.accumulate
        height, width = self.model.input_size
        x = torch.zeros(count, self.model.in_channels, height, width, device=self.device)
        labels = torch.zeros(count, dtype=torch.int64, device=self.device)
        with torch.random.fork_rng([self.device] if x.is_cuda else []):
            self._predict(x, labels, labels).sum().backward()
        self.optimizer.zero_grad()

    # ------------------------------------------------------------------ between the steps

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def _tell(self, text: str) -> None:
        if self.world.rank == 0:
            print(text, flush=True)

    def _together(
        self, do: Callable[[], Any], *, only_first: bool = False, decided_by_first: bool = False
    ) -> Any:
        """What `do` gives; if it raises in one process, all raise. What looks at the disk the first does alone."""
        value, error = None, None
        if self.world.rank == 0 or not (only_first or decided_by_first):
            try:
                value = do()
            except Exception as problem:
                if self.world.size == 1:
                    raise
                error = problem
        self.world.raise_together(error)
        return self.world.from_first(value) if decided_by_first else value

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone in the folder, which is as it was found: another process may have gone on with the run meanwhile."""
        lock = run_lock(self.folder)
        self.require_held = self._together(lock.__enter__, only_first=True)
        try:
            self._together(self._require_unchanged, only_first=True)
            yield
        finally:
            if self.world.rank == 0:
                lock.__exit__(None, None, None)

    def _require_unchanged(self) -> None:
        if (found := checkpoints(self.folder)) != self.found:
            raise ValueError(
                f"out={self.config.out!r}: another process has trained in it meanwhile, and left {found[-1:]}"
            )

    @contextmanager
    def _reporter(self) -> Iterator[Reporter | None]:
        """Where metrics go; only the first process has one."""
        if self.world.rank:
            yield None
            return
        config = self.config
        with Reporter(
            self.folder, self.step, config.to_dict(), config.tensorboard, config.wandb
        ) as reporter:
            yield reporter

    def _log(self, bar: tqdm[Any]) -> None:
        *sums, finite = self.sums.tolist()
        self._read_pending_flags()
        means = {
            name: total / finite if finite else None
            for name, total in zip(self.measured, sums, strict=True)
        }
        now = time.perf_counter()
        elapsed, self.since = now - self.since, now
        self.seconds += elapsed
        speed = self.summed * self.config.batch_size / elapsed
        record = {
            "step": self.step,
            **means,
            "learning_rate": learning_rate(self.config, self.step - 1),
            "images_per_second": speed,
            "seconds_per_step": elapsed / self.summed,
            "seconds": self.seconds,
            "not_finite": round(self.summed - finite),
        }
        if self.device.type == "cuda":
            record["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        if self.peak is not None:
            record["mfu"] = speed / self.world.size * self.flops_per_image / self.peak
        self.sums.zero_()
        self.summed = 0
        if self.reporter is None:
            return
        with self._going_on("WRITTEN"):
            self.reporter.log(record)
        loss = "not finite" if means["loss"] is None else f"{means['loss']:.4f}"
        told = f"loss {loss}, {speed:,.0f} images/s"
        if bar.disable:
            print(f"step {self.step:,} of {self.config.steps:,}: {told}", flush=True)
        else:
            bar.set_postfix_str(told)

    @contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """For what is not training: the time in here does not count into images per second."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the steps that are not finished do count
        begun = time.perf_counter()
        yield
        self.since += time.perf_counter() - begun

    def _draw_samples(self) -> None:
        """samples/step-XXXXXXXX.png from the averaged weights, one column for each of the first ten classes."""
        if not self.pictures or (self.world.rank and not self.sharded):
            return
        with self._off_the_clock(), self._going_on("DRAWN"):
            columns = min(len(self.dataset.classes), 10)
            with self._autocast():
                images = sample(
                    self.ema,
                    list(range(columns)) * 4,
                    steps=self.config.sample_steps,
                    cfg_scale=1.0 if self.model.null_label is None else self.config.cfg_scale,
                    seed=self.config.seed,
                    progress=False,
                    **self.diffusion_options,
                )
            if self.world.rank:
                return
            if self.vae is not None:
                images = self.vae.decode(images)
            elif self.dataset.space == "latents":
                # No decoder at hand: three channels show whether there is structure.
                images = images[:, :3]
            path = self.folder / "samples" / f"step-{self.step:08d}.png"
            path.parent.mkdir(exist_ok=True)
            save_grid(to_uint8(images), path, columns=columns)

    @contextmanager
    def _going_on(self, done: str) -> Iterator[None]:
        """A picture that cannot be drawn, or a line of metrics that cannot be written, ends no run."""
        try:
            yield
        except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
            self._tell(f"NOT {done}, the run goes on: {error}")

    def _draw_loss_curve(self) -> None:
        if self.world.rank or not self.pictures:
            return
        records = read_metrics(self.folder / "metrics.jsonl")
        records = [record for record in records if record["loss"] is not None]
        if not records:
            return
        with self._off_the_clock(), self._going_on("DRAWN"):
            title = f"{_name(self.config)}, {_parameters(self.model)}"
            plots.draw_loss_curve(records, self.folder / "loss.png", title)

    def _save(self) -> None:
        """Copies what is to be kept, and has it written while the training goes on."""
        with self._off_the_clock():
            self._together(lambda: self.require_held(), only_first=True)
            self._wait_for_checkpoint()
            self._read_pending_flags()
            state = {
                "step": self.step,
                "images": len(self.dataset),
                "seconds": self.seconds,
                "learning_rate": learning_rate(self.config, self.step - 1),
                "sums_since_log": self.sums.tolist(),
                "steps_since_log": self.summed,
                "seconds_since_log": time.perf_counter() - self.since,
                "not_finite_in_a_row": self.bad_in_a_row,
                "torch": torch.__version__,
            }
            self.saver.save(self.trained, state, self._description())

    def _wait_for_checkpoint(self, *, last: bool = False) -> None:
        """Raises OSError where it could not be written, unless the run is to go on, and can."""
        try:
            self.saver.wait()
        except OSError as error:
            if last or self.config.on_save_error == "error":
                raise
            self._tell(f"NOT SAVED, the run goes on: {error}")

    # ------------------------------------------------------------------ beginning and resuming

    def _begin(self) -> None:
        """Says what is about to run, and prepares the run folder."""
        config, model = self.config, self.model
        height, width = model.input_size
        device = str(self.device)
        self.peak = None
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            device += f" ({name})"
            self.peak = peak_flops(name) if config.precision == "bf16" else None
        # A backward is two forwards; a multiply-add is two operations.
        self.flops_per_image = 6 * multiply_adds(model)
        if self.world.size > 1:
            device += f", {self.world.size} processes ({config.parallel})"
        classes = len(self.dataset.classes)
        self._tell(
            f"model   {_name(config)}, {_parameters(model)}, "
            f"{self.flops_per_image / 6e6:,.1f} million multiply-adds per image of "
            f"{model.in_channels}x{height}x{width}\n"
            f"data    {config.data}, {len(self.dataset):,} images in {classes:,} classes"
            f"{'' if config.vae is None else f', latents of {config.vae}'}\n"
            f"device  {device}, {config.precision}, compile {self._compile()}, attention in {self._attention()}\n"
            f"run     {self.folder}, step {self.step:,} of {config.steps:,}"
        )
        if (tokens := model.x_embedder.num_patches) > MOST_TOKENS:
            self._tell(
                f"NOTE    every image is {tokens:,} tokens, over which attention is slow: latents (--vae, or fastdit "
                "extract), a larger patch or a smaller image_size are what DiT is made for"
            )
        if not self.pictures:
            missing = " and ".join(plots.missing_packages())
            self._tell(f'No pictures are drawn: {missing} missing (pip install "fastdit[cli]")')
        self._together(self._prepare_folder, only_first=True)

    def _prepare_folder(self) -> None:
        # First: with it the folder is a run, to which one that is killed here can return.
        files.write_json(self.folder / "config.json", _stored(self.config))
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        checkpoint.make_way(self.folder, self.step)
        for name in ("metrics.jsonl", "not_finite.jsonl"):
            if name == "metrics.jsonl" or (self.folder / name).exists():
                drop_after(self.folder / name, self.step)

    def _attention(self) -> str:
        count = self.config.batch_size // self.world.size // self.config.accumulate
        with self._autocast():
            used = self.model.attention_in_use(count, training=True)
        return ", ".join(dict.fromkeys(used.values()))

    def _restore(self, path: Path) -> None:
        state = checkpoint.load_state(path)
        if state["images"] != len(self.dataset):
            raise ValueError(
                f"data={self.config.data!r}: has {len(self.dataset)} images, the run in {self.folder} was begun with "
                f"{state['images']}"
            )
        checkpoint.load_progress(path, self.trained, self.world)
        self.step, self.seconds = state["step"], state["seconds"]
        self.sums.copy_(torch.tensor(state["sums_since_log"]))
        self.summed = state["steps_since_log"]
        self.before = state["seconds_since_log"]
        self.bad_in_a_row = state["not_finite_in_a_row"]

    def _description(self) -> dict[str, Any]:
        space: dict[str, Any] = {
            "space": "pixels",
            "image_size": self.dataset.image_size,
            "channels": self.model.in_channels,
            "vae": None,
            "scaling_factor": None,
        }
        if self.vae is not None:
            known = {"vae": self.vae.name, "scaling_factor": self.vae.scaling_factor}
            space |= {"space": "latents", **known}
        elif self.dataset.space == "latents":
            vae = self.dataset.vae or {"name": None, "scaling_factor": 1.0}
            known = {"vae": vae["name"], "scaling_factor": vae["scaling_factor"]}
            space |= {"space": "latents", **known}
        return {
            "format": FORMAT,
            "model": self.model.config,
            "classes": self.dataset.classes,
            "diffusion": self.diffusion_options,
            "images": space,
        }


# ------------------------------------------------------------------ what a configuration stands for


def _num_workers(config: TrainConfig) -> int:
    if config.num_workers is None and config.data == "digits":
        return 0  # they are in memory
    return loading_processes(config.num_workers)


def _dataset(config: TrainConfig, classes: list[str] | None) -> Any:
    return open_data(
        config.data,
        image_size=config.image_size,
        horizontal_flip=config.horizontal_flip,
        seed=config.seed,
        on_bad_image=config.on_bad_image,
        classes=classes,
    )


def _latent_shape(moments: Tensor) -> tuple[int, int, int]:
    """Of one image's latents, whose mean and deviation lie one after the other."""
    *_, channels, height, width = moments.shape
    return channels // 2, height, width


def _model(config: TrainConfig, dataset: Any, vae: VAE | None) -> DiT:
    classes = len(dataset.classes)
    if config.num_classes is not None and config.num_classes < classes:
        raise ValueError(f"num_classes={config.num_classes}: the data has {classes} classes")
    if vae is not None and dataset.space == "latents":
        raise ValueError(f"vae={config.vae!r}: data={config.data!r} are latents already")
    factor = 1 if vae is None else vae.downsample_factor
    if dataset.image_size % factor:
        raise ValueError(
            f"image_size={dataset.image_size}: must be divisible by {factor}, which the VAE makes it smaller by"
        )
    stored = dataset.space == "latents"
    arguments: dict[str, Any] = {
        "input_size": dataset.latent_size if stored else dataset.image_size // factor,
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


def _open_run(config: TrainConfig) -> tuple[list[Path], Path | None]:
    """The checkpoints that `out` holds, and the one from which the run is resumed; None where it begins at step 0.

    Changes nothing.
    """
    folder = Path(config.out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={config.out!r}: expected a folder, this is a file")
    if config.auto_resume:
        wait_for_the_dead(folder)
    require_unlocked(folder)
    found = checkpoints(folder)
    exists = (folder / "config.json").exists()
    if config.auto_resume and not exists and not (folder / "checkpoints").exists():
        return found, None
    if not (config.resume or config.auto_resume):
        if exists or (folder / "checkpoints").exists():
            raise ValueError(
                f"out={config.out!r}: holds a run already; resume=True (--resume) continues it, another out begins a "
                "new one"
            )
        return found, None
    if not exists:
        raise ValueError(f"out={config.out!r}: no run to resume, expected {folder / 'config.json'}")
    _require_resumable(config, TrainConfig.from_json(folder / "config.json"))
    try:
        return found, checkpoint.newest_whole(folder)
    except FileNotFoundError:
        print(f"{folder} has no checkpoint yet: the run begins at step 0")
        return found, None


def _stored(config: TrainConfig) -> dict[str, Any]:
    """What config.json holds: valid in another working directory too."""
    record = config.to_dict() | {"resume": False, "auto_resume": False}
    if config.data not in BUILT_IN:
        record["data"] = str(Path(config.data).absolute())
    if config.vae is not None and Path(config.vae).is_dir():
        record["vae"] = str(Path(config.vae).absolute())
    return record


def _require_resumable(config: TrainConfig, stored: TrainConfig) -> None:
    """Raises ValueError where model or data changed, and prints what else did."""
    before, now = _stored(stored), _stored(config)
    fixed = set(FIXED)
    changed = {
        name: f"{before[name]!r} -> {value!r}"
        for name, value in now.items()
        if name not in ("out", "resume", "auto_resume") and before[name] != value
    }
    if {before["data"], now["data"]}.isdisjoint(BUILT_IN):
        fixed.discard(
            "data"
        )  # a folder may have moved; its classes and their number of images are compared
    wrong = [f"{name} {change}" for name, change in changed.items() if name in fixed]
    if wrong:
        raise ValueError(
            f"resume: {', '.join(wrong)}: model and data of the run in {config.out} cannot change; begin a new one, "
            "with init_from for its weights"
        )
    for name, change in changed.items():
        print(f"Changed since the run was begun: {name} {change}")
