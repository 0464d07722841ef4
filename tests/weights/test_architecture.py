"""The shapes of a state dict give back the model's arguments, or a reason; heads are known or asked for."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdit import DiT, DiT_models
from fastdit.weights.architecture import infer_config, known_heads, load_into, resolve_heads

Shapes = dict[str, tuple[int, ...]]

SIZES: dict[str, Any] = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 16,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 10,
}
XL_2 = {"hidden_size": 1152, "depth": 28, "patch_size": 2}
ZOO = Path(__file__).parents[1] / "golden" / "model_zoo.json"


def shapes_of(model: DiT) -> Shapes:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def make_shapes(**changes: Any) -> Shapes:
    with torch.device("meta"):
        return shapes_of(DiT(**{**SIZES, **changes}))


def without_heads(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "num_heads"}


def assert_one_line(error: pytest.ExceptionInfo[ValueError]) -> None:
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ configurations


@pytest.mark.parametrize("name", DiT_models)
def test_published_models_are_recognised(name: str) -> None:
    with torch.device("meta"):
        model = DiT_models[name]()
    found = infer_config(shapes_of(model))
    assert found.config == without_heads(model.config)
    assert found.notes == []
    assert known_heads(found.config) == model.num_heads
    assert resolve_heads(found.config) == model.num_heads


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-XL/2"])
def test_the_originals_state_dicts_are_recognised(name: str) -> None:
    recorded = json.loads(ZOO.read_text())[name]["state_dict"]
    found = infer_config({key: tuple(shape) for key, shape in recorded.items()})
    with torch.device("meta"):
        assert found.config == without_heads(DiT_models[name]().config)


@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln", "cross_attention", "in_context"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"input_size": 12, "patch_size": 4, "in_channels": 1},
        {"depth": 1, "hidden_size": 24},
        {"learn_sigma": False},  # as REPA's, and some of SiT's
        {"class_dropout_prob": 0.0},
        {"mlp_ratio": 8 / 3, "hidden_size": 20},  # the width is not a multiple
        {"depth": 11},
    ],
)
def test_every_argument_comes_back(conditioning: str, changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = DiT(**{**SIZES, **changes, "conditioning": conditioning})
    found = infer_config(shapes_of(model), num_classes=10).config
    ratio = found.pop("mlp_ratio")
    expected = without_heads(model.config)
    assert int(model.config["hidden_size"] * ratio) == model.blocks[0].mlp.fc1.out_features
    assert ratio == pytest.approx(expected.pop("mlp_ratio"), rel=0.02)  # the width is whole
    assert found == expected


def test_the_ratio_gives_the_width_back() -> None:
    assert int(28 * (61 / 28)) == 60  # so the quotient alone would be a narrower model
    ratio = infer_config(make_shapes(hidden_size=28, mlp_ratio=2.2)).config["mlp_ratio"]
    assert int(28 * ratio) == int(28 * 2.2) == 61


def test_images_that_are_not_square() -> None:
    shapes = make_shapes(input_size=(4, 12))
    with pytest.raises(ValueError, match=r"pos_embed has 12 positions, .* pass input_size="):
        infer_config(shapes, num_classes=10)
    found = infer_config(shapes, num_classes=10, input_size=(4, 12))
    assert found.config["input_size"] == (4, 12)
    with pytest.raises(ValueError, match=r"pos_embed has shape \(1, 12, 16\)"):
        infer_config(shapes, num_classes=10, input_size=(4, 8))


@pytest.mark.parametrize(
    ("rows", "num_classes", "classes", "dropout", "note"),
    [
        (1001, None, 1000, 0.1, ""),
        (1000, None, 1000, 0.0, "1000 classes and no null class"),
        (11, None, 10, 0.1, "10 classes and the null class; num_classes=11 says"),
        (2, None, 1, 0.1, "1 classes and the null class"),
        (1, None, 1, 0.0, "1 classes and no null class"),
        (11, 10, 10, 0.1, ""),
        (11, 11, 11, 0.0, ""),
        (1001, 1001, 1001, 0.0, ""),
        (1000, 999, 999, 0.1, ""),
    ],
)
def test_the_null_class(
    rows: int, num_classes: int | None, classes: int, dropout: float, note: str
) -> None:
    shapes = make_shapes(num_classes=rows, class_dropout_prob=0.0)
    found = infer_config(shapes, num_classes=num_classes)
    assert (found.config["num_classes"], found.config["class_dropout_prob"]) == (classes, dropout)
    assert len(found.notes) == (1 if note else 0)
    assert all(note in text for text in found.notes)
    with torch.device("meta"):
        assert len(DiT(**found.config, num_heads=2).y_embedder.embedding_table.weight) == rows


@pytest.mark.parametrize("num_classes", [8, 9, 12, 0])
def test_another_number_of_classes_is_refused(num_classes: int) -> None:
    with pytest.raises(
        ValueError, match=rf"num_classes={num_classes}: the label table has 11 rows"
    ):
        infer_config(make_shapes(), num_classes=num_classes)


# ------------------------------------------------------------------ what does not fit


def drop(shapes: Shapes, start: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if not name.startswith(start)}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({}, "depth cannot be told"),
        (drop(make_shapes(), "blocks."), "depth cannot be told: no name begins with blocks"),
        (drop(make_shapes(), "blocks.1."), r"blocks\.1 is missing, though blocks\.2 is there"),
        (drop(make_shapes(), "blocks.0."), r"blocks\.0 is missing, though blocks\.2 is there"),
        (
            {**make_shapes(), "blocks.99999999999.attn.proj.bias": (16,)},
            r"blocks\.3 is missing, though blocks\.99999999999 is there",
        ),
        (drop(make_shapes(), "blocks.1.attn.qkv.bias"), r"missing blocks\.1\.attn\.qkv\.bias$"),
        (drop(make_shapes(), "pos_embed"), "input_size cannot be told: pos_embed is missing"),
        (drop(make_shapes(), "final_layer.linear.weight"), "learn_sigma cannot be told"),
        (drop(make_shapes(), "y_embedder"), "num_classes cannot be told: y_embedder"),
        (drop(make_shapes(), "blocks.0.mlp.fc1.weight"), "hidden_size cannot be told"),
        (
            {**make_shapes(), "pos_embed": (16, 16)},
            r"input_size .*: pos_embed has shape \(16, 16\)",
        ),
        ({**make_shapes(), "x_embedder.proj.weight": (0, 3, 2, 2)}, "in_channels cannot be told"),
        ({**make_shapes(), "x_embedder.proj.weight": (16, 3, 2, 4)}, r"proj\.weight has shape"),
        ({**make_shapes(), "projectors.0.weight": (4, 4)}, r"unexpected projectors\.0\.weight$"),
        (
            {f"module.{name}": shape for name, shape in make_shapes().items()},
            "no name begins with blocks",
        ),
        (
            {**make_shapes(), "blocks.2.mlp.fc1.weight": (32, 16)},
            r"blocks\.2\.mlp\.fc1\.weight has shape \(32, 16\), the model's has \(64, 16\)",
        ),
        (
            {**make_shapes(), "blocks.1.adaLN_modulation.1.weight": (64, 16)},
            r"blocks\.1\.adaLN_modulation\.1\.weight has shape \(64, 16\)",
        ),
        (
            {**make_shapes(), "final_layer.linear.weight": (36, 16)},
            r"final_layer\.linear\.weight has 36 rows; .* 12 \(learn_sigma=False\) or 24",
        ),
        (
            {**make_shapes(), "t_embedder.mlp.0.weight": (16, 128)},
            r"t_embedder\.mlp\.0\.weight has shape \(16, 128\)",
        ),
        (
            {**make_shapes(hidden_size=16), "blocks.0.mlp.fc1.weight": (64, 18)},
            "no DiT has these shapes: hidden_size=18: must be divisible by 4",
        ),
    ],
)
def test_what_does_not_fit(broken: Shapes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        infer_config(broken)
    assert_one_line(caught)


# ------------------------------------------------------------------ heads


@pytest.mark.parametrize(
    "metadata",
    [
        {"num_heads": 16},
        {"num_heads": "16"},
        {"args": {"num_heads": 16}},
        {"args": argparse.Namespace(model="DiT-XL/2", epochs=1400)},
        {"args": {"model": "SiT-XL/2"}},
        {"model": "DiT-XL-2-256x256"},
    ],
)
def test_recorded_heads(metadata: dict[str, Any]) -> None:
    assert resolve_heads(XL_2, metadata=metadata) == 16
    assert resolve_heads(XL_2, num_heads=16, metadata=metadata) == 16
    with pytest.raises(
        ValueError, match=r"^x\.pt: num_heads=8 by the argument, but 16 by "
    ) as error:
        resolve_heads(XL_2, num_heads=8, metadata=metadata, source="x.pt")
    assert_one_line(error)


def test_recorded_heads_come_before_the_published_ones() -> None:
    assert resolve_heads(XL_2, metadata={"num_heads": 18}) == 18
    assert resolve_heads(XL_2, num_heads=18, metadata={"num_heads": 18}) == 18


def test_records_that_contradict_each_other_or_the_weights() -> None:
    with pytest.raises(
        ValueError, match=r"num_heads=8 by its metadata, but 16 by model='DiT-XL/2'"
    ):
        resolve_heads(XL_2, metadata={"num_heads": 8, "args": {"model": "DiT-XL/2"}})
    for name in ("DiT-L/2", "DiT-XL/4"):
        with pytest.raises(ValueError, match=rf"model='{name}' in its args, but the weights have"):
            resolve_heads(XL_2, metadata={"args": {"model": name}})
    for value in ("many", 0, -1, 2.5, True):
        with pytest.raises(ValueError, match=r"num_heads=.* in its metadata is no number of heads"):
            resolve_heads(XL_2, metadata={"num_heads": value})


def test_unknown_heads_are_asked_for() -> None:
    for config in (
        {**XL_2, "depth": 27},
        {**XL_2, "hidden_size": 1024},
        {**XL_2, "patch_size": 1},
    ):
        assert known_heads(config) is None
        for metadata in (None, {}, {"args": "text"}, {"model": "my model"}, {"format": "pt"}):
            with pytest.raises(
                ValueError, match=r"^x: num_heads is not recorded .*; pass num_heads"
            ):
                resolve_heads(config, metadata=metadata, source="x")
        assert resolve_heads(config, num_heads=32) == 32


def test_a_name_in_the_path_counts_where_its_sizes_are_the_weights() -> None:
    assert resolve_heads({**XL_2, "patch_size": 1}, source="DiT-XL-1.pt") == 16
    assert resolve_heads(XL_2, source="DiT-S-2/ours.pt") == 16
    with pytest.raises(ValueError, match="pass num_heads"):
        resolve_heads({**XL_2, "depth": 3}, source="results/000-DiT-XL-2/0050000.pt")


@pytest.mark.parametrize("num_heads", [5, 0, -2, True, 2.0])
def test_heads_must_divide_the_width(num_heads: Any) -> None:
    with pytest.raises(ValueError, match=rf"x: num_heads={num_heads}: must be a positive divisor"):
        resolve_heads({**XL_2, "depth": 3}, num_heads=num_heads, source="x")


def test_heads_unlike_the_published_ones_give_a_warning() -> None:
    with pytest.warns(
        UserWarning, match="num_heads=8, but the published model of this size has 16"
    ):
        assert resolve_heads(XL_2, num_heads=8) == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_heads(XL_2, num_heads=16) == 16


# ------------------------------------------------------------------ loading


@pytest.mark.parametrize(
    ("weights", "model", "notes"),
    [
        (torch.float32, torch.float32, []),
        (torch.bfloat16, torch.float32, ["bfloat16 weights are cast to the model's float32"]),
        (torch.float32, torch.bfloat16, ["float32 weights are cast to the model's bfloat16"]),
    ],
)
def test_casts_are_told(weights: torch.dtype, model: torch.dtype, notes: list[str]) -> None:
    state = DiT(**SIZES).to(weights).state_dict()
    assert load_into(DiT(**SIZES).to(model), state, source="x") == notes


def test_a_model_without_storage_takes_over_the_tensors() -> None:
    state = DiT(**SIZES).bfloat16().state_dict()
    with torch.device("meta"):
        model = DiT(**SIZES)
    assert load_into(model, state, source="x") == []
    for name, value in model.state_dict().items():
        assert value.data_ptr() == state[name].data_ptr()
    assert not model.pos_embed.requires_grad
    assert model.final_layer.linear.weight.requires_grad


def test_classes_that_differ_without_a_null_class() -> None:
    options = {**SIZES, "class_dropout_prob": 0.0}
    other = DiT(**{**options, "num_classes": 20}).state_dict()
    with pytest.raises(ValueError, match=r"x: checkpoint has num_classes=20, model has 10$"):
        load_into(DiT(**options), other, source="x")
