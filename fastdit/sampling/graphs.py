"""CUDA graphs of a step: recorded once, replayed with the same memory.

A replay runs the recorded kernels on the recorded addresses with the recorded numbers, and no Python. So what changes
from step to step lies in static tensors (`engine.Buffers`), and whatever else a step depends on is part of the key of
its graph.
"""

from __future__ import annotations

import enum
import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..models.fusible import user_hooks

WARM_UPS = 3

# Held while a step is captured. To begin a capture waits for the whole device, which is not allowed while another
# thread captures; nor is what torch's allocator does when memory is short, so large work in a thread holds it, too.
CAPTURING = threading.RLock()

# What is compared by its value, or stands for itself.
PLAIN = (
    bool,
    int,
    float,
    str,
    type(None),
    enum.Enum,
    torch.dtype,
    torch.device,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    functools.partial,
)
# What every module has of torch: hooks, which are not replayable, and modules, which are walked through.
OF_TORCH = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers"}


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
        # Back to the caller's stream in any case: where a capture cannot be begun, or ended, torch stays on its own.
        callers = torch.cuda.stream(torch.cuda.current_stream(device))
        with CAPTURING, torch.cuda.device(device), callers:
            stream = _stream(device)
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
        with CAPTURING:
            self.graph.reset()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where all captures are made: libraries keep work space for every stream that they have seen."""
    return torch.cuda.Stream(device)


def reasons_not_replayable(model: torch.nn.Module) -> list[str]:
    """Why a step of `model` cannot be replayed; empty if it can."""
    reasons = []
    for name, module in model.named_modules():
        if user_hooks(module) or hasattr(module, "_hf_hook"):  # accelerate's, around `forward`
            reasons.append(f"{name or 'the model'} has hooks, which a replay would pass over")
            break
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not torch.Tensor:
            reasons.append(f"{name} is a {type(parameter.data).__name__}, whose memory moves")
            break
    return reasons


def contents(model: nn.Module) -> tuple[Any, ...]:
    """What a captured graph has of `model` for good: its modules, their plain attributes, and where its tensors lie.

    Another tuple means that a graph would compute something else, or read old memory. The values of tensors are not in
    it. It refers to modules weakly: it keeps no replaced one alive, and takes no new one for one that is gone.
    """
    return tuple(
        (
            name,
            weakref.ref(module),
            type(module),
            tuple(
                [
                    (attribute, _frozen(value))
                    for attribute, value in vars(module).items()
                    if attribute not in OF_TORCH
                ]
            ),
        )
        # Every place where a module is used, so that it is seen when two change places.
        for name, module in model.named_modules(remove_duplicate=False)
    )


def switches() -> tuple[Any, ...]:
    """What else torch decides by, for the process: precision of products, deterministic algorithms, kinds of SDPA."""
    matmul, sdp = torch.backends.cuda.matmul, torch.backends.cuda
    return (
        # `allow_tf32` and `get_float32_matmul_precision` set these too, and raise once these were set by name.
        matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
        sdp.flash_sdp_enabled(),
        sdp.mem_efficient_sdp_enabled(),
        sdp.cudnn_sdp_enabled(),
        sdp.math_sdp_enabled(),
    )


def _frozen(value: Any) -> Any:
    """`value` as something hashable: plain values, also in containers, the place of tensors, the class of others."""
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, Tensor):
        if value.layout is torch.strided and type(value.data) is Tensor:
            return value.data_ptr(), value.dtype, value.shape, value.stride()
        return type(value)
    if isinstance(value, dict):
        return tuple([(_frozen(key), _frozen(item)) for key, item in value.items()])
    if isinstance(value, (list, tuple)):
        return tuple([_frozen(item) for item in value])
    if isinstance(value, (set, frozenset)):
        return frozenset(map(_frozen, value))
    return type(value)
