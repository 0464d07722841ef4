"""Images to disk: a grid, an array, or one file each. Nothing half-written is ever under its final name."""

from __future__ import annotations

import itertools
import math
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..files import PathLike, atomic_file, atomic_folder, write_json
from ..validation import require_floating

if TYPE_CHECKING:
    from PIL.Image import Image

Images = npt.NDArray[np.uint8]

SMALLEST = 48  # the grid enlarges images whose longer side is below this many pixels


def to_uint8(images: Tensor) -> Images:
    """Images in [-1, 1] as bytes: clamp(127.5 x + 128, 0, 255), cut to whole numbers, as the original writes them.

    (N, C, H, W) floating, on any device -> (N, H, W, C) uint8. Raises TypeError or ValueError naming `images`.
    """
    require_floating("images", images)
    if images.ndim != 4:
        raise ValueError(f"images: expected shape (N, C, H, W), got {tuple(images.shape)}")
    pixels = (127.5 * images.detach().float() + 128).clamp(0, 255)
    array: Images = pixels.permute(0, 2, 3, 1).to("cpu", torch.uint8).contiguous().numpy()
    return array


def output_kind(out: PathLike) -> str:
    """What `write_samples` makes of `out`: `"grid"` for .png, `"npz"` for .npz, else `"folder"`.

    Raises ValueError for another ending that looks like a file's (a dot, a letter and up to four more letters or
    digits), and FileExistsError for a folder that is there already: both can be known before hours of sampling.
    """
    path = Path(out)
    ending = path.suffix.lower()
    if ending == ".png":
        return "grid"
    if ending == ".npz":
        return "npz"
    if re.fullmatch(r"\.[a-z][a-z0-9]{0,4}", ending):
        raise ValueError(
            f"out={str(out)!r}: allowed endings are .png (a grid) and .npz (an array); without an ending it is a "
            "folder of single images"
        )
    if path.exists():
        raise FileExistsError(f"out={str(out)!r}: exists already and is not overwritten")
    return "folder"


def write_samples(
    images: Images | Sequence[Images], labels: Sequence[int] | Tensor, out: PathLike
) -> None:
    """Writes `images` (N, H, W, C) uint8 and their N labels, as the ending of `out` says; see `output_kind`.

    Many may come in blocks, (n, H, W, C) each: a sequence, of which one after the other is read, twice. Missing parent
    folders are made. A grid holds no labels.
    """
    kind = output_kind(out)
    Path(out).absolute().parent.mkdir(parents=True, exist_ok=True)
    if kind == "grid":
        if not isinstance(images, np.ndarray):
            images = np.concatenate([np.array(block) for block in images])
        save_grid(images, out)
    elif kind == "npz":
        save_npz(out, images, labels)
    else:
        save_folder(out, images, labels)


def save_grid(
    images: Images, path: PathLike, *, columns: int | None = None, scale: int | None = None
) -> None:
    """A PNG of all images, row by row, with white between them: as wide as an enlarged pixel, and at least 2 pixels.

    Args:
        images: (N, H, W, C) uint8 with N > 0 and C = 1 or 3.
        path: the file, replaced where it exists.
        columns: images in a row; None makes the grid as square as possible.
        scale: every pixel becomes scale x scale pixels; None enlarges images below 48 pixels to at least that.

    Raises TypeError or ValueError naming the argument, and ImportError without Pillow.
    """
    _require_images(images)
    if len(images) == 0:
        raise ValueError("images: a grid needs at least one")
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    scale = math.ceil(SMALLEST / max(height, width)) if scale is None else scale
    for name, value in (("columns", columns), ("scale", scale)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    columns = min(columns, n)
    rows = math.ceil(n / columns)

    # Repeating pixels is nearest-neighbour enlargement: the pixels of small images stay what they are.
    large = images.repeat(scale, axis=1).repeat(scale, axis=2)
    gap = max(2, scale)
    step_y, step_x = height * scale + gap, width * scale + gap
    canvas = np.full((rows * step_y - gap, columns * step_x - gap, channels), 255, dtype=np.uint8)
    for i, image in enumerate(large):
        top, left = i // columns * step_y, i % columns * step_x
        canvas[top : top + height * scale, left : left + width * scale] = image
    with atomic_file(path) as temporary:
        _picture(canvas).save(temporary, format="PNG")


def save_npz(
    path: PathLike, images: Images | Sequence[Images], labels: Sequence[int] | Tensor
) -> None:
    """An uncompressed NumPy archive: `arr_0` uint8 (N, H, W, C), `arr_1` int64 (N,).

    `arr_0` is what the usual FID evaluation reads. The same images give the same bytes. Raises TypeError or ValueError
    naming the argument.
    """
    blocks, shape = _blocks(images)
    array = _labels(labels, shape[0])
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for block in blocks:
                file.write(np.ascontiguousarray(block).data)
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
            np.lib.format.write_array(file, array, allow_pickle=False)


def save_folder(
    folder: PathLike, images: Images | Sequence[Images], labels: Sequence[int] | Tensor
) -> None:
    """A new folder with `000000.png`, `000001.png`, … and `labels.json`, {file name: label}.

    Raises FileExistsError where `folder` exists, TypeError or ValueError naming the argument, and ImportError without
    Pillow.
    """
    blocks, shape = _blocks(images)
    array = _labels(labels, shape[0])
    with atomic_folder(folder) as temporary:
        for i, image in enumerate(itertools.chain.from_iterable(blocks)):
            _picture(image).save(temporary / f"{i:06d}.png")
        names = {f"{i:06d}.png": int(label) for i, label in enumerate(array)}
        write_json(temporary / "labels.json", names)


def _blocks(images: Images | Sequence[Images]) -> tuple[Sequence[Images], tuple[int, ...]]:
    """The blocks, checked, and the shape (N, H, W, C) of all; none of them is kept."""
    blocks: Sequence[Any] = images if isinstance(images, Sequence) and len(images) else [images]
    count, size = 0, None
    for block in blocks:
        _require_images(block)
        size = size or block.shape[1:]
        if block.shape[1:] != size:
            raise ValueError(f"images: blocks of {size} and {block.shape[1:]}")
        count += len(block)
    return blocks, (count, *(size or ()))


def _picture(pixels: Images) -> Image:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError('writing PNG needs Pillow: pip install "fastdit[cli]"') from None
    channels = pixels.shape[-1]
    if channels not in (1, 3):
        raise ValueError(f"images: a PNG has 1 or 3 channels, these have {channels}")
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def _require_images(images: Images) -> None:
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        found = getattr(images, "dtype", type(images).__name__)
        raise TypeError(f"images: expected a uint8 array, as to_uint8 gives, got {found}")
    if images.ndim != 4:
        raise ValueError(f"images: expected shape (N, H, W, C), got {images.shape}")


def _labels(labels: Sequence[int] | Tensor, count: int) -> npt.NDArray[np.int64]:
    array = torch.as_tensor(labels).cpu().numpy().astype(np.int64)
    if array.shape != (count,):
        raise ValueError(f"labels: expected shape ({count},), one an image, got {array.shape}")
    return array
