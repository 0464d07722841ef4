"""The launchers of kernels/attention.py, in the interpreter and on a GPU, against the reference in float64.

The rule is FlashAttention's: an error of at most twice that of plain torch in the same dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdit import reference
from fastdit.kernels import attention
from fastdit.kernels.launch import recording
from fastdit.testing import (
    Guarded,
    assert_close,
    assert_gradient_close,
    assert_same_bits,
    assert_ulps,
    layouts,
    poisoned_memory,
)

FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything is made there; and numpy, in which the interpreter computes, does not warn of NaN and Inf."""
    name: str = getattr(request, "param", "cpu")
    with torch.device(name), np.errstate(all="ignore"):
        yield name


INTERPRETER = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU"),
    id="interpreter",
)
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
each_device = pytest.mark.parametrize("device", [INTERPRETER, GPU], indirect=True)
on_a_gpu = pytest.mark.parametrize("device", [GPU], indirect=True)


def draw(
    n: int, t: int, s: int, heads: int, head_dim: int, dtype: torch.dtype = FLOAT16
) -> tuple[Tensor, Tensor, Tensor]:
    """q (N, T, H, K), k and v (N, S, H, K)."""
    q = torch.randn(n, t, heads, head_dim).to(dtype)
    k, v = (torch.randn(n, s, heads, head_dim).to(dtype) for _ in range(2))
    return q, k, v


def expected(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """out, and dq, dk and dv, of the reference in the dtype of q."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = reference.attention(*leaves, scale=scale)
    return out.detach(), torch.autograd.grad(out, leaves, dout.to(out.dtype))


def logsumexp(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.einsum("nthk,nshk->nhts", q * scale, k).logsumexp(-1)


def run(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    out, lse = attention.forward(q, k, v, scale)
    return out, lse, attention.backward(dout, q, k, v, out, lse, scale)


def assert_attention_close(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, dout: Tensor | None = None
) -> None:
    """out, lse and the gradients by N1, out in 16 bits by N2, too; shapes and dtypes are the inputs'.

    In float32 the backward's p has the rounding of lse, which is of the order of everything else: so N3, a sum's room.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dout = torch.randn(q.shape).to(q.dtype) if dout is None else dout
    t, s, wide = q.shape[1], k.shape[1], q.dtype is FLOAT32
    before = [x.clone() for x in (q, k, v)]
    out, lse, gradients = run(q, k, v, dout, scale)
    plain, plain_gradients = expected(q, k, v, dout, scale)
    exact, exact_gradients = expected(q.double(), k.double(), v.double(), dout, scale)
    assert (out.shape, out.dtype, out.is_contiguous()) == (q.shape, q.dtype, True)
    # The rounding of a row's sum is in the whole row, and the bias of N2 is that of independent errors.
    (assert_gradient_close if wide else assert_close)("out", out, exact, plain)
    exact_lse = logsumexp(q.double(), k.double(), scale)
    assert (lse.shape, lse.dtype) == (exact_lse.shape, FLOAT32)
    plain_lse = logsumexp(q.float(), k.float(), scale)
    assert_gradient_close("lse", lse, exact_lse, plain_lse, summed=s)
    names = {"dq": s, "dk": t, "dv": t}
    every = zip(names.items(), gradients, exact_gradients, plain_gradients, strict=True)
    for (name, summed), found, exactly, plainly in every:
        assert (found.shape, found.dtype) == (exactly.shape, q.dtype), name
        assert_gradient_close(name, found, exactly, plainly, summed=summed if wide else 0)
    for name, x, unchanged in zip("qkv", (q, k, v), before, strict=True):
        assert torch.equal(x, unchanged), f"{name} was changed"


# T, S: every K with each of these, in dtypes that take turns; and few that take many programs, with a K of every split.
SHORT = [(1, 3), (3, 3), (16, 16), (63, 63), (3, 63), (40, 2)]
HEAD_DIMS = [40, 64, 72, 80, 88, 96, 128]
DTYPES = [FLOAT16, FLOAT32, BFLOAT16]
CASES = [
    *(
        (*lengths, head_dim, DTYPES[(i + j) % 3])
        for i, lengths in enumerate(SHORT)
        for j, head_dim in enumerate(HEAD_DIMS)
    ),
    (256, 256, 72, BFLOAT16),
    (128, 128, 64, FLOAT16),
    (256, 256, 128, BFLOAT16),
    (258, 258, 72, FLOAT16),
    (258, 258, 88, BFLOAT16),
    (96, 96, 72, FLOAT32),
    (100, 100, 64, FLOAT32),
    (256, 2, 72, BFLOAT16),
    (256, 2, 64, FLOAT32),
]


def identify(value: Any) -> str:
    return str(value).removeprefix("torch.")


def batch(t: int, s: int, device: str) -> tuple[int, int]:
    """N and H: on a GPU many, so that programs run beside each other; in the interpreter each takes its time."""
    if device == "cuda":
        return 4, 8
    return (2, 2) if t == s == 3 else (1, 1)


@each_device
@pytest.mark.parametrize(("t", "s", "head_dim", "dtype"), CASES, ids=identify)
def test_sizes(t: int, s: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    n, heads = batch(t, s, device)
    assert_attention_close(*draw(n, t, s, heads, head_dim, dtype))


@each_device
def test_a_large_batch() -> None:
    """Programs of every sample, the last included."""
    assert_attention_close(*draw(128, 2, 3, 1, 72, FLOAT16))


# Whole blocks of tokens, and not, with heads of every split; and long sequences.
MORE = [(t, t, head_dim, BFLOAT16) for t in (256, 258) for head_dim in (40, 80, 96)]
LONG = [(1024, 1024, 72, BFLOAT16), (1024, 1024, 64, FLOAT16), (4096, 4096, 72, FLOAT16)]


@pytest.mark.slow
@each_device
@pytest.mark.parametrize(("t", "s", "head_dim", "dtype"), [*MORE, *LONG], ids=identify)
def test_more_sizes(t: int, s: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    n, heads = batch(t, s, device)
    assert_attention_close(*draw(n, t, s, heads, head_dim, dtype))


@on_a_gpu
def test_the_same_bits_a_thousand_times() -> None:
    q, k, v = draw(8, 256, 256, 16, 72, BFLOAT16)
    dout = torch.randn_like(q)
    out, lse, gradients = run(q, k, v, dout, 0.125)
    for _ in range(1000):
        again, again_lse, again_gradients = run(q, k, v, dout, 0.125)
        assert torch.equal(again, out)
        assert torch.equal(again_lse, lse)
        assert all(map(torch.equal, again_gradients, gradients))


@on_a_gpu
def test_captured_and_replayed() -> None:
    q, k, v = draw(2, 256, 256, 16, 72, BFLOAT16)
    dout = torch.randn_like(q)
    run(q, k, v, dout, 0.125)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _, gradients = run(q, k, v, dout, 0.125)
    for x in (q, k, v, dout):
        x.normal_()
    graph.replay()
    expected_out, _, expected_gradients = run(q, k, v, dout, 0.125)
    assert_same_bits("out", out, expected_out)
    for name, found, wanted in zip(("dq", "dk", "dv"), gradients, expected_gradients, strict=True):
        assert_same_bits(name, found, wanted)


@each_device
@pytest.mark.parametrize("head_dim", sorted({*range(8, 136, 8)} - {*HEAD_DIMS}))
def test_every_other_head_dim(head_dim: int) -> None:
    """Nothing comes from beyond K: the gradients of a K that is padded are those of one that is not."""
    assert_attention_close(*draw(1, 3, 5, 1, head_dim, FLOAT16))


@each_device
def test_one_key_is_its_value(device: str) -> None:
    """The softmax of one score is 1: out is v, dv the sum of dout, and q and k get nothing but rounding."""
    q, k, v = draw(2, 3, 1, 2, 72, FLOAT32)
    dout = torch.randn(q.shape)
    out, lse, (dq, dk, dv) = run(q, k, v, dout, 0.125)
    # On a GPU score * scale - largest is one fma: p is 1 but for the rounding of the product, and is divided by itself.
    assert_ulps("out", out, v.expand(q.shape), ulps=0 if device == "cpu" else 8)
    torch.testing.assert_close(lse, logsumexp(q, k, 0.125))
    torch.testing.assert_close(dv, dout.sum(1, keepdim=True))
    # ds = dout v - delta, twice the same sum of 72 products.
    rounding = 72 * torch.finfo(FLOAT32).eps * float((dout * v).abs().sum(-1).max()) * 0.125
    assert float(dq.abs().max()) <= rounding * float(k.abs().max())
    assert float(dk.abs().max()) <= 3 * rounding * float(q.abs().max())


@each_device
def test_heads_and_samples_are_not_mixed() -> None:
    """Each alone gives the bits that it gives among others."""
    q, k, v = draw(2, 5, 3, 2, 72)
    dout = torch.randn(q.shape).half()
    out, lse, gradients = run(q, k, v, dout, 0.125)
    for n in range(2):
        for h in range(2):
            one = [x[n : n + 1, :, h : h + 1] for x in (q, k, v, dout)]
            alone, alone_lse, alone_gradients = run(*one, 0.125)
            assert_same_bits("out", out[n, :, h], alone[0, :, 0])
            assert_same_bits("lse", lse[n, h], alone_lse[0, 0])
            for whole, part in zip(gradients, alone_gradients, strict=True):
                assert_same_bits("gradient", whole[n, :, h], part[0, :, 0])


def packed(n: int, t: int, heads: int, head_dim: int, dtype: torch.dtype = FLOAT16) -> Tensor:
    return torch.randn(n, t, 3, heads, head_dim).to(dtype)


@each_device
@pytest.mark.parametrize("head_dim", [64, 72])
def test_packed_projection(head_dim: int) -> None:
    """q, k and v are read, and their gradients written, where they lie: the same bits as of dense ones."""
    qkv, dout = packed(2, 5, 2, head_dim), torch.randn(2, 5, 2, head_dim).half()
    q, k, v = qkv.unbind(2)
    with recording() as launches:
        attention.forward(q, k, v, 0.125)
    assert [x.data_ptr() for x in launches[0].arguments[:3]] == [x.data_ptr() for x in (q, k, v)]
    out, lse, gradients = run(*(x.contiguous() for x in (q, k, v)), dout, 0.125)
    found, found_lse = attention.forward(q, k, v, 0.125)
    assert_same_bits("out", found, out)
    assert_same_bits("lse", found_lse, lse)
    dqkv = torch.full_like(qkv, math.nan)
    views = attention.backward(dout, q, k, v, out, lse, 0.125, *dqkv.unbind(2))
    assert [x.data_ptr() for x in views] == [x.data_ptr() for x in dqkv.unbind(2)]
    assert_same_bits("packed gradient", dqkv, torch.stack(gradients, 2))


def assert_same_results(name: str, tensors: list[Tensor], dense: list[Tensor]) -> None:
    out, lse, gradients = run(*dense, 0.5)
    found, found_lse, found_gradients = run(*tensors, 0.5)
    assert_same_bits(f"{name}: out", found, out)
    assert_same_bits(f"{name}: lse", found_lse, lse)
    for one, same in zip(found_gradients, gradients, strict=True):
        assert_same_bits(f"{name}: gradient", one, same)


@each_device
@pytest.mark.parametrize("changed", [0, 1, 2, 3], ids=["q", "k", "v", "dout"])
def test_layouts(changed: int) -> None:
    """The same bits in any layout, of inputs, and of the gradient that arrives."""
    tensors = [*draw(1, 3, 3, 1, 8), torch.randn(1, 3, 1, 8).half()]
    for layout, variant in layouts(tensors[changed]).items():
        variants = [*tensors[:changed], variant, *tensors[changed + 1 :]]
        assert_same_results(layout, variants, tensors)


@each_device
def test_strides() -> None:
    """Heads before tokens; samples that lie 52 values apart, which 8 does not divide; k and v in different ways."""
    tensors = [*draw(2, 3, 3, 2, 8), torch.randn(2, 3, 2, 8).half()]
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    apart = []
    for x in tensors:
        buffer = torch.zeros(2, 52).half()
        buffer[:, :48] = x.flatten(1)
        apart.append(buffer[:, :48].view(x.shape))
    assert apart[0].stride(0) == 52
    q, k, v, dout = tensors
    assert_same_results("heads before tokens", swapped, tensors)
    assert_same_results("apart", apart, tensors)
    assert_same_results("k and v", [q, torch.stack([k, k], 2)[:, :, 0], v, dout], tensors)
    ones = torch.ones(()).half().expand(q.shape)  # what .sum() sends back
    assert_same_results("expanded gradient", [q, k, v, ones], [q, k, v, ones.contiguous()])


@each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
def test_large_scores(dtype: torch.dtype) -> None:
    """Of hundreds: 2^x of any would overflow."""
    q, k, v = draw(1, 20, 37, 1, 72, dtype)
    assert_attention_close(30 * q, k, v)


@each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("s", [37, 64])
def test_very_negative_scores(s: int, dtype: torch.dtype) -> None:
    """exp(-lse) of a key past the last, whose score is zero, is infinite."""
    q, k, v = draw(1, 20, s, 1, 72, dtype)
    q, k = 12 + q, k / 10 - 1
    assert float(logsumexp(q.double(), k.double(), 72**-0.5).max()) < -math.log(3.5e38)
    assert_attention_close(q, k, v)


@each_device
@pytest.mark.parametrize("scale", [1e-3, 0.3, 2.0])
def test_scale(scale: float) -> None:
    assert_attention_close(*draw(1, 5, 7, 2, 16, FLOAT32), scale=scale)


@each_device
def test_increasing_scores() -> None:
    """The largest score comes last, so that everything before is rescaled, and what was small vanishes."""
    q, k, v = draw(1, 4, 200, 1, 16)
    q, k = q.abs(), k.abs() * torch.linspace(0, 100, 200).half()[None, :, None, None]
    assert_attention_close(q, k, v)
    assert_attention_close(q, k.flip(1), v)


@each_device
def test_equal_scores_are_a_mean() -> None:
    q, k, v = draw(1, 3, 7, 1, 8, FLOAT32)
    out, lse = attention.forward(q, torch.ones_like(k), v, 1.0)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand(q.shape))
    torch.testing.assert_close(lse, (q.sum(-1) + math.log(7)).transpose(1, 2))


@each_device
@pytest.mark.parametrize("changed", [0, 1, 2, 3], ids=["q", "k", "v", "dout"])
def test_nan_stays_in_its_head(changed: int) -> None:
    tensors = [*draw(2, 3, 5, 2, 16, FLOAT32), torch.randn(2, 3, 2, 16)]
    out, lse, gradients = run(*tensors, 0.25)
    dirty = [x.clone() for x in tensors]
    dirty[changed][1, 2, 0, 3] = math.nan
    found, found_lse, found_gradients = run(*dirty, 0.25)
    clean = torch.ones(2, 2, dtype=torch.bool)
    clean[1, 0] = False
    pairs = zip((found, *found_gradients), (out, *gradients), strict=True)
    for one, same in pairs:
        assert_same_bits("other heads", one.transpose(1, 2)[clean], same.transpose(1, 2)[clean])
    assert_same_bits("other heads' lse", found_lse[clean], lse[clean])
    dq, dk, dv = (x[1, :, 0].isnan() for x in found_gradients)
    if changed == 0:  # the row of the query, and all that is summed over queries
        assert found[1, 2, 0].isnan().all()
        assert not found[1, :2, 0].isnan().any()
        assert found_lse[1, 0].isnan().tolist() == [False, False, True]
        assert dq[2].all()
        assert not dq[:2].any()
        assert dk.all()
        assert dv.all()
    elif changed == 1:  # a key has a score in every row
        assert found[1, :, 0].isnan().all()
        assert found_lse[1, 0].isnan().all()
    elif changed == 2:
        assert found[1, :, 0, 3].isnan().all()
        assert dq.all()
        assert dk.all()
        assert not dv.any()
    else:
        assert dq[2].all()
        assert not dq[:2].any()
        assert dk.all()
        assert dv[:, 3].all()


@each_device
@pytest.mark.parametrize(("t", "s", "head_dim"), [(3, 5, 72), (64, 64, 64), (17, 2, 40)])
def test_memory(t: int, s: int, head_dim: int) -> None:
    """Nothing uninitialised is read, nothing outside of the results is written."""
    tensors = [*draw(2, t, s, 2, head_dim), torch.randn(2, t, 2, head_dim).half()]
    out, lse, gradients = run(*tensors, 0.125)
    guards = [Guarded(x) for x in tensors]
    with poisoned_memory():
        found, found_lse, found_gradients = run(*(guard.tensor for guard in guards), 0.125)
    assert_same_bits("out", found, out)
    assert_same_bits("lse", found_lse, lse)
    for one, same in zip(found_gradients, gradients, strict=True):
        assert_same_bits("gradient", one, same)
    for guard, name in zip(guards, ("q", "k", "v", "dout"), strict=True):
        guard.check(name)


@each_device
def test_tokens_beyond_a_slice_are_not_read_and_not_written() -> None:
    """Of a longer sequence, whose other tokens are NaN."""
    qkv, dout = packed(1, 24, 2, 72), torch.randn(1, 5, 2, 72).half()
    qkv[:, 5:] = math.nan
    q, k, v = (x[:, :5] for x in qkv.unbind(2))
    out, lse = attention.forward(q, k, v, 0.125)
    dqkv = torch.full_like(qkv, 7.0)
    attention.backward(dout, q, k, v, out, lse, 0.125, *(x[:, :5] for x in dqkv.unbind(2)))
    assert out.isfinite().all()
    assert dqkv[:, :5].isfinite().all()
    assert bool((dqkv[:, 5:] == 7.0).all())


@each_device
def test_repeated_calls_give_the_same_bits(device: str) -> None:
    tensors = [*draw(1, 40, 40, 2, 72), torch.randn(1, 40, 2, 72).half()]
    out, lse, gradients = run(*tensors, 0.125)
    for _ in range(2 if device == "cpu" else 100):
        again, again_lse, again_gradients = run(*tensors, 0.125)
        assert_same_bits("out", again, out)
        assert_same_bits("lse", again_lse, lse)
        for one, same in zip(again_gradients, gradients, strict=True):
            assert_same_bits("gradient", one, same)


@each_device
@pytest.mark.parametrize(("n", "t", "s", "heads"), [(0, 4, 4, 2), (2, 0, 3, 2), (2, 3, 0, 2)])
def test_nothing(n: int, t: int, s: int, heads: int) -> None:
    """No sample; no query, so keys get no gradient; no key, so the sum over them is zero and its logarithm -inf."""
    q, k, v = draw(n, t, s, heads, 8)
    with poisoned_memory():
        out, lse, (dq, dk, dv) = run(q, k, v, torch.randn(q.shape).half(), 0.5)
    assert (out.shape, dq.shape, dk.shape, dv.shape) == (q.shape, q.shape, k.shape, v.shape)
    assert lse.shape == (n, heads, t)
    for x in (out, dq, dk, dv):
        assert not x.any()
    if s == 0:
        assert bool((lse == -math.inf).all())


@each_device
def test_no_gradient_is_in_place_of_another() -> None:
    """Given results must fit: a wrong one is refused, and not written past."""
    q, k, v = draw(1, 3, 5, 2, 8)
    out, lse = attention.forward(q, k, v, 0.5)
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({"dq": torch.empty_like(k)}, r"dq: expected torch.float16 \(1, 3, 2, 8\)"),
        ({"dk": torch.empty(k.shape)}, "dk: expected torch.float16"),
        ({"dv": torch.empty(1, 5, 8, 2).half().mT}, "dv: expected .* strides"),
        ({"dv": torch.empty(1, 5, 2, 12).half()[..., :8]}, "dv: .* multiples of 8"),
        ({"dv": torch.empty(1, 5, 2, 16).half()[..., :8]}, "dv: expected the strides of dk"),
    ]
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            attention.backward(out, q, k, v, out, lse, 0.5, **given)


@pytest.mark.parametrize("head_dim", [4, 12, 136, 0])
def test_head_dim_is_refused(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim={head_dim}: allowed are multiples of 8 up to"):
        attention.forward(*draw(1, 2, 2, 1, head_dim), 0.5)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_scale_is_refused(scale: float) -> None:
    q, k, v = draw(1, 2, 2, 1, 8)
    with pytest.raises(ValueError, match=r"scale=.*: expected a positive number"):
        attention.forward(q, k, v, scale)
    with pytest.raises(ValueError, match=r"scale=.*: expected a positive number"):
        attention.backward(q, q, k, v, q, torch.empty(1, 1, 2), scale)


def test_split() -> None:
    """The parts hold K, waste less than 16 columns up to 80 and 24 above, and are powers of two."""
    parts = {head_dim: attention.split(head_dim) for head_dim in range(8, 136, 8)}
    for head_dim, (main, tail) in parts.items():
        assert head_dim <= main + tail < head_dim + 32
        assert main & (main - 1) == tail & (tail - 1) == 0
    assert [parts[k] for k in (64, 72, 80, 88, 96)] == [
        (64, 0),
        (64, 16),
        (64, 16),
        (64, 32),
        (64, 32),
    ]
    assert [parts[k] for k in (8, 16, 24, 40, 104, 128)] == [
        (16, 0),
        (16, 0),
        (32, 0),
        (32, 16),
        (128, 0),
        (128, 0),
    ]
