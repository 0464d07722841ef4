"""The VAE, with a small random one: there are no downloads in tests."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdit.data import VAE, sample_latents

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def diffusers() -> Any:
    return pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(diffusers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved autoencoder with three stages (8x8 pixels of an image to 2x2 latents) and random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        latent_channels=4,
        norm_num_groups=4,
    ).save_pretrained(path)
    return path


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, 16, 24) * 2 - 1


def test_configuration(folder: Path) -> None:
    vae = VAE(folder, device="cpu")
    assert (vae.latent_channels, vae.downsample_factor) == (4, 4)
    assert not any(parameter.requires_grad for parameter in vae.model.parameters())
    assert not vae.model.training


def test_encode_samples_the_posterior(diffusers: Any, folder: Path, images: Tensor) -> None:
    latents = VAE(str(folder), device="cpu").encode(images, torch.Generator().manual_seed(3))
    with torch.no_grad():
        posterior = diffusers.AutoencoderKL.from_pretrained(folder).encode(images).latent_dist
    noise = torch.randn(5, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    assert torch.equal(latents, (posterior.mean + posterior.std * noise) * 0.18215)
    assert latents.dtype == torch.float32


def test_generator_decides_the_sample(folder: Path, images: Tensor) -> None:
    vae = VAE(folder, device="cpu")
    one, again, other = (vae.encode(images, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
def test_decode_undoes_the_scale(
    diffusers: Any, folder: Path, images: Tensor, batch_size: int
) -> None:
    latents = torch.randn(5, 4, 4, 6)
    found = VAE(folder, device="cpu", scaling_factor=0.5).decode(latents, batch_size=batch_size)
    model = diffusers.AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        chunks = [model.decode(chunk / 0.5).sample for chunk in latents.split(batch_size)]
    assert found.shape == images.shape
    assert torch.equal(found, torch.cat(chunks))


def test_nothing_is_clamped(folder: Path) -> None:
    vae = VAE(folder, device="cpu")
    with torch.no_grad():
        vae.model.decoder.conv_out.bias += 5
    assert vae.decode(torch.zeros(1, 4, 2, 2)).min() > 1


def test_bfloat16_computes_in_bfloat16_and_gives_float32(folder: Path, images: Tensor) -> None:
    vae = VAE(folder, device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in vae.model.parameters()} == {torch.bfloat16}
    latents = vae.encode(images, torch.Generator().manual_seed(0))
    decoded = vae.decode(latents)
    assert latents.dtype == decoded.dtype == torch.float32
    assert torch.equal(decoded, decoded.bfloat16().float())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 16, 16), r"images: shape \(3, 16, 16\), expected \(N, 3, height, width\)"),
        ((2, 1, 16, 16), r"images: shape \(2, 1, 16, 16\), expected \(N, 3,"),
        ((2, 3, 16, 18), r"images: shape \(2, 3, 16, 18\), .* divisible by 4"),
    ],
)
def test_images_of_another_shape(folder: Path, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAE(folder, device="cpu").encode(torch.zeros(shape))


def test_wrong_arguments(folder: Path) -> None:
    vae = VAE(folder, device="cpu")
    with pytest.raises(ValueError, match=r"latents: shape .*expected \(N, 4, height, width\)"):
        vae.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(TypeError, match=r"images: .*torch.uint8"):
        vae.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images is on meta, the VAE is on cpu"):
        vae.encode(torch.zeros(1, 3, 16, 16, device="meta"))
    with pytest.raises(ValueError, match="batch_size=0"):
        vae.decode(torch.zeros(1, 4, 4, 4), batch_size=0)
    for factor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scaling_factor="):
            VAE(folder, device="cpu", scaling_factor=factor)


@pytest.mark.parametrize("name", ["/no/such/vae", "./vae", "../vae", "~/no such/vae", "a/b/c"])
def test_missing_folder_is_named(diffusers: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"name_or_path='{name}': no such folder"):
        VAE(name, device="cpu")
    with pytest.raises(ValueError, match=r"name_or_path='vae': no such folder"):
        VAE(Path("vae"), device="cpu")


def test_folder_without_a_vae(
    diffusers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        VAE(tmp_path, device="cpu")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="name_or_path='file': expected a folder"):
        VAE("file", device="cpu")


def test_missing_weights_are_not_drawn_at_random(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["decoder.conv_out.bias"]
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"1 weights .* missing.*'decoder\.conv_out\.bias'"):
        VAE(tmp_path, device="cpu")


def test_missing_diffusers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r'pip install "fastdit\[vae\]"'):
        VAE("owner/name", device="cpu")


def test_moments_are_mean_and_standard_deviation(
    diffusers: Any, folder: Path, images: Tensor
) -> None:
    moments = VAE(folder, device="cpu").moments(images)
    with torch.no_grad():
        posterior = diffusers.AutoencoderKL.from_pretrained(folder).encode(images).latent_dist
    assert moments.dtype == torch.float32
    assert torch.equal(moments, torch.cat([posterior.mean, posterior.std], dim=1))
    noise = torch.randn(5, 4, 4, 6)
    expected = (posterior.mean + posterior.std * noise) * 0.18215
    assert torch.equal(sample_latents(moments, noise, 0.18215), expected)
    assert not VAE(folder, device="cpu").moments(images).requires_grad


def test_sample_latents_computes_in_float32() -> None:
    moments, noise = torch.rand(2, 8, 3, 3).half(), torch.randn(2, 4, 3, 3).half()
    found = sample_latents(moments, noise, 0.18215)
    assert torch.equal(found, sample_latents(moments.float(), noise.float(), 0.18215))
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("moments", "noise", "message"),
    [
        ((2, 7, 3, 3), (2, 4, 3, 3), r"moments: shape \(2, 7, 3, 3\), expected \(N, 2C,"),
        ((8, 3, 3), (4, 3, 3), r"moments: shape \(8, 3, 3\), expected \(N, 2C,"),
        ((2, 8, 3, 3), (2, 8, 3, 3), r"noise: shape \(2, 8, 3, 3\), expected \(2, 4, 3, 3\)"),
        ((2, 8, 3, 3), (1, 4, 3, 3), r"noise: shape \(1, 4, 3, 3\), expected \(2, 4, 3, 3\)"),
    ],
)
def test_sample_latents_of_other_shapes(
    moments: tuple[int, ...], noise: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample_latents(torch.zeros(moments), torch.zeros(noise), 1.0)


def test_fingerprint_is_of_the_stored_weights(folder: Path, tmp_path: Path) -> None:
    expected = VAE(folder, device="cpu").fingerprint()
    assert len(expected) == 32
    half = VAE(str(folder), device="meta", dtype=torch.bfloat16, scaling_factor=1.0)
    assert half.fingerprint() == expected
    # A copy elsewhere, with entries that change no number
    config = json.loads((folder / "config.json").read_text())
    shutil.copy(folder / WEIGHTS, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps({**config, "sample_size": 7}))
    assert VAE(tmp_path, device="cpu").fingerprint() == expected
    # One that does, and one bit of one weight
    (tmp_path / "config.json").write_text(json.dumps({**config, "act_fn": "relu"}))
    assert VAE(tmp_path, device="cpu").fingerprint() != expected
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    weights = load_file(tmp_path / WEIGHTS)
    weights["decoder.conv_out.bias"].view(torch.int32)[0] ^= 1
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert VAE(tmp_path, device="cpu").fingerprint() != expected


def test_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    vae = VAE(folder.name, device="cpu")
    assert vae.name == str(folder)
    assert vae.image_channels == 3


def test_loading_warns_of_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        VAE(folder, device="cpu", dtype=dtype)
    assert not caplog.records
