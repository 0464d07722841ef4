"""Images and latents for training: where they are read from, the order of batches, and the VAE between the two."""

from .decoding import BadImage, center_crop
from .digits import Digits
from .extract import extract
from .images import ImageFolder
from .latents import LatentFolder
from .opening import Data, loading_processes, open_data
from .sampler import EpochBatchSampler
from .shards import TarShards
from .synthetic import Synthetic
from .vae import VAE, sample_latents

__all__ = [
    "VAE",
    "BadImage",
    "Data",
    "Digits",
    "EpochBatchSampler",
    "ImageFolder",
    "LatentFolder",
    "Synthetic",
    "TarShards",
    "center_crop",
    "extract",
    "loading_processes",
    "open_data",
    "sample_latents",
]
