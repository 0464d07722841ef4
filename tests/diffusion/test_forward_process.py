"""q against what follows from the definition of the Markov chain, in float64."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from fastdit.diffusion import create_diffusion
from fastdit.diffusion.forward_process import TABLES

SHAPE = (4, 3, 2, 2)
T = torch.tensor([0, 1, 500, 999])


def _x(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, dtype=torch.float64, generator=generator)


def _column(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values)[T].view(-1, 1, 1, 1)


def test_q_is_the_chain_run_t_times() -> None:
    diffusion = create_diffusion("")
    signal, variance = 1.0, 0.0
    signals, variances = [], []
    for beta in diffusion.betas:
        signal, variance = signal * np.sqrt(1 - beta), variance * (1 - beta) + beta
        signals.append(signal)
        variances.append(variance)
    x = _x(0)
    mean, q_variance, q_log_variance = diffusion.q_mean_variance(x, T)
    torch.testing.assert_close(mean, _column(np.array(signals)) * x)
    torch.testing.assert_close(q_variance, _column(np.array(variances)).expand_as(x))
    torch.testing.assert_close(q_log_variance, q_variance.log())
    noise = _x(1)
    x_t = diffusion.q_sample(x, T, noise)
    torch.testing.assert_close(x_t, mean + q_variance.sqrt() * noise)


def test_posterior_is_the_product_of_the_two_gaussians() -> None:
    diffusion = create_diffusion("")
    x_start, x_t = _x(0), _x(1)
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x_start, x_t, T)
    beta = _column(diffusion.betas)[1:]
    before = _column(np.append(1.0, diffusion.alphas_cumprod[:-1]))[1:]
    # q(x_t | x_{t-1}) and q(x_{t-1} | x_0), as functions of x_{t-1}: precisions add.
    precision = (1 - beta) / beta + 1 / (1 - before)
    weighted = (1 - beta).sqrt() / beta * x_t[1:] + before.sqrt() / (1 - before) * x_start[1:]
    torch.testing.assert_close(mean[1:], weighted / precision)
    torch.testing.assert_close(variance[1:], (1 / precision).expand_as(x_t[1:]))
    torch.testing.assert_close(log_variance[1:], variance[1:].log())
    # At t = 0 the posterior is x_0 itself, and borrows its log-variance from t = 1.
    torch.testing.assert_close(mean[0], x_start[0])
    assert torch.all(variance[0] == 0)
    assert torch.equal(log_variance[0], log_variance[1])
    assert log_variance[0, 0, 0, 0].item() == pytest.approx(-9.81672514, abs=1e-8)


def test_respaced_process_keeps_the_noise_levels_of_its_steps() -> None:
    whole, respaced = create_diffusion(""), create_diffusion("50")
    assert (respaced.num_timesteps, respaced.original_num_steps) == (50, 1000)
    assert respaced.use_timesteps == set(respaced.timestep_map)
    kept = whole.alphas_cumprod[respaced.timestep_map]
    np.testing.assert_allclose(respaced.alphas_cumprod, kept, rtol=1e-12)
    for array in (respaced.betas, respaced.alphas_cumprod):
        assert array.dtype == np.float64
        assert array.shape == (50,)


def test_one_step_has_finite_logarithms() -> None:
    diffusion = create_diffusion("1")
    for name in TABLES:
        assert np.isfinite(getattr(diffusion, name)).all(), name


def test_noise_is_randn_like_and_results_keep_the_dtype() -> None:
    diffusion = create_diffusion("")
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x = _x(0).to(dtype)
        torch.manual_seed(3)
        drawn = diffusion.q_sample(x, T)
        torch.manual_seed(3)
        assert torch.equal(drawn, diffusion.q_sample(x, T, torch.randn_like(x)))
        assert drawn.dtype == dtype


def test_half_precision_inputs_are_computed_in_float32() -> None:
    diffusion = create_diffusion("")
    x, noise = _x(0).bfloat16(), _x(1).bfloat16()
    expected = diffusion.q_sample(x.float(), T, noise.float())
    assert torch.equal(diffusion.q_sample(x, T, noise), expected.bfloat16())
    assert diffusion.q_posterior_mean_variance(x, noise, T)[0].dtype == torch.float32


def test_tables_are_made_once_and_are_not_copied() -> None:
    diffusion = create_diffusion("50")
    size = len(pickle.dumps(diffusion))
    tables = diffusion.tables(torch.device("cpu"))
    assert diffusion.tables(torch.device("cpu")) is tables
    assert tables["timestep_map"].tolist() == diffusion.timestep_map
    for name in TABLES:
        assert tables[name].dtype == torch.float32
        assert np.array_equal(tables[name].numpy(), getattr(diffusion, name).astype(np.float32))
    x = _x(0)
    expected = diffusion.q_sample(x, T.clamp(max=49), x)
    assert len(pickle.dumps(diffusion)) == size
    for other in (copy.deepcopy(diffusion), pickle.loads(pickle.dumps(diffusion))):  # noqa: S301
        assert other.tables(torch.device("cpu")) is not tables
        assert torch.equal(other.q_sample(x, T.clamp(max=49), x), expected)


def test_tables_made_under_inference_mode_take_part_in_training() -> None:
    diffusion = create_diffusion("")
    with torch.inference_mode():
        diffusion.q_sample(_x(0), T)
    x = _x(0).requires_grad_()
    abar = diffusion.tables(x.device, x.dtype)["alphas_cumprod"][0]
    (abar * diffusion.q_sample(x, T, _x(1))).sum().backward()
    expected = torch.from_numpy(np.sqrt(diffusion.alphas_cumprod))[T] * (1 - 1e-4)
    torch.testing.assert_close(x.grad[:, 0, 0, 0], expected)
