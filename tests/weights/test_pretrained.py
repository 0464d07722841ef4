"""`from_pretrained` takes what a user has; what does not fit is refused in one line, and what is made anew is said."""

from __future__ import annotations

import argparse
import io
import json
import stat
import sys
import types
import urllib.request
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fastdit
from fastdit import DiT, from_pretrained, save_pretrained, save_weights
from fastdit.files import cache_folder
from fastdit.testing import assert_same_bits
from fastdit.weights import convert, hub, inspect_weights, write_manifest
from fastdit.weights.hub import PUBLISHED, Published

SIZES: dict[str, Any] = {
    "input_size": 4,
    "in_channels": 3,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
}
HEADS = SIZES["num_heads"]
ASSUMED = (
    "ignore:.*num_classes:UserWarning"  # the label table has 11 rows: 10 classes and the null one
)


def make_model(seed: int = 0, **changes: Any) -> DiT:
    torch.manual_seed(seed)
    model = DiT(**{**SIZES, **changes})
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def assert_same_model(out: DiT, expected: DiT) -> None:
    assert out.config == expected.config
    assert not out.training
    for name, value in expected.state_dict().items():
        assert_same_bits(name, out.state_dict()[name], value)


def describe(model: DiT, folder: Path) -> None:
    """What a run writes beside its weights."""
    rest: dict[str, Any] = {"classes": [], "diffusion": {}, "images": {}}
    (folder / "model.json").write_text(json.dumps({"format": 1, "model": model.config, **rest}))


def training_checkpoint(path: Path) -> tuple[DiT, DiT]:
    """What the original's train.py writes; the model and its average."""
    model, ema = make_model(1), make_model(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    args = argparse.Namespace(model="DiT-XL/2", image_size=256, num_classes=10, epochs=1400)
    entries = {"model": model, "ema": ema, "opt": optimizer}
    torch.save({k: v.state_dict() for k, v in entries.items()} | {"args": args}, path)
    return model, ema


# ------------------------------------------------------------------ what is read


@pytest.mark.filterwarnings(ASSUMED)
def test_bare_state_dict(tmp_path: Path) -> None:
    model = make_model()
    torch.save(model.state_dict(), tmp_path / "x.pt")
    assert_same_model(from_pretrained(tmp_path / "x.pt", num_heads=HEADS), model)


def test_a_file_of_ours_says_which_model_it_is(tmp_path: Path) -> None:
    """Without any warning: no heads to be given, no null class to be assumed."""
    model = make_model(num_heads=4, class_dropout_prob=0.3)
    save_weights(model, tmp_path / "x.safetensors")
    assert_same_model(from_pretrained(tmp_path / "x.safetensors"), model)


def test_training_checkpoint_holds_two(tmp_path: Path) -> None:
    # The name of the model says 16 heads for XL; these are not its sizes.
    model, ema = make_model(1), make_model(2)
    states = {"model": model.state_dict(), "ema": ema.state_dict()}
    args = argparse.Namespace(num_classes=10, num_heads=2)
    torch.save(states | {"opt": {}, "args": args}, tmp_path / "0050000.pt")
    assert_same_model(from_pretrained(tmp_path / "0050000.pt"), ema)
    assert_same_model(from_pretrained(tmp_path / "0050000.pt", which="model"), model)


def test_the_name_of_another_size_is_refused(tmp_path: Path) -> None:
    training_checkpoint(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt.*DiT-XL/2"):
        from_pretrained(tmp_path / "x.pt", num_heads=HEADS)


def test_a_folder_of_save_pretrained(tmp_path: Path) -> None:
    model = make_model(conditioning="adaln")
    model.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert_same_model(DiT.from_pretrained(tmp_path / "model"), model)


def test_several_averages(tmp_path: Path) -> None:
    model, ema, slow = make_model(1), make_model(2), make_model(3)
    describe(model, tmp_path)
    for name, one in {"model": model, "ema": ema, "ema-0.99999": slow}.items():
        save_weights(one, tmp_path / f"{name}.safetensors")
    for which, one in {"model": model, "ema": ema, "ema:0.99999": slow}.items():
        assert_same_model(from_pretrained(tmp_path, which=which), one)


def test_weights_that_are_not_what_the_checkpoint_wrote(tmp_path: Path) -> None:
    """Files of two checkpoints in one folder load without a fault, and are no model that was ever trained."""
    model, other = make_model(1), make_model(2)
    describe(model, tmp_path)
    for name in ("model", "ema"):
        save_weights(model, tmp_path / f"{name}.safetensors")
    write_manifest(tmp_path, {})
    assert_same_model(from_pretrained(tmp_path), model)
    save_weights(other, tmp_path / "ema.safetensors")
    assert_same_model(from_pretrained(tmp_path, which="model"), model)
    with pytest.raises(ValueError, match=r"ema\.safetensors: damaged, SHA-256"):
        from_pretrained(tmp_path)


def test_non_square_models(tmp_path: Path) -> None:
    model = make_model(input_size=(4, 8))
    save_pretrained(model, tmp_path)
    assert_same_model(from_pretrained(tmp_path), model)


# ------------------------------------------------------------------ rows 71 to 76, and heads


def test_heads_are_never_guessed(tmp_path: Path) -> None:
    torch.save(make_model().state_dict(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt.*num_heads"):
        from_pretrained(tmp_path / "x.pt")


def test_inspecting_needs_no_heads(tmp_path: Path) -> None:
    torch.save(make_model().state_dict(), tmp_path / "x.pt")
    found = inspect_weights(tmp_path / "x.pt")
    assert found["config"]["num_heads"] is None
    assert any("num_heads is not recorded" in line for line in found["odd"])


def test_other_heads_than_were_trained(tmp_path: Path) -> None:
    save_weights(make_model(), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors: num_heads=4, .* trained with 2"):
        from_pretrained(tmp_path / "x.safetensors", num_heads=4)
    save_pretrained(make_model(), tmp_path / "folder")
    with pytest.raises(ValueError, match=r"num_heads=4, .* trained with 2"):
        from_pretrained(tmp_path / "folder", num_heads=4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights(tmp_path: Path, value: float) -> None:
    model = make_model()
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[3, 5] = value
    save_weights(model, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors.*blocks\.1\.attn\.qkv\.weight"):
        from_pretrained(tmp_path / "x.safetensors")
    loaded = from_pretrained(tmp_path / "x.safetensors", check_finite=False)
    assert not loaded.blocks[1].attn.qkv.weight.isfinite().all()


def test_low_precision_is_said(tmp_path: Path) -> None:
    model = make_model().bfloat16()
    save_weights(model, tmp_path / "x.safetensors")
    with pytest.warns(UserWarning, match=r"x\.safetensors: .*bfloat16"):
        loaded = from_pretrained(tmp_path / "x.safetensors")
    assert_same_model(loaded, model.float())


def test_projectors_are_set_apart_and_prefixes_stripped(tmp_path: Path) -> None:
    model = make_model()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    state |= {"module.projectors.0.0.weight": torch.ones(3, 16)}
    torch.save(
        {"ema": state, "args": argparse.Namespace(num_heads=2, num_classes=10)}, tmp_path / "x.pt"
    )
    with pytest.warns(UserWarning, match=r"x\.pt: ") as said:
        loaded = from_pretrained(tmp_path / "x.pt")
    texts = [str(one.message) for one in said]
    assert any("projectors" in text for text in texts)
    assert any("module." in text for text in texts)
    assert_same_model(loaded, model)


# ------------------------------------------------------------------ fine-tuning


def test_other_classes(tmp_path: Path) -> None:
    model = make_model()
    save_pretrained(model, tmp_path)
    with pytest.warns(
        UserWarning, match=r"label table is drawn anew.*num_classes=10.*num_classes=3"
    ):
        loaded = from_pretrained(tmp_path, num_classes=3)
    table = loaded.y_embedder.embedding_table.weight
    assert loaded.num_classes == 3
    assert table.shape == (4, 16)
    assert 0 < table.abs().max() < 0.2
    assert_same_bits("qkv", loaded.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_the_same_rows_may_mean_other_classes(tmp_path: Path) -> None:
    """11 classes without a null label have the table of 10 with one."""
    model = make_model()
    save_pretrained(model, tmp_path)
    with pytest.warns(UserWarning, match="drawn anew.*a null label.*no null label"):
        loaded = from_pretrained(tmp_path, num_classes=11, class_dropout_prob=0.0)
    theirs, ours = (m.y_embedder.embedding_table.weight for m in (model, loaded))
    assert theirs.shape == ours.shape
    assert not torch.equal(theirs, ours)


def test_another_resolution(tmp_path: Path) -> None:
    model = make_model()
    save_pretrained(model, tmp_path)
    with pytest.warns(UserWarning, match="position embedding is computed for 4x6 tokens"):
        loaded = from_pretrained(tmp_path, input_size=(8, 12))
    expected = DiT(**{**SIZES, "input_size": (8, 12)}).pos_embed
    assert_same_bits("pos_embed", loaded.pos_embed, expected)
    x, t, y = torch.randn(1, 3, 8, 12), torch.tensor([5]), torch.tensor([3])
    assert loaded(x, t, y).shape == (1, 6, 8, 12)


def test_overrides_that_would_change_the_weights(tmp_path: Path) -> None:
    save_pretrained(make_model(), tmp_path)
    with pytest.raises(TypeError, match="depth=3: allowed overrides are num_classes"):
        from_pretrained(tmp_path, depth=3)


def test_residual_dtype_is_no_change(tmp_path: Path) -> None:
    save_pretrained(make_model(), tmp_path)
    assert from_pretrained(tmp_path, residual_dtype=torch.float32).residual_dtype == torch.float32


def test_no_random_numbers_are_drawn(tmp_path: Path) -> None:
    save_pretrained(make_model(), tmp_path)
    before = torch.get_rng_state()
    from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------ folders and files that are not models


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"architecture": "os.system"}, "architecture='os.system', expected 'fastdit.DiT'"),
        ({"architecture": "fastdit.DiT", "depht": 2}, "depht is no argument of DiT.*depth"),
        ({"architecture": "fastdit.DiT", "depth": 2}, "num_heads=None"),
        ([1], r"architecture=\[1\], expected 'fastdit.DiT'"),
        (
            {"architecture": "fastdit.DiT", "num_heads": 2, "attention": "x"},
            "attention is no argument",
        ),
    ],
)
def test_bad_configs(tmp_path: Path, content: Any, reason: str) -> None:
    save_weights(make_model(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"config\.json: {reason}"):
        from_pretrained(tmp_path)


def test_a_lying_header(tmp_path: Path) -> None:
    """What a file says of its model decides nothing but the arguments of DiT, and they have to fit the weights."""
    model = make_model()
    save_weights(model, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    lie = content.replace(b'\\"depth\\": 2', b'\\"depth\\": 3')
    assert lie != content
    (tmp_path / "x.safetensors").write_bytes(lie)
    with pytest.raises(ValueError, match=r"x\.safetensors: checkpoint has depth=2, model has 3"):
        from_pretrained(tmp_path / "x.safetensors")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights in this folder"):
        from_pretrained(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file.*DiT-XL-2-256x256"):
        from_pretrained(tmp_path / "x.pt")


# ------------------------------------------------------------------ downloads


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Response(io.BytesIO):
    def __init__(self, content: bytes, url: str, length: int) -> None:
        super().__init__(content)
        self.url, self.headers = url, {"Content-Length": str(length)}


def serve(
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    *,
    url: str | None = None,
    length: int | None = None,
) -> list[str]:
    """Answers every request with `content`; the addresses that were asked for."""
    asked: list[str] = []

    def urlopen(address: str, timeout: float) -> Response:
        asked.append(address)
        return Response(content, url or address, len(content) if length is None else length)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def saved(model: DiT) -> bytes:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue()


@pytest.mark.filterwarnings(ASSUMED)
def test_published_weights_are_fetched_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model()
    asked = serve(monkeypatch, saved(model))
    # Of the real ones the size tells the heads; this one is too small.
    for _ in range(2):
        assert_same_model(from_pretrained("DiT-XL-2-256x256", num_heads=HEADS), model)
    assert asked == [PUBLISHED["DiT-XL-2-256x256"].url]
    assert asked[0].startswith("https://")
    assert [path.name for path in cache.iterdir()] == ["DiT-XL-2-256x256.pt"]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert "CC-BY-NC" in capsys.readouterr().out


def test_a_download_that_ends_early_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = saved(make_model())
    serve(monkeypatch, content[:-10], length=len(content))
    with pytest.raises(OSError, match="the connection ended after"):
        from_pretrained("DiT-XL-2-512x512")
    assert list(cache.iterdir()) == []


def test_a_download_that_leaves_https(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, saved(make_model()), url="http://elsewhere")
    with pytest.raises(OSError, match="http://elsewhere, which is not https"):
        from_pretrained("DiT-XL-2-512x512")
    assert list(cache.iterdir()) == []


def test_a_download_with_another_checksum(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hub.PUBLISHED, "DiT-XL-2-256x256", Published("https://there", "0" * 64))
    serve(monkeypatch, saved(make_model()))
    with pytest.raises(ValueError, match=r"https://there: SHA-256 is [0-9a-f]{64}, expected 0000"):
        from_pretrained("DiT-XL-2-256x256")
    assert list(cache.iterdir()) == []


def test_a_cache_that_others_can_write(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(PermissionError, match="others can write to it"):
        cache_folder()


def test_a_cache_of_somebody_else(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(mode=0o700)
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="belongs to another user"):
        cache_folder()


def fake_hub(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(**functions))


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    save_pretrained(model, tmp_path / "snapshot")
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path / "snapshot")

    fake_hub(monkeypatch, snapshot_download=snapshot_download)
    assert_same_model(from_pretrained("somebody/digits"), model)
    ((name, patterns),) = asked
    assert name == "somebody/digits"
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in patterns)


def test_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    calls: list[tuple[str, Any]] = []

    class HfApi:
        def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> None:
            calls.append((name, private))

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
            calls.append((repo_id, from_pretrained(folder_path).state_dict()))
            return "address"

    fake_hub(monkeypatch, HfApi=HfApi)
    assert model.push_to_hub("somebody/digits", private=True) == "address"
    assert calls[0] == ("somebody/digits", True)
    assert_same_bits("pos_embed", calls[1][1]["pos_embed"], model.pos_embed)


def test_without_the_package_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"fastdit\[hub\]"):
        from_pretrained("somebody/digits")


# ------------------------------------------------------------------ convert and inspect


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: value.contiguous().numpy().tobytes() for name, value in tensors.items()}


def test_round_trip_through_every_format(tmp_path: Path) -> None:
    """The original's file -> safetensors -> diffusers -> the original's file, bit for bit."""
    model = make_model(in_channels=4)
    state = model.state_dict()
    torch.save(
        {"ema": state, "args": argparse.Namespace(num_heads=2, num_classes=10)}, tmp_path / "a.pt"
    )
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    notes = convert(tmp_path / "b.safetensors", tmp_path / "c", to="diffusers")
    assert any("downscale_freq_shift" in note for note in notes)
    convert(tmp_path / "c", tmp_path / "d.pt", to="original")
    out = torch.load(tmp_path / "d.pt", weights_only=True)
    assert list(out) == list(state)
    assert bits(out) == bits(state)


def test_dtypes_survive(tmp_path: Path) -> None:
    model = make_model().half()
    save_weights(model, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    tensors = load_file(tmp_path / "b.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float16}


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    save_weights(make_model(), tmp_path / "a.safetensors")
    for to, target, reason in (
        ("safetensors", "b.pt", "only .safetensors"),
        ("original", "b.safetensors", "ends in .pt"),
        ("onnx", "b.onnx", "to='onnx'"),
    ):
        with pytest.raises(ValueError, match=reason):
            convert(tmp_path / "a.safetensors", tmp_path / target, to=to)  # type: ignore[arg-type]
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there"):
        convert(tmp_path / "a.safetensors", tmp_path / "there", to="diffusers")


def test_what_is_odd(tmp_path: Path) -> None:
    save_weights(make_model(), tmp_path / "good.safetensors")
    assert inspect_weights(tmp_path / "good.safetensors")["odd"] == []

    save_weights(DiT(**SIZES), tmp_path / "initial.safetensors")
    (odd,) = inspect_weights(tmp_path / "initial.safetensors")["odd"]
    assert odd.startswith("as initialised")

    model = make_model(class_dropout_prob=0.0)
    with torch.no_grad():
        model.pos_embed.mul_(2)
        model.blocks[0].mlp.fc1.weight[0, :3] = float("nan")
        model.blocks[1].mlp.fc1.weight.zero_()
    save_weights(model, tmp_path / "odd.safetensors")
    odd = inspect_weights(tmp_path / "odd.safetensors")["odd"]
    for text in ("fc1.weight: 3 of 1,024 values", "blocks.1.mlp.fc1", "position", "no null class"):
        assert any(text in line for line in odd), text
    assert len(odd) == 4


def test_statistics(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.blocks[0].attn.proj.bias.fill_(2.0)
        model.blocks[1].attn.proj.bias.fill_(-3.0)
    save_weights(model, tmp_path / "x.safetensors")
    found = inspect_weights(tmp_path / "x.safetensors")
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["dtypes"] == {"float32": 4 * found["parameters"]}
    bias = found["tensors"]["blocks.*.attn.proj.bias"]
    assert bias == {"count": 2, "shape": [16], "rms": [2.0, 3.0], "largest": 3.0}
    json.dumps(found)


def test_public_names() -> None:
    for name in ("from_pretrained", "load_weights", "save_weights", "save_pretrained"):
        assert name in fastdit.__all__
        assert callable(getattr(fastdit, name))


def test_copies_of_a_loaded_model_are_independent(tmp_path: Path) -> None:
    """Memory-mapped or not, what is loaded can be trained, and its file stays as it was."""
    torch.save(
        {"ema": make_model().state_dict(), "args": argparse.Namespace(num_heads=2, num_classes=10)},
        tmp_path / "x.pt",
    )
    before = (tmp_path / "x.pt").read_bytes()
    model = from_pretrained(tmp_path / "x.pt")
    other = deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert not torch.equal(model.pos_embed, other.pos_embed)
    assert (tmp_path / "x.pt").read_bytes() == before
