"""The exponential moving average of the weights, which is what is sampled from."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..models import DiT


class EMA:
    """ema <- decay · ema + (1 - decay) · weight, after every update of the weights.

    `model` is a copy of the averaged model in evaluation mode, float32. Parameters that are not trained (`pos_embed`)
    are copied once and never averaged, so they stay equal to the last bit.

    The average is written down as ema + (1 - decay) · (weight - ema), in one pass over all parameters. It needs
    float32: at a decay of 0.9999 a bfloat16 average does not move at all.

    Source: Peebles & Xie 2023, section 4 (decay 0.9999).
    """

    def __init__(self, model: DiT, decay: float) -> None:
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        self.decay = decay
        trained = [
            (average, weight)
            for average, weight in zip(self.model.parameters(), model.parameters(), strict=True)
            if weight.requires_grad
        ]
        self._averages: list[Tensor] = [average for average, _ in trained]
        self._weights: list[Tensor] = [weight for _, weight in trained]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)
