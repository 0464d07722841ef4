"""Tiny models whose every parameter shows in the output, and the comparison with the reference."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import fastdit
from fastdit import reference
from fastdit.models import Conditioning
from fastdit.testing import assert_gradient_close, assert_model_close

CONDITIONINGS = get_args(Conditioning)
each_conditioning = pytest.mark.parametrize("conditioning", CONDITIONINGS)

TINY: dict[str, Any] = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 48,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 10,
}


def redraw(model: nn.Module, seed: int = 0) -> None:
    """Draws every parameter anew, because a fresh model's zero gates and zero final layer hide all that is before.

    Matrices keep the scale of what passes through them (std 1 / sqrt(inputs)), vectors have std 0.1.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name == "pos_embed":
            continue
        inputs = math.prod(parameter.shape[1:])
        std = inputs**-0.5 if parameter.dim() > 1 else 0.1
        drawn = torch.randn(parameter.shape, generator=generator) * std
        if "norm" in name and name.endswith("weight"):
            drawn += 1
        parameter.data.copy_(drawn)


def make_model(conditioning: str = "adaln_zero", **arguments: Any) -> fastdit.DiT:
    """A tiny model in eval mode; arguments replace those of `TINY`."""
    model = fastdit.DiT(**{**TINY, "conditioning": conditioning, **arguments})
    redraw(model)
    return model.eval()


def make_inputs(
    model: fastdit.DiT, n: int = 3, dtype: torch.dtype = torch.float32, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and y of a batch of n; where there is one, the null label is among the labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, model.in_channels, *model.input_size, generator=generator).to(dtype)
    t = torch.tensor([0, 999, 257, 500])[torch.arange(n) % 4]
    labels = model.num_classes + (model.null_label is not None)
    return x, t, (labels - 1 - torch.arange(n)) % labels


def twin(model: fastdit.DiT, dtype: torch.dtype) -> reference.DiT:
    """The reference in `dtype` with the weights of `model`."""
    other = reference.DiT(**model.config).to(dtype)
    other.load_state_dict({name: value.to(dtype) for name, value in model.state_dict().items()})
    return other.train(model.training)


def output_and_gradients(
    model: nn.Module, x: Tensor, t: Tensor, y: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of a weighted sum of it by x and by all trained parameters."""
    x = x.detach().clone().requires_grad_()
    for parameter in model.parameters():
        parameter.grad = None
    out = model(x, t, y)
    generator = torch.Generator().manual_seed(2)
    weighting = torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype)
    (out * weighting).sum().backward()
    gradients = {"x": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            gradients[name] = parameter.grad
    return out.detach(), gradients


def assert_matches_reference(model: fastdit.DiT, x: Tensor, t: Tensor, y: Tensor) -> None:
    """The output by N8 and all gradients by N3, against the reference in float64 and in the model's dtype."""
    out, gradients = output_and_gradients(model, x, t, y)
    plain, plain_gradients = output_and_gradients(twin(model, x.dtype), x, t, y)
    exact, exact_gradients = output_and_gradients(twin(model, torch.float64), x.double(), t, y)
    assert gradients.keys() == exact_gradients.keys()
    assert_model_close("output", out, exact, plain)
    tokens = len(x) * model.x_embedder.num_patches
    for name, gradient in gradients.items():
        assert_gradient_close(
            f"gradient of {name}",
            gradient,
            exact_gradients[name],
            plain_gradients[name],
            summed=0 if name == "x" else tokens,
        )


def assert_same_call(model: nn.Module, other: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> None:
    """The same bits from both models: output and gradients (by position, since wrappers rename parameters)."""
    out, gradients = output_and_gradients(model, x, t, y)
    expected, expected_gradients = output_and_gradients(other, x, t, y)
    assert torch.equal(out, expected)
    assert len(gradients) == len(expected_gradients)
    for (name, gradient), wanted in zip(
        gradients.items(), expected_gradients.values(), strict=True
    ):
        assert torch.equal(gradient, wanted), name
