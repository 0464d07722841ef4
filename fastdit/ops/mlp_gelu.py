"""The two-layer perceptron of a block: `gelu(x w1^T + b1) w2^T + b2` with the tanh form of GELU.

x (..., D), w1 (F, D), b1 (F,), w2 (D, F), b2 (D,), all in one dtype (under autocast: cast to autocast's), out (..., D).
The backward needs x and the pre-activation only; the activation is computed again.

Source: Vaswani et al. 2017, section 3.3; Hendrycks & Gimpel 2016 (GELU).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import operations as reference
from ..validation import autocast_enabled, require_floating, require_same_device
from .operation import Operation


def _fake(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-1], w1.shape[0])


def _backward_fake(
    dout: Tensor, x: Tensor, w1: Tensor, w2: Tensor, pre_activation: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    f, d = w1.shape
    return (
        x.new_empty(x.shape),
        w1.new_empty(f, d),
        w1.new_empty(f),
        w2.new_empty(d, f),
        w2.new_empty(d),
    )


FORWARD = Operation(
    "mlp_gelu(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> (Tensor, Tensor)",
    reference=reference.mlp_gelu_forward,
    fake=_fake,
)
BACKWARD = Operation(
    "mlp_gelu_backward(Tensor dout, Tensor x, Tensor w1, Tensor w2, Tensor pre_activation)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.mlp_gelu_backward,
    fake=_backward_fake,
)


class MlpGelu(torch.autograd.Function):
    """The operator and its backward. It keeps x and the pre-activation; the activation is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        out, pre_activation = torch.ops.fastdit.mlp_gelu(x, w1, b1, w2, b2)
        ctx.save_for_backward(x, w1, w2, pre_activation)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.fastdit.mlp_gelu_backward(dout, *ctx.saved_tensors)


def mlp_gelu(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """`gelu(x w1^T + b1) w2^T + b2`, tanh GELU; x (..., D), w1 (F, D), b1 (F,), w2 (D, F), b2 (D,), out (..., D).

    Raises TypeError for tensors that are not dense and floating-point, or (without autocast) of different dtypes;
    ValueError for other shapes or tensors on different devices; RuntimeError if the chosen backend cannot run.
    """
    tensors = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    for argument, tensor in tensors.items():
        require_floating(argument, tensor)
    require_same_device(**tensors)
    d, f = x.shape[-1], w1.shape[0]
    allowed = {"w1": (f, d), "b1": (f,), "w2": (d, f), "b2": (d,)}
    for argument, shape in allowed.items():
        if tuple(tensors[argument].shape) != shape:
            raise ValueError(
                f"{argument}: expected shape {shape} for x of shape {tuple(x.shape)} and w1 of shape "
                f"{tuple(w1.shape)}, got {tuple(tensors[argument].shape)}"
            )
    autocast = autocast_enabled(x.device)
    if not autocast and len({tensor.dtype for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{argument} is {tensor.dtype}" for argument, tensor in tensors.items())
        raise TypeError(f"{found}: all must have one dtype outside autocast")
    if FORWARD.choose(x) == "reference":
        return reference.mlp_gelu(x, w1, b1, w2, b2)
    if autocast:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w1, b1, w2, b2 = (tensor.to(dtype) for tensor in tensors.values())
    return MlpGelu.apply(x, w1, b1, w2, b2)
