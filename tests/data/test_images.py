"""Image folders: what is found, how it is cropped and converted, what is refused, and that workers change nothing."""

from __future__ import annotations

import io
import logging
import os
import pickle
import sys
import unicodedata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastdit.data import EpochBatchSampler, ImageFolder, center_crop
from fastdit.data.sampler import derived_seed

Image = pytest.importorskip("PIL.Image")


def random_image(seed: int, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> Any:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def save(path: Path, image: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def folder_of(root: Path, image: Any, name: str = "image.png", **options: Any) -> Path:
    """A dataset of one class with one image."""
    save(root / "only" / name, image, **options)
    return root


def only(root: Path, size: int = 16, **options: Any) -> Tensor:
    return ImageFolder(root, size, horizontal_flip=False, **options)[0][0]


def levels(image: Tensor) -> list[float]:
    """The 0 to 255 of the first pixel's channels."""
    return ((image[:, 0, 0].double() + 1) * 127.5).round().tolist()


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """Three classes, thirteen images."""
    for label, name in enumerate(("cat", "dog", "owl")):
        for number in range(4 + (label == 1)):
            save(tmp_path / name / f"{number}.png", random_image(10 * label + number, (18, 16)))
    return tmp_path


# ---------------------------------------------------------------- what is found


def test_classes_and_labels_are_sorted(animals: Path) -> None:
    dataset = ImageFolder(animals, 16)
    assert dataset.classes == ["cat", "dog", "owl"]
    assert len(dataset) == 13
    assert [dataset[index][1] for index in range(13)] == [0] * 4 + [1] * 5 + [2] * 4
    assert [os.path.relpath(path, animals) for path in dataset.paths[3:6]] == [
        "cat/3.png",
        "dog/0.png",
        "dog/1.png",
    ]
    assert dataset.ignored == 0


def test_iteration_ends(animals: Path) -> None:
    # A dataset without __iter__ ends at the first IndexError.
    assert len(list(ImageFolder(animals, 16))) == 13


def test_images_are_found_in_subfolders_in_any_case(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpeg", "deep/er/c.JpG", "d.webp", "e.bmp", "f.gif", "g.tif", "h.TIFF"):
        save(tmp_path / "only" / name, random_image(0))
    found = [os.path.relpath(path, tmp_path / "only") for path in ImageFolder(tmp_path, 16).paths]
    assert found == [
        *("a.jpeg", "b.PNG", "d.webp", "e.bmp", "f.gif", "g.tif", "h.TIFF"),
        os.path.join("deep", "er", "c.JpG"),
    ]


def test_other_files_are_ignored_and_counted(animals: Path) -> None:
    (animals / "README.txt").write_text("x")
    (animals / ".cache").mkdir()
    for name in (".DS_Store", "._0.png", "labels.json", "0.png.done"):
        (animals / "cat" / name).touch()
    save(animals / "cat" / ".thumbnails" / "0.png", random_image(0))
    dataset = ImageFolder(animals, 16)
    assert dataset.classes == ["cat", "dog", "owl"]
    assert len(dataset) == 13
    assert dataset.ignored == 7


def test_links(animals: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save(elsewhere / "deep" / "image.png", random_image(0))
    (animals / "yak").symlink_to(elsewhere)
    (animals / "cat" / "itself").symlink_to(".")
    (animals / "cat" / "root").symlink_to(animals)
    (elsewhere / "deep" / "up").symlink_to("..")
    dataset = ImageFolder(animals, 16)
    assert dataset.classes == ["cat", "dog", "owl", "yak"]
    assert dataset.labels == [0] * 4 + [1] * 5 + [2] * 4 + [3]
    assert dataset.ignored == 3


def test_names_are_sorted_in_one_unicode_form(tmp_path: Path) -> None:
    # Decomposed, "é" sorts before "f"; composed, after "z". macOS stores one, Linux what it is given.
    for form in ("NFC", "NFD"):
        for name in ("ez", unicodedata.normalize(form, "é"), "f"):
            save(tmp_path / form / name / "image.png", random_image(0))
    assert ImageFolder(tmp_path / "NFC", 16).classes == ["ez", "f", "é"]
    assert ImageFolder(tmp_path / "NFD", 16).classes == ["ez", "f", "é"]


def test_one_class_in_two_unicode_forms(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        save(tmp_path / unicodedata.normalize(form, "é") / "image.png", random_image(0))
    if len(os.listdir(tmp_path)) == 1:
        pytest.skip("this file system has one form only")
    with pytest.raises(ValueError, match="two class folders are named 'é'"):
        ImageFolder(tmp_path, 16)


@pytest.mark.parametrize("count", [1, 1001])
def test_any_number_of_classes(tmp_path: Path, count: int) -> None:
    for label in range(count):
        (tmp_path / f"{label:04}").mkdir()
        (tmp_path / f"{label:04}" / "image.png").touch()
    assert len(ImageFolder(tmp_path, 16).classes) == count


# ---------------------------------------------------------------- stored classes


def test_stored_classes_decide_the_labels(animals: Path) -> None:
    dataset = ImageFolder(animals, 16, classes=["owl", "cat", "dog"])
    assert dataset.classes == ["owl", "cat", "dog"]
    assert [os.path.basename(os.path.dirname(path)) for path in dataset.paths] == (
        ["owl"] * 4 + ["cat"] * 4 + ["dog"] * 5
    )
    assert dataset.labels == [0] * 4 + [1] * 4 + [2] * 5


def test_stored_classes_in_another_unicode_form(tmp_path: Path) -> None:
    save(tmp_path / "é" / "image.png", random_image(0))
    assert ImageFolder(tmp_path, 16, classes=[unicodedata.normalize("NFD", "é")]).classes == ["é"]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat", "dog", "elk", "owl"], "the 4 classes.*missing 'elk'; extra none"),
        (["cat", "dog"], "the 2 classes.*missing none; extra 'owl'"),
        (["cat", "cow", "owl"], "the 3 classes.*missing 'cow'; extra 'dog'"),
        (["cat", "dog", "owl", "owl"], "the 4 classes.*missing none; extra none"),
        ([f"{n:02}" for n in range(12)], "missing '00', .*'09' and 2 more; extra 'cat', 'dog'"),
    ],
)
def test_other_stored_classes(animals: Path, classes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"root='.*{message}"):
        ImageFolder(animals, 16, classes=classes)


# ---------------------------------------------------------------- folders that cannot be used


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"root='.*/nowhere': no such folder"):
        ImageFolder(tmp_path / "nowhere", 16)


def test_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"root='.*/file': expected a folder"):
        ImageFolder(tmp_path / "file", 16)


def test_root_without_class_folders(tmp_path: Path) -> None:
    save(tmp_path / "image.png", random_image(0))
    with pytest.raises(ValueError, match=rf"root='{tmp_path}': no class folders"):
        ImageFolder(tmp_path, 16)


def test_empty_class_folder(animals: Path) -> None:
    (animals / "elk" / "deep").mkdir(parents=True)
    (animals / "elk" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"class folder '.*/elk' holds no image"):
        ImageFolder(animals, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"channels": 4}, "channels=4: allowed are 1, 3"),
        ({"on_bad_image": "skp"}, "on_bad_image='skp': allowed are .*did you mean 'skip'"),
    ],
)
def test_bad_arguments(animals: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageFolder(animals, **{"image_size": 16, **options})


def test_missing_pillow_is_named(animals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'pip install "fastdit\[cli\]"'):
        ImageFolder(animals, 16)


# ---------------------------------------------------------------- the crop


def test_crop_of_the_right_size_is_the_image() -> None:
    image = random_image(0, (16, 16))
    assert np.array_equal(center_crop(image, 16), image)


@pytest.mark.parametrize(
    ("size", "left", "top"), [((21, 16), 2, 0), ((20, 16), 2, 0), ((16, 31), 0, 7)]
)
def test_crop_is_the_centre(size: tuple[int, int], left: int, top: int) -> None:
    image = random_image(0, size)
    expected = np.asarray(image)[top : top + 16, left : left + 16]
    assert np.array_equal(center_crop(image, 16), expected)


def test_crop_halves_with_a_box_while_it_can() -> None:
    image = random_image(0, (72, 64))
    pixels = np.asarray(image).astype(float)
    for _ in range(2):  # 64 to 32 to 16: at twice the size it still halves
        for axis in (1, 0):  # Pillow rounds after each of the two axes
            even, odd = np.moveaxis(pixels, axis, 0)[::2], np.moveaxis(pixels, axis, 0)[1::2]
            pixels = np.moveaxis(np.floor((even + odd) / 2 + 0.5), 0, axis)
    assert np.array_equal(center_crop(image, 16), pixels[:, 1:17])


@pytest.mark.parametrize("size", [(17, 30), (31, 18), (31, 31), (9, 12)])
def test_crop_scales_the_shorter_side_with_bicubic(size: tuple[int, int]) -> None:
    image = random_image(0, size)
    scaled = tuple(round(side * (16 / min(size))) for side in size)
    assert min(scaled) == 16
    left, top = ((side - 16) // 2 for side in scaled)
    expected = np.asarray(image.resize(scaled, Image.Resampling.BICUBIC))
    assert np.array_equal(center_crop(image, 16), expected[top : top + 16, left : left + 16])


# ---------------------------------------------------------------- pixels


def test_pixels_are_scaled_as_the_original_scales_them(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    found = only(folder_of(tmp_path, image), channels=1)
    assert found.shape == (1, 16, 16)
    assert found.dtype == torch.float32
    expected = (torch.arange(256).float() / 255 - 0.5) / 0.5
    assert torch.equal(found.flatten(), expected)
    assert (found.min(), found.max()) == (-1, 1)


def test_channels_come_first(tmp_path: Path) -> None:
    image = random_image(0)
    found = only(folder_of(tmp_path, image))
    assert found.shape == (3, 16, 16)
    assert found.is_contiguous()
    pixels = ((found.double() + 1) * 127.5).round().byte()
    assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(image))


def test_flip_is_a_function_of_seed_epoch_and_index(animals: Path) -> None:
    plain = ImageFolder(animals, 16, horizontal_flip=False)
    flipped = {}
    for seed in range(3):
        dataset = ImageFolder(animals, 16, seed=seed)
        for index in range(13):
            assert torch.equal(dataset[index][0], dataset[index, 0][0])
            for epoch in range(8):
                image, label = dataset[index, epoch]
                assert label == plain.labels[index]
                is_flipped = torch.equal(image, plain[index][0].flip(-1))
                assert is_flipped or torch.equal(image, plain[index, epoch][0])
                flipped[seed, epoch, index] = is_flipped
    # 312 fair coins; the bounds are four standard deviations wide.
    assert abs(sum(flipped.values()) - 156) < 36
    # Every number matters: no two epochs, seeds or indices flip alike.
    for axis in range(3):
        rows: dict[int, list[bool]] = {}
        for key in sorted(flipped):
            rows.setdefault(key[axis], []).append(flipped[key])
        assert len({tuple(row) for row in rows.values()}) == len(rows)


PALETTE = Image.new("P", (16, 16), 1)
PALETTE.putpalette([0, 0, 0, 200, 100, 50])
MODES = {
    "L": (Image.new("L", (16, 16), 77), [77, 77, 77]),
    "1": (Image.new("1", (16, 16), 1), [255, 255, 255]),
    "P": (PALETTE, [200, 100, 50]),
    "RGB": (Image.new("RGB", (16, 16), (1, 2, 3)), [1, 2, 3]),
    "LA, opaque": (Image.new("LA", (16, 16), (77, 255)), [77, 77, 77]),
    "LA, clear": (Image.new("LA", (16, 16), (77, 0)), [255, 255, 255]),
    "RGBA, opaque": (Image.new("RGBA", (16, 16), (1, 2, 3, 255)), [1, 2, 3]),
    "RGBA, clear": (Image.new("RGBA", (16, 16), (1, 2, 3, 0)), [255, 255, 255]),
    "RGBA, half": (Image.new("RGBA", (16, 16), (0, 100, 200, 51)), [204, 224, 244]),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(tmp_path: Path, mode: str) -> None:
    image, expected = MODES[mode]
    folder_of(tmp_path, image)
    assert levels(only(tmp_path)) == expected
    grey = Image.new("RGB", (1, 1), tuple(expected)).convert("L").getpixel((0, 0))
    assert levels(only(tmp_path, channels=1)) == [grey]


def test_transparent_colour_of_a_palette(tmp_path: Path) -> None:
    folder_of(tmp_path, PALETTE, transparency=1)
    assert levels(only(tmp_path)) == [255, 255, 255]
    folder_of(tmp_path, PALETTE, transparency=bytes([0, 51]))
    assert levels(only(tmp_path)) == [244, 224, 214]


@pytest.mark.parametrize("name", ["image.png", "image.tif"])
def test_sixteen_bits_do_not_saturate(tmp_path: Path, name: str) -> None:
    values = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    folder_of(tmp_path, Image.fromarray(values), name)
    found = ((only(tmp_path).double() + 1) * 127.5).round()
    assert torch.equal(found[2].flatten(), torch.arange(256.0).double())
    assert levels(only(tmp_path, channels=1)) == [0]


def test_cmyk_is_converted(tmp_path: Path) -> None:
    folder_of(tmp_path, Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "image.tif")
    assert levels(only(tmp_path)) == [0, 255, 255]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_other_colour_spaces_are_converted(tmp_path: Path, mode: str, kind: str) -> None:
    """An even colour is the same after a JPEG, but for its rounding. Printers' CMYK is often stored inverted in one."""
    image = Image.new("RGB", (16, 16), (200, 100, 50)).convert(mode)
    folder_of(tmp_path, image, "image", format=kind)
    path = (tmp_path / "only" / "image").rename(tmp_path / "only" / f"image.{kind.lower()}")
    with Image.open(path) as stored:  # a JPEG of YCbCr is what every decoder gives as RGB
        assert stored.mode == ("RGB" if (mode, kind) == ("YCbCr", "JPEG") else mode)
    # CMYK has no black here, so it is exact; YCbCr has eight bits of each, and a JPEG of either rounds once more.
    allowed = (mode == "YCbCr") + (kind == "JPEG")
    for found, expected in zip(levels(only(tmp_path)), (200, 100, 50), strict=True):
        assert abs(found - expected) <= allowed


def test_profile_is_not_applied(tmp_path: Path) -> None:
    """Here one that says that red is blue and blue is red, and one that is damaged."""
    colours = pytest.importorskip("PIL.ImageCms")
    image = random_image(0)
    srgb = colours.createProfile("sRGB")
    whole = colours.ImageCmsProfile(srgb).tobytes()
    swapped = whole.replace(b"rXYZ", b"____").replace(b"bXYZ", b"rXYZ").replace(b"____", b"bXYZ")
    applied = colours.profileToProfile(image, io.BytesIO(swapped), srgb)
    assert applied.split()[0].tobytes() != image.split()[0].tobytes()
    for name, profile in {"swapped": swapped, "damaged": swapped[:200], "none": None}.items():
        folder_of(tmp_path / name, image, icc_profile=profile)
        with Image.open(tmp_path / name / "only" / "image.png") as stored:
            assert stored.info.get("icc_profile") == profile
        pixels = ((only(tmp_path / name).double() + 1) * 127.5).round().byte()
        assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(image)), name


def test_rotation_is_not_applied(tmp_path: Path) -> None:
    image = random_image(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    folder_of(tmp_path / "rotated", image, exif=exif)
    folder_of(tmp_path / "plain", image)
    assert torch.equal(only(tmp_path / "rotated"), only(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("kind", "options"), [("gif", {}), ("webp", {"lossless": True}), ("png", {}), ("tiff", {})]
)
def test_animation_gives_its_first_frame(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    """Of a TIFF, the first page."""
    first, second = Image.new("RGB", (16, 16), (10,) * 3), Image.new("RGB", (16, 16), (200,) * 3)
    options = {"save_all": True, "append_images": [second], **options}
    folder_of(tmp_path, first, f"image.{kind}", **options)
    with Image.open(tmp_path / "only" / f"image.{kind}") as stored:
        assert stored.n_frames == 2
    assert levels(only(tmp_path)) == [10, 10, 10]
    assert len(ImageFolder(tmp_path, 16)) == 1


# ---------------------------------------------------------------- bad images


def encoded(image: Any, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


BAD = {
    "empty": (b"", "the file is empty"),
    "text": (b"<html>not found</html>", "an unknown or damaged format"),
    "truncated": (encoded(random_image(0, (64, 64)))[:-4000], "truncated"),
    "one pixel": (encoded(random_image(0, (1, 1))), "1x1 pixels, both sides must have at least 8"),
    "thin": (encoded(random_image(0, (5000, 1))), "5000x1 pixels, both sides"),
    "huge when scaled": (
        encoded(Image.new("1", (6_000_000, 8))),
        "6000000x8 pixels scaled to a shorter side of 16 are 192000000 pixels",
    ),
    "float": (encoded(Image.new("F", (16, 16), 0.5), "TIFF"), "float pixels have no known range"),
    "32 bits": (encoded(Image.new("I", (16, 16), 70000), "TIFF"), "32-bit integer pixels"),
    "bomb, warned": (encoded(Image.new("1", (10_000, 9_000))), "decompression bomb"),
    "bomb, refused": (encoded(Image.new("1", (20_000, 9_000))), "decompression bomb"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_image_is_an_error_with_its_path(animals: Path, kind: str) -> None:
    data, reason = BAD[kind]
    (animals / "cat" / "1.png").write_bytes(data)
    dataset = ImageFolder(animals, 16)
    with pytest.raises(ValueError, match=rf"/cat/1\.png: not a usable image: .*{reason}") as caught:
        dataset[1]
    assert caught.value.__cause__ is not None
    assert dataset[0][1] == 0  # the others can be used


@pytest.mark.parametrize("kind", ["empty", "truncated", "float"])
def test_bad_image_is_replaced_by_the_next(
    animals: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    for path in ("cat/2.png", "cat/3.png", "owl/3.png"):
        (animals / path).write_bytes(BAD[kind][0])
    dataset = ImageFolder(animals, 16, horizontal_flip=False, on_bad_image="skip")
    with caplog.at_level(logging.WARNING, logger="fastdit.data.images"):
        for _ in range(2):
            image, label = dataset[2]
            assert torch.equal(image, dataset[4][0])
            assert label == 1
        image, label = dataset[12]  # the last one: it goes on at the first
        assert torch.equal(image, dataset[0][0])
        assert label == 0
    paths = [str(animals / path) for path in ("cat/2.png", "cat/3.png", "owl/3.png")]
    assert list(dataset.skipped) == paths
    assert all(BAD[kind][1] in reason for reason in dataset.skipped.values())
    assert len(caplog.records) == 3
    for path, record in zip(paths, caplog.records, strict=True):
        assert path in record.getMessage()


def test_replacement_is_flipped_as_the_index_it_replaces(animals: Path) -> None:
    (animals / "cat" / "2.png").write_bytes(b"")
    dataset = ImageFolder(animals, 16, on_bad_image="skip")
    replacement = ImageFolder(animals, 16, horizontal_flip=False)[3][0]
    flips = [torch.equal(dataset[2, epoch][0], replacement.flip(-1)) for epoch in range(16)]
    assert flips == [derived_seed(0, epoch, 2) % 2 == 1 for epoch in range(16)]


def test_nothing_but_bad_images(tmp_path: Path) -> None:
    folder_of(tmp_path, random_image(0, (4, 4)))
    with pytest.raises(ValueError, match=rf"root='{tmp_path}': none of the 1 images can be used"):
        ImageFolder(tmp_path, 16, on_bad_image="skip")[0]


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_file_that_cannot_be_read_is_the_disks_fault(animals: Path, on_bad_image: str) -> None:
    dataset = ImageFolder(animals, 16, on_bad_image=on_bad_image)
    (animals / "cat" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"/cat/1\.png"):
        dataset[1]
    assert dataset.skipped == {}


def test_index_out_of_range(animals: Path) -> None:
    with pytest.raises(IndexError, match="index=13: allowed are 0 to 12"):
        ImageFolder(animals, 16)[13]


# ---------------------------------------------------------------- workers


def loaded(animals: Path, workers: int, start_step: int, count: int) -> list[tuple[Tensor, Tensor]]:
    dataset = ImageFolder(animals, 16, on_bad_image="skip")
    sampler = EpochBatchSampler(len(dataset), 4, seed=1, start_step=start_step)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
    return [(images, labels) for images, labels in islice(loader, count)]


# Python 3.12 warns of every fork in a process with threads, and torch has threads.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_and_a_resume_change_nothing(animals: Path) -> None:
    (animals / "dog" / "1.png").write_bytes(b"bad")
    expected = loaded(animals, 0, 0, 8)  # two epochs and a part
    for found in (
        loaded(animals, 2, 0, 8),
        loaded(animals, 0, 0, 5) + loaded(animals, 2, 5, 3),
    ):
        for (images, labels), (expected_images, expected_labels) in zip(
            found, expected, strict=True
        ):
            assert torch.equal(images, expected_images)
            assert torch.equal(labels, expected_labels)


def test_pickle(animals: Path) -> None:
    dataset = ImageFolder(animals, 16, seed=3)
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    assert torch.equal(copy[5, 2][0], dataset[5, 2][0])
