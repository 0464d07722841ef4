"""`DiT(attention=...)`: how attention is computed is no part of what the model is, and every way is the same model."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import fastdit
from tests.ops.helpers import watch_kernels

from .helpers import (
    assert_matches_reference,
    each_conditioning,
    make_inputs,
    make_model,
    output_and_gradients,
)

MODULE = importlib.import_module("fastdit.ops.attention")

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def small(conditioning: str = "adaln_zero", **arguments: Any) -> fastdit.DiT:
    """head_dim 8, which the kernel takes, 4 tokens."""
    size = {"depth": 2, "hidden_size": 16, "input_size": 4}
    return make_model(conditioning, **{**size, **arguments})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """(q's shape, k's shape, backend, deterministic) of every choice that a model asks for."""
    found: list[tuple[Any, ...]] = []
    choose = MODULE.choose

    def watched(q: Any, k: Any, v: Any, backend: str, deterministic: bool) -> str:
        found.append((tuple(q.shape), tuple(k.shape), backend, deterministic))
        return choose(q, k, v, backend, deterministic)

    monkeypatch.setattr(MODULE, "choose", watched)
    return found


@each_conditioning
@pytest.mark.parametrize("attention", ["sdpa", "sdpa_flash", "reference", "triton"])
def test_every_backend_is_the_same_model(conditioning: str, attention: str) -> None:
    model = small(conditioning, attention=attention)
    with np.errstate(all="ignore"):
        assert_matches_reference(model, *make_inputs(model))


@each_conditioning
def test_every_attention_of_the_model_asks(conditioning: str, calls: list[Any]) -> None:
    model = small(conditioning, attention="sdpa_flash", attention_deterministic=False)
    model(*make_inputs(model))
    tokens = 6 if conditioning == "in_context" else 4
    own = ((3, tokens, 2, 8), (3, tokens, 2, 8), "sdpa_flash", False)
    cross = ((3, 4, 2, 8), (3, 2, 2, 8), "sdpa_flash", False)
    assert calls == ([own, cross] * 2 if conditioning == "cross_attention" else [own] * 2)
    calls.clear()
    model.set_attention("auto")
    model(*make_inputs(model))
    assert {call[2:] for call in calls} == {("auto", True)}


def test_default_is_bit_for_bit_torchs_own() -> None:
    """Output and gradients of the expression that a block stands for."""
    attn = small().blocks[0].attn.requires_grad_()
    x = torch.randn(2, 5, 16)
    found = attn(x)
    q, k, v = attn.qkv(x).reshape(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=attn.scale)
    expected = attn.proj(out.transpose(1, 2).reshape(2, 5, 16))
    assert torch.equal(found, expected)
    parameters = list(attn.parameters())
    for gradient, wanted in zip(
        torch.autograd.grad(found.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        assert torch.equal(gradient, wanted)


def test_it_is_no_part_of_the_model() -> None:
    model, other = small(attention="reference", attention_deterministic=False), small()
    assert model.config == other.config
    assert not any("attention" in name for name in model.config)
    assert model.state_dict().keys() == other.state_dict().keys()
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_copies_keep_it() -> None:
    model = small(attention="reference", attention_deterministic=False)
    pickled = pickle.loads(pickle.dumps(model))  # noqa: S301
    for twin in (copy.deepcopy(model), pickled):
        for block in twin.blocks:
            assert (block.attn.backend, block.attn.deterministic) == ("reference", False)


def test_seed_gives_the_same_weights() -> None:
    models = []
    for attention in ("auto", "reference"):
        torch.manual_seed(0)
        models.append(fastdit.DiT(4, 2, 4, 16, 1, 2, num_classes=3, attention=attention))
    first, second = (list(model.parameters()) for model in models)
    assert all(map(torch.equal, first, second))


def test_bad_name() -> None:
    with pytest.raises(ValueError, match="attention='flash': allowed are 'auto', "):
        small(attention="flash")
    model = small(attention="cudnn")
    with pytest.raises(RuntimeError, match=r"attention backend 'cudnn' cannot run q .*on cpu"):
        model(*make_inputs(model))
    with pytest.raises(ValueError, match=r"attention='sdap': .*did you mean 'sdpa'"):
        model.set_attention("sdap")


@each_conditioning
def test_attention_in_use(conditioning: str) -> None:
    model = small(conditioning)
    kinds = {"attn", "cross_attn"} if conditioning == "cross_attention" else {"attn"}
    for training in (True, False):
        assert model.attention_in_use(4, training=training) == dict.fromkeys(kinds, "sdpa")
    model.set_attention("triton")
    assert model.attention_in_use(4, training=True) == dict.fromkeys(kinds, "triton")
    with fastdit.use_backend("reference"):
        assert set(model.attention_in_use(4, training=True).values()) == {"reference"}
    model.set_attention("cudnn")
    with pytest.raises(RuntimeError, match=r"cannot run q \(4, \d, 2, 8\)"):
        model.attention_in_use(4, training=False)
    with pytest.raises(RuntimeError, match=r"in torch.bfloat16 on cpu"), torch.autocast("cpu"):
        model.attention_in_use(4, training=False)


def test_whole_graph() -> None:
    torch._dynamo.reset()
    model = small("cross_attention", attention="triton", depth=1)
    inputs = make_inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with np.errstate(all="ignore"):
        out, gradients = output_and_gradients(compiled, *inputs)
        expected, expected_gradients = output_and_gradients(model, *inputs)
    torch.testing.assert_close(out, expected)
    for found, wanted in zip(gradients.values(), expected_gradients.values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_choice_is_noticed_by_a_compiled_model() -> None:
    torch._dynamo.reset()
    model = small(depth=1)
    inputs = make_inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(*inputs)
    model.set_attention("cudnn")
    with pytest.raises(RuntimeError, match="attention backend 'cudnn' cannot run"):
        compiled(*inputs)
    model.set_attention("reference")
    torch.testing.assert_close(compiled(*inputs), model(*inputs))
    torch._dynamo.reset()


def test_use_backend_triton_is_for_attention_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = watch_kernels(monkeypatch, MODULE)
    model = small("cross_attention")
    with fastdit.use_backend("triton"), np.errstate(all="ignore"):
        model(*make_inputs(model)).sum().backward()
    # Self-attention's backward writes one packed gradient, through an operator of its own.
    assert ran.count("attention") == 4
    assert ran.count("attention_backward") == 2
