"""Weights of the DiT family, in and out.

Weights are safetensors files under the original's parameter names: reading one cannot run code. Other formats are read
as strictly, and never in a way that could.
"""

from .architecture import load_into
from .convert import convert
from .formats import to_original
from .inspection import inspect_weights
from .manifest import problems, write_manifest
from .pretrained import adapted, from_pretrained, push_to_hub, read_pretrained, save_pretrained
from .reading import load_tensors, load_weights, read_checkpoint
from .runs import FORMAT, checkpoints, is_run, latest_checkpoint, load_description, locate
from .writing import save_weights

__all__ = [
    "FORMAT",
    "adapted",
    "checkpoints",
    "convert",
    "from_pretrained",
    "inspect_weights",
    "is_run",
    "latest_checkpoint",
    "load_description",
    "load_into",
    "load_tensors",
    "load_weights",
    "locate",
    "problems",
    "push_to_hub",
    "read_checkpoint",
    "read_pretrained",
    "save_pretrained",
    "save_weights",
    "to_original",
    "write_manifest",
]
