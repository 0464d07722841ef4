"""What is written to disk is what was drawn, whole or not at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdit.sampling import (
    output_kind,
    save_folder,
    save_grid,
    save_npz,
    to_uint8,
    write_samples,
)


def images(n: int = 5, size: int = 4, channels: int = 3) -> np.ndarray:
    """No two pixels alike, as far as bytes go."""
    count = n * size * size * channels
    return (np.arange(count) * 37 % 256).astype(np.uint8).reshape(n, size, size, channels)


def test_to_uint8_by_hand() -> None:
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 0.996, 1.0, 3.0]).reshape(1, 2, 2, 2)
    out = to_uint8(x)
    assert out.dtype == np.uint8
    assert out.shape == (1, 2, 2, 2)
    # 127.5 x + 128 cut to whole numbers; channels last.
    first, second = [0, 0, 64, 128], [191, 254, 255, 255]
    assert out[..., 0].ravel().tolist() == first
    assert out[..., 1].ravel().tolist() == second


def test_to_uint8_gives_every_byte_back() -> None:
    every = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16)
    assert np.array_equal(to_uint8((every - 127.5) / 127.5)[0, ..., 0].ravel(), np.arange(256))
    low = to_uint8(((every - 127.5) / 127.5).bfloat16())
    assert low.dtype == np.uint8


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(3, 4, 4), ValueError, r"images: .*\(3, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), TypeError, "images: .*uint8"),
        (np.zeros((1, 3, 4, 4)), TypeError, "images: .*ndarray"),
    ],
)
def test_to_uint8_refuses(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        to_uint8(value)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_holds_every_pixel(tmp_path: Path, channels: int) -> None:
    batch = images(5, 4, channels)
    save_grid(batch, tmp_path / "grid.png", columns=3, scale=2)
    with Image.open(tmp_path / "grid.png") as opened:
        assert opened.mode == {1: "L", 3: "RGB"}[channels]
        grid = np.asarray(opened).reshape(opened.height, opened.width, channels)
    assert grid.shape == (2 * 8 + 2, 3 * 8 + 2 * 2, channels)
    white = np.ones(grid.shape[:2], dtype=bool)
    for i, image in enumerate(batch):
        top, left = i // 3 * 10, i % 3 * 10
        cell = grid[top : top + 8, left : left + 8]
        for row in (0, 1):
            for column in (0, 1):  # each pixel is a square of 2 x 2
                assert np.array_equal(cell[row::2, column::2], image)
        white[top : top + 8, left : left + 8] = False
    assert (grid[white] == 255).all()


@pytest.mark.parametrize(
    ("n", "size", "shape"),
    [
        (1, 8, (48, 48)),  # 8 x 6
        (9, 8, (156, 156)),
        (5, 8, (102, 156)),  # 3 columns, 2 rows
        (4, 64, (130, 130)),  # not enlarged
        (2, 47, (94, 190)),
    ],
)
def test_grid_is_square_and_large_enough_to_see(
    tmp_path: Path, n: int, size: int, shape: tuple[int, int]
) -> None:
    save_grid(images(n, size), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as opened:
        assert (opened.height, opened.width) == shape


def test_npz(tmp_path: Path) -> None:
    batch = images()
    save_npz(tmp_path / "x.npz", batch, [4, 3, 2, 1, 0])
    with np.load(tmp_path / "x.npz", allow_pickle=False) as opened:
        assert sorted(opened) == ["arr_0", "arr_1"]
        assert opened["arr_0"].dtype == np.uint8
        assert opened["arr_1"].dtype == np.int64
        assert np.array_equal(opened["arr_0"], batch)
        assert opened["arr_1"].tolist() == [4, 3, 2, 1, 0]


def test_folder(tmp_path: Path) -> None:
    batch = images()
    save_folder(tmp_path / "x", batch, torch.tensor([4, 3, 2, 1, 0]))
    names = [f"{i:06d}.png" for i in range(5)]
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [*names, "labels.json"]
    for name, image in zip(names, batch, strict=True):
        with Image.open(tmp_path / "x" / name) as opened:
            assert np.array_equal(np.asarray(opened), image)
    assert json.loads((tmp_path / "x" / "labels.json").read_text()) == dict(
        zip(names, [4, 3, 2, 1, 0], strict=True)
    )
    with pytest.raises(FileExistsError):
        save_folder(tmp_path / "x", batch, [0] * 5)


@pytest.mark.parametrize(
    ("out", "kind"),
    [
        ("a.png", "grid"),
        ("a.PNG", "grid"),
        ("a.npz", "npz"),
        ("a", "folder"),
        ("cfg-1.5", "folder"),
    ],
)
def test_the_ending_decides(tmp_path: Path, out: str, kind: str) -> None:
    assert output_kind(tmp_path / out) == kind
    write_samples(images(), [0, 1, 2, 3, 4], tmp_path / "new" / out)  # the parent is made
    written = tmp_path / "new" / out
    assert written.is_dir() == (kind == "folder")
    start = b"" if kind == "folder" else written.read_bytes()[:4]
    assert start == {"grid": b"\x89PNG", "npz": b"PK\x03\x04", "folder": b""}[kind]


@pytest.mark.parametrize("out", ["a.jpg", "a.jpeg", "a.npy", "b/c.gif"])
def test_other_endings_are_refused(tmp_path: Path, out: str) -> None:
    with pytest.raises(ValueError, match=r"out=.*allowed endings are \.png .* and \.npz"):
        write_samples(images(), [0] * 5, tmp_path / out)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_beforehand(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=r"out=.*exists already"):
        output_kind(tmp_path)


def test_pictures_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    for save in (
        lambda: save_grid(images(), tmp_path / "a.png"),
        lambda: save_folder(tmp_path / "a", images(), [0] * 5),
    ):
        with pytest.raises(ImportError, match=r'Pillow: pip install "fastdit\[cli\]"'):
            save()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["a.png", "a.npz", "a"])
def test_interrupted_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    if out != "a":
        (tmp_path / out).write_bytes(b"before")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_samples(images(), [0] * 5, tmp_path / out)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([b"before"] if out != "a" else [])


@pytest.mark.parametrize(
    ("batch", "labels", "error", "message"),
    [
        (images(), [1, 2], ValueError, r"labels: expected shape \(5,\).*\(2,\)"),
        (images().astype(np.float32), [0] * 5, TypeError, "images: .*float32"),
        (images()[0], [0] * 5, ValueError, r"images: .*\(4, 4, 3\)"),
    ],
)
@pytest.mark.parametrize("save", [save_npz, save_folder])
def test_bad_arguments(
    tmp_path: Path, save: Any, batch: Any, labels: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        save(tmp_path / "x", batch, labels)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (images(channels=4), {}, "images: .*4"),
        (images(n=0), {}, "images: a grid needs at least one"),
        (images(), {"columns": 0}, "columns=0"),
        (images(), {"scale": 0}, "scale=0"),
    ],
)
def test_bad_grids(tmp_path: Path, batch: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_grid(batch, tmp_path / "grid.png", **options)
    assert not list(tmp_path.iterdir())
