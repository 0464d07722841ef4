"""A training checkpoint of facebookresearch/DiT goes on where it stopped: weights, averages, moments, steps."""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdit import DiT
from fastdit.testing import assert_same_bits
from fastdit.training import train

from .helpers import tensors, tiny

SIZES: dict[str, Any] = {
    "input_size": 8,
    "patch_size": 4,
    "in_channels": 1,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
}


def trained(steps: int, *, parameters: str = "all") -> dict[str, Any]:
    """What the original's train.py has after `steps` updates: AdamW over all parameters, pos_embed included."""
    torch.manual_seed(1)
    model = DiT(**SIZES)
    ema = deepcopy(model)
    chosen = [p for p in model.parameters() if parameters == "all" or p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=1e-4, weight_decay=0)
    for _ in range(steps):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
            average.data.lerp_(parameter.data, 0.5)
    return {
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "opt": optimizer.state_dict(),
        "args": argparse.Namespace(model="own", num_classes=10, global_batch_size=8, epochs=1),
    }


def test_everything_is_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that has nothing left to do shows what it was begun with."""
    content = trained(3)
    torch.save(content, tmp_path / "0000003.pt")
    config = tiny(tmp_path / "run", resume_from_original=str(tmp_path / "0000003.pt"), steps=4)
    train(config)
    assert "step 3" in capsys.readouterr().out
    after = tensors(tmp_path / "run", 4)
    assert after["optimizer.step"].tolist() == [4.0]

    # One step on from these moments, by the formula of AdamW without decay.
    old: dict[str, Tensor] = content["opt"]["state"][_position("blocks.0.mlp.fc1.weight")]
    first = after["optimizer.exp_avg.blocks.0.mlp.fc1.weight"]
    second = after["optimizer.exp_avg_sq.blocks.0.mlp.fc1.weight"]
    gradient = (first - 0.9 * old["exp_avg"]) / 0.1
    torch.testing.assert_close(second, 0.999 * old["exp_avg_sq"] + 0.001 * gradient**2)
    assert_same_bits("pos_embed", after["model.pos_embed"], content["model"]["pos_embed"])
    moved = after["model.blocks.0.mlp.fc1.weight"] - content["model"]["blocks.0.mlp.fc1.weight"]
    expected = -config.lr * (first / (1 - 0.9**4)) / ((second / (1 - 0.999**4)).sqrt() + 1e-8)
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)
    average = after["ema.blocks.0.mlp.fc1.weight"]
    before = content["ema"]["blocks.0.mlp.fc1.weight"]
    weight = after["model.blocks.0.mlp.fc1.weight"]
    torch.testing.assert_close(average, before.lerp(weight, 1 - config.ema_decay))


def test_resumed_later_it_needs_no_source(tmp_path: Path) -> None:
    source = tmp_path / "x.pt"
    torch.save(trained(2), source)
    train(tiny(tmp_path / "run", resume_from_original=str(source), steps=4))
    source.unlink()
    train(tiny(tmp_path / "run", resume_from_original=str(source), steps=6, resume=True))
    assert (tmp_path / "run" / "checkpoints" / "step-00000006").exists()


def without(content: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != key}


def without_moments(content: dict[str, Any]) -> dict[str, Any]:
    """Of one parameter that is trained."""
    del content["opt"]["state"][_position("blocks.0.mlp.fc1.weight")]
    return content


def with_moments_of_another_shape(content: dict[str, Any]) -> dict[str, Any]:
    content["opt"]["state"][_position("x_embedder.proj.bias")]["exp_avg"] = torch.zeros(3)
    return content


def _position(name: str) -> int:
    return [each for each, _ in DiT(**SIZES).named_parameters()].index(name)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: without(c, "opt"), "no entry opt"),
        (lambda c: without(c, "ema"), "ema"),
        (
            lambda c: c | {"opt": trained(1, parameters="trained")["opt"]},
            "parameters, the model has",
        ),
        (lambda c: c | {"opt": {"state": {}, "param_groups": []}}, "not the state of one AdamW"),
        (lambda c: c | {"opt": trained(0)["opt"]}, r"different numbers of steps: \[\]"),
        (without_moments, "missing exp_avg.blocks.0"),
        (with_moments_of_another_shape, r"exp_avg.x_embedder.proj.bias has shape \(3,\)"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: Any, reason: str) -> None:
    torch.save(change(trained(1)), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt.*{reason}"):
        train(tiny(tmp_path / "run", resume_from_original=str(tmp_path / "x.pt")))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_steps_that_differ(tmp_path: Path) -> None:
    content = trained(2)
    content["opt"]["state"][5]["step"] += 1
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"different numbers of steps: \[2, 3\]"):
        train(tiny(tmp_path / "run", resume_from_original=str(tmp_path / "x.pt")))


def test_one_source_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume_from_original='a' and init_from='b'"):
        tiny(tmp_path, resume_from_original="a", init_from="b")
