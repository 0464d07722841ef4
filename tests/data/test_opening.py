"""Which dataset a name or a folder stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastdit.data import (
    VAE,
    Digits,
    ImageFolder,
    LatentFolder,
    Synthetic,
    TarShards,
    extract,
    open_data,
)
from tests.data.helpers import png, save_animals, save_tar, save_vae

pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    return save_animals(tmp_path / "animals")


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    vae = VAE(
        save_vae(folder / "vae", pytest.importorskip("diffusers")), device="cpu", scaling_factor=0.9
    )
    images = ImageFolder(save_animals(folder / "animals"), 16)
    return extract(images, vae, folder / "latents", progress=False)


def test_digits() -> None:
    pytest.importorskip("sklearn")
    data = open_data("digits", horizontal_flip=False)
    assert isinstance(data, Digits)
    assert (data.space, data.image_size) == ("pixels", 8)
    assert open_data("digits", image_size=8, classes=list("1023456789"))[1][1] == 0
    with pytest.raises(ValueError, match="image_size=16: must be 8 for data='digits'"):
        open_data("digits", image_size=16)
    with pytest.raises(ValueError, match="horizontal_flip=True: must be False for data='digits'"):
        open_data("digits", horizontal_flip=True)
    with pytest.raises(
        ValueError, match=r"data='digits' does not have the 1 classes.*missing 'cat'"
    ):
        open_data("digits", classes=["cat"])


def test_synthetic() -> None:
    data = open_data("synthetic")
    assert isinstance(data, Synthetic)
    assert data.image_size == 256
    assert open_data("synthetic", image_size=512).image_size == 512
    with pytest.raises(ValueError, match="missing 'cat'; extra '0'"):
        open_data("synthetic", classes=["cat"])


def test_image_folder(animals: Path) -> None:
    data = open_data(str(animals))
    assert isinstance(data, ImageFolder)
    assert (data.space, data.image_size, data.channels) == ("pixels", 256, 3)
    assert (data.horizontal_flip, data.seed, data.on_bad_image) == (True, 0, "error")
    data = open_data(
        str(animals),
        image_size=16,
        channels=1,
        horizontal_flip=False,
        seed=3,
        on_bad_image="skip",
        classes=["owl", "dog", "cat"],
    )
    assert isinstance(data, ImageFolder)
    assert (data.image_size, data.channels) == (16, 1)
    assert (data.horizontal_flip, data.seed, data.on_bad_image) == (False, 3, "skip")
    assert data.classes == ["owl", "dog", "cat"]


def test_folder_that_is_called_as_something_built_in(
    animals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    animals.rename(animals.parent / "digits")
    monkeypatch.chdir(animals.parent)
    assert isinstance(open_data("digits/"), ImageFolder)


def test_tars(tmp_path: Path) -> None:
    save_tar(tmp_path / "tars" / "0.tar", [("0.png", png(0)), ("0.cls", b"0")])
    data = open_data(str(tmp_path / "tars"), image_size=16, horizontal_flip=False, seed=3)
    assert isinstance(data, TarShards)
    assert (data.image_size, data.horizontal_flip, data.seed) == (16, False, 3)
    assert open_data(str(tmp_path / "tars")).image_size == 256
    (tmp_path / "tars" / "cat").mkdir()
    with pytest.raises(ValueError, match=r"holds the tar file '0\.tar' and the folder 'cat'"):
        open_data(str(tmp_path / "tars"))


def test_latents(latents: Path) -> None:
    data = open_data(str(latents))
    assert isinstance(data, LatentFolder)
    assert (data.image_size, data.horizontal_flip, data.seed) == (16, True, 0)
    data = open_data(
        str(latents), image_size=16, horizontal_flip=False, seed=3, classes=["owl", "dog", "cat"]
    )
    assert isinstance(data, LatentFolder)
    assert (data.horizontal_flip, data.seed, data.classes[0]) == (False, 3, "owl")
    with pytest.raises(ValueError, match=r"image_size=256: the latents in '.*' are of 16"):
        open_data(str(latents), image_size=256)


@pytest.mark.parametrize("left", ["plan.json", "latents-00000.safetensors"])
def test_unfinished_latents(latents: Path, tmp_path: Path, left: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / left).write_bytes((latents / left).read_bytes())
    with pytest.raises(ValueError, match="the extraction is not finished"):
        open_data(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("data", "message"),
    [("", "data='': expected a folder"), ("/no/such/folder", "root='/no/such/folder': no such")],
)
def test_nothing_there(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_data(data)
