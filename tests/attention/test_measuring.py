"""Measuring: rows for every backend, reasons for those without numbers, and only what is right is saved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdit
from fastdit import ops
from fastdit.attention import BACKENDS, DIRECTIONS, Case, measure, registry, save

CASE = Case(3, 8, 2, 8, dtype=torch.float32)
QUICK = ("sdpa", "reference", "cudnn")


def test_rows_of_every_backend_and_direction() -> None:
    rows = measure(ops.attention, [CASE], device="cpu", rounds=1)
    assert [(row.direction, row.backend) for row in rows] == [
        (direction, backend) for direction in DIRECTIONS for backend in BACKENDS
    ]
    for row in rows:
        assert row.device == "cpu"
        runs = row.backend in ("sdpa", "sdpa_flash", "triton", "reference")
        assert (row.seconds is not None) == runs == (row.reason is None), row
        assert not runs or row.seconds > 0
    (refused,) = (r for r in rows if (r.direction, r.backend) == ("training", "cudnn"))
    assert refused.reason.endswith("its backward is not deterministic")


@pytest.mark.parametrize("case", [CASE._replace(keys=3), CASE._replace(dtype=torch.bfloat16)])
def test_other_cases(case: Case) -> None:
    rows = measure(ops.attention, [case], device="cpu", backends=QUICK, rounds=1)
    assert {row.backend for row in rows if row.seconds} == {"sdpa", "reference"}
    assert rows[0].key.keys == (case.keys or case.tokens)


def wrong_forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    out = ops.attention(q, k, v, **options)
    return out * 1.001 if options["backend"] == "sdpa" else out


def wrong_gradient(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    out = ops.attention(q, k, v, **options)
    if options["backend"] == "sdpa" and out.requires_grad:
        out = out + 1e-3 * (k.sum() - k.sum().detach())
    return out


class _Wavering:
    """The last bit of the gradient is another one every time."""

    calls = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        out = ops.attention(q, k, v, **options)
        if options["backend"] != "sdpa" or not out.requires_grad:
            return out
        self.calls += 1
        return out + 1e-8 * (self.calls % 2) * (v - v.detach())


@pytest.mark.parametrize(
    ("attention", "directions", "reason"),
    [
        (wrong_forward, DIRECTIONS, "wrong result: output: N1"),
        (wrong_gradient, DIRECTIONS[1:], "wrong result: dk: N3"),
        (_Wavering(), DIRECTIONS[1:2], "wrong result: the same inputs gave other bits"),
    ],
)
def test_wrong_numbers_are_refused(attention: Any, directions: Any, reason: str) -> None:
    """The same shape twice, for a measurement is a median; what is wrong is neither timed nor saved."""
    rows = measure(attention, [CASE], device="cpu", backends=QUICK, rounds=1)
    for row in rows:
        wrong = row.backend == "sdpa" and row.direction in directions
        if wrong:
            assert row.seconds is None
            assert row.reason.startswith(reason)
        else:
            assert (row.seconds is None) == (row.backend == "cudnn"), row
    save(rows)
    for direction in DIRECTIONS:
        key = rows[0].key._replace(direction=direction)
        recorded = registry.fastest("cpu", key)
        assert ("sdpa" in recorded) == (direction not in directions)


def test_what_fails_is_a_reason() -> None:
    def failing(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        raise RuntimeError("no kernel\nimage")

    rows = measure(failing, [CASE], device="cpu", backends=("sdpa",), rounds=1)
    assert {row.reason for row in rows} == {"no kernel image"}
    assert save(rows) == []


def test_saved_rows_are_chosen_from() -> None:
    rows = measure(ops.attention, [CASE], device="cpu", backends=QUICK, rounds=1)
    assert save(rows) == [Path(os.environ["FASTDIT_CACHE"]) / "attention" / "cpu.json"]
    assert set(registry.fastest("cpu", rows[0].key)) == {"sdpa", "reference"}
    assert rows[0].key.batch == 4


def test_bad_input() -> None:
    with fastdit.use_backend("reference"), pytest.raises(ValueError, match="reference"):
        measure(ops.attention, [CASE], device="cpu")
    with pytest.raises(ValueError, match=r"backends='sdap': allowed are .*mean 'sdpa'"):
        measure(ops.attention, [CASE], device="cpu", backends=("sdap",))
    with pytest.raises(ValueError, match="directions='forward'"):
        measure(ops.attention, [CASE], device="cpu", directions=("forward",))
