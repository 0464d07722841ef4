"""The rules themselves: each passes an honest result, and fails on the defect it is there for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdit import testing

N, T, D = 4, 64, 32


def results(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """An honest result, the exact one and the plain one: a product in float32 or wider, rounded once; rounded twice."""
    a, b = torch.randn(N, T, D).to(dtype), torch.randn(N, T, D).to(dtype)
    exact = a.double() * b.double() + a.double()
    wide = torch.float64 if dtype is torch.float32 else torch.float32
    return (a.to(wide) * b.to(wide) + a.to(wide)).to(dtype), exact, a * b + a


each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@each_dtype
def test_honest_results_pass(dtype: torch.dtype) -> None:
    out, exact, plain = results(dtype)
    testing.assert_close("honest", out, exact, plain)
    testing.assert_close("plain", plain, exact, plain)
    testing.assert_gradient_close("honest", out, exact, plain)
    testing.assert_gradient_close("summed", out.sum(1), exact.sum(1), plain.sum(1), summed=T)
    testing.assert_model_close("model", out, exact, plain)
    testing.assert_ulps("ulps", out, exact)
    testing.assert_close("empty", out[:0], exact[:0], plain[:0])
    testing.assert_gradient_close("empty", out[:0], exact[:0], plain[:0])
    testing.assert_ulps("empty", out[:0], exact[:0])


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
    ],
)
def test_results_with_a_graph_are_accepted(dtype: torch.dtype) -> None:
    """What a model returns need not be detached first."""
    out, exact, plain = results(dtype)
    graph = torch.zeros((), dtype=dtype, requires_grad=True)
    testing.assert_close("graph", out + graph, exact, plain)
    testing.assert_model_close("graph", out + graph, exact, plain)
    testing.assert_ulps("graph", out + graph, exact)


@each_dtype
@pytest.mark.parametrize("rule", [testing.assert_close, testing.assert_gradient_close])
def test_one_wrong_element_fails(rule: object, dtype: torch.dtype) -> None:
    out, exact, plain = results(dtype)
    out[1, 2, 3] += 8 * torch.finfo(dtype).eps * exact.abs().max()
    with pytest.raises(AssertionError, match=r"^wrong: N[13] max: .* over the limit"):
        rule("wrong", out, exact, plain)


@each_dtype
def test_result_of_half_the_precision_fails(dtype: torch.dtype) -> None:
    """No element stands out, but all are worse."""
    out, exact, plain = results(dtype)
    noise = (torch.rand(out.shape) - 0.5).sign() * (plain.double() - exact).abs().max()
    coarse = (exact + noise).to(dtype)
    with pytest.raises(AssertionError, match="N2 mean"):
        testing.assert_close("coarse", coarse, exact, plain)


def test_truncation_to_bfloat16_fails() -> None:
    """As a kernel's cast that does not round to nearest: every error has the same sign."""
    out, exact, plain = results(torch.bfloat16)
    bits = exact.float().view(torch.int32)
    truncated = (bits & ~0xFFFF).view(torch.float32)
    low = torch.where(truncated > exact, truncated - truncated.abs() * 2**-7, truncated)
    testing.assert_close("rounded", out, exact, plain)
    with pytest.raises(AssertionError, match="N2 bias"):
        testing.assert_close("truncated", low.bfloat16(), exact, plain)


def test_small_bias_fails() -> None:
    out, exact, plain = results(torch.float32)
    up = torch.nextafter(out, torch.full_like(out, math.inf))
    biased = torch.where(torch.rand(out.shape) < 0.3, up, out)  # a third of the values one unit up
    testing.assert_ulps("biased", biased, exact)
    with pytest.raises(AssertionError, match="N2 bias"):
        testing.assert_close("biased", biased, exact, plain)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "rule", [testing.assert_close, testing.assert_gradient_close, testing.assert_model_close]
)
def test_not_finite_fails(rule: object, bad: float) -> None:
    out, exact, plain = results(torch.float32)
    out[0, 0, 0] = bad
    with pytest.raises(AssertionError, match="bad: 1 values are NaN or Inf"):
        rule("bad", out, exact, plain)


@pytest.mark.parametrize(
    "rule", [testing.assert_close, testing.assert_gradient_close, testing.assert_model_close]
)
def test_wrong_shapes_and_oracles_fail(rule: object) -> None:
    out, exact, plain = results(torch.float32)
    with pytest.raises(AssertionError, match="shapes"):
        rule("shape", out[:1], exact, plain)
    with pytest.raises(AssertionError, match="shapes"):
        rule("shape", out, exact, plain[:, :1])
    with pytest.raises(AssertionError, match="the oracle is float64"):
        rule("oracle", out, exact.float(), plain)


def test_gradient_of_a_sum_may_be_off_by_what_its_length_explains() -> None:
    exact = torch.randn(D).double()
    plain = exact.float()
    step = 2e-6 * exact.abs().max().item()
    off = plain + step
    with pytest.raises(AssertionError, match="N3 max"):
        testing.assert_gradient_close("single", off, exact, plain)
    testing.assert_gradient_close("sum of 64", off, exact, plain, summed=64)
    with pytest.raises(AssertionError, match="N3 max"):
        testing.assert_gradient_close("sum of 64", plain + 25 * step, exact, plain, summed=64)
    narrow = exact.bfloat16()
    wrong = narrow * (1 + 8 * torch.finfo(torch.bfloat16).eps)
    with pytest.raises(AssertionError, match="N3 max"):
        testing.assert_gradient_close("16 bits", wrong, exact, narrow, summed=10**6)


def test_missing_term_of_a_sum_fails() -> None:
    """A kernel that forgets the last tile of rows."""
    _, exact, plain = results(torch.float32)
    testing.assert_gradient_close("whole", plain.sum(1), exact.sum(1), plain.sum(1), summed=T)
    with pytest.raises(AssertionError, match="N3 max"):
        testing.assert_gradient_close(
            "tail", plain[:, :-1].sum(1), exact.sum(1), plain.sum(1), summed=T
        )


@each_dtype
def test_units_in_the_last_place(dtype: torch.dtype) -> None:
    x = torch.randn(100).to(dtype)
    up = torch.nextafter(x, torch.full_like(x, math.inf))
    testing.assert_ulps("one", up, x)
    with pytest.raises(AssertionError, match="N4 1 ulp"):
        testing.assert_ulps("two", torch.nextafter(up, torch.full_like(x, math.inf)), x)
    testing.assert_ulps("two", torch.nextafter(up, torch.full_like(x, math.inf)), x, ulps=4)


def test_same_bits() -> None:
    x = torch.randn(3, 4)
    testing.assert_same_bits("same", x.clone(), x)
    with pytest.raises(AssertionError, match="other: 1 values differ"):
        testing.assert_same_bits("other", x.index_fill(0, torch.tensor(0), 0)[:, :1], x[:, :1])
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_same_bits("shape", x[:2], x)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (0, 4), (1, 1)], ids=str)
def test_layouts_are_the_same_values_elsewhere(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    variants = testing.layouts(x)
    assert len(variants) >= 5
    for name, variant in variants.items():
        assert torch.equal(variant, x), name
    assert variants["shifted by one element"].storage_offset() == 1
    if shape == (2, 3, 4):
        contiguous = {name for name, variant in variants.items() if variant.is_contiguous()}
        assert not contiguous & {"every second element", "transposed"}


def test_row_leak_fails() -> None:
    x = torch.randn(N, T, D)
    testing.assert_row_local("row", lambda x: x * 2, x, 1)
    with pytest.raises(AssertionError, match="other samples with nan in sample 1"):
        testing.assert_row_local("leak", lambda x: x + x.mean(), x, 1)
    with pytest.raises(AssertionError, match="other samples"):
        testing.assert_row_local("neighbour", lambda x: x + 0 * x.roll(1, 0), x, 1)
    with pytest.raises(AssertionError, match="nan in sample 2 vanished"):
        testing.assert_row_local("swallowed", lambda x: x.nan_to_num(), x, 2)


def test_uninitialised_read_fails() -> None:
    x = torch.randn(4)

    def forgetful(x: Tensor, allocate: object) -> Tensor:
        out = allocate(x)
        out[1:] = x[1:]
        return out

    allocators = (
        lambda x: torch.empty_like(x),
        lambda x: torch.empty(4),
        lambda x: x.new_empty(4),
    )
    for allocate in allocators:
        with testing.poisoned_memory():
            out = forgetful(x, allocate)
        assert out[0].isnan()
        assert torch.equal(out[1:], x[1:])
    with testing.poisoned_memory():
        assert torch.empty(2, dtype=torch.int64).dtype == torch.int64
    assert torch.empty.__module__ != "fastdit.testing"  # everything is as it was


@pytest.mark.parametrize("offset", [-1, 12])
def test_write_outside_of_an_allocation_fails(offset: int) -> None:
    def careless() -> None:
        with testing.poisoned_memory():
            out = torch.empty(4, 3).copy_(torch.ones(4, 3))
            out.as_strided((1,), (1,), out.storage_offset() + offset).fill_(0)

    with pytest.raises(AssertionError, match="allocation 0: 1 values were written outside"):
        careless()


@pytest.mark.parametrize("offset", [-1, 4 * 3, -256, 4 * 3 + 255])
def test_write_out_of_bounds_fails(offset: int) -> None:
    x = torch.randn(4, 3)
    guard = testing.Guarded(x)
    assert torch.equal(guard.tensor, x)
    guard.tensor.mul_(2)
    guard.check("inside")
    start = guard.tensor.storage_offset()
    guard.tensor.as_strided((1,), (1,), start + offset).fill_(0)
    with pytest.raises(AssertionError, match="outside: 1 values were written outside"):
        guard.check("outside")


def test_model_rule_in_float32() -> None:
    exact = torch.randn(1000).double()
    plain = exact.float()
    loose = plain * (1 + 1e-4 * torch.randn(1000))
    testing.assert_model_close("plain", plain, exact, plain)
    with pytest.raises(AssertionError, match="N1 max"):
        testing.assert_model_close("out", loose, exact, plain)
    with pytest.raises(AssertionError, match="N8 rms"):
        testing.assert_model_close("as bad as plain", loose, exact, loose)
    one = plain.clone()
    one[3] += 1e-5 * exact.abs().max().item()
    with pytest.raises(AssertionError, match="N1 max"):
        testing.assert_model_close("one element", one, exact, plain)


def test_model_rule_in_16_bits() -> None:
    out, exact, plain = results(torch.bfloat16)
    testing.assert_model_close("honest", out, exact, plain)
    with pytest.raises(AssertionError, match="N2 bias"):
        testing.assert_model_close(
            "biased", (out.float() * 1.004).bfloat16().abs(), exact.abs(), plain.abs()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_rule(dtype: torch.dtype) -> None:
    losses, weights = [1.0, 0.5, 0.25], {"w": torch.randn(10)}
    testing.assert_training_close(losses, list(losses), weights, dict(weights), dtype=dtype)
    step = 5e-5 if dtype is torch.float32 else 0.1
    cases = [
        ([1.0, 0.5 * (1 + step), 0.25], weights, "loss of step 1"),
        ([1.0, math.nan, 0.25], weights, "loss of step 1"),
        (losses, {"w": weights["w"] + 6e-3}, "final w"),
        (losses, {"w": weights["w"] * math.nan}, "final w"),
        (losses[:2], weights, "another number of steps"),
        (losses, {"v": weights["w"]}, "other weights"),
    ]
    for changed, found, message in cases:
        with pytest.raises(AssertionError, match=message):
            testing.assert_training_close(changed, losses, found, weights, dtype=dtype)


def test_trajectory_rule() -> None:
    states = torch.randn(3, 50)
    rms = states[-1].double().pow(2).mean().sqrt()
    testing.assert_trajectory_close("close", states + 0.9e-4 * rms, states)
    off = states.clone()
    off[1] += 1.1e-4 * rms
    with pytest.raises(AssertionError, match="far, step 1: N10 rms"):
        testing.assert_trajectory_close("far", off, states)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        testing.assert_trajectory_close("fewer", states[:2], states)


def test_relative_rms_and_rounding_noise() -> None:
    exact = torch.tensor([3.0, 4.0]).double()
    assert testing.relative_rms(exact + torch.tensor([0.0, 0.5]), exact) == pytest.approx(0.1)
    assert testing.rounding_noise(exact, torch.float32) < 1e-6
    exact = torch.randn(100).double()
    assert 1e-3 < testing.rounding_noise(exact, torch.bfloat16) < 0.1
    assert testing.rounding_noise(exact[:0], torch.float32) == 0
