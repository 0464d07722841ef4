"""The autoencoder between images and latents (latent diffusion, Rombach et al., arXiv 2112.10752)."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..validation import require_floating, require_same_device


class VAE:
    """A frozen `diffusers.AutoencoderKL` whose latents have about unit variance.

    encode: z = scaling_factor * sample of N(mean(images), std(images));  decode: images = decoder(z / scaling_factor)

    `latent_channels` is the channels of z, `downsample_factor` the image's side divided by that of z (4 and 8 for
    Stable Diffusion's, which DiT uses with scaling_factor 0.18215).

    Arguments:
        name_or_path: a folder in diffusers' format, or a name on the Hugging Face hub. Only safetensors are read.
        dtype: of weights and computation. What goes in may be of any floating dtype, what comes out is float32.

    Raises ValueError for a folder that is not there or holds no VAE or not all of its weights; ImportError without
    diffusers.
    """

    def __init__(
        self,
        name_or_path: str | os.PathLike[str],
        *,
        device: str | torch.device,
        dtype: torch.dtype = torch.float32,
        scaling_factor: float = 0.18215,
    ) -> None:
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ImportError('The VAE needs diffusers: pip install "fastdit[vae]"') from error
        if not 0 < scaling_factor < float("inf"):
            raise ValueError(f"scaling_factor={scaling_factor}: must be positive and finite")
        _require_folder_or_name(name_or_path)
        model, loading = AutoencoderKL.from_pretrained(
            os.path.expanduser(name_or_path),
            use_safetensors=True,
            low_cpu_mem_usage=False,  # The other way needs one more package.
            output_loading_info=True,
        )
        if loading["missing_keys"]:
            # diffusers leaves these at random values.
            missing = sorted(loading["missing_keys"])
            raise ValueError(
                f"name_or_path={str(name_or_path)!r}: {len(missing)} weights of the VAE are missing,"
                f" the first is {missing[0]!r}"
            )
        self.model = model.to(device=device, dtype=dtype).requires_grad_(False)
        self.scaling_factor = scaling_factor
        self.latent_channels: int = model.config.latent_channels
        self.downsample_factor: int = 2 ** (len(model.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (N, latent_channels, H/f, W/f) of images (N, 3, H, W) in [-1, 1], f = downsample_factor.

        They are samples, drawn with `generator`. Raises ValueError for another shape or device.
        """
        self._require("images", images, self.model.config.in_channels)
        if any(side % self.downsample_factor for side in images.shape[2:]):
            raise ValueError(
                f"images: shape {tuple(images.shape)}, height and width must be divisible by"
                f" {self.downsample_factor}"
            )
        posterior = self.model.encode(images.to(self.model.dtype)).latent_dist
        return posterior.sample(generator).float() * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor, *, batch_size: int = 16) -> Tensor:
        """Images (N, 3, H*f, W*f) of latents (N, latent_channels, H, W), about in [-1, 1] and not clamped.

        At most `batch_size` are decoded at once. Raises ValueError for another shape or device.
        """
        self._require("latents", latents, self.latent_channels)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        chunks = (latents / self.scaling_factor).to(self.model.dtype).split(batch_size)
        return torch.cat([self.model.decode(chunk).sample.float() for chunk in chunks])

    def _require(self, argument: str, value: Tensor, channels: int) -> None:
        require_floating(argument, value)
        if value.ndim != 4 or value.shape[1] != channels:
            raise ValueError(
                f"{argument}: shape {tuple(value.shape)}, expected (N, {channels}, height, width)"
            )
        require_same_device(**{argument: value, "the VAE": next(self.model.parameters())})


def _require_folder_or_name(name_or_path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a folder without a VAE, and for what can only be a folder and is not there.

    Names on the hub are `name` or `owner/name`. Without this, a mistyped folder would be looked for on the network.
    """
    path = os.path.expanduser(name_or_path)
    argument = f"name_or_path={os.fspath(name_or_path)!r}"
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise ValueError(f"{argument}: the folder holds no config.json of a VAE")
    elif not isinstance(name_or_path, str) or path.startswith((".", "/")) or path.count("/") > 1:
        raise ValueError(f"{argument}: no such folder")
    elif os.path.exists(path):
        raise ValueError(f"{argument}: expected a folder, this is a file")
