"""The two-layer perceptron of a block: `gelu(x w1^T + b1) w2^T + b2` with the tanh form of GELU.

x (..., D), w1 (F, D), b1 (F,), w2 (D, F), b2 (D,), all in one dtype (under autocast: cast to autocast's), out (..., D).
The backward needs x and the pre-activation only; the activation is computed again. Without a backward, GELU is part of
the first product.

Source: Vaswani et al. 2017, section 3.3; Hendrycks & Gimpel 2016 (GELU).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import operations as reference
from ..validation import autocast_enabled, require_floating, require_same_device
from .operation import (
    Operation,
    dtype_limits,
    needs_gradient,
    weight_gradient,
    without_none,
)


def _fake(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-1], w1.shape[0])


def _backward(
    dout: Tensor, w1: Tensor, w2: Tensor, pre_activation: Tensor, with_weights: bool
) -> tuple[Tensor, ...]:
    return without_none(
        reference.mlp_gelu_backward(dout, w1, w2, pre_activation, with_weights=with_weights)
    )


def _backward_fake(
    dout: Tensor, w1: Tensor, w2: Tensor, pre_activation: Tensor, with_weights: bool
) -> tuple[Tensor, ...]:
    f, d = w1.shape
    weights = [(f,), (d, f), (d,)] if with_weights else [(0,)] * 3
    shapes = [dout.shape, pre_activation.shape, *weights]
    return tuple(dout.new_empty(shape) for shape in shapes)


FORWARD = Operation(
    "mlp_gelu(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> (Tensor, Tensor)",
    reference=reference.mlp_gelu_forward,
    fake=_fake,
)
INFERENCE = Operation(
    "mlp_gelu_inference(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> Tensor",
    reference=reference.mlp_gelu,
    fake=lambda x, w1, b1, w2, b2: x.new_empty(x.shape),
)
BACKWARD = Operation(
    "mlp_gelu_backward(Tensor dout, Tensor w1, Tensor w2, Tensor pre_activation, bool with_weights)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_backward,
    fake=_backward_fake,
)
FORWARD.add_kernel("mlp_gelu", "forward", limits=dtype_limits)
INFERENCE.add_kernel("mlp_gelu", "inference", limits=dtype_limits)
BACKWARD.add_kernel("mlp_gelu", "backward", limits=dtype_limits, adapt=without_none)


class MlpGelu(torch.autograd.Function):
    """The operator and its backward. It keeps x and the pre-activation; the activation is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        out, pre_activation = torch.ops.fastdit.mlp_gelu(x, w1, b1, w2, b2)
        ctx.save_for_backward(x, w1, w2, pre_activation)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, pre_activation = ctx.saved_tensors
        with_weights = any(ctx.needs_input_grad[1:])
        dx, dpre, db1, dw2, db2 = torch.ops.fastdit.mlp_gelu_backward(
            dout, w1, w2, pre_activation, with_weights
        )
        if not with_weights:
            return dx, None, None, None, None
        return dx, weight_gradient(dpre, x), db1, dw2, db2


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
    if FORWARD.choose(*tensors.values()) == "reference":
        return reference.mlp_gelu(x, w1, b1, w2, b2)
    if autocast:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w1, b1, w2, b2 = (tensor.to(dtype) for tensor in tensors.values())
    if not needs_gradient(x, w1, b1, w2, b2):
        return torch.ops.fastdit.mlp_gelu_inference(x, w1, b1, w2, b2)
    return MlpGelu.apply(x, w1, b1, w2, b2)
