"""Models simple enough to know what a diffusion process must make of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def smooth_model(channels: int = 2) -> Callable[..., Tensor]:
    """A model whose output depends on x and t; `channels` times as many channels as x."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        time = (t.to(x.dtype) / 1000).view(-1, *(1,) * (x.ndim - 1))
        return torch.cat([0.8 * x * time, 0.5 * torch.sin(3 * x)][:channels], dim=1)

    return model


def unit_gaussian_model(alphas_cumprod: Tensor) -> Callable[..., Tensor]:
    """E[eps | x_t] = sqrt(1 - abar_t) x_t, which is the best guess where x_0 ~ N(0, I)."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        abar = alphas_cumprod[t].to(x.dtype).view(-1, *(1,) * (x.ndim - 1))
        return torch.sqrt(1 - abar) * x

    return model
