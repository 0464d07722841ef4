"""Images on disk as training items, and folders of them, with errors that name the file."""

from __future__ import annotations

import logging
import os
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from ..validation import require_choice
from .classes import same_classes
from .decoding import SUFFIXES, BadImage, decode_image, require_pillow
from .sampler import Key, is_flipped, split_key

logger = logging.getLogger(__name__)


class Images(Dataset[tuple[Tensor, int]], ABC):
    """Encoded images with labels, of which a subclass knows where they lie.

    `dataset[index, epoch]` gives (image float32 (channels, image_size, image_size) in [-1, 1], label), `dataset[index]`
    that of epoch 0. The image is `center_crop`ped, and flipped from left to right for half of all (seed, epoch, index):
    a pure function of the three, so that neither workers nor a resume change it.

    Pixels: `channels=3` is RGB, `channels=1` is luminance. Transparent images are laid on white, 16-bit grey is scaled
    to 8 bits, animations give their first frame. EXIF rotation and colour profiles are not applied, as in the original.

    `on_bad_image` is what an image does that cannot be decoded, is smaller than 8 pixels, has float or 32-bit pixels,
    or more pixels than `PIL.Image.MAX_IMAGE_PIXELS`. `"error"` raises ValueError with its name. `"skip"` gives the next
    good image (with its label) instead, logs one warning per image, and lists it in `skipped`, a dict from name to
    reason. A worker process of a DataLoader has its own `skipped`.
    """

    space = "pixels"
    classes: list[str]
    labels: list[int]

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_size: int,
        *,
        channels: int,
        horizontal_flip: bool,
        seed: int,
        on_bad_image: str,
    ) -> None:
        require_pillow()  # Missing it should show here, not in the first worker.
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
        if not self.root.exists():
            raise ValueError(f"root={str(root)!r}: no such folder")
        if not self.root.is_dir():
            raise ValueError(f"root={str(root)!r}: expected a folder, this is a file")

    @abstractmethod
    def key(self, index: int) -> str:
        """Where the image lies within `root`, with `/` between folders: the same on every machine."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Where the image lies, for messages."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The image file. Raises OSError naming it."""

    def load(self, index: int) -> Tensor:
        """The image at `index`, float32 (channels, image_size, image_size), never flipped. Raises BadImage."""
        return decode_image(self.read(index), self.name(index), self.channels, self.image_size)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        index, epoch = split_key(key, len(self))
        image, used = self._good_image(index)
        if self.horizontal_flip and is_flipped(self.seed, epoch, index):
            image = image.flip(-1)
        return image.contiguous(), self.labels[used]

    def _good_image(self, index: int) -> tuple[Tensor, int]:
        """The image at `index`, or with `"skip"` at the next index that has a good one; and that index."""
        for offset in range(len(self)):
            used = (index + offset) % len(self)
            if self.skipped and self.name(used) in self.skipped:
                continue
            try:
                return self.load(used), used
            except BadImage as error:
                if self.on_bad_image == "error":
                    raise
                self.skipped[error.name] = str(error)
                logger.warning("Skipped: %s", error)
        raise ValueError(f"root={str(self.root)!r}: none of the {len(self)} images can be used")


class ImageFolder(Images):
    """Images in class folders: `root/<class>/…/<image>`. Items, and what bad images do: see `Images`.

    Classes are the folders in `root`, sorted by name in Unicode's normal form C, so that machines with different file
    systems number them alike. Images are the files below them with one of `SUFFIXES`, in upper or lower case. Hidden
    files and folders, other files, and links to a folder they lie in are left out and counted in `ignored`.

    Arguments:
        classes: the class names that a checkpoint was trained with. The same names must be there; labels are their
            positions in this list.

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
        super().__init__(
            root,
            image_size,
            channels=channels,
            horizontal_flip=horizontal_flip,
            seed=seed,
            on_bad_image=on_bad_image,
        )
        folders = self._class_folders()
        where = f"root={str(root)!r}"
        self.classes = list(folders) if classes is None else same_classes(where, folders, classes)
        self.paths: list[str] = []
        self.labels = []
        for label, name in enumerate(self.classes):
            paths = list(self._images_below(folders[name], (os.path.realpath(root),)))
            if not paths:
                raise ValueError(
                    f"{where}: class folder {folders[name]!r} holds no image"
                    f" ({' '.join(SUFFIXES)}); remove the folder or fill it"
                )
            self.paths += paths
            self.labels += [label] * len(paths)

    def key(self, index: int) -> str:
        inside = self.paths[index].removeprefix(str(self.root)).replace(os.sep, "/")
        return unicodedata.normalize("NFC", inside.removeprefix("/"))

    def name(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> bytes:
        path = self.paths[index]
        try:
            return Path(path).read_bytes()
        except OSError as error:  # A failing read, unlike a failing open, does not name the file.
            raise OSError(error.errno, error.strerror, path) from error

    def _class_folders(self) -> dict[str, str]:
        """Class name to folder path, in the order of the labels."""
        root = f"root={str(self.root)!r}"
        folders: dict[str, str] = {}
        for name, entry in sorted_entries(self.root):
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
        for name, entry in sorted_entries(folder):
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


def sorted_entries(folder: str | Path) -> list[tuple[str, os.DirEntry[str]]]:
    """The folder's entries with their names in normal form C, sorted by it."""
    with os.scandir(folder) as entries:
        named = [(unicodedata.normalize("NFC", entry.name), entry) for entry in entries]
    return sorted(named, key=lambda item: (item[0], item[1].name))
