"""Times every usable backend on given shapes, for `registry`; nothing is recorded of one whose numbers are wrong.

The results of a backend are held against the reference in float64 by the rules of `fastdit.testing`: as near to it as
the reference in the same dtype, times two. That is done for the first and the last sample and head, since attention
mixes neither.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import active_backend
from ..reference import operations as reference
from ..testing import assert_close, assert_gradient_close
from ..validation import require_choice
from . import choice, registry
from .backends import BACKENDS
from .registry import DIRECTIONS, Key, bucket, device_name

# Whatever keeps a backend from running is a reason in its row: packages raise what they like.
FAILURES = (RuntimeError, ValueError, TypeError, AssertionError, ImportError, OSError)
SAMPLE_SECONDS = 2e-3

Attention = Callable[..., Tensor]


class Case(NamedTuple):
    """A shape: q (batch, tokens, heads, head_dim), k and v with `keys` instead of tokens, None for as many."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    keys: int | None = None
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Row:
    """What was measured of one backend in one case and direction, or the reason why nothing was."""

    device: str
    case: Case
    direction: str
    backend: str
    seconds: float | None
    reason: str | None

    @property
    def key(self) -> Key:
        case = self.case
        return Key(
            str(case.dtype).removeprefix("torch."),
            bucket(case.batch),
            case.tokens,
            case.tokens if case.keys is None else case.keys,
            case.heads,
            case.head_dim,
            self.direction,
        )


def measure(
    attention: Attention,
    cases: Iterable[Case],
    *,
    device: torch.device | str,
    backends: Sequence[str] = tuple(BACKENDS),
    directions: Sequence[str] = DIRECTIONS,
    rounds: int = 11,
) -> list[Row]:
    """One row for each case, direction and backend: the median of `rounds` samples, in seconds a call.

    `attention` is `fastdit.ops.attention`, which lies on the floor above. A training direction is a forward and a
    backward. On CUDA the clock is that of the GPU (events), on CPU wall time. `training` skips the backends whose
    backward is not deterministic.

    Raises ValueError for an unknown backend or direction, and where `use_backend` would make all backends one.
    """
    if active_backend() != "auto":
        raise ValueError(f"use_backend({active_backend()!r}): measure asks for each backend itself")
    for backend in backends:
        require_choice("backends", backend, BACKENDS)
    for direction in directions:
        require_choice("directions", direction, DIRECTIONS)
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    rows = []
    # Events are recorded on the stream of the current device, which has to be the one that computes.
    with torch.cuda.device(device if device.type == "cuda" else -1):
        for case in cases:
            for direction in directions:
                rows += _measure(attention, case, direction, device, backends, rounds)
    return rows


def save(rows: Iterable[Row]) -> list[Path]:
    """Adds what was measured to this user's files, from which `auto` then chooses; the files.

    What could not run and what was wrong is not recorded.
    """
    rows = list(rows)
    paths = []
    for device in dict.fromkeys(row.device for row in rows):
        measured = [
            (row.key, row.backend, row.seconds)
            for row in rows
            if row.device == device and row.seconds is not None
        ]
        if measured:
            paths.append(registry.save(device, measured))
    choice.forget()
    return paths


def _measure(
    attention: Attention,
    case: Case,
    direction: str,
    device: torch.device,
    backends: Sequence[str],
    rounds: int,
) -> list[Row]:
    training, deterministic = direction != "inference", direction == "training"
    inputs, dout = _draw(case, device, training)
    corners, dcorner = [_corner(x).requires_grad_(training) for x in inputs], _corner(dout)
    plain = _run(reference.attention, corners, dcorner)
    wide = [x.detach().double().requires_grad_(training) for x in corners]
    exact = _run(reference.attention, wide, dcorner.double())

    def prepare(backend: str) -> Callable[[], list[Tensor]]:
        reasons = BACKENDS[backend].reasons_not_usable(*inputs)
        if training and deterministic and not BACKENDS[backend].is_deterministic(inputs[0]):
            reasons = [*reasons, "its backward is not deterministic"]
        if reasons:
            raise ValueError("; ".join(reasons))

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, backend=backend, deterministic=deterministic)

        found = _run(call, inputs, dout)
        _check(found, exact, plain, case)
        if deterministic and not all(map(torch.equal, found, _run(call, inputs, dout))):
            raise AssertionError("the same inputs gave other bits")
        return lambda: _run(call, inputs, dout)

    clocks: dict[str, _Clock] = {}
    reasons: dict[str, str] = {}
    for backend in backends:
        try:
            clocks[backend] = _Clock(prepare(backend), device)
        except FAILURES as failure:
            wrong = "wrong result: " if isinstance(failure, AssertionError) else ""
            reasons[backend] = wrong + " ".join(str(failure).split())[:300]
    samples: dict[str, list[float]] = {backend: [] for backend in clocks}
    for turn in range(rounds):  # in turns, so that a drift of the clock rate meets all alike
        for backend in list(clocks)[:: 1 if turn % 2 == 0 else -1]:
            samples[backend].append(clocks[backend].sample())
    name = device_name(device)
    return [
        Row(
            name,
            case,
            direction,
            backend,
            statistics.median(samples[backend]) if backend in samples else None,
            reasons.get(backend),
        )
        for backend in backends
    ]


def _draw(case: Case, device: torch.device, training: bool) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the gradient of the output; q, k and v are views of one projection where they are equally long."""
    n, t, heads, head_dim, keys, dtype = case
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    if keys is None or keys == t:
        q, k, v = normal(n, t, 3, heads, head_dim).unbind(2)
    else:
        q, (k, v) = normal(n, t, heads, head_dim), normal(n, keys, 2, heads, head_dim).unbind(2)
    inputs = [x.detach().requires_grad_(training) for x in (q, k, v)]
    return inputs, normal(n, t, heads, head_dim)


def _corner(x: Tensor) -> Tensor:
    """The first and the last sample and head of (N, T, H, K)."""
    samples, heads = sorted({0, x.shape[0] - 1}), sorted({0, x.shape[2] - 1})
    return x.detach()[samples][:, :, heads]


def _run(attention: Attention, inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    """The output, and the gradients of the inputs where they want any."""
    with torch.set_grad_enabled(inputs[0].requires_grad):
        out = attention(*inputs)
    if not out.requires_grad:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def _check(found: list[Tensor], exact: list[Tensor], plain: list[Tensor], case: Case) -> None:
    """Raises AssertionError unless these are as near to float64 as the reference in the same dtype."""
    out, *gradients = map(_corner, found)
    assert_close("output", out, exact[0], plain[0])
    for i, gradient in enumerate(gradients, start=1):
        name = ("out", "dq", "dk", "dv")[i]
        assert_gradient_close(name, gradient, exact[i], plain[i], summed=case.tokens)


class _Clock:
    """Seconds a call, the mean of as many calls as take about `SAMPLE_SECONDS`."""

    def __init__(self, run: Callable[[], object], device: torch.device) -> None:
        self.run, self.on_gpu, self.calls = run, device.type == "cuda", 1
        self.sample()  # warm-up: handles, allocations, compilation
        self.calls = max(1, min(100, round(SAMPLE_SECONDS / max(self.sample(), 1e-9))))

    def sample(self) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            for _ in range(self.calls):
                self.run()
            return (time.perf_counter() - start) / self.calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self.calls):
            self.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / self.calls
