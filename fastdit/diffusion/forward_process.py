"""The forward process q: its variances, its coefficients on a device, its closed forms."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .inputs import check_timesteps, noise_like

# The attributes of ForwardProcess of which a step looks up the row t.
TABLES = (
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "alphas_cumprod_next",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "log_betas",
    "large_variance",
    "large_log_variance",
)

Array = npt.NDArray[np.float64]


class ForwardProcess:
    """q with the variances `betas`, restricted to `use_timesteps`.

    The restricted process has beta_i = 1 - abar_i / abar_{i-1}, so that its abar are those of the
    kept timesteps (Nichol & Dhariwal 2021, eq. 19).

    Args:
        betas: float64, shape (T,), each in (0, 1).
        use_timesteps: the kept timesteps; None keeps all.

    Attributes:
        num_timesteps, original_num_steps: steps of this process and of the one it was made from.
        timestep_map, use_timesteps: the original's index of each step, a list and a set of int.
        betas, and all of `TABLES`: float64 arrays of shape (num_timesteps,).

    Raises ValueError naming the argument.
    """

    def __init__(self, betas: Array, use_timesteps: Collection[int] | None = None) -> None:
        original = np.asarray(betas, dtype=np.float64)
        if original.ndim != 1 or not original.size or not np.all((original > 0) & (original < 1)):
            raise ValueError(f"betas: expected a non-empty vector of values in (0, 1), got {betas}")
        self.original_num_steps = len(original)
        self.use_timesteps = set(range(len(original)) if use_timesteps is None else use_timesteps)
        if not self.use_timesteps or not self.use_timesteps <= set(range(len(original))):
            raise ValueError(
                f"use_timesteps={use_timesteps}: expected one or more of 0 to {len(original) - 1}"
            )
        self.timestep_map = sorted(self.use_timesteps)
        self.num_timesteps = len(self.timestep_map)

        kept = np.cumprod(1.0 - original)[self.timestep_map]
        self._make_coefficients(1 - kept / np.append(1.0, kept[:-1]))
        self._device_tables: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    def _make_coefficients(self, betas: Array) -> None:
        alphas = 1.0 - betas
        abar = np.cumprod(alphas)
        abar_prev = np.append(1.0, abar[:-1])
        self.betas, self.log_betas = betas, np.log(betas)
        self.alphas_cumprod = abar
        self.alphas_cumprod_prev = abar_prev
        self.alphas_cumprod_next = np.append(abar[1:], 0.0)

        # q(x_t | x_0), DDPM eq. 4, and x_0 from x_t and the noise, which is the same turned round.
        self.sqrt_alphas_cumprod = np.sqrt(abar)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - abar)
        self.one_minus_alphas_cumprod = 1.0 - abar
        self.log_one_minus_alphas_cumprod = np.log(1.0 - abar)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / abar)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / abar - 1)

        # q(x_{t-1} | x_t, x_0), DDPM eq. 7.
        self.posterior_mean_coef1 = betas * np.sqrt(abar_prev) / (1.0 - abar)
        self.posterior_mean_coef2 = (1.0 - abar_prev) * np.sqrt(alphas) / (1.0 - abar)
        self.posterior_variance = betas * (1.0 - abar_prev) / (1.0 - abar)
        # At t = 0 the posterior's variance is 0 and has no logarithm; step 1 lends its own, and a
        # process of one step takes beta.
        first = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))

        # beta as the variance of p(x_{t-1} | x_t), DDPM section 3.2; at t = 0 as above.
        self.large_variance = np.append(first, betas[1:])
        self.large_log_variance = np.log(self.large_variance)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the device tables behind; they are made again where needed."""
        return {**self.__dict__, "_device_tables": {}}

    def tables(self, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The coefficients on a device: every name of `TABLES` -> (num_timesteps,) of `dtype`, and
        `"timestep_map"` -> int64. Rounded once from float64; the first call for a device copies,
        later ones return the same tensors, which must not be written to.
        """
        if (device, dtype) not in self._device_tables:
            # Tables made under inference_mode could not take part in training later.
            with torch.inference_mode(False):
                tables = {
                    name: torch.from_numpy(getattr(self, name)).to(dtype).to(device)
                    for name in TABLES
                }
                tables["timestep_map"] = torch.tensor(self.timestep_map, device=device)
            self._device_tables[device, dtype] = tables
        return self._device_tables[device, dtype]

    def _at(self, t: Tensor, x: Tensor, *names: str) -> list[Tensor]:
        """The rows t of the tables `names`, each (N, 1, …) for an `x` of shape (N, …)."""
        tables = self.tables(x.device, torch.promote_types(x.dtype, torch.float32))
        shape = (-1,) + (1,) * (x.ndim - 1)
        return [tables[name][t].view(shape) for name in names]

    def _original_timesteps(self, t: Tensor, x: Tensor) -> Tensor:
        return self.tables(x.device, torch.promote_types(x.dtype, torch.float32))["timestep_map"][t]

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I).

        DDPM eq. 4. `x_start` (N, …) floating, `t` (N,) int64; three tensors of x_start's shape.
        """
        check_timesteps("x_start", x_start, t, self.num_timesteps)
        scale, variance, log_variance = self._at(
            t,
            x_start,
            "sqrt_alphas_cumprod",
            "one_minus_alphas_cumprod",
            "log_one_minus_alphas_cumprod",
        )
        return scale * x_start, variance.expand_as(x_start), log_variance.expand_as(x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """A draw from q(x_t | x_0): sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDPM eq. 4).

        `x_start` and `noise` (N, …) floating, `t` (N,) int64. Without `noise` it is drawn by
        `torch.randn_like(x_start)`. Returns x_start's shape and dtype.
        """
        check_timesteps("x_start", x_start, t, self.num_timesteps)
        noise = noise_like(x_start, "noise", noise)
        signal, spread = self._at(
            t, x_start, "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"
        )
        return (signal * x_start + spread * noise).to(x_start.dtype)

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), DDPM eq. 6 and 7:

        mean = sqrt(abar_{t-1}) beta_t / (1 - abar_t) x_0
        + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) x_t,
        variance = (1 - abar_{t-1}) / (1 - abar_t) beta_t. It is 0 at t = 0, where the log-variance
        is that of t = 1. `x_start` and `x_t` (N, …), `t` (N,); three tensors of that shape.
        """
        check_timesteps("x_t", x_t, t, self.num_timesteps)
        if x_start.shape != x_t.shape:
            raise ValueError(
                f"x_start has shape {tuple(x_start.shape)}, x_t {tuple(x_t.shape)}: must be equal"
            )
        coef1, coef2, variance, log_variance = self._at(
            t,
            x_t,
            "posterior_mean_coef1",
            "posterior_mean_coef2",
            "posterior_variance",
            "posterior_log_variance_clipped",
        )
        mean = coef1 * x_start + coef2 * x_t
        return mean, variance.expand_as(x_t), log_variance.expand_as(x_t)
