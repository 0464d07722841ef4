"""The command line: what it does, what it explains, and what it answers to mistakes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastdit import DiT, cli
from fastdit.sampling import sample, to_uint8
from fastdit.training import TrainConfig
from fastdit.weights import from_pretrained, save_weights

# x_0 is what the model predicts, so that even an untrained one draws grey images, not black and white ones.
DIFFUSION: dict[str, Any] = {"noise_schedule": "squaredcos_cap_v2", "predict_xstart": True}
CLASSES = ["cat", "golden retriever", "10", "b,w"]


def write_checkpoint(folder: Path, **images: Any) -> Path:
    model = DiT(input_size=4, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=4)
    folder.mkdir()
    for name in ("ema", "model"):
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        save_weights(model, folder / f"{name}.safetensors")
    description = {
        "format": 1,
        "model": model.config,
        "classes": CLASSES,
        "diffusion": DIFFUSION,
        "images": {"space": "pixels", **images},
    }
    (folder / "model.json").write_text(json.dumps(description))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


def sample_to(out: Path, checkpoint: Path, *options: str) -> None:
    cli.main(
        ["sample", str(checkpoint), "--steps", "2", "--device", "cpu", "--out", str(out), *options]
    )


def answer(capsys: pytest.CaptureFixture[str], *args: str, status: int = 2) -> str:
    """What goes to stderr when `fastdit ARGS` ends with `status`."""
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert caught.value.code == status
    return capsys.readouterr().err


# ------------------------------------------------------------------ help and mistakes


METAVARS = {
    ("sample", "run"): "RUN_OR_CHECKPOINT",
    ("convert", "source"): "IN",
    ("convert", "target"): "OUT",
    ("inspect", "source"): "FILE",
    ("bench", "what"): "WHAT",
}


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("train", TrainConfig),
        ("sample", cli.SampleConfig),
        ("convert", cli.ConvertConfig),
        ("inspect", cli.InspectConfig),
        ("bench", cli.BenchConfig),
        ("info", cli.InfoConfig),
        ("demo", cli.DemoConfig),
    ],
)
def test_help_explains_every_option(
    command: str, config: type, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    # Behind the usage line, which names some options too; frames are drawn with either character.
    _, _, out = capsys.readouterr().out.replace("│", " ").replace("|", " ").partition("\n\n")
    text = " ".join(out.split())
    for field in dataclasses.fields(config):
        option = METAVARS.get((command, field.name), "--" + field.name.replace("_", "-"))
        entry = re.search(rf" {option}\b(.*?)\((default|required)", text)
        assert entry, option
        # What is left beside other spellings and choices is the explanation.
        told = [word for word in entry[1].split() if not word.startswith(("-", "{"))]
        assert len(re.findall(r"\b[a-z]{2,}\b", " ".join(told))) >= 2, option


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"• {command} " in out for command in cli.COMMANDS)
    assert "--traceback" in out


@pytest.mark.parametrize(
    ("args", "nearest"),
    [
        (["trian"], "did you mean 'train'"),
        (["smaple", "x"], "did you mean 'sample'"),
        (["train", "--data", "digits", "--warmup-step", "1"], "--warmup-steps"),
        (["train", "--data", "digits", "--patch-szie", "1"], "--patch-size"),
        (["sample", "x", "--cgf-scale", "2"], "--cfg-scale"),
        (["info", "--jsn"], "--json"),
    ],
)
def test_misspelt_names_are_answered_with_the_nearest(
    args: list[str], nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nearest in answer(capsys, *args)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ([], "subcommand"),
        (["sample"], "RUN_OR_CHECKPOINT"),
        (["train"], "--data"),
        (["sample", "x", "--num", "many"], "--num"),
        (["sample", "x", "--sampler", "euler"], "--sampler"),
    ],
)
def test_missing_and_wrong_options(
    args: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert word in answer(capsys, *args)


def test_without_tyro(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "tyro", None)
    assert 'pip install "fastdit[cli]"' in answer(capsys, "info")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num", "0"], "num=0"),
        (["--out", "x.jpg"], "out='x.jpg': allowed endings are .png"),
        (["--labels", "dog"], "labels='dog': no such class"),
        (["--labels", "gold retriever"], "labels='gold': no such class"),
        (["--labels", "7"], "labels[0]=7: allowed are 0 to 3"),
        (["--labels=-1"], "labels[0]=-1: allowed are 0 to 3; the null class is model.null_label=4"),
        (["--device", "gpu"], "device='gpu': allowed are"),
        (["--device", "cuda:99"], "device='cuda:99': there are"),
        (["--steps", "0"], "steps=0: allowed are 1 to 1000"),
        (["--steps", "1001"], "steps=1001"),
        (["--cfg-scale", "nan"], "cfg_scale=nan"),
        (["--seed", "-1"], "seed=-1"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--eta", "0.5"], "eta=0.5"),
    ],
)
def test_user_errors_are_one_line(
    options: list[str],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    err = answer(capsys, "sample", str(checkpoint), *options)
    assert err.startswith("fastdit: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_errors_of_files(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nothing: no such file or folder" in answer(capsys, "sample", str(tmp_path / "nothing"))
    (checkpoint / "ema.safetensors").write_bytes(b"<html>")
    assert "ema.safetensors: this is a web page" in answer(capsys, "sample", str(checkpoint))
    assert "num_classes=3" in answer(
        capsys, "train", "--data", "digits", "--num-classes", "3", "--out", str(tmp_path / "x")
    )


def test_traceback_shows_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileNotFoundError):
        cli.main(["sample", str(tmp_path / "nothing"), "--traceback"])
    monkeypatch.setenv("FASTDIT_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["sample", str(tmp_path / "nothing")])


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Any) -> None:
        raise KeyError("a mistake of the library")

    monkeypatch.setitem(cli.COMMANDS, "info", (cli.InfoConfig, broken))
    with pytest.raises(KeyError):
        cli.main(["info"])


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(config: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "info", (cli.InfoConfig, interrupted))
    assert answer(capsys, "info", status=130) == "fastdit: interrupted\n"


# ------------------------------------------------------------------ sample


def test_sample_writes_what_the_library_draws(checkpoint: Path, tmp_path: Path) -> None:
    sample_to(
        tmp_path / "x.npz",
        checkpoint,
        "--num",
        "5",
        "--cfg-scale",
        "3",
        "--seed",
        "4",
        "--batch-size",
        "2",
    )
    with np.load(tmp_path / "x.npz") as opened:
        images, labels = opened["arr_0"], opened["arr_1"]
    assert labels.tolist() == [0, 1, 2, 3, 0]
    drawn = sample(
        from_pretrained(checkpoint),
        [0, 1, 2, 3, 0],
        steps=2,
        cfg_scale=3.0,
        seed=4,
        batch_size=2,
        **DIFFUSION,
    )
    assert np.array_equal(images, to_uint8(drawn))

    asked = json.loads((tmp_path / "x.npz.json").read_text())
    assert asked["cfg_scale"] == 3.0
    assert asked["seed"] == 4
    assert asked["run"] == str(checkpoint)
    assert asked["labels"] == CLASSES
    assert asked["weights"] == str(checkpoint / "ema.safetensors")


def test_sample_options_matter(checkpoint: Path, tmp_path: Path) -> None:
    variants = {
        "plain": [],
        "which": ["--which", "model"],
        "precision": ["--precision", "bf16"],
        "channels": ["--cfg-channels", "all", "--cfg-scale", "3"],
        "guided": ["--cfg-scale", "3"],
        "ddim": ["--sampler", "ddim"],
        "eta": ["--sampler", "ddim", "--eta", "1"],
        "labels": ["--labels", "cat"],
    }
    images = {}
    for name, options in variants.items():
        sample_to(tmp_path / f"{name}.npz", checkpoint, "--num", "2", *options)
        with np.load(tmp_path / f"{name}.npz") as opened:
            images[name] = opened["arr_0"]
    # Three channels are all there are.
    assert np.array_equal(images.pop("channels"), images["guided"])
    assert len({image.tobytes() for image in images.values()}) == len(images)


def test_sample_to_a_grid_and_to_a_folder(checkpoint: Path, tmp_path: Path) -> None:
    sample_to(tmp_path / "x.png", checkpoint, "--num", "4")
    with Image.open(tmp_path / "x.png") as opened:
        assert opened.size == (108, 108)
    sample_to(
        tmp_path / "x", checkpoint, "--num", "3", "--labels", "golden retriever", "10,cat", "b,w"
    )
    labels = json.loads((tmp_path / "x" / "labels.json").read_text())
    assert labels == {"000000.png": 1, "000001.png": 2, "000002.png": 0}
    assert (tmp_path / "x.json").exists()


def test_sample_decodes_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(
        tmp_path / "c", space="latents", vae="some/vae", scaling_factor=0.25
    )
    made: dict[str, Any] = {}

    class Decoder:
        def __init__(self, name: str, **options: Any) -> None:
            made.update(options, name=name)

        def decode(self, latents: Tensor) -> Tensor:
            return latents.tanh().repeat_interleave(2, 2).repeat_interleave(2, 3)

        def fingerprint(self) -> str:
            return "weights of the decoder"

    monkeypatch.setattr(cli, "VAE", Decoder)
    sample_to(tmp_path / "x.npz", checkpoint, "--num", "3", "--batch-size", "2")
    assert made == {"name": "some/vae", "scaling_factor": 0.25, "device": torch.device("cpu")}
    drawn = sample(
        from_pretrained(checkpoint),
        [0, 1, 2],
        steps=2,
        batch_size=2,
        **DIFFUSION,
    )
    with np.load(tmp_path / "x.npz") as opened:
        assert np.array_equal(opened["arr_0"], to_uint8(Decoder("x").decode(drawn)))


def other_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").replace(checkpoint / "ema.safetensors")


def other_diffusion(checkpoint: Path) -> None:
    described = json.loads((checkpoint / "model.json").read_text())
    described["diffusion"]["noise_schedule"] = "linear"
    (checkpoint / "model.json").write_text(json.dumps(described))


def other_classes(checkpoint: Path) -> None:
    described = json.loads((checkpoint / "model.json").read_text())
    described["classes"].reverse()
    (checkpoint / "model.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_weights, "weights_sha256"),
        (other_diffusion, "diffusion"),
        (other_classes, "classes"),
    ],
)
def test_parts_of_what_was_under_the_same_name_are_not_taken(
    change: Any,
    named: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, options = tmp_path / "x.npz", ["--num", "2", "--labels", "cat"]

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastdit.sampling.to_disk.write_samples", killed)
        with pytest.raises(SystemExit):
            sample_to(out, checkpoint, *options)
    change(checkpoint)
    with pytest.raises(SystemExit) as caught:
        sample_to(out, checkpoint, *options)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert f"{out}.parts: holds parts of other images, with {named}=" in err
    assert err.count("=") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], [0, 1, 2, 3, 0, 1]),
        (["cat"], [0] * 6),
        (["3,0"], [3, 0, 3, 0, 3, 0]),
        (["3, 0 1"], [3, 0, 1, 3, 0, 1]),
        (["3", "0"], [3, 0, 3, 0, 3, 0]),
        (["10"], [2] * 6),  # a class of this name, not the eleventh
        (["golden retriever", "b,w"], [1, 3, 1, 3, 1, 3]),
        (["4"], [4] * 6),  # sample() knows whether there is such a class
    ],
)
def test_labels(names: list[str], expected: list[int]) -> None:
    assert cli.choose_labels(names, CLASSES, 6) == expected


# ------------------------------------------------------------------ train and info


def test_train_and_sample_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    sizes = {
        "hidden-size": 16,
        "depth": 1,
        "num-heads": 2,
        "patch-size": 4,
        "batch-size": 4,
        "steps": 2,
    }
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    cli.main(
        [
            "train",
            "--data",
            "digits",
            "--out",
            str(run),
            "--device",
            "cpu",
            "--sample-every",
            "0",
            *options,
        ]
    )
    assert capsys.readouterr().out.splitlines()[-1] == str(run)
    config = json.loads((run / "config.json").read_text())
    assert (config["hidden_size"], config["steps"]) == (16, 2)
    sample_to(tmp_path / "x.npz", run, "--num", "3", "--labels", "7")
    with np.load(tmp_path / "x.npz") as opened:
        assert opened["arr_0"].shape == (3, 8, 8, 1)
        assert opened["arr_1"].tolist() == [7, 7, 7]

    # Resuming needs the folder alone; what is given again overrides what the run was begun with.
    for out in (["--out", str(run)], [f"--out={run}"]):
        cli.main(["train", "--resume", "--steps", "3", *out])
    assert json.loads((run / "config.json").read_text()) == {
        **config,
        "steps": 3,
    }
    assert "step 3 of 3" in capsys.readouterr().out
    assert "no run to resume" in answer(
        capsys, "train", "--resume", "--out", str(tmp_path / "other")
    )


def test_demo_passes_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(cli, "demo", lambda out, *, steps: calls.append((out, steps)))
    cli.main(["demo"])
    cli.main(["demo", "--out", "x", "--steps", "3"])
    assert calls == [("runs/demo", 1800), ("x", 3)]


def test_info(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        cli, "describe", lambda: [("reference", []), ("native", ["no compiler", "no luck"])]
    )
    cli.main(["info"])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line]
    found = {line[0]: line[-1] for line in lines}
    assert found["torch"] == torch.__version__
    assert found["reference"] == "usable"
    assert found["native"] == "no compiler; no luck"
    assert "cpu" in found
    assert found["layer_norm_modulate"] == "reference, triton"


def test_info_of_kernels_that_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cli.main(["info", "--kernels"])
    assert "TRITON_INTERPRET=1" in capsys.readouterr().out.splitlines()[-1]

    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setitem(sys.modules, "triton", None)
    for module in ("shipped", "ahead_of_time"):
        monkeypatch.delitem(sys.modules, f"fastdit.kernels.{module}", raising=False)
    cli.main(["info", "--kernels", "--json"])
    found = json.loads(capsys.readouterr().out)["kernels"]
    assert found == {"reason": "the package triton is not installed", "compiled": []}


def test_info_of_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table. What is in it: tests/kernels/test_ahead_of_time.py, in a process that can compile."""
    row = {
        "kernel": "layer_norm_modulate.forward",
        "case": "plain",
        "d": 1152,
        "dtype": "bf16",
        "shape": [64, 256, 1152],
        "capability": 90,
        "num_warps": 1,
        "registers": 72,
        "shared_bytes": 0,
        "stack_bytes": 0,
        "widest_load": 128,
    }
    asked = []

    def kernel_information(capabilities: tuple[int, ...]) -> dict[str, Any]:
        asked.append(capabilities)
        return {"reason": None, "compiled": [row, {**row, "case": "", "stack_bytes": 8}]}

    monkeypatch.setattr(cli, "kernel_information", kernel_information)
    cli.main(["info", "--kernels", "--capability", "80", "90"])
    assert asked == [(80, 90)]
    head, plain, spilling = capsys.readouterr().out.splitlines()[-3:]
    columns = "kernel case shape dtype sm registers shared spills load warps"
    assert head.split() == columns.split()
    expected = "layer_norm_modulate.forward plain 64x256x1152 bf16 90 72 0 none 128 1"
    assert plain.split() == expected.split()
    assert " 8 bytes " in spilling
    assert head.index("registers") == plain.index("72 ") == spilling.index("72 ")

    assert "capability=(90,): is for --kernels" in answer(capsys, "info", "--capability", "90")


def test_info_compiles_for_the_devices_here(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    stub = ModuleType("fastdit.kernels.shipped")
    stub.shipped = lambda: []
    stub.compile_shipped = lambda launches, capabilities: iter(
        asked.append(list(capabilities)) or []
    )
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for found in ([], [(9, 0), (8, 6), (9, 0)]):
        monkeypatch.setattr(torch.cuda, "device_count", lambda found=found: len(found))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i, found=found: found[i])
        assert cli.kernel_information(()) == {"reason": None, "compiled": []}
    cli.kernel_information((100,))
    assert asked == [[80, 90], [86, 90], [100]]


def test_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastdit", "info", "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parent.parent)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert found["backends"]["reference"] == {"usable": True, "reasons": []}
    assert found["devices"][0]["device"] == "cpu"


# ------------------------------------------------------------------ weights and bench


def test_convert_and_inspect(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.safetensors"
    cli.main(["convert", str(checkpoint), str(out), "--which", "model"])
    expected = from_pretrained(checkpoint, which="model").state_dict()
    for name, value in from_pretrained(out).state_dict().items():
        assert torch.equal(value, expected[name])
    capsys.readouterr()
    cli.main(["inspect", str(out)])
    text = capsys.readouterr().out
    assert "blocks.*.attn.qkv.weight" in text
    assert "num_heads=" in text
    cli.main(["inspect", str(out), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == sum(value.numel() for value in expected.values())
    assert "no weights in this folder" in answer(capsys, "inspect", str(tmp_path))


def test_bench_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it saves is what `auto` is asked for next; what cannot run has its reason."""
    monkeypatch.setenv("FASTDIT_CACHE", str(tmp_path / "cache"))
    # Once: the kernels are interpreted here.
    measure = functools.partial(cli.attention.measure, rounds=1)
    monkeypatch.setattr(cli.attention, "measure", measure)
    options = ["--model", "DiT-S/8", "--batch", "2", "--dtype", "fp32", "--image-size", "128"]
    cli.main(["bench", "attention", *options, "--device", "cpu", "--save", "--json"])
    said = capsys.readouterr().out
    rows = json.loads(said[: said.rindex("]") + 1])
    by_backend = {row["backend"]: row for row in rows if row["direction"] == "inference"}
    assert by_backend["sdpa"]["ms"] > 0
    assert "not on cpu" in by_backend["cudnn"]["reason"]
    saved = json.loads((tmp_path / "cache/attention/cpu.json").read_text())
    assert saved["entries"][0]["tokens"] == 4
    cli.main(["bench", "attention", *options, "--device", "cpu"])
    assert capsys.readouterr().out.startswith("batch  tokens")


def test_bench_sampling(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(
        cli.DiT_models,
        "DiT-S/8",
        lambda **sizes: DiT(hidden_size=16, depth=1, num_heads=2, patch_size=4, **sizes),
    )
    # On a clock by which every draw takes a second.
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr("fastdit.sampling.measuring.time", clock)
    options = ["--model", "DiT-S/8", "--batch", "2", "--dtype", "fp32", "--image-size", "64"]
    cli.main(["bench", "sampling", *options, "--steps", "2", "--device", "cpu", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["provider"] for row in rows][:3] == ["reference", "eager", "fastdit"]
    assert all((row["ms a step"], row["ratio"]) == (500, 1) for row in rows)
    assert "save=True: is for attention" in answer(capsys, "bench", "sampling", "--save")
    assert "batch" in answer(capsys, "bench", "sampling", "--batch", "0")
