"""Tar files: the items of an image folder, found by number, and every way in which a tar can be wrong."""

from __future__ import annotations

import gzip
import json
import logging
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdit.data import ImageFolder, TarShards
from fastdit.data import shards as shards_module
from tests.data.helpers import (
    Members,
    png,
    require_workers_and_a_resume_change_nothing,
    save_animals,
    save_tar,
    tar_bytes,
)

pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIT_CACHE", str(tmp_path / "cache"))


def sample(number: int, label: int | str) -> Members:
    return [(f"{number:04}.png", png(number)), (f"{number:04}.cls", str(label).encode())]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The thirteen animals in three tars, labelled in `.cls` and in `.json`."""
    animals = save_animals(tmp_path / "animals")
    images = ImageFolder(animals, 16)
    for tar in range(3):
        members: Members = []
        for index in range(5 * tar, min(5 * tar + 5, 13)):
            label = images.labels[index]
            members.append((f"{index:04}.PNG", images.read(index)))
            if index % 2:
                members.append((f"{index:04}.cls", f"{label}\n".encode()))
            else:
                members.append((f"{index:04}.json", json.dumps({"label": label}).encode()))
        save_tar(tmp_path / "tars" / f"{tar:06}.tar", members)
    (tmp_path / "tars" / "classes.json").write_text('["cat", "dog", "owl"]')
    return tmp_path / "tars"


def one(tmp_path: Path, members: Members) -> Path:
    """A folder with one tar."""
    save_tar(tmp_path / "one" / "a.tar", members)
    return tmp_path / "one"


# ---------------------------------------------------------------- items


def test_items_and_flips_are_the_image_folders(root: Path) -> None:
    images, tars = ImageFolder(root.parent / "animals", 16, seed=3), TarShards(root, 16, seed=3)
    assert len(tars) == 13
    assert tars.classes == images.classes
    assert tars.labels == images.labels
    assert (tars.space, tars.image_size, tars.channels, tars.ignored) == ("pixels", 16, 3, 0)
    for index in range(13):
        for epoch in range(4):
            assert torch.equal(tars[index, epoch][0], images[index, epoch][0])
            assert tars[index, epoch][1] == images[index, epoch][1]


def test_names(root: Path) -> None:
    tars = TarShards(root, 16)
    assert [tars.key(index) for index in (0, 5, 12)] == [
        "000000.tar/0000.PNG",
        "000001.tar/0005.PNG",
        "000002.tar/0012.PNG",
    ]
    assert tars.name(5) == f"{root / '000001.tar'}: 0005.PNG"


# Python 3.12 warns of every fork in a process with threads, and torch has threads.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_and_a_resume_change_nothing(root: Path) -> None:
    require_workers_and_a_resume_change_nothing(TarShards(root, 16))


def test_pickle(root: Path) -> None:
    tars = TarShards(root, 16, seed=3)
    copy = pickle.loads(pickle.dumps(tars))  # noqa: S301
    assert torch.equal(copy[5, 2][0], tars[5, 2][0])


def test_index_out_of_range(root: Path) -> None:
    with pytest.raises(IndexError, match="index=13: allowed are 0 to 12"):
        TarShards(root, 16)[13]


def test_members_in_folders_and_apart(tmp_path: Path) -> None:
    """Folders are part of a sample's name, which ends at the first dot; its members may lie anywhere in the tar."""
    pictures = {name: png(seed) for seed, name in enumerate(("a/0", "b/0", "c.d/0"))}
    members = [(f"{name}.png", data) for name, data in pictures.items()]
    members += [("c.d/0.cls", b"2"), ("b/0.cls", b" 1 \n"), ("a/0.cls", b"0")]
    tars = TarShards(one(tmp_path, members), 16)
    assert tars.labels == [0, 1, 2]
    assert [tars.read(index) for index in range(3)] == list(pictures.values())


def test_long_and_odd_names(tmp_path: Path) -> None:
    """The first is longer than a header's field, the second no UTF-8."""
    names = [f"{'x' * 150}/é{'y' * 150}", os.fsdecode(b"\xff")]
    members = [
        member
        for name in names
        for member in ((f"{name}.png", png(len(name))), (f"{name}.cls", b"0"))
    ]
    folder = one(tmp_path, members)
    for _ in range(2):  # made, and kept
        tars = TarShards(folder, 16)
        assert [tars.read(index) for index in range(2)] == [png(len(name)) for name in names]
        assert [tars.name(index) for index in range(2)] == [
            f"{folder / 'a.tar'}: {name}.png" for name in names
        ]


def test_other_members_are_ignored_and_counted(tmp_path: Path) -> None:
    members = [
        *sample(0, 0),
        ("0000.txt", b"a caption"),
        ("0000.seg.png", b"a mask"),
        ("._0000.png", b"x"),
        (".DS_Store", b"x"),
        ("info.json", b"{}"),
        ("0000.json", b'{"width": 3}'),
    ]
    folder = one(tmp_path, members)
    with tarfile.open(folder / "a.tar", "a") as tar:
        link = tarfile.TarInfo("0001.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0000.png"
        tar.addfile(link)
        directory = tarfile.TarInfo("folder")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
    (folder / "._a.tar").write_bytes(b"x")
    (folder / "notes.txt").write_bytes(b"x")
    tars = TarShards(folder, 16)
    assert len(tars) == 1
    assert tars.ignored == 6


# ---------------------------------------------------------------- the index


def count_indexing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    indexed: list[str] = []
    make = shards_module._make_index

    def counting(path: str, file: Any) -> Any:
        indexed.append(os.path.basename(path))
        return make(path, file)

    monkeypatch.setattr(shards_module, "_make_index", counting)
    return indexed


def test_index_is_made_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    indexed = count_indexing(monkeypatch)
    first = TarShards(root, 16)
    assert indexed == ["000000.tar", "000001.tar", "000002.tar"]
    again = TarShards(root, 16)
    assert len(indexed) == 3
    assert again.labels == first.labels
    assert all(torch.equal(again[index][0], first[index][0]) for index in range(13))


def test_index_decodes_no_image(tmp_path: Path) -> None:
    tars = TarShards(one(tmp_path, [("0.png", b"no image"), ("0.cls", b"0")]), 16)
    with pytest.raises(ValueError, match=r"/one/a\.tar: 0\.png: not a usable image"):
        tars[0]


@pytest.mark.parametrize("change", ["content", "time"])
def test_changed_tar_is_indexed_again(
    root: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    opened = TarShards(root, 16)
    path = root / "000001.tar"
    if change == "content":
        save_tar(path, sample(7, 2))
    else:
        os.utime(path, ns=(1, 1))
    with pytest.raises(OSError, match="The tar was changed since it was opened") as caught:
        opened[5]
    assert caught.value.filename == str(path)
    assert opened[0][1] == 0  # the others can be used
    indexed = count_indexing(monkeypatch)
    tars = TarShards(root, 16)
    assert indexed == ["000001.tar"]
    assert len(tars) == (9 if change == "content" else 13)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 0}'])
def test_damaged_index_is_made_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    expected = TarShards(root, 16).labels
    for path in (tmp_path / "cache" / "tars").iterdir():
        path.write_bytes(content)
    indexed = count_indexing(monkeypatch)
    assert TarShards(root, 16).labels == expected
    assert len(indexed) == 3


def test_index_that_cannot_be_kept(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache" / "tars").touch()  # a file where the folder should be
    with caplog.at_level(logging.WARNING, logger="fastdit.data.shards"):
        assert len(TarShards(root, 16)) == 13
    assert len(caplog.records) == 3
    assert "000000.tar: its index could not be kept" in caplog.records[0].getMessage()


# ---------------------------------------------------------------- classes


def test_classes_without_names(root: Path) -> None:
    (root / "classes.json").unlink()
    assert TarShards(root, 16).classes == ["0", "1", "2"]


def test_stored_classes_decide_the_labels(root: Path) -> None:
    tars = TarShards(root, 16, classes=["owl", "cat", "dog"])
    assert tars.classes == ["owl", "cat", "dog"]
    assert tars.labels == [1] * 4 + [2] * 5 + [0] * 4
    assert [tars[index][1] for index in (0, 4, 9)] == [1, 2, 0]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat", "dog", "elk", "owl"], "the 4 classes.*missing 'elk'; extra none"),
        (["cat", "dog"], "the 2 classes.*missing none; extra 'owl'"),
        (["cat", "dog", "owl", "owl"], "the 4 classes.*missing none; extra none"),
    ],
)
def test_other_stored_classes(root: Path, classes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"root='.*{message}"):
        TarShards(root, 16, classes=classes)


@pytest.mark.parametrize("count", [1, 1001])
def test_any_number_of_classes(tmp_path: Path, count: int) -> None:
    image = png(0)
    members = [
        member
        for label in range(count)
        for member in ((f"{label:04}.png", image), (f"{label:04}.cls", str(label).encode()))
    ]
    tars = TarShards(one(tmp_path, members), 16)
    assert tars.classes == [str(label) for label in range(count)]
    assert tars.labels == list(range(count))


def test_class_without_an_image_is_told(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "classes.json").write_text('["cat", "dog", "owl", "yak", "zebra"]')
    with caplog.at_level(logging.WARNING, logger="fastdit.data.shards"):
        assert len(TarShards(root, 16).classes) == 5
    assert [record.getMessage() for record in caplog.records] == [
        f"root={str(root)!r}: 2 of 5 classes have no image, the first is 'yak'"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '["cat", "dog"]',
            r"000001\.tar: 0009\.PNG: label 2, allowed are 0 to 1 for the 2 classes of",
        ),
        ('{"cat": 0}', r"classes\.json: expected a list of class names"),
        ("[]", r"classes\.json: expected a list of class names"),
        ('["cat", "dog", "cat"]', r"classes\.json: 2 classes are named 'cat'"),
        ("[", r"classes\.json: not valid JSON"),
    ],
)
def test_bad_class_names(root: Path, text: str, message: str) -> None:
    (root / "classes.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        TarShards(root, 16)


# ---------------------------------------------------------------- samples that cannot be used

SAMPLES: dict[str, tuple[Members, str]] = {
    "no label": ([*sample(0, 0), ("0001.png", b"")], "sample '0001': no label, in .cls or as"),
    "no label in JSON": (
        [*sample(0, 0), ("0001.png", b""), ("0001.json", b'{"labels": 1}')],
        "sample '0001': no label",
    ),
    "no image": ([*sample(0, 0), ("0001.cls", b"0")], "sample '0001': a label and no image"),
    "twice": (
        [*sample(0, 0), *sample(0, 0)],
        "sample '0000': two images, '0000.png' and '0000.png'",
    ),
    "two images": (
        [*sample(0, 0), ("0000.jpg", b"")],
        "sample '0000': two images, '0000.png' and '0000.jpg'",
    ),
    "label twice": (
        [*sample(0, 0), ("0000.cls", b"0")],
        "sample '0000': '0000.cls' is there twice",
    ),
    "two labels": (
        [*sample(0, 0), ("0000.json", b'{"label": 1}')],
        "sample '0000': two labels, 0 and 1",
    ),
    "negative": (sample(0, -1), "sample '0000': label -1 in '0000.cls', expected a whole number"),
    "text": (sample(0, "cat"), "sample '0000': label 'cat' in '0000.cls'"),
    "empty": (sample(0, ""), "sample '0000': label '' in '0000.cls'"),
    "fraction": (sample(0, "1.0"), "sample '0000': label '1.0'"),
    "huge": (sample(0, 2**40), f"sample '0000': label {2**40} .* from 0 to {2**20}"),
    "truth": ([("0.png", b""), ("0.json", b'{"label": true}')], "sample '0': label True"),
    "text in JSON": ([("0.png", b""), ("0.json", b'{"label": "1"}')], "sample '0': label '1'"),
    "no JSON": ([("0.png", b""), ("0.json", b"{")], "sample '0': '0.json' is not valid JSON"),
    "large label": (
        [("0.png", b""), ("0.cls", b" " * (2**20 + 1))],
        "sample '0': '0.cls' has 1048577 bytes",
    ),
    "no sample": ([("readme.txt", b"x")], "holds no sample, an image"),
    "nothing": ([], "holds no sample, an image"),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_bad_samples(tmp_path: Path, kind: str) -> None:
    members, message = SAMPLES[kind]
    with pytest.raises(ValueError, match=rf"/one/a\.tar: {message}") as caught:
        TarShards(one(tmp_path, members), 16)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- tars that cannot be used


def damaged_tars() -> dict[str, tuple[bytes, str]]:
    picture = png(0, (40, 40))  # ten blocks
    good = tar_bytes([("0.cls", b"0"), ("0.png", picture), ("1.cls", b"0"), ("1.png", picture)])
    blocks = 1 + 1 + 1 + (len(picture) + 511) // 512  # of the first sample
    half = 512 * blocks
    return {
        "empty": (b"", "not an uncompressed tar, or truncated"),
        "text": (b"<html>not found</html>" * 50, "not an uncompressed tar, or truncated"),
        "compressed": (gzip.compress(good), "not an uncompressed tar, or truncated"),
        "cut in data": (
            good[: half - 1000],
            "not an uncompressed tar, or truncated: unexpected end",
        ),
        "cut in a header": (good[: half + 100], "truncated|not an uncompressed tar, or truncated"),
        "cut between members": (
            good[:half],
            f"truncated: it ends at byte {half} without its end mark",
        ),
        "damaged header": (
            good[:half] + b"\xff" * 512 + good[half + 512 :],
            f"damaged at byte {half}: expected a member or the end",
        ),
        "chained": (good + good, "holds more after its end at byte"),
        "chained, far": (good + bytes(2**21), "holds more after its end at byte"),
    }


@pytest.mark.parametrize("kind", damaged_tars())
def test_damaged_tar(root: Path, kind: str) -> None:
    data, message = damaged_tars()[kind]
    (root / "000001.tar").write_bytes(data)
    with pytest.raises(ValueError, match=rf"000001\.tar: ({message})"):
        TarShards(root, 16)


def test_tar_that_shrinks_in_use(root: Path) -> None:
    """Where its time is put back, the missing bytes still show."""
    tars = TarShards(root, 16)
    path = root / "000001.tar"
    before = path.stat()
    tars._sizes[5] = before.st_size
    with pytest.raises(OSError, match=r"bytes of .* could be read") as caught:
        tars[5]
    assert caught.value.filename == str(path)


def test_folders_that_hold_no_tar(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"root='.*/nowhere': no such folder"):
        TarShards(tmp_path / "nowhere", 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"root='.*/empty': holds no \*\.tar"):
        TarShards(tmp_path / "empty", 16)


def test_bad_image(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tar(root / "000001.tar", [*sample(3, 1), ("0004.png", b""), ("0004.cls", b"1")])
    name = f"{root / '000001.tar'}: 0004.png"
    with pytest.raises(ValueError, match=f"{name}: not a usable image: the file is empty"):
        TarShards(root, 16)[6]
    tars = TarShards(root, 16, horizontal_flip=False, on_bad_image="skip")
    with caplog.at_level(logging.WARNING, logger="fastdit.data.images"):
        for _ in range(2):
            image, label = tars[6]
            assert torch.equal(image, tars[7][0])
            assert label == 2
    assert list(tars.skipped) == [name]
    assert len(caplog.records) == 1
