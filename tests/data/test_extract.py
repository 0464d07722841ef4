"""Extraction: the VAE's numbers, whoever computes them, whenever it was killed, and what it refuses."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastdit.data import VAE, Digits, ImageFolder, LatentFolder, TarShards, extract
from fastdit.data import extract as extract_function
from fastdit.data.vae import sample_latents
from fastdit.distributed import world
from tests.data.helpers import png, save_animals, save_tar, save_vae
from tests.rendezvous import rendezvous

pytest.importorskip("PIL.Image")

# Python 3.12 warns of every fork in a process with threads, and torch has threads.
FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
# 13 images in three shards of 5, 5 and 3, in batches of 2, 2 and 1
OPTIONS: dict[str, Any] = {"batch_size": 2, "shard_size": 5, "progress": False}


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> VAE:
    diffusers = pytest.importorskip("diffusers")
    return VAE(save_vae(tmp_path_factory.mktemp("vae"), diffusers), device="cpu")


@pytest.fixture(scope="module")
def whole(vae: VAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extraction by one process that nobody disturbed; not to be changed."""
    root = save_animals(tmp_path_factory.mktemp("animals"))
    return extract(ImageFolder(root, 16), vae, tmp_path_factory.mktemp("whole"), **OPTIONS)


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    return save_animals(tmp_path / "animals")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def read_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "latents.json").read_text())


class Counted:
    """The VAE, counting its calls; `stop` is called at the call of that number."""

    def __init__(self, vae: VAE, at: int = -1, stop: Any = None) -> None:
        self.vae, self.at, self.stop, self.calls = vae, at, stop, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vae, name)

    def moments(self, images: Tensor) -> Tensor:
        if self.calls == self.at:
            self.stop()
        self.calls += 1
        return self.vae.moments(images)


def scaled(vae: VAE, factor: float) -> Any:
    """A VAE whose latents of the seventh image, cat, cat, cat, cat, dog, dog, DOG, are `factor` times as large."""

    class Scaled(Counted):
        def moments(self, images: Tensor) -> Tensor:
            moments = super().moments(images)
            if self.calls in (7, 8):  # after 3 batches of 2 calls each; images 5 and 6
                moments[-1] *= factor
            return moments

    return Scaled(vae)


# ---------------------------------------------------------------- what is written


def test_items_are_the_vaes_of_each_image_and_its_mirror(
    vae: VAE, animals: Path, whole: Path
) -> None:
    images = ImageFolder(animals, 16, horizontal_flip=False)
    first = 0
    for number, items in enumerate((5, 5, 3)):
        shard = load_file(whole / f"latents-{number:05d}.safetensors")
        for start in range(0, items, 2):
            batch = range(start, min(start + 2, items))
            pixels = torch.stack([images[first + item][0] for item in batch])
            for name, expected in (("moments", pixels), ("mirrored", pixels.flip(-1))):
                found = shard[name][batch.start : batch.stop]
                assert found.dtype == torch.float16
                assert torch.equal(found, vae.moments(expected).half())
        assert shard["labels"].tolist() == images.labels[first : first + items]
        first += items
    assert first == len(images)
    assert not list(whole.glob(".tmp-*"))


def test_record(vae: VAE, whole: Path) -> None:
    record = read_record(whole)
    assert record["classes"] == ["cat", "dog", "owl"]
    assert (record["images"], record["items"], record["image_size"]) == (13, 13, 16)
    assert record["vae"] == {
        "name": vae.name,
        "fingerprint": vae.fingerprint(),
        "scaling_factor": 0.18215,
        "latent_channels": 4,
        "downsample_factor": 4,
        "dtype": "float32",
    }
    assert [shard["items"] for shard in record["shards"]] == [5, 5, 3]
    assert record["skipped"] == {}


def test_statistics_are_those_of_sampled_latents(whole: Path) -> None:
    shards = [load_file(whole / f"latents-{number:05d}.safetensors") for number in range(3)]
    moments = torch.cat([shard[name] for shard in shards for name in ("moments", "mirrored")])
    mean, std = (0.18215 * part.double() for part in moments.chunk(2, dim=1))
    found = read_record(whole)["statistics"]
    assert found["values"] == 26 * 4 * 4
    expected = mean.mean(dim=(0, 2, 3))
    torch.testing.assert_close(torch.tensor(found["mean"]).double(), expected)
    # Of a variable with noise in it: the variance between the pixels, and the mean of the noise's own.
    variance = mean.var(dim=(0, 2, 3), correction=0) + std.square().mean(dim=(0, 2, 3))
    torch.testing.assert_close(torch.tensor(found["std"]).double(), variance.sqrt())
    # And as it comes out where latents are really drawn: 200 * 416 values, three standard errors are under 1 %.
    drawn = torch.cat(
        [sample_latents(moments, torch.randn(26, 4, 4, 4), 0.18215) for _ in range(200)]
    )
    torch.testing.assert_close(drawn.std(dim=(0, 2, 3)), variance.sqrt().float(), rtol=0.01, atol=0)


def test_float32(vae: VAE, animals: Path, tmp_path: Path) -> None:
    images = ImageFolder(animals, 16)
    extract(images, vae, tmp_path / "out", **{**OPTIONS, "dtype": torch.float32})
    shard = load_file(tmp_path / "out" / "latents-00000.safetensors")
    assert torch.equal(
        shard["moments"][:2], vae.moments(torch.stack([images.load(0), images.load(1)]))
    )


# ---------------------------------------------------------------- who writes it, and when


def test_two_processes_write_what_one_writes(
    vae: VAE, animals: Path, whole: Path, tmp_path: Path
) -> None:
    images = ImageFolder(animals, 16)
    for rank in (1, 0):
        waited: list[int] = []
        extract(
            images,
            vae,
            tmp_path / "out",
            rank=rank,
            size=2,
            barrier=lambda waited=waited: waited.append(1),
            **OPTIONS,
        )
        assert len(waited) == 3
        names = {path.name for path in (tmp_path / "out").glob("latents-*")}
        shards = {1} if rank == 1 else {0, 1, 2}
        assert names == {f"latents-{number:05d}.safetensors" for number in shards}
    assert files(tmp_path / "out") == files(whole)


@FORKS
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_two_real_processes_write_what_one_writes(
    vae: VAE, animals: Path, whole: Path, tmp_path: Path
) -> None:
    """At the same time, as torchrun starts them; the second begins when the first has made its last shard."""
    out, images = tmp_path / "out", ImageFolder(animals, 16)
    store, shared = rendezvous(2)
    children = []
    for rank in range(2):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        arguments = (images, vae, out, tmp_path / f"{rank}.json", environment)
        child = multiprocessing.get_context("fork").Process(target=extract_as, args=arguments)
        child.start()
        children.append(child)
    for child in children:
        child.join(600)
        child.kill()
    del store
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    # Shards of 5, 5 and 3 images in batches of 2, of which each is encoded twice.
    assert told == [{"calls": 10, "error": None}, {"calls": 6, "error": None}]
    assert files(out) == files(whole)


def extract_as(
    images: ImageFolder, vae: VAE, out: Path, told: Path, environment: dict[str, str]
) -> None:
    """In a process of its own, one of those that `environment` says."""
    os.environ.update(environment)
    error = None
    counted = Counted(vae)
    try:
        with world(timeout=timedelta(seconds=600)) as among:
            if among.rank == 1:
                counted = Counted(vae, 0, lambda: wait_for(out / "latents-00002.safetensors"))
            extract_function(
                images,
                counted,  # type: ignore[arg-type]
                out,
                rank=among.rank,
                size=among.size,
                barrier=among.barrier,
                **OPTIONS,
            )
    except BaseException as problem:
        error = f"{type(problem).__name__}: {problem}"
        raise
    finally:
        told.write_text(json.dumps({"calls": counted.calls, "error": error}))


def wait_for(path: Path) -> None:
    until = time.monotonic() + 600
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.01)


def test_rank_0_before_the_others(vae: VAE, animals: Path, whole: Path, tmp_path: Path) -> None:
    images = ImageFolder(animals, 16)
    with pytest.raises(
        ValueError, match=r"latents-00001\.safetensors: is missing; start the process"
    ):
        extract(images, vae, tmp_path / "out", rank=0, size=2, **OPTIONS)
    with pytest.raises(ValueError, match="the extraction is not finished"):
        LatentFolder(tmp_path / "out")
    # Another number of processes may go on.
    extract(images, vae, tmp_path / "out", **OPTIONS)
    assert files(tmp_path / "out") == files(whole)


@FORKS
def test_workers_change_nothing(vae: VAE, animals: Path, whole: Path, tmp_path: Path) -> None:
    extract(ImageFolder(animals, 16), vae, tmp_path / "out", num_workers=2, **OPTIONS)
    assert files(tmp_path / "out") == files(whole)


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@FORKS
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("calls", [0, 8, 16])
def test_restart_after_a_kill_gives_the_same_bytes(
    vae: VAE, animals: Path, whole: Path, tmp_path: Path, calls: int
) -> None:
    """Killed before the first shard, in the middle of the second (each has 6 calls, the last 4), at its very end."""
    out, images = tmp_path / "out", ImageFolder(animals, 16)
    if calls == 16:
        killed = Counted(vae)
        arguments = (images, killed, out, "save_file")
    else:
        killed = Counted(vae, calls, kill_this_process)
        arguments = (images, killed, out, None)
    child = multiprocessing.get_context("fork").Process(target=extract_and_die, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    kept = {0: [], 8: [0], 16: [0, 1]}[calls]
    before = {number: (out / f"latents-{number:05d}.safetensors").stat() for number in kept}
    assert len(list(out.glob("latents-*"))) == len(kept)
    assert bool(list(out.glob(".tmp-latents-*"))) == (calls == 16)

    going_on = Counted(vae)
    extract(images, going_on, out, **OPTIONS)
    assert files(out) == files(whole)
    assert going_on.calls == 16 - 6 * len(kept)
    for number, stat in before.items():
        after = (out / f"latents-{number:05d}.safetensors").stat()
        assert (after.st_ino, after.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def extract_and_die(images: ImageFolder, vae: Any, out: Path, function: str | None) -> None:
    """In a process of its own. With a function's name it dies within the third call, its file half written."""
    import sys

    module = sys.modules["fastdit.data.extract"]
    if function is not None:
        save, calls = getattr(module, function), []

        def save_a_part(tensors: Any, path: Path, metadata: Any) -> None:
            save(tensors, path, metadata=metadata)
            calls.append(path)
            if len(calls) == 3:
                os.truncate(path, 1000)
                kill_this_process()

        setattr(module, function, save_a_part)
    extract_function(images, vae, out, **OPTIONS)


def test_finished_is_finished(vae: VAE, animals: Path, whole: Path) -> None:
    before = files(whole)
    again = Counted(vae)
    extract(ImageFolder(animals, 16), again, whole, **OPTIONS)
    assert again.calls == 0
    assert files(whole) == before


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damaged_shard_is_made_again(
    vae: VAE,
    animals: Path,
    whole: Path,
    tmp_path: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shard = out / "latents-00001.safetensors"
    if damage == "missing":
        shard.unlink()
    else:
        os.truncate(shard, 1000 if damage == "truncated" else 0)
    with caplog.at_level(logging.WARNING, logger="fastdit.data.extract"):
        extract(ImageFolder(animals, 16), vae, out, **OPTIONS)
    assert files(out) == files(whole)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (damage != "missing")
    assert all(f"Made again: {shard}: truncated or damaged" in message for message in messages)


def test_images_may_move(vae: VAE, animals: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    animals.rename(tmp_path / "elsewhere")
    again = Counted(vae)
    extract(ImageFolder(tmp_path / "elsewhere", 16), again, out, **OPTIONS)
    assert again.calls == 0


# ---------------------------------------------------------------- bad images


def test_bad_image_is_an_error_with_its_name(vae: VAE, animals: Path, tmp_path: Path) -> None:
    (animals / "dog" / "2.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"/dog/2\.png: not a usable image: the file is empty"):
        extract(ImageFolder(animals, 16), vae, tmp_path / "out", **OPTIONS)


@FORKS
def test_bad_image_in_a_worker_is_an_error_in_one_line(
    vae: VAE, animals: Path, tmp_path: Path
) -> None:
    (animals / "dog" / "2.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"/dog/2\.png: not a usable") as caught:
        extract(ImageFolder(animals, 16), vae, tmp_path / "out", num_workers=1, **OPTIONS)
    assert "\n" not in str(caught.value)


def test_bad_images_are_left_out_and_listed(
    vae: VAE, animals: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in ("cat/1.png", "dog/2.png"):
        (animals / path).write_bytes(b"")
    images = ImageFolder(animals, 16, on_bad_image="skip")
    with caplog.at_level(logging.WARNING, logger="fastdit.data.extract"):
        extract(images, vae, tmp_path / "out", **OPTIONS)
    assert len(caplog.records) == 2
    assert read_record(tmp_path / "out")["skipped"] == {
        "cat/1.png": "the file is empty",
        "dog/2.png": "the file is empty",
    }
    latents = LatentFolder(tmp_path / "out", horizontal_flip=False)
    assert len(latents) == 11
    assert latents.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 4
    good = [index for index in range(13) if index not in (1, 6)]
    for item, index in enumerate(good):
        expected = vae.moments(images.load(index)[None]).half().float()
        # Alone and in a batch the VAE rounds differently: a few of float32's 2^-24, and then one of float16's 2^-11.
        torch.testing.assert_close(latents[item][0], expected[0], rtol=2**-10, atol=2**-10)


def test_error_and_then_skip(vae: VAE, animals: Path, tmp_path: Path) -> None:
    (animals / "owl" / "3.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"/owl/3\.png"):
        extract(ImageFolder(animals, 16), vae, tmp_path / "out", **OPTIONS)
    going_on = Counted(vae)
    extract(ImageFolder(animals, 16, on_bad_image="skip"), going_on, tmp_path / "out", **OPTIONS)
    assert going_on.calls == 2  # the last shard, whose second batch is empty
    assert len(LatentFolder(tmp_path / "out")) == 12


def test_nothing_but_bad_images(vae: VAE, tmp_path: Path) -> None:
    (tmp_path / "images" / "only").mkdir(parents=True)
    (tmp_path / "images" / "only" / "0.png").write_bytes(b"")
    images = ImageFolder(tmp_path / "images", 16, on_bad_image="skip")
    with pytest.raises(ValueError, match=r"none of the 1 images can be used"):
        extract(images, vae, tmp_path / "out", **OPTIONS)


def test_overflow_names_the_image(vae: VAE, animals: Path, tmp_path: Path) -> None:
    images = ImageFolder(animals, 16)
    with pytest.raises(
        ValueError, match=r"/dog/2\.png: latents up to \S+ do not fit into dtype=torch.float16"
    ):
        extract(images, scaled(vae, 1e6), tmp_path / "half", **OPTIONS)
    extract(images, scaled(vae, 1e6), tmp_path / "single", dtype=torch.float32, **OPTIONS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nan_names_the_image(vae: VAE, animals: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"/dog/2\.png: the VAE gave values that are not finite"):
        extract(
            ImageFolder(animals, 16),
            scaled(vae, float("nan")),
            tmp_path / "out",
            dtype=dtype,
            **OPTIONS,
        )


def test_tars(vae: VAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIT_CACHE", str(tmp_path / "cache"))
    odd = os.fsdecode(b"\xff")  # names need not be UTF-8
    members = [("0.png", png(0)), ("0.cls", b"1"), (f"{odd}.png", b""), (f"{odd}.cls", b"0")]
    save_tar(tmp_path / "tars" / "a.tar", [*members, ("2.png", png(2)), ("2.cls", b"0")])
    images = TarShards(tmp_path / "tars", 16, on_bad_image="skip")
    for _ in range(2):
        extract(images, vae, tmp_path / "out", batch_size=1, progress=False)
    latents = LatentFolder(tmp_path / "out", horizontal_flip=False)
    assert latents.labels.tolist() == [1, 0]
    assert latents.skipped == {f"a.tar/{odd}.png": "the file is empty"}
    for item, index in enumerate((0, 2)):
        assert torch.equal(
            latents[item][0], vae.moments(images.load(index)[None]).half().float()[0]
        )


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def begun(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An extraction with one of its shards."""
    out = tmp_path_factory.mktemp("begun")
    for name in ("plan.json", "latents-00000.safetensors"):
        shutil.copy(whole / name, out / name)
    return out


@pytest.mark.parametrize("name", ["begun", "whole"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 8}, "image_size=16 and not 8"),
        ({"dtype": torch.float32}, "dtype='float16' and not 'float32'"),
        ({"shard_size": 4}, "shard_size=5 and not 4"),
        ({"classes": ["owl", "cat", "dog"]}, "other images or labels"),
    ],
)
def test_restart_with_something_else(
    vae: VAE,
    animals: Path,
    name: str,
    changes: dict[str, Any],
    message: str,
    request: pytest.FixtureRequest,
) -> None:
    out = request.getfixturevalue(name)
    before = files(out)
    changes = {**OPTIONS, **changes}
    images = ImageFolder(
        animals, changes.pop("image_size", 16), classes=changes.pop("classes", None)
    )
    with pytest.raises(ValueError, match=f"out=.*holds an extraction with {message}; remove it"):
        extract(images, vae, out, **changes)
    assert files(out) == before


def test_restart_with_other_images(vae: VAE, animals: Path, begun: Path) -> None:
    (animals / "cat" / "0.png").rename(animals / "cat" / "00.png")
    with pytest.raises(ValueError, match="other images or labels"):
        extract(ImageFolder(animals, 16), vae, begun, **OPTIONS)
    (animals / "cat" / "00.png").unlink()
    with pytest.raises(ValueError, match="images=13 and not 12"):
        extract(ImageFolder(animals, 16), vae, begun, **OPTIONS)


def test_restart_with_another_vae(vae: VAE, animals: Path, begun: Path, tmp_path: Path) -> None:
    other = Counted(vae)
    other.fingerprint = lambda: "f" * 32  # type: ignore[attr-defined]
    with pytest.raises(
        ValueError, match=f"vae fingerprint='{vae.fingerprint()}' and not '{'f' * 32}'"
    ):
        extract(ImageFolder(animals, 16), other, begun, **OPTIONS)
    other = Counted(vae)
    other.scaling_factor = 1.0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"vae scaling_factor=0\.18215 and not 1\.0"):
        extract(ImageFolder(animals, 16), other, begun, **OPTIONS)


def test_shard_of_another_plan(vae: VAE, animals: Path, begun: Path, tmp_path: Path) -> None:
    out, images = tmp_path / "out", ImageFolder(animals, 16, classes=["owl", "cat", "dog"])
    extract(images, vae, out, **OPTIONS)
    shutil.copy(begun / "plan.json", out / "plan.json")
    (out / "latents.json").unlink()
    with pytest.raises(ValueError, match=r"latents-00000\.safetensors: is of another extraction"):
        extract(ImageFolder(animals, 16), vae, out, **OPTIONS)


def test_folder_of_something_else(vae: VAE, animals: Path) -> None:
    with pytest.raises(ValueError, match=r"out='.*': holds 'cat' and no plan\.json"):
        extract(ImageFolder(animals, 16), vae, animals, **OPTIONS)
    assert sorted(path.name for path in animals.iterdir()) == ["cat", "dog", "owl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"size": 0}, "size=0"),
        ({"rank": 2, "size": 2}, "rank=2: allowed are 0 to 1"),
        ({"rank": -1}, "rank=-1"),
        ({"dtype": torch.bfloat16}, "dtype='bfloat16': allowed are 'float16', 'float32'"),
    ],
)
def test_bad_arguments(
    vae: VAE, animals: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        extract(ImageFolder(animals, 16), vae, tmp_path / "out", **{**OPTIONS, **options})
    assert not (tmp_path / "out").exists()


def test_images_that_the_vae_does_not_take(vae: VAE, animals: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images: 1 channels, the VAE takes 3"):
        extract(ImageFolder(animals, 16, channels=1), vae, tmp_path / "out")
    with pytest.raises(ValueError, match="image_size=18: must be divisible by 4"):
        extract(ImageFolder(animals, 18), vae, tmp_path / "out")
    pytest.importorskip("sklearn")
    with pytest.raises(TypeError, match="images: expected an ImageFolder or TarShards, got Digits"):
        extract(Digits(), vae, tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_any_number_of_classes(vae: VAE, tmp_path: Path) -> None:
    image = png(0)
    for count in (1, 1001):
        root = tmp_path / str(count)
        for label in range(count):
            (root / f"{label:04}").mkdir(parents=True)
            (root / f"{label:04}" / "image.png").write_bytes(image)
        images = ImageFolder(root, 8)
        extract(images, vae, tmp_path / f"out{count}", batch_size=500, progress=False)
        latents = LatentFolder(tmp_path / f"out{count}")
        assert latents.classes == images.classes
        assert latents.labels.tolist() == list(range(count))


@pytest.fixture(autouse=True)
def _not_changed(whole: Path) -> Iterator[None]:
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    yield
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before
