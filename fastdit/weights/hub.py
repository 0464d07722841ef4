"""Where weights are fetched from: the Hub, and the original's published files, which are kept in `cache_folder()`."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..files import PathLike, atomic_file, cache_folder


@dataclass(frozen=True)
class Published:
    """A file that the original's authors published. `sha256` is None where nobody has recorded it."""

    url: str
    sha256: str | None = None


# Source: facebookresearch/DiT, README; FID 2.27 and 3.04.
PUBLISHED = {
    name: Published(f"https://dl.fbaipublicfiles.com/DiT/models/{name}.pt")
    for name in ("DiT-XL-2-256x256", "DiT-XL-2-512x512")
}
LICENCE = "the weights of facebookresearch/DiT are licensed under CC-BY-NC 4.0, for non-commercial use only"

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CHUNK = 1 << 20


def locate_pretrained(path_or_name: PathLike) -> Path:
    """The file or folder of `path_or_name`: what is on the disk comes first, then published names, then the Hub.

    Raises FileNotFoundError for what is none of them, and ImportError for a name on the Hub without its package.
    """
    path = Path(path_or_name)
    if path.exists():
        return path
    name = os.fspath(path_or_name).removesuffix(".pt")
    if name in PUBLISHED:
        return download_published(name)
    if _HUB_NAME.fullmatch(os.fspath(path_or_name)) and path.suffix != ".safetensors":
        return download_from_hub(os.fspath(path_or_name))
    raise FileNotFoundError(
        f"{path_or_name}: no such file or folder; nor is it a published name ({', '.join(PUBLISHED)}) or one of the "
        "Hub (org/name)"
    )


def download_from_hub(name: str) -> Path:
    """The folder of `org/name`, with its JSON and safetensors files and nothing else."""
    hub = _hub(f"{name}: no such file or folder, and as a name on the Hub it")
    patterns = ["*.json", "*.safetensors", "transformer/*.json", "transformer/*.safetensors"]
    return Path(hub.snapshot_download(name, allow_patterns=patterns))


def upload(folder: PathLike, name: str, *, private: bool | None, message: str) -> str:
    """Uploads what lies in `folder` as the model `org/name`, which is made if need be; the address of the commit."""
    api = _hub("uploading").HfApi()
    api.create_repo(name, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message))


def download_published(name: str) -> Path:
    """The file of a name in `PUBLISHED`, downloaded if it is not in the cache. Raises OSError and ValueError."""
    published = PUBLISHED[name]
    target = cache_folder() / f"{name}.pt"
    if not target.exists():
        print(f"Downloading {published.url}; {LICENCE}", flush=True)
        with atomic_file(target) as temporary:
            found = _download(published.url, temporary)
            if published.sha256 not in (None, found):
                raise ValueError(
                    f"{published.url}: SHA-256 is {found}, expected {published.sha256}; the file is not kept"
                )
    return target


def _download(url: str, target: Path) -> str:
    """Writes what `url` holds to `target`, whole; its SHA-256."""
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=60) as response:
        if not response.url.startswith("https://"):
            raise OSError(f"{url}: led to {response.url}, which is not https")
        size = int(response.headers.get("Content-Length") or 0)
        with (
            open(target, "wb") as file,
            tqdm(total=size or None, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
            written = file.tell()
    if size and written != size:
        raise OSError(f"{url}: the connection ended after {written:,} of {size:,} bytes")
    return digest.hexdigest()


def _hub(what: str) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ModuleNotFoundError:
        raise ImportError(f'{what} needs huggingface_hub: pip install "fastdit[hub]"') from None
