"""A run from its start to its end."""

from __future__ import annotations

import importlib
import math
import re
import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit import DiT, create_diffusion, files, from_pretrained
from fastdit.data import Digits
from fastdit.data.sampler import EpochBatchSampler, derived_seed
from fastdit.files import read_json
from fastdit.models import multiply_adds
from fastdit.sampling import sample, save_grid, to_uint8
from fastdit.testing import assert_close, assert_gradient_close, assert_same_bits
from fastdit.training import TrainConfig, checkpoint, loop, train
from fastdit.training.checkpoint import Saver
from fastdit.training.loop import Trainer, _dataset, _model, learning_rate
from fastdit.training.metrics import peak_flops, read_metrics
from fastdit.weights import load_description, problems

from .helpers import FORKS, checkpoints, record, tensors, tiny

CPU = torch.device("cpu")


def _losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


# ------------------------------------------------------------------ the update


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0: 1e-2, 7: 1e-2}),
        ({"warmup_steps": 4}, {0: 2.5e-3, 1: 5e-3, 3: 1e-2, 4: 1e-2, 7: 1e-2}),
        ({"lr_schedule": "cosine"}, {0: 1e-2, 4: 5e-3, 8: 0.0}),
        (
            {"lr_schedule": "cosine", "warmup_steps": 2},
            {0: 5e-3, 1: 1e-2, 2: 1e-2, 3: 1e-2 * (1 + math.sqrt(0.75)) / 2, 4: 7.5e-3, 5: 5e-3, 8: 0.0},
        ),
    ],
)  # fmt: skip
def test_learning_rate(options: dict[str, Any], expected: dict[int, float]) -> None:
    config = tiny(Path("unused"), steps=8, **options)
    found = {step: learning_rate(config, step) for step in expected}
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-18)


def _recorded_gradients(trainer: Trainer, into: list[list[Tensor]]) -> None:
    """Copies the gradients that the optimizer is given, step by step, as they were before clipping."""
    update = trainer.optimizer.update

    def recording(*args: Any, **options: Any) -> None:
        into.append([p.grad.clone() for p in trainer.optimizer.parameters])
        update(*args, **options)

    trainer.optimizer.update = recording


def test_update_is_that_of_adamw_written_by_hand(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", steps=3, lr=0.1, weight_decay=0.3, warmup_steps=2)
    trainer = Trainer(config, CPU)
    weights = trainer.optimizer.parameters
    expected = [weight.detach().double() for weight in weights]
    gradients: list[list[Tensor]] = []
    _recorded_gradients(trainer, gradients)
    trainer.run()

    first = [torch.zeros_like(weight) for weight in expected]
    second = [torch.zeros_like(weight) for weight in expected]
    for step, (lr, gradient) in enumerate(zip([0.05, 0.1, 0.1], gradients, strict=True), start=1):
        for i, g in enumerate(gradient):
            g = g.double()
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g**2
            direction = first[i] / (1 - 0.9**step)
            direction /= (second[i] / (1 - 0.999**step)).sqrt() + 1e-8
            expected[i] = expected[i] * (1 - lr * 0.3) - lr * direction
    assert len(weights) == sum(1 for p in trainer.model.parameters() if p.requires_grad)
    for weight, value in zip(weights, expected, strict=True):
        # float32's default; a weight moves by 0.25 in these steps.
        torch.testing.assert_close(weight.detach(), value.float())


def test_average_follows_every_update(tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "run", steps=3, checkpoint_every=1, ema_decay=0.75))
    name = "blocks.1.mlp.fc2.weight"
    torch.manual_seed(0)
    first = DiT(8, 4, 1, hidden_size=32, depth=2, num_heads=2, num_classes=10).state_dict()[name]
    exact, plain = first.double(), first.clone()
    for step in (1, 2, 3):
        weight = tensors(run, step)[f"model.{name}"]
        exact = 0.75 * exact + 0.25 * weight.double()
        plain = 0.75 * plain + 0.25 * weight
    assert_close(name, tensors(run, 3)[f"ema.{name}"], exact, plain)


def test_position_embedding_is_not_trained(tmp_path: Path) -> None:
    trainer = Trainer(tiny(tmp_path / "run", weight_decay=0.5), CPU)
    before = trainer.model.pos_embed.clone()
    trainer.run()
    assert torch.equal(trainer.model.pos_embed, before)
    assert torch.equal(trainer.ema.pos_embed, before)


def test_first_loss_is_that_of_the_noise_of_the_runs_generator(tmp_path: Path) -> None:
    # A new model predicts 0, so the error is the noise itself.
    run = train(tiny(tmp_path / "run", steps=1, seed=5))
    generator = torch.Generator().manual_seed(derived_seed(5, 0))
    torch.randint(1000, (8,), generator=generator)
    noise = torch.randn(8, 1, 8, 8, generator=generator)
    (line,) = read_metrics(run / "metrics.jsonl")
    assert line["mse"] == pytest.approx(float((noise**2).mean()), rel=1e-6)
    assert line["loss"] == pytest.approx(line["mse"] + line["vb"], rel=1e-6)


def test_gradient_is_clipped_to_the_norm_asked_for(tmp_path: Path) -> None:
    def norms(**options: Any) -> tuple[list[float], list[float], float]:
        """What is logged, what was computed, and what the first moments were made of: exp_avg is 0.1 of it."""
        trainer = Trainer(
            tiny(tmp_path / str(options), steps=2, checkpoint_every=1, **options), CPU
        )
        gradients: list[list[Tensor]] = []
        _recorded_gradients(trainer, gradients)
        run = trainer.run()
        moments = [t for name, t in tensors(run, 1).items() if ".exp_avg." in name]
        logged = [line["gradient_norm"] for line in read_metrics(run / "metrics.jsonl")]
        return logged, [_norm(each) for each in gradients], _norm(moments) / 0.1

    logged, computed, used = norms()
    assert logged == pytest.approx(computed, rel=1e-5)
    assert used == pytest.approx(computed[0], rel=1e-5)
    clipped_logged, _, clipped = norms(gradient_clip=used / 4)
    assert clipped_logged[0] == logged[0]
    # torch divides by norm + 1e-6.
    assert clipped == pytest.approx(used / 4, rel=1e-4)
    assert norms(gradient_clip=used * 4)[2] == used


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().pow(2).sum()) for t in tensors))


class _NoRead(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "_local_scalar_dense" in str(func):
            raise AssertionError("a step reads from the device")
        return func(*args, **(kwargs or {}))


def test_step_reads_nothing_from_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a CPU there is no device to wait for, and torch's own AdamW is told by the host whether it has to do anything.
    module = importlib.import_module("fastdit.ops.adamw_ema")
    monkeypatch.setattr(module, "_fused_on_cpu", lambda *_: False)
    trainer = Trainer(tiny(tmp_path / "run", gradient_clip=1.0), CPU)
    batches = trainer._batches()
    next(batches)  # the first one is checked
    x0, y = next(batches)
    with _NoRead():
        trainer._update(x0, y)
    assert trainer.summed == 1
    with pytest.raises(AssertionError), _NoRead():
        trainer.sums[0].item()


# ------------------------------------------------------------------ what a run leaves


def test_run_folder(tmp_path: Path) -> None:
    config = tiny(tmp_path / "some" / "run", steps=5, log_every=2, checkpoint_every=2)
    before = torch.get_rng_state()
    run = train(config)
    assert run == tmp_path / "some" / "run"
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
    ]
    assert TrainConfig.from_json(run / "config.json") == config
    assert checkpoints(run) == ["step-00000002", "step-00000004", "step-00000005"]

    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 5]
    for line in lines:
        assert list(line) == [
            *("step", "loss", "mse", "vb", "gradient_norm"),
            *("learning_rate", "images_per_second", "seconds_per_step", "seconds", "not_finite"),
        ]
        assert line["learning_rate"] == 1e-2
        assert line["images_per_second"] * line["seconds_per_step"] == pytest.approx(8)
        assert line["not_finite"] == 0
        assert line["gradient_norm"] > 0
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    spent = [steps * line["seconds_per_step"] for steps, line in zip((2, 2, 1), lines, strict=True)]
    assert seconds[-1] == pytest.approx(sum(spent))


def test_metrics_are_means_over_the_interval(tmp_path: Path) -> None:
    every = _losses(train(tiny(tmp_path / "every", steps=4)))
    assert len(set(every)) == 4
    pairs = _losses(train(tiny(tmp_path / "pairs", steps=4, log_every=2)))
    assert pairs == pytest.approx([sum(every[:2]) / 2, sum(every[2:]) / 2], rel=1e-6)


def test_checkpoint_can_be_loaded_and_says_what_it_is(tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "run", learn_sigma=False, noise_schedule="squaredcos_cap_v2"))
    assert "vb" not in read_metrics(run / "metrics.jsonl")[0]
    model = from_pretrained(run)
    assert model.config["hidden_size"] == 32
    found = tensors(run, 4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, found[f"ema.{name}"])
    assert not torch.equal(
        found["ema.final_layer.linear.weight"], found["model.final_layer.linear.weight"]
    )
    assert load_description(run) == {
        "format": 1,
        "model": model.config,
        "classes": [str(digit) for digit in range(10)],
        "diffusion": {"noise_schedule": "squaredcos_cap_v2", "learn_sigma": False},
        "images": {
            "space": "pixels",
            "image_size": 8,
            "channels": 1,
            "vae": None,
            "scaling_factor": None,
        },
    }
    state = read_json(run / "checkpoints" / "step-00000004" / "state.json")
    assert (state["format"], state["step"], state["images"]) == (2, 4, 1797)
    moments = {name.split(".")[1] for name in found if name.startswith("optimizer.")}
    assert moments == {"exp_avg", "exp_avg_sq", "step"}
    assert "optimizer.exp_avg.pos_embed" not in found
    assert found["optimizer.step"].tolist() == [4.0]
    own = {"rng.run", "rng.cpu", "rng.numpy", "rng.numpy.rest", "rng.python", "rng.python.gauss"}
    assert {name for name in found if name.startswith("rng.")} == own
    folder = run / "checkpoints" / "step-00000004"
    assert problems(folder) == []
    told = read_json(folder / "manifest.json")
    assert (told["step"], told["processes"], told["torch"]) == (4, 1, torch.__version__)
    every = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(told["files"]) == every - {"manifest.json"}


def test_more_averages(tmp_path: Path) -> None:
    options = {"steps": 3, "checkpoint_every": 1, "ema_decay": 0.9, "more_ema_decays": (0.5, 0.999)}
    run = train(tiny(tmp_path / "run", **options))
    plain = train(tiny(tmp_path / "plain", **(options | {"more_ema_decays": ()})))
    names = {path.name for path in (run / "checkpoints/step-00000003").glob("*.safetensors")}
    assert names == {f"{n}.safetensors" for n in ("model", "ema", "ema-0.5", "ema-0.999")}
    expected = tensors(plain, 3)
    found = tensors(run, 3)
    for name, value in expected.items():  # the others have no say
        assert_same_bits(name, found[name], value)
    key = "blocks.1.mlp.fc2.weight"
    torch.manual_seed(0)
    first = DiT(8, 4, 1, hidden_size=32, depth=2, num_heads=2, num_classes=10).state_dict()[key]
    for decay in (0.9, 0.5, 0.999):
        exact, plain_average = first.double(), first.clone()
        for step in (1, 2, 3):
            weight = tensors(run, step)[f"model.{key}"]
            exact = decay * exact + (1 - decay) * weight.double()
            plain_average = decay * plain_average + (1 - decay) * weight
        which = "ema" if decay == 0.9 else f"ema:{decay}"
        loaded = from_pretrained(run, which=which).state_dict()[key]
        assert_same_bits(which, loaded, found[f"{which.replace(':', '-')}.{key}"])
        assert_close(which, loaded, exact, plain_average)
    with pytest.raises(FileNotFoundError, match=r"ema-0\.7\.safetensors"):
        from_pretrained(run, which="ema:0.7")

    resumed = train(tiny(run, **(options | {"steps": 4, "resume": True})))
    whole = tensors(train(tiny(tmp_path / "whole", **(options | {"steps": 4}))), 4)
    after = tensors(resumed, 4)
    assert [name for name in whole if not torch.equal(after[name], whole[name])] == []


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "two", steps=6, checkpoint_every=1, keep_checkpoints=2))
    assert checkpoints(run) == ["step-00000005", "step-00000006"]
    run = train(tiny(tmp_path / "all", steps=6, checkpoint_every=1, keep_checkpoints=None))
    assert len(checkpoints(run)) == 6


def test_pictures_are_drawn_and_change_nothing(pictures: None, tmp_path: Path) -> None:
    options = {"steps": 4, "checkpoint_every": 4, "seed": 7, "cfg_scale": 3.0}
    drawn = train(tiny(tmp_path / "drawn", sample_every=3, sample_steps=2, **options))
    assert [path.name for path in sorted((drawn / "samples").iterdir())] == [
        "step-00000003.png",
        "step-00000004.png",
    ]
    # Ten classes by four, from the averaged weights, with the guidance and the seed of the configuration.
    images = sample(from_pretrained(drawn), list(range(10)) * 4, steps=2, cfg_scale=3.0, seed=7)
    save_grid(to_uint8(images), tmp_path / "expected.png", columns=10)
    grid = (drawn / "samples" / "step-00000004.png").read_bytes()
    assert grid == (tmp_path / "expected.png").read_bytes()
    with Image.open(drawn / "loss.png") as curve:
        assert curve.size == (1200, 675)

    plain = train(tiny(tmp_path / "plain", **options))
    assert not (plain / "samples").exists()
    expected = tensors(plain, 4)
    for name, value in tensors(drawn, 4).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    "error",
    [FloatingPointError("40 of 40"), OSError("No space"), torch.OutOfMemoryError("2 GiB")],
)
def test_a_picture_that_cannot_be_drawn_ends_no_run(
    error: Exception,
    pictures: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And the checkpoint that is due is on its way before anything is drawn."""
    started: list[int] = []
    save = Saver.save

    def noted(self: Saver, trained: Any, state: Any, description: Any) -> None:
        save(self, trained, state, description)
        started.append(state["step"])

    def broken(*_: Any, **__: Any) -> None:
        started.append(0)
        raise error

    monkeypatch.setattr(Saver, "save", noted)
    monkeypatch.setattr(loop, "sample", broken)
    monkeypatch.setattr(loop.plots, "draw_loss_curve", broken)
    run = train(tiny(tmp_path / "run", steps=4, checkpoint_every=2, sample_every=2))
    assert started == [2, 0, 0, 4, 0, 0]
    assert capsys.readouterr().out.count(f"NOT DRAWN, the run goes on: {error}") == 4
    assert not (run / "samples").exists()


def test_grid_of_a_model_without_null_class_is_unguided(pictures: None, tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", steps=1, sample_every=1, sample_steps=1, class_dropout_prob=0.0)
    run = train(config)
    assert (run / "samples" / "step-00000001.png").exists()
    assert from_pretrained(run).null_label is None


def test_without_the_packages_for_pictures_the_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tiny(tmp_path / "run", sample_every=1))
    assert "No pictures are drawn: matplotlib missing" in capsys.readouterr().out
    assert not (run / "samples").exists()
    assert not (run / "loss.png").exists()


def test_start_says_what_will_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tiny(tmp_path / "run"))
    model = from_pretrained(run)
    lines = capsys.readouterr().out.splitlines()
    parameters = sum(p.numel() for p in model.parameters())
    assert f"{parameters:,} parameters" in lines[0]
    assert f"{multiply_adds(model) / 1e6:,.1f} million multiply-adds" in lines[0]
    assert "digits, 1,797 images in 10 classes" in lines[1]
    assert "cpu, fp32" in lines[2]
    assert f"{run}, step 0 of 4" in lines[3]
    # Here is no terminal, so there is a line for each of metrics.jsonl instead of a bar.
    assert lines[-1].startswith("step 4 of 4: loss ")


# ------------------------------------------------------------------ kinds of runs


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_falls(precision: str, tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", steps=40, precision=precision, log_every=10)
    run = train(config)
    losses = _losses(run)
    assert losses[-1] < 0.7 * losses[0]
    assert all(t.dtype == torch.float32 for n, t in tensors(run, 40).items() if "rng" not in n)


def test_bf16_computes_in_bf16(tmp_path: Path) -> None:
    trainer = Trainer(tiny(tmp_path / "run", precision="bf16"), CPU)
    seen = []
    trainer.model.blocks[0].mlp.fc1.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    trainer.run()
    assert set(seen) == {torch.bfloat16}


# Dynamo looks for gradients of tensors that have none, and hides the warning in a way that pytest undoes.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("compile", ["blocks", "whole"])
def test_compiled_run_has_the_same_numbers_and_names(
    compile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()  # of what other tests have compiled
    expected = tensors(train(tiny(tmp_path / "off")), 4)
    compiled: list[object] = []
    original = torch.compile

    # Dynamo alone: what is checked here is what is compiled, and Inductor takes half a minute.
    def traced(model: object, **_: object) -> object:
        compiled.append(model)
        return original(model, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    run = train(tiny(tmp_path / "run", compile=compile))
    assert len(compiled) == {"blocks": 2, "whole": 1}[compile]
    found = tensors(run, 4)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("conditioning", ["adaln", "cross_attention", "in_context"])
def test_other_conditionings_train(conditioning: str, tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "run", steps=2, conditioning=conditioning))
    assert from_pretrained(run).conditioning == conditioning
    assert all(math.isfinite(loss) for loss in _losses(run))


@FORKS
def test_folder_of_images(folder_of_images: Path, tmp_path: Path) -> None:
    config = tiny(
        tmp_path / "run", data=str(folder_of_images), image_size=8, num_classes=5, num_workers=2
    )
    run = train(config)
    description = load_description(run)
    assert description["classes"] == ["ant", "bee", "cat"]
    assert description["images"]["channels"] == 3
    assert description["model"]["in_channels"] == 3
    assert description["model"]["num_classes"] == 5
    assert len(_losses(run)) == 4


def test_named_model_and_defaults(folder_of_images: Path, tmp_path: Path) -> None:
    own = dict.fromkeys(["hidden_size", "depth", "num_heads", "patch_size"])
    for name, width, patch in (("DiT-B/8", 768, 8), (None, 384, 2)):
        config = tiny(tmp_path, data=str(folder_of_images), **own, model=name)
        dataset = _dataset(config, None)
        assert (dataset.image_size, dataset.horizontal_flip) == (256, True)
        with torch.device("meta"):
            model = _model(config, dataset, None)
        assert (model.config["hidden_size"], len(model.blocks)) == (width, 12)
        assert (model.patch_size, model.input_size) == (patch, (256, 256))


class _StandInVAE:
    """Halves each side and has two channels, of a deviation of 0.1."""

    latent_channels, downsample_factor, scaling_factor = 2, 2, 0.5

    def __init__(self, name: str, *, device: torch.device) -> None:
        self.name = name

    def moments(self, images: Tensor) -> Tensor:
        mean = torch.nn.functional.avg_pool2d(images[:, :2], 2)
        return torch.cat([mean, torch.full_like(mean, 0.1).log() * 2], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        large = torch.nn.functional.interpolate(latents, scale_factor=2.0)
        return torch.cat([large, large[:, :1]], dim=1)


@FORKS
def test_latents_of_a_vae(
    pictures: None, folder_of_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdit.training.loop.VAE", _StandInVAE)
    options = {"data": str(folder_of_images), "image_size": 16, "vae": "some/vae", "steps": 2}
    run = train(tiny(tmp_path / "run", sample_every=2, sample_steps=2, **options))
    assert from_pretrained(run).input_size == (8, 8)
    assert load_description(run)["images"] == {
        "space": "latents",
        "image_size": 16,
        "channels": 2,
        "vae": "some/vae",
        "scaling_factor": 0.5,
    }
    with Image.open(run / "samples" / "step-00000002.png") as grid:
        assert grid.mode == "RGB"
    with pytest.raises(ValueError, match="image_size=15: must be divisible by 2"):
        train(tiny(tmp_path / "odd", **(options | {"image_size": 15})))


# ------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 2000}, "batch_size=2000"),
        ({"num_classes": 9}, "num_classes=9: the data has 10 classes"),
        ({"data": "nowhere"}, "nowhere"),
        ({"patch_size": 3}, "patch_size=3"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"device": "cuda:99"}, "device='cuda:99': there are"),
        ({"resume": True}, "no run to resume"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["pixel", "label"])
def test_values_of_the_first_batch_are_checked(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def getitem(dataset: Digits, key: tuple[int, int]) -> tuple[Tensor, int]:
        image, label = dataset.images[key[0]], int(dataset.labels[key[0]])
        return (image / 0, label) if value == "pixel" else (image, 11)

    monkeypatch.setattr(Digits, "__getitem__", getitem)
    message = "NaN or Inf" if value == "pixel" else re.escape("y[0]=11: allowed are 0 .. 10")
    with pytest.raises(ValueError, match=message):
        train(tiny(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "run"))
    before = record(run, 4)
    with pytest.raises(ValueError, match="holds a run already; resume=True"):
        train(tiny(tmp_path / "run"))
    assert record(run, 4) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder, this is a file"):
        train(tiny(tmp_path / "file"))


# ------------------------------------------------------------------ steps that are not finite


def _break(
    trainer: Trainer, what: str, steps: set[int], seen: list[tuple[Tensor, ...]] | None = None
) -> None:
    """Makes the loss, or only the gradient, of some steps (the first is 1) not finite; `seen` gets (x0, t, noise)."""
    original = trainer.diffusion.training_losses
    weight = trainer.model.final_layer.linear.weight

    def losses(
        model: Any, x0: Tensor, t: Tensor, arguments: dict[str, Tensor], noise: Tensor
    ) -> dict[str, Tensor]:
        if seen is not None:
            seen.append((x0.clone(), t.clone(), arguments["y"].clone(), noise.clone()))
        terms = original(model, x0, t, arguments, noise)
        if what == "loss" and trainer.step + 1 in steps:
            terms["loss"] = terms["loss"] + math.nan  # which leaves the gradient as it is
        return terms

    trainer.diffusion.training_losses = losses
    if what == "gradient":
        weight.register_hook(lambda g: g * math.inf if trainer.step + 1 in steps else g)


@pytest.mark.parametrize(
    ("what", "told", "ranks"),
    [("loss", "the loss in rank 0", [0]), ("gradient", "the gradient", [])],
)
def test_step_that_is_not_finite_changes_nothing_and_the_run_goes_on(
    what: str, told: str, ranks: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"steps": 5, "checkpoint_every": 1, "keep_checkpoints": None, "gradient_clip": 1.0}
    clean = Trainer(tiny(tmp_path / "clean", **options), CPU)
    broken = Trainer(tiny(tmp_path / "run", nonfinite_steps=2, **options), CPU)
    expected: list[tuple[Tensor, ...]] = []
    seen: list[tuple[Tensor, ...]] = []
    _break(clean, what, set(), expected)
    _break(broken, what, {3, 5}, seen)
    clean.run()
    capsys.readouterr()
    run = broken.run()
    assert "loss not finite" in capsys.readouterr().out

    for before, after, drawn in ((2, 3, True), (4, 5, True), (3, 4, False), (1, 2, False)):
        old, new = tensors(run, before), tensors(run, after)
        changed = {name for name in new if not torch.equal(new[name], old[name])}
        kinds = {name.partition(".")[0] for name in changed}
        assert kinds == ({"rng"} if drawn else {"model", "ema", "optimizer", "rng"})
        assert ("optimizer.step" in changed) is not drawn
    assert tensors(run, 5)["optimizer.step"].tolist() == [3.0]
    # Data and random numbers go on as if nothing had happened.
    for found, wanted in zip(seen, expected, strict=True):
        for value, other in zip(found, wanted, strict=True):
            assert_same_bits("what a step was given", value, other)

    lines = read_metrics(run / "metrics.jsonl")
    assert [line["not_finite"] for line in lines] == [0, 0, 1, 0, 1]
    names = ("loss", "mse", "vb", "gradient_norm")
    for line in lines:
        assert all((line[name] is None) == (line["step"] in (3, 5)) for name in names)
    order = iter(EpochBatchSampler(1797, 8, seed=0))
    images = [[index for index, _ in next(order)] for _ in range(5)]
    assert read_metrics(run / "not_finite.jsonl") == [
        {"step": step, "not_finite": told, "ranks": ranks, "images": images[step - 1]}
        for step in (3, 5)
    ]
    assert not (tmp_path / "clean" / "not_finite.jsonl").exists()


def test_means_are_those_of_the_finite_steps(tmp_path: Path) -> None:
    every = Trainer(tiny(tmp_path / "every", steps=4), CPU)
    _break(every, "loss", {2})
    lines = read_metrics(every.run() / "metrics.jsonl")
    together = Trainer(tiny(tmp_path / "together", steps=4, log_every=4), CPU)
    _break(together, "loss", {2})
    (line,) = read_metrics(together.run() / "metrics.jsonl")
    assert line["not_finite"] == 1
    for name in ("loss", "mse", "vb", "gradient_norm"):
        values = [each[name] for each in lines if each[name] is not None]
        assert len(values) == 3
        assert line[name] == pytest.approx(sum(values) / 3, rel=1e-6)


@pytest.mark.parametrize(
    ("log_every", "checkpoint_every", "kept"),
    # The flags of a step are read with the next one, or with a line of metrics.
    [(1, 1, [1, 2, 3, 4]), (100, 2, [2, 4]), (3, 100, [])],
)
def test_too_many_steps_in_a_row_end_the_run_and_keep_the_checkpoints(
    log_every: int, checkpoint_every: int, kept: list[int], tmp_path: Path
) -> None:
    options = {"log_every": log_every, "checkpoint_every": checkpoint_every, "steps": 20}
    config = tiny(tmp_path / "run", nonfinite_steps=3, keep_checkpoints=None, **options)
    trainer = Trainer(config, CPU)
    _break(trainer, "loss", {1, *range(3, 20)})
    with pytest.raises(FloatingPointError) as caught:
        trainer.run()
    message = str(caught.value)
    assert message.startswith("step 5: the loss in rank 0 is not finite, in 3 steps in a row")
    assert str(tmp_path / "run" / "checkpoints") in message
    run = tmp_path / "run"
    steps = [line["step"] for line in read_metrics(run / "not_finite.jsonl")]
    assert steps == [1, 3, 4, 5]
    assert checkpoints(run) == [f"step-{step:08d}" for step in kept]
    for name in checkpoints(run):
        assert problems(run / "checkpoints" / name) == []
        from_pretrained(run / "checkpoints" / name)


@pytest.mark.parametrize("log_every", [1, 100])
def test_steps_in_a_row_are_counted_across_a_resume(
    log_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"nonfinite_steps": 4, "steps": 9, "log_every": log_every}
    trainer = Trainer(tiny(tmp_path / "run", **options), CPU)
    _break(trainer, "loss", set(range(1, 10)))
    monkeypatch.setattr(trainer, "_agreed_to_stop", lambda: trainer.step == 2)
    run = trainer.run()
    again = Trainer(tiny(run, resume=True, **options), CPU)
    _break(again, "loss", set(range(1, 10)))
    with pytest.raises(FloatingPointError, match=r"step 4: .* in 4 steps in a row"):
        again.run()
    steps = [line["step"] for line in read_metrics(run / "not_finite.jsonl")]
    assert steps == [1, 2, 3, 4]


# ------------------------------------------------------------------ checkpoints that cannot be written


def _full_disk(monkeypatch: pytest.MonkeyPatch, file: int) -> None:
    """Lets the writing of one file fail, the first being 1. A checkpoint here has four."""
    original, saves = checkpoint.save_weights, 0

    def save(*arguments: Any, **options: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == file:
            raise OSError(28, "No space left on device")
        original(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_weights", save)


def test_checkpoint_that_cannot_be_written_ends_the_run_which_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(tiny(tmp_path / "whole", steps=6))
    with monkeypatch.context() as patch:
        _full_disk(patch, 4 + 2)  # in the middle of the second one
        with pytest.raises(OSError, match="No space left"):
            train(tiny(tmp_path / "run", steps=6))
    run = tmp_path / "run"
    assert checkpoints(run) == ["step-00000002"]
    assert not (run / "run.lock").exists()

    train(tiny(run, steps=6, resume=True))
    assert record(run, 6) == record(expected, 6)
    reference = tensors(expected, 6)
    for name, value in tensors(run, 6).items():
        assert torch.equal(value, reference[name]), name


def test_checkpoint_that_cannot_be_written_is_only_told_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _full_disk(monkeypatch, 4 + 2)
    run = train(tiny(tmp_path / "run", steps=6, on_save_error="warn"))
    out = capsys.readouterr().out
    assert out.count("NOT SAVED, the run goes on:") == 1
    assert "No space left" in out
    assert checkpoints(run) == ["step-00000002", "step-00000006"]
    assert len(_losses(run)) == 6


def test_metrics_that_cannot_be_written_are_told_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = files.append_jsonl

    def append(path: Path, line: dict[str, Any]) -> None:
        if line["step"] == 3:
            raise OSError(28, "No space left on device")
        original(path, line)

    monkeypatch.setattr(files, "append_jsonl", append)
    run = train(tiny(tmp_path / "run"))
    out = capsys.readouterr().out
    assert out.count("NOT WRITTEN, the run goes on: [Errno 28] No space left on device") == 1
    assert "step 3 of 4: loss" in out
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2, 4]
    assert checkpoints(run) == ["step-00000002", "step-00000004"]


def test_space_is_looked_for_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=10**12, used=0, free=1000)
    monkeypatch.setattr("fastdit.training.checkpoint.shutil.disk_usage", lambda _: usage)
    with pytest.raises(
        OSError, match=r"No space left writing .*step-00000004: need .* MiB, have 0"
    ):
        train(tiny(tmp_path / "run"))
    assert checkpoints(tmp_path / "run") == ["step-00000002"]
    usage.free = 10**9
    train(tiny(tmp_path / "run", resume=True))
    assert checkpoints(tmp_path / "run") == ["step-00000002", "step-00000004"]


# ------------------------------------------------------------------ other tools


def test_tensorboard_gets_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, *, purge_step: int) -> None:
            made.append(self)
            self.folder, self.purge_step, self.closed = folder, purge_step, False
            self.values: list[tuple[str, float, int]] = []

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.values.append((name, value, step))

        def close(self) -> None:
            self.closed = True

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run = train(tiny(tmp_path / "run", tensorboard=True, steps=2))
    train(tiny(run, tensorboard=True, steps=3, resume=True))
    assert [(each.purge_step, each.closed) for each in made] == [(1, True), (3, True)]
    assert {each.folder for each in made} == {str(run / "tensorboard")}
    expected = [
        (name, value, line["step"])
        for line in read_metrics(run / "metrics.jsonl")
        for name, value in line.items()
        if name != "step"
    ]
    assert made[0].values + made[1].values == expected


def test_wandb_gets_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, Any], int]] = []
    ended: list[bool] = []

    def init(**options: Any) -> Any:
        begun.append(options)
        return SimpleNamespace(
            log=lambda values, step: logged.append((values, step)),
            finish=lambda: ended.append(True),
        )

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    run = train(tiny(tmp_path / "run", wandb="digits", steps=2))
    train(tiny(run, wandb="digits", steps=3, resume=True))
    assert ended == [True, True]
    assert [options["project"] for options in begun] == ["digits", "digits"]
    assert begun[0]["id"] == begun[1]["id"]  # the same run goes on
    assert re.fullmatch(r"[\w.-]{1,100}", begun[0]["id"])
    assert all(options["resume"] == "allow" for options in begun)
    assert begun[0]["config"]["hidden_size"] == 32
    expected = [
        ({name: value for name, value in line.items() if name != "step"}, line["step"])
        for line in read_metrics(run / "metrics.jsonl")
    ]
    assert logged == expected


@pytest.mark.parametrize(
    ("options", "module", "message"),
    [
        ({"tensorboard": True}, "torch.utils.tensorboard", "tensorboard=True: pip install tensorboard"),
        ({"wandb": "digits"}, "wandb", "wandb='digits': pip install wandb"),
    ],
)  # fmt: skip
def test_other_tools_that_are_missing_are_named(
    options: dict[str, Any],
    module: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        train(tiny(tmp_path / "run", **options))
    assert not (tmp_path / "run" / "run.lock").exists()


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA A1000", None),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla T4", None),
    ],
)
def test_peak_of_a_device(name: str, tera: float | None) -> None:
    assert peak_flops(name) == (None if tera is None else tera * 1e12)


def test_model_flops_utilisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Trainer._begin

    def on_a_device_of_a_teraflop(trainer: Trainer) -> None:
        begin(trainer)
        assert trainer.peak is None  # a CPU's is not known
        trainer.peak = 1e12

    monkeypatch.setattr(Trainer, "_begin", on_a_device_of_a_teraflop)
    run = train(tiny(tmp_path / "run"))
    flops = 3 * 2 * multiply_adds(from_pretrained(run))  # a backward is two forwards
    for line in read_metrics(run / "metrics.jsonl"):
        assert line["mfu"] == pytest.approx(line["images_per_second"] * flops / 1e12)


# ------------------------------------------------------------------ init_from


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return train(tiny(tmp_path / "trained"))


def test_fine_tuning_begins_with_the_averaged_weights(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = trained / "checkpoints" / "step-00000002"
    for path, step in ((trained, 4), (source, 2), (source / "ema.safetensors", 2)):
        trainer = Trainer(tiny(tmp_path / "new", seed=1, init_from=str(path)), CPU)
        expected = tensors(trained, step)
        for model in (trainer.model, trainer.ema):
            for name, value in model.state_dict().items():
                assert torch.equal(value, expected[f"ema.{name}"]), name
        said = capsys.readouterr().out
        assert f"Weights are those of {path}" in said
        assert "anew" not in said


def test_fine_tuning_with_other_classes_draws_the_label_table_anew_and_says_so(
    trained: Path, folder_of_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"seed": 1, "num_classes": 12}
    trainer = Trainer(tiny(tmp_path / "new", init_from=str(trained), **options), CPU)
    said = capsys.readouterr().out
    assert "the label table is drawn anew: the checkpoint has num_classes=10" in said
    fresh = Trainer(tiny(tmp_path / "fresh", **options), CPU).model.state_dict()
    expected = tensors(trained, 4)
    for name, value in trainer.model.state_dict().items():
        is_table = name == "y_embedder.embedding_table.weight"
        assert torch.equal(value, fresh[name] if is_table else expected[f"ema.{name}"]), name

    # As many rows, but the last one is a class and not the null label.
    options = {"seed": 1, "num_classes": 11, "class_dropout_prob": 0.0}
    trainer = Trainer(tiny(tmp_path / "new", init_from=str(trained), **options), CPU)
    assert "drawn anew" in capsys.readouterr().out
    fresh = Trainer(tiny(tmp_path / "fresh", **options), CPU).model.state_dict()
    table = "y_embedder.embedding_table.weight"
    assert torch.equal(trainer.model.state_dict()[table], fresh[table])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 64}, "checkpoint has hidden_size=32, model has 64"),
        ({"num_heads": 4}, "num_heads=4, the checkpoint was trained with 2"),
        ({"depth": 3}, "checkpoint has depth=2, model has 3"),
        ({"learn_sigma": False}, "checkpoint has learn_sigma=True, model has False"),
        ({"conditioning": "adaln"}, "checkpoint has conditioning='adaln_zero', model has 'adaln'"),
    ],
)
def test_fine_tuning_another_model_is_refused(
    options: dict[str, Any], message: str, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        train(tiny(tmp_path / "new", init_from=str(trained), **options))
    assert "\n" not in str(caught.value)
    assert str(trained) in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_fine_tuning_from_weights_without_description(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As another program writes them: the number of heads is the run's, the classes are assumed and that is said."""
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(trained / "checkpoints/step-00000004/ema.safetensors"), bare)
    trainer = Trainer(tiny(tmp_path / "new", init_from=str(bare)), CPU)
    assert "11 rows is taken for 10 classes" in capsys.readouterr().out
    weight = trainer.model.blocks[1].attn.qkv.weight
    assert torch.equal(weight, tensors(trained, 4)["ema.blocks.1.attn.qkv.weight"])
    with pytest.raises(ValueError, match="checkpoint has depth=2, model has 1"):
        train(tiny(tmp_path / "new", init_from=str(bare), depth=1))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(tiny(tmp_path / "new", init_from=str(tmp_path / "nowhere.safetensors")))


def test_loss_of_a_run_is_that_of_the_diffusion(tmp_path: Path) -> None:
    # From trained weights, so that the model's output, labels and all, has its share in the loss.
    options = {"class_dropout_prob": 0.5, "checkpoint_every": 20}
    source = train(tiny(tmp_path / "source", steps=20, **options))
    trainer = Trainer(tiny(tmp_path / "run", steps=1, init_from=str(source), **options), CPU)
    model: DiT = from_pretrained(source)
    x0, y = next(trainer._batches())
    generator = torch.Generator().manual_seed(derived_seed(0, 0))
    t = torch.randint(1000, (8,), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    dropped = torch.where(torch.rand(8, generator=generator) < 0.5, 10, y)
    assert 0 < int((dropped == 10).sum()) < 8

    def terms(labels: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return create_diffusion("").training_losses(model, x0, t, {"y": labels}, noise)

    expected = terms(dropped)
    (line,) = read_metrics(trainer.run() / "metrics.jsonl")
    assert line["loss"] == pytest.approx(float(expected["loss"].mean()), rel=1e-5)
    assert line["vb"] == pytest.approx(float(expected["vb"].mean()), rel=1e-5)
    assert line["loss"] != pytest.approx(float(terms(y)["loss"].mean()), rel=1e-5)


class _FirstStep:
    """One step from weights of which none is zero, so that labels, blocks and conditioning all have a gradient."""

    def __init__(self, out: Path, **options: Any) -> None:
        trainer = Trainer(tiny(out, steps=1, class_dropout_prob=0.4, **options), CPU)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in trainer.optimizer.parameters:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        self.model = deepcopy(trainer.model)
        self.calls = 0
        for block in trainer.model.blocks:
            block.attn.register_forward_hook(self._count)
        given: list[tuple[Tensor, ...]] = []
        gradients: list[list[Tensor]] = []
        _break(trainer, "nothing", set(), given)
        _recorded_gradients(trainer, gradients)
        (self.record,) = read_metrics(trainer.run() / "metrics.jsonl")
        self.parts = [len(x0) for x0, *_ in given]
        self.given = [torch.cat(each) for each in zip(*given, strict=True)]
        self.gradients = dict(zip(trainer.optimizer.names, gradients[0], strict=True))

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def exact(self) -> dict[str, Tensor]:
        """The same gradients from the whole batch, in float64."""
        x0, t, y, noise = self.given
        model = self.model.double()
        terms = create_diffusion("").training_losses(
            model, x0.double(), t, {"y": y}, noise.double()
        )
        terms["loss"].mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts: int, tmp_path: Path) -> None:
    plain = _FirstStep(tmp_path / "plain")
    found = _FirstStep(tmp_path / "run", accumulate=parts)
    assert (plain.parts, found.parts) == ([8], [8 // parts] * parts)
    for value, expected in zip(found.given, plain.given, strict=True):
        assert_same_bits("what the model is given", value, expected)
    exact = plain.exact()
    assert exact.keys() == found.gradients.keys()
    for name, value in found.gradients.items():
        # A weight's gradient is a sum over 8 images of 4 tokens.
        assert_gradient_close(name, value, exact[name], plain.gradients[name], summed=32)
    for name in ("loss", "mse", "vb", "gradient_norm"):
        assert found.record[name] == pytest.approx(plain.record[name], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_blocks_have_the_same_gradients(precision: str, tmp_path: Path) -> None:
    plain = _FirstStep(tmp_path / "plain", precision=precision)
    found = _FirstStep(tmp_path / "run", precision=precision, recompute_blocks=True)
    assert (plain.calls, found.calls) == (2, 4)  # once more in the backward
    exact = plain.exact()
    for name, value in found.gradients.items():
        assert_gradient_close(name, value, exact[name], plain.gradients[name], summed=32)
    assert found.record["loss"] == pytest.approx(plain.record["loss"], rel=1e-6)


def test_accumulation_has_to_divide_the_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size=8: must be divisible by .*accumulate=3"):
        train(tiny(tmp_path / "run", accumulate=3))
    assert not (tmp_path / "run").exists()


def test_timesteps(tmp_path: Path) -> None:
    """Uniform, or t = floor(1000 sigmoid(n)) with n standard normal."""
    n = 4000  # batches of 100
    drawn = {}
    for kind in ("uniform", "logit_normal"):
        config = tiny(tmp_path / kind, batch_size=100, timestep_sampling=kind)
        trainer = Trainer(config, CPU)
        drawn[kind] = torch.cat([trainer._timesteps() for _ in range(n // 100)])
        assert drawn[kind].dtype == torch.int64
        generator = torch.Generator().manual_seed(derived_seed(0, 0))
        if kind == "uniform":
            first = torch.randint(1000, (100,), generator=generator)
        else:
            first = (1000 / (1 + (-torch.randn(100, generator=generator)).exp())).floor().long()
        assert_same_bits(kind, drawn[kind][:100], first)
        assert int(drawn[kind].min()) >= 0
        assert int(drawn[kind].max()) <= 999
    normal = torch.distributions.Normal(0.0, 1.0)
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        below = {kind: float((t < 1000 * share).double().mean()) for kind, t in drawn.items()}
        logit = torch.tensor(math.log(share / (1 - share)))
        # Four standard deviations of the share in a sample of this size.
        assert below["uniform"] == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / n))
        expected = float(normal.cdf(logit))
        allowed = 4 * math.sqrt(expected * (1 - expected) / n)
        assert below["logit_normal"] == pytest.approx(expected, abs=allowed)


def test_logit_normal_never_leaves_the_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny(tmp_path / "run", timestep_sampling="logit_normal"), CPU)
    extreme = torch.tensor([-200.0, -20.0, 0.0, 20.0, 200.0])
    monkeypatch.setattr(trainer, "_drawn", lambda *_: extreme)
    assert trainer._timesteps().tolist() == [0, 0, 500, 999, 999]


def test_tf32_holds_for_the_data_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VAE encodes them: the first batch of a resumed run has to be that of the undisturbed one."""
    seen: list[str] = []
    original = Trainer._x0

    def noted(self: Trainer, items: Tensor) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return original(self, items)

    monkeypatch.setattr(Trainer, "_x0", noted)
    train(tiny(tmp_path / "run", steps=2, precision="tf32"))
    assert set(seen) == {"high"}


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_tf32_by_the_newer_switch(precision: str, tmp_path: Path) -> None:
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    seen: set[str] = set()
    try:
        matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            torch.get_float32_matmul_precision()
        for outside in ("tf32", "ieee"):
            matmul.fp32_precision = outside
            trainer = Trainer(tiny(tmp_path / outside, steps=1, precision=precision), CPU)
            trainer.model.x_embedder.register_forward_hook(
                lambda *_: seen.add(matmul.fp32_precision)
            )
            trainer.run()
            assert matmul.fp32_precision == outside
    finally:
        matmul.fp32_precision = before
    assert seen == ({"tf32"} if precision == "tf32" else {"tf32", "ieee"})


@pytest.mark.parametrize("before", ["highest", "medium"])
def test_tf32_is_for_the_run_alone(before: str, tmp_path: Path) -> None:
    outside = torch.get_float32_matmul_precision()
    seen: dict[str, set[str]] = {}
    try:
        for precision in ("tf32", "fp32", "bf16"):
            torch.set_float32_matmul_precision(before)
            seen[precision] = found = set()
            trainer = Trainer(tiny(tmp_path / precision, steps=2, precision=precision), CPU)
            trainer.model.x_embedder.register_forward_hook(
                lambda *_, found=found: found.add(torch.get_float32_matmul_precision())
            )
            trainer.run()
            assert torch.get_float32_matmul_precision() == before
        broken = Trainer(tiny(tmp_path / "x", precision="tf32", nonfinite_steps=1), CPU)
        _break(broken, "loss", {1})
        with pytest.raises(FloatingPointError):
            broken.run()
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(outside)
    assert seen == {"tf32": {"high"}, "fp32": {before}, "bf16": {before}}


def test_auto_compiles_nothing_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", refuse)
    train(tiny(tmp_path / "run", steps=1, compile="auto"))
    assert "compile off" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="compiled"):
        train(tiny(tmp_path / "blocks", steps=1, compile="blocks"))
