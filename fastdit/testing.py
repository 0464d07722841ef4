"""The numeric rules N1-N10 that tests hold every fast path to, so that no test needs a tolerance of its own.

Three results of one computation on the same inputs, which are rounded to the tested dtype once:
`exact` is the reference in float64, `plain` the reference in the tested dtype, `out` what is tested.

| rule | what | where |
|---|---|---|
| N1 | max error at most twice that of plain torch, plus rounding noise | `assert_close` |
| N2 | mean error at most 1.5 times that of plain torch, and no bias | `assert_close` |
| N3 | gradients: N1, with room for the length of a reduced sum | `assert_gradient_close` |
| N4 | bit-exact, or within one unit in the last place, where no order of arithmetic is free | `assert_ulps` |
| N5 | the same bits in any layout, batch or position | `layouts`, `assert_same_bits` |
| N6 | NaN and Inf stay in their row | `assert_row_local` |
| N7 | nothing uninitialised is read, nothing outside is written | `poisoned_memory`, `Guarded` |
| N8 | whole models: 1e-5 of the output's rms in float32, N1 and N2 below | `assert_model_close` |
| N9 | training curves: loss of every step and all final weights | `assert_training_close` |
| N10 | trajectories of samplers: 1e-4 of the final state's rms | `assert_trajectory_close` |

The factors are those that flash-attention (N1), quack (N3) and Liger-Kernel (N9) test with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor


def relative_rms(out: Tensor, exact: Tensor) -> float:
    """`||out - exact|| / ||exact||`, in float64."""
    out, exact = out.detach().double(), exact.detach().double()
    return float((out - exact).norm() / exact.norm())


def rounding_noise(exact: Tensor, dtype: torch.dtype) -> float:
    """a0: twice the largest error of adding and subtracting 0.3 in `dtype`, the floor under N1 where plain is exact."""
    rounded = exact.to(dtype)
    return 2 * float(((rounded + 0.3 - 0.3) - rounded).abs().max()) if exact.numel() else 0.0


def _errors(name: str, out: Tensor, exact: Tensor, plain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if out.shape != exact.shape or plain.shape != exact.shape:
        raise AssertionError(
            f"{name}: shapes {tuple(out.shape)}, {tuple(exact.shape)}, {tuple(plain.shape)}"
        )
    if exact.dtype is not torch.float64:
        raise AssertionError(f"{name}: exact has dtype {exact.dtype}, the oracle is float64")
    if not bool(out.isfinite().all()):
        raise AssertionError(f"{name}: {int((~out.isfinite()).sum())} values are NaN or Inf")
    exact = exact.detach()
    return out.detach().double() - exact, plain.detach().double() - exact, exact


def _require(name: str, rule: str, error: float, limit: float) -> None:
    if not error <= limit:
        raise AssertionError(f"{name}: {rule}: {error:.3e} is over the limit of {limit:.3e}")


def assert_close(name: str, out: Tensor, exact: Tensor, plain: Tensor) -> None:
    """N1 and N2: max error <= 2 max|plain - exact| + a0, mean error <= 1.5 mean|plain - exact| + a0 / 4, no bias."""
    error, plain_error, exact = _errors(name, out, exact, plain)
    if not error.numel():
        return
    a0 = rounding_noise(exact, out.dtype)
    _require(name, "N1 max", float(error.abs().max()), 2 * float(plain_error.abs().max()) + a0)
    _require(
        name, "N2 mean", float(error.abs().mean()), 1.5 * float(plain_error.abs().mean()) + a0 / 4
    )
    rms = float(exact.pow(2).mean().sqrt())
    free = 4 * torch.finfo(out.dtype).eps / math.sqrt(error.numel()) * rms
    _require(
        name, "N2 bias", abs(float(error.mean())), max(free, 1.5 * abs(float(plain_error.mean())))
    )


def assert_gradient_close(
    name: str, out: Tensor, exact: Tensor, plain: Tensor, *, summed: int = 0
) -> None:
    """N3: N1, where a gradient summed over `summed` terms may also be off by what the length of the sum explains.

    That is `5e-6 * sqrt(summed)` of the largest value in float32, and `2 * eps` of it in 16 bits. 0 is for a gradient
    that is no sum.
    """
    error, plain_error, exact = _errors(name, out, exact, plain)
    if not error.numel():
        return
    limit = 2 * float(plain_error.abs().max()) + rounding_noise(exact, out.dtype)
    if summed:
        largest = float(exact.abs().max())
        wide = out.dtype in (torch.float32, torch.float64)
        eps = 5e-6 * math.sqrt(summed) if wide else 2 * torch.finfo(out.dtype).eps
        limit += eps * largest
    _require(name, "N3 max", float(error.abs().max()), limit)


def assert_ulps(name: str, out: Tensor, expected: Tensor, *, ulps: int = 1) -> None:
    """N4: every value within `ulps` units in the last place of `expected`, in the dtype of `out`."""
    out, expected = out.detach(), expected.detach().to(out.dtype)
    spacing = (
        torch.nextafter(expected.abs(), torch.full_like(expected, math.inf)) - expected.abs()
    ).double()
    off = (
        ((out.double() - expected.double()).abs() / spacing).max()
        if out.numel()
        else torch.zeros(())
    )
    _require(name, f"N4 {ulps} ulp", float(off), ulps)


def assert_same_bits(name: str, out: Tensor, expected: Tensor) -> None:
    """N4, N5: equal to the last bit."""
    if not torch.equal(out, expected):
        differing = int((out != expected).sum()) if out.shape == expected.shape else -1
        raise AssertionError(
            f"{name}: {differing} values differ, shapes {out.shape} and {expected.shape}"
        )


def layouts(x: Tensor) -> dict[str, Tensor]:
    """N5: the same values in other memory layouts (at least one dimension)."""
    spaced = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)
    spaced[..., ::2] = x
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    shifted[1:] = x.reshape(-1)
    variants = {
        "every second element": spaced[..., ::2],
        "shifted by one element": shifted[1:].view(x.shape),
        "transposed": x.mT.contiguous().mT if x.dim() > 1 else x.clone(),
        "flipped twice": x.flip(0).flip(0),
        "sliced from a larger batch": torch.cat([x, x])[: len(x)],
    }
    return variants


def assert_row_local(name: str, function: Callable[[Tensor], Tensor], x: Tensor, row: int) -> None:
    """N6: a NaN or an Inf in one sample of `x` changes no other sample of `function(x)`, and does not vanish."""
    clean = function(x)
    for value in (math.nan, math.inf):
        dirty = x.clone()
        dirty[row].view(-1)[0] = value
        out = function(dirty)
        others = [i for i in range(len(x)) if i != row]
        assert_same_bits(
            f"{name}: other samples with {value} in sample {row}", out[others], clean[others]
        )
        if bool(out[row].isfinite().all()):
            raise AssertionError(f"{name}: {value} in sample {row} vanished")


class Guarded:
    """N7: a copy of a tensor with 256 NaN before and after it in memory; `check` raises if one was written."""

    SIZE = 256

    def __init__(self, x: Tensor) -> None:
        self._buffer = torch.full(
            (x.numel() + 2 * self.SIZE,), math.nan, dtype=x.dtype, device=x.device
        )
        self.tensor = self._buffer[self.SIZE : self.SIZE + x.numel()].view(x.shape)
        self.tensor.copy_(x)

    def check(self, name: str) -> None:
        guards = torch.cat([self._buffer[: self.SIZE], self._buffer[-self.SIZE :]])
        if not bool(guards.isnan().all()):
            raise AssertionError(
                f"{name}: {int((~guards.isnan()).sum())} values were written outside of the tensor"
            )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """N7: what `torch.empty`, `empty_like` and `new_empty` give holds NaN instead of whatever was there.

    It lies between guards, too: writing past its ends raises AssertionError at the end of the block.
    """
    guards: list[Guarded] = []

    def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: object, **kwargs: object) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
                return tensor
            if not tensor.is_contiguous():
                return tensor.fill_(math.nan)
            guards.append(Guarded(tensor.fill_(math.nan)))
            return guards[-1].tensor

        return allocate_poisoned

    with (
        mock.patch.object(torch, "empty", poisoning(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoning(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poisoning(Tensor.new_empty)),
    ):
        yield
    for i, guard in enumerate(guards):
        guard.check(f"allocation {i}")


def assert_model_close(name: str, out: Tensor, exact: Tensor, plain: Tensor) -> None:
    """N8: in float32 the rms error is at most 1e-5 of the output's rms, and N1; in 16 bits N1 and N2."""
    if out.dtype is not torch.float32:
        assert_close(name, out, exact, plain)
        return
    error, plain_error, exact = _errors(name, out, exact, plain)
    limit = 2 * float(plain_error.abs().max()) + rounding_noise(exact, out.dtype)
    _require(name, "N1 max", float(error.abs().max()), limit)
    _require(name, "N8 rms", relative_rms(out, exact), 1e-5)


def assert_training_close(
    losses: Sequence[float],
    expected_losses: Sequence[float],
    weights: dict[str, Tensor],
    expected_weights: dict[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """N9: the loss of every step within 2e-5 (float32) or 1e-2 + 5e-2 (16 bits), every final weight within 5e-3."""
    rtol, atol = (2e-5, 0.0) if dtype is torch.float32 else (5e-2, 1e-2)
    if len(losses) != len(expected_losses) or weights.keys() != expected_weights.keys():
        raise AssertionError("N9: another number of steps or other weights")
    for step, (loss, expected) in enumerate(zip(losses, expected_losses, strict=True)):
        _require(f"loss of step {step}", "N9", abs(loss - expected), atol + rtol * abs(expected))
    for name, weight in weights.items():
        expected_weight = expected_weights[name].double()
        error = (weight.double() - expected_weight).abs() - 1e-5 * expected_weight.abs()
        _require(f"final {name}", "N9", float(error.max()), 5e-3)


def assert_trajectory_close(name: str, states: Tensor, expected: Tensor) -> None:
    """N10: states (steps, ...) of a sampler; every error at most 1e-4 of the final state's rms."""
    rms = float(expected[-1].double().pow(2).mean().sqrt())
    for step, (state, target) in enumerate(zip(states, expected, strict=True)):
        error = float((state.double() - target.double()).pow(2).mean().sqrt())
        _require(f"{name}, step {step}", "N10 rms", error, 1e-4 * rms)
