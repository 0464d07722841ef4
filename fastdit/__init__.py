"""fastdit: Diffusion Transformers that train and sample as fast as the hardware allows, with the original's numbers.

Names are loaded when they are first used: importing the package touches no GPU and loads no Triton, no compiled
extension and no optional package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .backend import use_backend
    from .diffusion import create_diffusion
    from .models import (
        DiT,
        DiT_B_2,
        DiT_B_4,
        DiT_B_8,
        DiT_L_2,
        DiT_L_4,
        DiT_L_8,
        DiT_models,
        DiT_S_2,
        DiT_S_4,
        DiT_S_8,
        DiT_XL_2,
        DiT_XL_4,
        DiT_XL_8,
        DiTBlock,
        get_2d_sincos_pos_embed,
        modulate,
    )
    from .sampling.sample import Sampler, sample
    from .validation import validate
    from .weights import from_pretrained, load_weights, save_pretrained, save_weights

_ROOMS = {
    "backend": ["use_backend"],
    "diffusion": ["create_diffusion"],
    "models": [
        "DiT",
        "DiTBlock",
        "DiT_B_2",
        "DiT_B_4",
        "DiT_B_8",
        "DiT_L_2",
        "DiT_L_4",
        "DiT_L_8",
        "DiT_S_2",
        "DiT_S_4",
        "DiT_S_8",
        "DiT_XL_2",
        "DiT_XL_4",
        "DiT_XL_8",
        "DiT_models",
        "get_2d_sincos_pos_embed",
        "modulate",
    ],
    "sampling": ["Sampler", "sample"],
    "validation": ["validate"],
    "weights": ["from_pretrained", "load_weights", "save_pretrained", "save_weights"],
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "DiT",
    "DiTBlock",
    "DiT_B_2",
    "DiT_B_4",
    "DiT_B_8",
    "DiT_L_2",
    "DiT_L_4",
    "DiT_L_8",
    "DiT_S_2",
    "DiT_S_4",
    "DiT_S_8",
    "DiT_XL_2",
    "DiT_XL_4",
    "DiT_XL_8",
    "DiT_models",
    "Sampler",
    "__version__",
    "create_diffusion",
    "from_pretrained",
    "get_2d_sincos_pos_embed",
    "load_weights",
    "modulate",
    "sample",
    "save_pretrained",
    "save_weights",
    "use_backend",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'fastdit' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
