"""Every wrong input is answered before anything is computed, by an error that names the argument and its value.

What is odd but right (other layouts, empty batches, casts, copies, hooks) is in test_composition.py and test_dit.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastdit
from fastdit import ops, validate
from fastdit.models import DiTBlock

from .helpers import TINY, make_inputs, make_model

MODEL = make_model()
UNCONDITIONAL = make_model(class_dropout_prob=0.0)
X, T, Y = make_inputs(MODEL, n=2)


def call(**changes: Any) -> Callable[[], Any]:
    return lambda: MODEL(**{"x": X, "t": T, "y": Y, **changes})


def fully(**changes: Any) -> Callable[[], Any]:
    """The call with its values checked."""

    def run() -> Any:
        with validate("full"):
            return call(**changes)()

    return run


def without_null(y: int) -> Callable[[], Any]:
    def run() -> Any:
        with validate("full"):
            return UNCONDITIONAL(X, T, torch.tensor([1, y]))

    return run


def made(**changes: Any) -> Callable[[], Any]:
    return lambda: fastdit.DiT(**{**TINY, **changes})


def guided(scale: Any = 2.0, n: int = 2, **changes: Any) -> Callable[[], Any]:
    x, t, y = make_inputs(MODEL, n=n)
    return lambda: MODEL.forward_with_cfg(x, t, y, scale, **changes)


def forwarded(**changes: Any) -> Callable[[], Any]:
    return lambda: MODEL(X, T, Y, **changes)


def quantised() -> Any:
    return MODEL(torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), T, Y)


# name: (call, error, what the message says: the argument, the value, what is allowed)
ROWS: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    # labels
    "y above the null label": (
        fully(y=torch.tensor([3, 11])),
        ValueError,
        ["y[1]=11", "0 .. 10"],
    ),
    "y negative": (
        fully(y=torch.tensor([3, -1])),
        ValueError,
        ["y[1]=-1", "0 .. 10", "the null label is 10"],
    ),
    "y null without a null class": (
        without_null(10),
        ValueError,
        ["y[1]=10", "0 .. 9", "no null class", "guidance is not available"],
    ),
    "y negative without a null class": (without_null(-1), ValueError, ["y[1]=-1", "0 .. 9"]),
    "y float": (call(y=Y.float()), TypeError, ["y: ", "integer", "torch.float32"]),
    "y bool": (call(y=Y > 0), TypeError, ["y: ", "integer", "torch.bool"]),
    "y one-hot": (
        call(y=F.one_hot(torch.tensor([1, 2]), 10)),
        ValueError,
        ["y: ", "(2,)", "(2, 10)", "argmax"],
    ),
    "y one-hot with null": (
        call(y=F.one_hot(torch.tensor([1, 2]), 11)),
        ValueError,
        ["y: ", "(2,)", "(2, 11)", "argmax"],
    ),
    "y column": (call(y=Y[:, None]), ValueError, ["y: ", "(2,)", "(2, 1)"]),
    "y batch 1": (call(y=Y[:1]), ValueError, ["y: ", "(2,)", "(1,)"]),
    "y 0-d": (call(y=Y[0]), ValueError, ["y: ", "(2,)", "()"]),
    "y list": (call(y=[1, 2]), TypeError, ["y: ", "tensor", "list"]),
    "y None": (call(y=None), TypeError, ["y: ", "tensor", "NoneType"]),
    # timesteps
    "t batch 1": (call(t=T[:1]), ValueError, ["t: ", "(2,)", "(1,)"]),
    "t column": (call(t=T[:, None]), ValueError, ["t: ", "(2,)", "(2, 1)"]),
    "t above": (fully(t=torch.tensor([0, 5000])), ValueError, ["t[1]=5000", "0 .. 999"]),
    "t one above": (fully(t=torch.tensor([0, 1000])), ValueError, ["t[1]=1000", "0 .. 999"]),
    "t negative": (fully(t=torch.tensor([-3, 0])), ValueError, ["t[0]=-3", "0 .. 999"]),
    "t scalar above": (fully(t=torch.tensor(5000)), ValueError, ["t[0]=5000", "0 .. 999"]),
    "t NaN": (fully(t=torch.tensor([1.0, math.nan])), ValueError, ["t[1]=nan", "0 .. 1000"]),
    "t Inf": (fully(t=torch.tensor([math.inf, 1.0])), ValueError, ["t[0]=inf", "0 .. 1000"]),
    "t bfloat16": (call(t=T.bfloat16()), TypeError, ["t: ", "torch.bfloat16", "999", "int64"]),
    "t bool": (call(t=T > 0), TypeError, ["t: ", "torch.bool"]),
    "t complex": (call(t=T + 0j), TypeError, ["t: ", "torch.complex64"]),
    "t number": (call(t=7), TypeError, ["t: ", "tensor", "int"]),
    # images
    "x NaN": (
        fully(x=X.index_fill(0, torch.tensor(1), math.nan)),
        ValueError,
        ["x: ", "256", "NaN"],
    ),
    "x Inf": (fully(x=X / 0), ValueError, ["x: ", "512", "Inf"]),
    "x not square": (
        call(x=torch.ones(2, 4, 8, 16)),
        ValueError,
        ["x: ", "input_size=(8, 8)", "(2, 4, 8, 16)", "input_size=(8, 16)"],
    ),
    "x of another size": (
        call(x=torch.ones(2, 4, 16, 16)),
        ValueError,
        ["x: ", "input_size=(8, 8)", "(2, 4, 16, 16)", "make the model with input_size=(16, 16)"],
    ),
    "x indivisible": (
        call(x=torch.ones(2, 4, 7, 7)),
        ValueError,
        ["x: ", "(2, 4, 7, 7)", "divisible by patch_size=2"],
    ),
    "x with 3 channels": (
        call(x=torch.ones(2, 3, 8, 8)),
        ValueError,
        ["x: ", "in_channels=4", "(2, 3, 8, 8)"],
    ),
    "x unbatched": (
        call(x=X[0]),
        ValueError,
        ["x: ", "(N, 4, 8, 8)", "got (4, 8, 8)", "unsqueeze(0)"],
    ),
    "x NHWC": (
        call(x=X.permute(0, 2, 3, 1)),
        ValueError,
        ["x: ", "got (2, 8, 8, 4)", "permute(0, 3, 1, 2)"],
    ),
    "x double": (call(x=X.double()), TypeError, ["x: ", "torch.float64", "torch.float32"]),
    "x bfloat16 without autocast": (
        call(x=X.bfloat16()),
        TypeError,
        ["x: ", "torch.bfloat16", "torch.float32", "autocast"],
    ),
    "x complex": (call(x=X + 0j), TypeError, ["x: ", "torch.complex64"]),
    "x bool": (call(x=X > 0), TypeError, ["x: ", "torch.bool"]),
    "x integers": (call(x=X.long()), TypeError, ["x: ", "torch.int64"]),
    "x sparse": (call(x=X.to_sparse()), TypeError, ["x: ", "torch.sparse_coo"]),
    "x quantised": (quantised, TypeError, ["x: ", "torch.qint8"]),
    "x list": (call(x=[1.0]), TypeError, ["x: ", "tensor", "list"]),
    "x elsewhere": (
        call(x=X.to("meta")),
        ValueError,
        ["x is on meta", "t is on cpu", "y is on cpu", "model is on cpu"],
    ),
    "y elsewhere": (call(y=Y.to("meta")), ValueError, ["x is on cpu", "y is on meta"]),
    "t elsewhere": (call(t=T.to("meta")), ValueError, ["x is on cpu", "t is on meta"]),
    # the constructor
    "input_size indivisible": (
        made(input_size=9),
        ValueError,
        ["input_size=9", "divisible by patch_size=2"],
    ),
    "input_size 0": (made(input_size=0), ValueError, ["input_size=0", "positive"]),
    "input_size of one": (made(input_size=(8,)), ValueError, ["input_size=(8,)", "one or two"]),
    "input_size indivisible width": (made(input_size=(8, 7)), ValueError, ["input_size=(8, 7)"]),
    "input_size float": (made(input_size=8.0), (TypeError, ValueError), ["input_size=8.0"]),
    "input_size None": (made(input_size=None), (TypeError, ValueError), ["input_size=None"]),
    "hidden_size and heads": (
        made(num_heads=5),
        ValueError,
        ["hidden_size=48", "divisible by num_heads=5"],
    ),
    "hidden_size and 4": (made(hidden_size=50), ValueError, ["hidden_size=50", "divisible by 4"]),
    "hidden_size float": (made(hidden_size=48.0), ValueError, ["hidden_size=48.0", "integer"]),
    "num_classes 0": (made(num_classes=0), ValueError, ["num_classes=0", "positive"]),
    "depth 0": (made(depth=0), ValueError, ["depth=0", "positive"]),
    "depth bool": (made(depth=True), ValueError, ["depth=True", "integer"]),
    "patch_size 0": (made(patch_size=0), ValueError, ["patch_size=0", "positive"]),
    "num_heads 0": (made(num_heads=0), ValueError, ["num_heads=0", "positive"]),
    "in_channels 0": (made(in_channels=0), ValueError, ["in_channels=0", "positive"]),
    "mlp_ratio 0": (made(mlp_ratio=0), ValueError, ["mlp_ratio=0", "positive"]),
    "mlp_ratio negative": (made(mlp_ratio=-4.0), ValueError, ["mlp_ratio=-4.0", "positive"]),
    "mlp_ratio tiny": (made(mlp_ratio=1e-9), ValueError, ["mlp_ratio=1e-09", "positive"]),
    "mlp_ratio NaN": (made(mlp_ratio=math.nan), ValueError, ["mlp_ratio=nan"]),
    "mlp_ratio Inf": (made(mlp_ratio=math.inf), ValueError, ["mlp_ratio=inf"]),
    "dropout above 1": (
        made(class_dropout_prob=1.1),
        ValueError,
        ["class_dropout_prob=1.1", "[0, 1]"],
    ),
    "dropout negative": (
        made(class_dropout_prob=-0.1),
        ValueError,
        ["class_dropout_prob=-0.1", "[0, 1]"],
    ),
    "dropout NaN": (made(class_dropout_prob=math.nan), ValueError, ["class_dropout_prob=nan"]),
    "conditioning misspelt": (
        made(conditioning="adaln-zero"),
        ValueError,
        ["conditioning='adaln-zero'", "'in_context'", "did you mean 'adaln_zero'?"],
    ),
    "residual_dtype string": (
        made(residual_dtype="float32"),
        TypeError,
        ["residual_dtype='float32'", "dtype"],
    ),
    "residual_dtype integer": (
        made(residual_dtype=torch.int32),
        TypeError,
        ["residual_dtype=torch.int32", "floating"],
    ),
    "block heads": (lambda: DiTBlock(48, 5), ValueError, ["hidden_size=48", "num_heads=5"]),
    # guidance
    "odd batch": (guided(n=3), ValueError, ["x: ", "even", "[conditional; unconditional]", "(3, "]),
    "batch 1": (guided(n=1), ValueError, ["x: ", "even", "(1, 4, 8, 8)"]),
    "scale NaN": (guided(math.nan), ValueError, ["cfg_scale=nan", "finite"]),
    "scale Inf": (guided(math.inf), ValueError, ["cfg_scale=inf", "finite"]),
    "scale -Inf": (guided(-math.inf), ValueError, ["cfg_scale=-inf", "finite"]),
    "scale None": (guided(None), TypeError, ["cfg_scale=None", "number or a tensor"]),
    "scale string": (guided("4"), TypeError, ["cfg_scale='4'", "number or a tensor"]),
    "scale bool": (guided(True), TypeError, ["cfg_scale=True", "number or a tensor"]),
    "scale of 2N": (guided(torch.ones(2)), ValueError, ["cfg_scale: ", "(1,)", "(2,)"]),
    "scale matrix": (
        guided(torch.ones(2, 1), n=4),
        ValueError,
        ["cfg_scale: ", "(2,)", "(2, 1, 1, 1)", "got shape (2, 1)"],
    ),
    "scale elsewhere": (
        guided(torch.ones(1, device="meta")),
        ValueError,
        ["x is on cpu", "cfg_scale is on meta"],
    ),
    "cfg_channels": (guided(cfg_channels=4), ValueError, ["cfg_channels=4", "3, 'all'"]),
    "cfg_channels misspelt": (guided(cfg_channels="al"), ValueError, ["did you mean 'all'"]),
    # added arguments
    "return_hidden above": (
        forwarded(return_hidden=[3]),
        ValueError,
        ["return_hidden=[3]", "0 .. 2"],
    ),
    "return_hidden negative": (
        forwarded(return_hidden=[0, -1]),
        ValueError,
        ["return_hidden=[0, -1]", "0 .. 2"],
    ),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", ROWS)
def test_bad_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, error, fragments = ROWS[name]
    # Nothing is computed before the error.
    monkeypatch.setattr(ops, "patchify", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(error) as caught:
        run()
    message = str(caught.value)
    assert [fragment for fragment in fragments if fragment not in message] == [], message
    assert "\n" not in message


def test_labels_out_of_range_are_torchs_error_where_values_are_not_read() -> None:
    """Reading them costs a synchronisation, so `validate("full")` or the entry of a run does it."""
    for label in (11, -1):
        with pytest.raises(IndexError):
            call(y=torch.tensor([3, label]))()


@pytest.mark.parametrize("t", [[0.1, 0.9], [0.5, 1.0], [0.0, 0.25]])
def test_fractions_as_timesteps_are_warned_of(t: list[float]) -> None:
    with pytest.warns(UserWarning, match=r"t: .*fractions up to 1.*0 \.\. 999"):
        fully(t=torch.tensor(t))()


@pytest.mark.parametrize(
    "t", [torch.tensor([0, 1]), torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.0]), torch.tensor(0)]
)
def test_small_timesteps_are_not(t: torch.Tensor) -> None:
    fully(t=t)()


def test_continuous_timesteps_may_reach_the_end() -> None:
    fully(t=torch.tensor([999.5, 1000.0]))()
    with pytest.raises(
        ValueError, match=r"t\[0\]=1000.5: allowed are 0 \.\. 1000, .*num_timesteps=1000"
    ):
        fully(t=torch.tensor([1000.5, 0.0]))()


def test_timesteps_of_a_longer_process() -> None:
    model = make_model(depth=1)
    model.num_timesteps = 4000
    model.check_values(None, torch.tensor([3999]), None)
    with pytest.raises(ValueError, match=r"t\[0\]=4000: allowed are 0 \.\. 3999"):
        model.check_values(None, torch.tensor([4000]), None)


def test_null_label_and_other_integers_are_labels() -> None:
    y = torch.tensor([3, 10])
    expected = fully(y=y)()
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(fully(y=y.to(dtype))(), expected)


def test_scalar_timestep_is_that_of_all() -> None:
    for t in (torch.tensor(7), torch.tensor(7.0), torch.tensor(7, dtype=torch.float16)):
        assert torch.equal(fully(t=t)(), call(t=torch.tensor([7, 7]))())


def test_wide_uint8_labels_are_exact() -> None:
    model = make_model(num_classes=300, depth=1)
    y = torch.tensor([255, 128])
    assert torch.equal(model(X, T, y.to(torch.uint8)), model(X, T, y))


def test_autocast_takes_narrow_and_float32_images_but_not_double() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert call(x=X.to(dtype))().isfinite().all()
        with pytest.raises(TypeError, match=r"x: has dtype torch\.float64"):
            call(x=X.double())()


def test_values_of_a_scale_tensor_are_checked_with_the_others() -> None:
    scale = torch.tensor([1.0, math.nan])
    assert guided(scale, n=4)().isnan().any()
    with validate("full"), pytest.raises(ValueError, match=r"cfg_scale.*nan"):
        guided(scale, n=4)()


@pytest.mark.parametrize("kind", [np.float32, np.int64])
def test_numpy_numbers_are_scales(kind: Any) -> None:
    assert torch.equal(guided(kind(3))(), guided(3.0)())


def test_any_value_passes_where_nothing_is_checked() -> None:
    """What the model does with a wrong timestep or a NaN is what plain torch does with it."""
    assert call(t=torch.tensor([5000, -3]))().isfinite().all()
    assert call(t=torch.tensor([math.nan, 0.0]))()[0].isnan().all()


def test_check_values_by_hand() -> None:
    """How a training or sampling run checks once, at its entry."""
    MODEL.check_values(X, T, Y)
    MODEL.check_values(None, None, None)
    with pytest.raises(ValueError, match=r"y\[0\]=11"):
        MODEL.check_values(None, None, torch.tensor([11]))
    with pytest.raises(ValueError, match=r"t\[0\]=-1"):
        MODEL.check_values(None, torch.tensor([-1]), None)
    MODEL.check_values(X[:0], T[:0], Y[:0])
