from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastdit
from fastdit import ops, reference
from fastdit.testing import Guarded, assert_row_local, layouts, poisoned_memory

from .helpers import (
    Inputs,
    assert_gradcheck,
    assert_operation_close,
    draw,
    each_dtype,
)

each_backend = pytest.mark.parametrize("backend", ["auto", "reference"])
each_size = pytest.mark.parametrize(
    ("n", "t", "s", "heads", "head_dim"),
    [
        (2, 16, 16, 2, 64),
        (1, 9, 9, 2, 72),  # DiT-XL's
        (2, 7, 2, 3, 20),  # the cross-attention block's two tokens
        (2, 1, 3, 1, 8),
        (2, 5, 3, 1, 1),
        (0, 4, 4, 2, 8),
    ],
)


def make(
    n: int, t: int, s: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> Inputs:
    k, v = (draw(n, s, heads, head_dim, dtype=dtype) for _ in range(2))
    return {"q": draw(n, t, heads, head_dim, dtype=dtype), "k": k, "v": v}


@each_backend
@each_dtype
@each_size
def test_matches_the_reference(
    backend: str, dtype: torch.dtype, n: int, t: int, s: int, heads: int, head_dim: int
) -> None:
    inputs = make(n, t, s, heads, head_dim, dtype)
    with fastdit.use_backend(backend):
        assert_operation_close(
            ops.attention, reference.attention, inputs, summed={"k": max(t, 2), "v": max(t, 2)}
        )


@each_backend
@pytest.mark.parametrize("scale", [None, 0.0, 0.3, 2.0])
def test_scale(backend: str, scale: float | None) -> None:
    inputs = make(2, 5, 4, 2, 8, torch.float64)
    with fastdit.use_backend(backend):
        found = ops.attention(**inputs, scale=scale)
    q, k, v = (value.transpose(1, 2) for value in inputs.values())
    weights = (q @ k.mT * (8**-0.5 if scale is None else scale)).softmax(-1)
    torch.testing.assert_close(found, (weights @ v).transpose(1, 2))
    torch.testing.assert_close(
        found, F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    )


@each_backend
def test_gradcheck(backend: str) -> None:
    with fastdit.use_backend(backend):
        assert_gradcheck(ops.attention, make(1, 3, 2, 2, 4))


@each_backend
def test_layouts(backend: str) -> None:
    """The matrix products take other paths for other strides, so the bits may differ, the accuracy may not."""
    inputs = make(2, 4, 6, 2, 8)
    packed = draw(2, 4, 3, 2, 8).unbind(2)  # how a block hands them out
    variants = [dict(zip("qkv", packed, strict=True))]
    for name, value in inputs.items():
        variants += [{**inputs, name: variant} for variant in layouts(value).values()]
    with fastdit.use_backend(backend):
        for variant in variants:
            sums = dict.fromkeys("qkv", 6)
            assert_operation_close(ops.attention, reference.attention, variant, summed=sums)


@each_backend
def test_one_key_is_its_value(backend: str) -> None:
    q, k, v = make(2, 3, 1, 2, 8).values()
    with fastdit.use_backend(backend):
        assert torch.equal(ops.attention(q, k, v), v.expand(2, 3, 2, 8))


@each_backend
def test_rows_and_memory(backend: str) -> None:
    inputs = make(3, 4, 4, 2, 8)
    with fastdit.use_backend(backend):
        expected = ops.attention(**inputs)
        q, k, v = inputs.values()
        assert_row_local("v", lambda v: ops.attention(q, k, v), v, 1)
        for changed in ("q", "k"):  # a NaN there may give a weight of zero, but in its sample only
            dirty = inputs[changed].clone()
            dirty[1] = torch.nan
            out = ops.attention(**{**inputs, changed: dirty})
            assert torch.equal(out[[0, 2]], expected[[0, 2]])
        guarded = {name: Guarded(value) for name, value in inputs.items()}
        with poisoned_memory():
            out = ops.attention(**{n: g.tensor.requires_grad_() for n, g in guarded.items()})
            out.sum().backward()
    assert torch.equal(out, expected)
    for name, guard in guarded.items():
        guard.check(name)
        assert guard.tensor.grad.isfinite().all()


@each_backend
def test_large_logits_do_not_overflow(backend: str) -> None:
    inputs = {name: value * 5 for name, value in make(2, 8, 8, 2, 16, torch.float16).items()}
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    with fastdit.use_backend(backend):
        out = ops.attention(**leaves)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())


def test_fake_shapes() -> None:
    q, k = torch.empty(2, 5, 2, 8, device="meta"), torch.empty(2, 3, 2, 8, device="meta")
    for backend in ("auto", "reference"):
        with fastdit.use_backend(backend):
            assert ops.attention(q, k, k).shape == (2, 5, 2, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(2, 4, 8)}, ValueError, r"q, k, v: expected shapes .*got \(2, 4, 8\)"),
        ({"k": torch.ones(2, 3, 2, 8)}, ValueError, r"got .*\(2, 3, 2, 8\), \(2, 4, 2, 8\)"),
        ({"q": torch.ones(2, 4, 3, 8)}, ValueError, r"got \(2, 4, 3, 8\)"),
        ({"q": torch.ones(3, 4, 2, 8)}, ValueError, r"got \(3, 4, 2, 8\)"),
        ({"v": torch.ones(2, 4, 2, 8).double()}, TypeError, "v: .*dtype of q.*got torch.float64"),
        ({"k": torch.ones(2, 4, 2, 8).int()}, TypeError, "k: .*torch.int32"),
        ({"k": None}, TypeError, "k: expected a tensor, got NoneType"),
        ({"v": torch.ones(2, 4, 2, 8, device="meta")}, ValueError, "q is on cpu.*v is on meta"),
    ],
    ids=lambda value: "" if isinstance(value, type) else str(value)[:40],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.attention(**{**make(2, 4, 4, 2, 8), **change})
