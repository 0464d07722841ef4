"""The Diffusion Transformer as the paper describes it, in plain torch: the specification of `fastdit.DiT`.

Constructor, parameter names and order are the original's; initialisation is torch's own, since weights
are loaded into it.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), section 3.2 and figure 3.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .operations import (
    attention,
    gated_residual,
    layer_norm_modulate,
    mlp_gelu,
    patchify,
    unpatchify,
)

Conditioning = Literal["adaln_zero", "adaln", "cross_attention", "in_context"]


class PatchEmbed(nn.Module):
    """Patches of P x P pixels to tokens of D features: a linear layer, stored as the weight of a convolution."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)
        return F.linear(patchify(x, self.patch_size), weight, self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Sinusoids of 256 frequencies (cosines first), in float32 or wider, then an MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        weights = next(self.parameters()).dtype
        dtype = torch.promote_types(weights, torch.float32)
        k = torch.arange(128, device=t.device, dtype=dtype)
        angles = t.to(dtype)[:, None] * torch.exp(-math.log(10000) * k / 128)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(weights))


class LabelEmbedder(nn.Module):
    """One vector a class and one more, the null label, which replaces a label with `dropout_prob` in training."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(dropout_prob > 0), hidden_size)
        self.num_classes, self.dropout_prob = num_classes, dropout_prob

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(y.shape[0], device=y.device) < self.dropout_prob
            y = torch.where(dropped, self.num_classes, y)
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention with one projection for q, k and v (Vaswani et al. 2017, section 3.2.2)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, d // self.num_heads).unbind(2)
        return self.proj(attention(q, k, v).reshape(n, t, d))


class CrossAttention(nn.Module):
    """Image tokens attend to conditioning tokens."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        n, t, d = x.shape
        heads, k_dim = self.num_heads, d // self.num_heads
        q = self.q(x).reshape(n, t, heads, k_dim)
        k, v = self.kv(c).reshape(n, c.shape[1], 2, heads, k_dim).unbind(2)
        return self.proj(attention(q, k, v).reshape(n, t, d))


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, mlp_hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden_size)
        self.fc2 = nn.Linear(mlp_hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return mlp_gelu(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class AdaLNBlock(nn.Module):
    """adaLN regresses shift and scale from c; adaLN-Zero also a gate for every residual branch."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden_size: int, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, mlp_hidden_size)
        vectors = 6 if gated else 4
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(hidden_size, vectors * hidden_size)
        )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        gate_msa = gate_mlp = None
        modulation = self.adaLN_modulation(c)
        if self.gated:
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, 1)
        else:
            shift_msa, scale_msa, shift_mlp, scale_mlp = modulation.chunk(4, 1)
        h = self.attn(layer_norm_modulate(x, shift=shift_msa, scale=scale_msa))
        x = gated_residual(x, h, gate=gate_msa)
        h = self.mlp(layer_norm_modulate(x, shift=shift_mlp, scale=scale_mlp))
        return gated_residual(x, h, gate=gate_mlp)


class CrossAttentionBlock(nn.Module):
    """t and c are a sequence of two tokens, which image tokens attend to after self-attention."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden_size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm_cross = nn.LayerNorm(hidden_size, eps=1e-6)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = Mlp(hidden_size, mlp_hidden_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm_cross(x), c)
        return x + self.mlp(self.norm2(x))


class InContextBlock(nn.Module):
    """A plain ViT block; t and c are two more tokens of the sequence."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden_size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = Mlp(hidden_size, mlp_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FinalLayer(nn.Module):
    """LN, adaptive where the blocks are, and a linear layer to P*P*C features a token."""

    def __init__(self, hidden_size: int, features: int, adaptive: bool) -> None:
        super().__init__()
        if not adaptive:
            self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6)
        self.linear = nn.Linear(hidden_size, features)
        if adaptive:
            self.adaLN_modulation = nn.Sequential(
                nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size)
            )
        self.adaptive = adaptive

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        if not self.adaptive:
            return self.linear(self.norm_final(x))
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(layer_norm_modulate(x, shift=shift, scale=scale))


class DiT(nn.Module):
    """Noise (and variance) prediction from noisy images x (N, C, H, W), timesteps t (N,) and labels y (N,)."""

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        *,
        conditioning: Conditioning = "adaln_zero",
    ) -> None:
        super().__init__()
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.patch_size, self.in_channels = patch_size, in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.grid = (height // patch_size, width // patch_size)
        self.conditioning = conditioning

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        position = sincos_position_embedding(hidden_size, self.grid)
        self.pos_embed = nn.Parameter(position.float().unsqueeze(0), requires_grad=False)
        mlp_hidden_size = int(hidden_size * mlp_ratio)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            if conditioning == "cross_attention":
                self.blocks.append(CrossAttentionBlock(hidden_size, num_heads, mlp_hidden_size))
            elif conditioning == "in_context":
                self.blocks.append(InContextBlock(hidden_size, num_heads, mlp_hidden_size))
            else:
                gated = conditioning == "adaln_zero"
                self.blocks.append(AdaLNBlock(hidden_size, num_heads, mlp_hidden_size, gated))
        adaptive = conditioning in ("adaln_zero", "adaln")
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels, adaptive)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        t, y = self.t_embedder(t), self.y_embedder(y)
        if self.conditioning == "in_context":
            x = torch.cat([x, t.unsqueeze(1), y.unsqueeze(1)], dim=1)
            for block in self.blocks:
                x = block(x)
            x = self.final_layer(x[:, :-2], None)
        else:
            c = torch.stack([t, y], dim=1) if self.conditioning == "cross_attention" else t + y
            for block in self.blocks:
                x = block(x, c)
            x = self.final_layer(x, c)
        return unpatchify(x, self.patch_size, self.out_channels, self.grid)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022) of the first three channels, as the original does it.

        The batch is [conditional; unconditional]; the second half of x is ignored.
        """
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        eps, rest = out[:, :3], out[:, 3:]
        cond, uncond = eps.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


def sincos_position_embedding(hidden_size: int, grid: tuple[int, int]) -> Tensor:
    """(T, D) float64: the first half of the features encodes the column, the second the row; sines before cosines.

    Within a half of D/2 features: sin and cos of position / 10000 ** (k / (D/4)), k = 0 .. D/4 - 1.
    """
    rows, columns = grid
    k = torch.arange(hidden_size // 4, dtype=torch.float64)
    frequency = 10000 ** -(k / (hidden_size // 4))

    def encode(position: Tensor) -> Tensor:
        angle = position[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    column = encode(torch.arange(columns, dtype=torch.float64)).repeat(rows, 1)
    row = encode(torch.arange(rows, dtype=torch.float64)).repeat_interleave(columns, 0)
    return torch.cat([column, row], dim=1)
