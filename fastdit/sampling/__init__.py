"""Drawing images from a model, and writing them to disk."""

from __future__ import annotations

from .outputs import Images, output_kind, save_folder, save_grid, save_npz, to_uint8, write_samples
from .sample import block_generator, sample

__all__ = [
    "Images",
    "block_generator",
    "output_kind",
    "sample",
    "save_folder",
    "save_grid",
    "save_npz",
    "to_uint8",
    "write_samples",
]
