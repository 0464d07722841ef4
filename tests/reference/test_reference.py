"""The specification against definitions written another way: numpy, loops, and torch's own modules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit import reference
from fastdit.reference import operations
from fastdit.reference.dit import LabelEmbedder, TimestepEmbedder

N, T, D = 2, 3, 8
wide = torch.float64


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=wide)


def normalise(x: np.ndarray, eps: float) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_layer_norm_modulate(eps: float) -> None:
    x, shift, scale = draw(N, T, D) * 0.1, draw(N, D), draw(N, D)
    found = reference.layer_norm_modulate(x, shift=shift, scale=scale, eps=eps)
    plain = reference.layer_norm_modulate(x, eps=eps)
    same = reference.layer_norm_modulate(x, shift=shift[0], scale=scale[0], eps=eps)
    for n in range(N):
        for t in range(T):
            h = normalise(x[n, t].numpy(), eps)
            np.testing.assert_allclose(plain[n, t], h, rtol=1e-12)
            modulated = h * (1 + scale[n].numpy()) + shift[n].numpy()
            np.testing.assert_allclose(found[n, t], modulated, rtol=1e-11, atol=1e-14)
            modulated = h * (1 + scale[0].numpy()) + shift[0].numpy()
            np.testing.assert_allclose(same[n, t], modulated, rtol=1e-11, atol=1e-14)
    out = reference.layer_norm_modulate(x.float(), out_dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16


def test_layer_norm_of_the_original_has_eps_1e_6() -> None:
    x = draw(1, 1, D) * 1e-4
    expected = torch.from_numpy(normalise(x.numpy(), 1e-6))
    torch.testing.assert_close(reference.layer_norm_modulate(x), expected)


def test_gated_residual() -> None:
    x, branch, gate = draw(N, T, D), draw(N, T, D), draw(N, D)
    found = reference.gated_residual(x, branch, gate=gate)
    for n in range(N):
        torch.testing.assert_close(found[n], x[n] + gate[n] * branch[n])
    torch.testing.assert_close(reference.gated_residual(x, branch), x + branch)
    shared = reference.gated_residual(x, branch, gate=gate[0])
    torch.testing.assert_close(shared, x + gate[0] * branch)
    assert reference.gated_residual(x.float(), branch.half()).dtype == torch.float32
    assert reference.gated_residual(x.half(), branch.float()).dtype == torch.float16


def test_seam_is_both() -> None:
    x, branch = draw(N, T, D), draw(N, T, D)
    gate, shift, scale = draw(N, D), draw(N, D), draw(N, D)
    x_new, h = reference.gated_residual_layer_norm_modulate(
        x, branch, gate=gate, shift=shift, scale=scale
    )
    expected = x + gate[:, None] * branch
    torch.testing.assert_close(x_new, expected)
    normal = F.layer_norm(expected, (D,), eps=1e-6)
    torch.testing.assert_close(h, normal * (1 + scale[:, None]) + shift[:, None])
    x_new, h = reference.gated_residual_layer_norm_modulate(x, branch, eps=0.5)
    torch.testing.assert_close(h, F.layer_norm(x + branch, (D,), eps=0.5))
    outputs = reference.gated_residual_layer_norm_modulate(x.float(), branch.bfloat16())
    assert [out.dtype for out in outputs] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(("p", "grid"), [(1, (2, 3)), (2, (3, 2)), (4, (1, 2))])
def test_patchify_and_unpatchify(p: int, grid: tuple[int, int]) -> None:
    h, w = grid
    x = draw(N, 3, h * p, w * p)
    tokens = reference.patchify(x, p)
    assert torch.equal(tokens, F.unfold(x, p, stride=p).mT)
    weight, bias = draw(5, 3, p, p), draw(5)
    convolved = F.conv2d(x, weight, bias, stride=p).flatten(2).mT
    torch.testing.assert_close(F.linear(tokens, weight.flatten(1), bias), convolved)
    z = draw(N, h * w, p * p * 3)
    images = reference.unpatchify(z, p, 3, grid)
    for c, row, column in ((0, 0, 0), (2, h * p - 1, w * p - 1), (1, h * p // 2, w * p // 2)):
        feature = ((row % p) * p + column % p) * 3 + c
        token = (row // p) * w + column // p
        assert torch.equal(images[:, c, row, column], z[:, token, feature])


def test_mlp_gelu() -> None:
    x, w1, b1, w2, b2 = draw(N, T, D), draw(12, D), draw(12), draw(D, 12), draw(D)
    a = np.asarray(x) @ np.asarray(w1).T + np.asarray(b1)
    a = 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
    expected = a @ np.asarray(w2).T + np.asarray(b2)
    np.testing.assert_allclose(reference.mlp_gelu(x, w1, b1, w2, b2), expected, rtol=1e-10)
    without = reference.mlp_gelu(x, w1, None, w2, None)
    zeros = reference.mlp_gelu(x, w1, torch.zeros_like(b1), w2, torch.zeros_like(b2))
    torch.testing.assert_close(without, zeros)


def test_attention() -> None:
    q, k, v = draw(N, 5, 2, 4), draw(N, 3, 2, 4), draw(N, 3, 2, 4)
    for scale, factor in ((None, 0.5), (0.3, 0.3)):
        found = reference.attention(q, k, v, scale=scale)
        for n in range(N):
            for head in range(2):
                logits = np.asarray(q[n, :, head]) @ np.asarray(k[n, :, head]).T * factor
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                expected = weights @ np.asarray(v[n, :, head])
                np.testing.assert_allclose(found[n, :, head], expected, rtol=1e-10)


def test_attention_is_torchs_multi_head_attention() -> None:
    torchs = nn.MultiheadAttention(D, 2, batch_first=True, dtype=wide)
    x = draw(N, T, D)
    q, k, v = F.linear(x, torchs.in_proj_weight, torchs.in_proj_bias).chunk(3, -1)
    heads = reference.attention(*(part.reshape(N, T, 2, D // 2) for part in (q, k, v)))
    expected, _ = torchs(x, x, x)
    torch.testing.assert_close(torchs.out_proj(heads.reshape(N, T, D)), expected)


# What fused implementations save, and their backwards: autograd of the plain functions is the definition.


def gradients(function: Callable[..., Any], *inputs: Tensor | None) -> tuple[Any, Any, list[Any]]:
    """Outputs, the gradients that arrive, and the gradients of the inputs."""
    leaves = [None if i is None else i.detach().requires_grad_() for i in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    arriving = [torch.randn_like(out) for out in outputs]
    given = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(outputs, given, arriving))
    return outputs, arriving, [None if leaf is None else next(found) for leaf in leaves]


@pytest.mark.parametrize("vectors", ["(N, D)", "(D,)", "none"])
def test_layer_norm_modulate_backward(vectors: str) -> None:
    x = draw(N, T, D)
    shape = (N, D) if vectors == "(N, D)" else (D,)
    shift, scale = (None, None) if vectors == "none" else (draw(*shape), draw(*shape))
    (h,), (dh,), expected = gradients(
        lambda x, shift, scale: reference.layer_norm_modulate(x, shift=shift, scale=scale),
        *(x, shift, scale),
    )
    out, mean, rstd = operations.layer_norm_modulate_forward(x, shift, scale, 1e-6, wide)
    torch.testing.assert_close(out, h)
    torch.testing.assert_close(mean, x.mean(-1))
    torch.testing.assert_close(rstd, 1 / (x.var(-1, correction=0) + 1e-6).sqrt())
    found = operations.layer_norm_modulate_backward(dh, x, shift, scale, mean, rstd)
    for gradient, wanted in zip(found, expected, strict=True):
        assert (gradient is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("vectors", ["(N, D)", "(D,)", "none"])
def test_gated_residual_backward(vectors: str) -> None:
    gate = {"(N, D)": draw(N, D), "(D,)": draw(D), "none": None}[vectors]
    x, branch = draw(N, T, D), draw(N, T, D)
    _, (dx,), (_, dbranch, dgate) = gradients(
        lambda x, branch, gate: reference.gated_residual(x, branch, gate=gate), x, branch, gate
    )
    found = operations.gated_residual_backward(dx, branch, gate)
    torch.testing.assert_close(found[0], dbranch)
    assert (found[1] is None) == (gate is None)
    if gate is not None:
        torch.testing.assert_close(found[1], dgate)


def test_mlp_gelu_backward() -> None:
    inputs = draw(N, T, D), draw(12, D), draw(12), draw(D, 12), draw(D)
    (out,), (dout,), expected = gradients(reference.mlp_gelu, *inputs)
    x, w1, b1, w2, b2 = inputs
    found_out, pre_activation = operations.mlp_gelu_forward(x, w1, b1, w2, b2)
    torch.testing.assert_close(found_out, out)
    torch.testing.assert_close(pre_activation, F.linear(x, w1, b1))
    dx, dpre, *weights = operations.mlp_gelu_backward(dout, w1, w2, pre_activation)
    dw1 = torch.einsum("ntf,ntd->fd", dpre, x)
    for gradient, wanted in zip((dx, dw1, *weights), expected, strict=True):
        torch.testing.assert_close(gradient, wanted)
    frozen = operations.mlp_gelu_backward(dout, w1, w2, pre_activation, with_weights=False)
    assert torch.equal(frozen[0], dx)
    assert frozen[2:] == (None, None, None)


def test_backwards_keep_the_dtypes_of_their_inputs() -> None:
    """Sums in float32, results in what each input was."""
    x, narrow = torch.randn(N, T, D), torch.randn(N, D).bfloat16()
    _, mean, rstd = operations.layer_norm_modulate_forward(x, narrow, narrow, 1e-6, torch.bfloat16)
    assert mean.dtype == rstd.dtype == torch.float32
    dh = torch.randn(N, T, D).bfloat16()
    found = operations.layer_norm_modulate_backward(dh, x, narrow, narrow, mean, rstd)
    assert [g.dtype for g in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    dshift = dh.double().sum(1)
    assert torch.equal(found[1], dshift.bfloat16())  # rounded once
    found = operations.gated_residual_backward(x, dh, narrow)
    assert [g.dtype for g in found] == [torch.bfloat16, torch.bfloat16]
    dgate = (x.double() * dh.double()).sum(1)
    assert torch.equal(found[1], dgate.bfloat16())


# The model (its outputs are held to the original's in tests/models/test_dit.py).


def test_position_embedding() -> None:
    found = reference.sincos_position_embedding(8, (2, 3))
    assert (found.dtype, found.shape) == (wide, (6, 8))
    for row in range(2):
        for column in range(3):
            expected = []
            for position in (column, row):
                angles = [position / 10000 ** (k / 2) for k in range(2)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            np.testing.assert_allclose(found[row * 3 + column], expected, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_timestep_embedding(dtype: torch.dtype) -> None:
    """At least float32 whatever the dtype of the weights: 257 is no bfloat16 number."""
    embedder = TimestepEmbedder(16).to(dtype)
    seen: list[Tensor] = []
    embedder.mlp[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    t = [0, 1, 256, 257, 999]
    embedder(torch.tensor(t))
    assert seen[0].dtype == dtype
    for features, step in zip(seen[0].double(), t, strict=True):
        angles = [step * 10000 ** (-k / 128) for k in range(128)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        # What 999 radians in float32 are off by, and the rounding to the weights' dtype.
        tolerance = 1e-12 if dtype is wide else 1.5e-4 + torch.finfo(dtype).eps
        np.testing.assert_allclose(features, expected, atol=tolerance)
    assert not torch.equal(seen[0][2], seen[0][3])


def test_label_dropout() -> None:
    embedder = LabelEmbedder(10, 4, 0.5)
    y = torch.arange(10)
    assert torch.equal(embedder.eval()(y), embedder.embedding_table.weight[:10])
    torch.manual_seed(0)
    found = embedder.train()(y)
    torch.manual_seed(0)
    dropped = torch.rand(10) < 0.5
    expected = torch.where(dropped[:, None], embedder.embedding_table.weight[10], found)
    assert torch.equal(found, expected)
    assert torch.equal(found[~dropped], embedder.embedding_table.weight[:10][~dropped])
    assert LabelEmbedder(10, 4, 0.0).embedding_table.weight.shape == (10, 4)


def test_reference_imports_nothing_of_fastdit_and_runs_in_float64() -> None:
    model = reference.DiT(4, 2, 3, 16, 1, 2, num_classes=3).double().eval()
    out = model(draw(2, 3, 4, 4), torch.tensor([1, 2]), torch.tensor([0, 3]))
    assert (out.dtype, out.shape) == (wide, (2, 6, 4, 4))
    assert reference.DiT.__module__.startswith("fastdit.reference")
