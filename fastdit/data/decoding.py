"""From the bytes of an image file to pixels, cropped as the original DiT crops them."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

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


class BadImage(ValueError):
    """An image that cannot be used: its `name` and the `reason`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that it can come from a worker process
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        # The name of a file need not be text; what is printed has to be.
        name = self.name.encode("utf-8", "backslashreplace").decode()
        return f"{name}: not a usable image: {self.reason}"


def decode_image(data: bytes, name: str, channels: int, size: int) -> Tensor:
    """The image in `data`, centre-cropped: float32 (channels, size, size) in [-1, 1].

    `channels=3` is RGB, `channels=1` is luminance. Raises BadImage.
    """
    pillow = require_pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            image = pillow.open(io.BytesIO(data))
        _require_size(image, size)
        image = _convert(image, channels)
    except (*DAMAGED, pillow.DecompressionBombWarning, pillow.DecompressionBombError) as error:
        reason = str(error) or type(error).__name__
        if not data:
            reason = "the file is empty"
        elif isinstance(error, pillow.UnidentifiedImageError):
            reason = "an unknown or damaged format"  # Pillow's own words name a buffer in memory
        raise BadImage(name, reason) from error
    pixels = np.array(center_crop(image, size)).reshape(size, size, channels)
    # Bit for bit the original's (x / 255 - 0.5) / 0.5: factors of two do not round.
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div(127.5).sub(1)


def center_crop(image: Image, size: int) -> Image:
    """The (size, size) centre of `image`, scaled so that its shorter side is `size`.

    While the shorter side is at least 2 * size the image is halved with a box filter; then one bicubic step scales it
    to exactly `size`. This is the crop of ADM (Dhariwal & Nichol, arXiv 2105.05233) with which DiT was trained.
    """
    resampling = require_pillow().Resampling
    while min(image.size) >= 2 * size:
        width, height = image.size
        image = image.resize((width // 2, height // 2), resample=resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), resample=resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def require_pillow() -> Any:
    """The module PIL.Image. Raises ImportError, which names the extra, without Pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('Reading images needs Pillow: pip install "fastdit[cli]"') from error
    return Image


def _require_size(image: Image, size: int) -> None:
    width, height = image.size
    if min(image.size) < MIN_SIDE:
        raise ValueError(f"{width}x{height} pixels, both sides must have at least {MIN_SIDE}")
    # A long thin image is small, but becomes huge where its short side is scaled up.
    limit = require_pillow().MAX_IMAGE_PIXELS
    pixels = max(image.size) * size * size // min(image.size)
    if limit is not None and pixels > limit:
        raise ValueError(
            f"{width}x{height} pixels scaled to a shorter side of {size} are {pixels} pixels,"
            f" more than PIL.Image.MAX_IMAGE_PIXELS={limit}"
        )


def _convert(image: Image, channels: int) -> Image:
    pillow = require_pillow()
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
