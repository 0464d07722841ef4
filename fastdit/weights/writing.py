"""Writing files of weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import PathLike, atomic_file
from ..models import DiT
from .reading import require_safetensors_ending

# In the header of a file: the arguments of the DiT that its weights belong to, as JSON.
CONFIG_KEY = "fastdit.config"


def save_weights(
    model: nn.Module | Mapping[str, Tensor],
    path: PathLike,
    *,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes the parameters and buffers of `model`, or a state dict, as a safetensors file, whole or not at all.

    Keys are the original's: the prefixes of DistributedDataParallel (`module.`) and of torch.compile (`_orig_mod.`) are
    left away. Dtypes are kept; tensors are stored contiguously, whatever their strides. The file of a DiT also says
    which model it is, the number of heads included; of a state dict `config` says so, `DiT.config`.

    Raises ValueError for another ending than `.safetensors`, TypeError for what is not a tensor, and OSError.
    """
    require_safetensors_ending(path)
    state = model.state_dict() if isinstance(model, nn.Module) else model
    tensors = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{key}: expected a tensor, got {type(value).__name__}")
        name = key.replace("_orig_mod.", "").removeprefix("module.")
        tensors[name] = value.detach().cpu().contiguous()
    metadata = {"format": "pt"}
    if isinstance(model, DiT):
        config = model.config
    if config:
        metadata[CONFIG_KEY] = json.dumps(config)
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
