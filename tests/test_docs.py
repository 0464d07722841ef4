"""The commands of docs/: as far as they go without the GPUs, nodes and data that they are for."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fastdit.data import open_data
from fastdit.files import read_json
from fastdit.training import TrainConfig
from tests.data.helpers import save_animals, save_vae

TRAINING = (Path(__file__).parent.parent / "docs" / "training.md").read_text()


def commands(language: str) -> list[list[str]]:
    lines = "".join(re.findall(rf"```{language}\n(.*?)```", TRAINING, flags=re.DOTALL)).splitlines()
    wanted = ("fastdit ", "torchrun ", "srun torchrun ")
    return [shlex.split(line) for line in lines if line.startswith(wanted)]


def started(command: list[str]) -> tuple[Any, list[str]]:
    """What torchrun makes of its own options, and the command that it starts."""
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(command[command.index("torchrun") + 1 :])
    assert options.module
    assert options.training_script == "fastdit"
    return options, options.training_script_args


def test_every_command_is_understood() -> None:
    """By torchrun's parser and ours, which checks every value."""
    pytest.importorskip("tyro")
    from fastdit.cli import ExtractConfig, parse

    found = []
    for command in commands("bash") + commands("sbatch"):
        options = None
        if command[0] != "fastdit":
            command = command[: command.index("||")] if "||" in command else command
            options, arguments = started(command)
        else:
            arguments = command[1:]
        found.append((options, parse(arguments)))
    kinds = [type(config) for _, config in found]
    assert kinds == [ExtractConfig, TrainConfig, ExtractConfig, *[TrainConfig] * 3]
    for options, config in found:
        if options is None or not isinstance(config, TrainConfig):
            continue
        assert config.auto_resume  # torchrun starts the same command again
        # "1:1" where none is given; the scheduler's four where it is its variable.
        nodes = options.nnodes.replace("$SLURM_NNODES", "4").split(":")[-1]
        assert config.batch_size % (int(nodes) * int(options.nproc_per_node)) == 0
    batch = TRAINING[TRAINING.index("```sbatch") :]
    assert "--nodes=4" in batch
    assert "--signal=TERM@" in batch


def test_images_to_latents_to_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two commands, on a few images, a tiny VAE and a tiny model."""
    pytest.importorskip("tyro")
    diffusers = pytest.importorskip("diffusers")
    from fastdit.cli import main

    monkeypatch.chdir(tmp_path)
    save_animals(tmp_path / "data" / "imagenet" / "train")
    save_vae(tmp_path / "vae", diffusers)
    smaller = {
        "stabilityai/sd-vae-ft-ema": "vae",
        "256": "16",
        "--model DiT-XL/2": "--hidden-size 32 --depth 1 --num-heads 2 --patch-size 2 --steps 2 --sample-every 0",
        "--batch-size 16": "--batch-size 4",
    }
    for command in commands("bash")[:2]:
        text = " ".join(command[1:])
        for large, small in smaller.items():
            text = text.replace(large, small)
        main([*text.split(), "--device", "cpu", "--num-workers", "0"])
    data = open_data("data/latents")
    model = read_json(tmp_path / "runs" / "xl2" / "checkpoints" / "step-00000002" / "model.json")
    assert model["images"]["space"] == "latents"
    assert model["images"]["vae"] == data.vae["name"]  # type: ignore[index]
    assert model["classes"] == data.classes
