"""What was measured: the seconds of every backend by GPU, dtype, shape and direction.

One JSON file a device: those that are shipped lie beside this file, those of `save` in the folder `attention` of
`fastdit.files.cache_folder`, and theirs go first. Batches are rounded up to powers of two.

Directions: `inference` is a forward without gradients; `training` a forward and a backward that gives the same bits
every time; `training, any order` one that need not.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..files import cache_folder, read_json, write_json

SCHEMA = 1
DIRECTIONS = ("inference", "training", "training, any order")
HERE = Path(__file__).resolve().parent
LARGEST_BUCKET = 1 << 16


class Key(NamedTuple):
    """What was measured of a device."""

    dtype: str  # without "torch."
    batch: int  # a bucket
    tokens: int  # T
    keys: int  # S
    heads: int
    head_dim: int
    direction: str


Entries = dict[Key, dict[str, float]]  # seconds by backend

_read: dict[str, Entries] = {}
_reading = threading.Lock()


def bucket(batch: int) -> int:
    """`batch` rounded up to a power of two."""
    size = 1
    while size < batch and size < LARGEST_BUCKET:
        size *= 2
    return size


def direction(training: bool, deterministic: bool) -> str:
    """Which of `DIRECTIONS`."""
    if not training:
        return "inference"
    return "training" if deterministic else "training, any order"


def device_name(device: torch.device) -> str:
    """What the driver calls the GPU; "cpu" for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def entries(device: str) -> Entries:
    """What is known of a device; read once, until `save` adds to it.

    Raises ValueError naming the file for one that is none of these.
    """
    with _reading:  # `forget` waits, so that nothing is kept that was read before a `save`
        if device not in _read:
            found: Entries = {}
            for folder in filter(None, (HERE, _own_folder())):
                path = folder / file_name(device)
                if path.exists():
                    found |= _from_json(path, device)
            _read[device] = found
        return _read[device]


def fastest(device: str, key: Key) -> list[str]:
    """The backends that were measured there, the fastest first; none if there is no measurement."""
    seconds = entries(device).get(key, {})
    return sorted(seconds, key=lambda backend: seconds[backend])


def save(
    device: str, measured: Iterable[tuple[Key, str, float]], folder: Path | None = None
) -> Path:
    """Adds (key, backend, seconds) to the device's file in `folder`, by default this user's; the file.

    What is measured of a key replaces all that was known of it.
    """
    found: Entries = {}
    for key, backend, seconds in measured:
        found.setdefault(key, {})[backend] = seconds
    folder = cache_folder() / "attention" if folder is None else folder
    folder.mkdir(exist_ok=True)
    path = folder / file_name(device)
    known = _from_json(path, device) if path.exists() else {}
    rows = [{**key._asdict(), "seconds": seconds} for key, seconds in (known | found).items()]
    write_json(
        path,
        {"schema": SCHEMA, "device": device, "torch": torch.__version__, "entries": rows},
    )
    forget()
    return path


def forget() -> None:
    """The files are read again."""
    with _reading:
        _read.clear()


def _own_folder() -> Path | None:
    try:
        return cache_folder() / "attention"
    except OSError as error:
        warnings.warn(f"fastdit: no measurements of your own: {error}", stacklevel=2)
        return None


def _from_json(path: Path, device: str) -> Entries:
    document = read_json(path)
    wrong = f"{path}: expected measurements of {device!r} in schema {SCHEMA}"
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(wrong)
    if document.get("device") != device:
        raise ValueError(f"{wrong}, it is of {document.get('device')!r}")
    try:
        return {_key(row): _seconds(row["seconds"]) for row in document["entries"]}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{wrong}: {type(error).__name__}: {error}") from error


def _key(row: dict[str, Any]) -> Key:
    key = Key(**{name: row[name] for name in Key._fields})
    if key.direction not in DIRECTIONS:
        raise ValueError(f"direction={key.direction!r}")
    return key


def _seconds(seconds: dict[str, Any]) -> dict[str, float]:
    return {str(backend): float(value) for backend, value in seconds.items()}
