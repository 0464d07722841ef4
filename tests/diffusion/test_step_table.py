"""The table of a run's coefficients: what a step makes of it is what the samplers make of their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdit import reference
from fastdit.diffusion import GaussianDiffusion, create_diffusion
from fastdit.reference.diffusion_step import StepCoefficients, ddim_step, ddpm_step

from .test_steps_stay_on_device import OPTIONS, OnDeviceOnly

OPTIONS = {**OPTIONS, "fixed small": {"learn_sigma": False, "sigma_small": True}}
SHAPE = (2, 3, 4, 4)
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
each_sampler = pytest.mark.parametrize(
    ("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.6), ("ddim", 1.0)]
)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def table_of(diffusion: GaussianDiffusion, sampler: str, eta: float = 0.0) -> StepCoefficients:
    return StepCoefficients(*diffusion.step_table(sampler, eta=eta, dtype=torch.float64).unbind(1))


@each_option
@each_sampler
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("respacing", ["5", "ddim5", "1"])
def test_a_step_by_the_table_is_one_of_the_sampler(
    options: dict[str, Any], sampler: str, eta: float, clip: bool, respacing: str
) -> None:
    diffusion = create_diffusion(respacing, **options)
    table = diffusion.step_table(sampler, eta=eta, dtype=torch.float64)
    tokens = draw(2, 4, 2 * 2 * (6 if diffusion.variance_type == "learned_range" else 3))
    x, noise = draw(*SHAPE), draw(*SHAPE)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return reference.unpatchify(tokens, 2, tokens.shape[-1] // 4, (2, 2))

    for step in range(diffusion.num_timesteps):
        t = torch.full((2,), step)
        if sampler == "ddpm":
            expected = diffusion.p_sample(model, x, t, clip, step_noise=noise)
            found = ddpm_step(
                *(tokens, x, noise, table, torch.tensor(step)), patch_size=2, clip_denoised=clip
            )
        else:
            expected = diffusion.ddim_sample(model, x, t, clip, eta=eta, step_noise=noise)
            found = ddim_step(
                *(tokens, x, noise, table, torch.tensor(step)), patch_size=2, clip_denoised=clip
            )
        # Two ways to write a formula in float64; the sampler's DDIM divides by sqrt(1 / abar - 1).
        torch.testing.assert_close(found, expected["sample"], rtol=1e-9, atol=1e-9)


def test_ddim_with_all_noise_is_ddpm_with_the_posteriors_variance() -> None:
    """Song et al. 2021, section 4.1: eta = 1 is DDPM."""
    diffusion = create_diffusion("50", learn_sigma=False, sigma_small=True)
    ddim, ddpm = table_of(diffusion, "ddim", eta=1.0), table_of(diffusion, "ddpm")
    for name, found, expected in zip(ddim._fields, ddim, ddpm, strict=True):
        if expected is not None:
            torch.testing.assert_close(found, expected, msg=name)


@each_option
@each_sampler
def test_shape_and_the_last_step(options: dict[str, Any], sampler: str, eta: float) -> None:
    diffusion = create_diffusion("7", **options)
    learned = sampler == "ddpm" and diffusion.variance_type == "learned_range"
    table = diffusion.step_table(sampler, eta=eta)
    assert (table.shape, table.dtype) == ((7, 7 if learned else 5), torch.float32)
    assert table.isfinite().all()
    noise = table_of(diffusion, sampler, eta).noise
    assert noise[0] == 0
    assert bool((noise[1:] > 0).all()) == (sampler == "ddpm" or eta > 0)


def test_rounded_once() -> None:
    diffusion = create_diffusion("50")
    for sampler in ("ddpm", "ddim"):
        wide = diffusion.step_table(sampler, dtype=torch.float64)
        assert wide.dtype == torch.float64
        assert torch.equal(diffusion.step_table(sampler), wide.float())
        assert not torch.equal(wide.float().double(), wide)


def test_every_call_makes_a_table_of_its_own() -> None:
    diffusion = create_diffusion("5")
    before = diffusion.step_table("ddpm", dtype=torch.float64)
    diffusion.step_table("ddpm", dtype=torch.float64).fill_(7)
    assert torch.equal(diffusion.step_table("ddpm", dtype=torch.float64), before)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_device_and_steps_that_stay_on_it(device: str) -> None:
    table = create_diffusion("5").step_table("ddpm", device=device)
    assert table.device.type == device
    tokens = torch.zeros(4, 4, 24, device=device)
    x, step = torch.zeros(SHAPE, device=device), torch.tensor([3], device=device)
    scale = torch.tensor(4.0, device=device)
    with OnDeviceOnly(device) as mode:
        ddpm_step(tokens, x, x, table, step, patch_size=2, cfg_scale=scale)
        ddpm_step(tokens, x, x, table, step, patch_size=2, cfg_scale=4.0)
        ddim_step(tokens[:2], x, None, table[:, :5], step, patch_size=2)
    assert mode.operations > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "dpm"}, "sampler='dpm': allowed are 'ddpm', 'ddim'; did you mean 'ddpm'"),
        ({"sampler": "ddpm", "eta": 0.5}, "eta=0.5: allowed are 0 to 1 with .*, and 0 with 'ddpm'"),
        ({"sampler": "ddim", "eta": 1.1}, "eta=1.1: allowed are 0 to 1"),
        ({"sampler": "ddim", "eta": -0.1}, "eta=-0.1: allowed are 0 to 1"),
        ({"sampler": "ddim", "eta": float("nan")}, "eta=nan: allowed are 0 to 1"),
    ],
    ids=str,
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_diffusion("5").step_table(**arguments)
