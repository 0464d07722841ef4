"""Training: `train(TrainConfig(data="digits", …))` fills a run folder and returns it."""

from __future__ import annotations

from .config import TrainConfig
from .loop import Trainer, train
from .optimizer import AdamWEMA, averaged_copy

__all__ = ["AdamWEMA", "TrainConfig", "Trainer", "averaged_copy", "train"]
