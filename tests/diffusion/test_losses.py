from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from fastdit.diffusion import GaussianDiffusion, create_diffusion, get_named_beta_schedule
from fastdit.diffusion.losses import discretized_gaussian_log_likelihood

from .stubs import smooth_model

SHAPE = (5, 2, 3, 3)
T = torch.tensor([0, 1, 250, 998, 999])


def _tensors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_start = torch.rand(SHAPE, dtype=torch.float64, generator=generator) * 2 - 1
    return x_start, torch.randn(SHAPE, dtype=torch.float64, generator=generator)


def _independent_bound(
    diffusion: GaussianDiffusion, model: Callable[..., Tensor], x_start: Tensor, noise: Tensor
) -> Tensor:
    """KL(q || p) in bits for T[1:], from the betas and torch.distributions alone."""
    terms = []
    for i, t in enumerate(T.tolist()[1:], start=1):
        beta = diffusion.betas[t]
        abar, before = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod[t - 1]
        x_t = math.sqrt(abar) * x_start[i] + math.sqrt(1 - abar) * noise[i]
        eps, v = model(x_t[None], T[i : i + 1])[0].chunk(2)

        def posterior(
            x_0: Tensor, x_t: Tensor = x_t, beta: float = beta, before: float = before
        ) -> Normal:
            precision = (1 - beta) / beta + 1 / (1 - before)
            mean = math.sqrt(1 - beta) / beta * x_t + math.sqrt(before) / (1 - before) * x_0
            return Normal(mean / precision, torch.full_like(x_0, 1 / precision).sqrt())

        q = posterior(x_start[i])
        guess = posterior((x_t - math.sqrt(1 - abar) * eps) / math.sqrt(abar))
        low, high = q.scale.log() * 2, math.log(beta)
        log_variance = low + (v + 1) / 2 * (high - low)
        kl = kl_divergence(q, Normal(guess.mean, torch.exp(0.5 * log_variance)))
        terms.append(kl.mean() / math.log(2))
    return torch.stack(terms)


def test_bound_is_the_mean_kl_in_bits() -> None:
    diffusion, model = create_diffusion(""), smooth_model()
    x_start, noise = _tensors()
    losses = diffusion.training_losses(model, x_start, T, noise=noise)
    expected = _independent_bound(diffusion, model, x_start, noise)
    torch.testing.assert_close(losses["vb"][1:], expected)
    x_t = diffusion.q_sample(x_start, T, noise)
    error = noise - model(x_t, T)[:, :2]
    torch.testing.assert_close(losses["mse"], (error**2).mean(dim=(1, 2, 3)))
    torch.testing.assert_close(losses["loss"], losses["mse"] + losses["vb"])
    assert all(value.shape == (5,) for value in losses.values())


def test_bound_at_step_0_is_the_decoders_likelihood() -> None:
    diffusion, model = create_diffusion(""), smooth_model()
    x_start, noise = _tensors()
    p = diffusion.p_mean_variance(
        model, diffusion.q_sample(x_start, T, noise), T, clip_denoised=False
    )
    likelihood = discretized_gaussian_log_likelihood(x_start, p["mean"], 0.5 * p["log_variance"])
    vb = diffusion.training_losses(model, x_start, T, noise=noise)["vb"]
    torch.testing.assert_close(vb[0], -likelihood[0].mean() / math.log(2))


@pytest.mark.parametrize("scale", [0.0075, 0.02, 0.3])
def test_decoder_is_the_mass_in_a_bin(scale: float) -> None:
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean = torch.full_like(x, 0.1)
    found = discretized_gaussian_log_likelihood(x, mean, torch.full_like(x, math.log(scale))).exp()
    # Each bin integrated by the trapezoid rule; the outermost reach (nearly) to infinity.
    low, high = x - 1 / 255, x + 1 / 255
    low[0], high[-1] = -5.0, 5.0
    points = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, 4001, dtype=x.dtype)
    expected = torch.trapezoid(Normal(0.1, scale).log_prob(points).exp(), points, dim=1)
    # The approximation of the distribution function is off by at most 1.79e-4 at each edge.
    assert (found - expected).abs().max() <= 2 * 1.79e-4
    assert found.sum().item() == pytest.approx(1, abs=1e-9)


def test_decoder_has_a_floor_and_finite_gradients() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0])
    mean = torch.tensor([40.0, 40.0, -40.0], requires_grad=True)
    found = discretized_gaussian_log_likelihood(x, mean, torch.full((3,), -5.0))
    torch.testing.assert_close(found, torch.full((3,), math.log(1e-12)))
    found.sum().backward()
    assert torch.isfinite(mean.grad).all()


def _losses(model: Callable[..., Tensor], **options: Any) -> dict[str, Tensor]:
    x_start, noise = _tensors()
    return create_diffusion("", **options).training_losses(model, x_start, T, noise=noise)


def test_loss_types_are_multiples_of_the_same_terms() -> None:
    model = smooth_model()
    x_start, noise = _tensors()
    mse = _losses(model)
    assert set(mse) == {"loss", "mse", "vb"}
    torch.testing.assert_close(_losses(model, use_kl=True)["loss"], 1000 * mse["vb"])
    kl = GaussianDiffusion(get_named_beta_schedule("linear", 1000), loss_type="kl")
    losses = kl.training_losses(model, x_start, T, noise=noise)
    torch.testing.assert_close(losses, {"loss": mse["vb"]})
    torch.testing.assert_close(_losses(model, rescale_learned_sigmas=True), mse)

    fifty, rescaled = create_diffusion("50"), create_diffusion("50", rescale_learned_sigmas=True)
    t = T.clamp(max=49)
    plain = fifty.training_losses(model, x_start, t, noise=noise)
    scaled = rescaled.training_losses(model, x_start, t, noise=noise)
    torch.testing.assert_close(scaled["vb"], plain["vb"] * 0.05)
    torch.testing.assert_close(scaled["loss"], plain["mse"] + plain["vb"] * 0.05)
    kl = create_diffusion("50", use_kl=True).training_losses(model, x_start, t, noise=noise)
    torch.testing.assert_close(kl["loss"], 50 * plain["vb"])


def test_fixed_variance_has_no_bound_to_train() -> None:
    losses = _losses(smooth_model(1), learn_sigma=False)
    assert set(losses) == {"loss", "mse"}
    assert torch.equal(losses["loss"], losses["mse"])


@pytest.mark.parametrize("small", [False, True])
def test_bound_of_a_fixed_variance(small: bool) -> None:
    # A model that knows x_0 has the posterior's mean; what is left is the KL of the variances.
    x_start, _ = _tensors()
    options = {"predict_xstart": True, "learn_sigma": False, "sigma_small": small}
    found = _losses(lambda x, t: x_start, use_kl=True, **options)["loss"][1:]
    diffusion = create_diffusion("")
    posterior = torch.from_numpy(diffusion.posterior_variance)[T[1:]]
    variance = posterior if small else torch.from_numpy(diffusion.betas)[T[1:]]
    kl = kl_divergence(Normal(0.0, posterior.sqrt()), Normal(0.0, variance.sqrt()))
    torch.testing.assert_close(found, 1000 * kl / math.log(2), rtol=1e-7, atol=1e-9)


def test_predict_xstart_is_trained_towards_x_start() -> None:
    x_start, _ = _tensors()
    losses = _losses(lambda x, t: x_start + 0.5, predict_xstart=True, learn_sigma=False)
    torch.testing.assert_close(losses["loss"], torch.full((5,), 0.25, dtype=torch.float64))


def test_bound_trains_the_variance_only() -> None:
    x_start, noise = _tensors()
    output = torch.randn(
        5, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    for use_kl, key in ((False, "vb"), (True, "loss")):
        leaf = output.clone().requires_grad_()
        diffusion = create_diffusion("", use_kl=use_kl)
        losses = diffusion.training_losses(lambda x, t, o=leaf: o, x_start, T, noise=noise)
        losses[key].sum().backward()
        assert bool((leaf.grad[:, :2] != 0).any()) is use_kl
        assert torch.all(leaf.grad[:, 2:] != 0)


def test_losses_of_a_bfloat16_model_are_float32() -> None:
    x_start, noise = _tensors()
    x_start, noise = x_start.bfloat16(), noise.bfloat16()
    seen = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.dtype)
        return torch.cat([x, x], dim=1)

    losses = create_diffusion("").training_losses(model, x_start, T, noise=noise)
    assert seen == [torch.bfloat16]
    assert {value.dtype for value in losses.values()} == {torch.float32}


def test_bits_per_dimension_of_a_batch() -> None:
    diffusion, model = create_diffusion("10"), smooth_model()
    x_start, _ = _tensors()
    torch.manual_seed(0)
    found = diffusion.calc_bpd_loop(model, x_start, clip_denoised=False)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "vb": (5, 10),
        "xstart_mse": (5, 10),
        "mse": (5, 10),
        "prior_bpd": (5,),
        "total_bpd": (5,),
    }
    torch.manual_seed(0)
    for column, step in enumerate(range(9, -1, -1)):
        t = torch.full((5,), step)
        noise = torch.randn_like(x_start)
        losses = diffusion.training_losses(model, x_start, t, noise=noise)
        torch.testing.assert_close(found["vb"][:, column], losses["vb"])
        torch.testing.assert_close(found["mse"][:, column], losses["mse"])
        x_t = diffusion.q_sample(x_start, t, noise)
        guess = diffusion.p_mean_variance(model, x_t, t, clip_denoised=False)["pred_xstart"]
        expected = ((guess - x_start) ** 2).mean(dim=(1, 2, 3))
        torch.testing.assert_close(found["xstart_mse"][:, column], expected)
    abar = diffusion.alphas_cumprod[-1]
    q = Normal(math.sqrt(abar) * x_start, math.sqrt(1 - abar))
    prior = kl_divergence(q, Normal(0.0, 1.0)).mean(dim=(1, 2, 3)) / math.log(2)
    torch.testing.assert_close(found["prior_bpd"], prior)
    torch.testing.assert_close(found["total_bpd"], found["vb"].sum(1) + prior)
