"""One step of a sampler: from the model's tokens to x_{t-1}, in one pass.

Unpatchify, classifier-free guidance, the guessed x_0, the mean of x_{t-1} and its noise, by DDPM or by DDIM. The
coefficients of all steps are a table on the device and the step is a number there, so that a captured CUDA graph runs
any step, and no step waits for the device.

x, noise, x_{t-1} (N, C, H*P, W*P); tokens (N, T, P*P*K), T = H*W, row by row, as `DiT.forward_tokens` gives them, with
K = C channels, or 2C of which the second half is the variance v; features ordered (row, column, channel). With guidance
tokens are (2N, T, P*P*K), [conditional; unconditional]. Each in its own dtype; arithmetic in float32.

There is no gradient: sampling needs none.

Sources: Ho et al. 2020, algorithm 2, eq. 7 and 15; Nichol & Dhariwal 2021, eq. 15; Song et al. 2021, eq. 12 and 16;
Ho & Salimans 2022; Peebles & Xie, section 3.1 and appendix A.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal

import torch
from torch import Tensor

from ..reference import diffusion_step as reference
from ..validation import checks_values, require_choice, require_floating, require_same_device
from .operation import Operation, dtype_limits, needs_gradient

# Columns of a step table: those of `StepCoefficients`, the last two only where the variance is learned.
_LEARNED = len(reference.StepCoefficients._fields)
_FIXED = _LEARNED - 2
_NOISE = reference.StepCoefficients._fields.index("noise")


def _forward(
    tokens: Tensor,
    x: Tensor,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    cfg_scale: Tensor | None,
    cfg_number: float | None,
    guided_channels: int,
    patch_size: int,
    clip_denoised: bool,
) -> Tensor:
    options: dict[str, Any] = {
        "patch_size": patch_size,
        "cfg_scale": cfg_number if cfg_scale is None else cfg_scale,
        "cfg_channels": guided_channels,
        "clip_denoised": clip_denoised,
    }
    if noise is None or table.shape[1] == _FIXED:  # where the samplers differ by their tables alone
        return reference.ddim_step(tokens, x, noise, table, step, **options)
    return reference.ddpm_step(tokens, x, noise, table, step, **options)


def _fake(tokens: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _limits(
    tokens: Tensor,
    x: Tensor,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    cfg_scale: Tensor | None,
    *_: Any,
) -> list[str]:
    """Every tensor but the step is a floating one."""
    return dtype_limits(tokens, x, noise, table, cfg_scale)


FORWARD = Operation(
    "diffusion_step(Tensor tokens, Tensor x, Tensor? noise, Tensor table, Tensor step, Tensor? cfg_scale,"
    " float? cfg_number, int guided_channels, int patch_size, bool clip_denoised) -> Tensor",
    reference=_forward,
    fake=_fake,
)
FORWARD.add_kernel("diffusion_step", "forward", limits=_limits)


def ddpm_step(
    tokens: Tensor,
    x: Tensor,
    noise: Tensor,
    table: Tensor,
    step: Tensor,
    *,
    patch_size: int,
    cfg_scale: float | Tensor | None = None,
    cfg_channels: Literal[3, "all"] = 3,
    clip_denoised: bool = False,
) -> Tensor:
    """x_{t-1} drawn from p(x_{t-1} | x_t), as `GaussianDiffusion.p_sample`: `mean + sigma_t noise`.

    x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t) with the predicted noise eps, or what the model predicts itself;
    mean = sqrt(abar_{t-1}) beta_t / (1 - abar_t) x_0 + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) x_t;
    sigma_t fixed or, learned, sigma_t² = exp(f log beta_t + (1 - f) log(posterior variance_t)), f = (v + 1) / 2; no
    noise at t = 0.

    Args:
        tokens: (N, T, P*P*K), with guidance (2N, T, P*P*K) as [conditional; unconditional]; K = 2C where the variance
            is learned, else C.
        x, noise: x_t and standard normal noise, (N, C, H*P, W*P).
        table: `GaussianDiffusion.step_table("ddpm")` on the device, (num_timesteps, 7) with a learned variance, else
            (num_timesteps, 5).
        step: t, an int64 tensor of one element on the device: it is read there in every call, and not changed. Whether
            it is in 0 .. num_timesteps - 1 is checked under `fastdit.validate("full")` only, for that waits for the
            device; the kernel reads outside of the table otherwise.
        patch_size: P.
        cfg_scale: guidance `uncond + cfg_scale (cond - uncond)`: None for none, a number, or a tensor of (), (N,) or
            (N, 1, 1, 1) on the device, which is read in every call. A captured CUDA graph keeps the value of a number
            and sees the changes of a tensor.
        cfg_channels: 3 guides the first min(3, C) channels, as the original does; "all" guides all C. The others, and
            v, are those of the conditional half.
        clip_denoised: clamp x_0 to [-1, 1].

    Returns x_{t-1}, like x. Raises TypeError for other dtypes; ValueError for other shapes, devices and values;
    RuntimeError where a gradient would be recorded, or if the chosen backend cannot run.
    """
    require_floating("noise", noise)
    columns = _check("ddpm_step", tokens, x, noise, table, step, patch_size, cfg_scale)
    learned = tokens.shape[2] == 2 * x.shape[1] * patch_size**2
    if columns != (_LEARNED if learned else _FIXED):
        raise ValueError(
            f"table: has {columns} columns and tokens {'2C' if learned else 'C'} channels: allowed are {_LEARNED} with "
            f"2C (step_table('ddpm') with a learned variance) and {_FIXED} with C (with a fixed one)"
        )
    return _run(tokens, x, noise, table, step, cfg_scale, cfg_channels, patch_size, clip_denoised)


def ddim_step(
    tokens: Tensor,
    x: Tensor,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    *,
    patch_size: int,
    cfg_scale: float | Tensor | None = None,
    cfg_channels: Literal[3, "all"] = 3,
    clip_denoised: bool = False,
) -> Tensor:
    """x_{t-1} by DDIM eq. 12, as `GaussianDiffusion.ddim_sample`:

    sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1} - sigma_t²) (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t) + sigma_t noise,
    sigma_t = eta sqrt((1 - abar_{t-1}) / (1 - abar_t)) sqrt(1 - abar_t / abar_{t-1}), x_0 as in `ddpm_step`.

    `table` is `GaussianDiffusion.step_table("ddim", eta=eta)`, (num_timesteps, 5). `noise` may be None where eta is 0;
    that it is, is checked for this step under `fastdit.validate("full")`. v is not read where tokens have one. All
    other arguments, the result and what is raised as `ddpm_step`.
    """
    if noise is not None:
        require_floating("noise", noise)
    columns = _check("ddim_step", tokens, x, noise, table, step, patch_size, cfg_scale)
    if columns != _FIXED:
        raise ValueError(
            f"table: has {columns} columns: allowed are {_FIXED}, of step_table('ddim')"
        )
    return _run(tokens, x, noise, table, step, cfg_scale, cfg_channels, patch_size, clip_denoised)


def _check(
    operation: str,
    tokens: Tensor,
    x: Tensor,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    patch_size: int,
    cfg_scale: float | Tensor | None,
) -> int:
    """Raises for what both samplers refuse; the columns of the table."""
    for name, value in (("tokens", tokens), ("x", x), ("table", table)):
        require_floating(name, value)
    if x.dim() != 4 or patch_size < 1 or x.shape[2] % patch_size or x.shape[3] % patch_size:
        raise ValueError(
            f"x: expected shape (N, C, height, width) with height and width divisible by patch_size={patch_size}, "
            f"got {tuple(x.shape)}"
        )
    n, c, height, width = x.shape
    batch, count = n if cfg_scale is None else 2 * n, (height // patch_size) * (width // patch_size)
    features = c * patch_size**2
    if tokens.dim() != 3 or tuple(tokens.shape) not in (
        (batch, count, features),
        (batch, count, 2 * features),
    ):
        raise ValueError(
            f"tokens: expected shape ({batch}, {count}, {features}) or, with a variance, ({batch}, {count}, "
            f"{2 * features}) for x of shape {tuple(x.shape)}, patch_size={patch_size}, "
            f"{'no guidance' if cfg_scale is None else 'guidance'}, got {tuple(tokens.shape)}"
        )
    if noise is not None and noise.shape != x.shape:
        raise ValueError(
            f"noise: expected the shape of x, {tuple(x.shape)}, got {tuple(noise.shape)}"
        )
    if table.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"table: has dtype {table.dtype}: allowed are float32 and float64")
    if table.dim() != 2 or not len(table) or table.shape[1] not in (_FIXED, _LEARNED):
        raise ValueError(
            f"table: expected shape (num_timesteps, {_FIXED}) or (num_timesteps, {_LEARNED}), got {tuple(table.shape)}"
        )
    if not isinstance(step, Tensor) or step.dtype is not torch.int64:
        found = step.dtype if isinstance(step, Tensor) else type(step).__name__
        raise TypeError(f"step: expected an int64 tensor of one element, got {found}")
    if step.numel() != 1:
        raise ValueError(f"step: expected one element, got shape {tuple(step.shape)}")
    scale = cfg_scale if isinstance(cfg_scale, Tensor) else None
    if scale is not None:
        require_floating("cfg_scale", scale)
        if tuple(scale.shape) not in ((), (n,), (n, 1, 1, 1)):
            raise ValueError(
                f"cfg_scale: expected a number or a tensor of shape (), ({n},) or ({n}, 1, 1, 1), "
                f"got shape {tuple(scale.shape)}"
            )
    elif cfg_scale is not None:
        if not isinstance(cfg_scale, numbers.Real) or isinstance(cfg_scale, bool):
            raise TypeError(f"cfg_scale={cfg_scale!r}: expected a number, a tensor or None")
        if not abs(cfg_scale) < math.inf:  # what a compiler can trace; NaN fails too
            raise ValueError(f"cfg_scale={cfg_scale!r}: must be finite")
    require_same_device(x=x, tokens=tokens, noise=noise, table=table, step=step, cfg_scale=scale)
    if needs_gradient(tokens, x, noise, table, scale):
        raise RuntimeError(f"{operation} has no gradient: call it under torch.no_grad()")
    if checks_values(x):
        _check_values(noise, table, step, scale)
    return table.shape[1]


def _check_values(
    noise: Tensor | None, table: Tensor, step: Tensor, cfg_scale: Tensor | None
) -> None:
    t = int(step)
    if not 0 <= t < len(table):
        raise ValueError(f"step={t}: allowed are 0 to {len(table) - 1}, the rows of the table")
    if noise is None and bool(table[t, _NOISE] != 0):
        raise ValueError(f"noise=None: step {t} of this table adds noise; allowed with eta=0 only")
    if cfg_scale is not None and not bool(cfg_scale.isfinite().all()):
        raise ValueError(f"cfg_scale={cfg_scale.tolist()}: must be finite")


def _run(
    tokens: Tensor,
    x: Tensor,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    cfg_scale: float | Tensor | None,
    cfg_channels: Literal[3, "all"],
    patch_size: int,
    clip_denoised: bool,
) -> Tensor:
    require_choice("cfg_channels", cfg_channels, (3, "all"))
    guided = x.shape[1] if cfg_channels == "all" else min(3, x.shape[1])
    scale, number = None, None
    if isinstance(cfg_scale, Tensor):
        scale = cfg_scale.reshape(-1)
    elif cfg_scale is not None:
        number = float(cfg_scale)
    arguments = (tokens, x, noise, table, step, scale, number, guided, patch_size, clip_denoised)
    if FORWARD.choose(*arguments) == "reference":
        return _forward(*arguments)
    out: Tensor = torch.ops.fastdit.diffusion_step(*arguments)
    return out
