"""CUDA graphs of a step: recorded once, replayed with the same memory.

A replay runs the recorded kernels on the recorded addresses with the recorded numbers, and no Python. So what changes
from step to step lies in static tensors (`engine.Buffers`), and whatever else a step depends on is part of the key of
its graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..models.fusible import user_hooks

WARM_UPS = 3


class CudaGraph:
    """One function without arguments, captured.

    It is run some times before, each after `reset`, on a stream of its own: kernels are compiled there, and libraries
    make themselves ready. Raises what that raises; nothing is left of a capture that failed.
    """

    devices = ("cuda",)

    def __init__(
        self, function: Callable[[], None], reset: Callable[[], None], device: torch.device
    ) -> None:
        self.graph, self.device = torch.cuda.CUDAGraph(), device
        stream = torch.cuda.Stream(device)
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    reset()
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            # Other threads may go on using the device: loaders that pin memory, checkpoints under way.
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                function()

    def replay(self) -> None:
        with torch.cuda.device(self.device):
            self.graph.replay()

    def release(self) -> None:
        self.graph.reset()


def reasons_not_replayable(model: torch.nn.Module) -> list[str]:
    """Why a step of `model` cannot be replayed; empty if it can."""
    reasons = []
    for name, module in model.named_modules():
        if user_hooks(module):
            reasons.append(f"{name or 'the model'} has hooks, which a replay would pass over")
            break
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not torch.Tensor:
            reasons.append(f"{name} is a {type(parameter.data).__name__}, whose memory moves")
            break
    return reasons


def addresses(model: torch.nn.Module) -> tuple[Any, ...]:
    """Where the weights lie, and what they are: another tuple means that a captured graph would read old memory."""
    tensors = (*model.parameters(), *model.buffers())
    return tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors)
