"""The backends by name: `sdpa` and its three kernels, three optional packages, this project's kernel, the reference."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from . import (
    cudnn,
    flash_attn,
    flash_attn_4,
    reference,
    sdpa,
    sdpa_efficient,
    sdpa_flash,
    triton,
    xformers,
)
from .limits import Described


class Backend(Protocol):
    """What every file of a backend says."""

    def reasons_not_usable(self, q: Described, k: Described, v: Described) -> list[str]:
        """Why it cannot take these inputs on this machine; empty if it can. q (N, T, H, K), k and v (N, S, H, K)."""

    def is_deterministic(self, q: Described) -> bool:
        """Whether its backward gives the same bits every time, when it is called with `deterministic`."""


class Callable(Backend, Protocol):
    """A backend that is called here. `triton` is called by `fastdit.ops.attention`, which holds its operator."""

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, deterministic: bool = True
    ) -> Tensor:
        """`softmax(scale * q k^T) v`, (N, T, H, K); scale None is K ** -0.5."""


CALLABLE: dict[str, Callable] = {
    "sdpa": sdpa,
    "cudnn": cudnn,
    "sdpa_flash": sdpa_flash,
    "sdpa_efficient": sdpa_efficient,
    "flash_attn": flash_attn,
    "flash_attn_4": flash_attn_4,
    "xformers": xformers,
    "reference": reference,
}
BACKENDS: dict[str, Backend] = {**CALLABLE, "triton": triton}
CHOICES = ("auto", *BACKENDS)
