"""How long a step of sampling takes: `Sampler` against the plain loop of the same model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import use_backend
from ..diffusion import create_diffusion
from ..models import DiT
from .sample import Sampler

ROUNDS = 3


def measure_sampling(
    model: DiT,
    batches: Sequence[int],
    *,
    steps: int = 20,
    cfg_scale: float = 1.5,
    also: Callable[[DiT], dict[str, Callable[[Tensor], Any]]] = lambda model: {},
) -> list[dict[str, Any]]:
    """One row for each batch and provider: milliseconds a step, images/s at 250 steps, ratio to the reference loop.

    Providers: `reference`, the diffusion's loop in plain torch throughout; `eager`, the same loop with fastdit's
    operations; `fastdit`, `Sampler` without and, where there can be one, with a CUDA graph; and what `also` adds, by
    name, each a function of the labels. All are timed in turns, the medians of three.
    """
    device = next(model.parameters()).device
    diffusion = create_diffusion(str(steps), learn_sigma=model.learn_sigma)
    without = Sampler(model, steps=steps, cuda_graph=False)
    recorded = Sampler(model, steps=steps, cuda_graph=True)

    def loop(labels: Tensor) -> Tensor:
        n = len(labels)
        both = torch.cat([labels, torch.full_like(labels, model.num_classes)])
        x = torch.randn(n, model.in_channels, *model.input_size, device=device)
        dtype = next(model.parameters()).dtype

        def guided(x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = model.forward_with_cfg(x.to(dtype), t, both, cfg_scale)
            return out

        with torch.no_grad():
            return diffusion.p_sample_loop(
                guided, (2 * n, *x.shape[1:]), torch.cat([x, x]), clip_denoised=False
            )[:n]

    def reference(labels: Tensor) -> Tensor:
        with use_backend("reference"):
            return loop(labels)

    providers: dict[str, Callable[[Tensor], Any]] = {
        "reference": reference,
        "eager": loop,
        "fastdit": lambda labels: without(labels, cfg_scale=cfg_scale, progress=False),
    }
    if device.type == "cuda":
        providers["fastdit, CUDA graph"] = lambda labels: recorded(
            labels, cfg_scale=cfg_scale, progress=False
        )
    providers |= also(model)
    rows = []
    for batch in batches:
        labels = torch.arange(batch, device=device) % model.num_classes
        seconds: dict[str, list[float]] = {name: [] for name in providers}
        for turn in range(ROUNDS + 1):
            for name, draw in providers.items():
                _wait(device)
                begun = time.perf_counter()
                draw(labels)
                _wait(device)
                if turn:  # the first warms up
                    seconds[name].append(time.perf_counter() - begun)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, median in medians.items():
            rows.append(
                {
                    "batch": batch,
                    "provider": name,
                    "ms a step": round(1e3 * median / steps, 3),
                    "images/s at 250 steps": round(batch * steps / median / 250, 3),
                    "ratio": round(medians["reference"] / median, 3),
                }
            )
    recorded.release()
    return rows


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
