"""The original's outputs: losses, trajectories and the sampling loops with a known model.

The limits are those of tests/golden/README.md: a trajectory may be off by 1e-4 of its end's rms,
what a single forward gives by 1e-5 of its rms.
"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdit.diffusion import create_diffusion

GOLDEN = Path(__file__).parents[1] / "golden"
FORMULA = json.loads((GOLDEN / "formula_dit.json").read_text())


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _assert_within(found: Tensor, expected: Tensor, limit: float) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).abs().max().item() <= limit


def _wave(phase: int, *shape: int, amplitude: float = 1.0) -> Tensor:
    """flat[i] = amplitude sin(0.37 i + 1.3 phase), computed in float64, returned in float32."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (amplitude * torch.sin(0.37 * i + 1.3 * phase)).float().view(shape)


def _assert_matches_summary(found: Tensor, summary: dict[str, Any], relative: float) -> None:
    """`summary` holds single elements, and mean, std and the sum of the absolute values."""
    flat = found.double().flatten()
    assert list(found.shape) == summary["shape"]
    limit = relative * math.hypot(summary["mean"], summary["std"])
    for index, value in summary["at"].items():
        assert flat[int(index)].item() == pytest.approx(value, rel=0, abs=limit)
    assert flat.mean().item() == pytest.approx(summary["mean"], rel=0, abs=limit)
    assert flat.std().item() == pytest.approx(summary["std"], rel=0, abs=limit)
    assert flat.abs().sum().item() == pytest.approx(summary["abs_sum"], abs=limit * flat.numel())


@pytest.fixture(params=["fastdit.reference", "fastdit"])
def dit(request: pytest.FixtureRequest) -> type[nn.Module]:
    return importlib.import_module(request.param).DiT


@pytest.fixture
def tiny(dit: type[nn.Module]) -> nn.Module:
    model = dit(**json.loads((GOLDEN / "tiny_dit.config.json").read_text()))
    model.load_state_dict(load_file(GOLDEN / "tiny_dit.weights.safetensors"))
    return model.eval()


@pytest.fixture
def formula(dit: type[nn.Module]) -> nn.Module:
    model = dit(**FORMULA["config"])
    parameters = model.state_dict()
    for k, name in enumerate(FORMULA["key_order"]):
        if name != "pos_embed":
            parameters[name].copy_(_wave(k, *parameters[name].shape, amplitude=0.1))
    return model.eval()


# ---------------------------------------------------------------- without a model

LOSSES = load_file(GOLDEN / "tiny_dit.losses.safetensors")


def test_forward_process_is_exact() -> None:
    diffusion = create_diffusion("")
    x_t = diffusion.q_sample(LOSSES["x0"], LOSSES["t"], LOSSES["noise"])
    assert torch.equal(x_t, LOSSES["x_t"])
    mean, _, log_variance = diffusion.q_posterior_mean_variance(LOSSES["x0"], x_t, LOSSES["t"])
    assert torch.equal(mean, LOSSES["posterior_mean"])
    assert torch.equal(log_variance, LOSSES["posterior_log_variance_clipped"])


def _stub(x: Tensor, t: Tensor) -> Tensor:
    abar = torch.from_numpy(create_diffusion("").alphas_cumprod)[t].float().view(-1, 1, 1, 1)
    return torch.cat([0.9 * x * torch.sqrt(1 - abar), 0.2 * torch.sin(x)], dim=1)


def test_ddim_of_a_known_model() -> None:
    z = _wave(101, 2, 4, 8, 8)
    found = create_diffusion("ddim50").ddim_sample_loop(_stub, z.shape, z, clip_denoised=False)
    _assert_matches_summary(found, FORMULA["stub_ddim50"], 1e-4)


def test_a_global_seed_gives_the_originals_samples() -> None:
    z = _wave(101, 2, 4, 8, 8)
    torch.manual_seed(0)
    found = create_diffusion("250").p_sample_loop(_stub, z.shape, z, clip_denoised=False)
    _assert_matches_summary(found, FORMULA["stub_p_sample_250_seed0"], 1e-4)


# ---------------------------------------------------------------- with a DiT


def test_training_losses(tiny: nn.Module) -> None:
    with torch.no_grad():
        found = create_diffusion("").training_losses(
            tiny, LOSSES["x0"], LOSSES["t"], {"y": LOSSES["y"]}, LOSSES["noise"]
        )
    for name in ("loss", "mse", "vb"):
        expected = LOSSES[f"loss.{name}"]
        _assert_within(found[name], expected, 1e-5 * _rms(expected))


def test_ddpm_trajectory_with_guidance(tiny: nn.Module) -> None:
    golden = load_file(GOLDEN / "tiny_dit.ddpm10_cfg4.safetensors")
    diffusion = create_diffusion("10")
    assert diffusion.timestep_map == golden["timestep_map"].tolist()
    steps = diffusion.p_sample_loop_progressive(
        tiny.forward_with_cfg,
        golden["z"].shape,
        golden["z"],
        clip_denoised=False,
        model_kwargs={"y": golden["y"], "cfg_scale": 4.0},
        step_noise=golden["noise"],
    )
    trajectory = torch.stack([out["sample"] for out in steps])
    _assert_within(trajectory, golden["trajectory"], 1e-4 * _rms(golden["trajectory"][-1]))


def test_ddim_trajectory(tiny: nn.Module) -> None:
    golden = load_file(GOLDEN / "tiny_dit.ddim10.safetensors")
    diffusion = create_diffusion("ddim10")
    assert diffusion.timestep_map == golden["timestep_map"].tolist()
    steps = diffusion.ddim_sample_loop_progressive(
        tiny,
        golden["z"].shape,
        golden["z"],
        clip_denoised=False,
        model_kwargs={"y": golden["y"]},
        step_noise=golden["noise"],
    )
    trajectory = torch.stack([out["sample"] for out in steps])
    _assert_within(trajectory, golden["trajectory"], 1e-4 * _rms(golden["trajectory"][-1]))


def test_training_losses_of_the_formula_model(formula: nn.Module) -> None:
    golden = FORMULA["training_losses"]
    with torch.no_grad():
        found = create_diffusion("").training_losses(
            formula,
            _wave(103, 3, 4, 8, 8, amplitude=0.8),
            torch.tensor(golden["t"]),
            {"y": torch.tensor(golden["y"])},
            _wave(102, 3, 4, 8, 8),
        )
    for name in ("loss", "mse", "vb"):
        expected = torch.tensor(golden[name])
        _assert_within(found[name], expected, 1e-5 * _rms(expected))


def test_one_step_of_the_formula_model(formula: nn.Module) -> None:
    golden = FORMULA["p_mean_variance_250"]
    diffusion = create_diffusion("250")
    t = torch.tensor(golden["t_spaced"])
    assert [diffusion.timestep_map[step] for step in t] == golden["t_model"]
    with torch.no_grad():
        found = diffusion.p_mean_variance(
            formula,
            _wave(100, 3, 4, 8, 8),
            t,
            clip_denoised=False,
            model_kwargs={"y": torch.tensor([0, 3, 10])},
        )
    for name in ("mean", "log_variance", "pred_xstart"):
        _assert_matches_summary(found[name], golden[name], 1e-5)
