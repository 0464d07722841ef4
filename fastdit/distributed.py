"""The processes that `torchrun` has started, and how they agree."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Of this process; all processes of a run enter `world` equally often.
_turns = itertools.count()


class OtherProcessError(RuntimeError):
    """Another process of the run has raised; its error says why."""


@dataclass(frozen=True)
class World:
    """The processes of a run; `local_rank` counts those of this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def from_first(self, value: Any) -> Any:
        """`value` as the first process has it: what only one may decide, such as what lies on the disk."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gathered(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """`value` of every process, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group)
        return found

    def raise_together(
        self, error: BaseException | None, group: dist.ProcessGroup | None = None
    ) -> None:
        """Raises `error`, and in the other processes one that says whose it is; nothing where no process has one.

        A process that raised alone would leave the others waiting for it.
        """
        told = None if error is None else f"{type(error).__name__}: {error}"
        errors = self.gathered(told, group)
        if error is not None:
            raise error
        for rank, text in enumerate(errors):
            if text is not None:
                raise OtherProcessError(f"rank {rank}: {text}")


def started_by_torchrun() -> bool:
    """Whether the environment says of this process which of several it is."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


@contextmanager
def world(
    device: torch.device | None = None, timeout: timedelta = timedelta(days=7)
) -> Iterator[World]:
    """The processes that torchrun has started, or this one alone; for what follows they are one process group.

    With a CUDA `device` tensors on it travel by NCCL, everything else by gloo. Without one processes only wait for each
    other, and one may have much more to do than another, so the default `timeout` is long. A process may enter again
    after it has left, as often as all others do.
    """
    if not started_by_torchrun():
        yield World()
        return
    found = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    cuda = device is not None and device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    # Processes that are started again use the store of those before, as every turn does that of the turns before, and
    # would find their addresses in it.
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    store = dist.PrefixStore(f"start-{start}-turn-{next(_turns)}", store)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if cuda else None,
    )
    try:
        yield found
    finally:
        dist.destroy_process_group()
