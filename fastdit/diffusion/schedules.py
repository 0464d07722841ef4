"""Noise schedules, and which of their timesteps a sampling run visits."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..validation import require_choice

SCHEDULES = ("linear", "squaredcos_cap_v2")

Respacing = str | int | Sequence[int] | None


def get_named_beta_schedule(
    schedule_name: str, num_diffusion_timesteps: int
) -> npt.NDArray[np.float64]:
    """The variances beta_0 … beta_{T-1} of the forward process, float64, shape (T,).

    - `"linear"`: evenly spaced from 1e-4 to 0.02 at T = 1000, both times 1000/T for another T
      (Ho et al. 2020, section 4).
    - `"squaredcos_cap_v2"`: beta_i = min(1 - abar((i+1)/T) / abar(i/T), 0.999) with
      abar(u) = cos²((u + 0.008) / 1.008 · pi/2) (Nichol & Dhariwal 2021, eq. 17).

    Raises ValueError for another name, and for fewer steps than the schedule allows (linear: the
    last beta must stay below 1).
    """
    require_choice("noise_schedule", schedule_name, SCHEDULES)
    steps = _integer("diffusion_steps", num_diffusion_timesteps)
    if steps < 1:
        raise ValueError(f"diffusion_steps={steps}: at least 1 is needed")
    if schedule_name == "linear":
        scale = 1000 / steps
        betas = np.linspace(scale * 0.0001, scale * 0.02, steps, dtype=np.float64)
        if betas.max() >= 1:
            raise ValueError(f"diffusion_steps={steps}: the linear schedule needs at least 21")
        return betas

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array(
        [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)],
        dtype=np.float64,
    )


def space_timesteps(num_timesteps: int, section_counts: Respacing) -> set[int]:
    """Which of the timesteps 0 … num_timesteps-1 are kept.

    - `None` or `""`: all of them.
    - `250` or `"250"`: 250 steps spaced evenly from the first to the last, both kept. The stride is
      a fraction and its running sum is rounded half to even, so "250" of 1000 begins 0, 4, 8 and
      ends 987, 991, 995, 999.
    - `[10, 10, 10]` or `"10,10,10"`: the timesteps are cut into equal sections (the first ones
      longer by one where they do not divide), and each keeps so many steps, spaced as above.
    - `"ddim50"`: 0, s, 2s, … with the smallest whole stride s that gives 50 steps. The last
      timestep is usually not kept, and s need not divide num_timesteps: "ddim7" of 1000 has s = 143
      (Song et al. 2021, appendix D.2, linear).

    Raises TypeError for another type, and ValueError for counts that cannot be met ("ddim60" of
    1000: s = 16 gives 63 steps and s = 17 gives 59); both name `timestep_respacing`.
    """
    name = f"timestep_respacing={section_counts!r}"
    if section_counts is None or section_counts == "":
        return set(range(num_timesteps))
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        return _whole_stride(name, num_timesteps, section_counts[len("ddim") :])
    counts = _counts(name, section_counts)
    if min(counts) < 0 or not 1 <= sum(counts) <= num_timesteps:
        raise ValueError(f"{name}: allowed are 1 to {num_timesteps} steps")
    return _fractional_strides(name, num_timesteps, counts)


def _counts(name: str, section_counts: str | int | Sequence[int]) -> list[int]:
    """The steps asked for in each section."""
    if isinstance(section_counts, str):
        try:
            return [int(count) for count in section_counts.split(",")]
        except ValueError:
            raise ValueError(f'{name}: allowed are "", "250", "10,10,10" and "ddim50"') from None
    if isinstance(section_counts, (list, tuple)):
        if not section_counts:
            raise ValueError(f"{name}: at least one section is needed")
        return [_integer(name, count) for count in section_counts]
    return [_integer(name, section_counts)]


def _integer(name: str, value: object) -> int:
    """`value` as an int; True and 250.0 are refused, being mistakes more often than counts."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected a whole number, got {value!r}") from None


def _whole_stride(name: str, num_timesteps: int, count: str) -> set[int]:
    if not count.isdecimal() or not 1 <= int(count) <= num_timesteps:
        raise ValueError(f'{name}: allowed are "ddim1" to "ddim{num_timesteps}"')
    stride = math.ceil(num_timesteps / int(count))
    steps = range(0, num_timesteps, stride)
    if len(steps) != int(count):
        raise ValueError(
            f"{name}: no whole stride gives {count} of {num_timesteps} steps; the nearest counts "
            f"are {len(steps)} and {len(range(0, num_timesteps, stride - 1))}"
        )
    return set(steps)


def _fractional_strides(name: str, num_timesteps: int, counts: list[int]) -> set[int]:
    size, longer = divmod(num_timesteps, len(counts))
    steps: set[int] = set()
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if count > length:
            raise ValueError(
                f"{name}: section {section} has {length} timesteps, {count} were asked for"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            steps.add(start + round(position))
            # A running sum, not step * stride: the two differ where a half is rounded.
            position += stride
        start += length
    return steps
