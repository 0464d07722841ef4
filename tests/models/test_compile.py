"""The model under `torch.compile` and `torch.export`: whole graphs, and the eager numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastdit
from fastdit.testing import assert_gradient_close, assert_model_close

from .helpers import (
    each_conditioning,
    make_inputs,
    make_model,
    output_and_gradients,
    redraw,
    twin,
)

# Dynamo looks at `.grad` of what it is given and hides the warning, which `filterwarnings = error` has raised by then.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _assert_eager_numbers(
    compiled: nn.Module, model: nn.Module, x: Tensor, t: Tensor, y: Tensor
) -> None:
    out, gradients = output_and_gradients(compiled, x, t, y)
    expected, expected_gradients = output_and_gradients(model, x, t, y)
    torch.testing.assert_close(out, expected)
    assert len(gradients) == len(expected_gradients)
    for found, wanted in zip(gradients.values(), expected_gradients.values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@each_conditioning
def test_whole_graph(conditioning: str) -> None:
    """No graph break, forward and backward."""
    model = make_model(conditioning, depth=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    _assert_eager_numbers(compiled, model, *make_inputs(model))


def test_further_batches_are_one_more_graph() -> None:
    """The second batch size makes a graph with the batch as a symbol, which serves all others."""
    model = make_model(depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n in (2, 3):
        _assert_eager_numbers(compiled, model, *make_inputs(model, n=n))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (5, 4):
            _assert_eager_numbers(compiled, model, *make_inputs(model, n=n))


def test_dynamic_batch_is_one_graph() -> None:
    model = make_model(depth=2)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    compiled(*make_inputs(model, n=2))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (5, 3):
            inputs = make_inputs(model, n=n)
            torch.testing.assert_close(compiled(*inputs), model(*inputs))


def test_whole_graph_at_another_size() -> None:
    model = make_model(depth=1, input_size=(4, 8), patch_size=4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    _assert_eager_numbers(compiled, model, *make_inputs(model))


def _calls(model: fastdit.DiT) -> dict[str, Callable[..., Any]]:
    scale = torch.tensor([2.0, 3.0])
    return {
        "guidance": lambda x, t, y: model.forward_with_cfg(x, t, y, 4.0),
        "guidance of all channels": lambda x, t, y: model.forward_with_cfg(
            x, t, y, scale, cfg_channels="all"
        ),
        "tokens": model.forward_tokens,
        "hidden": lambda x, t, y: model(x, t, y, return_hidden=[0])[1],
        "scalar t": lambda x, t, y: model(x, t[0], y.int()),
        "channels last": lambda x, t, y: model(x.to(memory_format=torch.channels_last), t, y),
        "no gradient": torch.no_grad()(lambda x, t, y: model(x, t, y)),
    }


@pytest.mark.parametrize("name", _calls(make_model(depth=1)))
def test_whole_graph_of_other_calls(name: str) -> None:
    model = make_model(depth=1)
    call = _calls(model)[name]
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    inputs = make_inputs(model, n=4)
    for found, expected in zip(compiled(*inputs), call(*inputs), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("conditioning", "case"),
    [
        ("adaln_zero", "training"),
        ("adaln_zero", "autocast"),
        ("in_context", "autocast"),
    ],
)
def test_whole_graph_in_other_modes(conditioning: str, case: str) -> None:
    model = make_model(conditioning, depth=1, class_dropout_prob=1.0).train(case == "training")
    x, t, y = make_inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        out, expected = compiled(x, t, y), model(x, t, y)
    torch.testing.assert_close(out, expected)
    out.float().sum().backward()
    assert out.dtype == (torch.float32 if case == "training" else torch.bfloat16)


@each_conditioning
def test_blocks_compiled_one_by_one_share_two_graphs(conditioning: str) -> None:
    """The first block has nothing pending, all others have."""
    graphs = CompileCounterWithBackend("aot_eager")
    model = make_model(conditioning, depth=5)
    for block in model.blocks:
        block.compile(backend=graphs, fullgraph=True)
    inputs = make_inputs(model)
    _assert_eager_numbers(model, make_model(conditioning, depth=5), *inputs)
    assert 1 <= graphs.frame_count <= 2
    before = graphs.frame_count
    model(*inputs)
    assert graphs.frame_count == before


def test_changed_weights_and_backend_are_noticed() -> None:
    model = make_model(depth=1)
    inputs = make_inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(*inputs)
    redraw(model, seed=9)
    torch.testing.assert_close(compiled(*inputs), model(*inputs))
    with fastdit.use_backend("reference"):
        torch.testing.assert_close(compiled(*inputs), model(*inputs))
    with fastdit.use_backend("native"), pytest.raises(RuntimeError, match="backend 'native'"):
        compiled(*inputs)
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


def test_values_are_not_read_while_compiling() -> None:
    """Reading one would break the graph; the wrong timestep passes as it does without validation."""
    model = make_model(depth=1)
    x, _, y = make_inputs(model)
    t = torch.tensor([5000, 0, 0])
    with fastdit.validate("full"):
        with pytest.raises(ValueError, match=r"t\[0\]=5000"):
            model(x, t, y)
        out = torch.compile(model, fullgraph=True, backend="eager")(x, t, y)
    torch.testing.assert_close(out, model(x, t, y))


def test_bad_input_is_named_while_compiling() -> None:
    model = make_model(depth=1)
    x, t, y = make_inputs(model)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(ValueError, match=r"y: expected shape \(3,\), got \(1,\)"):
        compiled(x, t, y[:1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when Inductor is imported
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on CPU")
def test_inductor() -> None:
    """The compiler that users get, on one small shape, since g++ takes its time."""
    model = make_model(depth=1, input_size=4)
    x, t, y = make_inputs(model)
    out, gradients = output_and_gradients(torch.compile(model, fullgraph=True), x, t, y)
    plain, plain_gradients = output_and_gradients(model, x, t, y)
    exact, exact_gradients = output_and_gradients(twin(model, torch.float64), x.double(), t, y)
    assert_model_close("output", out, exact, plain)
    for found, (name, wanted) in zip(gradients.values(), exact_gradients.items(), strict=True):
        summed = 0 if name == "x" else 3 * 4
        assert_gradient_close(name, found, wanted, plain_gradients[name], summed=summed)


@each_conditioning
def test_export(conditioning: str) -> None:
    model = make_model(conditioning, depth=1)
    inputs = make_inputs(model)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, inputs, dynamic_shapes=({0: batch},) * 3)
    for n in (3, 7):
        other = make_inputs(model, n=n)
        torch.testing.assert_close(program.module()(*other), model(*other))
    assert set(program.state_dict) == set(model.state_dict())
