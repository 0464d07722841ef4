"""The autoencoder between images and latents (latent diffusion, Rombach et al., arXiv 2112.10752)."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import torch
from torch import Tensor

from ..validation import require_floating, require_same_device

# What of a VAE's configuration decides its output, besides the weights.
ARCHITECTURE = (
    "act_fn",
    "block_out_channels",
    "down_block_types",
    "in_channels",
    "latent_channels",
    "layers_per_block",
    "mid_block_add_attention",
    "norm_num_groups",
    "out_channels",
    "up_block_types",
    "use_post_quant_conv",
    "use_quant_conv",
)


class VAE:
    """A frozen `diffusers.AutoencoderKL` whose latents have about unit variance.

    encode: z = scaling_factor * sample of N(mean(images), std(images));  decode: images = decoder(z / scaling_factor)

    `latent_channels` is the channels of z, `downsample_factor` the image's side divided by that of z (4 and 8 for
    Stable Diffusion's, which DiT uses with scaling_factor 0.18215), `image_channels` the channels of an image. `name`
    is where it came from: the whole path of a folder, or the name on the hub.

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
        # Of the weights as they are stored, so that it does not depend on `dtype` and `device`.
        self._fingerprint = _fingerprint(model)
        # Not `model.to`: diffusers' own warns of every dtype, of weights that have to stay in float32 and are none.
        torch.nn.Module.to(model, device=device, dtype=dtype)
        self.model = model.requires_grad_(False)
        path = os.path.expanduser(name_or_path)
        self.name: str = os.path.abspath(path) if os.path.isdir(path) else str(name_or_path)
        self.scaling_factor = scaling_factor
        self.image_channels: int = model.config.in_channels
        self.latent_channels: int = model.config.latent_channels
        self.downsample_factor: int = 2 ** (len(model.config.block_out_channels) - 1)

    def fingerprint(self) -> str:
        """32 hexadecimal digits: a hash of the architecture and of the stored weights (names, shapes, bytes).

        The same on every device and in every dtype of computation. The scaling factor is not in it.
        """
        return self._fingerprint

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """The posterior of images (N, 3, H, W) in [-1, 1]: float32 (N, 2 * latent_channels, H/f, W/f).

        The first half of the channels is its mean, the second its standard deviation, neither of them scaled;
        f = downsample_factor. Raises ValueError for another shape or device.
        """
        self._require("images", images, self.image_channels)
        if any(side % self.downsample_factor for side in images.shape[2:]):
            raise ValueError(
                f"images: shape {tuple(images.shape)}, height and width must be divisible by"
                f" {self.downsample_factor}"
            )
        posterior = self.model.encode(images.to(self.model.dtype)).latent_dist
        std = torch.exp(0.5 * posterior.logvar.float())
        return torch.cat([posterior.mean.float(), std], dim=1)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (N, latent_channels, H/f, W/f) of images (N, 3, H, W) in [-1, 1], f = downsample_factor.

        They are samples, drawn with `generator`. Raises ValueError for another shape or device.
        """
        moments = self.moments(images)
        shape = (len(moments), self.latent_channels, *moments.shape[2:])
        device = images.device if generator is None else generator.device
        noise = torch.randn(shape, generator=generator, device=device).to(images.device)
        return sample_latents(moments, noise, self.scaling_factor)

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


def sample_latents(moments: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """z = scaling_factor * (mean + std * noise), float32 (N, C, h, w), of moments (N, 2C, h, w) and noise (N, C, h, w).

    Raises ValueError where the shapes do not fit.
    """
    require_floating("moments", moments)
    require_floating("noise", noise)
    if moments.ndim != 4 or moments.shape[1] % 2:
        raise ValueError(f"moments: shape {tuple(moments.shape)}, expected (N, 2C, height, width)")
    mean, std = moments.float().chunk(2, dim=1)
    if noise.shape != mean.shape:
        raise ValueError(f"noise: shape {tuple(noise.shape)}, expected {tuple(mean.shape)}")
    return scaling_factor * (mean + std * noise.float())


def _fingerprint(model: Any) -> str:
    config = {name: model.config[name] for name in ARCHITECTURE if name in model.config}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"\n{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


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
