"""The fused operations. Each is a plain function; which implementation runs is decided by `fastdit.use_backend`.

The names are imported here eagerly: an operation and its module share a name, and a lazy one would be shadowed.
"""

from .adamw_ema import adamw_ema_
from .attention import attention, attention_qkvpacked
from .diffusion_step import ddim_step, ddpm_step
from .gated_residual import gated_residual
from .gated_residual_layer_norm_modulate import gated_residual_layer_norm_modulate
from .layer_norm_modulate import layer_norm_modulate
from .mlp_gelu import mlp_gelu
from .patchify import patchify
from .recomputed import (
    gated_residual_layer_norm_modulate_linear,
    gated_residual_layer_norm_modulate_mlp_gelu,
    layer_norm_modulate_linear,
    recomputes,
)
from .unpatchify import unpatchify

__all__ = [
    "adamw_ema_",
    "attention",
    "attention_qkvpacked",
    "ddim_step",
    "ddpm_step",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "gated_residual_layer_norm_modulate_linear",
    "gated_residual_layer_norm_modulate_mlp_gelu",
    "layer_norm_modulate",
    "layer_norm_modulate_linear",
    "mlp_gelu",
    "patchify",
    "recomputes",
    "unpatchify",
]
