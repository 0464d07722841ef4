"""What turns images, timesteps and labels into vectors, with the original's names."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .fusible import is_plain


class PatchEmbed(nn.Module):
    """Patches to tokens: (N, C, H, W) -> (N, T, D). The linear layer is stored as `proj`, a convolution.

    Source: Peebles & Xie, section 3.2, "Patchify".
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (self.img_size[0] // patch_size, self.img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        proj, p = self.proj, self.patch_size
        if (
            is_plain(proj, nn.Conv2d)
            and proj.kernel_size == proj.stride == p
            and proj.padding == (0, 0)
            and proj.dilation == (1, 1)
            and proj.groups == 1
        ):
            return F.linear(ops.patchify(x, p[0]), proj.weight.flatten(1), proj.bias)
        return proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Timesteps (N,) to vectors (N, D): sinusoids, cosines first, in float32 whatever the model's dtype, and an MLP.

    Source: Vaswani et al. 2017, section 3.5; Peebles & Xie, section 3.2 (256 frequencies, MLP with SiLU).
    """

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size, bias=True),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size, bias=True),
        )
        self.frequency_embedding_size = frequency_embedding_size

    @staticmethod
    def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000) -> Tensor:
        """(N,) -> (N, dim): cos and sin of `t * max_period ** (-k / (dim // 2))`, k = 0 .. dim // 2 - 1; float32."""
        half = dim // 2
        k = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(-math.log(max_period) * k / half)
        embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        return F.pad(embedding, (0, 1)) if dim % 2 else embedding

    def forward(self, t: Tensor) -> Tensor:
        features = self.timestep_embedding(t, self.frequency_embedding_size)
        weight = getattr(self.mlp[0], "weight", None)  # a wrapped linear layer may have none
        return self.mlp(features if weight is None else features.to(weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels (N,) to vectors (N, D). With dropout there is one more class, the null label `num_classes`, for guidance.

    Source: Ho & Salimans 2022, "Classifier-free diffusion guidance", algorithm 1.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def token_drop(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """Replaces labels by the null label: each with `dropout_prob`, or those where `force_drop_ids` is 1."""
        if force_drop_ids is None:
            drop = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
        else:
            drop = force_drop_ids == 1
        return torch.where(drop, self.num_classes, labels)

    def forward(self, labels: Tensor, train: bool, force_drop_ids: Tensor | None = None) -> Tensor:
        if (train and self.dropout_prob > 0) or force_drop_ids is not None:
            labels = self.token_drop(labels, force_drop_ids)
        return self.embedding_table(labels)


def get_2d_sincos_pos_embed(
    embed_dim: int,
    grid_size: int | tuple[int, int],
    cls_token: bool = False,
    extra_tokens: int = 0,
) -> np.ndarray:
    """Position embedding (T, embed_dim), float64, T = rows * columns, row by row; grid_size a side or (rows, columns).

    The first half of the features encodes the column, the second the row. With `cls_token`, `extra_tokens` rows of
    zeros come first.

    Raises ValueError unless embed_dim is divisible by 4.
    """
    rows, columns = grid_size if isinstance(grid_size, (tuple, list)) else (grid_size, grid_size)
    column, row = np.meshgrid(
        np.arange(columns, dtype=np.float32), np.arange(rows, dtype=np.float32)
    )
    embedding = get_2d_sincos_pos_embed_from_grid(embed_dim, np.stack([column, row]))
    if cls_token and extra_tokens > 0:
        embedding = np.concatenate([np.zeros([extra_tokens, embed_dim]), embedding])
    return embedding


def get_2d_sincos_pos_embed_from_grid(embed_dim: int, grid: np.ndarray) -> np.ndarray:
    """The embeddings (M, embed_dim/2) of `grid[0]` and of `grid[1]`, side by side.

    Raises ValueError unless embed_dim is divisible by 4.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim={embed_dim}: must be divisible by 4")
    halves = [get_1d_sincos_pos_embed_from_grid(embed_dim // 2, axis) for axis in grid]
    return np.concatenate(halves, axis=1)


def get_1d_sincos_pos_embed_from_grid(embed_dim: int, pos: np.ndarray) -> np.ndarray:
    """(M,) positions -> (M, embed_dim): sin, then cos, of `pos / 10000 ** (k / (embed_dim / 2))`; float64.

    Raises ValueError unless embed_dim is even.
    """
    if embed_dim % 2:
        raise ValueError(f"embed_dim={embed_dim}: must be even")
    omega = 1.0 / 10000 ** (np.arange(embed_dim // 2, dtype=np.float64) / (embed_dim / 2.0))
    angles = np.outer(pos.reshape(-1), omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
