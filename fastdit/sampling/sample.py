"""`sample()`: images of a model, for labels, with classifier-free guidance."""

from __future__ import annotations

import inspect
import math
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..diffusion import GaussianDiffusion, create_diffusion
from ..models import DiT
from ..validation import nearest, require_choice
from .engine import Engine
from .noise import BlockNoise, Noise, SampleNoise, block_generator, sample_generator
from .samplers import SAMPLERS, make_steps

Callback = Callable[[int, Tensor], None]

# Eval mode belongs to a model, whoever draws from it: see `_turn`.
_turns: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_making_turns = threading.Lock()


def sample(
    model: DiT,
    labels: Sequence[int] | Tensor,
    *,
    steps: int = 250,
    sampler: Literal["ddpm", "ddim", "dpm++"] = "ddpm",
    eta: float = 0.0,
    cfg_scale: float | Tensor = 1.5,
    cfg_channels: Literal[3, "all"] = 3,
    guidance_interval: tuple[float, float] | None = None,
    seed: int | Sequence[int] | Tensor = 0,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    cuda_graph: Literal["auto"] | bool = "auto",
    progress: bool = True,
    callback: Callback | None = None,
    return_trajectory: bool = False,
    **diffusion_options: Any,
) -> Any:
    """Draws one image for each label, in the model's space (pixels or latents).

    Image i is in block i // batch_size, and block b draws all its noise from a generator of its own
    on the model's device, `block_generator(seed, b)`, always for a full block. So the noise of an
    image depends on the seed, its index, `batch_size` and the device, and not on how many images are
    drawn with it: a run that is started again gives the same images, and a longer one begins with
    them. On another device, or with another `batch_size`, a seed means other images. With a seed for
    each image its noise depends on that seed and the device alone.

    The model is used in eval mode and without gradients, on its own device, in its own dtype (or
    the one that autocast gives it); the state between the steps is float32 (float64 for a float64
    model). Afterwards every module's training flag is what it was. The guessed x_0 is not clipped.

    What depends on timestep and label alone is computed once for all images, and on CUDA a step is
    one graph, replayed: the same bits as without. `fastdit.Sampler` keeps its graphs for more calls.

    Args:
        model: a DiT; of anything else nothing is used than calls `model(x, t, y)`, `parameters()`,
            `input_size`, `in_channels`, `num_classes`, `null_label` and `learn_sigma`.
        labels: N class numbers, 0 to num_classes - 1, or the model's null label.
        steps: denoising steps, 1 to 1000.
        sampler: `"ddpm"` visits timesteps that are spaced evenly from the first to the last (the
            respacing "250"), `"ddim"` every s-th (the respacing "ddim250"), for which a whole stride
            s must exist: see `fastdit.diffusion.space_timesteps`. `"dpm++"` is DPM-Solver++(2M), of
            second order and without noise, on DDPM's timesteps: 20 to 50 steps do.
        eta: DDIM's share of noise, 0 (deterministic) to 1.
        cfg_scale: guidance uncond + cfg_scale (cond - uncond); any finite number, or a tensor (N,)
            with one for each image. Where it is 1 throughout, the unconditional half is not
            computed. From 1 to 0 the class counts less and less, below 0 images lead away from it.
        cfg_channels: 3 guides the first three channels, as the original does; `"all"` all of them.
        guidance_interval: (low, high), fractions of the schedule, 0 clean and 1 pure noise: steps
            whose timestep / (diffusion_steps - 1) lies outside are not guided, and cost half
            (Kynkäänniemi et al. 2024). None guides all.
        seed: whole number from 0 on, or N of them.
        generator: instead of a seed; draws x_T of a block, then the noise of each step that adds any.
        batch_size: images that are drawn together; None is 64, which with guidance and 256 tokens are 32,768 rows, or
            256 tiles of 128, in every product.
        cuda_graph: `"auto"` where it is possible and pays, True insists, False never.
        progress: show a progress bar with images/s.
        callback: called with each block as soon as it is done: the index of its first image, and its
            images (n, C, H, W), which are a view of the result.
        return_trajectory: also return the state before and after each step, (steps + 1, N, C, H, W)
            on the CPU.
        diffusion_options: what `fastdit.create_diffusion` takes beside the respacing, as the model
            was trained with: `noise_schedule`, `predict_xstart`, `learn_sigma` (by default the
            model's) …

    Returns (N, C, H, W), float32 or float64, on the model's device: ordinary tensors that may take
    part in training. With `return_trajectory` a pair of that and the trajectory.

    Raises ValueError or TypeError naming the argument, and FloatingPointError if an image is not
    finite (read once a block).

    Source: Peebles & Xie 2022, section 3.1; Ho & Salimans 2022 for the guidance.
    """
    once = Sampler(
        model,
        steps=steps,
        sampler=sampler,
        eta=eta,
        cfg_channels=cfg_channels,
        guidance_interval=guidance_interval,
        cuda_graph=cuda_graph,
        **diffusion_options,
    )
    try:
        return once(
            labels,
            cfg_scale=cfg_scale,
            seed=seed,
            generator=generator,
            batch_size=batch_size,
            progress=progress,
            callback=callback,
            return_trajectory=return_trajectory,
        )
    finally:
        once.release()


class Sampler:
    """`sample` for more than one call: what was recorded for one is replayed in the next.

    Arguments as those of `sample`. Weights may be changed between the calls, in place or by replacing them.
    `largest_number_of_graphs`: shapes of a block that are kept recorded; one more lets go of all.
    Threads that draw from one model take turns, a block each. A copy, by `copy` or `pickle`, has no recordings.
    """

    def __init__(
        self,
        model: DiT,
        *,
        steps: int = 250,
        sampler: Literal["ddpm", "ddim", "dpm++"] = "ddpm",
        eta: float = 0.0,
        cfg_channels: Literal[3, "all"] = 3,
        guidance_interval: tuple[float, float] | None = None,
        cuda_graph: Literal["auto"] | bool = "auto",
        largest_number_of_graphs: int = 4,
        **diffusion_options: Any,
    ) -> None:
        _require_model(model)
        diffusion = _diffusion(model, steps, sampler, diffusion_options)
        _require_number("eta", eta)
        if not 0 <= eta <= (1 if sampler == "ddim" else 0):
            raise ValueError(
                f"eta={eta}: allowed are 0 to 1 with sampler='ddim', and 0 with the others"
            )
        require_choice("cfg_channels", cfg_channels, (3, "all"))
        require_choice("cuda_graph", cuda_graph, ("auto", True, False))
        self.model, self.diffusion = model, diffusion
        self.engine_options: dict[str, Any] = {
            "cfg_channels": cfg_channels,
            "guided": _guided(guidance_interval, diffusion, diffusion_options),
            "cuda_graph": cuda_graph,
            "largest_number_of_graphs": _whole_number(
                "largest_number_of_graphs", largest_number_of_graphs, 1, 1000
            ),
        }
        self.kind, self.eta = sampler, eta
        self.engines: dict[tuple[torch.device, torch.dtype], Engine] = {}

    def release(self) -> None:
        """Gives back all recordings and their memory. The sampler can be used on."""
        with _turn(self.model):
            for engine in self.engines.values():
                engine.release()
            self.engines.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "engines": {}}

    def __call__(
        self,
        labels: Sequence[int] | Tensor,
        *,
        cfg_scale: float | Tensor = 1.5,
        seed: int | Sequence[int] | Tensor = 0,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        callback: Callback | None = None,
        return_trajectory: bool = False,
    ) -> Any:
        """Images (N, C, H, W) for N labels: arguments, result and errors as those of `sample`."""
        y = _labels(labels, self.model)
        shape = (self.model.in_channels, *self.model.input_size)
        device = next(self.model.parameters()).device
        with torch.inference_mode(False):
            images = torch.empty(len(y), *shape, device=device, dtype=_state_dtype(self.model))
        states: list[Tensor] = []
        for start, block in self.blocks(
            y,
            cfg_scale=cfg_scale,
            seed=seed,
            generator=generator,
            batch_size=batch_size,
            progress=progress,
            states=states if return_trajectory else None,
        ):
            images[start : start + len(block)] = block
            if callback is not None:
                callback(start, images[start : start + len(block)])
        if not return_trajectory:
            return images
        none = torch.empty(self.diffusion.num_timesteps + 1, 0, *shape, dtype=images.dtype)
        return images, torch.cat(states, dim=1) if states else none

    def blocks(
        self,
        labels: Sequence[int] | Tensor,
        *,
        cfg_scale: float | Tensor = 1.5,
        seed: int | Sequence[int] | Tensor = 0,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        only: Callable[[int], bool] | None = None,
        progress: bool = True,
        states: list[Tensor] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """The images of one block after the other: the index of its first, and (n, C, H, W).

        Those blocks for whose number `only` holds, when the first is drawn; they are what they are among all. `states`
        collects the trajectory of each, (steps + 1, n, C, H, W) on the CPU. Otherwise as a call, and checked at once.
        """
        y = _labels(labels, self.model)
        scale = _cfg_scale(cfg_scale, self.model, len(y))
        seeds = _seeds(seed, generator, next(self.model.parameters()).device, len(y))
        size = 64 if batch_size is None else _whole_number("batch_size", batch_size, 1, 2**31 - 1)
        return self._draw(y, scale, seeds, generator, size, only, progress, states)

    def _draw(
        self,
        y: Tensor,
        scale: float | Tensor,
        seeds: int | list[int],
        generator: torch.Generator | None,
        size: int,
        only: Callable[[int], bool] | None,
        progress: bool,
        states: list[Tensor] | None,
    ) -> Iterator[tuple[int, Tensor]]:
        model = self.model
        device = next(model.parameters()).device
        shape, dtype = (model.in_channels, *model.input_size), _state_dtype(model)
        every = range((len(y) + size - 1) // size)
        numbers = [number for number in every if only is None or only(number)]
        count = sum(len(y[number * size : (number + 1) * size]) for number in numbers)
        with _bar(count, self.diffusion.num_timesteps, progress) as bar:
            for number in numbers:
                rows = slice(number * size, min(len(y), (number + 1) * size))
                n = rows.stop - rows.start
                trajectory: list[Tensor] | None = None if states is None else []
                # Ordinary tensors even where the caller is in inference mode. Not around the loop: what is
                # drawn goes out between two blocks, and the caller's own modes hold there.
                with (
                    _turn(model),
                    torch.inference_mode(False),
                    torch.no_grad(),
                    _evaluating(model),
                ):
                    images = self._engine(device, dtype).block(
                        y[rows].to(device),
                        _block_scale(scale, rows, device, dtype),
                        _noise(seeds, generator, rows.start, size, n, shape, device, dtype),
                        dtype,
                        bar,
                        trajectory,
                    )
                    _require_finite(images, rows.start)
                    if states is not None and trajectory is not None:
                        states.append(torch.stack(trajectory).cpu())
                yield rows.start, images

    def _engine(self, device: torch.device, dtype: torch.dtype) -> Engine:
        if (device, dtype) not in self.engines:
            steps = make_steps(self.diffusion, self.kind, self.eta, device, dtype)
            self.engines[device, dtype] = Engine(self.model, steps, **self.engine_options)
        return self.engines[device, dtype]


def _noise(
    seeds: int | list[int],
    generator: torch.Generator | None,
    start: int,
    batch_size: int,
    count: int,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Noise:
    if generator is not None:
        return BlockNoise(generator, (count, *shape), count, dtype)
    if isinstance(seeds, list):
        own = [sample_generator(each, device) for each in seeds[start : start + count]]
        return SampleNoise(own, shape, dtype)
    block = block_generator(seeds, start // batch_size, device)
    return BlockNoise(block, (batch_size, *shape), count, dtype)


def _block_scale(
    scale: float | Tensor, rows: slice, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """The scales of a block (n,), or None where there is no guidance at all."""
    if _is_one(scale):
        return None
    if isinstance(scale, Tensor):
        return scale[rows].to(device, dtype)
    return torch.full((rows.stop - rows.start,), scale, device=device, dtype=dtype)


def _is_one(cfg_scale: float | Tensor) -> bool:
    return bool((cfg_scale == 1).all()) if isinstance(cfg_scale, Tensor) else cfg_scale == 1


def _weights_dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _state_dtype(model: nn.Module) -> torch.dtype:
    return torch.promote_types(_weights_dtype(model), torch.float32)


def _turn(model: nn.Module) -> threading.RLock:
    """The lock of `model`: its mode, and the static memory of its samplers, serve one block at a time."""
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps the same modules once more
    with _making_turns:
        return _turns.setdefault(model, threading.RLock())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; each module gets its own flag back, since some may have been frozen in eval mode."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _bar(images: int, steps: int, progress: bool) -> tqdm[Any]:
    """A progress bar that counts one for each image and step, and shows images."""
    return tqdm(
        total=images * steps,
        disable=None if progress else True,  # None: where stderr is a terminal
        desc="sampling",
        unit=" images",
        unit_scale=1 / steps,
        mininterval=0.5,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} "
        "[{elapsed}<{remaining}, {rate_noinv_fmt}]",
    )


# ------------------------------------------------------------------ checks, once at the entry


def _require_model(model: Any) -> None:
    for name in ("in_channels", "input_size", "num_classes", "null_label", "learn_sigma"):
        if not hasattr(model, name):
            inner = "; pass model.module" if isinstance(getattr(model, "module", None), DiT) else ""
            raise TypeError(f"model: a {type(model).__name__} has no {name}{inner}")


def _labels(labels: Sequence[int] | Tensor, model: DiT) -> Tensor:
    """`labels` as an int64 tensor (N,) on the CPU, every value one that the model knows."""
    try:
        y = torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"labels: expected N class numbers, got {labels!r} ({error})") from None
    if y.numel() == 0 and not isinstance(labels, Tensor):
        y = y.long()
    if y.dtype.is_floating_point or y.dtype.is_complex or y.dtype == torch.bool:
        raise TypeError(f"labels: expected whole numbers, got dtype {y.dtype}")
    if y.ndim != 1:
        hint = "; for one-hot labels use argmax" if y.ndim == 2 and y.shape[1] > 1 else ""
        raise ValueError(f"labels: expected shape (N,), got {tuple(y.shape)}{hint}")
    y = y.long()

    wrong = (y < 0) | (y >= model.num_classes)
    if model.null_label is not None:
        wrong &= y != model.null_label
    if wrong.any():
        first = int(wrong.nonzero()[0])
        null = (
            "this model has no null class"
            if model.null_label is None
            else f"the null class is model.null_label={model.null_label}"
        )
        raise ValueError(
            f"labels[{first}]={int(y[first])}: allowed are 0 to {model.num_classes - 1}; {null}"
        )
    return y


def _diffusion(model: DiT, steps: int, sampler: str, options: dict[str, Any]) -> GaussianDiffusion:
    known = list(inspect.signature(create_diffusion).parameters)[1:]
    for name in options:
        if name not in known:
            own = [*inspect.signature(sample).parameters, *known]
            raise TypeError(f"{name}: sample() has no such argument{nearest(name, own)}")
    require_choice("sampler", sampler, SAMPLERS)
    options = {"learn_sigma": model.learn_sigma} | options
    if options["learn_sigma"] != model.learn_sigma:
        raise ValueError(
            f"learn_sigma={options['learn_sigma']}: the model has learn_sigma={model.learn_sigma}"
        )
    steps = _whole_number("steps", steps, 1, options.get("diffusion_steps", 1000))
    respacing = f"ddim{steps}" if sampler == "ddim" else str(steps)
    try:
        return create_diffusion(respacing, **options)
    except ValueError as error:
        if "timestep_respacing" not in str(error):
            raise
        raise ValueError(f"steps={steps} with sampler={sampler!r}: {error}") from None


def _cfg_scale(cfg_scale: float | Tensor, model: DiT, count: int) -> float | Tensor:
    """`cfg_scale` as a float or as a tensor (N,), checked."""
    if isinstance(cfg_scale, Tensor) and cfg_scale.ndim > 0:
        if cfg_scale.shape != (count,):
            raise ValueError(
                f"cfg_scale: expected a number or shape ({count},), one for each label, got shape "
                f"{tuple(cfg_scale.shape)}"
            )
        if not bool(torch.isfinite(cfg_scale).all()):
            raise ValueError(f"cfg_scale={cfg_scale}: allowed are finite numbers")
        scale: float | Tensor = cfg_scale.detach()
    else:
        number = cfg_scale.item() if isinstance(cfg_scale, Tensor) else cfg_scale
        scale = _require_number("cfg_scale", number)
    if model.null_label is None and not _is_one(scale):
        raise ValueError(
            f"cfg_scale={cfg_scale}: this model has no null class (class_dropout_prob=0), so that "
            "guidance is not possible; allowed is 1"
        )
    return scale


def _guided(
    interval: tuple[float, float] | None, diffusion: GaussianDiffusion, options: dict[str, Any]
) -> list[bool]:
    """Of every step, whether it lies in the interval of guidance."""
    if interval is None:
        return [True] * diffusion.num_timesteps
    pair = list(interval) if isinstance(interval, (tuple, list)) else []
    if len(pair) != 2:
        raise TypeError(f"guidance_interval={interval!r}: expected (low, high) or None")
    low, high = (_require_number("guidance_interval", each) for each in pair)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance_interval={interval!r}: allowed is 0 <= low <= high <= 1")
    last = max(1, options.get("diffusion_steps", 1000) - 1)
    return [low <= t / last <= high for t in diffusion.timestep_map]


def _seeds(
    seed: int | Sequence[int] | Tensor,
    generator: torch.Generator | None,
    device: torch.device,
    count: int,
) -> int | list[int]:
    """`seed` as one number or as a list of one for each image, checked."""
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator={generator!r}: expected a torch.Generator")
        if generator.device != device:
            raise ValueError(f"generator: is on {generator.device}, the model on {device}")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed != 0:
            raise ValueError(f"seed={seed!r} and a generator: allowed is one of the two")
        return 0
    if isinstance(seed, Tensor) and seed.ndim == 1:
        seed = seed.tolist()
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != count:
            raise ValueError(
                f"seed: {len(seed)} for {count} labels: allowed is one, or one for each"
            )
        return [_whole_number("seed", each, 0, 2**63 - 1) for each in seed]
    return _whole_number("seed", seed, 0, 2**63 - 1)


def _require_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name}={value!r}: expected a number")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value}: allowed are finite numbers")
    return float(value)


def _whole_number(name: str, value: Any, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r}: expected a whole number") from None
    if isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: expected a whole number")
    if not low <= number <= high:
        raise ValueError(f"{name}={number}: allowed are {low} to {high}")
    return number


def _require_finite(images: Tensor, start: int) -> None:
    broken = (~torch.isfinite(images)).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise FloatingPointError(
            f"sample: {len(broken)} of {len(images)} images hold NaN or Inf, the first is image "
            f"{start + broken[0]}; the weights or cfg_scale are the likely cause"
        )
