"""`Sampler`: the loop of sampling, step by step or as replays of one CUDA graph.

What depends on timestep and label alone (the modulation of every block) is computed once for a chunk of steps, for the
labels that differ, by the blocks' own layers; a step picks its rows. The step itself is the model, and one update that
does guidance, the posterior, and noise. Steps count themselves on the device, and noise lies in memory before it is
needed. So one recorded step runs all of them, and gives the same bits as the same step without a recording.

Nothing is kept from one call to the next but recordings, and those read the weights where they lie: weights that are
changed in place are simply read; weights, modules and their plain attributes that were replaced are noticed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..backend import active_backend
from ..models import DiT
from ..validation import autocast_enabled
from .graphs import CudaGraph, contents, reasons_not_replayable, switches
from .noise import Noise
from .samplers import Steps

CHUNK = 16  # steps whose noise lies ready
TABLE_BYTES = 512 * 2**20  # of modulations that lie ready
FEWEST_STEPS = 8  # for which recording one pays


@dataclass
class Buffers:
    """The static memory of a block of N images; a recorded step reads and writes here alone.

    x (N, C, H, W), the state; memory like x, for samplers that need one; noise (CHUNK, N, C, H, W); cfg_scale (N,), in
    the state's dtype; labels (N,), or (2N,) guided; rows like labels: where a label's modulations are among those of
    one timestep; modulations (chunk * distinct labels, W); step, position (1,): the sampler's step, counting down, and
    how many were made.
    """

    x: Tensor
    memory: Tensor | None
    noise: Tensor | None
    cfg_scale: Tensor
    labels: Tensor
    rows: Tensor
    modulations: Tensor | None
    step: Tensor
    position: Tensor
    distinct: int
    chunk: int


class Engine:
    """Runs blocks of one model and sampler, one at a time, and keeps what it recorded."""

    capture = CudaGraph

    def __init__(
        self,
        model: DiT,
        steps: Steps,
        *,
        cfg_channels: Literal[3, "all"],
        guided: Sequence[bool],
        cuda_graph: Literal["auto"] | bool,
        largest_number_of_graphs: int,
    ) -> None:
        """`guided`: of every step, whether it is."""
        self.model, self.steps = model, steps
        self.cfg_channels, self.guided = cfg_channels, guided
        self.cuda_graph, self.largest_number_of_graphs = cuda_graph, largest_number_of_graphs
        self.recorded: dict[tuple[Any, ...], tuple[Buffers, dict[bool, CudaGraph]]] = {}
        self.said: set[str] = set()

    def release(self) -> None:
        """Gives back all recordings and their memory."""
        # All together: libraries keep work space in the pool of the first recording.
        for _, graphs in self.recorded.values():
            for graph in graphs.values():
                graph.release()
        self.recorded.clear()

    def block(
        self,
        labels: Tensor,
        cfg_scale: Tensor | None,
        noise: Noise,
        dtype: torch.dtype,
        bar: tqdm[Any],
        trajectory: list[Tensor] | None = None,
    ) -> Tensor:
        """Images (N, C, H, W) for labels (N,); `cfg_scale` (N,), or None for no guidance.

        `noise` gives x_T and each step's noise; `trajectory` collects copies of the states.
        """
        with self._capture_ready():
            guided = [cfg_scale is not None and each for each in self.guided]
            modulated = isinstance(self.model, DiT) and self.model.takes_modulation()
            key = self._key(labels, cfg_scale is not None, modulated, dtype)
            if key is None:
                buffers, graphs = self._allocate(labels, cfg_scale, modulated, dtype), None
            else:
                if key not in self.recorded:
                    if len(self.recorded) >= self.largest_number_of_graphs:
                        self.release()
                    buffers = self._allocate(labels, cfg_scale, modulated, dtype)
                    self.recorded[key] = (buffers, {})
                buffers, graphs = self.recorded[key]
                if not self._record(buffers, graphs, sorted(set(guided))):
                    self.recorded.pop(key)
                    graphs = None
            self._begin(buffers, labels, cfg_scale, noise, modulated)
            if trajectory is not None:
                trajectory.append(buffers.x.clone())
            for position in range(len(guided)):
                self._prepare(buffers, position, noise)
                with_guidance = guided[len(guided) - 1 - position]
                if graphs is None:
                    self._step(buffers, with_guidance)
                else:
                    graphs[with_guidance].replay()
                if trajectory is not None:
                    trajectory.append(buffers.x.clone())
                bar.update(len(labels))
            return buffers.x.clone()

    # ------------------------------------------------------------------ one step

    def _step(self, buffers: Buffers, guided: bool) -> None:
        """x_t to x_{t-1} in `buffers`. Reads nothing back from the device, and no number of the host's that changes."""
        model, n = self.model, len(buffers.x)
        count = 2 * n if guided else n
        x = buffers.x.to(next(model.parameters()).dtype)
        if guided:
            x = torch.cat([x, x])
        noise = None
        if buffers.noise is not None:
            noise = buffers.noise.index_select(0, buffers.position % CHUNK)[0]
        options: dict[str, Any] = {"cfg_scale": buffers.cfg_scale if guided else None}
        if buffers.modulations is not None:
            rows = (buffers.position % buffers.chunk) * buffers.distinct + buffers.rows[:count]
            tokens = model.forward_modulated(x, buffers.modulations.index_select(0, rows))
            options["patch_size"] = model.patch_size
        else:
            t = self.steps.timesteps.index_select(0, buffers.step).expand(count)
            images = model(x, t, buffers.labels[:count])
            # Every pixel is a token: what the update takes of any model.
            tokens, options["patch_size"] = images.flatten(2).transpose(1, 2), 1
        x = self.steps.update(
            tokens,
            buffers.x,
            noise,
            buffers.memory,
            buffers.step,
            cfg_channels=self.cfg_channels,
            **options,
        )
        buffers.x.copy_(x)
        buffers.step.sub_(1)
        buffers.position.add_(1)

    # ------------------------------------------------------------------ before and between the steps

    def _allocate(
        self, labels: Tensor, cfg_scale: Tensor | None, modulated: bool, dtype: torch.dtype
    ) -> Buffers:
        model, device, n = self.model, labels.device, len(labels)
        count = n if cfg_scale is None else 2 * n
        distinct = _distinct(labels, cfg_scale is not None)
        x = torch.zeros(n, model.in_channels, *model.input_size, device=device, dtype=dtype)
        modulations, chunk = None, CHUNK
        if modulated:
            one = model.modulations(self.steps.timesteps[:1], labels[:1])
            while chunk > 1 and chunk * distinct * one.nbytes > TABLE_BYTES:
                chunk //= 2
            modulations = one.new_zeros(chunk * distinct, one.shape[1])
        return Buffers(
            x=x,
            memory=torch.zeros_like(x) if self.steps.memory else None,
            noise=x.new_zeros(CHUNK, *x.shape) if self.steps.noise else None,
            cfg_scale=torch.ones(n, device=device, dtype=dtype),
            labels=torch.zeros(count, device=device, dtype=torch.int64),
            rows=torch.zeros(count, device=device, dtype=torch.int64),
            modulations=modulations,
            step=torch.zeros(1, device=device, dtype=torch.int64),
            position=torch.zeros(1, device=device, dtype=torch.int64),
            distinct=distinct,
            chunk=chunk,
        )

    def _begin(
        self,
        buffers: Buffers,
        labels: Tensor,
        cfg_scale: Tensor | None,
        noise: Noise,
        modulated: bool,
    ) -> None:
        """Everything anew: a block before this one may have been stopped anywhere."""
        buffers.x.copy_(noise.start())
        if buffers.memory is not None:
            buffers.memory.zero_()
        if cfg_scale is not None:
            buffers.cfg_scale.copy_(cfg_scale)
            labels = torch.cat([labels, torch.full_like(labels, self.model.num_classes)])
        buffers.labels.copy_(labels)
        self.unique, rows = labels.unique(return_inverse=True)
        buffers.rows.copy_(rows)
        self._to_first_step(buffers)

    def _to_first_step(self, buffers: Buffers) -> None:
        buffers.step.fill_(len(self.guided) - 1)
        buffers.position.zero_()

    def _prepare(self, buffers: Buffers, position: int, noise: Noise) -> None:
        """Noise and modulations of the next steps, where the last chunk is used up."""
        if buffers.noise is not None and position % CHUNK == 0:
            for slot in range(min(CHUNK, len(self.guided) - position)):
                noise.step(buffers.noise[slot])
        if buffers.modulations is not None and position % buffers.chunk == 0:
            last = len(self.guided) - 1 - position
            steps = range(last, max(-1, last - buffers.chunk), -1)
            t = self.steps.timesteps[torch.tensor(steps, device=buffers.x.device)]
            count = len(self.unique)
            table = self.model.modulations(t.repeat_interleave(count), self.unique.repeat(len(t)))
            whole = buffers.modulations.view(buffers.chunk, buffers.distinct, -1)
            whole[: len(t), :count].copy_(table.view(len(t), count, -1))

    # ------------------------------------------------------------------ recording

    def _key(
        self, labels: Tensor, guided: bool, modulated: bool, dtype: torch.dtype
    ) -> tuple[Any, ...] | None:
        """All that a recording depends on; None where steps run one by one."""
        if self.cuda_graph is False:
            return None
        device = labels.device
        if device.type not in self.capture.devices:
            if self.cuda_graph is True:
                raise ValueError(f"cuda_graph=True: the model is on {device.type}")
            return None
        if self.cuda_graph == "auto" and len(self.guided) < FEWEST_STEPS:
            return None
        if reasons := reasons_not_replayable(self.model):
            if self.cuda_graph is True:
                raise ValueError(f"cuda_graph=True: {'; '.join(reasons)}")
            self._say("; ".join(reasons))
            return None
        autocast = torch.get_autocast_dtype(device.type) if autocast_enabled(device) else None
        return (
            len(labels),
            _distinct(labels, guided),
            guided,
            modulated,
            dtype,
            device,
            autocast,
            active_backend(),
            torch.is_inference_mode_enabled(),
            switches(),
            contents(self.model),
        )

    def _record(
        self, buffers: Buffers, graphs: dict[bool, CudaGraph], kinds: Sequence[bool]
    ) -> bool:
        """Records what is not recorded yet; whether that worked."""
        for guided in kinds:
            if guided in graphs:
                continue
            try:
                graphs[guided] = self.capture(
                    partial(self._step, buffers, guided),
                    partial(self._to_first_step, buffers),
                    buffers.x.device,
                )
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                for graph in graphs.values():
                    graph.release()
                graphs.clear()
                if self.cuda_graph is True:
                    raise
                self._say(f"recording a step failed: {error}")
                return False
        return True

    def _say(self, reason: str) -> None:
        if reason not in self.said:
            self.said.add(reason)
            warnings.warn(f"fastdit: sampling without CUDA graphs: {reason}", stacklevel=5)

    @contextmanager
    def _capture_ready(self) -> Iterator[None]:
        """Autocast without its cache of cast weights: a recording would keep what the cache frees."""
        device = next(self.model.parameters()).device
        recorded = self.cuda_graph is not False and device.type in self.capture.devices
        if not (recorded and autocast_enabled(device)):
            yield
            return
        dtype = torch.get_autocast_dtype(device.type)
        with torch.autocast(device.type, dtype, cache_enabled=False):
            yield


def _distinct(labels: Tensor, guided: bool) -> int:
    """How many labels differ, the null label included, rounded up to a power of two: few sizes are recorded."""
    count = len(labels.unique()) + guided
    return 1 << (count - 1).bit_length()
