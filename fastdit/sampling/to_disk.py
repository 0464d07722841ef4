"""Many images to disk: block by block, by any number of processes, going on after a kill.

    OUT.parts/plan.json       what is drawn
    OUT.parts/00000012.npy    the images of block 12, uint8 (n, H, W, C); there whole or not at all

Block b holds the images b * batch_size ... and draws its noise from a generator of its own, so it does not matter which
process draws it, or when. When all blocks are there they become OUT, and the parts are removed. Parts without a plan
belong to nothing, and are removed before one is written.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..distributed import World
from ..files import atomic_file, read_json, write_json
from .graphs import CAPTURING
from .outputs import Images, output_kind, to_uint8, write_samples
from .sample import Sampler

DECODED_TOGETHER = 16  # images; a decoder at 256 pixels takes about 0.2 GB for each
PIECE = 2**24  # numbers of a tensor that are hashed at once


def draw_to_disk(
    sampler: Sampler,
    labels: Sequence[int],
    out: str,
    *,
    plan: dict[str, Any],
    decode: Callable[[Tensor], Tensor],
    cfg_scale: float,
    seed: int,
    batch_size: int,
    among: World,
    progress: bool = True,
) -> None:
    """Draws an image for each label and writes them as `write_samples` does.

    `plan` is all that decides what they look like: parts that an earlier run left are taken where it had the same.
    `decode` makes images of what the sampler draws; it runs beside the drawing of the next block.

    Raises FileExistsError naming what differs where OUT.parts is of another plan, and what sampling and writing raise.
    """
    output_kind(out)
    parts = Path(f"{out}.parts")
    drawn = sampler.blocks(
        labels,
        cfg_scale=cfg_scale,
        seed=seed,
        batch_size=batch_size,
        only=lambda b: b % among.size == among.rank and not _part(parts, b).exists(),
        progress=progress and among.rank == 0,
    )
    if among.rank == 0:
        _begin(parts, plan)
    among.barrier()
    blocks = range((len(labels) + batch_size - 1) // batch_size)
    with _Writer(parts, decode) as writer:
        for start, images in drawn:
            writer.put(start // batch_size, images)
    among.barrier()
    if among.rank == 0:
        write_samples(_Parts([_part(parts, b) for b in blocks]), labels, out)
        # It loses its name before its content, so that parts are never found without their plan.
        shutil.rmtree(parts.rename(_removed(parts)), ignore_errors=True)
    among.barrier()


def weights_digest(model: nn.Module) -> str:
    """64 hexadecimal digits: SHA-256 of the model's parameters and buffers, of their names, dtypes, shapes and bytes.

    The same on every device. Tensors are hashed side by side, and copied to the CPU in pieces.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def of_one(tensor: Tensor) -> str:
        digest = hashlib.sha256()
        for piece in tensor.detach().reshape(-1).split(PIECE):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    whole = hashlib.sha256()
    with ThreadPoolExecutor(8) as threads:
        for (name, tensor), digits in zip(
            tensors.items(), threads.map(of_one, tensors.values()), strict=True
        ):
            whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {digits}\n".encode())
    return whole.hexdigest()


def _begin(parts: Path, plan: dict[str, Any]) -> None:
    shutil.rmtree(_removed(parts), ignore_errors=True)
    parts.mkdir(parents=True, exist_ok=True)
    file = parts / "plan.json"
    if file.exists():
        before = read_json(file)
        differing = [
            f"{name}={_short(before.get(name))} and not {_short(plan.get(name))}"
            for name in {**plan, **before}
            if before.get(name) != plan.get(name)
        ]
        if differing:
            raise FileExistsError(
                f"{parts}: holds parts of other images, with {', '.join(differing)}; remove it, or choose another out"
            )
    else:
        for path in parts.glob("[0-9]" * 8 + "*.npy"):
            path.unlink()
        write_json(file, plan)
    for path in parts.glob(".tmp-*"):
        path.unlink()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _removed(parts: Path) -> Path:
    return parts.with_name(f".tmp-{parts.name}-removed")


class _Parts(Sequence[Images]):
    """The images of all blocks, of which each is opened when it is its turn: a process may have few files open."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, block: Any) -> Any:
        return np.load(self.files[block], mmap_mode="r", allow_pickle=False)


def _part(parts: Path, block: int) -> Path:
    return parts / f"{block:08d}.npy"


class _Writer:
    """Decodes and writes in a thread, on a CUDA device on a stream of its own, at most one block behind."""

    def __init__(self, parts: Path, decode: Callable[[Tensor], Tensor]) -> None:
        self.parts, self.decode = parts, decode
        self.threads = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None
        self.stream: torch.cuda.Stream | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self.threads.shutdown()

    def put(self, block: int, images: Tensor) -> None:
        self._wait()
        ready = None
        if images.is_cuda:
            self.stream = self.stream or torch.cuda.Stream(images.device)
            ready = torch.cuda.current_stream(images.device).record_event()
            images.record_stream(self.stream)
        self.pending = self.threads.submit(self._write, block, images, ready)

    def _wait(self) -> None:
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def _write(self, block: int, images: Tensor, ready: Any) -> None:
        with (
            CAPTURING,
            torch.cuda.stream(self.stream) if self.stream is not None else nullcontext(),
        ):
            if self.stream is not None:
                self.stream.wait_event(ready)
            with torch.no_grad():
                decoded: list[Images] = [
                    to_uint8(self.decode(some)) for some in images.split(DECODED_TOGETHER)
                ]
        with atomic_file(_part(self.parts, block)) as temporary, open(temporary, "wb") as file:
            np.save(file, np.concatenate(decoded), allow_pickle=False)
