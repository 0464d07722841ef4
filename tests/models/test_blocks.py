from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.models import (
    Attention,
    CrossAttention,
    CrossAttentionBlock,
    DiTBlock,
    FinalLayer,
    InContextBlock,
    Mlp,
    modulate,
)
from fastdit.testing import assert_close, assert_model_close

from .helpers import redraw

N, T, D, HEADS = 3, 5, 32, 4
adaptive = pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln"])


def _block(conditioning: Any = "adaln_zero", **arguments: Any) -> DiTBlock:
    block = DiTBlock(D, HEADS, conditioning=conditioning, **arguments)
    redraw(block)
    return block


def _streams() -> tuple[Tensor, Tensor]:
    return torch.randn(N, T, D), torch.randn(N, D)


def test_modulate() -> None:
    x, shift, scale = torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(2, 4)
    found = modulate(x, shift, scale)
    for n in range(2):
        torch.testing.assert_close(found[n], x[n] * (1 + scale[n]) + shift[n])


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head by the definition."""
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def test_attention_by_its_definition() -> None:
    """The rows of qkv.weight are q of all heads, k of all heads, v of all heads."""
    attention = Attention(D, num_heads=HEADS).double()
    x = torch.randn(N, T, D, dtype=torch.float64)
    weight, bias, size = attention.qkv.weight, attention.qkv.bias, D // HEADS
    heads = []
    for head in range(HEADS):
        rows = [slice(part * D + head * size, part * D + (head + 1) * size) for part in range(3)]
        heads.append(_attend(*(F.linear(x, weight[r], bias[r]) for r in rows)))
    expected = F.linear(torch.cat(heads, -1), attention.proj.weight, attention.proj.bias)
    torch.testing.assert_close(attention(x), expected)
    assert Attention(D, HEADS, qkv_bias=False).qkv.bias is None


def test_cross_attention_by_its_definition() -> None:
    attention = CrossAttention(D, num_heads=HEADS).double()
    x, c = torch.randn(N, T, D).double(), torch.randn(N, 2, D).double()
    q = attention.q(x).chunk(HEADS, -1)
    k, v = (part.chunk(HEADS, -1) for part in attention.kv(c).chunk(2, -1))
    heads = [_attend(*parts) for parts in zip(q, k, v, strict=True)]
    torch.testing.assert_close(attention(x, c), attention.proj(torch.cat(heads, -1)))


def test_mlp_by_its_definition() -> None:
    mlp = Mlp(D, 48).double()
    x = torch.randn(N, T, D, dtype=torch.float64)
    h = mlp.fc1(x)
    h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    torch.testing.assert_close(mlp(x), mlp.fc2(h))


@pytest.mark.parametrize(
    "change",
    [
        lambda mlp: setattr(mlp, "act", nn.GELU()),
        lambda mlp: setattr(mlp, "act", nn.ReLU()),
        lambda mlp: setattr(mlp, "fc1", nn.Linear(D, 48, bias=False)),
        lambda mlp: setattr(mlp, "fc2", nn.Linear(48, D, bias=False)),
        lambda mlp: setattr(mlp, "fc2", nn.Sequential(nn.Linear(48, D), nn.Tanh())),
    ],
    ids=["exact GELU", "ReLU", "fc1 without bias", "fc2 without bias", "fc2 wrapped"],
)
def test_mlp_runs_what_was_put_into_it(change: Any) -> None:
    mlp = Mlp(D, 48)
    change(mlp)
    x = torch.randn(N, T, D)
    torch.testing.assert_close(mlp(x), mlp.fc2(mlp.act(mlp.fc1(x))))


def _norm(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@adaptive
def test_block_by_its_definition(conditioning: str) -> None:
    block = _block(conditioning).double()
    x, c = (s.double() for s in _streams())
    vectors = F.linear(c * c.sigmoid(), *block.adaLN_modulation[1].parameters()).unsqueeze(1)
    if conditioning == "adaln_zero":
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors.split(D, -1)
    else:
        shift_msa, scale_msa, shift_mlp, scale_mlp = vectors.split(D, -1)
        gate_msa = gate_mlp = torch.ones(())
    expected = x + gate_msa * block.attn(_norm(x) * (1 + scale_msa) + shift_msa)
    expected = expected + gate_mlp * block.mlp(_norm(expected) * (1 + scale_mlp) + shift_mlp)
    torch.testing.assert_close(block(x, c), expected)


@adaptive
def test_pending_is_the_block_before_that_was_not_added(conditioning: str) -> None:
    first, second = _block(conditioning), _block(conditioning)
    x, c = _streams()
    stream, pending = first(x, c, ())
    branch, gate = pending
    assert (gate is None) == (conditioning == "adaln")
    added = stream + (branch if gate is None else gate.unsqueeze(1) * branch)
    assert torch.equal(added, first(x, c))
    stream, (branch, gate) = second(stream, c, pending)
    added = stream + (branch if gate is None else gate.unsqueeze(1) * branch)
    assert torch.equal(added, second(first(x, c), c))
    assert torch.equal(second(first(x, c), c, pending=None), second(first(x, c), c))


@adaptive
def test_gradients_through_pending(conditioning: str) -> None:
    block = _block(conditioning).double()
    data = [stream.double() for stream in _streams()]
    gradients = []
    for handed_on in (True, False):
        x, c = (stream.clone().requires_grad_() for stream in data)
        block.zero_grad()
        if handed_on:
            stream, pending = block(x, c, ())
            stream, (branch, gate) = block(stream, c, pending)
            out = stream + (branch if gate is None else gate.unsqueeze(1) * branch)
        else:
            out = block(block(x, c), c)
        out.square().sum().backward()
        gradients.append([x.grad, c.grad, *(p.grad for p in block.parameters())])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@adaptive
def test_given_modulation_replaces_the_computed_one(conditioning: str) -> None:
    block = _block(conditioning)
    x, c = _streams()
    modulation = block.adaLN_modulation(c)
    expected = block(x, c)
    called = []
    block.adaLN_modulation.register_forward_hook(lambda *_: called.append(1))
    assert torch.equal(block(x, c, modulation=modulation), expected)
    assert torch.equal(block(x, torch.full_like(c, torch.nan), modulation=modulation), expected)
    assert torch.equal(block(x, c, (), modulation)[0], block(x, c, ())[0])
    assert len(called) == 1  # by the last call only
    assert not torch.equal(block(x, c, modulation=-modulation), expected)


def test_modulation_may_be_a_view() -> None:
    """A sampler may compute every block's modulation at once and hand out slices."""
    block = _block()
    x, c = _streams()
    everything = torch.randn(N, 3, 6 * D)
    view = everything[:, 1]
    assert torch.equal(block(x, c, modulation=view), block(x, c, modulation=view.contiguous()))


@pytest.mark.parametrize("norm", ["affine", "rms", "eps", "hook"])
def test_block_runs_the_norm_that_was_put_into_it(norm: str) -> None:
    block = _block()
    x, c = _streams()
    if norm == "affine":
        block.norm1 = nn.LayerNorm(D)
        nn.init.normal_(block.norm1.weight)
    elif norm == "rms":
        block.norm1 = nn.RMSNorm(D)
    elif norm == "eps":
        block.norm1.eps = block.norm2.eps = 0.5
    else:
        block.norm1.register_forward_hook(lambda module, args, out: 2 * out)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.adaLN_modulation(
        c
    ).chunk(6, 1)
    expected = x + gate_msa.unsqueeze(1) * block.attn(
        modulate(block.norm1(x), shift_msa, scale_msa)
    )
    h = modulate(block.norm2(expected), shift_mlp, scale_mlp)
    expected = expected + gate_mlp.unsqueeze(1) * block.mlp(h)
    torch.testing.assert_close(block(x, c), expected)
    stream, (branch, gate) = block(x, c, ())
    torch.testing.assert_close(stream + gate.unsqueeze(1) * branch, expected)


@pytest.mark.parametrize("norm", ["fused", "hook"])
def test_mixed_stream_keeps_its_dtype_and_feeds_the_branches_in_theirs(norm: str) -> None:
    block = _block().bfloat16()
    if norm == "hook":
        block.norm1.register_forward_hook(lambda *_: None)
    seen = []
    block.attn.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    x, c = _streams()
    out = block(x, c.bfloat16())
    assert (out.dtype, seen) == (torch.float32, [torch.bfloat16])
    exact = _as(block, torch.float64)(x.double(), c.bfloat16().double())
    plain = block(x.bfloat16(), c.bfloat16())
    assert_close("mixed", out.bfloat16(), exact, plain)


def _as(block: DiTBlock, dtype: torch.dtype) -> DiTBlock:
    other = DiTBlock(D, HEADS).to(dtype)
    other.load_state_dict({n: p.to(dtype) for n, p in block.state_dict().items()})
    return other


def test_cross_attention_block_by_its_definition() -> None:
    block = CrossAttentionBlock(D, HEADS)
    redraw(block)
    block = block.double()
    x, c = torch.randn(N, T, D).double(), torch.randn(N, 2, D).double()

    def affine(norm: nn.LayerNorm, x: Tensor) -> Tensor:
        return _norm(x) * norm.weight + norm.bias

    expected = x + block.attn(affine(block.norm1, x))
    expected = expected + block.cross_attn(affine(block.norm_cross, expected), c)
    expected = expected + block.mlp(affine(block.norm2, expected))
    torch.testing.assert_close(block(x, c), expected)


def test_in_context_block_by_its_definition() -> None:
    block = InContextBlock(D, HEADS)
    redraw(block)
    block = block.double()
    x = torch.randn(N, T, D).double()
    expected = x + block.attn(_norm(x) * block.norm1.weight + block.norm1.bias)
    expected = expected + block.mlp(_norm(expected) * block.norm2.weight + block.norm2.bias)
    torch.testing.assert_close(block(x), expected)
    assert torch.equal(block(x, torch.randn(N, D)), block(x))


@pytest.mark.parametrize("kind", [CrossAttentionBlock, InContextBlock])
def test_plain_blocks_keep_a_wide_stream(kind: Any) -> None:
    block = kind(D, HEADS).bfloat16()
    c = torch.randn(N, 2, D, dtype=torch.bfloat16)
    assert block(torch.randn(N, T, D), c).dtype == torch.float32
    assert block(torch.randn(N, T, D).bfloat16(), c).dtype == torch.bfloat16


def test_final_layer_by_its_definition() -> None:
    layer = FinalLayer(D, 2, 3)
    redraw(layer)
    layer = layer.double()
    x, c = (s.double() for s in _streams())
    shift, scale = layer.adaLN_modulation(c).unsqueeze(1).split(D, -1)
    expected = layer.linear(_norm(x) * (1 + scale) + shift)
    torch.testing.assert_close(layer(x, c), expected)
    modulation = torch.randn(N, 2 * D).double()
    shift, scale = modulation.unsqueeze(1).split(D, -1)
    torch.testing.assert_close(
        layer(x, c, modulation=modulation), layer.linear(_norm(x) * (1 + scale) + shift)
    )


@pytest.mark.parametrize("is_adaptive", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_final_layer_adds_what_is_pending(is_adaptive: bool, gated: bool) -> None:
    layer = FinalLayer(D, 2, 3, adaptive=is_adaptive)
    redraw(layer)
    x, c = _streams()
    branch, gate = torch.randn(N, T, D), torch.randn(N, D) if gated else None
    added = x + (branch if gate is None else gate.unsqueeze(1) * branch)
    exact_layer = FinalLayer(D, 2, 3, adaptive=is_adaptive).double()
    exact_layer.load_state_dict({n: p.double() for n, p in layer.state_dict().items()})
    exact = exact_layer(added.double(), c.double()).detach()
    plain = layer(added, c).detach()
    assert_model_close("final layer", layer(x, c, (branch, gate)).detach(), exact, plain)


def test_attention_rejects_indivisible_heads() -> None:
    with pytest.raises(ValueError, match=r"hidden_size=32.*num_heads=5"):
        DiTBlock(32, 5)
