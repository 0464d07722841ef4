"""Training: `train(TrainConfig(data="digits", …))` fills a run folder and returns it."""

from __future__ import annotations

from .config import TrainConfig
from .ema import EMA
from .loop import train

__all__ = ["EMA", "TrainConfig", "train"]
