"""Weights of the DiT family, in and out.

Weights are safetensors files under the original's parameter names: reading one cannot run code. Other formats are read
as strictly, and never in a way that could.
"""

from .architecture import load_into
from .reading import load_weights
from .runs import FORMAT, WHICH, latest_checkpoint, load_description, load_model, locate
from .writing import save_weights

__all__ = [
    "FORMAT",
    "WHICH",
    "latest_checkpoint",
    "load_description",
    "load_into",
    "load_model",
    "load_weights",
    "locate",
    "save_weights",
]
