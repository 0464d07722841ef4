"""A CUDA graph in small, on the CPU: the operators of a step, run again on the recorded tensors.

As with a real one, no Python runs in a replay: numbers are those of the recording, and so are addresses. What a step
leaves behind is overwritten between the replays, so that nothing old is read by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoSync(TorchDispatchMode):
    """Refuses what waits for the device, or reads the host's memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        for forbidden in (
            "_local_scalar_dense",
            "aten.nonzero",
            "aten.item",
            "aten.equal",
            "lift_fresh",
        ):
            if forbidden in name:
                raise AssertionError(f"{name} in a step")
        return func(*args, **(kwargs or {}))


class _Recorder(NoSync):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        storages = {
            _storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        fresh = [leaf for leaf in made if _storage(leaf) not in storages]
        self.calls.append((func, args, kwargs or {}, fresh))
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Recording:
    """In place of `CudaGraph`. `made` are all there are; `fail` makes the next ones raise."""

    devices = ("cpu",)
    made: ClassVar[list[Recording]] = []
    fail: ClassVar[bool] = False

    def __init__(
        self, function: Callable[[], None], reset: Callable[[], None], device: torch.device
    ) -> None:
        reset()
        function()
        if Recording.fail:
            raise RuntimeError("out of memory")
        recorder = _Recorder()
        with recorder:
            function()
        self.calls = recorder.calls
        self.replays = 0
        self.released = False
        Recording.made.append(self)

    def replay(self) -> None:
        assert not self.released
        self.replays += 1
        self._poison()
        for func, args, kwargs, fresh in self.calls:
            out = func(*args, **kwargs)
            found = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            if fresh:
                assert len(found) == len(fresh)
                for kept, new in zip(fresh, found, strict=True):
                    kept.copy_(new)
        self._poison()

    def release(self) -> None:
        self.released = True

    def _poison(self) -> None:
        for *_, fresh in self.calls:
            for tensor in fresh:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)
