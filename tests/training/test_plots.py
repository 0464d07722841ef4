"""The loss curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastdit.training.plots import draw_loss_curve, loss_figure, smoothed


def _records(losses: list[float]) -> list[dict[str, Any]]:
    return [{"step": 10 * i, "loss": loss} for i, loss in enumerate(losses, start=1)]


def test_smoothed_is_the_weighted_mean_to_both_sides() -> None:
    values = np.random.default_rng(0).normal(size=30)
    span = 4.0
    distance = np.abs(np.subtract.outer(np.arange(30), np.arange(30)))
    weights = (1 - 1 / span) ** distance
    expected = weights @ values / weights.sum(1)
    # The same sums in another order; both are in float64.
    np.testing.assert_allclose(smoothed(values.tolist(), span), expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(smoothed(values.tolist(), 1), values, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([1.0, 0.9, 0.8, 0.7] * 10, "linear"),
        ([10.0 * 0.9**i for i in range(40)], "log"),
        ([10.0 * 0.9**i for i in range(39)] + [-0.1], "linear"),
    ],
)
def test_axis_is_logarithmic_where_the_loss_falls_far(losses: list[float], scale: str) -> None:
    axes = loss_figure(_records(losses), "DiT-S/2, 32.96M parameters").axes[0]
    assert axes.get_yscale() == scale
    assert axes.get_xlabel() == "step"
    assert axes.get_ylabel().startswith("training loss")
    assert axes.get_title(loc="left") == "DiT-S/2, 32.96M parameters"
    raw, line, _ = axes.lines
    assert raw.get_xydata().tolist() == [[10 * (i + 1), loss] for i, loss in enumerate(losses)]
    assert raw.get_alpha() < 1
    assert raw.get_linewidth() < line.get_linewidth()
    low, high = axes.get_ylim()
    assert low < min(line.get_ydata())
    assert max(line.get_ydata()) < high


def test_one_high_value_does_not_flatten_a_linear_axis() -> None:
    losses = [0.2, 0.19] * 200
    losses[300] = 0.9
    axes = loss_figure(_records(losses), "").axes[0]
    assert axes.get_yscale() == "linear"
    assert axes.get_ylim()[1] < 0.3


@pytest.mark.parametrize("losses", [[0.5], [0.5, 0.5]])
def test_few_records_give_a_picture(losses: list[float], tmp_path: Path) -> None:
    draw_loss_curve(_records(losses), tmp_path / "loss.png", "title")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (1200, 675)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
