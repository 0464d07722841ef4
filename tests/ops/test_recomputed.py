from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdit
from fastdit import ops, reference
from fastdit.testing import assert_gradient_close

from .helpers import Inputs, assert_operation_close, draw, fill_native, watch_kernels
from .test_operation import module_of

Function = Callable[..., Any]
N, T, D, OUT = 2, 5, 24, 10


def linear_of_norm(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    h = reference.layer_norm_modulate(x, shift=shift, scale=scale, out_dtype=shift.dtype)
    return F.linear(h, weight, bias)


def linear_of_seam(weight: Tensor, bias: Tensor | None, branch_bias: Any, **seam: Any) -> Any:
    x_new, h = reference.gated_residual_layer_norm_modulate(**seam, bias=branch_bias)
    return x_new, F.linear(h, weight, bias)


def mlp_of_seam(
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, branch_bias: Any, **seam: Any
) -> Any:
    x_new, h = reference.gated_residual_layer_norm_modulate(**seam, bias=branch_bias)
    return x_new, reference.mlp_gelu(h, w1, b1, w2, b2)


def norm_inputs(dtype: torch.dtype, stream: torch.dtype) -> Inputs:
    shift, scale = (draw(N, D, dtype=dtype) for _ in range(2))
    return {"x": draw(N, T, D, dtype=stream), "shift": shift, "scale": scale}


def seam_inputs(dtype: torch.dtype, stream: torch.dtype) -> Inputs:
    gate = draw(N, D, dtype=dtype)
    branch, branch_bias = draw(N, T, D, dtype=dtype), draw(D, dtype=dtype)
    given = {"branch": branch, "gate": gate, "branch_bias": branch_bias}
    return {**norm_inputs(dtype, stream), **given}


def linear_inputs(dtype: torch.dtype) -> Inputs:
    return {"weight": draw(OUT, D, dtype=dtype), "bias": draw(OUT, dtype=dtype)}


def mlp_inputs(dtype: torch.dtype) -> Inputs:
    return {
        "w1": draw(OUT, D, dtype=dtype),
        "b1": draw(OUT, dtype=dtype),
        "w2": draw(D, OUT, dtype=dtype),
        "b2": draw(D, dtype=dtype),
    }


CASES: dict[str, tuple[Function, Function, Function, Function]] = {
    "layer_norm_modulate_linear": (
        ops.layer_norm_modulate_linear,
        linear_of_norm,
        norm_inputs,
        linear_inputs,
    ),
    "gated_residual_layer_norm_modulate_linear": (
        ops.gated_residual_layer_norm_modulate_linear,
        linear_of_seam,
        seam_inputs,
        linear_inputs,
    ),
    "gated_residual_layer_norm_modulate_mlp_gelu": (
        ops.gated_residual_layer_norm_modulate_mlp_gelu,
        mlp_of_seam,
        seam_inputs,
        mlp_inputs,
    ),
}
each_case = pytest.mark.parametrize("name", CASES)
SUMMED = {
    **dict.fromkeys(("shift", "scale", "gate"), T),
    **dict.fromkeys(("branch_bias", "weight", "bias", "w1", "b1", "w2", "b2"), N * T),
}
OPERATIONS = ("layer_norm_modulate", "gated_residual_layer_norm_modulate", "mlp_gelu")


ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["plain", "operator", "interpreter", ON_GPU])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As `every_way`, for functions of several operations; gives the names of the operations as they run."""
    way = request.param
    if way == "interpreter" and torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU")
    calls: list[list[str]] = []
    if way == "operator":
        calls = [fill_native(monkeypatch, module_of(name)) for name in OPERATIONS]
    elif way != "plain":
        calls = [watch_kernels(monkeypatch, module_of(name)) for name in OPERATIONS]
    with (
        fastdit.use_backend("triton" if way in ("interpreter", "cuda") else "auto"),
        torch.device("cuda" if way == "cuda" else "cpu"),
        np.errstate(all="ignore"),
    ):
        yield lambda: sorted(name for names in calls for name in names)


@pytest.mark.parametrize(
    ("dtype", "stream"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
@each_case
def test_numbers(way: Any, name: str, dtype: torch.dtype, stream: torch.dtype) -> None:
    function, plain, make, make_weights = CASES[name]
    inputs = {**make(dtype, stream), **make_weights(dtype)}
    assert_operation_close(function, plain, inputs, summed=SUMMED)


@each_case
def test_what_runs(way: Any, name: str) -> None:
    """Forward once; backward the seam's only, but a first norm, which has no cheaper way, a second time."""
    function, _, make, make_weights = CASES[name]
    inputs = {**make(torch.float32, torch.float32), **make_weights(torch.float32)}
    with torch.no_grad():
        function(**inputs)
    seam = name.replace("_linear", "").replace("_mlp_gelu", "")
    with_mlp = name.endswith("mlp_gelu")
    if way():
        assert way() == [seam] + ["mlp_gelu_inference"] * with_mlp
    before = len(way())
    out = function(**{key: value.requires_grad_() for key, value in inputs.items()})
    (out if isinstance(out, Tensor) else out[0].sum() + out[1]).sum().backward()
    if way():
        forward = [seam] * (2 if seam == "layer_norm_modulate" else 1)
        expected = [*forward, f"{seam}_backward", *(["mlp_gelu", "mlp_gelu_backward"] * with_mlp)]
        assert len(way()) == before + len(expected)
        assert set(expected) <= set(way())


@pytest.mark.parametrize("way", ["operator", "interpreter", ON_GPU], indirect=True)
@each_case
def test_nothing_normalised_is_kept(way: Any, name: str) -> None:
    """What the backward holds on to, in elements: neither h nor the activation."""
    function, _, make, make_weights = CASES[name]
    given = {**make(torch.float32, torch.float32), **make_weights(torch.float32)}
    inputs = {key: value.requires_grad_() for key, value in given.items()}
    storages = {value.untyped_storage().data_ptr() for value in inputs.values()}
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        if saved.untyped_storage().data_ptr() not in storages:
            kept[saved.untyped_storage().data_ptr()] = saved.numel()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        out = function(**inputs)
    new = sorted(kept.values())
    rows = [N * T, N * T]  # mean and rstd
    stream = [] if name == "layer_norm_modulate_linear" else [N * T * D]
    hidden = [N * T * OUT] if "mlp" in name else []  # the pre-activation
    assert new == sorted(rows + stream + hidden)
    del out


@each_case
def test_frozen_weights(way: Any, name: str) -> None:
    function, plain, make, make_weights = CASES[name]
    frozen = make_weights(torch.float32)
    inputs = make(torch.float32, torch.float32)

    def gradients(run: Function, dtype: torch.dtype) -> tuple[Tensor, ...]:
        given = {key: value.to(dtype).requires_grad_() for key, value in inputs.items()}
        out = run(**given, **{key: value.to(dtype) for key, value in frozen.items()})
        loss = out.square().sum() if isinstance(out, Tensor) else out[1].square().sum()
        return torch.autograd.grad(loss, list(given.values()))

    exact, narrow = gradients(plain, torch.float64), gradients(plain, torch.float32)
    found = gradients(function, torch.float32)
    for key, *three in zip(inputs, found, exact, narrow, strict=True):
        assert_gradient_close(key, *three, summed=SUMMED.get(key, 0))


@pytest.mark.parametrize("name", [name for name in CASES if "residual" in name])
def test_only_the_stream_is_used(way: Any, name: str) -> None:
    function, plain, make, make_weights = CASES[name]
    given = {**make(torch.float32, torch.float32), **make_weights(torch.float32)}
    inputs = {key: value.requires_grad_() for key, value in given.items()}

    def gradients(run: Function) -> tuple[Tensor, ...]:
        loss = run(**inputs)[0].square().sum()
        found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        pairs = zip(inputs.values(), found, strict=True)
        return tuple(torch.zeros_like(v) if g is None else g for v, g in pairs)

    for found, expected in zip(gradients(function), gradients(plain), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("linear")])
def test_without_bias(way: Any, name: str) -> None:
    function, plain, make, make_weights = CASES[name]
    inputs = {**make(torch.float32, torch.float32), **make_weights(torch.float32), "bias": None}
    assert_operation_close(function, plain, inputs, summed=SUMMED)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "layer_norm_modulate_linear",
            {"weight": torch.ones(OUT, D + 1)},
            rf"weight: expected shape \(out, {D}\).*got \({OUT}, {D + 1}\)",
        ),
        (
            "gated_residual_layer_norm_modulate_linear",
            {"bias": torch.ones(OUT + 1)},
            rf"bias: expected shape \({OUT},\), got \({OUT + 1},\)",
        ),
        (
            "gated_residual_layer_norm_modulate_linear",
            {"branch": torch.ones(N, T + 1, D)},
            "branch: expected the shape of x",
        ),
        (
            "gated_residual_layer_norm_modulate_mlp_gelu",
            {"w1": torch.ones(OUT)},
            rf"w1: expected shape \(out, {D}\)",
        ),
        (
            "gated_residual_layer_norm_modulate_mlp_gelu",
            {"w2": torch.ones(OUT, D)},
            rf"w2.*expected shapes? \({D}, {OUT}\)",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bad_input(name: str, change: Inputs, message: str, backend: str) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("tensors of the CPU")
    function, _, make, make_weights = CASES[name]
    given = {**make(torch.float32, torch.float32), **make_weights(torch.float32), **change}
    inputs = {key: value.requires_grad_() for key, value in given.items()}
    with fastdit.use_backend(backend), pytest.raises(ValueError, match=message):
        function(**inputs)
