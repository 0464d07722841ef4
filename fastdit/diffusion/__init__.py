"""Gaussian diffusion: noise schedules, training losses and samplers.

The model arrives as a callable, `model(x, t, **model_kwargs)`. Training uses all timesteps,
`create_diffusion("").training_losses(...)`; sampling usually fewer,
`create_diffusion("250").p_sample_loop(...)`.
"""

from __future__ import annotations

from .gaussian_diffusion import GaussianDiffusion
from .schedules import Respacing, get_named_beta_schedule, space_timesteps

__all__ = ["GaussianDiffusion", "create_diffusion", "get_named_beta_schedule", "space_timesteps"]


def create_diffusion(
    timestep_respacing: Respacing,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    rescale_learned_sigmas: bool = False,
    diffusion_steps: int = 1000,
) -> GaussianDiffusion:
    """The diffusion process of DiT, with the original's arguments.

    Args:
        timestep_respacing: the timesteps that are used, see `space_timesteps`.
        noise_schedule: `"linear"` or `"squaredcos_cap_v2"`, see `get_named_beta_schedule`.
        use_kl: train on the variational bound alone, times the number of steps.
        sigma_small: without `learn_sigma`, the posterior's variance instead of beta.
        predict_xstart: the model predicts x_0 instead of the noise.
        learn_sigma: the model's second half of channels interpolates the variance.
        rescale_learned_sigmas: the bound's share of the loss is times (number of steps) / 1000.
        diffusion_steps: T, the number of steps of the whole process.

    Raises ValueError or TypeError naming the argument.
    """
    loss_type = "rescaled_kl" if use_kl else "rescaled_mse" if rescale_learned_sigmas else "mse"
    variance_type = (
        "learned_range" if learn_sigma else "fixed_small" if sigma_small else "fixed_large"
    )
    return GaussianDiffusion(
        get_named_beta_schedule(noise_schedule, diffusion_steps),
        use_timesteps=space_timesteps(diffusion_steps, timestep_respacing),
        mean_type="x_start" if predict_xstart else "epsilon",
        variance_type=variance_type,
        loss_type=loss_type,
    )
