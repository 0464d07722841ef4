"""Every kernel, in the configurations that DiT-S, B, L and XL launch it in, recorded without a device.

One function an operation calls its launchers on tensors of the meta device, so what is listed is what would run. A new
kernel needs such a function, and its line in `OPERATIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import (
    adamw_ema,
    attention,
    diffusion_step,
    gated_residual,
    gated_residual_layer_norm_modulate,
    layer_norm_modulate,
    mlp_gelu,
    patchify,
    unpatchify,
)
from .ahead_of_time import compile_all, identity
from .launch import Launch, recording
from .rows import LARGEST_D

# By name: the dtype of linear layers, and that of the residual stream.
DTYPES = {
    "bf16/fp32": (torch.bfloat16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
}
EPS = 1e-6
# DiT's latents: channels, how many the model gives out, and the side of a patch.
CHANNELS, OUTPUTS, PATCH = 4, 8, 2


class Configuration(NamedTuple):
    """The sizes of a model and its batch, and a name of `DTYPES`, with the tensors (N, T, D) and (N, D) it has."""

    d: int
    dtype: str
    n: int
    tokens: int

    def stream(self) -> Tensor:
        return _empty(self.n, self.tokens, self.d, dtype=DTYPES[self.dtype][1])

    def branch(self) -> Tensor:
        return _empty(self.n, self.tokens, self.d, dtype=DTYPES[self.dtype][0])

    def bias(self) -> Tensor:
        return _empty(self.d, dtype=DTYPES[self.dtype][0])

    def modulation(self) -> tuple[Tensor, ...]:
        """The six vectors of a block, views of what one linear layer gives."""
        return _empty(self.n, 6 * self.d, dtype=DTYPES[self.dtype][0]).chunk(6, dim=1)

    def latents(self) -> Tensor:
        side = PATCH * math.isqrt(self.tokens)
        return _empty(self.n, CHANNELS, side, side, dtype=DTYPES[self.dtype][0])

    def outputs(self, n: int) -> Tensor:
        """The tokens of the final layer."""
        return _empty(n, self.tokens, PATCH * PATCH * OUTPUTS, dtype=DTYPES[self.dtype][0])


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# What an operation launches, by case: which of its optional arguments are there.
Cases = Iterator[tuple[str, list[Launch]]]


def _layer_norm_modulate(c: Configuration) -> Cases:
    x, dtype = c.stream(), DTYPES[c.dtype][0]
    for case, (shift, scale) in {"": c.modulation()[:2], "plain": (None, None)}.items():
        with recording() as launches:
            h, mean, rstd = layer_norm_modulate.forward(x, shift, scale, EPS, dtype)
            layer_norm_modulate.backward(h, x, shift, scale, mean, rstd)
        yield case, launches


def _gated_residual_layer_norm_modulate(c: Configuration) -> Cases:
    kernel = gated_residual_layer_norm_modulate
    x, branch = c.stream(), c.branch()
    shift, scale, gate, *_ = c.modulation()
    for case, bias, with_h in (("", None, False), ("bias, h", c.bias(), True)):
        with recording() as launches:
            x_new, h, mean, rstd = kernel.forward(x, branch, gate, shift, scale, bias, EPS)
            kernel.backward(h, x_new, x_new, branch, gate, shift, scale, bias, mean, rstd, with_h)
        yield case, launches


def _gated_residual(c: Configuration) -> Cases:
    x, branch, gate = c.stream(), c.branch(), c.modulation()[2]
    with recording() as launches:
        gated_residual.backward(gated_residual.forward(x, branch, gate), branch, gate)
    yield "", launches


def _attention(c: Configuration) -> Cases:
    """Among the tokens, from one packed projection to one gradient; and to two tokens of a condition."""
    if c.d > 1152:
        return  # more of the same heads
    for head_dim in {1152: (72,), 1024: (64, 128)}.get(c.d, (64,)):
        heads = c.d // head_dim
        packed = c.branch().new_empty(c.n, c.tokens, 3, heads, head_dim)
        pair = c.branch().new_empty(c.n, 2, 2, heads, head_dim)
        q, k, v = packed.unbind(2)
        single = torch.empty_like(q)
        for case, tensors in {"": (q, k, v), ", cross": (single, *pair.unbind(2))}.items():
            with recording() as launches:
                out, lse = attention.forward(*tensors, head_dim**-0.5)
                attention.backward(out, *tensors, out, lse, head_dim**-0.5, *tensors)
            yield f"K={head_dim}{case}", launches


def _mlp_gelu(c: Configuration) -> Cases:
    dout, f = c.branch(), 4 * c.d
    w1, w2 = dout.new_empty(f, c.d), dout.new_empty(c.d, f)
    with recording() as launches:
        mlp_gelu.backward(dout, w1, w2, dout.new_empty(c.n, c.tokens, f), with_weights=True)
    yield "", launches


def _patchify(c: Configuration) -> Cases:
    side = math.isqrt(c.tokens)
    with recording() as launches:
        tokens = patchify.forward(c.latents(), PATCH)
    yield "forward", launches
    with recording() as launches:
        patchify.backward(tokens, PATCH, CHANNELS, side, side)
    yield "backward", launches


def _unpatchify(c: Configuration) -> Cases:
    side = math.isqrt(c.tokens)
    with recording() as launches:
        images = unpatchify.forward(c.outputs(c.n), PATCH, OUTPUTS, side, side)
    yield "forward", launches
    with recording() as launches:
        unpatchify.backward(images, PATCH)
    yield "backward", launches


def _diffusion_step(c: Configuration) -> Cases:
    x = c.latents().float()
    step = _empty(1, dtype=torch.int64)
    for sampler, columns in {"ddpm": 7, "ddim": 5}.items():
        table = _empty(250, columns, dtype=torch.float32)
        noise = x if sampler == "ddpm" else None
        for case, scale in {sampler: None, f"{sampler}, guided": 4.0}.items():
            outputs = c.outputs(c.n if scale is None else 2 * c.n)
            with recording() as launches:
                diffusion_step.forward(outputs, x, noise, table, step, None, scale, 3, PATCH, False)
            yield case, launches


def _adamw_ema(c: Configuration) -> Cases:
    """Gradients in the dtype of the residual stream, as autograd gives them with autocast and without."""
    scalar = _empty(1, dtype=torch.float32)
    params = [_empty(*shape, dtype=torch.float32) for shape in ((c.d, c.d), (c.d,), (c.d,))]
    linear, stream = DTYPES[c.dtype]
    grads, copies = [p.to(stream) for p in params], [p.to(linear) for p in params]
    for emas in (0, 1, 2):
        with recording() as launches:
            adamw_ema.update(
                step=scalar,
                params=params,
                grads=grads,
                exp_avgs=params,
                exp_avg_sqs=params,
                emas=params * emas,
                copies=copies if linear != torch.float32 else [],
                lr=scalar,
                clip=scalar,
                found_inf=scalar,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                weight_decay=0.0,
                ema_decays=[0.9999] * emas,
            )
        yield f"{emas} EMAs", launches


OPERATIONS: dict[str, Callable[[Configuration], Cases]] = {
    "layer_norm_modulate": _layer_norm_modulate,
    "gated_residual_layer_norm_modulate": _gated_residual_layer_norm_modulate,
    "gated_residual": _gated_residual,
    "attention": _attention,
    "mlp_gelu": _mlp_gelu,
    "patchify": _patchify,
    "unpatchify": _unpatchify,
    "diffusion_step": _diffusion_step,
    "adamw_ema": _adamw_ema,
}


def configurations() -> Iterator[Configuration]:
    """DiT-XL with 256 and with 1024 tokens, a large batch and a small one; DiT-L, B and S; and the widest rows."""
    for d, n, tokens in (
        (1152, 64, 256),
        (1152, 8, 1024),
        *((d, 64, 256) for d in (1024, 768, 384)),
    ):
        for dtype in DTYPES:
            yield Configuration(d, dtype, n, tokens)
    for d in (LARGEST_D // 2, LARGEST_D):
        for dtype in ("bf16/fp32", "fp32"):  # the most bytes
            yield Configuration(d, dtype, 64, 256)


class Shipped(NamedTuple):
    """A launch, and of what."""

    configuration: Configuration
    case: str
    launch: Launch

    def describe(self) -> dict[str, Any]:
        """Case, D, dtype (of `DTYPES`), and the shape of the first tensor."""
        first = next(a for a in self.launch.arguments if isinstance(a, Tensor))
        return {
            "case": self.case,
            "d": self.configuration.d,
            "dtype": self.configuration.dtype,
            "shape": list(first.shape),
        }


def shipped(chosen: Iterable[Configuration] | None = None) -> list[Shipped]:
    """All launches in the chosen configurations (default: `configurations()`) whose machine code differs."""
    found: dict[Any, Shipped] = {}
    for configuration in configurations() if chosen is None else chosen:
        for operation in OPERATIONS.values():
            for case, launches in operation(configuration):
                for launch in launches:
                    found.setdefault(identity(launch), Shipped(configuration, case, launch))
    return list(found.values())


def compile_shipped(
    chosen: Sequence[Shipped], capabilities: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """What each launch is and what it takes (`Compiled`), for one compute capability after the other."""
    compiled = compile_all([one.launch for one in chosen], capabilities)
    for _ in capabilities:
        for one in chosen:
            yield {**one.describe(), **next(compiled)._asdict()}
