"""What holds for every kernel: the operator's contract, and on a GPU repeats, capture, streams and long tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

import fastdit
from fastdit import ops
from fastdit.kernels import shipped
from fastdit.kernels.launch import Launch, recording
from fastdit.ops.operation import Operation
from fastdit.testing import assert_same_bits, layouts

from .helpers import draw, need_memory
from .test_operation import CASES, module_of, run

each_operation = pytest.mark.parametrize("name", CASES)
INTERPRETER = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU"),
    id="interpreter",
)
each_device = pytest.mark.parametrize(
    "device", [INTERPRETER, pytest.param("cuda", marks=pytest.mark.gpu)]
)
gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with fastdit.use_backend("triton"):
        yield


def _transposed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: layouts(value)["transposed"] for name, value in inputs.items()}


def _mixed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A float32 stream beside what is computed in bfloat16; one dtype where there is only one tensor."""
    if "w1" in inputs:
        return {name: value.bfloat16() for name, value in inputs.items()}
    return {name: v if name == "x" else v.bfloat16() for name, v in inputs.items()}


VARIANTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "plain": lambda inputs: inputs,
    "transposed": _transposed,
    "mixed": _mixed,
}


@each_device
@pytest.mark.parametrize(
    "variant",
    [
        "plain",
        "mixed",
        "batch 0",
        pytest.param("transposed", marks=pytest.mark.slow),
        pytest.param("batch 3", marks=pytest.mark.slow),
    ],
)
@each_operation
def test_opcheck(name: str, variant: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake and autograd registration of what the kernels really return, with and without gradients."""
    function, make = CASES[name]
    n = {"batch 0": 0, "batch 3": 3}.get(variant, 2)
    inputs = {key: value.to(device) for key, value in make(n).items()}
    inputs = VARIANTS.get(variant, VARIANTS["plain"])(inputs)
    seen: list[tuple[Operation, tuple[Any, ...]]] = []
    module = module_of(name)
    for kind in ("FORWARD", "INFERENCE", "BACKWARD"):
        if hasattr(module, kind):
            operation = getattr(module, kind)
            kernel = operation.implementations["triton"]
            monkeypatch.setitem(
                operation.implementations,
                "triton",
                lambda *a, o=operation, k=kernel: (seen.append((o, a)), k(*a))[1],
            )
    run(function, inputs)
    with torch.no_grad():
        function(**inputs)
    recorded = {operation.name: arguments for operation, arguments in seen}
    assert {name, f"{name}_backward"} <= set(recorded)
    for operator, arguments in recorded.items():
        detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
        torch.library.opcheck(getattr(torch.ops.fastdit, operator).default, detached)


@gpu
@pytest.mark.parametrize("d", [72, 1152])
@pytest.mark.parametrize(
    "name", ["layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate"]
)
def test_a_thousand_repeats_are_the_same_bits(name: str, d: int) -> None:
    with torch.device("cuda"):
        inputs = {"x": draw(60, 64, d)}
        if "gated" in name:
            inputs |= {"branch": draw(60, 64, d).bfloat16(), "gate": draw(60, d).bfloat16()}
        if "norm" in name:
            inputs |= {key: draw(60, d).bfloat16() for key in ("shift", "scale")}
        if name == "gated_residual_layer_norm_modulate":
            inputs |= {"bias": draw(d).bfloat16()}
    _assert_repeats(getattr(ops, name), inputs)


@gpu
def test_a_thousand_repeats_of_the_perceptron() -> None:
    with torch.device("cuda"):
        shapes = {"x": (6, 64, 72), "w1": (288, 72), "b1": (288,), "w2": (72, 288), "b2": (72,)}
        inputs = {key: draw(*shape).bfloat16() for key, shape in shapes.items()}
    _assert_repeats(ops.mlp_gelu, inputs)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thousand_repeats_of_patches(dtype: torch.dtype) -> None:
    with torch.device("cuda"):
        images, tokens = draw(64, 4, 32, 32, dtype=dtype), draw(64, 256, 32, dtype=dtype)
    _assert_repeats(lambda x: ops.patchify(x, 2), {"x": images})
    _assert_repeats(lambda tokens: ops.unpatchify(tokens, 2, 8, (16, 16)), {"tokens": tokens})


def _assert_repeats(function: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    expected = run(function, inputs)
    for _ in range(1000):
        for found, wanted in zip(run(function, inputs), expected, strict=True):
            assert_same_bits("repeat", found, wanted)


@gpu
@each_operation
def test_captured_and_replayed(name: str) -> None:
    """Forward and backward in a CUDA graph, replayed on other values: what eager gives for them, to the bit."""
    function, make = CASES[name]
    inputs = {key: value.cuda() for key, value in make(2).items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(function, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(function, inputs)
    for value in inputs.values():
        value.mul_(0.5)
    graph.replay()
    replayed = [result.clone() for result in captured]
    for found, wanted in zip(replayed, run(function, inputs), strict=True):
        assert_same_bits("replayed", found, wanted)


@gpu
@each_operation
def test_on_the_current_stream(name: str) -> None:
    """Behind a slow producer on the same stream: a launch on another one would read what was there before."""
    function, make = CASES[name]
    values = {key: value.cuda() for key, value in make(2).items()}
    expected = run(function, values)
    inputs = {key: torch.zeros_like(value) for key, value in values.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for key, value in values.items():
            inputs[key].copy_(value)
        found = run(function, inputs)
    stream.synchronize()
    for out, wanted in zip(found, expected, strict=True):
        assert_same_bits("output", out, wanted)


# More than 2^31 elements. Without a GPU: the last program, whose tensors are not there.


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
@pytest.mark.parametrize("name", sorted(shipped.OPERATIONS.keys() - {"adamw_ema"}))
def test_offsets_are_computed_in_64_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter refuses integers that overflow; adamw_ema reads its addresses from the device."""
    sizes = shipped.Configuration(d=1152, dtype="bf16", n=2**19, tokens=1024)
    for _, launches in shipped.OPERATIONS[name](sizes):
        for launch in launches:
            _run_last_program(launch, monkeypatch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
@pytest.mark.parametrize("patch_size", [1, 32])
@pytest.mark.parametrize("dimension", [1, 2, 3])
@pytest.mark.parametrize("way", ["patchify", "unpatchify"])
def test_offsets_in_an_image_are_computed_in_64_bits(
    way: str, dimension: int, patch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one whose channels, rows or columns lie far apart, by the last token and by the last pixel of a token."""
    strides = [2**30 if i == dimension else 1 for i in range(4)]
    images = torch.empty_strided((1, 8, 32, 32), strides, dtype=torch.bfloat16, device="meta")
    kernels = importlib.import_module(f"fastdit.kernels.{way}")
    with recording() as launches:
        (kernels.forward if way == "patchify" else kernels.backward)(images, patch_size)
    (launch,) = launches
    _run_last_program(launch, monkeypatch)


def _run_last_program(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs one program on a memory of which everything is zero and nothing is kept."""
    last = tuple(size - 1 for size in (*launch.grid, 1, 1)[:3])
    stored: list[Any] = []

    def load(builder: Any, pointers: Any, mask: Any, other: Any, *_: Any) -> Any:
        element = pointers.get_element_ty()
        zeros = np.zeros(pointers.data.shape, interpreter._get_np_dtype(element))
        return interpreter.TensorHandle(zeros, element)

    with monkeypatch.context() as patch:
        builder = interpreter.InterpreterBuilder
        patch.setattr(builder, "set_grid_idx", lambda self, *_: setattr(self, "grid_idx", last))
        patch.setattr(builder, "create_masked_load", load)
        patch.setattr(
            builder, "create_masked_store", lambda self, pointers, *_: stored.append(pointers)
        )
        arguments = (
            torch.empty(1, dtype=a.dtype) if isinstance(a, Tensor) else a for a in launch.arguments
        )
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        with np.errstate(all="ignore"):
            launch.kernel[(1,)](*arguments, **launch.constants, **options)
    assert stored


# On a GPU: the last sample is what it is alone.
LONG = 2**31 + 2**20


def _long(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()


@gpu
def test_long_seam() -> None:
    need_memory(40)  # eight tensors of 4 GiB
    t, d = 1024, 8192
    n = -(-LONG // (t * d))
    with torch.device("cuda"):
        gate, shift, scale = (draw(n, d).bfloat16() for _ in range(3))
    inputs = {"x": _long(n, t, d), "branch": _long(n, t, d)}
    inputs |= {"gate": gate, "shift": shift, "scale": scale}
    _assert_last_sample(ops.gated_residual_layer_norm_modulate, inputs)


@gpu
def test_long_norm() -> None:
    need_memory(24)
    t, d = 1024, 8192
    n = -(-LONG // (t * d))
    with torch.device("cuda"):
        shift, scale = (draw(n, d).bfloat16() for _ in range(2))
    inputs = {"x": _long(n, t, d), "shift": shift, "scale": scale}
    _assert_last_sample(ops.layer_norm_modulate, inputs)


@gpu
def test_long_gated_residual() -> None:
    need_memory(32)
    t, d = 1024, 8192
    n = -(-LONG // (t * d))
    with torch.device("cuda"):
        gate = draw(n, d).bfloat16()
    inputs = {"x": _long(n, t, d), "branch": _long(n, t, d), "gate": gate}
    _assert_last_sample(ops.gated_residual, inputs)


@gpu
def test_long_patches() -> None:
    need_memory(28)
    n = -(-LONG // (4 * 256 * 256))
    _assert_last_sample(lambda x: ops.patchify(x, 2), {"x": _long(n, 4, 256, 256)})
    tokens = _long(n, 128 * 128, 16)
    _assert_last_sample(lambda tokens: ops.unpatchify(tokens, 2, 4, (128, 128)), {"tokens": tokens})


@gpu
def test_long_packed_attention() -> None:
    need_memory(20)
    t, heads, head_dim = 256, 16, 72
    n = -(-LONG // (t * 3 * heads * head_dim))
    qkv = _long(n, t, 3, heads, head_dim)
    _assert_last_sample(lambda qkv: ops.attention_qkvpacked(qkv, backend="triton"), {"qkv": qkv})


@gpu
def test_long_cross_attention() -> None:
    """Here q, out and their gradients are long, too."""
    need_memory(28)
    t, heads, head_dim = 256, 16, 72
    n = -(-LONG // (t * heads * head_dim))
    inputs = {"q": _long(n, t, heads, head_dim), "kv": _long(n, 2, 2, heads, head_dim)}
    _assert_last_sample(lambda q, kv: ops.attention(q, *kv.unbind(2), backend="triton"), inputs)


def _assert_last_sample(function: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    """Of the outputs and of all gradients, which arrive as an expanded one."""
    assert next(iter(inputs.values())).numel() > 2**31

    def results(given: dict[str, Tensor]) -> list[Tensor]:
        leaves = {key: value.detach().requires_grad_() for key, value in given.items()}
        out = function(**leaves)
        outputs = out if isinstance(out, tuple) else (out,)
        arriving = [torch.ones((), dtype=o.dtype, device=o.device).expand(o.shape) for o in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), arriving)
        return [result[-1:].clone() for result in (*outputs, *gradients)]

    whole = results(inputs)
    alone = results({key: value[-1:] for key, value in inputs.items()})
    for found, wanted in zip(whole, alone, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1.6e-2, atol=1e-2)
        assert found.isfinite().all()


@gpu
def test_long_gelu() -> None:
    need_memory(24)
    from fastdit.kernels.mlp_gelu import gelu_backward_

    f = 4608
    rows = -(-LONG // f)
    gradient, pre_activation = _long(rows, f), _long(rows, f)
    last = gradient[-64:].clone(), pre_activation[-64:].clone()
    activation, _ = gelu_backward_(gradient, pre_activation)
    alone, _ = gelu_backward_(*last)
    assert_same_bits("activation", activation[-64:], alone)
    assert_same_bits("gradient", gradient[-64:], last[0])
