"""Many images to disk: block by block, by any number of processes, going on after a kill.

    OUT.parts/plan.json       what is drawn
    OUT.parts/00000012.npy    the images of block 12, uint8 (n, H, W, C); there whole or not at all

Block b holds the images b * batch_size ... and draws its noise from a generator of its own, so it does not matter which
process draws it, or when. When all blocks are there they become OUT, and the parts are removed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed import World
from ..files import atomic_file, read_json, write_json
from .outputs import Images, output_kind, to_uint8, write_samples
from .sample import Sampler

DECODED_TOGETHER = 16  # images; a decoder at 256 pixels takes about 0.2 GB for each


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

    Raises FileExistsError where OUT.parts is of another plan, and what sampling and writing raise.
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
        files = [_part(parts, b) for b in blocks]
        read = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
        write_samples(read, labels, out)
        shutil.rmtree(parts)
    among.barrier()


def _begin(parts: Path, plan: dict[str, Any]) -> None:
    parts.mkdir(parents=True, exist_ok=True)
    file = parts / "plan.json"
    if not file.exists():
        write_json(file, plan)
        return
    before = read_json(file)
    for name, value in plan.items():
        if before.get(name) != value:
            raise FileExistsError(
                f"{parts}: holds parts of other images, with {name}={before.get(name)!r} and not {value!r}; remove it, "
                "or choose another out"
            )
    for path in parts.glob(".tmp-*"):
        path.unlink()


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
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            if self.stream is not None:
                self.stream.wait_event(ready)
            with torch.no_grad():
                decoded: list[Images] = [
                    to_uint8(self.decode(some)) for some in images.split(DECODED_TOGETHER)
                ]
        with atomic_file(_part(self.parts, block)) as temporary, open(temporary, "wb") as file:
            np.save(file, np.concatenate(decoded), allow_pickle=False)
