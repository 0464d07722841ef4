"""A run from its start to its end."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit import DiT, create_diffusion, from_pretrained
from fastdit.data import Digits
from fastdit.data.sampler import derived_seed
from fastdit.files import read_json
from fastdit.models import multiply_adds
from fastdit.sampling import sample, save_grid, to_uint8
from fastdit.testing import assert_close
from fastdit.training import TrainConfig, checkpoint, train
from fastdit.training.loop import Trainer, _dataset, _model, learning_rate
from fastdit.training.metrics import read_metrics
from fastdit.weights import load_description

from .helpers import checkpoints, record, tensors, tiny

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
    """Copies the gradients that the optimizer is given, step by step."""

    def copy(optimizer: torch.optim.Optimizer, *_: object) -> None:
        into.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])

    trainer.optimizer.register_step_pre_hook(copy)


def test_update_is_that_of_adamw_written_by_hand(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", steps=3, lr=0.1, weight_decay=0.3, warmup_steps=2)
    trainer = Trainer(config, CPU)
    weights = trainer.optimizer.param_groups[0]["params"]
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
    assert torch.equal(trainer.ema.model.pos_embed, before)


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
    def norms(**options: Any) -> tuple[list[float], list[float]]:
        """What is logged, and what reaches the optimizer."""
        trainer = Trainer(tiny(tmp_path / str(options), steps=2, **options), CPU)
        gradients: list[list[Tensor]] = []
        _recorded_gradients(trainer, gradients)
        run = trainer.run()
        used = [math.sqrt(sum(float(g.double().pow(2).sum()) for g in step)) for step in gradients]
        return [line["gradient_norm"] for line in read_metrics(run / "metrics.jsonl")], used

    logged, used = norms()
    assert logged == pytest.approx(used, rel=1e-5)
    clipped_logged, clipped = norms(gradient_clip=used[0] / 4)
    assert clipped_logged[0] == logged[0]
    # torch divides by norm + 1e-6.
    assert clipped == pytest.approx([used[0] / 4] * 2, rel=1e-4)


class _NoRead(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "_local_scalar_dense" in str(func):
            raise AssertionError("a step reads from the device")
        return func(*args, **(kwargs or {}))


def test_step_reads_nothing_from_the_device(tmp_path: Path) -> None:
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
            *("learning_rate", "images_per_second", "seconds"),
        ]
        assert line["learning_rate"] == 1e-2
        assert line["images_per_second"] > 0
        assert line["gradient_norm"] > 0
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


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
    assert (state["format"], state["step"], state["images"]) == (1, 4, 1797)
    moments = {name.split(".")[1] for name in found if name.startswith("optimizer.")}
    assert moments == {"exp_avg", "exp_avg_sq", "step"}
    assert "optimizer.exp_avg.pos_embed" not in found
    assert float(found["optimizer.step.final_layer.linear.weight"]) == 4
    assert {name for name in found if name.startswith("rng.")} == {"rng.run", "rng.cpu"}


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
    """Halves each side and has two channels; its latents are drawn with the generator that it is given."""

    latent_channels, downsample_factor, scaling_factor = 2, 2, 0.5

    def __init__(self, name: str, *, device: torch.device) -> None:
        self.name = name

    def encode(self, images: Tensor, generator: torch.Generator) -> Tensor:
        mean = torch.nn.functional.avg_pool2d(images[:, :2], 2)
        return mean + 0.1 * torch.randn(mean.shape, generator=generator)

    def decode(self, latents: Tensor) -> Tensor:
        large = torch.nn.functional.interpolate(latents, scale_factor=2.0)
        return torch.cat([large, large[:, :1]], dim=1)


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


@pytest.mark.parametrize(
    ("log_every", "checkpoint_every", "stops_at", "kept"),
    [(1, 1, 2, ["step-00000001"]), (100, 2, 2, []), (3, 100, 3, [])],
)
def test_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoints(
    log_every: int, checkpoint_every: int, stops_at: int, kept: list[str], tmp_path: Path
) -> None:
    config = tiny(
        tmp_path / "run", lr=1e30, steps=9, log_every=log_every, checkpoint_every=checkpoint_every
    )
    with pytest.raises(FloatingPointError, match=f"step {stops_at}: .* is not finite"):
        train(config)
    assert checkpoints(tmp_path / "run") == kept
    for name in kept:
        from_pretrained(tmp_path / "run" / "checkpoints" / name)


def test_interrupt_leaves_no_half_checkpoint_and_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(tiny(tmp_path / "whole", steps=6))
    saves = 0
    original = checkpoint.save_weights

    def interrupted(*arguments: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 4 + 2:  # four files a checkpoint: in the middle of the second one
            raise KeyboardInterrupt
        original(*arguments)

    monkeypatch.setattr(checkpoint, "save_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(tmp_path / "run", steps=6))
    run = tmp_path / "run"
    assert checkpoints(run) == ["step-00000002"]
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]

    train(tiny(run, steps=6, resume=True))
    assert record(run, 6) == record(expected, 6)
    reference = tensors(expected, 6)
    for name, value in tensors(run, 6).items():
        assert torch.equal(value, reference[name]), name


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
        for model in (trainer.model, trainer.ema.model):
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
    source = train(tiny(tmp_path / "source", steps=20, class_dropout_prob=0.0, checkpoint_every=20))
    config = tiny(
        tmp_path / "run",
        steps=1,
        init_from=str(source),
        class_dropout_prob=0.0,
        checkpoint_every=20,
    )
    trainer = Trainer(config, CPU)
    model: DiT = from_pretrained(source)
    x0, y = next(trainer._batches())
    generator = torch.Generator().manual_seed(derived_seed(0, 0))
    t = torch.randint(1000, (8,), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    with torch.no_grad():
        terms = create_diffusion("").training_losses(model, x0, t, {"y": y}, noise)
    (line,) = read_metrics(trainer.run() / "metrics.jsonl")
    assert line["loss"] == pytest.approx(float(terms["loss"].mean()), rel=1e-5)
    assert line["vb"] == pytest.approx(float(terms["vb"].mean()), rel=1e-5)
