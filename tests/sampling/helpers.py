"""A small model on either device, what it samples by single steps, and the graphs that a sampler keeps."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdit import DiT, Sampler
from fastdit.testing import assert_same_bits

STEPS = 9  # more than what is worth a recording


def make_model(device: str | torch.device = "cpu", seed: int = 0, **changes: Any) -> DiT:
    """In eval mode, all weights drawn; on a GPU as wide as heads have to be there, on the CPU no wider than needed."""
    torch.manual_seed(seed)
    on_cpu = torch.device(device).type == "cpu"
    width = {"input_size": 4, "hidden_size": 16} if on_cpu else {"input_size": 8, "hidden_size": 64}
    sizes = {**width, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = DiT(**{**sizes, **changes})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval().to(device)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def draw(sampler: Sampler, labels: Any, **options: Any) -> Any:
    return sampler(labels, **{"progress": False, **options})


def stepwise(model: DiT, labels: Any, **options: Any) -> Tensor:
    """The oracle: the same images without a graph."""
    own = {
        name: options.pop(name)
        for name in ("steps", "sampler", "eta", "cfg_channels", "guidance_interval")
        if name in options
    }
    single = Sampler(model, **{"steps": STEPS, **own}, cuda_graph=False)
    images: Tensor = draw(single, labels, **options)
    return images


def both(model: DiT, labels: list[int], sampler: Sampler | None = None, **options: Any) -> Tensor:
    """The images by a graph, after they were found to be those of single steps."""
    sampler = Sampler(model, steps=STEPS, cuda_graph=True) if sampler is None else sampler
    out: Tensor = draw(sampler, labels, **options)
    assert_same_bits("images", out, stepwise(model, labels, **options))
    return out


def graphs(sampler: Sampler) -> list[Any]:
    """What `sampler` keeps recorded, in the order in which it was."""
    return [
        graph
        for engine in sampler.engines.values()
        for _, recorded in engine.recorded.values()
        for graph in recorded.values()
    ]


def overlap(threads: Sequence[threading.Thread], within: threading.Event) -> None:
    """Runs two threads, of which the second starts when the first is `within` something."""
    threads[0].start()
    assert within.wait(600)
    threads[1].start()
    for thread in threads:
        thread.join()
