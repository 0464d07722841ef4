"""Faults that training scripts of this family of models have had, each of which cost somebody a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastdit
from fastdit.training import TrainConfig, train
from fastdit.training.loop import Trainer

from . import processes
from .processes import Runs, Server, folder_of, metrics, options_of, steps_saved


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with processes.served() as server:
        yield server


@pytest.fixture
def runs(server: Server, tmp_path: Path) -> Runs:
    return Runs(server, tmp_path)


def config(folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(**options_of(folder, **changes))


# ------------------------------------------------------------------ what is logged


def test_logged_loss_is_the_mean_of_all_processes(runs: Runs) -> None:
    """Not the first one's, divided by how many there are. The learning rate is nearly 0: the losses are known."""
    options: dict[str, Any] = {"steps": 2, "warmup_steps": 0, "lr": 1e-30, "log_every": 1}
    one = metrics(runs.finish("one", **options))
    two = metrics(runs.finish("two", size=2, **options))
    for line, other in zip(one, two, strict=True):
        for name in ("loss", "mse", "vb"):
            assert other[name] == pytest.approx(line[name], rel=1e-5)
    # Of an untrained model that predicts zeros: the mean of squared standard normal numbers.
    assert 0.7 < one[0]["mse"] < 1.3


# ------------------------------------------------------------------ what is resumed


def test_newest_is_by_step(runs: Runs) -> None:
    """Neither the largest nor the one that was touched last, and "step-00000010" comes after "step-00000009"."""
    import os

    run = runs.finish("run", steps=10, checkpoint_every=3, keep_checkpoints=None)
    assert steps_saved(run) == [3, 6, 9, 10]
    with open(folder_of(run, 3) / "large", "wb") as file:
        file.write(bytes(2**20))
    os.utime(folder_of(run, 3))
    (child,) = runs.run("run", steps=11, resume=True)
    assert "step 10 of 11" in child.said
    assert child.status == 0, child.said


def test_first_start_with_auto_resume(runs: Runs) -> None:
    """There is nothing to resume: the run begins at step 0."""
    run = runs.finish("run", auto_resume=True)
    assert steps_saved(run)[-1] == 8
    (child,) = runs.run("run", auto_resume=True)
    assert child.status == 0
    assert "nothing is left to do" in child.said


def test_resume_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out='.*run': no run to resume"):
        train(config(tmp_path / "run", resume=True))
    assert not (tmp_path / "run").exists()


def test_moments_are_resumed(tmp_path: Path) -> None:
    run = train(config(tmp_path / "run", steps=4))
    trainer = Trainer(config(run, steps=8, resume=True), torch.device("cpu"))
    stored = load_file(folder_of(run, 4) / "optimizer" / "shard-00001.safetensors")
    state = trainer.optimizer.state()
    assert sorted(state) == sorted(stored)
    assert float(state["step"]) == 4
    assert all(torch.equal(value, stored[name]) for name, value in state.items())
    assert any(value.abs().max() > 0 for name, value in stored.items() if "exp_avg_sq" in name)


def test_nothing_is_skipped_that_does_not_fit(tmp_path: Path) -> None:
    """Weights of another shape, a missing and an unknown one, are errors and not notes."""
    from fastdit.weights import write_manifest

    run = train(config(tmp_path / "run", steps=4))
    file = folder_of(run, 4) / "model.safetensors"
    whole = load_file(file)

    def resumed_with(weights: dict[str, torch.Tensor]) -> None:
        save_file(weights, file)
        (file.parent / "manifest.json").unlink()
        write_manifest(file.parent, {})
        Trainer(config(run, steps=8, resume=True), torch.device("cpu"))

    name = "final_layer.linear.bias"
    without = {key: value for key, value in whole.items() if key != name}
    with pytest.raises(ValueError, match=rf"model\.safetensors.*{name}"):
        resumed_with(without)
    with pytest.raises(ValueError, match=rf"model\.safetensors.*{name}"):
        resumed_with(whole | {name: torch.zeros(3)})
    with pytest.raises(ValueError, match=r"model\.safetensors.*more"):
        resumed_with(whole | {"more": torch.zeros(3)})
    resumed_with(whole)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers(prefix: str, tmp_path: Path) -> None:
    """Weights that were saved from a wrapped model are those of the model."""
    run = train(config(tmp_path / "run", steps=3))
    whole = load_file(folder_of(run, 3) / "ema.safetensors")
    folder = tmp_path / "wrapped"
    folder.mkdir()
    save_file({prefix + name: value for name, value in whole.items()}, folder / "ema.safetensors")
    (folder / "model.json").write_bytes((folder_of(run, 3) / "model.json").read_bytes())
    options = {"init_from": str(folder / "ema.safetensors"), "steps": 3}
    trainer = Trainer(config(tmp_path / "tuned", **options), torch.device("cpu"))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, whole[name])


@pytest.mark.parametrize("way", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_weights_have_no_prefix(way: str, runs: Runs) -> None:
    """Of one process and of two: the names are the original's, and the file loads as it is."""
    names = [
        sorted(load_file(folder_of(run, 3) / "model.safetensors"))
        for run in (
            runs.finish("one", steps=3),
            runs.finish("two", steps=3, size=2, parallel=way),
        )
    ]
    assert names[0] == names[1]
    model = fastdit.from_pretrained(runs.folder / "two")
    assert sorted(model.state_dict()) == names[1]


# ------------------------------------------------------------------ averages and seeds


def test_average_of_what_is_not_trained_is_what_it_was(tmp_path: Path) -> None:
    run = train(config(tmp_path / "run"))
    for name in ("ema", "ema-0.5"):
        average = load_file(folder_of(run, 8) / f"{name}.safetensors")
        model = load_file(folder_of(run, 8) / "model.safetensors")
        assert torch.equal(average["pos_embed"], model["pos_embed"])
        assert not torch.equal(average["final_layer.linear.bias"], model["final_layer.linear.bias"])


def test_seed_is_used(tmp_path: Path) -> None:
    """By the weights, the noise and the order of the data."""
    trainers = [
        Trainer(config(tmp_path / "run", seed=seed), torch.device("cpu")) for seed in (0, 1, 0)
    ]
    weights = [each.model.x_embedder.proj.weight for each in trainers]
    orders = [next(iter(each._order(0))) for each in trainers]
    noise = [torch.randn(4, generator=each.generator) for each in trainers]
    for first, other, same in (weights, orders, noise):
        assert torch.as_tensor(first).equal(torch.as_tensor(same))
        assert not torch.as_tensor(first).equal(torch.as_tensor(other))


def test_processes_draw_other_numbers(runs: Runs) -> None:
    """One seed for all would give each the same noise: the first update of two is then not that of one."""
    faults = [{"kind": "drawn weights"}]
    one = runs.finish("one", steps=3, faults=faults)
    two = runs.finish("two", steps=3, size=2, faults=faults)
    for line, other in zip(metrics(one), metrics(two), strict=True):
        assert line == pytest.approx(other, rel=2e-5)
    assert all(not set(step[:4]) & set(step[4:]) for step in runs.order("two", 2))


def test_order_changes_with_the_epoch(runs: Runs) -> None:
    """512 of 1,797 images a step are three steps an epoch."""
    runs.finish("run", batch_size=512, steps=7)
    order = runs.order("run")
    assert [len(step) for step in order] == [512] * 7
    assert order[0] != order[3] != order[6]
    assert sorted(order[0]) != sorted(order[3])


# ------------------------------------------------------------------ data


def test_batch_is_never_rounded(runs: Runs) -> None:
    """What two processes cannot share is an error, not another batch size."""
    for child in runs.run("run", size=2, batch_size=7):
        assert child.status == 1
        assert "batch_size=7: must be divisible by the processes, 2" in child.said


def test_fewer_images_than_a_batch(folder_of_images: Path, tmp_path: Path) -> None:
    """Whole batches only, and none there: an error instead of a loop without end."""
    options = {"data": str(folder_of_images), "image_size": 8, "batch_size": 21}
    with pytest.raises(ValueError, match="num_items=20 is smaller than batch_size=21"):
        train(config(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_null_label_is_that_of_the_model(folder_of_images: Path, tmp_path: Path) -> None:
    """Not 1,000: with three classes it is 3."""
    options: dict[str, Any] = {"data": str(folder_of_images), "image_size": 8, "batch_size": 4}
    options |= {"class_dropout_prob": 0.5, "num_workers": 0}
    run = train(config(tmp_path / "run", **options))
    model = fastdit.from_pretrained(run)
    assert model.null_label == 3
    assert model.y_embedder.embedding_table.weight.shape[0] == 4
    images = fastdit.sample(model, [0, 1, 2], steps=2, cfg_scale=4.0, progress=False)
    assert bool(images.isfinite().all())


# ------------------------------------------------------------------ the folder


def test_a_run_folder_is_never_another_ones(tmp_path: Path) -> None:
    """Folders are named by who starts a run, and a second run does not get into the first."""
    run = train(config(tmp_path / "run", steps=3))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="holds a run already"):
        train(config(run, steps=3))
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_checkpoint_is_safetensors_and_json(tmp_path: Path) -> None:
    """Nothing that has to be unpickled, and no object of a command line's."""
    run = train(config(tmp_path / "run", steps=3))
    files = [path for path in folder_of(run, 3).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            load_file(path)


def test_guidance_acts_on_three_channels_by_default() -> None:
    """As the original's samples were drawn; all channels are to be asked for."""
    model = fastdit.DiT(input_size=4, in_channels=4, hidden_size=16, depth=1, num_heads=2,
                        num_classes=3).eval()  # fmt: skip
    torch.nn.init.normal_(model.final_layer.linear.weight)
    torch.nn.init.normal_(model.y_embedder.embedding_table.weight)
    for block in model.blocks:
        torch.nn.init.normal_(block.adaLN_modulation[-1].weight)
    torch.nn.init.normal_(model.final_layer.adaLN_modulation[-1].weight)
    x = torch.randn(1, 4, 4, 4).repeat(2, 1, 1, 1)
    t, y = torch.tensor([5, 5]), torch.tensor([1, 3])
    with torch.no_grad():
        conditional, unconditional = model(x, t, y)
        guided = model.forward_with_cfg(x, t, y, cfg_scale=4.0)[0]
    mixed = unconditional + 4.0 * (conditional - unconditional)
    assert math.isfinite(float(guided.sum()))
    torch.testing.assert_close(guided[:3], mixed[:3])
    torch.testing.assert_close(guided[3:], conditional[3:])
    assert not torch.allclose(mixed[3], conditional[3])
