"""Weights come back as they were written, and what cannot be loaded says why in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdit import DiT
from fastdit.testing import assert_same_bits
from fastdit.weights import (
    from_pretrained,
    latest_checkpoint,
    load_description,
    load_into,
    load_weights,
    save_weights,
    write_manifest,
)

SIZES: dict[str, Any] = {
    "input_size": 4,
    "in_channels": 3,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
}


def make_model(**changes: Any) -> DiT:
    model = DiT(**{**SIZES, **changes})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def write_checkpoint(folder: Path, ema: DiT, trained: DiT, /, **changes: Any) -> None:
    folder.mkdir(parents=True)
    save_weights(ema, folder / "ema.safetensors")
    save_weights(trained, folder / "model.safetensors")
    description = {
        "format": 1,
        "model": ema.config,
        "classes": list("abcdefghij"),
        "diffusion": {"learn_sigma": True, "noise_schedule": "linear"},
        "images": {"space": "pixels", "image_size": 4, "channels": 3},
    }
    (folder / "model.json").write_text(json.dumps(description | changes))


def assert_same_state(out: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(out) == list(expected)
    for key in expected:
        assert out[key].dtype == expected[key].dtype
        assert_same_bits(key, out[key], expected[key])


# ------------------------------------------------------------------ files


def test_golden_weights_load_into_the_model(
    golden_config: dict[str, Any], golden_tensors: dict[str, Tensor]
) -> None:
    file = Path(__file__).parents[1] / "golden" / "tiny_dit.weights.safetensors"
    model = DiT(**golden_config)
    load_into(model, load_weights(file), source=file)
    out = model.eval()(*(golden_tensors[name] for name in ("x", "t", "y")))
    error = (out - golden_tensors["forward"]).pow(2).mean().sqrt()
    assert error <= 1e-5 * golden_tensors["forward"].pow(2).mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_and_read_again(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    save_weights(model, tmp_path / "x.safetensors")
    loaded = load_weights(tmp_path / "x.safetensors")
    assert sorted(loaded) == sorted(model.state_dict())
    assert_same_state({key: loaded[key] for key in model.state_dict()}, model.state_dict())


def test_keys_are_the_originals_whatever_wraps_the_model(tmp_path: Path) -> None:
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    wrapped = {f"module.{key}": value for key, value in compiled.state_dict().items()}
    assert any("_orig_mod.blocks.0._orig_mod." in key for key in wrapped)
    save_weights(wrapped, tmp_path / "x.safetensors")
    assert sorted(load_file(tmp_path / "x.safetensors")) == sorted(make_model().state_dict())


def test_tensors_of_any_layout(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    state = {
        "transposed": whole.T,
        "strided": whole[::2],
        "expanded": whole[:1].expand(3, 4),
        "row": whole[2],
    }
    save_weights(state, tmp_path / "x.safetensors")
    loaded = load_weights(tmp_path / "x.safetensors")
    for key, value in state.items():
        assert_same_bits(key, loaded[key], value)


def test_saving_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights({"a": torch.ones(1)}, tmp_path / "x.safetensors")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_weights({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert load_weights(tmp_path / "x.safetensors")["a"] == 1


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.pt: only \.safetensors"):
        save_weights(make_model(), tmp_path / "x.pt")
    with pytest.raises(TypeError, match="step: expected a tensor, got int"):
        save_weights({"step": 3}, tmp_path / "x.safetensors")  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ into a model


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_classes": 11}, "checkpoint has num_classes=11, model has 10"),
        ({"num_classes": 1000}, "checkpoint has num_classes=1000, model has 10$"),
        (
            {"class_dropout_prob": 0.0},
            r"checkpoint has num_classes=9, model has 10 \(or only one of the two has a null class\)",
        ),
        ({"depth": 3}, "checkpoint has depth=3, model has 2"),
        ({"depth": 1}, "checkpoint has depth=1, model has 2"),
        ({"hidden_size": 32}, "checkpoint has hidden_size=32, model has 16"),
        ({"mlp_ratio": 2.0}, r"checkpoint has mlp_ratio=2\.0, model has 4\.0"),
        ({"patch_size": 4}, "checkpoint has patch_size=4, model has 2"),
        ({"in_channels": 4}, "checkpoint has in_channels=4, model has 3"),
        ({"learn_sigma": False}, "checkpoint has learn_sigma=False, model has True"),
        ({"input_size": 8}, "checkpoint has input_size=8, model has 4"),
        ({"input_size": (4, 8)}, r"checkpoint has input_size=\(8 tokens\), model has 4"),
        ({"conditioning": "adaln"}, "checkpoint has conditioning=adaln, model has adaln_zero"),
        ({"conditioning": "in_context"}, "checkpoint has conditioning=in_context, model has"),
        ({"conditioning": "cross_attention"}, "checkpoint has conditioning=cross_attention, model"),
    ],
)
def test_the_argument_that_differs_is_named(changes: dict[str, Any], reason: str) -> None:
    model = make_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"x\.safetensors: {reason}") as caught:
        load_into(model, make_model(**changes).state_dict(), source="x.safetensors")
    assert "\n" not in str(caught.value)
    assert_same_state(model.state_dict(), before)


def test_missing_and_unexpected_names() -> None:
    state = make_model().state_dict()
    del state["final_layer.linear.bias"]
    with pytest.raises(ValueError, match=r"x: missing final_layer\.linear\.bias$"):
        load_into(make_model(), state, source="x")
    state["other"] = state["another"] = torch.ones(1)
    with pytest.raises(
        ValueError, match=r"x: missing final_layer\.linear\.bias; unexpected other and 1 more"
    ):
        load_into(make_model(), state, source="x")


def test_another_shape_of_a_part_that_no_argument_decides() -> None:
    state = make_model().state_dict()
    state["t_embedder.mlp.0.weight"] = torch.ones(16, 128)
    with pytest.raises(
        ValueError,
        match=r"t_embedder\.mlp\.0\.weight has shape \(16, 128\), the model's has \(16, 256\)",
    ):
        load_into(make_model(), state, source="x")


def test_weights_are_cast_to_the_models_dtype() -> None:
    model = make_model()
    load_into(model, make_model().bfloat16().state_dict(), source="x")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# ------------------------------------------------------------------ runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (900, 1000):
        folder = tmp_path / "run/checkpoints" / f"step-{step:08d}"
        write_checkpoint(folder, make_model(), make_model())
        write_manifest(folder, {"step": step})
    return tmp_path / "run"


def test_the_newest_complete_checkpoint(run: Path) -> None:
    checkpoints = run / "checkpoints"
    for name in (".tmp-step-00002000-1-ab", "step-2000", "step-00002000.tmp", "step-000002000"):
        (checkpoints / name).mkdir()
    (checkpoints / "step-00002001").write_text("a file")
    # Of the right name and with all its weights, but without the manifest, which is written last.
    write_checkpoint(checkpoints / "step-00002002", make_model(), make_model())
    assert latest_checkpoint(run) == checkpoints / "step-00001000"
    write_manifest(checkpoints / "step-00002002", {})
    assert latest_checkpoint(run) == checkpoints / "step-00002002"


def test_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=str(path)):
            latest_checkpoint(path)
        with pytest.raises(FileNotFoundError, match=str(path)):
            from_pretrained(path)


@pytest.mark.parametrize("which", ["ema", "model"])
def test_load_from_anything(run: Path, which: Any) -> None:
    checkpoint = run / "checkpoints/step-00001000"
    file = checkpoint / f"{which}.safetensors"
    for path in (run, str(run), checkpoint):
        model = from_pretrained(path, which=which)
        assert_same_state(
            model.state_dict(), {key: load_file(file)[key] for key in model.state_dict()}
        )
    assert_same_state(from_pretrained(file).state_dict(), model.state_dict())
    assert not model.training
    assert model.config == make_model().config
    assert not model.pos_embed.requires_grad
    assert model.blocks[0].mlp.fc1.weight.requires_grad


@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln", "cross_attention", "in_context"])
def test_a_loaded_model_gives_the_same_output(tmp_path: Path, conditioning: str) -> None:
    model = make_model(conditioning=conditioning, input_size=(4, 8)).eval()
    write_checkpoint(tmp_path / "x", model, model)
    batch = torch.randn(2, 3, 4, 8), torch.tensor([3, 999]), torch.tensor([0, 10])
    assert_same_bits(conditioning, from_pretrained(tmp_path / "x")(*batch), model(*batch))


def test_low_precision_files_become_float32(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x", make_model().bfloat16(), make_model())
    with pytest.warns(UserWarning, match="bfloat16"):
        model = from_pretrained(tmp_path / "x")
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_load_does_not_draw_random_numbers(run: Path) -> None:
    before = torch.get_rng_state()
    from_pretrained(run)
    assert torch.equal(torch.get_rng_state(), before)


def test_which_must_be_known(run: Path) -> None:
    with pytest.raises(ValueError, match=r"which='em': allowed are 'ema', 'model'"):
        from_pretrained(run, which="em")


def test_description(run: Path) -> None:
    for path in (
        run,
        run / "checkpoints/step-00001000",
        run / "checkpoints/step-00001000/ema.safetensors",
    ):
        assert load_description(path)["classes"] == list("abcdefghij")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "model.json: format=2, expected 1"),
        ({"classes": None}, "model.json: classes=None, expected a list"),
        ({"model": "DiT"}, "model.json: model='DiT', expected a dict"),
        (
            {"model": {"hidden_sise": 16}},
            "model.json: hidden_sise is no argument of DiT.*hidden_size",
        ),
        ({"model": {**SIZES, "num_heads": 5}}, "hidden_size=16: .* divisible by num_heads=5"),
        (
            {"model": {**SIZES, "num_classes": 11}},
            "ema.safetensors: checkpoint has num_classes=10, model has 11",
        ),
    ],
)
def test_bad_descriptions(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_checkpoint(tmp_path / "x", make_model(), make_model(), **changes)
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path / "x")


def test_weights_without_description(run: Path) -> None:
    (run / "checkpoints/step-00001000/model.json").unlink()
    file = run / "checkpoints/step-00001000/ema.safetensors"
    assert from_pretrained(file).num_heads == SIZES["num_heads"]  # the file says it as well
    # A checkpoint that says nothing of its model is not one; the run has an older one, but must not fall back to it.
    with pytest.raises(FileNotFoundError, match=r"step-00001000.model\.json: missing"):
        from_pretrained(run)
