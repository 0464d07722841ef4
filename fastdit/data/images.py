"""Folders of images, cropped as the original DiT crops them, with errors that name the file."""

from __future__ import annotations

import io
import logging
import os
import struct
import unicodedata
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..validation import require_choice
from .sampler import Key, derived_seed, split_key

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MIN_SIDE = 8
# What Pillow's decoders raise for damaged files. Not every Exception: running out of memory is no bad image.
DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)

logger = logging.getLogger(__name__)


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images in class folders: `root/<class>/…/<image>`.

    Classes are the folders in `root`, sorted by name in Unicode's normal form C, so that machines with different file
    systems number them alike. Images are the files below them with one of `SUFFIXES`, in upper or lower case. Hidden
    files and folders, other files, and links to a folder they lie in are left out and counted in `ignored`.

    `dataset[index, epoch]` gives (image float32 (channels, image_size, image_size) in [-1, 1], label), `dataset[index]`
    that of epoch 0. The image is `center_crop`ped, and flipped from left to right for half of all (seed, epoch, index):
    a pure function of the three, so that neither workers nor a resume change it.

    Pixels: `channels=3` is RGB, `channels=1` is luminance. Transparent images are laid on white, 16-bit grey is scaled
    to 8 bits, animations give their first frame. EXIF rotation and colour profiles are not applied, as in the original.

    Arguments:
        classes: the class names that a checkpoint was trained with. The same names must be there; labels are their
            positions in this list.
        on_bad_image: what an image does that cannot be decoded, is smaller than 8 pixels, has float or 32-bit pixels,
            or more pixels than `PIL.Image.MAX_IMAGE_PIXELS`. `"error"` raises ValueError with its path. `"skip"` gives
            the next good image (with its label) instead, logs one warning per path, and lists it in `skipped`, a dict
            from path to reason. A worker process of a DataLoader has its own `skipped`.

    Raises ValueError naming the folder where it is missing, holds no class folders, or a class folder holds no image;
    ImportError without Pillow; OSError where a file cannot be read at all, whatever `on_bad_image` says, because that
    is the disk's fault and not the image's.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_size: int,
        *,
        channels: int = 3,
        horizontal_flip: bool = True,
        seed: int = 0,
        on_bad_image: str = "error",
        classes: Sequence[str] | None = None,
    ) -> None:
        _pillow()  # Missing it should show here, not in the first worker.
        if image_size < 1:
            raise ValueError(f"image_size={image_size}: must be at least 1")
        require_choice("channels", channels, (1, 3))
        require_choice("on_bad_image", on_bad_image, ("error", "skip"))
        self.root = Path(root)
        self.image_size = image_size
        self.channels = channels
        self.horizontal_flip = horizontal_flip
        self.seed = seed
        self.on_bad_image = on_bad_image
        self.skipped: dict[str, str] = {}
        self.ignored = 0

        folders = self._class_folders()
        self.classes = list(folders) if classes is None else _same_classes(root, folders, classes)
        self.paths: list[str] = []
        self.labels: list[int] = []
        for label, name in enumerate(self.classes):
            paths = list(self._images_below(folders[name], (os.path.realpath(root),)))
            if not paths:
                raise ValueError(
                    f"root={str(root)!r}: class folder {folders[name]!r} holds no image"
                    f" ({' '.join(SUFFIXES)}); remove the folder or fill it"
                )
            self.paths += paths
            self.labels += [label] * len(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        index, epoch = split_key(key, len(self))
        image, used = self._good_image(index)
        pixels = np.array(center_crop(image, self.image_size)).reshape(
            self.image_size, self.image_size, self.channels
        )
        # Bit for bit the original's (x / 255 - 0.5) / 0.5: factors of two do not round.
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).float().div(127.5).sub(1)
        if self.horizontal_flip and derived_seed(self.seed, epoch, index) % 2 == 1:
            tensor = tensor.flip(-1)
        return tensor.contiguous(), self.labels[used]

    def _good_image(self, index: int) -> tuple[Image, int]:
        """The image at `index`, or with `"skip"` at the next index that has a good one; and that index."""
        for offset in range(len(self)):
            used = (index + offset) % len(self)
            path = self.paths[used]
            if path in self.skipped:
                continue
            try:
                return _read_image(path, self.channels, self.image_size), used
            except ValueError as error:
                if self.on_bad_image == "error":
                    raise
                self.skipped[path] = str(error)
                logger.warning("Skipped: %s", error)
        raise ValueError(f"root={str(self.root)!r}: none of the {len(self)} images can be used")

    def _class_folders(self) -> dict[str, str]:
        """Class name to folder path, in the order of the labels."""
        root = f"root={str(self.root)!r}"
        if not self.root.exists():
            raise ValueError(f"{root}: no such folder")
        if not self.root.is_dir():
            raise ValueError(f"{root}: expected a folder, this is a file")
        folders: dict[str, str] = {}
        for name, entry in _sorted_entries(self.root):
            if name.startswith(".") or not entry.is_dir():
                self.ignored += 1
            elif name in folders:
                raise ValueError(
                    f"{root}: two class folders are named {name!r}, in different Unicode forms"
                )
            else:
                folders[name] = entry.path
        if not folders:
            raise ValueError(f"{root}: no class folders; expected {self.root}/<class>/<image>")
        return folders

    def _images_below(self, folder: str, ancestors: tuple[str, ...]) -> Iterator[str]:
        """Paths of images, a folder's own before those of its sub-folders."""
        ancestors = (*ancestors, os.path.realpath(folder))
        subfolders = []
        for name, entry in _sorted_entries(folder):
            if name.startswith("."):
                self.ignored += 1
            elif entry.is_dir():
                if os.path.realpath(entry.path) in ancestors:
                    self.ignored += 1
                else:
                    subfolders.append(entry.path)
            elif name.lower().endswith(SUFFIXES):
                yield entry.path
            else:
                self.ignored += 1
        for subfolder in subfolders:
            yield from self._images_below(subfolder, ancestors)


def center_crop(image: Image, size: int) -> Image:
    """The (size, size) centre of `image`, scaled so that its shorter side is `size`.

    While the shorter side is at least 2 * size the image is halved with a box filter; then one bicubic step scales it
    to exactly `size`. This is the crop of ADM (Dhariwal & Nichol, arXiv 2105.05233) with which DiT was trained.
    """
    resampling = _pillow().Resampling
    while min(image.size) >= 2 * size:
        width, height = image.size
        image = image.resize((width // 2, height // 2), resample=resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), resample=resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _read_image(path: str, channels: int, size: int) -> Image:
    """The image in mode RGB or L. Raises ValueError with the path for a bad image, OSError for a bad disk."""
    pillow = _pillow()
    try:
        data = Path(path).read_bytes()
    except OSError as error:  # A failing read, unlike a failing open, does not name the file.
        raise OSError(error.errno, error.strerror, path) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            image = pillow.open(io.BytesIO(data))
        _require_size(image, size)
        return _convert(image, channels)
    except (*DAMAGED, pillow.DecompressionBombWarning, pillow.DecompressionBombError) as error:
        reason = str(error) or type(error).__name__
        if not data:
            reason = "the file is empty"
        elif isinstance(error, pillow.UnidentifiedImageError):
            reason = "an unknown or damaged format"  # Pillow's own words name a buffer in memory
        raise ValueError(f"{path}: not a usable image: {reason}") from error


def _require_size(image: Image, size: int) -> None:
    width, height = image.size
    if min(image.size) < MIN_SIDE:
        raise ValueError(f"{width}x{height} pixels, both sides must have at least {MIN_SIDE}")
    # A long thin image is small, but becomes huge where its short side is scaled up.
    limit = _pillow().MAX_IMAGE_PIXELS
    pixels = max(image.size) * size * size // min(image.size)
    if limit is not None and pixels > limit:
        raise ValueError(
            f"{width}x{height} pixels scaled to a shorter side of {size} are {pixels} pixels,"
            f" more than PIL.Image.MAX_IMAGE_PIXELS={limit}"
        )


def _convert(image: Image, channels: int) -> Image:
    pillow = _pillow()
    image.load()
    # 16-bit grey PNGs are mode I in older Pillow, I;16 in newer.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Pillow's own conversion would cut everything above 255 down to 255.
        levels = np.rint(np.asarray(image).astype(np.float64) * (255 / 65535))
        image = pillow.fromarray(levels.astype(np.uint8))
    if image.mode in ("F", "I"):
        kind = "float" if image.mode == "F" else "32-bit integer"
        raise ValueError(f"{kind} pixels have no known range; convert the file to 8 or 16 bits")
    if image.getbands()[-1] in ("A", "a") or "transparency" in image.info:
        canvas = pillow.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas.convert("RGB")
    return image.convert("RGB" if channels == 3 else "L")


def _sorted_entries(folder: str | Path) -> list[tuple[str, os.DirEntry[str]]]:
    """The folder's entries with their names in normal form C, sorted by it."""
    with os.scandir(folder) as entries:
        named = [(unicodedata.normalize("NFC", entry.name), entry) for entry in entries]
    return sorted(named, key=lambda item: (item[0], item[1].name))


def _same_classes(
    root: str | os.PathLike[str], found: Iterable[str], stored: Sequence[str]
) -> list[str]:
    """`stored` in normal form C. Raises ValueError unless `found` are the same names."""
    names = [unicodedata.normalize("NFC", name) for name in stored]
    missing = [name for name in names if name not in set(found)]
    extra = [name for name in found if name not in set(names)]
    if missing or extra or len(set(names)) < len(names):
        raise ValueError(
            f"root={str(root)!r} does not have the {len(names)} classes that were trained:"
            f" missing {_listed(missing)}; extra {_listed(extra)}"
        )
    return names


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:10])) or "none"
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('Reading images needs Pillow: pip install "fastdit[cli]"') from error
    return Image
