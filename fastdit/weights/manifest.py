"""manifest.json: the names, sizes and SHA-256 of all files of a folder, written last. Without one it is not complete.

{"format": 1, "files": {"model.safetensors": {"size": 2700000000, "sha256": "…"}, …}, and what else is to be said}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from ..files import read_json, sha256, write_json

NAME = "manifest.json"
FORMAT = 1


def write_manifest(folder: Path, record: Mapping[str, Any]) -> None:
    """Describes all files below `folder` in its manifest, with what else `record` says."""
    every = sorted(folder.rglob("*"))
    paths = [path for path in every if path.is_file() and path != folder / NAME]
    found = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, sha256(paths), strict=True)
    }
    write_json(folder / NAME, {"format": FORMAT, **record, "files": found})


def problems(
    folder: Path, verify: Literal["size", "full"] = "full", only: Collection[str] | None = None
) -> list[str]:
    """What is wrong with the files of `folder`, or with `only` those; each names the file; empty if nothing is.

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
    whole: dict[Path, str] = {}
    for name, expected in record["files"].items():
        if only is not None and name not in only:
            continue
        path = folder / name
        if not path.is_file():
            wrong.append(f"{path}: missing")
        elif (size := path.stat().st_size) != expected["size"]:
            wrong.append(f"{path}: truncated or changed, {size} bytes of {expected['size']}")
        else:
            whole[path] = expected["sha256"]
    if verify == "full":
        for (path, digest), found in zip(whole.items(), sha256(list(whole)), strict=True):
            if found != digest:
                wrong.append(f"{path}: damaged, SHA-256 {found[:12]}… instead of {digest[:12]}…")
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
