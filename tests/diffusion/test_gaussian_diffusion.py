"""The samplers, against what follows from their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastdit.diffusion import GaussianDiffusion, create_diffusion

from .stubs import smooth_model, unit_gaussian_model

SHAPE = (3, 2, 4, 4)


def _randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or SHAPE, dtype=dtype, generator=generator)


def _column(values: np.ndarray, t: Tensor) -> Tensor:
    return torch.from_numpy(values)[t].view(-1, 1, 1, 1)


# ---------------------------------------------------------------- p_mean_variance


def test_model_is_given_the_originals_timesteps() -> None:
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.cat([x, x], dim=1)

    diffusion = create_diffusion("10")
    diffusion.p_mean_variance(model, _randn(0), torch.tensor([0, 5, 9]))
    diffusion.p_mean_variance(model, _randn(0), torch.tensor([0, 5, 9], dtype=torch.int32))
    diffusion.training_losses(model, _randn(0), torch.tensor([0, 5, 9]))
    list(diffusion.p_sample_loop_progressive(model, SHAPE, _randn(0)))
    assert all(t.dtype == torch.int64 for t in seen)
    assert [t.tolist() for t in seen[:3]] == [[0, 555, 999]] * 3
    assert [t.tolist() for t in seen[3:]] == [[step] * 3 for step in diffusion.timestep_map[::-1]]


def test_learned_variance_runs_between_beta_and_the_posteriors() -> None:
    diffusion = create_diffusion("")
    x, t = _randn(0), torch.tensor([0, 1, 700])
    for v, name in ((-1.0, "posterior_log_variance_clipped"), (1.0, "log_betas")):
        out = diffusion.p_mean_variance(
            lambda x, t, v=v: torch.cat([x, torch.full_like(x, v)], dim=1), x, t
        )
        expected = _column(getattr(diffusion, name), t).expand_as(x)
        torch.testing.assert_close(out["log_variance"], expected)
        torch.testing.assert_close(out["variance"], expected.exp())


@pytest.mark.parametrize("small", [False, True])
def test_fixed_variance(small: bool) -> None:
    diffusion = create_diffusion("", learn_sigma=False, sigma_small=small)
    x, t = _randn(0), torch.tensor([0, 1, 700])
    out = diffusion.p_mean_variance(smooth_model(1), x, t)
    expected = _column(diffusion.posterior_variance if small else diffusion.betas, t).expand_as(x)
    torch.testing.assert_close(out["variance"][1:], expected[1:])
    torch.testing.assert_close(out["log_variance"][1:], expected[1:].log())
    assert out["variance"][0].unique().item() == (0 if small else diffusion.posterior_variance[1])
    assert out["log_variance"][0].unique().item() == math.log(diffusion.posterior_variance[1])


def test_guess_of_x_start_from_noise_and_directly() -> None:
    x_start, noise, t = _randn(0), _randn(1), torch.tensor([0, 300, 999])
    x_t = create_diffusion("").q_sample(x_start, t, noise)
    expected = create_diffusion("").q_posterior_mean_variance(x_start, x_t, t)[0]
    for predict_xstart, output in ((False, noise), (True, x_start)):
        diffusion = create_diffusion("", predict_xstart=predict_xstart, learn_sigma=False)
        out = diffusion.p_mean_variance(lambda x, t, o=output: o, x_t, t, clip_denoised=False)
        torch.testing.assert_close(out["pred_xstart"], x_start)
        torch.testing.assert_close(out["mean"], expected)


def test_guess_is_changed_and_clamped_before_the_mean() -> None:
    diffusion, x, t = create_diffusion(""), _randn(0), torch.tensor([1, 500, 999])
    model = smooth_model()
    plain = diffusion.p_mean_variance(model, x, t, clip_denoised=False)["pred_xstart"]
    out = diffusion.p_mean_variance(model, x, t, denoised_fn=lambda guess: guess + 0.5)
    torch.testing.assert_close(out["pred_xstart"], (plain + 0.5).clamp(-1, 1))
    expected = diffusion.q_posterior_mean_variance(out["pred_xstart"], x, t)[0]
    torch.testing.assert_close(out["mean"], expected)


def test_model_arguments_and_what_it_returns_besides() -> None:
    def model(x: Tensor, t: Tensor, y: Tensor, scale: float) -> tuple[Tensor, str]:
        return torch.cat([scale * y, x], dim=1), "besides"

    diffusion, x, t = create_diffusion(""), _randn(0), torch.tensor([1, 500, 999])
    kwargs = {"y": _randn(1), "scale": 2.0}
    out = diffusion.p_mean_variance(model, x, t, clip_denoised=False, model_kwargs=kwargs)
    recip = _column(1 / np.sqrt(diffusion.alphas_cumprod), t)
    expected = recip * x - torch.sqrt(recip**2 - 1) * 2 * kwargs["y"]
    torch.testing.assert_close(out["pred_xstart"], expected)
    assert out["extra"] == "besides"


# ---------------------------------------------------------------- one step


def test_p_sample_adds_noise_except_at_step_0() -> None:
    diffusion, x, t = create_diffusion("50"), _randn(0), torch.tensor([0, 1, 49])
    noise = _randn(1)
    out = diffusion.p_sample(smooth_model(), x, t, step_noise=noise)
    p = diffusion.p_mean_variance(smooth_model(), x, t)
    expected = p["mean"] + p["variance"].sqrt() * noise
    torch.testing.assert_close(out["sample"][1:], expected[1:])
    assert torch.equal(out["sample"][0], p["mean"][0])
    assert torch.equal(out["pred_xstart"], p["pred_xstart"])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_sample_has_the_marginals_of_q(eta: float) -> None:
    # With the true noise as the model, x_{t-1} must be distributed as q(x_{t-1} | x_0): its mean
    # is the signal, and the squared shares of old and new noise add up to 1 - abar_{t-1}.
    diffusion, t = create_diffusion("50"), torch.tensor([1, 20, 49])
    x_start, noise, fresh = _randn(0), _randn(1), _randn(2)
    x_t = diffusion.q_sample(x_start, t, noise)
    step = partial(
        diffusion.ddim_sample,
        lambda x, t: torch.cat([noise, x], dim=1),
        x_t,
        t,
        clip_denoised=False,
        eta=eta,
    )
    still = step(step_noise=torch.zeros_like(fresh))["sample"]
    sigma = (step(step_noise=fresh)["sample"] - still) / fresh
    direction = (still - _column(diffusion.sqrt_alphas_cumprod, t - 1) * x_start) / noise
    share = sigma**2 + direction**2
    expected = (1 - _column(diffusion.alphas_cumprod, t - 1)).expand_as(share)
    torch.testing.assert_close(share, expected)
    # eta 0 is deterministic, eta 1 has DDPM's posterior variance.
    variance = eta**2 * _column(diffusion.posterior_variance, t)
    torch.testing.assert_close(sigma**2, variance.expand_as(sigma))


def test_ddim_sample_ends_at_the_guess() -> None:
    diffusion, x, t = create_diffusion("50"), _randn(0), torch.zeros(3, dtype=torch.int64)
    out = diffusion.ddim_sample(smooth_model(), x, t, eta=1.0, step_noise=_randn(1))
    torch.testing.assert_close(out["sample"], out["pred_xstart"])


def test_ddim_reverse_is_undone_by_ddim() -> None:
    # One noise for all steps makes both directions exact.
    noise = _randn(1)
    diffusion = create_diffusion("20")

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([noise, x], dim=1)

    x = start = _randn(0)
    for i in range(19):
        t = torch.full((3,), i)
        x = diffusion.ddim_reverse_sample(model, x, t, clip_denoised=False)["sample"]
    # x_19 holds x_0's part of x_start, whose noise level is that of step 0, and the same noise.
    x_0 = (start - math.sqrt(1 - diffusion.alphas_cumprod[0]) * noise) / math.sqrt(
        diffusion.alphas_cumprod[0]
    )
    torch.testing.assert_close(x, diffusion.q_sample(x_0, torch.full((3,), 19), noise))
    for i in range(19, 0, -1):
        t = torch.full((3,), i)
        x = diffusion.ddim_sample(model, x, t, clip_denoised=False)["sample"]
    torch.testing.assert_close(x, start)


# ---------------------------------------------------------------- guidance by a classifier


def _classifier(target: Tensor, scale: float, seen: list[Tensor]) -> Callable[..., Tensor]:
    """The gradient of log N(x; target, scale²)."""

    def cond_fn(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return (target - x) / scale**2

    return cond_fn


def test_guidance_moves_the_mean_by_the_variance_times_the_gradient() -> None:
    diffusion, x, t = create_diffusion("50"), _randn(0), torch.tensor([0, 7, 49])
    seen: list[Tensor] = []
    cond_fn = _classifier(torch.ones_like(x), 2.0, seen)
    p = diffusion.p_mean_variance(smooth_model(), x, t)
    zero = torch.zeros_like(x)
    out = diffusion.p_sample(smooth_model(), x, t, cond_fn=cond_fn, step_noise=zero)
    torch.testing.assert_close(out["sample"], p["mean"] + p["variance"] * (1 - x) / 4)
    assert seen[0].tolist() == [0, 143, 999]
    assert seen[0].dtype == torch.int64


def test_guidance_of_ddim_moves_the_noise() -> None:
    diffusion, x, t = create_diffusion("50"), _randn(0), torch.tensor([0, 7, 49])
    cond_fn = _classifier(torch.ones_like(x), 2.0, [])
    abar = _column(diffusion.alphas_cumprod, t)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        eps, v = smooth_model()(x, t).chunk(2, dim=1)
        return torch.cat([eps - torch.sqrt(1 - abar) * (1 - x) / 4, v], dim=1)

    for method in ("ddim_sample", "ddim_reverse_sample"):
        step = partial(getattr(diffusion, method), x=x, t=t, clip_denoised=False)
        found, expected = step(smooth_model(), cond_fn=cond_fn), step(guided)
        for name in ("sample", "pred_xstart"):
            # At t = 0 the noise is recovered from x_0 by a division by 0.01, which costs digits.
            torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-12)


def _guided_error(loop: str, steps: int) -> float:
    """How far the mean of guided samples is from the truth, where that is known.

    x_0 ~ N(0, 1) and y = x_0 + N(0, s²): p(x_0 | y) has the mean y / (1 + s²). Everything is
    linear, so the path without noise is the path of the mean.
    """
    y, s2 = 2.0, 0.25
    diffusion = create_diffusion(str(steps), learn_sigma=False)
    abars = torch.from_numpy(create_diffusion("").alphas_cumprod)

    def cond_fn(x: Tensor, t: Tensor) -> Tensor:
        abar = abars[t].view(-1, 1)
        return abar.sqrt() * (y - abar.sqrt() * x) / (1 - abar + s2)

    sample = getattr(diffusion, loop)(
        unit_gaussian_model(abars),
        (1, 1),
        torch.full((1, 1), y / (1 + s2), dtype=torch.float64) * abars[-1].sqrt(),
        clip_denoised=False,
        cond_fn=cond_fn,
        step_noise=torch.zeros(steps, 1, 1, dtype=torch.float64),
    )
    return abs(sample.item() - y / (1 + s2))


def test_guided_samples_have_the_mean_of_the_posterior() -> None:
    # DDIM follows the mean without error, DDPM the better the more steps there are.
    assert _guided_error("ddim_sample_loop", 50) < 1e-12
    coarse, fine = _guided_error("p_sample_loop", 125), _guided_error("p_sample_loop", 500)
    assert fine < 0.5 * coarse < 0.05


# ---------------------------------------------------------------- all steps

LOOPS: list[tuple[str, dict[str, Any]]] = [
    ("p_sample_loop", {}),
    ("ddim_sample_loop", {}),
    ("ddim_sample_loop", {"eta": 0.7}),
]


@pytest.mark.parametrize(("loop", "options"), LOOPS)
def test_noise_given_equals_noise_drawn(loop: str, options: dict[str, Any]) -> None:
    diffusion = create_diffusion("8")
    run = partial(getattr(diffusion, loop), smooth_model(), SHAPE, **options)
    torch.manual_seed(5)
    drawn = run(device="cpu")
    after = torch.get_rng_state()

    torch.manual_seed(5)
    start = torch.randn(*SHAPE)
    noise = torch.stack([torch.randn_like(start) for _ in range(8)])
    assert torch.equal(torch.get_rng_state(), after)  # one draw a step, the last one included
    given = run(start, step_noise=noise)
    assert torch.equal(given, drawn)
    assert torch.equal(torch.get_rng_state(), after)  # and none where noise is given

    by_generator = run(device="cpu", generator=torch.Generator().manual_seed(5))
    assert torch.equal(by_generator, drawn)
    assert torch.equal(torch.get_rng_state(), after)
    assert drawn.dtype == torch.float32


@pytest.mark.parametrize(("loop", "options"), LOOPS)
def test_loop_is_the_steps_one_after_another(loop: str, options: dict[str, Any]) -> None:
    diffusion, x = create_diffusion("5"), _randn(0)
    noise = _randn(1, 5, *SHAPE)
    step = getattr(diffusion, loop.removesuffix("_loop"))
    arguments = {"clip_denoised": False, "denoised_fn": torch.tanh, **options}
    outputs = list(
        getattr(diffusion, f"{loop}_progressive")(
            smooth_model(), SHAPE, x, step_noise=noise, **arguments
        )
    )
    assert len(outputs) == 5
    for i, out in enumerate(outputs):
        expected = step(
            smooth_model(), x, torch.full((3,), 4 - i), step_noise=noise[i], **arguments
        )
        for name in ("sample", "pred_xstart"):
            assert torch.equal(out[name], expected[name])
        x = expected["sample"]
    final = getattr(diffusion, loop)(smooth_model(), SHAPE, outputs[0]["sample"], **arguments)
    assert final.shape == SHAPE
    assert final.dtype == torch.float64


@pytest.mark.parametrize("data_variance", [0.0, 1.0])
def test_ddpm_draws_what_it_was_made_for(data_variance: float) -> None:
    # DDPM section 3.2: the variance beta is the right one for x_0 ~ N(0, I), the posterior's for a
    # single x_0; with the best model all marginals are then exactly those of q.
    diffusion = create_diffusion("50", learn_sigma=False, sigma_small=data_variance == 0)
    abars = torch.from_numpy(create_diffusion("").alphas_cumprod)

    def single(x: Tensor, t: Tensor) -> Tensor:
        return x / torch.sqrt(1 - abars[t].view(-1, 1))

    model = unit_gaussian_model(abars) if data_variance else single
    one = torch.ones(1, 1, dtype=torch.float64)
    expected = data_variance * abars[diffusion.timestep_map] + 1 - abars[diffusion.timestep_map]
    variance = expected[-1].view(1, 1)
    for step in range(49, -1, -1):
        t = torch.tensor([step])
        run = partial(diffusion.p_sample, model, clip_denoised=False)
        slope = run(one, t, step_noise=0 * one)["sample"]
        spread = run(0 * one, t, step_noise=one)["sample"]
        variance = slope**2 * variance + spread**2
        # The last step draws nothing, so it returns the best guess: x_1 shrunk towards the mean.
        last = data_variance * abars[0]
        torch.testing.assert_close(variance.squeeze(), expected[step - 1] if step else last)


def test_state_keeps_a_models_dtype() -> None:
    diffusion = create_diffusion("4")
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        seen = []

        def model(x: Tensor, t: Tensor, seen: list[torch.dtype] = seen) -> Tensor:
            seen.append(x.dtype)
            return torch.cat([x, x], dim=1)

        sample = diffusion.p_sample_loop(model, SHAPE, _randn(0, dtype=dtype))
        assert sample.dtype == dtype
        assert set(seen) == {dtype}


def test_loop_takes_no_gradient_and_leaves_the_callers_mode_alone() -> None:
    weight = torch.ones((), requires_grad=True)
    diffusion = create_diffusion("2")
    for out in diffusion.p_sample_loop_progressive(
        lambda x, t: weight * torch.cat([x, x], dim=1), SHAPE, device="cpu"
    ):
        assert torch.is_grad_enabled()
        assert not out["sample"].requires_grad
    step = diffusion.p_sample(
        lambda x, t: weight * torch.cat([x, x], dim=1), _randn(0), torch.tensor([1, 1, 1])
    )
    assert step["sample"].requires_grad


class _Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), device="meta"))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([x, x], dim=1)


def test_device_is_the_models() -> None:
    diffusion, module = create_diffusion("2"), _Module()
    assert diffusion.p_sample_loop(module, SHAPE).device.type == "meta"
    assert diffusion.ddim_sample_loop(module.forward, SHAPE).device.type == "meta"
    assert diffusion.p_sample_loop(module, SHAPE, device="cpu").device.type == "cpu"


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_progress_bar_only_where_asked(loop: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = partial(getattr(create_diffusion("3"), loop), smooth_model(), SHAPE, device="cpu")
    run()
    assert capsys.readouterr().err == ""
    run(progress=True)
    assert "3/3" in capsys.readouterr().err


def test_constructor_takes_its_own_kinds_only() -> None:
    betas = create_diffusion("").betas
    for argument in ("mean_type", "variance_type", "loss_type"):
        with pytest.raises(ValueError, match=f"{argument}='learned'"):
            GaussianDiffusion(betas, **{argument: "learned"})
