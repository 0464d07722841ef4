"""Images for training: folders of them, the built-in digits, the order of batches, and the VAE to latents."""

from .digits import Digits
from .images import ImageFolder, center_crop
from .sampler import EpochBatchSampler
from .vae import VAE

__all__ = ["VAE", "Digits", "EpochBatchSampler", "ImageFolder", "center_crop"]
