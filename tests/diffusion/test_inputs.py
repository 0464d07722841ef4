"""Wrong inputs are answered by name, before the model is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdit.diffusion import create_diffusion
from fastdit.validation import validate

from .stubs import smooth_model

DIFFUSION = create_diffusion("10")
X = torch.zeros(3, 2, 4, 4)
T = torch.tensor([0, 5, 9])


def _never(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("the model was called")


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "q_sample": DIFFUSION.q_sample,
    "q_mean_variance": DIFFUSION.q_mean_variance,
    "q_posterior_mean_variance": lambda x, t: DIFFUSION.q_posterior_mean_variance(X, x, t),
    "training_losses": lambda x, t: DIFFUSION.training_losses(_never, x, t),
    "p_mean_variance": lambda x, t: DIFFUSION.p_mean_variance(_never, x, t),
    "p_sample": lambda x, t: DIFFUSION.p_sample(_never, x, t),
    "ddim_sample": lambda x, t: DIFFUSION.ddim_sample(_never, x, t),
    "ddim_reverse_sample": lambda x, t: DIFFUSION.ddim_reverse_sample(_never, x, t),
    "condition_mean": lambda x, t: DIFFUSION.condition_mean(_never, {}, x, t),
    "condition_score": lambda x, t: DIFFUSION.condition_score(_never, {}, x, t),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
@pytest.mark.parametrize("step", [-1, 10, 999])
def test_timestep_out_of_range(call: Callable[..., Any], step: int) -> None:
    with pytest.raises(ValueError, match=rf"t\[1\]={step}: allowed are 0 to 9"):
        call(X, torch.tensor([0, step, 9]))


@every_call
@pytest.mark.parametrize("t", [T / 10, T.bool(), T.to(torch.uint8), [0, 5, 9], 5])
def test_timesteps_of_another_type(call: Callable[..., Any], t: Any) -> None:
    with pytest.raises(TypeError, match=r"^t: expected an int64 tensor"):
        call(X, t)


@every_call
@pytest.mark.parametrize("t", [T[:2], T[:, None], T[0]])
def test_timesteps_of_another_shape(call: Callable[..., Any], t: Tensor) -> None:
    with pytest.raises(ValueError, match="t has shape"):
        call(X, t)


@every_call
def test_timesteps_on_another_device(call: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="t is on meta: all must be on one device"):
        call(X, T.to("meta"))


@every_call
@pytest.mark.parametrize("x", [X.long(), X.to(torch.complex64), X.tolist()])
def test_x_of_another_type(call: Callable[..., Any], x: Any) -> None:
    with pytest.raises(TypeError, match=r"^x(_start|_t)?: expected a"):
        call(x, T)


class _Elsewhere(Tensor):
    """A tensor that says it is on another device, and counts how often its values are read."""

    reads = 0

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("meta")

    def tolist(self) -> list[int]:
        type(self).reads += 1
        return super().tolist()


def test_values_on_other_devices_are_read_in_full_validation_only() -> None:
    from fastdit.diffusion.inputs import check_timesteps

    x, t = (tensor.as_subclass(_Elsewhere) for tensor in (X, torch.tensor([0, 1, -1])))
    check_timesteps("x", x, t, 10)
    assert _Elsewhere.reads == 0
    with validate("full"), pytest.raises(ValueError, match=r"t\[2\]=-1"):
        check_timesteps("x", x, t, 10)
    assert _Elsewhere.reads == 1


@pytest.mark.parametrize(
    ("learn_sigma", "channels", "message"),
    [
        (True, 1, r"learn_sigma=True needs 2C channels, \(3, 4, 4, 4\)"),
        (False, 2, r"learn_sigma=False needs C channels, \(3, 2, 4, 4\)"),
    ],
)
def test_model_with_the_wrong_channels(learn_sigma: bool, channels: int, message: str) -> None:
    diffusion = create_diffusion("10", learn_sigma=learn_sigma)
    for call in (diffusion.p_sample, diffusion.ddim_sample, diffusion.training_losses):
        with pytest.raises(ValueError, match=message):
            call(smooth_model(channels), X, T)


@pytest.mark.parametrize("wrong", [X[:2], X[:, :1], X[None]])
def test_noise_of_another_shape(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^noise has shape"):
        DIFFUSION.q_sample(X, T, wrong)
    with pytest.raises(ValueError, match=r"^noise has shape"):
        DIFFUSION.training_losses(_never, X, T, noise=wrong)
    for step in (DIFFUSION.p_sample, DIFFUSION.ddim_sample):
        with pytest.raises(ValueError, match=r"^step_noise has shape"):
            step(smooth_model(), X, T, step_noise=wrong)


def test_x_start_of_another_shape_than_x_t() -> None:
    with pytest.raises(ValueError, match=r"^x_start has shape"):
        DIFFUSION.q_posterior_mean_variance(X[:, :1], X, T)


every_loop = pytest.mark.parametrize(
    "loop", [DIFFUSION.p_sample_loop_progressive, DIFFUSION.ddim_sample_loop_progressive]
)


@every_loop
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"noise": X[:2]}, ValueError, "^noise has shape"),
        ({"noise": X.long()}, TypeError, "^noise: expected"),
        ({"noise": X, "device": "meta"}, ValueError, "device=meta, but noise is on cpu"),
        ({}, ValueError, "device=None"),
        ({"noise": X, "step_noise": X}, ValueError, r"^step_noise has shape .* \(10, 3, 2, 4, 4\)"),
        ({"noise": X, "step_noise": torch.zeros(9, *X.shape)}, ValueError, "^step_noise"),
        ({"noise": X, "step_noise": [X] * 10}, TypeError, "^step_noise: expected a tensor"),
        (
            {"noise": X, "step_noise": torch.zeros(10, *X.shape, device="meta")},
            ValueError,
            "step_noise is on meta",
        ),
        ({"device": "cpu", "generator": 7}, TypeError, "^generator: expected"),
        ({"device": "meta", "generator": torch.Generator()}, ValueError, "^generator is on cpu"),
    ],
)
def test_wrong_start_of_a_loop(
    loop: Callable[..., Any], arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    # Without a first step taken: the call itself answers.
    with pytest.raises(kind, match=message):
        loop(_never, X.shape, **arguments)


def test_wrong_generator_of_a_step() -> None:
    with pytest.raises(TypeError, match=r"^generator"):
        DIFFUSION.p_sample(smooth_model(), X, T, generator=[torch.Generator()])


@pytest.mark.parametrize("eta", [-0.1, float("nan"), float("inf")])
def test_eta_out_of_range(eta: float) -> None:
    with pytest.raises(ValueError, match=f"eta={eta}"):
        DIFFUSION.ddim_sample(_never, X, T, eta=eta)


def test_eta_of_the_reverse_step() -> None:
    with pytest.raises(ValueError, match=r"eta=0\.5: only"):
        DIFFUSION.ddim_reverse_sample(_never, X, T, eta=0.5)
