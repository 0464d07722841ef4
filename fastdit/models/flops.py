"""How much arithmetic a model needs."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from .dit import DiT


def multiply_adds(model: DiT) -> int:
    """Multiply-adds of the matrix products and attention of one forward pass of one image.

    The paper's "Gflops" are billions of these; FLOPs are twice as many, and a training step is three times a forward.
    Counted on a model of the same shape on the `meta` device, so nothing is computed.
    """
    with torch.device("meta"), torch.no_grad():
        twin = DiT(**model.config).eval()
        x = torch.empty(1, model.in_channels, *model.input_size)
        labels = torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            twin(x, labels, labels)
    return counter.get_total_flops() // 2
