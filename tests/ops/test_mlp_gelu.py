from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from fastdit import ops, reference
from fastdit.testing import Guarded, assert_close, assert_row_local, layouts, poisoned_memory

from .helpers import (
    Inputs,
    assert_gradcheck,
    assert_operation_close,
    both_ways,
    draw,
    each_dtype,
    each_kernel_size,
    each_size,
    every_way,
    kernels_only,
    opcheck_inputs,
)

MODULE = importlib.import_module("fastdit.ops.mlp_gelu")
OPERATOR = torch.ops.fastdit.mlp_gelu.default
INFERENCE = torch.ops.fastdit.mlp_gelu_inference.default
BACKWARD = torch.ops.fastdit.mlp_gelu_backward.default


def make(shape: tuple[int, ...], f: int, dtype: torch.dtype = torch.float32) -> Inputs:
    d = shape[-1]
    return {
        "x": draw(*shape, dtype=dtype),
        "w1": draw(f, d, dtype=dtype),
        "b1": draw(f, dtype=dtype),
        "w2": draw(d, f, dtype=dtype),
        "b2": draw(d, dtype=dtype),
    }


def summed(rows: int) -> dict[str, int]:
    return dict.fromkeys(("w1", "b1", "w2", "b2"), max(rows, 2))


@both_ways
@each_dtype
@each_size
def test_matches_the_reference(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    n, t, d = size
    assert_operation_close(
        ops.mlp_gelu, reference.mlp_gelu, make(size, 4 * d, dtype), summed=summed(n * t)
    )


@kernels_only
@each_dtype
@each_kernel_size
def test_kernel_sizes(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """The odd sizes as F, too, and more than one block of columns."""
    n, t, d = size
    f = {1152: 513, 1500: 8}.get(d, d)
    inputs = make((n, t, min(d, 40)), f, dtype)
    assert_operation_close(ops.mlp_gelu, reference.mlp_gelu, inputs, summed=summed(n * t))


@every_way
def test_both_ends_of_gelu() -> None:
    """Where tanh is 1 or -1, and where exp(2 u) is infinite."""
    x = torch.tensor([-1e4, -90.0, -20.0, -10.0, -5.0, 0.0, 5.0, 10.0, 20.0, 90.0, 1e4])
    identity = torch.eye(11)
    inputs = {"x": x, "w1": identity, "b1": torch.zeros(11), "w2": identity, "b2": torch.zeros(11)}
    assert_operation_close(ops.mlp_gelu, reference.mlp_gelu, inputs, summed=summed(1))


@every_way
def test_without_a_backward() -> None:
    inputs = make((2, 3, 8), 16)
    exact = reference.mlp_gelu(**{name: value.double() for name, value in inputs.items()})
    out = ops.mlp_gelu(**inputs)
    assert_close("out", out, exact, reference.mlp_gelu(**inputs))
    with torch.no_grad():
        inputs["x"].requires_grad_()
        torch.testing.assert_close(ops.mlp_gelu(**inputs), out, rtol=0, atol=0)


@every_way
def test_frozen_weights() -> None:
    inputs = make((2, 3, 8), 16)
    x = inputs["x"].requires_grad_()
    (dx,) = torch.autograd.grad(ops.mlp_gelu(**inputs).sum(), [x])
    (expected,) = torch.autograd.grad(reference.mlp_gelu(**inputs).sum(), [x])
    torch.testing.assert_close(dx, expected)


@every_way
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 2, 3, 16)], ids=str)
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    assert_operation_close(ops.mlp_gelu, reference.mlp_gelu, make(shape, 5), summed=summed(12))


@both_ways
def test_gradcheck() -> None:
    assert_gradcheck(ops.mlp_gelu, make((2, 3, 4), 5))


@both_ways
def test_layouts() -> None:
    """The matrix products take other paths for other strides, so the bits may differ, the accuracy may not."""
    inputs = make((2, 4, 6), 8)
    for name, value in inputs.items():
        for variant in layouts(value).values():
            given = {**inputs, name: variant}
            assert_operation_close(ops.mlp_gelu, reference.mlp_gelu, given, summed=summed(8))


@both_ways
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(weights: torch.dtype, x_dtype: torch.dtype) -> None:
    inputs = {**make((2, 8, 16), 64, weights), "x": draw(2, 8, 16, dtype=x_dtype)}
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.mlp_gelu(**leaves)
        plain = reference.mlp_gelu(**inputs)
    exact = reference.mlp_gelu(**{name: value.detach().double() for name, value in inputs.items()})
    assert out.dtype == torch.bfloat16
    assert_close("autocast", out, exact, plain)
    out.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == inputs[name].dtype, name


@every_way
def test_rows_are_independent() -> None:
    inputs = make((4, 3, 8), 16)
    assert_row_local("x", lambda x: ops.mlp_gelu(**{**inputs, "x": x}), inputs["x"], 1)


@every_way
def test_memory() -> None:
    inputs = make((2, 3, 8), 16)
    expected = ops.mlp_gelu(**inputs)
    guarded = {name: Guarded(value) for name, value in inputs.items()}
    leaves = {name: guard.tensor.requires_grad_() for name, guard in guarded.items()}
    with poisoned_memory():
        out = ops.mlp_gelu(**leaves)
        out.sum().backward()
    assert torch.equal(out, expected)
    for name, guard in guarded.items():
        guard.check(name)
        assert leaves[name].grad.isfinite().all()


def test_backward_keeps_the_pre_activation_only() -> None:
    x, w1, b1, w2, b2 = make((2, 3, 8), 16).values()
    out, pre_activation = OPERATOR(x, w1, b1, w2, b2)
    torch.testing.assert_close(pre_activation, x @ w1.T + b1)
    torch.testing.assert_close(out, reference.mlp_gelu(x, w1, b1, w2, b2))


@pytest.mark.parametrize("case", ["plain", "transposed", "batch 0", "odd"])
def test_opcheck(case: str) -> None:
    make, (n, t, d), _ = opcheck_inputs(case)
    arguments = (make(n, t, d), make(16, d), make(16), make(d, 16), make(d))
    torch.library.opcheck(OPERATOR, arguments)
    torch.library.opcheck(INFERENCE, arguments)


@pytest.mark.parametrize("case", ["plain", "transposed", "batch 0", "odd"])
def test_opcheck_backward(case: str) -> None:
    make, (n, t, d), _ = opcheck_inputs(case)
    arguments = (make(n, t, d), make(16, d), make(d, 16), make(n, t, 16))
    for with_weights in (True, False):
        torch.library.opcheck(BACKWARD, (*arguments, with_weights))


def test_fake_shapes() -> None:
    x, w1, b1, w2, b2 = (torch.empty_like(v, device="meta") for v in make((2, 3, 8), 16).values())
    out, pre_activation = OPERATOR(x, w1, b1, w2, b2)
    assert (out.shape, pre_activation.shape) == ((2, 3, 8), (2, 3, 16))
    gradients = BACKWARD(out, w1, w2, pre_activation, True)
    assert [g.shape for g in gradients] == [(2, 3, 8), (2, 3, 16), (16,), (8, 16), (8,)]
    assert [g.numel() for g in BACKWARD(out, w1, w2, pre_activation, False)[2:]] == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 3, 7)}, ValueError, r"w1: expected shape \(16, 7\).*got \(16, 8\)"),
        ({"b1": torch.ones(8)}, ValueError, r"b1: expected shape \(16,\).*got \(8,\)"),
        ({"w2": torch.ones(16, 8)}, ValueError, r"w2: expected shape \(8, 16\).*got \(16, 8\)"),
        ({"b2": torch.ones(16)}, ValueError, r"b2: expected shape \(8,\).*got \(16,\)"),
        ({"b1": None}, TypeError, "b1: expected a tensor, got NoneType"),
        ({"w1": torch.ones(16, 8).bfloat16()}, TypeError, "w1 is torch.bfloat16.*one dtype"),
        ({"x": torch.ones(2, 3, 8).to_sparse()}, TypeError, "x: .*torch.sparse_coo"),
        ({"w2": torch.ones(8, 16, device="meta")}, ValueError, "w2 is on meta"),
    ],
    ids=lambda value: "" if isinstance(value, type) else str(value)[:40],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.mlp_gelu(**{**make((2, 3, 8), 16), **change})
