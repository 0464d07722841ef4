"""Reading files of weights."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..files import PathLike


def load_weights(path: PathLike) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, under their names and in their dtypes.

    Raises FileNotFoundError, and ValueError in one line that names the file and what it is instead: truncated, empty, a
    web page, a Git LFS pointer, another format.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if file.is_dir():
        raise ValueError(f"{path}: expected a .safetensors file, this is a folder")
    with open(file, "rb") as opened:
        reason = _not_weights(opened.read(512))
    if reason:
        raise ValueError(f"{path}: {reason}")
    require_safetensors_ending(path)
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from None
    return tensors


def require_safetensors_ending(path: PathLike) -> None:
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: only .safetensors files are read and written")


def _not_weights(start: bytes) -> str | None:
    """Why a file that begins with `start` cannot be safetensors, or None."""
    text = start.lstrip().lower()
    if not start:
        return "the file is empty"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "this is a web page; the download did not give the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return (
            "this is a pickled PyTorch checkpoint; only .safetensors files are read; convert its state dict with "
            "fastdit.save_weights(torch.load(path, weights_only=True), 'x.safetensors')"
        )
    return None
