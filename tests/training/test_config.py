"""TrainConfig: what it refuses, and its JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from fastdit import cli
from fastdit.training import TrainConfig
from fastdit.training.config import FIXED

OWN = {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 2}

# changes, what is raised, and what the message must hold
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": 0.0}, ValueError, "lr=0.0: allowed is a finite number above 0"),
    ({"lr": -1e-4}, ValueError, "lr=-0.0001"),
    ({"lr": math.nan}, ValueError, "lr=nan"),
    ({"lr": math.inf}, ValueError, "lr=inf"),
    ({"lr": "1e-4"}, TypeError, "lr='1e-4': expected float, got str"),
    ({"lr": True}, TypeError, "lr=True: expected float, got bool"),
    ({"ema_decay": 1.0}, ValueError, "ema_decay=1.0: allowed is from 0 to below 1"),
    ({"ema_decay": -0.1}, ValueError, "ema_decay=-0.1"),
    ({"ema_decay": 1.5}, ValueError, "ema_decay=1.5"),
    ({"ema_decay": math.nan}, ValueError, "ema_decay=nan"),
    ({"gradient_clip": 0.0}, ValueError, "gradient_clip=0.0: allowed is a finite number above 0"),
    ({"gradient_clip": math.inf}, ValueError, "gradient_clip=inf"),
    ({"weight_decay": -1.0}, ValueError, "weight_decay=-1.0"),
    ({"weight_decay": math.nan}, ValueError, "weight_decay=nan"),
    ({"class_dropout_prob": 1.1}, ValueError, "class_dropout_prob=1.1: allowed is from 0 to 1"),
    ({"cfg_scale": math.nan}, ValueError, "cfg_scale=nan"),
    ({"steps": 0}, ValueError, "steps=0: allowed is at least 1"),
    ({"steps": 10**8}, ValueError, "steps=100000000"),
    ({"steps": 1.5}, TypeError, "steps=1.5: expected int, got float"),
    ({"batch_size": 0}, ValueError, "batch_size=0"),
    ({"log_every": 0}, ValueError, "log_every=0"),
    ({"checkpoint_every": 0}, ValueError, "checkpoint_every=0"),
    ({"sample_every": -1}, ValueError, "sample_every=-1"),
    ({"keep_checkpoints": 0}, ValueError, "keep_checkpoints=0"),
    ({"sample_steps": 1001}, ValueError, "sample_steps=1001: allowed is from 1 to 1000"),
    (
        {"warmup_steps": 400_000},
        ValueError,
        "warmup_steps=400000: allowed is from 0 to below steps",
    ),
    ({"warmup_steps": -1}, ValueError, "warmup_steps=-1"),
    ({"seed": -1}, ValueError, "seed=-1"),
    ({"seed": 2**63}, ValueError, "seed=9223372036854775808"),
    ({"num_workers": -1}, ValueError, "num_workers=-1"),
    ({"num_classes": 0}, ValueError, "num_classes=0"),
    ({"image_size": 0, "data": "images"}, ValueError, "image_size=0"),
    ({"image_size": 16}, ValueError, "image_size=16: allowed is 8 for data='digits'"),
    ({"horizontal_flip": True}, ValueError, "horizontal_flip=True: allowed is False for data="),
    ({"vae": "some/vae"}, ValueError, "vae='some/vae': allowed is None for data='digits'"),
    ({"data": ""}, ValueError, "data=''"),
    ({"out": ""}, ValueError, "out=''"),
    ({"out": Path("runs")}, TypeError, "expected str, got PosixPath"),
    ({"device": "gpu"}, ValueError, "device='gpu': allowed is 'auto', 'cpu', 'cuda'"),
    (
        {"precision": "bf61"},
        ValueError,
        "precision='bf61': allowed are 'fp32', 'tf32', 'bf16'; did you",
    ),
    ({"compile": "block"}, ValueError, "compile='block': .*did you mean 'blocks'"),
    ({"lr_schedule": "cosin"}, ValueError, "lr_schedule='cosin': .*did you mean 'cosine'"),
    ({"noise_schedule": "liner"}, ValueError, "noise_schedule='liner': .*did you mean 'linear'"),
    ({"conditioning": "adaln-zero"}, ValueError, "'adaln-zero': .*did you mean 'adaln_zero'"),
    ({"on_bad_image": "ignore"}, ValueError, "on_bad_image='ignore': allowed are 'error', 'skip'"),
    ({"model": "DiT-XL-2"}, ValueError, "model='DiT-XL-2': .*did you mean 'DiT-XL/2'"),
    ({"model": "DiT-S/2"} | OWN, ValueError, "hidden_size=32 and model='DiT-S/2'"),
    ({"hidden_size": 32}, ValueError, "depth=None: a model of your own needs all of"),
    (OWN | {"depth": 0}, ValueError, "depth=0"),
    ({"resume": True, "auto_resume": True}, ValueError, "resume=True and auto_resume=True"),
    ({"accumulate": 0}, ValueError, "accumulate=0: allowed is at least 1"),
    ({"nonfinite_steps": 0}, ValueError, "nonfinite_steps=0: allowed is at least 1"),
    ({"collective_timeout": 0}, ValueError, "collective_timeout=0: allowed is at least 1"),
    ({"timestep_sampling": "logitnormal"}, ValueError, "did you mean 'logit_normal'"),
    ({"parallel": "fdsp"}, ValueError, "parallel='fdsp': .*did you mean 'fsdp'"),
    (
        {"on_save_error": "ignore"},
        ValueError,
        "on_save_error='ignore': allowed are 'error', 'warn'",
    ),
    ({"recompute_blocks": 1}, TypeError, "recompute_blocks=1: expected bool, got int"),
    ({"wandb": True}, TypeError, "wandb=True: expected str or None, got bool"),
    ({"more_ema_decays": 0.9}, TypeError, "more_ema_decays=0.9: expected a list, got float"),
    ({"more_ema_decays": "0.9"}, TypeError, "more_ema_decays='0.9': expected a list, got str"),
    ({"more_ema_decays": ["0.9"]}, TypeError, "more_ema_decays='0.9': expected float, got str"),
    ({"more_ema_decays": (1.0,)}, ValueError, r"more_ema_decays=\(1.0,\): allowed is numbers from"),
    ({"more_ema_decays": (0.5, 0.5)}, ValueError, r"more_ema_decays=\(0.5, 0.5\)"),
    ({"more_ema_decays": (0.9999,)}, ValueError, "each once, without ema_decay"),
    ({"vae": "some/vae", "data": "synthetic"}, ValueError, "None for data='synthetic'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(**({"data": "digits"} | changes))


def test_whole_numbers_are_floats_where_floats_are_asked_for() -> None:
    config = TrainConfig(data="digits", gradient_clip=1, cfg_scale=2)
    assert (type(config.gradient_clip), type(config.cfg_scale)) == (float, float)
    assert [
        type(each) for each in TrainConfig(data="digits", more_ema_decays=(0,)).more_ema_decays
    ] == [float]


def test_lists_of_json_are_tuples() -> None:
    config = TrainConfig.from_json({"data": "digits", "more_ema_decays": [0.5, 0.999]})
    assert config.more_ema_decays == (0.5, 0.999)
    assert config.to_dict()["more_ema_decays"] == [0.5, 0.999]  # as JSON has it
    assert TrainConfig.from_json({"data": "digits", "more_ema_decays": []}).more_ema_decays == ()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ()),
        (["--more-ema-decays", "0.5"], (0.5,)),
        (["--more-ema-decays", "0.5", "0.999"], (0.5, 0.999)),
    ],
)
def test_lists_on_the_command_line(
    arguments: list[str], expected: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TrainConfig] = []
    monkeypatch.setitem(cli.COMMANDS, "train", (TrainConfig, seen.append))
    cli.main(["train", "--data", "digits", *arguments])
    assert [config.more_ema_decays for config in seen] == [expected]


def test_lists_of_a_stored_configuration_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(data="digits", more_ema_decays=(0.5, 0.999), **OWN)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    seen: list[TrainConfig] = []
    monkeypatch.setitem(cli.COMMANDS, "train", (TrainConfig, seen.append))
    cli.main(["train", "--resume", "--out", str(tmp_path)])
    assert seen == [dataclasses.replace(config, resume=True, out=str(tmp_path))]


def test_json_brings_back_the_same_configuration(tmp_path: Path) -> None:
    config = TrainConfig(
        data="digits",
        lr=3e-4,
        gradient_clip=1.0,
        keep_checkpoints=None,
        more_ema_decays=(0.5, 0.999),
        **OWN,
    )
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    assert TrainConfig.from_json(file) == config
    assert TrainConfig.from_json(str(file)) == config
    assert TrainConfig.from_json(config.to_dict()) == config


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"data": "digits", "patch_szie": 2}, ValueError, "patch_szie=2: no such option; did you mean 'patch_size'"),
        ({"lr": 1e-4}, ValueError, "data: missing; it has no default"),
        ({"data": "digits", "batch_size": "64"}, TypeError, "batch_size='64': expected int, got str"),
        ({"data": None}, TypeError, "data=None: expected str, got NoneType"),
        ({"data": "digits", "lr": None}, TypeError, "lr=None: expected float, got NoneType"),
        ({"data": "digits", "resume": 1}, TypeError, "resume=1: expected bool, got int"),
        ({"data": "digits", "gradient_clip": "no"}, TypeError, "gradient_clip='no': expected float or None"),
    ],
)  # fmt: skip
def test_json_with_unknown_missing_or_wrong_entries(
    content: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TrainConfig.from_json(content)


def test_files_that_hold_no_configuration(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=re.escape(f"{file}: no such configuration file")):
        TrainConfig.from_json(file)
    file.write_text("{data")
    with pytest.raises(ValueError, match=re.escape(f"{file}: not a JSON file")):
        TrainConfig.from_json(file)
    file.write_text("[1]")
    with pytest.raises(TypeError, match=re.escape(f"{file}: expected a JSON object, got list")):
        TrainConfig.from_json(file)


def test_fields_that_cannot_change_are_fields() -> None:
    assert set(FIXED) <= {field.name for field in dataclasses.fields(TrainConfig)}
