"""The programs that measure sampling and attention run, and write what they say."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention_registry, sampling
from benchmarks.results import Row, read_rows
from fastdit import DiT
from fastdit.attention import registry
from tests.data.helpers import save_vae


def rows_of(folder: Path, name: str) -> list[Row]:
    (path,) = folder.glob(f"*/*/{name}.json")
    return read_rows(path)


def test_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--model", "DiT-S/8", "--batch", "1", "--steps", "1"]
    options += ["--rounds", "2", "--dtype", "fp32", "--no-compile", "--output", str(tmp_path)]
    sampling.main(options)
    rows = rows_of(tmp_path, "sampling-dit-s-8")
    assert [row.provider for row in rows[:3]] == ["reference", "eager", "fastdit"]
    for row in rows:
        assert (row.value or 0) > 0
        assert row.unit == "us"
        assert row.spread is not None
        assert row.shape == {"N": 1, "T": 16, "steps": 1}
    assert rows[0].baseline is None
    assert {row.baseline for row in rows[1:3]} == {"reference"}
    assert all((row.ratio or 0) > 0 for row in rows[1:3])
    assert "sampling-dit-s-8.json" in capsys.readouterr().out


def test_baselines_and_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ratio against each baseline that was measured, a reason for what was not."""

    def without_memory(labels: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    def wrong(labels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("does not compile")

    model = DiT(**(sampling.DEMO | {"depth": 1, "hidden_size": 32}))
    draws = dict.fromkeys(("reference", "fastdit", "reference, compiled"), torch.neg)
    draws |= {"eager": without_memory, "diffusers": wrong}
    monkeypatch.setattr(sampling, "providers_of", lambda *_: draws)
    options = argparse.Namespace(steps=2, rounds=2, no_compile=False)
    template = Row("sampling", "demo", "", {}, "fp32", "time")
    rows, broken = sampling.step_rows(model, [1, 2], options, template)
    assert broken == ["diffusers"] * 2
    fastdit = [(row.case, row.baseline) for row in rows if row.provider == "fastdit"]
    assert fastdit == 2 * [
        ("demo", "reference"),
        ("demo against reference, compiled", "reference, compiled"),
    ]
    reasons = {row.provider: row.reason for row in rows if row.value is None}
    assert reasons == {"eager": "no memory", "diffusers": "does not compile"}


def test_the_reference_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 weights, products in bfloat16, whatever the dtype of the model."""
    model = DiT(**(sampling.DEMO | {"depth": 1, "hidden_size": 32})).bfloat16().eval()
    seen = []
    loop = sampling.plain_loop

    def watched(wide: DiT, *arguments: Any) -> torch.Tensor:
        linear = wide.blocks[0].mlp.fc1
        watch = lambda module, x, out: seen.append((module.weight.dtype, out.dtype))  # noqa: E731
        linear.register_forward_hook(watch)
        return loop(wide, *arguments)

    monkeypatch.setattr(sampling, "plain_loop", watched)
    drawn = sampling.under_autocast(model, steps=2)(torch.tensor([3]))
    assert drawn.isfinite().all()
    assert seen == 2 * [(torch.float32, torch.bfloat16)]
    assert next(model.parameters()).dtype == torch.bfloat16


def test_images_to_disk(tmp_path: Path) -> None:
    """Latents of a model, decoded by a VAE that is given; the demo's model makes pixels."""
    diffusers = pytest.importorskip("diffusers")
    vae = save_vae(tmp_path / "vae", diffusers)
    options = ["--device", "cpu", "--images", "3", "--batch", "2", "--steps", "1"]
    options += ["--dtype", "fp32", "--output", str(tmp_path / "out")]
    sampling.main([*options, "--model", "DiT-S/8", "--vae", str(vae)])
    sampling.main([*options, "--model", "demo"])
    for name, tokens, said in (("dit-s-8", 16, f"VAE {vae}"), ("demo", 16, "pixels, no VAE")):
        wall, throughput = rows_of(tmp_path / "out", f"images-{name}")
        assert wall.shape == {"images": 3, "N": 2, "T": tokens, "steps": 1}
        assert (wall.unit, throughput.unit) == ("s", "images/s")
        assert (wall.value or 0) * (throughput.value or 0) == pytest.approx(3)
        assert said in wall.case


def test_the_default_vae_is_of_stable_diffusion() -> None:
    """83.65 million parameters: those of its published autoencoder."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(**sampling.STABLE_DIFFUSION)
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863


def test_attention_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Once: the kernels are interpreted here.
    measure = functools.partial(attention_registry.attention.measure, rounds=1)
    monkeypatch.setattr(attention_registry.attention, "measure", measure)
    attention_registry.main(["--device", "cpu", "--small", "--output", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    assert path.name == registry.file_name("cpu")
    entries = json.loads(path.read_text())["entries"]
    assert {entry["direction"] for entry in entries} == set(registry.DIRECTIONS)
    assert all("sdpa" in entry["seconds"] for entry in entries)
    assert {(entry["tokens"], entry["keys"]) for entry in entries} == {(16, 2)}
    assert "it runs on cuda, not on cpu" in capsys.readouterr().out


def test_the_shapes_are_those_that_models_ask_for() -> None:
    """Of XL/2 at 256 to 1024 pixels and its other blocks, with every batch that a key can have up to 256."""
    found = {
        (case.tokens, case.keys, case.heads, case.head_dim)
        for cases in attention_registry.shapes()
        for case in cases
    }
    for tokens in ((256, None), (1024, None), (4096, None), (256, 2), (258, None)):
        assert (*tokens, 16, 72) in found
    small = next(cases for cases in attention_registry.shapes() if cases[0].tokens == 256)
    assert [case.batch for case in small] == sorted({registry.bucket(n) for n in range(1, 257)})
