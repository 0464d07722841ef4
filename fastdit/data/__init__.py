"""Images for training: folders of them, the built-in digits, the order of batches, and the VAE to latents."""

from fastdit.data.digits import Digits
from fastdit.data.images import ImageFolder, center_crop
from fastdit.data.sampler import EpochBatchSampler
from fastdit.data.vae import VAE

__all__ = ["VAE", "Digits", "EpochBatchSampler", "ImageFolder", "center_crop"]
