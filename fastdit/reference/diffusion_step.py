"""One step of a sampler in plain torch, from the model's tokens to x_{t-1}: the specification.

A step table holds the coefficients of every step, so that one formula serves DDPM and DDIM, models that predict the
noise or x_0, and learned and fixed variances: `StepCoefficients` are its columns, `GaussianDiffusion.step_table` makes
it. Arithmetic is done in float32, or in float64 where an input has it.

Sources: Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Nichol & Dhariwal 2021 (Improved DDPM), Ho & Salimans 2022
(guidance).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .operations import unpatchify


class StepCoefficients(NamedTuple):
    """The columns of a step table, in their order; a row belongs to one t.

    x0_of_x, x0_of_output: the guessed x_0 is `x0_of_x x_t + x0_of_output output`. A model that predicts the noise has
        1 / sqrt(abar_t) and -sqrt(1 / abar_t - 1) (DDPM eq. 15), one that predicts x_0 has 0 and 1.
    mean_of_x0, mean_of_x: the mean of x_{t-1} is `mean_of_x0 x_0 + mean_of_x x_t` (DDPM eq. 7; DDIM eq. 12, its noise
        written as (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t)).
    noise: the factor of the noise, 0 at t = 0. It is sigma_t, or 1 where the variance is learned.
    low_log_variance, high_log_variance: only where the variance is learned: its logarithm runs between those of the
        posterior's variance and of beta_t (Improved DDPM eq. 15).
    """

    x0_of_x: Tensor
    x0_of_output: Tensor
    mean_of_x0: Tensor
    mean_of_x: Tensor
    noise: Tensor
    low_log_variance: Tensor | None = None
    high_log_variance: Tensor | None = None


def ddpm_step(
    tokens: Tensor,
    x: Tensor,
    noise: Tensor,
    table: Tensor,
    step: Tensor,
    *,
    patch_size: int,
    cfg_scale: float | Tensor | None = None,
    cfg_channels: int | Literal["all"] = 3,
    clip_denoised: bool = False,
) -> Tensor:
    """`x_{t-1} = mean + sigma_t noise` (DDPM algorithm 2), (N, C, H*P, W*P) in the dtype of `x`.

    A learned sigma_t² is `exp(f high + (1 - f) low)`, f = (v + 1) / 2, v the second half of the model's channels.
    """
    dtype = _arithmetic(tokens, x)
    x_t, noise = x.to(dtype), noise.to(dtype)
    output, v = _model_output(tokens.to(dtype), x_t, patch_size, cfg_scale, cfg_channels)
    k = _coefficients(table, step, dtype)
    mean = _mean(output, x_t, k, clip_denoised)
    sigma = k.noise
    if k.low_log_variance is not None and k.high_log_variance is not None:
        fraction = (v + 1) / 2
        log_variance = fraction * k.high_log_variance + (1 - fraction) * k.low_log_variance
        sigma = sigma * torch.exp(0.5 * log_variance)
    return (mean + sigma * noise).to(x.dtype)


def ddim_step(
    tokens: Tensor,
    x: Tensor,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    *,
    patch_size: int,
    cfg_scale: float | Tensor | None = None,
    cfg_channels: int | Literal["all"] = 3,
    clip_denoised: bool = False,
) -> Tensor:
    """`x_{t-1} = sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1} - sigma_t²) eps + sigma_t noise` (DDIM eq. 12).

    (N, C, H*P, W*P) in the dtype of `x`; eps is the noise that leads from x_0 to x_t. Noise None is none.
    """
    dtype = _arithmetic(tokens, x)
    x_t = x.to(dtype)
    output, _ = _model_output(tokens.to(dtype), x_t, patch_size, cfg_scale, cfg_channels)
    k = _coefficients(table, step, dtype)
    mean = _mean(output, x_t, k, clip_denoised)
    return (mean if noise is None else mean + k.noise * noise.to(dtype)).to(x.dtype)


def _arithmetic(tokens: Tensor, x: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(tokens.dtype, x.dtype), torch.float32)


def _coefficients(table: Tensor, step: Tensor, dtype: torch.dtype) -> StepCoefficients:
    """Row `step` of the table. An index from outside raises, also a negative one."""
    return StepCoefficients(*table.index_select(0, step.reshape(1))[0].to(dtype).unbind())


def _model_output(
    tokens: Tensor,
    x: Tensor,
    patch_size: int,
    cfg_scale: float | Tensor | None,
    cfg_channels: int | Literal["all"],
) -> tuple[Tensor, Tensor]:
    """What the model predicts, (N, C, H*P, W*P), guided, and v, or nothing where no variance is learned.

    Guidance is `uncond + cfg_scale (cond - uncond)` on the first `cfg_channels` channels; the others, and v, are those
    of the conditional half.
    """
    channels, grid = x.shape[1], (x.shape[2] // patch_size, x.shape[3] // patch_size)
    images = unpatchify(tokens, patch_size, tokens.shape[-1] // patch_size**2, grid)
    if cfg_scale is None:
        return images[:, :channels], images[:, channels:]
    conditional, unconditional = images.chunk(2)
    if isinstance(cfg_scale, Tensor):
        cfg_scale = cfg_scale.to(x.dtype).reshape(-1, 1, 1, 1)
    guided = channels if cfg_channels == "all" else min(cfg_channels, channels)
    cond, uncond = conditional[:, :guided], unconditional[:, :guided]
    output = uncond + cfg_scale * (cond - uncond)
    output = torch.cat([output, conditional[:, guided:channels]], dim=1)
    return output, conditional[:, channels:]


def _mean(output: Tensor, x: Tensor, k: StepCoefficients, clip_denoised: bool) -> Tensor:
    """The mean of x_{t-1}, at the guessed x_0, which `clip_denoised` clamps to [-1, 1]."""
    x0 = k.x0_of_x * x + k.x0_of_output * output
    if clip_denoised:
        x0 = x0.clamp(-1, 1)
    return k.mean_of_x0 * x0 + k.mean_of_x * x
