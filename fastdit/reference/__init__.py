"""The specification: every operation and the whole DiT in plain torch. It imports nothing else of fastdit."""

from .adamw_ema import adamw_ema_
from .diffusion_step import ddim_step, ddpm_step
from .dit import DiT, sincos_position_embedding
from .operations import (
    attention,
    gated_residual,
    gated_residual_layer_norm_modulate,
    layer_norm_modulate,
    mlp_gelu,
    patchify,
    unpatchify,
)

__all__ = [
    "DiT",
    "adamw_ema_",
    "attention",
    "ddim_step",
    "ddpm_step",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "layer_norm_modulate",
    "mlp_gelu",
    "patchify",
    "sincos_position_embedding",
    "unpatchify",
]
