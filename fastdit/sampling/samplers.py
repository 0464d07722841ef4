"""Samplers: how x_{t-1} is made of x_t and what the model says, as a table on the device and one update.

A sampler is a few numbers a step and one formula. Nothing here reads a number back from the device or bakes one into a
step, so that a CUDA graph of one step runs them all. `update` takes the model's tokens and gives the next state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..diffusion import GaussianDiffusion
from ..validation import require_choice

SAMPLERS = ("ddpm", "ddim", "dpm++")

# tokens, x, noise or None, memory or None, step (1,) -> x_{t-1}; what is given as keywords is guidance and patch_size.
Update = Callable[..., Tensor]


@dataclass(frozen=True)
class Steps:
    """A sampler on a device.

    timesteps: (steps,) int64, what the model is given at step i; steps run from the last to 0.
    update: see `Update`; it may write to `memory`.
    noise: whether it adds noise.
    memory: whether it needs a tensor like x, which it keeps from step to step.
    """

    timesteps: Tensor
    update: Update
    noise: bool
    memory: bool = False


def make_steps(
    diffusion: GaussianDiffusion, sampler: str, eta: float, device: torch.device, dtype: torch.dtype
) -> Steps:
    """`sampler` of `SAMPLERS` for the steps of `diffusion`; `dtype` is that of the table, float32 or float64."""
    require_choice("sampler", sampler, SAMPLERS)
    timesteps = torch.tensor(diffusion.timestep_map, device=device)
    if sampler == "dpm++":
        return _dpm_solver(diffusion, timesteps, device, dtype)
    table = diffusion.step_table(sampler, eta=eta, device=device, dtype=dtype)
    function = ops.ddpm_step if sampler == "ddpm" else ops.ddim_step
    adds_noise = sampler == "ddpm" or eta > 0

    def update(
        tokens: Tensor,
        x: Tensor,
        noise: Tensor | None,
        memory: Tensor | None,
        step: Tensor,
        **options: Any,
    ) -> Tensor:
        return function(tokens, x, noise, table, step, **options)  # type: ignore[arg-type]

    return Steps(timesteps, update, adds_noise)


def _dpm_solver(
    diffusion: GaussianDiffusion, timesteps: Tensor, device: torch.device, dtype: torch.dtype
) -> Steps:
    """DPM-Solver++(2M): the probability-flow ODE by a second-order multistep method in x_0, without noise.

    With alpha = sqrt(abar), sigma = sqrt(1 - abar), lambda = log(alpha / sigma), h = lambda_{t-1} - lambda_t, and
    r = (h of the step before) / h: D = (1 + 1 / (2r)) x_0 - x_0' / (2r), x_0' the guess of the step before, and
    x_{t-1} = sigma_{t-1} / sigma_t x_t + alpha_{t-1} (1 - exp(-h)) D. The first step, and the last, which ends at
    sigma = 0, are of first order, D = x_0.

    Source: Lu et al. 2022, "DPM-Solver++", algorithm 2.
    """
    # As `ddim_step` with this table, which is x_0 itself and nothing else.
    guess = diffusion.step_table("ddim", dtype=torch.float64)
    guess[:, 2:] = 0
    guess[:, 2] = 1
    guess = guess.to(device, dtype)

    tables = diffusion.tables(torch.device("cpu"), torch.float64)
    abar, abar_prev = tables["alphas_cumprod"], tables["alphas_cumprod_prev"]
    alpha, sigma = abar_prev.sqrt(), (1 - abar_prev).sqrt()
    decay = sigma / (1 - abar).sqrt()  # sigma_{t-1} / sigma_t
    log_snr = 0.5 * (abar.log() - torch.log1p(-abar))
    h = torch.full_like(log_snr, torch.inf)  # at t = 0
    h[1:] = log_snr[:-1] - log_snr[1:]
    gain = alpha * -torch.expm1(-h)
    half = torch.zeros_like(h)  # 1 / (2r); the step before t is t + 1
    if len(h) > 2:
        half[1:-1] = h[1:-1] / (2 * h[2:])
    coefficients = torch.stack([decay, gain * (1 + half), -gain * half], dim=1).to(device, dtype)

    def update(
        tokens: Tensor,
        x: Tensor,
        noise: Tensor | None,
        memory: Tensor | None,
        step: Tensor,
        **options: Any,
    ) -> Tensor:
        assert memory is not None
        x0 = ops.ddim_step(tokens, x, None, guess, step, **options)
        of_x, of_x0, of_memory = coefficients.index_select(0, step)[0].unbind()
        out = of_x * x + of_x0 * x0 + of_memory * memory
        memory.copy_(x0)
        return out

    return Steps(timesteps, update, noise=False, memory=True)
