"""What a step and a sampling run are given: checked, or drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..validation import checks_values, require_floating, require_same_device


def check_timesteps(name: str, x: Tensor, t: Tensor, num_timesteps: int) -> None:
    """Raises TypeError or ValueError unless `x` is floating (N, C, …) and `t` int64 (N,) in range.

    The range is read where that costs no synchronisation, and elsewhere under `validate("full")`.
    """
    require_floating(name, x)
    if not isinstance(t, Tensor) or t.dtype not in (torch.int64, torch.int32):
        found = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"t: expected an int64 tensor of step numbers, got {found}")
    if x.ndim < 2 or t.shape != x.shape[:1]:
        raise ValueError(
            f"t has shape {tuple(t.shape)} and {name} {tuple(x.shape)}: allowed are (N,) and "
            "(N, C, …)"
        )
    require_same_device(**{name: x, "t": t})
    on_cpu = t.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu or checks_values(t):
        for i, step in enumerate(t.tolist()):
            if not 0 <= step < num_timesteps:
                raise ValueError(f"t[{i}]={step}: allowed are 0 to {num_timesteps - 1}")


def require_like(name: str, value: Tensor, shape: Sequence[int], x: Tensor) -> None:
    """Raises TypeError or ValueError unless `value` is floating, of `shape`, and where `x` is."""
    require_floating(name, value)
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}: allowed is {tuple(shape)}")
    require_same_device(**{name: value, "x": x})


def noise_like(
    x: Tensor, name: str, given: Tensor | None, generator: torch.Generator | None = None
) -> Tensor:
    """`given`, checked, or noise of x's shape, dtype and device."""
    if given is not None:
        require_like(name, given, x.shape, x)
        return given
    if generator is None:
        return torch.randn_like(x)
    _check_generator(generator, x.device)
    return torch.empty_like(x).normal_(generator=generator)


def start_noise(
    model: Callable[..., Any],
    shape: Sequence[int],
    noise: Tensor | None,
    device: torch.device | str | None,
    generator: torch.Generator | None,
) -> Tensor:
    """x_T: `noise`, checked, or drawn on `device`, by default the model's."""
    if noise is not None:
        require_like("noise", noise, shape, noise)
        asked = noise.device if device is None else torch.device(device)
        indices = {asked.index, noise.device.index} - {
            None
        }  # "cuda" is any of them, "cpu" is "cpu:0"
        if asked.type != noise.device.type or len(indices) > 1:
            raise ValueError(f"device={device}, but noise is on {noise.device}: must be the same")
        return noise
    device = _model_device(model) if device is None else torch.device(device)
    if generator is not None:
        _check_generator(generator, device)
    return torch.randn(tuple(shape), device=device, generator=generator)


def _check_generator(generator: torch.Generator, device: torch.device) -> None:
    if not isinstance(generator, torch.Generator):
        found = type(generator).__name__
        raise TypeError(f"generator: expected a torch.Generator or None, got {found}")
    if generator.device.type != device.type:
        raise ValueError(f"generator is on {generator.device}, x on {device}: must be the same")


def _model_device(model: Callable[..., Any]) -> torch.device:
    """Where the parameters are, of a module or of the module whose method `model` is."""
    module = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    parameter = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    if parameter is None:
        raise ValueError("device=None: the model has no parameters to take it from; give device=")
    return parameter.device
