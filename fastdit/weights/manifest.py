"""manifest.json: the names, sizes and SHA-256 of all files of a folder, written last. Without one it is not complete.

{"format": 1, "files": {"model.safetensors": {"size": 2700000000, "sha256": "…"}, …}, and what else is to be said}
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..files import read_json, write_json

NAME = "manifest.json"
FORMAT = 1


def write_manifest(folder: Path, record: Mapping[str, Any]) -> None:
    """Describes all files below `folder` in its manifest, with what else `record` says."""
    found = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / NAME
    }
    write_json(folder / NAME, {"format": FORMAT, **record, "files": found})


def problems(folder: Path, verify: Literal["size", "full"] = "full") -> list[str]:
    """What is wrong with the files of `folder`, each naming the file; empty if nothing is.

    "size" looks for missing and truncated files, "full" reads all of them and finds every bit that changed.
    """
    manifest = folder / NAME
    try:
        record = read_json(manifest)
    except FileNotFoundError:
        return [f"{manifest}: missing, so {folder.name} was never finished"]
    except ValueError as error:
        return [str(error)]
    if not _is_manifest(record):
        return [f"{manifest}: damaged, or not a manifest of format {FORMAT}"]
    wrong = []
    for name, expected in record["files"].items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{path}: missing")
        elif (size := path.stat().st_size) != expected["size"]:
            wrong.append(f"{path}: truncated or changed, {size} bytes of {expected['size']}")
        elif verify == "full" and (found := sha256(path)) != expected["sha256"]:
            wrong.append(
                f"{path}: damaged, SHA-256 {found[:12]}… instead of {expected['sha256'][:12]}…"
            )
    return wrong


def _is_manifest(record: Any) -> bool:
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        return False
    found = record.get("files")
    return isinstance(found, dict) and all(
        isinstance(each, dict)
        and isinstance(each.get("size"), int)
        and isinstance(each.get("sha256"), str)
        for each in found.values()
    )


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**22):
            digest.update(block)
        return digest.hexdigest()
