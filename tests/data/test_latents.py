"""Folders of latents: the items of an image folder with the VAE behind it, and every way in which they can be wrong."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdit.data import VAE, ImageFolder, LatentFolder, extract, sample_latents
from fastdit.data import latents as latents_module
from fastdit.data.extract import _sums
from tests.data.helpers import (
    require_workers_and_a_resume_change_nothing,
    save_animals,
    save_vae,
)

pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> VAE:
    diffusers = pytest.importorskip("diffusers")
    path = save_vae(tmp_path_factory.mktemp("vae"), diffusers)
    return VAE(path, device="cpu", scaling_factor=0.9)


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_animals(tmp_path_factory.mktemp("animals"))


@pytest.fixture(scope="module")
def whole(vae: VAE, animals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 images in shards of 5, 5 and 3; not to be changed."""
    out = tmp_path_factory.mktemp("latents")
    return extract(ImageFolder(animals, 16), vae, out, batch_size=1, shard_size=5, progress=False)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    shutil.copytree(whole, tmp_path / "latents")
    return tmp_path / "latents"


def shard_of(folder: Path, number: int = 1) -> Path:
    return folder / f"latents-{number:05d}.safetensors"


def change_record(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((folder / "latents.json").read_text())
    change(record)
    (folder / "latents.json").write_text(json.dumps(record))


def change_shard(
    folder: Path, change: Callable[[dict[str, Tensor]], Any], number: int = 1, sums: bool = True
) -> None:
    """Changes tensors of a shard, and everything that is written about them, so that only the change is wrong."""
    path = shard_of(folder, number)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["fastdit"])
    tensors = load_file(path)
    change(tensors)
    if sums:
        header["sums"] = _sums(tensors["moments"], tensors["mirrored"])
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path.unlink()  # what was read of it may still be mapped
    save_file(tensors, path, metadata={"fastdit": json.dumps(header)})

    def describe(record: dict[str, Any]) -> None:
        record["shards"][number]["bytes"] = path.stat().st_size
        record["shards"][number]["items"] = len(tensors["moments"])
        all_sums = []
        for shard in record["shards"]:
            with safe_open(folder / shard["file"], "pt") as file:
                all_sums.append(json.loads(file.metadata()["fastdit"])["sums"])
        record["statistics"] = latents_module.combine_statistics(
            all_sums, record["vae"]["scaling_factor"]
        )

    if sums:
        change_record(folder, describe)


# ---------------------------------------------------------------- items


def test_items_and_flips_are_the_image_folders(vae: VAE, animals: Path, whole: Path) -> None:
    images, latents = ImageFolder(animals, 16, seed=3), LatentFolder(whole, seed=3)
    assert len(latents) == len(images)
    assert latents.classes == images.classes
    assert latents.labels.tolist() == images.labels
    for index in range(len(images)):
        for epoch in range(4):
            image, label = images[index, epoch]
            item, found = latents[index, epoch]
            assert item.dtype == torch.float32
            assert torch.equal(item, vae.moments(image[None]).half().float()[0])
            assert found == label
        assert torch.equal(latents[index][0], latents[index, 0][0])


def test_samples_are_those_of_encode(vae: VAE, animals: Path, whole: Path) -> None:
    images, latents = ImageFolder(animals, 16), LatentFolder(whole)
    pixels, moments = (torch.stack([data[i, 1][0] for i in range(6)]) for data in (images, latents))
    expected = vae.encode(pixels, torch.Generator().manual_seed(5))
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    found = sample_latents(moments, noise, latents.vae["scaling_factor"])
    # Mean and std are each rounded to 11 bits, and |noise| is below 5.
    bound = 2**-11 * 0.9 * (moments[:, :4].abs() + 5 * moments[:, 4:]) * 1.01
    assert ((found - expected).abs() <= bound).all()


def test_attributes(vae: VAE, whole: Path) -> None:
    latents = LatentFolder(whole)
    assert (latents.space, latents.moments) == ("latents", True)
    assert (latents.image_size, latents.latent_size, latents.channels) == (16, 4, 4)
    assert latents[0][0].shape == (8, 4, 4)
    assert latents.vae["name"] == vae.name
    assert latents.vae["scaling_factor"] == 0.9
    assert latents.vae["fingerprint"] == vae.fingerprint()
    assert len(latents.statistics["mean"]) == len(latents.statistics["std"]) == 4


def test_no_flip(whole: Path) -> None:
    latents = LatentFolder(whole, horizontal_flip=False)
    shard = load_file(shard_of(whole))
    for epoch in range(8):
        assert torch.equal(latents[7, epoch][0], shard["moments"][2].float())


def test_index_out_of_range(whole: Path) -> None:
    with pytest.raises(IndexError, match="index=13: allowed are 0 to 12"):
        LatentFolder(whole)[13]


def test_pickle_carries_no_map(whole: Path) -> None:
    latents = LatentFolder(whole, seed=3)
    expected = latents[5, 2][0]
    state = pickle.dumps(latents)
    assert len(state) < 20_000
    assert torch.equal(pickle.loads(state)[5, 2][0], expected)  # noqa: S301


# Python 3.12 warns of every fork in a process with threads, and torch has threads.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_and_a_resume_change_nothing(whole: Path) -> None:
    require_workers_and_a_resume_change_nothing(LatentFolder(whole))


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_shards_are_not_loaded(folder: Path) -> None:
    def own_memory() -> int:
        # Counted now; what /proc/self/status says may lack what each processor has not handed in.
        with open("/proc/self/smaps_rollup") as file:
            [line] = [line for line in file if line.startswith("Anonymous:")]
        return int(line.split()[1])  # kB

    items = 40_000  # 20 MB

    def enlarge(tensors: dict[str, Tensor]) -> None:
        for name in ("moments", "mirrored"):
            tensors[name] = tensors[name][:1].repeat(items, 1, 1, 1)
        tensors["labels"] = tensors["labels"][:1].repeat(items)

    path = shard_of(folder)
    tensors = load_file(path)
    one = [
        _sums(tensors["moments"][:1], tensors["mirrored"][:1])[name]
        for name in ("mean", "mean_squared", "variance")
    ]
    # Sums of that many are computed by hand: item by item they take a while.
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["fastdit"])
    header["sums"] = {
        "values": items * 2 * 16,
        **{
            name: [items * value for value in values]
            for name, values in zip(("mean", "mean_squared", "variance"), one, strict=True)
        },
    }
    enlarge(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"fastdit": json.dumps(header)})
    del tensors

    def describe(record: dict[str, Any]) -> None:
        record["shards"] = [record["shards"][1]]
        record["shards"][0].update(bytes=path.stat().st_size, items=items)
        record["statistics"] = latents_module.combine_statistics([header["sums"]], 0.9)

    change_record(folder, describe)
    LatentFolder(folder)[0]  # whatever is loaded or made once
    before = own_memory()
    latents = LatentFolder(folder, horizontal_flip=False)
    total = sum(latents[index][0].sum() for index in range(0, items, 50))
    assert torch.isfinite(total)
    # Labels are 0.6 MB, in the file and renumbered; all items would be 10 MB.
    assert own_memory() - before < 5_000


# ---------------------------------------------------------------- classes


def test_stored_classes_decide_the_labels(whole: Path) -> None:
    latents = LatentFolder(whole, classes=["owl", "cat", "dog"])
    assert latents.classes == ["owl", "cat", "dog"]
    assert latents.labels.tolist() == [1] * 4 + [2] * 5 + [0] * 4
    assert [latents[index][1] for index in (0, 4, 9)] == [1, 2, 0]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat", "dog", "elk", "owl"], "the 4 classes.*missing 'elk'; extra none"),
        (["cat", "dog"], "the 2 classes.*missing none; extra 'owl'"),
        (["cat", "dog", "owl", "owl"], "the 4 classes.*missing none; extra none"),
    ],
)
def test_other_stored_classes(whole: Path, classes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"root='.*{message}"):
        LatentFolder(whole, classes=classes)


# ---------------------------------------------------------------- what is wrong


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        LatentFolder(folder)
    assert "\n" not in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", r"root='.*/nowhere': no such folder")
    refused(tmp_path, r"root='.*': holds no latents\.json")


def test_unfinished_extraction(folder: Path) -> None:
    (folder / "latents.json").unlink()
    refused(folder, r"root='.*/latents': the extraction is not finished; start it again")
    for path in folder.glob("latents-*"):
        path.unlink()
    refused(folder, r"root='.*/latents': the extraction is not finished; start it again")


def test_record_that_is_none(folder: Path) -> None:
    change_record(folder, lambda record: record.update(format="fastdit latents 2"))
    refused(folder, r"latents\.json: format='fastdit latents 2', expected 'fastdit latents 1'")
    (folder / "latents.json").write_text("[]")
    refused(folder, r"latents\.json: format=None, expected")
    (folder / "latents.json").write_text("{")
    refused(folder, r"latents\.json: not valid JSON")


def test_missing_shard(folder: Path) -> None:
    shard_of(folder).unlink()
    refused(folder, r"latents-00001\.safetensors: the shard is missing")


def test_truncated_shard(folder: Path) -> None:
    size = shard_of(folder).stat().st_size
    os.truncate(shard_of(folder), size - 100)
    refused(
        folder, rf"latents-00001\.safetensors: {size - 100} bytes, latents\.json has {size}; trunc"
    )
    change_record(folder, lambda record: record["shards"][1].update(bytes=size - 100))
    refused(folder, r"latents-00001\.safetensors: truncated or damaged: ")
    os.truncate(shard_of(folder), 0)
    change_record(folder, lambda record: record["shards"][1].update(bytes=0))
    refused(folder, r"latents-00001\.safetensors: truncated or damaged: ")


def test_shard_without_items_is_skipped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = LatentFolder(folder)
    items = [expected[index, 1] for index in (*range(5), *range(10, 13))]
    change_shard(folder, lambda tensors: tensors.update({k: v[:0] for k, v in tensors.items()}))
    with caplog.at_level(logging.WARNING, logger="fastdit.data.latents"):
        latents = LatentFolder(folder, horizontal_flip=False)
    assert [record.getMessage() for record in caplog.records] == [
        f"{shard_of(folder)}: holds no items, skipped"
    ]
    assert len(latents) == 8
    assert [latents[index][1] for index in range(8)] == [label for _, label in items]
    assert torch.equal(latents[5][0], load_file(shard_of(folder, 2))["moments"][0].float())


def test_no_items_at_all(folder: Path) -> None:
    for number in range(3):
        change_shard(
            folder,
            lambda tensors: tensors.update({k: v[:0] for k, v in tensors.items()}),
            number,
        )
    refused(folder, r"latents\.json: none of the shards holds an item")


def repeated(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda t: t.update({name: torch.cat([t[name], t[name][:1]])})


SHARDS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "more labels": (
        repeated("labels"),
        r"5 latents and labels of shape \(6,\), I64; expected \(5,\)",
    ),
    "labels of another dtype": (
        lambda t: t.update(labels=t["labels"].int()),
        r"5 latents and labels of shape \(5,\), I32; expected \(5,\), I64",
    ),
    "more latents": (
        repeated("mirrored"),
        r"mirrored has shape \(6, 8, 4, 4\), expected \(5, 8, 4, 4\)",
    ),
    "another size": (
        lambda t: t.update(moments=t["moments"][..., :2], mirrored=t["mirrored"][..., :2]),
        r"moments has shape \(5, 8, 4, 2\), expected \(5, 8, 4, 4\)",
    ),
    "another channel count": (
        lambda t: t.update(moments=t["moments"][:, :4], mirrored=t["mirrored"][:, :4]),
        r"moments has shape \(5, 4, 4, 4\), expected 8 channels, means and standard deviations of 4",
    ),
    "another dtype": (
        lambda t: t.update(moments=t["moments"].float(), mirrored=t["mirrored"].float()),
        r"moments is F32, expected F16",
    ),
    "no mirror": (lambda t: t.pop("mirrored"), r"not a shard of latents, it holds labels, moments"),
    "label too large": (
        lambda t: t["labels"].__setitem__(2, 3),
        r"labels from 1 to 3, allowed are 0 to 2",
    ),
    "label too small": (
        lambda t: t["labels"].__setitem__(2, -1),
        r"labels from -1 to 2, allowed are 0 to 2",
    ),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_shard_unlike_the_rest(folder: Path, kind: str) -> None:
    change, message = SHARDS[kind]
    change_shard(folder, change, sums=False)
    size = shard_of(folder).stat().st_size
    change_record(folder, lambda record: record["shards"][1].update(bytes=size))
    refused(folder, rf"latents-00001\.safetensors: {message}")


def test_another_number_of_items(folder: Path) -> None:
    change_record(folder, lambda record: record["shards"][1].update(items=4))
    refused(folder, r"latents-00001\.safetensors: 5 items, latents\.json has 4")


def test_foreign_safetensors(folder: Path) -> None:
    save_file({"x": torch.zeros(3)}, shard_of(folder))
    size = shard_of(folder).stat().st_size
    change_record(folder, lambda record: record["shards"][1].update(bytes=size))
    refused(folder, r"latents-00001\.safetensors: not a shard of latents, it holds x")


def test_value_that_is_not_finite(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["moments"][3, 1, 2, 2] = float("nan")
        tensors["mirrored"][4, 1, 2, 2] = float("inf")

    change_shard(folder, spoil, sums=False)
    refused(folder, r"latents-00001\.safetensors: item 3 of moments is not finite")
    # Where there are many items only some are read at the start.
    monkeypatch.setattr(latents_module, "PROBED", 1)
    latents = LatentFolder(folder, horizontal_flip=False)
    latents[7]
    with pytest.raises(ValueError, match=r"00001\.safetensors: item 3 of moments is not finite"):
        latents[8]
    latents = LatentFolder(folder)
    with pytest.raises(ValueError, match=r"00001\.safetensors: item 4 of mirrored is not finite"):
        [latents[9, epoch] for epoch in range(20)]


def test_statistics_that_are_not_finite(folder: Path) -> None:
    change_shard(folder, lambda tensors: tensors["mirrored"].__setitem__((3, 1), float("nan")))
    refused(folder, r"latents\.json: the statistics are not those of the shards: mean \[.*nan")


def test_stale_statistics(folder: Path) -> None:
    change_record(folder, lambda record: record["statistics"]["std"].__setitem__(2, 1.0))
    refused(folder, r"latents\.json: the statistics are not those of the shards")


@pytest.mark.parametrize(
    ("factor", "expected"), [(0.18215, True), (1 / 0.18215, True), (1.5, False)]
)
def test_latents_that_are_far_from_unit_variance(
    vae: VAE,
    animals: Path,
    tmp_path: Path,
    factor: float,
    expected: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The stored latents have a standard deviation near 1 with the factor 0.9; a factor forgotten is one that is
    1 / 0.18215 too large, one applied twice 0.18215 too small."""
    diffusers = pytest.importorskip("diffusers")
    path = save_vae(tmp_path / "vae", diffusers)
    other = VAE(path, device="cpu", scaling_factor=0.9 * factor)
    extract(ImageFolder(animals, 16), other, tmp_path / "out", progress=False)
    with caplog.at_level(logging.WARNING, logger="fastdit.data.latents"):
        latents = LatentFolder(tmp_path / "out")
    messages = [
        record.getMessage() for record in caplog.records if record.name.startswith("fastdit")
    ]
    assert len(messages) == expected
    for message in messages:
        found = float(message.partition("deviation of ")[2].partition(",")[0])
        assert found / np.sqrt(np.mean(np.square(latents.statistics["std"]))) == pytest.approx(
            1, 0.5
        )
        assert f"scaling_factor={0.9 * factor}" in message


def test_no_warning_without_cause(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        LatentFolder(whole)
    assert not caplog.records


def test_another_vae(vae: VAE, whole: Path) -> None:
    LatentFolder(whole, vae_fingerprint=vae.fingerprint()).require_vae(vae.fingerprint())
    message = rf"latents\.json: made by the VAE '{vae.name}' with fingerprint {vae.fingerprint()}, and not by"
    with pytest.raises(ValueError, match=message):
        LatentFolder(whole, vae_fingerprint="0" * 32)
    with pytest.raises(ValueError, match=message):
        LatentFolder(whole).require_vae("0" * 32)


def test_verify_finds_one_changed_bit(folder: Path) -> None:
    latents = LatentFolder(folder)
    latents.verify()
    data = bytearray(shard_of(folder).read_bytes())
    data[-1] ^= 1
    shard_of(folder).write_bytes(data)
    with pytest.raises(ValueError, match=r"latents-00001\.safetensors: SHA-256 [0-9a-f]{64}, "):
        latents.verify()
