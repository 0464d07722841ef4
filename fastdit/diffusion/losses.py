"""The likelihoods that the variational bound is made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mean_flat(x: Tensor) -> Tensor:
    """The mean over everything but the batch: (N, …) -> (N,)."""
    return x.flatten(1).mean(1)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) in nats, elementwise.

    1/2 (log var2 - log var1 + var1/var2 + (mean1 - mean2)²/var2 - 1)
    """
    return 0.5 * (
        -1.0
        + log_variance2
        - log_variance1
        + torch.exp(log_variance1 - log_variance2)
        + (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    )


def _normal_cdf(x: Tensor) -> Tensor:
    """Phi(x), by 1/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x³))), which is off by less than 2e-4."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """log p of `x` in nats, elementwise, with p the Gaussian's mass in one of 256 bins of [-1, 1].

    A bin reaches 1/255 to each side; the first and the last reach to infinity (Ho et al. 2020,
    eq. 13). Latents are treated the same way, although they are not 8-bit pixels.
    """
    inverse_scale = torch.exp(-log_scales)
    upper = _normal_cdf(inverse_scale * (x - means + 1.0 / 255.0))
    lower = _normal_cdf(inverse_scale * (x - means - 1.0 / 255.0))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1.0 - lower, upper - lower))
    return torch.log(mass.clamp(min=1e-12))
