"""Drawing images from a model, and writing them to disk."""

from __future__ import annotations

from .measuring import measure_sampling
from .noise import block_generator, sample_generator
from .outputs import Images, output_kind, save_folder, save_grid, save_npz, to_uint8, write_samples
from .sample import Sampler, sample
from .to_disk import draw_to_disk, weights_digest

__all__ = [
    "Images",
    "Sampler",
    "block_generator",
    "draw_to_disk",
    "measure_sampling",
    "output_kind",
    "sample",
    "sample_generator",
    "save_folder",
    "save_grid",
    "save_npz",
    "to_uint8",
    "weights_digest",
    "write_samples",
]
