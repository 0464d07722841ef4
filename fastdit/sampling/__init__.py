"""Drawing images from a model, and writing them to disk."""

from __future__ import annotations

from .outputs import save_folder, save_grid, save_npz, to_uint8, write_samples
from .sample import block_generator, sample

__all__ = [
    "block_generator",
    "sample",
    "save_folder",
    "save_grid",
    "save_npz",
    "to_uint8",
    "write_samples",
]
