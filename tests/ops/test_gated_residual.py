from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from fastdit import ops, reference
from fastdit.testing import (
    Guarded,
    assert_gradient_close,
    assert_row_local,
    assert_same_bits,
    assert_ulps,
    poisoned_memory,
)

from .helpers import (
    KERNEL_SIZES,
    Inputs,
    assert_gradcheck,
    assert_layouts_do_not_matter,
    assert_operation_close,
    both_ways,
    draw,
    each_dtype,
    each_kernel_size,
    each_opcheck,
    each_size,
    every_way,
    kernels_only,
    opcheck_inputs,
)

MODULE = importlib.import_module("fastdit.ops.gated_residual")
OPERATOR = torch.ops.fastdit.gated_residual.default
BACKWARD = torch.ops.fastdit.gated_residual_backward.default

GATES = ["(N, D)", "(D,)", "chunk", "none"]
each_gate = pytest.mark.parametrize("gate", GATES)


def make(size: tuple[int, int, int], gate: str, dtype: torch.dtype = torch.float32) -> Inputs:
    n, t, d = size
    gates = {
        "none": None,
        "(D,)": draw(d, dtype=dtype),
        "(N, D)": draw(n, d, dtype=dtype),
        "chunk": draw(n, 6 * d, dtype=dtype).chunk(6, dim=1)[5],
    }
    return {
        "x": draw(n, t, d, dtype=dtype),
        "branch": draw(n, t, d, dtype=dtype),
        "gate": gates[gate],
    }


def summed(size: tuple[int, int, int], gate: str) -> dict[str, int]:
    return {"gate": size[0] * size[1] if gate == "(D,)" else size[1]}


@both_ways
@each_dtype
@each_size
@each_gate
def test_matches_the_reference(dtype: torch.dtype, size: tuple[int, int, int], gate: str) -> None:
    inputs = make(size, gate, dtype)
    assert_operation_close(
        ops.gated_residual, reference.gated_residual, inputs, summed=summed(size, gate)
    )


@kernels_only
@each_dtype
@each_kernel_size
def test_kernel_sizes(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    gate = GATES[sum(size) % 3]
    inputs = make(size, gate, dtype)
    assert_operation_close(
        ops.gated_residual, reference.gated_residual, inputs, summed=summed(size, gate)
    )


@kernels_only
@each_dtype
def test_kernel_without_a_gate(dtype: torch.dtype) -> None:
    for size in KERNEL_SIZES[::4]:
        assert_operation_close(
            ops.gated_residual, reference.gated_residual, make(size, "none", dtype), summed={}
        )


@kernels_only
@pytest.mark.parametrize("gate", ["(N, D)", "(D,)"])
def test_sums_of_many_slices(gate: str) -> None:
    """More slices of 16 tokens than the second stage adds at once, the last one shorter."""
    size = (2, 16 * 8 + 3, 3)
    dx, branch, vector = make(size, gate).values()
    over = (1,) if vector.dim() == 2 else (0, 1)
    exact, plain = (dx.double() * branch.double()).sum(over), (dx * branch).sum(over)
    dgate = BACKWARD(dx, branch, vector)[1]
    assert_gradient_close("dgate", dgate, exact, plain, summed=summed(size, gate)["gate"])


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_operator_without_a_gate(dtype: torch.dtype) -> None:
    for dx in (draw(2, 3, 8), draw(2, 1, 8).expand(2, 3, 8), draw(2, 8, 3).mT):
        dbranch, dgate = BACKWARD(dx, draw(2, 3, 8, dtype=dtype), None)
        assert_same_bits("dbranch", dbranch, dx.to(dtype))
        assert dbranch.is_contiguous()
        assert dbranch.data_ptr() != dx.data_ptr()
        assert dgate.shape == (0,)


@kernels_only
@each_gate
@pytest.mark.parametrize("size", [(0, 4, 8), (2, 0, 8)], ids=str)
def test_kernel_of_nothing(size: tuple[int, int, int], gate: str) -> None:
    inputs = {name: value for name, value in make(size, gate).items() if value is not None}
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    out = ops.gated_residual(**leaves)
    assert out.shape == size
    for name, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves.values()), strict=True):
        assert torch.equal(gradient, torch.zeros_like(inputs[name])), name


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_exact_to_one_unit_in_the_last_place(dtype: torch.dtype) -> None:
    """Whether with one rounding, a fused multiply-add, or two; where nothing cancels."""
    inputs = {name: value.abs() for name, value in make((3, 7, 33), "(N, D)", dtype).items()}
    x, branch, gate = (value.double() for value in inputs.values())
    assert_ulps("gate", ops.gated_residual(**inputs), x + gate.unsqueeze(1) * branch)
    assert_ulps("no gate", ops.gated_residual(inputs["x"], inputs["branch"]), x + branch)


@both_ways
@each_gate
def test_gradcheck(gate: str) -> None:
    assert_gradcheck(ops.gated_residual, make((2, 3, 5), gate))


@every_way
@each_gate
def test_layouts(gate: str) -> None:
    size = (2, 4, 6)
    assert_layouts_do_not_matter(ops.gated_residual, make(size, gate), summed=summed(size, gate))


@every_way
def test_expanded_inputs() -> None:
    n, t, d = 3, 4, 6
    inputs = {
        "x": draw(1, 1, d).expand(n, t, d),
        "branch": draw(n, 1, d).expand(n, t, d),
        "gate": draw(1, d).expand(n, d),
    }
    dense = {name: value.contiguous() for name, value in inputs.items()}
    expected = ops.gated_residual(**dense)
    assert_same_bits("x_new", ops.gated_residual(**inputs), expected)
    column = draw(n, 1)
    assert_same_bits(
        "gate of one column",
        ops.gated_residual(inputs["x"], inputs["branch"], gate=column.expand(n, d)),
        ops.gated_residual(dense["x"], dense["branch"], gate=column.repeat(1, d)),
    )
    dx, branch, gate = inputs.values()
    expected_gradients = BACKWARD(dense["x"], dense["branch"], dense["gate"])
    for found, wanted in zip(BACKWARD(dx, branch, gate), expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted)


@every_way
@pytest.mark.parametrize(
    ("x_dtype", "branch_dtype", "gate_dtype"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
    ],
    ids=["wide stream", "narrow stream", "wide gate"],
)
def test_mixed_dtypes(
    x_dtype: torch.dtype, branch_dtype: torch.dtype, gate_dtype: torch.dtype
) -> None:
    inputs = {
        "x": draw(2, 8, 16, dtype=x_dtype),
        "branch": draw(2, 8, 16, dtype=branch_dtype),
        "gate": draw(2, 16, dtype=gate_dtype),
    }
    for given in (inputs, {**inputs, "gate": None}):
        assert_operation_close(
            ops.gated_residual, reference.gated_residual, given, summed={"gate": 8}
        )


@every_way
def test_rows_are_independent() -> None:
    inputs = make((4, 3, 8), "(N, D)")
    for name in ("x", "branch", "gate"):
        assert_row_local(
            name,
            lambda value, name=name: ops.gated_residual(**{**inputs, name: value}),
            inputs[name],
            1,
        )
    alone = ops.gated_residual(**{name: value[2:3] for name, value in inputs.items()})
    assert torch.equal(ops.gated_residual(**inputs)[2:3], alone)
    dx, branch, gate = inputs.values()
    for i, name in enumerate(("dbranch", "dgate")):
        assert_row_local(name, lambda dx, i=i: BACKWARD(dx, branch, gate)[i], dx, 1)


@every_way
@pytest.mark.parametrize("size", [(2, 3, 8), (2, 19, 7)], ids=str)
def test_memory(size: tuple[int, int, int]) -> None:
    inputs = make(size, "(N, D)")
    expected = ops.gated_residual(**inputs)
    guarded = {name: Guarded(value) for name, value in inputs.items()}
    leaves = {name: guard.tensor.requires_grad_() for name, guard in guarded.items()}
    with poisoned_memory():
        out = ops.gated_residual(**leaves)
        out.sum().backward()
    assert torch.equal(out, expected)
    for name, guard in guarded.items():
        guard.check(name)
        assert leaves[name].grad.isfinite().all()


@kernels_only
def test_nothing_is_written_outside_of_the_results() -> None:
    inputs = make((2, 19, 7), "(N, D)")
    with poisoned_memory():
        OPERATOR(**inputs)
        BACKWARD(inputs["x"], inputs["branch"], inputs["gate"])


@kernels_only
def test_without_a_gate_nothing_is_kept() -> None:
    out = ops.gated_residual(draw(2, 3, 8), draw(2, 3, 8).requires_grad_())
    assert out.grad_fn.saved_tensors == ()


@each_opcheck
def test_opcheck(case: str) -> None:
    make, (n, t, d), narrow = opcheck_inputs(case)
    x, branch = make(n, t, d), make(n, t, d, dtype=narrow)
    for gate in (make(n, d, dtype=narrow), make(d), None):
        torch.library.opcheck(OPERATOR, (x, branch, gate))


@each_opcheck
def test_opcheck_backward(case: str) -> None:
    make, (n, t, d), narrow = opcheck_inputs(case)
    dx, branch = make(n, t, d), make(n, t, d, dtype=narrow)
    for gate in (make(n, d, dtype=narrow), make(d), None):
        torch.library.opcheck(BACKWARD, (dx, branch, gate))


def test_fake_shapes() -> None:
    x, gate = torch.empty(2, 3, 8, device="meta"), torch.empty(8, device="meta")
    out = OPERATOR(x, x.bfloat16(), gate)
    assert (out.shape, out.dtype) == ((2, 3, 8), torch.float32)
    dbranch, dgate = BACKWARD(x, x.bfloat16(), gate)
    assert (dbranch.dtype, dgate.shape) == (torch.bfloat16, (8,))
    assert BACKWARD(x, x, None)[1].shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 8)}, ValueError, r"x: expected shape \(N, T, D\), got \(3, 8\)"),
        ({"branch": torch.ones(2, 1, 8)}, ValueError, r"branch: .*\(2, 3, 8\), got \(2, 1, 8\)"),
        ({"branch": torch.ones(2, 3, 8) > 0}, TypeError, "branch: .*torch.bool"),
        ({"gate": torch.ones(2, 1, 8)}, ValueError, r"gate: .*got \(2, 1, 8\)"),
        ({"gate": torch.ones(1, 8)}, ValueError, r"gate: .*\(2, 8\) or \(8,\).*got \(1, 8\)"),
        ({"gate": 1.0}, TypeError, "gate: expected a tensor, got float"),
        ({"branch": torch.ones(2, 3, 8, device="meta")}, ValueError, "x is on cpu.*on meta"),
        ({"gate": torch.ones(2, 8, device="meta")}, ValueError, "x is on cpu.*gate is on meta"),
    ],
    ids=str,
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "x": torch.ones(2, 3, 8),
        "branch": torch.ones(2, 3, 8),
        "gate": torch.ones(2, 8),
    }
    with pytest.raises(error, match=message):
        ops.gated_residual(**{**arguments, **change})
