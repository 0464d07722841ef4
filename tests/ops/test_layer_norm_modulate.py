from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

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

MODULE = importlib.import_module("fastdit.ops.layer_norm_modulate")
OPERATOR = torch.ops.fastdit.layer_norm_modulate.default
BACKWARD = torch.ops.fastdit.layer_norm_modulate_backward.default


VECTORS = ["(N, D)", "(D,)", "chunks", "none"]
each_vectors = pytest.mark.parametrize("vectors", VECTORS)


def make(size: tuple[int, int, int], vectors: str, dtype: torch.dtype = torch.float32) -> Inputs:
    n, t, d = size
    x = draw(n, t, d, dtype=dtype)
    if vectors == "none":
        return {"x": x, "shift": None, "scale": None}
    if vectors == "chunks":  # what adaLN_modulation(c).chunk(6) hands out
        chunks = draw(n, 6 * d, dtype=dtype).chunk(6, dim=1)
        return {"x": x, "shift": chunks[3], "scale": chunks[4]}
    shape = (n, d) if vectors == "(N, D)" else (d,)
    return {"x": x, "shift": draw(*shape, dtype=dtype), "scale": draw(*shape, dtype=dtype)}


def summed(size: tuple[int, int, int], vectors: str) -> dict[str, int]:
    n, t, _ = size
    terms = n * t if vectors == "(D,)" else t
    return {"shift": terms, "scale": terms}


@both_ways
@each_dtype
@each_size
@each_vectors
def test_matches_the_reference(
    dtype: torch.dtype, size: tuple[int, int, int], vectors: str
) -> None:
    inputs = make(size, vectors, dtype)
    assert_operation_close(
        ops.layer_norm_modulate, reference.layer_norm_modulate, inputs, summed=summed(size, vectors)
    )


@kernels_only
@each_dtype
@each_kernel_size
def test_kernel_sizes(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    vectors = VECTORS[sum(size) % len(VECTORS)]
    inputs = make(size, vectors, dtype)
    assert_operation_close(
        ops.layer_norm_modulate, reference.layer_norm_modulate, inputs, summed=summed(size, vectors)
    )


@both_ways
@each_vectors
def test_gradcheck(vectors: str) -> None:
    assert_gradcheck(ops.layer_norm_modulate, make((2, 3, 5), vectors))


@both_ways
@each_vectors
def test_layouts(vectors: str) -> None:
    assert_layouts_do_not_matter(
        ops.layer_norm_modulate, make((2, 4, 6), vectors), summed=summed((2, 4, 6), vectors)
    )


@kernels_only
@pytest.mark.parametrize(
    "vectors",
    ["chunks", *(pytest.param(v, marks=pytest.mark.slow) for v in VECTORS if v != "chunks")],
)
def test_layouts_of_the_kernel(vectors: str) -> None:
    size = (2, 2, 6)
    assert_layouts_do_not_matter(
        ops.layer_norm_modulate, make(size, vectors), summed=summed(size, vectors)
    )


@every_way
@pytest.mark.parametrize(
    ("x_dtype", "vector_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["wide stream", "wide vectors"],
)
def test_mixed_dtypes(x_dtype: torch.dtype, vector_dtype: torch.dtype) -> None:
    inputs = {
        "x": draw(2, 8, 16, dtype=x_dtype),
        "shift": draw(2, 16, dtype=vector_dtype),
        "scale": draw(2, 16, dtype=vector_dtype),
    }
    assert_operation_close(
        ops.layer_norm_modulate,
        reference.layer_norm_modulate,
        inputs,
        summed={"shift": 8, "scale": 8},
    )


@every_way
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.5])
def test_eps_and_out_dtype(eps: float) -> None:
    x, shift, scale = draw(2, 3, 16) * 1e-3, draw(2, 16), draw(2, 16)
    exact = reference.layer_norm_modulate(
        x.double(), shift=shift.double(), scale=scale.double(), eps=eps
    )
    plain = reference.layer_norm_modulate(x, shift=shift, scale=scale, eps=eps)
    for out_dtype in (None, torch.bfloat16, torch.float64):
        out = ops.layer_norm_modulate(x, shift=shift, scale=scale, eps=eps, out_dtype=out_dtype)
        assert out.dtype == (out_dtype or torch.float32)
        assert_close(f"{out_dtype}", out, exact, plain.to(out.dtype))
    _, mean, rstd = OPERATOR(x, shift, scale, eps, torch.bfloat16)
    assert mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean, x.mean(-1))
    torch.testing.assert_close(rstd, (x.var(-1, correction=0) + eps).rsqrt())


@every_way
def test_large_mean_does_not_cancel() -> None:
    """A variance as E[x^2] - E[x]^2 would lose everything here."""
    x = draw(2, 4, 256) + 1e4
    inputs = {"x": x, "shift": draw(2, 256), "scale": draw(2, 256)}
    assert_operation_close(
        ops.layer_norm_modulate,
        reference.layer_norm_modulate,
        inputs,
        summed={"shift": 4, "scale": 4},
    )


@kernels_only
def test_rounding_of_a_large_mean_does_not_show() -> None:
    """x and x - 2^16, both exact in float32, have one h: no worse from the former than plain torch is from the latter.

    The mean is of 3 values, so that it is not exact.
    """
    near = (draw(2, 4, 3) * 2**6).round() / 2**6
    vectors = {"shift": draw(2, 3), "scale": draw(2, 3)}
    exact = reference.layer_norm_modulate(
        near.double(), **{name: value.double() for name, value in vectors.items()}
    )
    plain = reference.layer_norm_modulate(near, **vectors)
    assert_close("h", ops.layer_norm_modulate(near + 2**16, **vectors), exact, plain)


@kernels_only
@pytest.mark.parametrize("vectors", ["(N, D)", "(D,)"])
def test_sums_of_several_slices(vectors: str) -> None:
    size = (2, 19, 8)
    assert_operation_close(
        ops.layer_norm_modulate,
        reference.layer_norm_modulate,
        make(size, vectors),
        summed=summed(size, vectors),
    )


@every_way
def test_largest_numbers_of_float16() -> None:
    inputs = make((2, 4, 64), "(N, D)", torch.float16)
    inputs = {**inputs, "x": inputs["x"].clamp(-1, 1) * (0.9 * 65504 / 64**0.5)}
    assert ops.layer_norm_modulate(**inputs).isfinite().all()


@every_way
def test_rows_are_independent() -> None:
    inputs = make((4, 3, 8), "(N, D)")
    assert_row_local("x", lambda x: ops.layer_norm_modulate(**{**inputs, "x": x}), inputs["x"], 1)
    assert_row_local(
        "scale", lambda s: ops.layer_norm_modulate(**{**inputs, "scale": s}), inputs["scale"], 2
    )
    whole = ops.layer_norm_modulate(**inputs)
    alone = ops.layer_norm_modulate(**{name: value[2:3] for name, value in inputs.items()})
    assert torch.equal(whole[2:3], alone)


@every_way
def test_memory() -> None:
    inputs = make((2, 3, 8), "(N, D)")
    expected = ops.layer_norm_modulate(**inputs)
    guarded = {name: Guarded(value) for name, value in inputs.items()}
    leaves = {name: guard.tensor.requires_grad_() for name, guard in guarded.items()}
    with poisoned_memory():
        out = ops.layer_norm_modulate(**leaves)
        out.sum().backward()
    assert torch.equal(out, expected)
    for name, guard in guarded.items():
        guard.check(name)
        assert leaves[name].grad.isfinite().all()


@each_opcheck
def test_opcheck(case: str) -> None:
    make, (n, t, d), narrow = opcheck_inputs(case)
    x, shift, scale = make(n, t, d), make(n, d, dtype=narrow), make(n, d, dtype=narrow)
    torch.library.opcheck(OPERATOR, (x, shift, scale, 1e-6, narrow))
    torch.library.opcheck(OPERATOR, (x, make(d), make(d), 1e-6, narrow))
    torch.library.opcheck(OPERATOR, (x, None, None, 1e-6, narrow))


@each_opcheck
def test_opcheck_backward(case: str) -> None:
    make, (n, t, d), narrow = opcheck_inputs(case)
    x, dh, mean, rstd = make(n, t, d), make(n, t, d, dtype=narrow), make(n, t), make(n, t).abs()
    vectors = make(n, d, dtype=narrow), make(n, d, dtype=narrow)
    torch.library.opcheck(BACKWARD, (dh, x, *vectors, mean, rstd))
    torch.library.opcheck(BACKWARD, (dh, x, make(d), make(d), mean, rstd))
    torch.library.opcheck(BACKWARD, (dh, x, None, None, mean, rstd))


def test_fake_shapes() -> None:
    x, vector = torch.empty(2, 3, 8, device="meta"), torch.empty(2, 8, device="meta")
    h, mean, rstd = OPERATOR(x.bfloat16(), vector, vector, 1e-6, torch.float16)
    assert (h.shape, h.dtype, h.device.type) == (x.shape, torch.float16, "meta")
    assert [(s.shape, s.dtype) for s in (mean, rstd)] == [((2, 3), torch.float32)] * 2
    assert OPERATOR(x.double(), None, None, 1e-6, torch.float64)[1].dtype == torch.float64
    assert ops.layer_norm_modulate(x, shift=vector, scale=vector).shape == x.shape
    gradients = BACKWARD(x, x, vector, None, mean, rstd)
    assert [g.shape for g in gradients] == [(2, 3, 8), (2, 8), (0,)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 8)}, ValueError, r"x: expected shape \(N, T, D\), got \(3, 8\)"),
        ({"x": torch.ones(2, 3, 8, dtype=torch.int64)}, TypeError, "x: .*torch.int64"),
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"shift": torch.ones(3, 8)}, ValueError, r"shift: .*\(2, 8\) or \(8,\).*got \(3, 8\)"),
        ({"scale": torch.ones(2, 1, 8)}, ValueError, r"scale: .*got \(2, 1, 8\)"),
        ({"scale": torch.ones(2, 8) > 0}, TypeError, "scale: .*torch.bool"),
        ({"shift": None}, ValueError, "shift=None: shift and scale"),
        ({"scale": None}, ValueError, "scale=None: shift and scale"),
        ({"scale": torch.ones(2, 8, device="meta")}, ValueError, "x is on cpu.*scale is on meta"),
    ],
    ids=str,
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.ones(2, 3, 8), "shift": torch.ones(2, 8), "scale": torch.ones(2, 8)}
    with pytest.raises(error, match=message):
        ops.layer_norm_modulate(**{**arguments, **change})


def test_shift_and_scale_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional"):
        ops.layer_norm_modulate(torch.ones(2, 3, 8), torch.ones(2, 8), torch.ones(2, 8))
