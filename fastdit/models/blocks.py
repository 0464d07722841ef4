"""The four blocks of the paper (figure 3) and the final layer.

adaLN and adaLN-Zero run on fused seams: a block hands its last branch on, and the next one adds it in the pass that
normalises (CONTRIBUTING.md has the picture). The cross-attention and in-context blocks are plain.

Shapes: x (N, T, D) the residual stream, c (N, D) the conditioning, K = D / num_heads.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .fusible import is_plain, user_hooks

Conditioning = Literal["adaln_zero", "adaln", "cross_attention", "in_context"]

# What a block has not added yet: nothing, or its branch (N, T, D) and gate (N, D) or None.
Pending: TypeAlias = tuple[()] | tuple[Tensor, Tensor | None]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x * (1 + scale) + shift`; x (N, T, D), shift and scale (N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    """Multi-head self-attention; the rows of `qkv` are q of all heads, k of all heads, v of all heads."""

    # How it is computed, not what it is: see `DiT.set_attention`.
    backend: str = "auto"
    deterministic: bool = True

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"hidden_size={dim}: must be divisible by num_heads={num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv: Tensor) -> Tensor:
        """What lies between the two linear layers: (N, T, 3 * D) -> (N, T, D)."""
        return ops.attention_qkvpacked(
            qkv,
            self.num_heads,
            scale=self.scale,
            backend=self.backend,
            deterministic=self.deterministic,
        )


class CrossAttention(nn.Module):
    """Multi-head attention of the image tokens x (N, T, D) to conditioning tokens c (N, S, D)."""

    backend: str = "auto"
    deterministic: bool = True

    def __init__(self, dim: int, num_heads: int = 8) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        n, t, d = x.shape
        q = self.q(x).reshape(n, t, self.num_heads, self.head_dim)
        k, v = self.kv(c).reshape(n, c.shape[1], 2, self.num_heads, self.head_dim).unbind(2)
        out = ops.attention(q, k, v, backend=self.backend, deterministic=self.deterministic)
        return self.proj(out.reshape(n, t, d))


class Mlp(nn.Module):
    """`fc2(gelu(fc1(x)))`, tanh GELU."""

    def __init__(self, in_features: int, hidden_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        if (weights := self.weights()) is not None:
            return ops.mlp_gelu(x, *weights)
        return self.fc2(self.act(self.fc1(x)))

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Both layers' weight and bias if that is all there is to them; None if they have to be called."""
        fc1, act, fc2 = self.fc1, self.act, self.fc2
        if (
            is_plain(fc1, nn.Linear)
            and is_plain(act, nn.GELU)
            and is_plain(fc2, nn.Linear)
            and act.approximate == "tanh"
            and fc1.bias is not None
            and fc2.bias is not None
        ):
            return fc1.weight, fc1.bias, fc2.weight, fc2.bias
        return None


class LayerNorm(nn.LayerNorm):
    """Affine LN in the dtype of its input, which may be wider than its weight; the result has the weight's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


def materialise(x: Tensor, pending: Pending) -> Tensor:
    """The residual stream with its pending branch added."""
    return ops.gated_residual(x, pending[0], gate=pending[1]) if pending else x


def seam(
    norm: nn.Module, x: Tensor, pending: Pending, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Adds the pending branch to x; returns x and `modulate(norm(x), shift, scale)`, in one pass where possible."""
    if not is_plain_norm(norm):
        x = materialise(x, pending)
        return x, modulate(norm(x), shift, scale).to(shift.dtype)
    if not pending:
        h = ops.layer_norm_modulate(
            x, shift=shift, scale=scale, eps=norm.eps, out_dtype=shift.dtype
        )
        return x, h
    branch, gate = pending
    return ops.gated_residual_layer_norm_modulate(
        x, branch, gate=gate, shift=shift, scale=scale, eps=norm.eps
    )


def is_plain_norm(norm: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether `norm` is a layer norm without affine parameters, and that is all there is to it."""
    return is_plain(norm, nn.LayerNorm) and isinstance(norm, nn.LayerNorm) and norm.weight is None


class DiTBlock(nn.Module):
    """A block with adaptive layer norm: adaLN-Zero, or adaLN without its gates.

    `x = x + gate_msa * attn(modulate(norm1(x), shift_msa, scale_msa))`, then
    `x = x + gate_mlp * mlp(modulate(norm2(x), shift_mlp, scale_mlp))`, the six vectors (adaLN: four, no gates) from
    `adaLN_modulation(c)` in the order shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp.

    Source: Peebles & Xie, section 3.2, "adaLN block", "adaLN-Zero block".
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        conditioning: Literal["adaln_zero", "adaln"] = "adaln_zero",
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.gated = conditioning == "adaln_zero"
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        vectors = 6 if self.gated else 4
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(hidden_size, vectors * hidden_size, bias=True)
        )

    def forward(
        self,
        x: Tensor,
        c: Tensor | None,
        pending: Pending | None = None,
        modulation: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Pending]:
        """`block(x, c)` is the original's block: (N, T, D) and (N, D) -> (N, T, D).

        With `pending`, the branch and gate that the block before has not added (an empty tuple before the first block),
        it returns x and its own pending branch instead. `modulation` (N, 6 * D) replaces `adaLN_modulation(c)`,
        and c may then be None.
        """
        if modulation is None:
            modulation = self.adaLN_modulation(c)
        gate_msa: Tensor | None = None
        gate_mlp: Tensor | None = None
        if self.gated:
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, 1)
        else:
            shift_msa, scale_msa, shift_mlp, scale_mlp = modulation.chunk(4, dim=1)
        if self._recomputes(x):
            x, branch = self._recomputing(
                x,
                pending or (),
                gate_msa,
                {"shift": shift_msa, "scale": scale_msa, "eps": self.norm1.eps},
                {"shift": shift_mlp, "scale": scale_mlp, "eps": self.norm2.eps},
            )
        else:
            x, h = seam(self.norm1, x, pending or (), shift_msa, scale_msa)
            x, h = seam(self.norm2, x, (self.attn(h), gate_msa), shift_mlp, scale_mlp)
            branch = self.mlp(h)
        mine: Pending = (branch, gate_mlp)
        return materialise(x, mine) if pending is None else (x, mine)

    def _recomputes(self, x: Tensor) -> bool:
        """Whether the block may reach over its submodules, so that no normalised tensor is kept for the backward."""
        attn, mlp = self.attn, self.mlp
        return (
            ops.recomputes(x)
            and is_plain_norm(self.norm1)
            and is_plain_norm(self.norm2)
            and is_plain(attn, Attention)
            and type(attn).forward is _ATTENTION
            and is_plain(attn.qkv, nn.Linear)
            and is_plain(attn.proj, nn.Linear)
            and is_plain(mlp, Mlp)
            and type(mlp).forward is _MLP
            and mlp.weights() is not None
        )

    def _recomputing(
        self,
        x: Tensor,
        pending: Pending,
        gate: Tensor | None,
        first: dict[str, Any],
        second: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """The residual stream before the block's last branch, and that branch."""
        qkv, proj = self.attn.qkv, self.attn.proj
        if pending:
            x, projected = ops.gated_residual_layer_norm_modulate_linear(
                x, pending[0], qkv.weight, qkv.bias, gate=pending[1], **first
            )
        else:
            projected = ops.layer_norm_modulate_linear(x, qkv.weight, qkv.bias, **first)
        # The seam adds the bias, and its backward sums the bias's gradient in passing.
        branch = F.linear(self.attn.attend(projected), proj.weight)
        weights = self.mlp.weights()
        assert weights is not None  # `_recomputes` has seen it
        return ops.gated_residual_layer_norm_modulate_mlp_gelu(
            x, branch, *weights, gate=gate, branch_bias=proj.bias, **second
        )


class CrossAttentionBlock(nn.Module):
    """Self-attention, attention to the conditioning tokens c (N, 2, D), which are the timestep's and the label's, MLP.

    Source: Peebles & Xie, section 3.2, "Cross-attention block"; Vaswani et al. 2017, section 3.1.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = LayerNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads)
        self.norm_cross = LayerNorm(hidden_size, eps=1e-6)
        self.cross_attn = CrossAttention(hidden_size, num_heads=num_heads)
        self.norm2 = LayerNorm(hidden_size, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)).to(x.dtype)
        x = x + self.cross_attn(self.norm_cross(x), c).to(x.dtype)
        return x + self.mlp(self.norm2(x)).to(x.dtype)


class InContextBlock(nn.Module):
    """A plain pre-norm ViT block; timestep and label are two more tokens of x (N, T + 2, D), and c is not used.

    Source: Peebles & Xie, section 3.2, "In-context conditioning"; Dosovitskiy et al. 2021 (ViT), section 3.1.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = LayerNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads)
        self.norm2 = LayerNorm(hidden_size, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x)).to(x.dtype)
        return x + self.mlp(self.norm2(x)).to(x.dtype)


class FinalLayer(nn.Module):
    """Layer norm, adaptive where the blocks are, and a linear layer: (N, T, D) -> (N, T, P*P*C).

    `linear(modulate(norm_final(x), shift, scale))` with shift, scale from `adaLN_modulation(c)`, in this order.

    Source: Peebles & Xie, section 3.2, "Transformer decoder".
    """

    def __init__(
        self, hidden_size: int, patch_size: int, out_channels: int, *, adaptive: bool = True
    ) -> None:
        super().__init__()
        self.adaptive = adaptive
        self.norm_final: nn.LayerNorm
        if adaptive:
            self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        else:
            self.norm_final = LayerNorm(hidden_size, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels, bias=True)
        if adaptive:
            self.adaLN_modulation = nn.Sequential(
                nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size, bias=True)
            )

    def forward(
        self,
        x: Tensor,
        c: Tensor | None,
        pending: Pending = (),
        modulation: Tensor | None = None,
    ) -> Tensor:
        """`pending` is what the last block has not added; `modulation` (N, 2 * D) replaces `adaLN_modulation(c)`."""
        if not self.adaptive:
            return self.linear(self.norm_final(materialise(x, pending)))
        if modulation is None:
            modulation = self.adaLN_modulation(c)
        shift, scale = modulation.chunk(2, dim=1)
        _, h = seam(self.norm_final, x, pending, shift, scale)
        return self.linear(h)


# As they are written here: a subclass or a patched class may have another `forward`.
_FORWARDS = (DiTBlock.forward, FinalLayer.forward)
_ATTENTION, _MLP = Attention.forward, Mlp.forward


def hands_on(module: nn.Module) -> bool:
    """Whether a block or final layer may be called with `pending`.

    Not a foreign module or a wrapper, which knows only `module(x, c)`, and not one with hooks or a `forward` of its
    own, which want the original's arguments and result.
    """
    inner = getattr(module, "_orig_mod", module)  # torch.compile(module)
    return (
        isinstance(inner, (DiTBlock, FinalLayer))
        and type(inner).forward in _FORWARDS
        and "forward" not in inner.__dict__
        and not user_hooks(inner)
        and (inner is module or not user_hooks(module))
    )


def make_block(
    conditioning: Conditioning, hidden_size: int, num_heads: int, mlp_ratio: float
) -> nn.Module:
    """One block of the given kind."""
    if conditioning == "cross_attention":
        return CrossAttentionBlock(hidden_size, num_heads, mlp_ratio)
    if conditioning == "in_context":
        return InContextBlock(hidden_size, num_heads, mlp_ratio)
    return DiTBlock(hidden_size, num_heads, mlp_ratio, conditioning=conditioning)
