"""How long a step of sampling takes: `Sampler` against loops of the same model, compiled ones, and diffusers."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backend import use_backend
from ..diffusion import create_diffusion
from ..models import DiT
from ..weights.formats import write_diffusers_folder
from .sample import Sampler

ROUNDS = 3

Predict = Callable[..., Tensor]


def measure_sampling(
    model: DiT,
    batches: Sequence[int],
    *,
    steps: int = 20,
    cfg_scale: float = 1.5,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """One row for each batch and provider: milliseconds a step, images/s at 250 steps, ratio to the reference loop.

    Providers: `reference`, the diffusion's loop with guidance as the original's scripts have it, the model in plain
    torch; `eager`, the same with fastdit's operations; `fastdit`, `Sampler` without and, on CUDA, with a graph;
    `diffusers`, where the package is there, the same loop with its DiTTransformer2DModel. With `compiled` also the
    reference and diffusers compiled whole, on CUDA with its graphs. All are timed in turns, the medians of three.
    """
    device = next(model.parameters()).device
    providers = providers_of(model, steps, cfg_scale, compiled)
    rows = []
    for batch in batches:
        # Else the next batch would be compiled for any size, which is slower.
        torch.compiler.reset()
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
    return rows


def providers_of(
    model: DiT, steps: int, cfg_scale: float, compiled: bool
) -> dict[str, Callable[[Tensor], Any]]:
    """By name, what draws one image for each of its labels: see `measure_sampling`."""
    on_gpu = next(model.parameters()).is_cuda

    def loop(predict: Predict, backend: str = "auto") -> Callable[[Tensor], Tensor]:
        def draw(labels: Tensor) -> Tensor:
            with use_backend(backend):
                return plain_loop(model, predict, labels, steps, cfg_scale)

        return draw

    def sampler(cuda_graph: bool) -> Callable[[Tensor], Tensor]:
        kept = Sampler(model, steps=steps, cuda_graph=cuda_graph, learn_sigma=model.learn_sigma)
        return lambda labels: kept(
            labels, cfg_scale=cfg_scale, batch_size=len(labels), progress=False
        )

    def compile_whole(module: Any) -> Any:
        return torch.compile(module, mode="reduce-overhead" if on_gpu else None)

    found: dict[str, Callable[[Tensor], Any]] = {
        "reference": loop(model, "reference"),
        "eager": loop(model),
        "fastdit": sampler(cuda_graph=False),
    }
    if on_gpu:
        found["fastdit, CUDA graph"] = sampler(cuda_graph=True)
    if compiled:
        found["reference, compiled"] = loop(compile_whole(model), "reference")
    try:
        peer = _diffusers(model)
    except (ImportError, ValueError):  # not installed, or a model that it does not have
        return found
    names = {"diffusers": peer}
    if compiled:
        names["diffusers, compiled"] = compile_whole(peer)
    for name, module in names.items():
        found[name] = loop(
            lambda x, t, y, module=module: module(x, timestep=t, class_labels=y).sample
        )
    return found


def plain_loop(
    model: DiT, predict: Predict, labels: Tensor, steps: int, cfg_scale: float
) -> Tensor:
    """DDPM with guidance of the first three channels on a doubled batch."""
    both = torch.cat([labels, torch.full_like(labels, model.num_classes)])
    x = torch.randn(len(labels), model.in_channels, *model.input_size, device=labels.device)
    dtype = next(model.parameters()).dtype

    def guided(x: Tensor, t: Tensor) -> Tensor:
        half = x[: len(labels)].to(dtype)
        out = predict(torch.cat([half, half]), t, both)
        eps, rest = out[:, :3], out[:, 3:]
        cond, uncond = eps.chunk(2)
        eps = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([eps, eps]), rest], dim=1)

    diffusion = create_diffusion(str(steps), learn_sigma=model.learn_sigma)
    with torch.no_grad():
        return diffusion.p_sample_loop(
            guided, (len(both), *x.shape[1:]), torch.cat([x, x]), clip_denoised=False
        )[: len(labels)]


def _diffusers(model: DiT) -> Any:
    """diffusers' model with these weights and the original's frequencies."""
    from diffusers import DiTTransformer2DModel

    with tempfile.TemporaryDirectory() as folder:
        write_diffusers_folder(Path(folder) / "model", model.state_dict(), model.config)
        peer = DiTTransformer2DModel.from_pretrained(
            Path(folder) / "model", low_cpu_mem_usage=False
        )
    for block in peer.transformer_blocks:  # else it would not be the same model
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    weights = next(model.parameters())
    return peer.to(weights.device, weights.dtype).eval()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
