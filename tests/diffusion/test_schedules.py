from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from fastdit.diffusion import (
    GaussianDiffusion,
    create_diffusion,
    get_named_beta_schedule,
    space_timesteps,
)

FORMULA = json.loads((Path(__file__).parents[1] / "golden" / "formula_dit.json").read_text())


def test_linear_schedule_runs_between_the_papers_ends() -> None:
    betas = get_named_beta_schedule("linear", 1000)
    assert betas.dtype == np.float64
    assert (betas[0], betas[-1]) == (1e-4, 0.02)
    np.testing.assert_allclose(np.diff(betas), (0.02 - 1e-4) / 999)
    # The product of all alphas hardly depends on how many steps it is cut into.
    assert get_named_beta_schedule("linear", 100)[[0, -1]].tolist() == [1e-3, 0.2]


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_cosine_schedule_multiplies_to_the_papers_formula(steps: int) -> None:
    betas = get_named_beta_schedule("squaredcos_cap_v2", steps)
    u = np.arange(1, steps + 1) / steps
    f = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    expected = f / np.cos(0.008 / 1.008 * math.pi / 2) ** 2
    # The last beta would be 1 and is cut off at 0.999.
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], expected[:-1])
    assert betas[-1] == 0.999


@pytest.mark.parametrize("respacing", ["250", "50", "ddim50", "ddim25"])
def test_respacing_gives_the_originals_steps_and_betas(respacing: str) -> None:
    golden = FORMULA[f"sched_{respacing}"]
    diffusion = create_diffusion(respacing)
    assert diffusion.timestep_map == golden["timestep_map"]
    assert all(type(step) is int for step in diffusion.timestep_map)
    assert diffusion.betas[:3].tolist() == golden["betas_first3"]
    assert diffusion.betas[-3:].tolist() == golden["betas_last3"]


@pytest.mark.parametrize(
    ("respacing", "expected"),
    [
        (None, range(1000)),
        ("", range(1000)),
        ("1000", range(1000)),
        ([1000], range(1000)),
        (1, [0]),
        ("1", [0]),
        (3, [0, 500, 999]),  # the running sum 499.5 is rounded half to even
        ("2,0,1", [0, 333, 667]),
        ([3, 2], [0, 250, 499, 500, 999]),
        ("ddim1", [0]),
        ("ddim7", range(0, 1000, 143)),
        ("ddim3", [0, 334, 668]),
        ("ddim30", range(0, 1000, 34)),
        ("ddim1000", range(1000)),
    ],
)
def test_every_form_of_respacing(respacing: object, expected: list[int]) -> None:
    assert space_timesteps(1000, respacing) == set(expected)


def test_positions_are_summed_and_not_multiplied() -> None:
    # 10 strides of 49.95 are 499.5 by multiplication, and a little less as a running sum.
    steps = sorted(space_timesteps(1000, "21"))
    assert steps[9:12] == [450, 499, 549]
    assert steps[-1] == 999


@pytest.mark.parametrize("respacing", [250, "250", [250]])
def test_number_string_and_list_mean_the_same(respacing: object) -> None:
    assert create_diffusion(respacing).timestep_map == FORMULA["sched_250"]["timestep_map"]


@pytest.mark.parametrize(
    ("respacing", "message"),
    [
        (0, "timestep_respacing=0: allowed are 1 to 1000 steps"),
        ("0", "timestep_respacing='0': allowed are 1 to 1000 steps"),
        (1001, "timestep_respacing=1001: allowed are 1 to 1000 steps"),
        ("-5", "allowed are 1 to 1000"),
        ([5, -5], "allowed are 1 to 1000"),
        ("0,0", "allowed are 1 to 1000"),
        ("400,10,10", "timestep_respacing='400,10,10': section 0 has 334 timesteps, 400 were"),
        ([], "at least one section"),
        ("fifty", "timestep_respacing='fifty': allowed are"),
        ("10,", "allowed are"),
        ("ddim", "timestep_respacing='ddim': allowed are"),
        ("ddim0", "allowed are"),
        ("ddim-5", "allowed are"),
        ("ddim1001", "allowed are"),
        ("ddim60", "no whole stride gives 60 of 1000 steps; the nearest counts are 59 and 63"),
    ],
)
def test_respacing_that_cannot_be_met_names_itself(respacing: object, message: str) -> None:
    with pytest.raises(ValueError, match="timestep_respacing") as error:
        create_diffusion(respacing)
    assert message in str(error.value)


@pytest.mark.parametrize("respacing", [250.0, True, [10, 2.5], {"steps": 10}])
def test_respacing_of_another_type(respacing: object) -> None:
    with pytest.raises(TypeError, match="timestep_respacing"):
        create_diffusion(respacing)


def test_schedule_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"noise_schedule='squaredcos'.*mean 'squaredcos_cap"):
        create_diffusion("", noise_schedule="squaredcos")


@pytest.mark.parametrize("steps", [0, -1, 20])
def test_too_few_steps_for_a_schedule(steps: int) -> None:
    with pytest.raises(ValueError, match=f"diffusion_steps={steps}"):
        create_diffusion("", diffusion_steps=steps)


@pytest.mark.parametrize("betas", [[], [[0.1]], [0.0, 0.1], [0.1, 1.0], [float("nan")]])
def test_betas_out_of_range(betas: list[float]) -> None:
    with pytest.raises(ValueError, match="betas"):
        GaussianDiffusion(np.array(betas))


@pytest.mark.parametrize("steps", [[], [-1], [1000]])
def test_use_timesteps_out_of_range(steps: list[int]) -> None:
    with pytest.raises(ValueError, match="use_timesteps"):
        GaussianDiffusion(get_named_beta_schedule("linear", 1000), steps)
