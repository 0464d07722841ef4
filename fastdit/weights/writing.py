"""Writing files of weights."""

from __future__ import annotations

from collections.abc import Mapping

from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import PathLike, atomic_file
from .reading import require_safetensors_ending


def save_weights(model: nn.Module | Mapping[str, Tensor], path: PathLike) -> None:
    """Writes the parameters and buffers of `model`, or a state dict, as a safetensors file, whole or not at all.

    Keys are the original's: the prefixes of DistributedDataParallel (`module.`) and of torch.compile (`_orig_mod.`) are
    left away. Dtypes are kept; tensors are stored contiguously, whatever their strides.

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
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
