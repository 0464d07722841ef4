from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdit import ops, reference
from fastdit.testing import Guarded, assert_close, assert_row_local, poisoned_memory

from .helpers import (
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

MODULE = importlib.import_module("fastdit.ops.gated_residual_layer_norm_modulate")
OPERATOR = torch.ops.fastdit.gated_residual_layer_norm_modulate.default
BACKWARD = torch.ops.fastdit.gated_residual_layer_norm_modulate_backward.default

seam = ops.gated_residual_layer_norm_modulate
VECTORS = ["(N, D)", "(D,)", "chunks", "no gate", "only gate", "none"]
WITH_BIAS = ("(D,)", "chunks", "no gate")  # of the layer that made the branch
each_vectors = pytest.mark.parametrize("vectors", VECTORS)


def make(size: tuple[int, int, int], vectors: str, dtype: torch.dtype = torch.float32) -> Inputs:
    n, t, d = size
    shape = (d,) if vectors == "(D,)" else (n, d)
    gate, shift, scale = (draw(*shape, dtype=dtype) for _ in range(3))
    if vectors == "chunks":  # as a block has them: this gate, the next shift and scale
        _, _, gate, shift, scale, _ = draw(n, 6 * d, dtype=dtype).chunk(6, dim=1)
    return {
        "x": draw(n, t, d, dtype=dtype),
        "branch": draw(n, t, d, dtype=dtype),
        "gate": None if vectors in ("no gate", "none") else gate,
        "shift": None if vectors in ("only gate", "none") else shift,
        "scale": None if vectors in ("only gate", "none") else scale,
        "bias": draw(d, dtype=dtype) if vectors in WITH_BIAS else None,
    }


def summed(size: tuple[int, int, int], vectors: str) -> dict[str, int]:
    n, t, _ = size
    terms = n * t if vectors == "(D,)" else t
    return {**dict.fromkeys(("gate", "shift", "scale"), terms), "bias": n * t}


@both_ways
@each_dtype
@each_size
@each_vectors
def test_matches_the_reference(
    dtype: torch.dtype, size: tuple[int, int, int], vectors: str
) -> None:
    inputs = make(size, vectors, dtype)
    assert_operation_close(
        seam, reference.gated_residual_layer_norm_modulate, inputs, summed=summed(size, vectors)
    )


@kernels_only
@each_dtype
@each_kernel_size
def test_kernel_sizes(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    vectors = VECTORS[sum(size) % len(VECTORS)]
    inputs = make(size, vectors, dtype)
    assert_operation_close(
        seam, reference.gated_residual_layer_norm_modulate, inputs, summed=summed(size, vectors)
    )


@both_ways
@each_vectors
def test_is_the_two_operations_in_one(vectors: str) -> None:
    inputs = make((3, 5, 72), vectors)
    x_new, h = seam(**inputs)
    branch, bias = inputs["branch"], inputs["bias"]
    branch = branch if bias is None else branch + bias
    expected = ops.gated_residual(inputs["x"], branch, gate=inputs["gate"])
    assert torch.equal(x_new, expected)
    shift, scale = inputs["shift"], inputs["scale"]
    assert torch.equal(h, ops.layer_norm_modulate(x_new, shift=shift, scale=scale))


@both_ways
@each_vectors
def test_gradcheck(vectors: str) -> None:
    assert_gradcheck(seam, make((2, 3, 5), vectors))


@every_way
@pytest.mark.parametrize("used", [0, 1])
def test_gradient_where_one_output_is_not_used(used: int) -> None:
    inputs = make((2, 4, 8), "(N, D)")
    inputs = {**inputs, "bias": draw(8)}
    given = {name: value.requires_grad_() for name, value in inputs.items()}
    seam(**given)[used].square().sum().backward()
    found = {name: value.grad for name, value in given.items()}
    wide = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    outputs = reference.gated_residual_layer_norm_modulate(**wide)
    outputs[used].square().sum().backward()
    for name, value in wide.items():
        expected = torch.zeros_like(value) if value.grad is None else value.grad
        gradient = torch.zeros_like(given[name]) if found[name] is None else found[name]
        torch.testing.assert_close(
            gradient, expected, check_dtype=False, rtol=1e-5, atol=1e-5, msg=name
        )


@both_ways
@each_vectors
def test_layouts(vectors: str) -> None:
    size = (2, 4, 6)
    assert_layouts_do_not_matter(seam, make(size, vectors), summed=summed(size, vectors))


@kernels_only
@pytest.mark.parametrize(
    "vectors",
    ["chunks", *(pytest.param(v, marks=pytest.mark.slow) for v in VECTORS if v != "chunks")],
)
def test_layouts_of_the_kernel(vectors: str) -> None:
    size = (2, 2, 6)
    assert_layouts_do_not_matter(seam, make(size, vectors), summed=summed(size, vectors))


@every_way
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_mixed_dtypes(stream: torch.dtype) -> None:
    """x_new has the dtype of the stream, h that of the branch."""
    other = torch.bfloat16 if stream is torch.float32 else torch.float32
    inputs = make((2, 8, 16), "(N, D)", other)
    inputs = {**inputs, "x": draw(2, 8, 16, dtype=stream)}
    assert [out.dtype for out in seam(**inputs)] == [stream, other]
    assert_operation_close(
        seam,
        reference.gated_residual_layer_norm_modulate,
        inputs,
        summed=summed((2, 8, 16), "(N, D)"),
    )


@every_way
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_eps(eps: float) -> None:
    drawn = {**make((2, 3, 16), "(N, D)"), "bias": draw(16)}
    inputs = {name: value * 1e-3 for name, value in drawn.items()}
    wide = {name: value.double() for name, value in inputs.items()}
    exact = reference.gated_residual_layer_norm_modulate(**wide, eps=eps)
    plain = reference.gated_residual_layer_norm_modulate(**inputs, eps=eps)
    for i, out in enumerate(seam(**inputs, eps=eps)):
        assert_close(f"output {i}", out, exact[i], plain[i])


@every_way
def test_statistics_are_those_of_the_rounded_stream() -> None:
    """The backward has nothing but x_new: it must see the numbers that the forward saw."""
    x_new, _, mean, rstd = OPERATOR(*make((2, 4, 16), "(N, D)", torch.bfloat16).values(), 1e-6)
    torch.testing.assert_close(mean, x_new.float().mean(-1))
    torch.testing.assert_close(rstd, (x_new.float().var(-1, correction=0) + 1e-6).rsqrt())


@every_way
def test_large_mean_does_not_cancel() -> None:
    inputs = make((2, 4, 256), "(N, D)")
    inputs = {**inputs, "x": inputs["x"] + 1e4}
    assert_operation_close(
        seam,
        reference.gated_residual_layer_norm_modulate,
        inputs,
        summed=summed((2, 4, 256), "(N, D)"),
    )


@every_way
def test_largest_numbers_of_float16() -> None:
    """x and branch of up to 0.9 of the largest number, divided by sqrt(D): as large as the norm of a row can be."""
    inputs = make((2, 4, 64), "(D,)", torch.float16)
    large = 0.9 * torch.finfo(torch.float16).max / 64**0.5
    inputs |= {name: inputs[name].clamp(-1, 1) * large for name in ("x", "branch")}
    inputs = {**inputs, "gate": inputs["gate"].clamp(-1, 1)}  # so that x_new can be represented
    for out in seam(**inputs):
        assert out.dtype is torch.float16
        assert out.isfinite().all()


@every_way
@pytest.mark.parametrize("output", [0, 1])
def test_rows_are_independent(output: int) -> None:
    inputs = make((4, 3, 8), "(N, D)")
    for name in ("x", "branch", "gate"):

        def changed(value: Tensor, name: str = name) -> Tensor:
            return seam(**{**inputs, name: value})[output]

        assert_row_local(name, changed, inputs[name], 1)
    alone = seam(**{name: v if v is None else v[2:3] for name, v in inputs.items()})
    assert torch.equal(seam(**inputs)[output][2:3], alone[output])


@every_way
def test_memory() -> None:
    inputs = {**make((2, 3, 8), "(N, D)"), "bias": draw(8)}
    expected = seam(**inputs)
    guarded = {name: Guarded(value) for name, value in inputs.items()}
    leaves = {name: guard.tensor.requires_grad_() for name, guard in guarded.items()}
    with poisoned_memory():
        out = seam(**leaves)
        (out[0] + out[1]).sum().backward()
    for found, wanted in zip(out, expected, strict=True):
        assert torch.equal(found, wanted)
    for name, guard in guarded.items():
        guard.check(name)
        assert leaves[name].grad.isfinite().all()


def _vectors(case: str) -> list[tuple[Tensor | None, ...]]:
    make, (n, _, d), narrow = opcheck_inputs(case)
    gate, shift, scale = (make(n, d, dtype=narrow) for _ in range(3))
    bias = make(d, dtype=narrow)
    vectors = [(gate, shift, scale, bias), (None, None, None, None)]
    if case == "plain":
        vectors += [(make(d), make(d), make(d), None), (None, shift, scale, bias)]
        vectors += [(gate, None, None, bias)]
    return vectors


@each_opcheck
def test_opcheck(case: str) -> None:
    make, (n, t, d), narrow = opcheck_inputs(case)
    x, branch = make(n, t, d), make(n, t, d, dtype=narrow)
    for vectors in _vectors(case):
        torch.library.opcheck(OPERATOR, (x, branch, *vectors, 1e-6))


@each_opcheck
def test_opcheck_backward(case: str) -> None:
    make, (n, t, d), narrow = opcheck_inputs(case)
    dx_new, dh, x_new = make(n, t, d), make(n, t, d, dtype=narrow), make(n, t, d)
    branch, mean, rstd = make(n, t, d, dtype=narrow), make(n, t), make(n, t).abs()
    for vectors in _vectors(case):
        rest = (*vectors, mean, rstd, vectors[3] is None)
        torch.library.opcheck(BACKWARD, (dh, dx_new, x_new, branch, *rest))
    torch.library.opcheck(BACKWARD, (dh, None, x_new, branch, *_vectors(case)[0], mean, rstd, True))


@kernels_only
@each_vectors
def test_backward_gives_h_again(vectors: str) -> None:
    inputs = make((2, 19, 24), vectors)
    x_new, h, mean, rstd = OPERATOR(*inputs.values(), 1e-6)
    given = (inputs["branch"], *list(inputs.values())[2:])
    out = BACKWARD(torch.ones_like(h), torch.ones_like(h), x_new, *given, mean, rstd, True)
    wide = {name: v if v is None else v.double() for name, v in inputs.items()}
    exact = reference.gated_residual_layer_norm_modulate(**wide)[1]
    assert_close("h", out[6], exact, reference.gated_residual_layer_norm_modulate(**inputs)[1])


def test_fake_shapes() -> None:
    x, vector = torch.empty(2, 3, 8, device="meta"), torch.empty(8, device="meta")
    x_new, h, mean, rstd = OPERATOR(x, x.bfloat16(), None, vector, vector, vector, 1e-6)
    assert [x_new.dtype, h.dtype] == [torch.float32, torch.bfloat16]
    assert [s.shape for s in (x_new, h, mean, rstd)] == [(2, 3, 8), (2, 3, 8), (2, 3), (2, 3)]
    wide = OPERATOR(x.double(), x, None, None, None, None, 1e-6)
    assert [s.dtype for s in wide[2:]] == [torch.float64] * 2
    vectors = (None, vector, vector, vector)
    gradients = BACKWARD(x, None, x, x.bfloat16(), *vectors, mean, rstd, True)
    shapes = [(2, 3, 8), (2, 3, 8), (0,), (8,), (8,), (8,), (2, 3, 8)]
    assert [g.shape for g in gradients] == shapes
    assert gradients[6].dtype == torch.bfloat16
    assert BACKWARD(x, x, x, x, *vectors, mean, rstd, False)[6].shape == (0,)
    assert [g.dtype for g in gradients[:2]] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 8)}, ValueError, r"x: expected shape \(N, T, D\), got \(3, 8\)"),
        ({"branch": torch.ones(2, 4, 8)}, ValueError, r"branch: .*\(2, 3, 8\), got \(2, 4, 8\)"),
        ({"branch": torch.ones(2, 3, 8) + 0j}, TypeError, "branch: .*torch.complex64"),
        ({"gate": torch.ones(3, 8)}, ValueError, r"gate: .*got \(3, 8\)"),
        ({"shift": torch.ones(8, 2)}, ValueError, r"shift: .*got \(8, 2\)"),
        ({"bias": torch.ones(2, 8)}, ValueError, r"bias: expected shape \(8,\).*got \(2, 8\)"),
        ({"scale": None}, ValueError, "scale=None: shift and scale"),
        ({"shift": None}, ValueError, "shift=None: shift and scale"),
        ({"scale": torch.ones(2, 8, device="meta")}, ValueError, "x is on cpu.*scale is on meta"),
    ],
    ids=str,
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    vectors = {name: torch.ones(2, 8) for name in ("gate", "shift", "scale")}
    arguments = {"x": torch.ones(2, 3, 8), "branch": torch.ones(2, 3, 8), **vectors}
    with pytest.raises(error, match=message):
        seam(**{**arguments, **change})
