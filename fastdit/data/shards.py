"""Images in tar files, as webdataset packs them, with every image at hand by its number.

    root/000000.tar:  n0001.jpg n0001.cls n0002.jpg n0002.cls ...      root/classes.json:  ["tench", "goldfish", ...]

A sample is the members of one name (up to the first dot of its last part): an image, and its label as a whole number in
`.cls`, or as "label" in `.json`. Where every image lies in its tar is found once, from the headers alone, and kept in
the cache folder; an image is then one read at a known place. So the order of a run is exact, global, and resumable,
as with folders, and needs no buffer to shuffle in.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..files import cache_folder, read_json, write_text
from .classes import renumbering
from .decoding import SUFFIXES
from .images import Images, sorted_entries

logger = logging.getLogger(__name__)

BLOCK = 512  # bytes; everything in a tar begins at a multiple of it
MAX_PADDING = 2**20  # bytes of zeros after the end; tar pads to 10 KiB, others to more
MAX_LABEL_FILE = 2**20  # bytes of a .cls or .json member
MAX_LABEL = 2**20  # each makes a row of the label table
INDEX_FORMAT = 1


class TarShards(Images):
    """The images in all `root/*.tar`, in the order of file names and of members. Items, and bad images: see `Images`.

    Members that belong to no image, links, and hidden files are left out and counted in `ignored`.

    Arguments:
        classes: the class names that a checkpoint was trained with. The same names must be there; labels are their
            positions in this list. The names are those in `classes.json`, a list, or else "0" up to the largest label.

    Raises ValueError naming the tar, and the sample where one is at fault: a tar that is truncated, damaged, compressed
    or holds no sample; a sample without a label or an image, with two of them, or with a label outside of the classes.
    ImportError without Pillow; OSError where a tar cannot be read, or was changed since it was opened.
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
        self.tars = [
            entry.path
            for name, entry in sorted_entries(self.root)
            if is_tar(name) and entry.is_file()
        ]
        if not self.tars:
            raise ValueError(f"root={str(root)!r}: holds no *.tar")
        indices = [_index(path) for path in self.tars]
        self._states = [(index["bytes"], index["mtime_ns"]) for index in indices]
        self.ignored = sum(index["ignored"] for index in indices)
        # Arrays, because lists of a million names and numbers would be copied into every worker.
        counts = [len(index["members"]) for index in indices]
        self._tar = np.repeat(np.arange(len(indices), dtype=np.int32), counts)
        self._offsets = np.concatenate([np.array(i["offsets"], dtype=np.int64) for i in indices])
        self._sizes = np.concatenate([np.array(i["sizes"], dtype=np.int64) for i in indices])
        self._members = np.array([os.fsencode(name) for i in indices for name in i["members"]])
        found = [label for index in indices for label in index["labels"]]

        where = f"root={str(root)!r}"
        names = _class_names(self.root, max(found))
        for index, label in enumerate(found):
            if label >= len(names):
                raise ValueError(
                    f"{self.name(index)}: label {label}, allowed are 0 to {len(names) - 1}"
                    f" for the {len(names)} classes of {self.root / 'classes.json'}"
                )
        if empty := sorted(set(range(len(names))) - set(found)):
            logger.warning(
                "%s: %d of %d classes have no image, the first is %r",
                where,
                len(empty),
                len(names),
                names[empty[0]],
            )
        self.classes, renumbered = renumbering(where, names, classes)
        self.labels = [renumbered[label] for label in found]

    def key(self, index: int) -> str:
        name = unicodedata.normalize("NFC", os.path.basename(self._path(index)))
        return f"{name}/{self._member(index)}"

    def name(self, index: int) -> str:
        return f"{self._path(index)}: {self._member(index)}"

    def read(self, index: int) -> bytes:
        path, size = self._path(index), int(self._sizes[index])
        # Opened for each image: there can be more tars than a process may have open files.
        with open(path, "rb") as file:
            if _state(file) != self._states[self._tar[index]]:
                raise OSError(errno.ESTALE, "The tar was changed since it was opened", path)
            file.seek(int(self._offsets[index]))
            try:
                data = file.read(size)
            except OSError as error:
                raise OSError(error.errno, error.strerror, path) from error
        if len(data) < size:
            raise OSError(errno.EIO, f"{len(data)} bytes of {size} could be read", path)
        return data

    def _path(self, index: int) -> str:
        return self.tars[self._tar[index]]

    def _member(self, index: int) -> str:
        return os.fsdecode(self._members[index])


def is_tar(name: str) -> bool:
    return name.lower().endswith(".tar") and not name.startswith(".")


def _class_names(root: Path, largest: int) -> list[str]:
    path = root / "classes.json"
    if not path.exists():
        return [str(label) for label in range(largest + 1)]
    names = read_json(path)
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{path}: expected a list of class names")
    names = [unicodedata.normalize("NFC", name) for name in names]
    [(name, times)] = Counter(names).most_common(1)
    if times > 1:
        raise ValueError(f"{path}: {times} classes are named {name!r}")
    return names


# ------------------------------------------------------------------ the index


def _index(path: str) -> dict[str, Any]:
    """What `_make_index` finds in the tar, kept in the cache folder while the tar has its size and time."""
    name = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:32]
    folder = cache_folder() / "tars"
    cached = folder / f"{name}.json"
    with open(path, "rb") as file:
        size, mtime_ns = _state(file)
        state = {"format": INDEX_FORMAT, "bytes": size, "mtime_ns": mtime_ns}
        if (index := _kept_index(cached, state)) is not None:
            return index
        index = {**state, **_make_index(path, file)}
    try:
        folder.mkdir(exist_ok=True)
        write_text(cached, json.dumps(index))
    except OSError as error:
        logger.warning("%s: its index could not be kept: %s", path, error)
    return index


def _kept_index(cached: Path, state: dict[str, Any]) -> dict[str, Any] | None:
    """The index, if it is there, undamaged, and of the tar as it is now."""
    try:
        index = read_json(cached)
    except (OSError, ValueError):  # not there yet, or damaged
        return None
    if isinstance(index, dict) and state.items() <= index.items():
        return index
    return None


def _make_index(path: str, file: BinaryIO) -> dict[str, Any]:
    """Where the images of a tar lie, and their labels: equally long lists `members`, `offsets`, `sizes`, `labels`."""
    images: dict[str, tuple[str, int, int]] = {}  # sample, then the member's name, offset and size
    labels: dict[str, dict[str, int | None]] = {}  # sample, then ".cls" or ".json"
    ignored = 0
    for member in _members(path, file):
        if member.isdir():
            continue
        folder, _, last = member.name.rpartition("/")
        stem, dot, ending = last.partition(".")
        ending = dot + ending.lower()
        sample = f"{folder}/{stem}" if folder else stem
        if not stem or not member.isreg() or ending not in (*SUFFIXES, ".cls", ".json"):
            ignored += 1
            continue
        if member.issparse():
            raise ValueError(f"{path}: sample {sample!r}: {member.name!r} is a sparse file")
        if ending in SUFFIXES:
            if sample in images:
                raise ValueError(
                    f"{path}: sample {sample!r}: two images, {images[sample][0]!r} and {member.name!r}"
                )
            images[sample] = (member.name, member.offset_data, member.size)
        else:
            found = labels.setdefault(sample, {})
            if ending in found:
                raise ValueError(f"{path}: sample {sample!r}: {member.name!r} is there twice")
            found[ending] = _label(path, sample, member, file)
    for sample, found in labels.items():
        if sample not in images and ".cls" in found:
            raise ValueError(f"{path}: sample {sample!r}: a label and no image")
        ignored += sample not in images
    if not images:
        raise ValueError(f"{path}: holds no sample, an image ({' '.join(SUFFIXES)}) with a .cls")
    chosen = []
    for sample in images:
        known = [label for label in labels.get(sample, {}).values() if label is not None]
        if not known:
            raise ValueError(f'{path}: sample {sample!r}: no label, in .cls or as "label" in .json')
        if len(set(known)) > 1:
            raise ValueError(f"{path}: sample {sample!r}: two labels, {known[0]} and {known[1]}")
        chosen.append(known[0])
    return {
        "members": [name for name, _, _ in images.values()],
        "offsets": [offset for _, offset, _ in images.values()],
        "sizes": [size for _, _, size in images.values()],
        "labels": chosen,
        "ignored": ignored,
    }


def _members(path: str, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """All members. Raises ValueError unless the tar goes to its end mark, and has nothing behind it."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                yield member
                tar.members.clear()  # type: ignore[attr-defined]  # It keeps them all, a kilobyte each.
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not an uncompressed tar, or truncated: {error}") from error
    # tarfile also stops, and says nothing, at a damaged header and where the file ends between two members.
    file.seek(end)
    mark = file.read(BLOCK)
    if len(mark) < BLOCK:
        raise ValueError(f"{path}: truncated: it ends at byte {end} without its end mark")
    if any(mark):
        raise ValueError(f"{path}: damaged at byte {end}: expected a member or the end")
    if any(file.read(MAX_PADDING)) or file.read(1):
        raise ValueError(f"{path}: holds more after its end at byte {end}; tars cannot be chained")


def _label(path: str, sample: str, member: tarfile.TarInfo, file: BinaryIO) -> int | None:
    """The label in a `.cls` or `.json` member; None where JSON holds no "label"."""
    if member.size > MAX_LABEL_FILE:
        raise ValueError(f"{path}: sample {sample!r}: {member.name!r} has {member.size} bytes")
    file.seek(member.offset_data)
    data = file.read(member.size)
    label: Any = None
    if member.name.lower().endswith(".cls"):
        text = data.decode("utf-8", "replace").strip()
        label = int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else text
    else:
        try:
            record = json.loads(data)
        except ValueError as error:
            raise ValueError(
                f"{path}: sample {sample!r}: {member.name!r} is not valid JSON: {error}"
            ) from error
        if not isinstance(record, dict) or "label" not in record:
            return None
        label = record["label"]
    if type(label) is not int or not 0 <= label <= MAX_LABEL:
        raise ValueError(
            f"{path}: sample {sample!r}: label {label!r} in {member.name!r}, expected a whole number"
            f" from 0 to {MAX_LABEL}"
        )
    return label


def _state(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns
