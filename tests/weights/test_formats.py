"""Weights of other libraries come under the original's names and go back, bit for bit, with the same outputs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdit import DiT
from fastdit.testing import assert_same_bits
from fastdit.weights import load_into
from fastdit.weights.formats import (
    ORIGINAL_FREQUENCIES,
    config_of_diffusers,
    diffusers_config,
    read_diffusers_folder,
    read_diffusers_labels,
    to_diffusers,
    to_original,
    write_diffusers_folder,
)

SIZES: dict[str, Any] = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 48,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 10,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_model(**changes: Any) -> DiT:
    """A model whose every branch counts: no parameter is zero."""
    model = DiT(**{**SIZES, **changes})
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([3, 0, 10])


def assert_same_tensors(out: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(out) == list(expected)
    for key, value in expected.items():
        assert out[key].dtype == value.dtype
        assert_same_bits(key, out[key], value)


@pytest.fixture(scope="module")
def diffusers() -> Any:
    module = pytest.importorskip("diffusers", reason="needs diffusers")
    with warnings.catch_warnings():  # what its import loads is not this test's matter
        warnings.simplefilter("ignore")
        _ = module.DiTTransformer2DModel, module.DiTPipeline, module.AutoencoderKL
    return module


def make_theirs(diffusers: Any, **changes: Any) -> Any:
    """A DiTTransformer2DModel whose blocks have equal copies of what the original has once; none of it zero."""
    torch.manual_seed(1)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 3, "sample_size": 8}
    model = diffusers.DiTTransformer2DModel(
        **{**sizes, "num_embeds_ada_norm": 10, "out_channels": 8, **changes}
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval()


# ------------------------------------------------------------------ the original's names


def test_the_originals_names_stay() -> None:
    state = make_model().state_dict()
    out = to_original(state)
    assert_same_tensors(out.tensors, state)
    assert (out.format, out.extra, out.notes) == ("original", {}, [])


@pytest.mark.parametrize("conditioning", ["adaln", "cross_attention", "in_context"])
def test_the_papers_other_blocks_are_not_taken_for_foreign(conditioning: str) -> None:
    out = to_original(make_model(conditioning=conditioning).state_dict())
    assert (out.format, out.notes) == ("original", [])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_are_left_away(prefix: str) -> None:
    state = make_model().state_dict()
    out = to_original({f"{prefix}{name}": value for name, value in state.items()})
    assert_same_tensors(out.tensors, state)
    assert len(out.notes) == 1
    assert f"{prefix}pos_embed is pos_embed" in out.notes[0]


def test_prefixes_that_hide_a_second_tensor() -> None:
    state = make_model().state_dict()
    with pytest.raises(ValueError, match=r"_orig_mod\.pos_embed: .* another tensor has the same"):
        to_original({**state, "_orig_mod.pos_embed": state["pos_embed"]})


def test_repas_projectors_are_set_apart() -> None:
    state = make_model(learn_sigma=False).state_dict()
    projectors = {f"projectors.0.{i}.weight": torch.randn(4, 4) for i in (0, 2, 4)}
    out = to_original({**state, **projectors})
    assert_same_tensors(out.tensors, state)
    assert_same_tensors(out.extra, projectors)
    assert out.format == "repa"
    assert "3 tensors of REPA's projectors" in out.notes[0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("blocks.0.mlp.w12.weight", "SwiGLU"),
        ("final_layer.norm_final.weight", "RMSNorm"),
        ("blocks.1.attn.q_norm.weight", "normalised queries"),
        ("feat_rope.freqs_cos", "rotary positions"),
    ],
)
def test_lightning_dit_is_refused(name: str, reason: str) -> None:
    state = {**make_model().state_dict(), name: torch.ones(1)}
    with pytest.raises(ValueError, match=f"LightningDiT's blocks, with {reason}"):
        to_original(state)


@pytest.mark.parametrize("state", [{}, {"a.weight": torch.ones(1), "b.weight": torch.ones(1)}])
def test_other_models_are_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="not the weights of a DiT") as caught:
        to_original(state)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ diffusers' names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learn_sigma": False, "in_channels": 3},
        {"patch_size": 4, "num_heads": 4, "depth": 1},
        {"class_dropout_prob": 0.2},
    ],
)
def test_to_diffusers_and_back(changes: dict[str, Any], dtype: torch.dtype) -> None:
    model = make_model(**changes).to(dtype)
    state = model.state_dict()
    converted = to_diffusers(state, model.config)
    assert len({value.data_ptr() for value in converted.values()}) == len(converted)
    back = to_original(converted, input_size=8)
    assert_same_tensors(back.tensors, state)
    assert (back.format, back.extra, back.notes) == ("diffusers", {}, [])


def test_config_to_diffusers_and_back() -> None:
    for changes in ({}, {"learn_sigma": False, "num_classes": 1000, "depth": 1}):
        config = make_model(**changes).config
        assert config_of_diffusers(json.loads(json.dumps(diffusers_config(config)))) == config


def break_state(change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    state = to_diffusers(make_model().state_dict(), make_model().config)
    change(state)
    return state


BLOCK_2 = "transformer_blocks.2"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda s: s[f"{BLOCK_2}.norm1.emb.timestep_embedder.linear_2.bias"].add_(1),
            rf"{BLOCK_2}\.norm1\.emb\.timestep_embedder\.linear_2\.bias is not equal",
        ),
        (
            lambda s: s[f"{BLOCK_2}.norm1.emb.class_embedder.embedding_table.weight"][10, 0].add_(
                1
            ),
            rf"{BLOCK_2}\.norm1\.emb\.class_embedder\.embedding_table\.weight is not equal",
        ),
        (
            lambda s: s.update(
                {f"{BLOCK_2}.norm1.emb.timestep_embedder.linear_1.bias": torch.ones(3)}
            ),
            rf"{BLOCK_2}.*linear_1\.bias is not equal",
        ),
        (
            lambda s: s.pop("transformer_blocks.1.attn1.to_k.bias"),
            r"missing transformer_blocks\.1\.attn1\.to_k\.bias",
        ),
        (
            lambda s: [s.pop(name) for name in list(s) if "blocks.1." in name],
            r"missing transformer_blocks\.1\.",
        ),
        (lambda s: s.pop("proj_out_2.weight"), r"missing proj_out_2\.weight"),
        (
            lambda s: s.update({"transformer_blocks.0.attn2.to_q.weight": torch.ones(2, 2)}),
            r"unexpected transformer_blocks\.0\.attn2\.to_q\.weight",
        ),
        (
            lambda s: s.update({"transformer_blocks.0.attn1.to_k.weight": torch.ones(24, 48)}),
            r"blocks\.0\.attn1: to_q, to_k and to_v have the shapes \(48, 48\), \(24, 48\)",
        ),
        (
            lambda s: s.update({"pos_embed.proj.weight": torch.ones(48, 4)}),
            r"pos_embed\.proj\.weight has shape \(48, 4\)",
        ),
        (
            lambda s: s.update({"pos_embed.pos_embed": torch.randn(1, 16, 48)}),
            "pos_embed differs from the sinusoidal one by",
        ),
    ],
)
def test_broken_diffusers_weights(change: Callable[[dict[str, Tensor]], Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        to_original(break_state(change), input_size=8)
    assert "\n" not in str(caught.value)


def test_diffusers_weights_alone_do_not_show_the_image_size() -> None:
    model = make_model()
    state = to_diffusers(model.state_dict(), model.config)
    with pytest.raises(ValueError, match="do not show input_size"):
        to_original(state)
    # Unless they hold the position embedding, as some versions write it.
    state["pos_embed.pos_embed"] = model.pos_embed.detach().clone()
    assert_same_tensors(to_original(state).tensors, model.state_dict())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"conditioning": "adaln"}, "conditioning='adaln': diffusers"),
        ({"class_dropout_prob": 0.0}, "class_dropout_prob=0: diffusers"),
        ({"input_size": (8, 4)}, r"input_size=\[8, 4\]: diffusers"),
        ({"mlp_ratio": 2.0}, r"mlp_ratio=2\.0: diffusers"),
    ],
)
def test_what_diffusers_cannot_represent(changes: dict[str, Any], reason: str) -> None:
    model = make_model(**changes)
    with pytest.raises(ValueError, match=reason):
        to_diffusers(model.state_dict(), model.config)


def test_weights_of_another_config() -> None:
    state = make_model().state_dict()
    config = make_model().config
    with pytest.raises(ValueError, match="weights have depth=3, the config has 2"):
        to_diffusers(state, {**config, "depth": 2})
    with pytest.raises(ValueError, match="num_classes=20: the label table has 11 rows"):
        to_diffusers(state, {**config, "num_classes": 20})
    with pytest.raises(ValueError, match="num_heads=5: must be a divisor"):
        to_diffusers(state, {**config, "num_heads": 5})
    narrow = make_model(mlp_ratio=2.0).state_dict()
    with pytest.raises(ValueError, match=r"weights have mlp_ratio=2\.0, the config has 4\.0"):
        to_diffusers(narrow, config)
    no_null = make_model(class_dropout_prob=0.0).state_dict()
    with pytest.raises(ValueError, match=r"weights have class_dropout_prob=0\.0, the config has"):
        to_diffusers(no_null, config)
    with pytest.raises(ValueError, match="config has no num_heads"):
        to_diffusers(state, {k: v for k, v in config.items() if k != "num_heads"})


def test_a_position_embedding_that_was_learned_or_averaged(tmp_path: Path) -> None:
    """diffusers computes it: what an average in float32 may have moved is told, what was learned is refused."""
    model = make_model()
    averaged = {**model.state_dict(), "pos_embed": model.pos_embed.detach() * (1 - 3e-4)}
    notes = write_diffusers_folder(tmp_path / "x", averaged, model.config)
    assert any("differs from it by up to 3.0e-04" in note for note in notes)
    learned = {**model.state_dict(), "pos_embed": model.pos_embed.detach() + 0.01}
    with pytest.raises(ValueError, match=r"pos_embed differs from the sinusoidal one by 1\.0e-02"):
        write_diffusers_folder(tmp_path / "y", learned, model.config)
    with pytest.raises(ValueError, match="pos_embed differs from the sinusoidal one by nan"):
        to_diffusers({**learned, "pos_embed": learned["pos_embed"] * torch.nan}, model.config)
    assert not (tmp_path / "y").exists()


PUBLISHED = {
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.12.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "cross_attention_dim": None,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
    "upcast_attention": False,
    "use_linear_projection": False,
}


def test_an_older_versions_config() -> None:
    """The keys that Transformer2DModel had when the class of DiT had this name."""
    assert config_of_diffusers(PUBLISHED) == {
        "input_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 1152,
        "depth": 28,
        "num_heads": 16,
        "mlp_ratio": 4.0,
        "class_dropout_prob": 0.1,
        "num_classes": 1000,
        "learn_sigma": True,
        "conditioning": "adaln_zero",
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_class_name": "PixArtTransformer2DModel"}, "_class_name='PixArtTransformer2DModel'"),
        ({"_class_name": None}, "_class_name=None"),
        ({"num_layers": "28"}, "num_layers='28': expected a positive integer"),
        ({"num_layers": True}, "num_layers=True: expected a positive integer"),
        ({"patch_size": None}, "patch_size=None: expected a positive integer"),
        ({"sample_size": [32, 32]}, r"sample_size=\[32, 32\]: expected"),
        ({"activation_fn": "geglu"}, "activation_fn='geglu': fastdit.DiT has 'gelu-approximate'"),
        ({"attention_bias": False}, "attention_bias=False: fastdit.DiT has True"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"norm_eps": 1e-3}, "norm_eps=0.001: fastdit.DiT has 1e-05 or 1e-06"),
        ({"norm_type": "ada_norm_single"}, "norm_type='ada_norm_single'"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
        ({"upcast_attention": True}, "upcast_attention=True"),
        ({"out_channels": 6}, "out_channels=6: expected 4, or 8"),
        ({"cross_attention_dim": 768}, "cross_attention_dim=768: no key"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
    ],
)
def test_configs_that_are_no_dit(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        config_of_diffusers(PUBLISHED | changes)


# ------------------------------------------------------------------ folders


@pytest.fixture
def written(tmp_path: Path) -> tuple[DiT, Path]:
    model = make_model()
    write_diffusers_folder(tmp_path / "written", model.state_dict(), model.config)
    return model, tmp_path / "written"


def test_folder_written_and_read(written: tuple[DiT, Path]) -> None:
    model, folder = written
    tensors, config, notes = read_diffusers_folder(folder)
    assert_same_tensors(tensors, model.state_dict())
    assert config == model.config
    assert len(notes) == 1
    assert "norm_eps=1e-06" in notes[0]
    assert read_diffusers_labels(folder) is None


def test_folders_are_never_overwritten(written: tuple[DiT, Path]) -> None:
    model, folder = written
    with pytest.raises(FileExistsError):
        write_diffusers_folder(folder, model.state_dict(), model.config)


def test_notes_of_writing(tmp_path: Path) -> None:
    model = make_model(num_classes=1000)
    notes = write_diffusers_folder(tmp_path / "x", model.state_dict(), model.config)
    assert len(notes) == 1
    assert notes[0].endswith(ORIGINAL_FREQUENCIES)
    model = make_model()
    notes = write_diffusers_folder(tmp_path / "y", model.state_dict(), model.config)
    assert len(notes) == 2
    assert "this model has 10" in notes[1]


def split_in_two(folder: Path) -> dict[str, str]:
    """The weights of `folder` as two files and their index, which is returned."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for part in set(places.values()):
        save_file({n: tensors[n] for n in tensors if places[n] == part}, folder / part)
    write_index(folder, places)
    return places


def write_index(folder: Path, places: dict[str, str]) -> None:
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))


def test_weights_in_several_files(written: tuple[DiT, Path]) -> None:
    model, folder = written
    places = split_in_two(folder)
    assert_same_tensors(read_diffusers_folder(folder)[0], model.state_dict())
    first = next(iter(places))
    for place in ("../secret.safetensors", "/etc/x.safetensors", "part-0.bin"):
        write_index(folder, {**places, first: place})
        with pytest.raises(ValueError, match=f"'{place}' is no name of a"):
            read_diffusers_folder(folder)
    write_index(folder, {name: place for name, place in places.items() if name != first})
    with pytest.raises(ValueError, match=f"{first} is in this file or in the index, not in both"):
        read_diffusers_folder(folder)
    write_index(folder, {**places, "other": "part-0.safetensors"})
    with pytest.raises(ValueError, match="other is in this file or in the index, not in both"):
        read_diffusers_folder(folder)


def test_pickled_weights(written: tuple[DiT, Path]) -> None:
    model, folder = written
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert_same_tensors(read_diffusers_folder(folder)[0], model.state_dict())


def test_weights_that_are_not_finite(written: tuple[DiT, Path]) -> None:
    folder = written[1]
    tensors = load_file(folder / WEIGHTS)
    tensors["proj_out_2.bias"][0] = torch.nan
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"proj_out_2\.bias"):
        read_diffusers_folder(folder)
    assert (
        read_diffusers_folder(folder, check_finite=False)[0]["final_layer.linear.bias"]
        .isnan()
        .any()
    )


def test_what_is_missing_or_does_not_fit(written: tuple[DiT, Path]) -> None:
    _, folder = written
    content = json.loads((folder / "config.json").read_text())
    for changes, reason in {
        "num_layers": (2, "weights have depth=3, config.json has 2"),
        "num_embeds_ada_norm": (20, "num_classes=20: the label table has 11 rows"),
        "out_channels": (4, "weights have learn_sigma=True, config.json has False"),
        "dropout": (0.5, r"config\.json: dropout=0\.5"),
        "attention_head_dim": (12, "weights have hidden_size=48, config.json has 24"),
    }.items():
        (folder / "config.json").write_text(json.dumps({**content, changes: reason[0]}))
        with pytest.raises(ValueError, match=reason[1]) as caught:
            read_diffusers_folder(folder)
        assert str(caught.value).startswith(str(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object"):
        read_diffusers_folder(folder)
    (folder / "config.json").write_text(json.dumps(content))
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {WEIGHTS}"):
        read_diffusers_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError):
        read_diffusers_folder(folder)


def make_pipeline_folder(written: Path, **index: Any) -> Path:
    folder = written.with_name("pipeline")
    folder.mkdir()
    written.rename(folder / "transformer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", **index}))
    return folder


def test_a_pipelines_folder_and_its_labels(written: tuple[DiT, Path]) -> None:
    model, folder = written
    folder = make_pipeline_folder(folder, id2label={"0": "tench, Tinca tinca", "1": "goldfish"})
    tensors, config, _ = read_diffusers_folder(folder)
    assert_same_tensors(tensors, model.state_dict())
    assert config == model.config
    assert read_diffusers_labels(folder) == ["tench, Tinca tinca", "goldfish"]
    for labels in ({"0": "a", "2": "b"}, ["a"], "a"):
        (folder / "model_index.json").write_text(json.dumps({"id2label": labels}))
        with pytest.raises(ValueError, match="id2label must name the classes"):
            read_diffusers_labels(folder)


def test_other_pipelines_are_refused(written: tuple[DiT, Path]) -> None:
    folder = make_pipeline_folder(written[1], _class_name="StableDiffusionPipeline")
    with pytest.raises(ValueError, match="_class_name='StableDiffusionPipeline', expected 'DiTPip"):
        read_diffusers_folder(folder)


# ------------------------------------------------------------------ diffusers itself


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


@pytest.mark.parametrize("changes", [{}, {"learn_sigma": False, "patch_size": 4, "num_heads": 3}])
def test_diffusers_gives_the_same_output(
    diffusers: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """What was written, with the line of the note, differs only by rounding; without it, by far more."""
    ours = make_model(**changes)
    notes = write_diffusers_folder(tmp_path / "x", ours.state_dict(), ours.config)
    model, info = diffusers.DiTTransformer2DModel.from_pretrained(
        tmp_path / "x", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    x, t, y = batch()
    with torch.no_grad():
        expected = ours(x, t, y)
        before = model(x, timestep=t, class_labels=y).sample
        assert ORIGINAL_FREQUENCIES in notes[0]
        exec(ORIGINAL_FREQUENCIES, {"model": model})
        after = model(x, timestep=t, class_labels=y).sample
    assert relative_error(after, expected) < 1e-5  # float32: the golden outputs' bound
    assert relative_error(before, expected) > 1e-3


def test_diffusers_own_folder_is_read(diffusers: Any, tmp_path: Path) -> None:
    theirs = make_theirs(diffusers, norm_eps=1e-6)
    theirs.save_pretrained(tmp_path / "x")
    tensors, config, notes = read_diffusers_folder(tmp_path / "x")
    ours = DiT(**config).eval()
    load_into(ours, tensors, source="x")
    assert "norm_eps=1e-06" in notes[0]
    assert config == {**make_model().config, "num_heads": 2}
    exec(ORIGINAL_FREQUENCIES, {"model": theirs})
    x, t, y = batch()
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=y).sample
        assert relative_error(ours(x, t, y), expected) < 1e-5
    # Back again, they are the same weights.
    converted = to_diffusers(ours.state_dict(), config)
    assert sorted(converted) == sorted(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert_same_bits(name, converted[name], value)


def test_diffusers_shards_are_read(diffusers: Any, tmp_path: Path) -> None:
    make_theirs(diffusers).save_pretrained(tmp_path / "x", max_shard_size="100KB")
    assert len(list((tmp_path / "x").glob("*.safetensors"))) > 1
    assert len(read_diffusers_folder(tmp_path / "x")[0]) == 10 * 3 + 12


def test_diffusers_own_pipeline_is_read(diffusers: Any, tmp_path: Path) -> None:
    theirs = make_theirs(diffusers)
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    pipeline = diffusers.DiTPipeline(theirs, vae, diffusers.DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "x")
    tensors, config, notes = read_diffusers_folder(tmp_path / "x")
    assert "norm_eps=1e-05" in notes[0]  # diffusers' default
    load_into(DiT(**config), tensors, source="x")


def test_untied_copies_of_diffusers_training_are_refused(diffusers: Any, tmp_path: Path) -> None:
    """Each block of a model that diffusers trained has its own timestep MLP and label table."""
    theirs = make_theirs(diffusers)
    nn.init.normal_(theirs.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.weight)
    theirs.save_pretrained(tmp_path / "x")
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\..*linear_1\.weight is not equal"):
        read_diffusers_folder(tmp_path / "x")
