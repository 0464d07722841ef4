"""`sample()`: images of a model, for labels, with classifier-free guidance."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..diffusion import GaussianDiffusion, create_diffusion
from ..models import DiT
from ..validation import nearest, require_choice

SAMPLERS = ("ddpm", "ddim")

Callback = Callable[[int, Tensor], None]


def sample(
    model: DiT,
    labels: Sequence[int] | Tensor,
    *,
    steps: int = 250,
    sampler: Literal["ddpm", "ddim"] = "ddpm",
    eta: float = 0.0,
    cfg_scale: float | Tensor = 1.5,
    cfg_channels: Literal[3, "all"] = 3,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
    callback: Callback | None = None,
    **diffusion_options: Any,
) -> Tensor:
    """Draws one image for each label, in the model's space (pixels or latents).

    Image i is in block i // batch_size, and block b draws all its noise from a generator of its own
    on the model's device, `block_generator(seed, b)`, always for a full block. So the noise of an
    image depends on the seed, its index, `batch_size` and the device, and not on how many images are
    drawn with it: a run that is started again gives the same images, and a longer one begins with
    them. On another device, or with another `batch_size`, a seed means other images.

    The model is used in eval mode and without gradients, on its own device, in its own dtype (or
    the one that autocast gives it); the state between the steps is float32 (float64 for a float64
    model). Afterwards every module's training flag is what it was. The guessed x_0 is not clipped.

    Args:
        model: a DiT; nothing else of it is used than `forward`, `forward_with_cfg`, `input_size`,
            `in_channels`, `num_classes`, `null_label` and `learn_sigma`.
        labels: N class numbers, 0 to num_classes - 1, or the model's null label.
        steps: denoising steps, 1 to 1000.
        sampler: `"ddpm"` visits timesteps that are spaced evenly from the first to the last (the
            respacing "250"), `"ddim"` every s-th (the respacing "ddim250"), for which a whole stride
            s must exist: see `fastdit.diffusion.space_timesteps`.
        eta: DDIM's share of noise, 0 (deterministic) to 1.
        cfg_scale: guidance uncond + cfg_scale (cond - uncond); any finite number, or a tensor (N,)
            with one for each image. Where it is 1 throughout, the unconditional half is not
            computed. From 1 to 0 the class counts less and less, below 0 images lead away from it.
        cfg_channels: 3 guides the first three channels, as the original does; `"all"` all of them.
        seed: whole number from 0 on.
        batch_size: images that are drawn together.
        progress: show a progress bar with images/s.
        callback: called with each block as soon as it is done: the index of its first image, and its
            images (n, C, H, W), which are a view of the result.
        diffusion_options: what `fastdit.create_diffusion` takes beside the respacing, as the model
            was trained with: `noise_schedule`, `predict_xstart`, `learn_sigma` (by default the
            model's) …

    Returns (N, C, H, W), float32 or float64, on the model's device: ordinary tensors that may take
    part in training.

    Raises ValueError or TypeError naming the argument, and FloatingPointError if an image is not
    finite (read once, at the end).

    Source: Peebles & Xie 2022, section 3.1; Ho & Salimans 2022 for the guidance.
    """
    y = _labels(labels, model)
    diffusion = _diffusion(model, steps, sampler, diffusion_options)
    _require_number("eta", eta)
    if not 0 <= eta <= (1 if sampler == "ddim" else 0):
        raise ValueError(f"eta={eta}: allowed are 0 to 1 with sampler='ddim', and 0 with 'ddpm'")
    scale = _cfg_scale(cfg_scale, model, len(y))
    require_choice("cfg_channels", cfg_channels, (3, "all"))
    seed = _whole_number("seed", seed, 0, 2**63 - 1)
    batch_size = _whole_number("batch_size", batch_size, 1, 2**31 - 1)

    device = next(model.parameters()).device
    shape = (model.in_channels, *model.input_size)
    # Ordinary tensors even where the caller is in inference mode.
    with torch.inference_mode(False), torch.no_grad(), _evaluating(model):
        images = torch.empty(len(y), *shape, device=device, dtype=_state_dtype(model))
        with _bar(len(y), diffusion.num_timesteps, progress) as bar:
            for start in range(0, len(y), batch_size):
                rows = slice(start, start + batch_size)
                block_scale = scale[rows].to(device) if isinstance(scale, Tensor) else scale
                images[rows] = _denoise(
                    diffusion,
                    _predict(model, y[rows].to(device), block_scale, cfg_channels),
                    shape=(batch_size, *shape),
                    count=len(y[rows]),
                    eta=eta if sampler == "ddim" else None,
                    generator=block_generator(seed, start // batch_size, device),
                    dtype=images.dtype,
                    bar=bar,
                )
                if callback is not None:
                    callback(start, images[rows])
    _require_finite(images)
    return images


def block_generator(seed: int, block: int, device: torch.device) -> torch.Generator:
    """The source of all noise of a block: seeded with 64 bits of NumPy's SeedSequence([seed, block]).

    The hash keeps the blocks of seed 0 apart from those of seed 1, which seed + block would not.
    """
    hashed = np.random.SeedSequence([seed, block]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(hashed[0]))


def _denoise(
    diffusion: GaussianDiffusion,
    predict: Callable[[Tensor, Tensor], Tensor],
    *,
    shape: tuple[int, ...],
    count: int,
    eta: float | None,
    generator: torch.Generator,
    dtype: torch.dtype,
    bar: tqdm[Any],
) -> Tensor:
    """The first `count` images of a block of `shape`; `eta` None stands for DDPM."""

    def noise() -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
        return drawn[:count]

    x = noise()
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((count,), i, device=x.device)
        if eta is None:
            out = diffusion.p_sample(predict, x, t, clip_denoised=False, step_noise=noise())
        else:
            out = diffusion.ddim_sample(
                predict, x, t, clip_denoised=False, eta=eta, step_noise=noise()
            )
        x = out["sample"]
        bar.update(count)
    return x


def _predict(
    model: DiT, y: Tensor, cfg_scale: float | Tensor, cfg_channels: Literal[3, "all"]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The guided model as a function of x and t: the posterior's arithmetic sees N images, only the
    model sees 2N.
    """
    dtype = _weights_dtype(model)
    if _is_one(cfg_scale):
        return lambda x, t: model(x.to(dtype), t, y)
    null_label = model.num_classes  # there is one, else the scale would be 1
    both = torch.cat([y, torch.full_like(y, null_label)])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        x = x.to(dtype)
        out = model.forward_with_cfg(
            torch.cat([x, x]), torch.cat([t, t]), both, cfg_scale, cfg_channels=cfg_channels
        )
        return out[: len(y)]

    return predict


def _is_one(cfg_scale: float | Tensor) -> bool:
    return bool((cfg_scale == 1).all()) if isinstance(cfg_scale, Tensor) else cfg_scale == 1


def _weights_dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _state_dtype(model: nn.Module) -> torch.dtype:
    return torch.promote_types(_weights_dtype(model), torch.float32)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; each module gets its own flag back, since some may have been frozen in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
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


def _require_finite(images: Tensor) -> None:
    broken = (~torch.isfinite(images)).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise FloatingPointError(
            f"sample: {len(broken)} of {len(images)} images hold NaN or Inf, the first is image "
            f"{broken[0]}; the weights or cfg_scale are the likely cause"
        )
