"""`DiT`, a drop-in for facebookresearch/DiT's model: its constructor, attributes, calls, parameter names and order.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748).
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..attention import CHOICES, Like, choose
from ..files import PathLike
from ..validation import (
    autocast_enabled,
    checks_values,
    require_choice,
    require_floating,
    require_same_device,
)
from .blocks import (
    Attention,
    Conditioning,
    CrossAttention,
    FinalLayer,
    Pending,
    hands_on,
    make_block,
    materialise,
)
from .embeddings import LabelEmbedder, PatchEmbed, TimestepEmbedder, get_2d_sincos_pos_embed
from .fusible import user_hooks

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class DiT(nn.Module):
    """Diffusion Transformer: predicts noise, and with `learn_sigma` the variance, of noisy images.

    Arguments, as the original's:
        input_size: height and width of x in pixels or latents; one number, or (H, W).
        patch_size: P; a token is a patch of P x P.
        in_channels: channels C of x.
        hidden_size: D, divisible by 4 and by num_heads.
        depth: number of blocks.
        num_heads: heads of the attention.
        mlp_ratio: hidden width of the MLP divided by D.
        class_dropout_prob: share of labels that training replaces by the null label; 0 means no null label, hence no
            guidance.
        num_classes: number of labels; the null label is `num_classes`.
        learn_sigma: whether the output has 2C channels, the second half for the variance.
    and, keyword-only:
        conditioning: the paper's four blocks: "adaln_zero" (the original), "adaln", "cross_attention", "in_context".
        residual_dtype: dtype of the residual stream; None is float32 under autocast, else the model's dtype.
        attention, attention_deterministic: see `set_attention`.

    Raises ValueError naming the argument for sizes that do not fit together.
    """

    num_timesteps = 1000  # of the process that it denoises; only `check_values` reads it

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
        residual_dtype: torch.dtype | None = None,
        attention: str = "auto",
        attention_deterministic: bool = True,
    ) -> None:
        super().__init__()
        patch_size = _positive_integer("patch_size", patch_size)
        in_channels = _positive_integer("in_channels", in_channels)
        hidden_size = _positive_integer("hidden_size", hidden_size)
        depth = _positive_integer("depth", depth)
        num_heads = _positive_integer("num_heads", num_heads)
        num_classes = _positive_integer("num_classes", num_classes)
        if hidden_size % 4:
            raise ValueError(f"hidden_size={hidden_size}: must be divisible by 4")
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size={hidden_size}: must be divisible by num_heads={num_heads}"
            )
        if not 0 < mlp_ratio < math.inf or int(hidden_size * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio={mlp_ratio!r}: must be positive and finite")
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob={class_dropout_prob!r}: must be in [0, 1]")
        require_choice("conditioning", conditioning, get_args(Conditioning))
        if residual_dtype is not None and not (
            isinstance(residual_dtype, torch.dtype) and residual_dtype.is_floating_point
        ):
            raise TypeError(
                f"residual_dtype={residual_dtype!r}: must be None or a floating-point dtype"
            )
        sides = input_size if isinstance(input_size, (tuple, list)) else (input_size, input_size)
        size = tuple(_positive_integer("input_size", side) for side in sides)
        if len(size) != 2 or any(side % patch_size for side in size):
            raise ValueError(
                f"input_size={input_size!r}: must be one or two positive integers divisible by patch_size={patch_size}"
            )

        self.input_size: tuple[int, int] = (size[0], size[1])
        self.learn_sigma = learn_sigma
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.patch_size = patch_size
        self.num_heads = num_heads
        self.num_classes = num_classes
        self.conditioning = conditioning
        self.residual_dtype = residual_dtype
        # In training keep only the stream between the blocks, and compute them again in the backward: less memory, a
        # third more arithmetic.
        self.recompute_blocks = False
        self._mlp_ratio = mlp_ratio

        # The order of construction is the original's: default initialisation draws random numbers.
        self.x_embedder = PatchEmbed(self.input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(
            torch.zeros(1, self.x_embedder.num_patches, hidden_size), requires_grad=False
        )
        self.blocks = nn.ModuleList(
            make_block(conditioning, hidden_size, num_heads, mlp_ratio) for _ in range(depth)
        )
        self.final_layer = FinalLayer(
            hidden_size,
            patch_size,
            self.out_channels,
            adaptive=conditioning in ("adaln_zero", "adaln"),
        )
        self.initialize_weights()
        self.set_attention(attention, deterministic=attention_deterministic)

    def set_attention(self, name: str, *, deterministic: bool = True) -> None:
        """Chooses what attention runs in: "auto", or a backend of `fastdit.attention.BACKENDS`, which runs or raises.

        With `deterministic` a training step gives the same bits every time, as a run that is resumed has to: "auto"
        then takes no backend that cannot, and a backend that was named is asked for it. This is not part of `config`
        or of the weights. Raises ValueError for another name.
        """
        require_choice("attention", name, CHOICES)
        for module in self.modules():
            if isinstance(module, (Attention, CrossAttention)):
                module.backend, module.deterministic = name, deterministic

    def attention_in_use(
        self, batch: int, *, training: bool, dtype: torch.dtype | None = None
    ) -> dict[str, str]:
        """The backend that runs for a batch: of every kind of attention there is, "attn" and "cross_attn".

        `training` says whether a backward follows; `dtype` is what the attention computes in, by default the model's,
        under autocast autocast's. Raises RuntimeError where the backend that was chosen cannot run.
        """
        device = self.pos_embed.device
        if dtype is None:
            autocast = autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device.type) if autocast else self.pos_embed.dtype
        tokens = self.pos_embed.shape[1] + (2 if self.conditioning == "in_context" else 0)
        found = {}
        for name, module in self.blocks[0].named_children():
            if isinstance(module, (Attention, CrossAttention)):
                keys = tokens if isinstance(module, Attention) else 2
                q, k = (
                    Like((batch, n, module.num_heads, module.head_dim), dtype, device, training)
                    for n in (tokens, keys)
                )
                with torch.set_grad_enabled(training):
                    found[name] = choose(q, k, k, module.backend, module.deterministic)
        return found

    def initialize_weights(self) -> None:
        """The original's initialisation; draws the same random numbers in the same order, so a seed gives its weights.

        Linear layers Xavier-uniform with zero bias; label table and timestep MLP normal with std 0.02; adaLN-Zero's
        modulation and the final linear layer zero, so that every block starts as the identity (Peebles & Xie, section
        3.2). In the other conditionings only the final linear layer is zero.
        """

        def basic_init(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        self.apply(basic_init)
        position = get_2d_sincos_pos_embed(self.pos_embed.shape[-1], self.x_embedder.grid_size)
        self.pos_embed.data.copy_(torch.from_numpy(position).float().unsqueeze(0))
        proj = self.x_embedder.proj
        nn.init.xavier_uniform_(proj.weight.data.view(proj.weight.shape[0], -1))
        if proj.bias is not None:
            nn.init.zeros_(proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for linear in self.t_embedder.mlp:
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=0.02)
        if self.conditioning == "adaln_zero":
            for module in (*self.blocks, self.final_layer):
                for parameter in module.adaLN_modulation.parameters():
                    nn.init.zeros_(parameter)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    @property
    def null_label(self) -> int | None:
        """The label that means "no class", or None if the model was made without one."""
        return self.num_classes if self.y_embedder.dropout_prob > 0 else None

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON: `DiT(**config)` makes a model of the same shape."""
        height, width = self.input_size
        return {
            "input_size": height if height == width else [height, width],
            "patch_size": self.patch_size,
            "in_channels": self.in_channels,
            "hidden_size": self.pos_embed.shape[-1],
            "depth": len(self.blocks),
            "num_heads": self.num_heads,
            "mlp_ratio": self._mlp_ratio,
            "class_dropout_prob": self.y_embedder.dropout_prob,
            "num_classes": self.num_classes,
            "learn_sigma": self.learn_sigma,
            "conditioning": self.conditioning,
        }

    @classmethod
    def from_pretrained(cls, path_or_name: PathLike, **options: Any) -> DiT:
        """`fastdit.from_pretrained`."""
        from ..weights import from_pretrained

        return from_pretrained(path_or_name, **options)

    def save_pretrained(self, folder: PathLike) -> None:
        """Writes config.json and model.safetensors into `folder`; `from_pretrained` reads it."""
        from ..weights import save_pretrained

        save_pretrained(self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str = "Upload DiT with fastdit",
    ) -> str:
        """Uploads what `save_pretrained` writes to the Hub as `org/name`; the address of the commit."""
        from ..weights import push_to_hub

        return push_to_hub(self, repo_id, private=private, commit_message=commit_message)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, *, return_hidden: Sequence[int] | None = None
    ) -> Any:
        """Predicted noise, and variance with `learn_sigma`: (N, C, H, W) -> (N, out_channels, H, W).

        x (N, C, H, W) in the model's dtype (any under autocast); t (N,) or a scalar for all, timesteps 0 .. 999,
        integer or float32, embedded in float32; y (N,) integer labels 0 .. num_classes, the last being the null label.

        With `return_hidden`, the indices of blocks, returns (output, [the residual stream (N, T, D) after each]), in
        ascending order.

        Raises TypeError for a wrong dtype and ValueError for a wrong shape or device, naming the argument.
        """
        tokens, hidden = self._forward_tokens(x, t, y, return_hidden or ())
        images = self.unpatchify(tokens)
        return images if return_hidden is None else (images, hidden)

    def forward_tokens(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """`forward` without `unpatchify`: the last linear layer's output, (N, T, P*P*out_channels)."""
        return self._forward_tokens(x, t, y, ())[0]

    def takes_modulation(self) -> bool:
        """Whether `forward_modulated` does what `forward` does: adaptive layer norm throughout, nothing replaced.

        Not where a block, the final layer or the model has hooks or a `forward` of its own, or sharded weights.
        """
        return (
            type(self) is DiT
            and self.conditioning in ("adaln_zero", "adaln")
            and "forward" not in self.__dict__
            and not user_hooks(self)
            and all(hands_on(module) for module in (*self.blocks, self.final_layer))
            and all(type(parameter.data) is Tensor for parameter in self.parameters())
        )

    def modulations(self, t: Tensor, y: Tensor) -> Tensor:
        """All that t and y decide: (N,) and (N,) -> (N, W), the outputs of every `adaLN_modulation`, side by side.

        W = depth * 6 * D + 2 * D (adaLN: depth * 4 * D + 2 * D). No label is dropped. Made by the blocks' own layers.
        """
        c = self.t_embedder(t) + self.y_embedder(y, False)
        modules = (*self.blocks, self.final_layer)
        return torch.cat([module.adaLN_modulation(c) for module in modules], dim=1)

    def forward_modulated(self, x: Tensor, modulations: Tensor) -> Tensor:
        """`forward_tokens(x, t, y)` with `modulations(t, y)`: (N, C, H, W) and (N, W) -> (N, T, P*P*out_channels).

        Sampling computes what depends on t and y alone once for all steps. Only where `takes_modulation()`.
        """
        x = self._embed(x)
        d = x.shape[-1]
        width = (6 if self.conditioning == "adaln_zero" else 4) * d
        pending: Pending = ()
        for block, modulation in zip(self.blocks, modulations.split(width, dim=1), strict=False):
            x, pending = block(x, None, pending, modulation)
        tokens: Tensor = self.final_layer(x, None, pending, modulations[:, -2 * d :])
        return tokens

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float | Tensor,
        *,
        cfg_channels: Literal[3, "all"] = 3,
    ) -> Tensor:
        """`forward` with classifier-free guidance: `eps = uncond + cfg_scale * (cond - uncond)`.

        The batch is [conditional; unconditional]: x (2N, C, H, W), of which only the first half is read, t (2N,), y
        (2N,) whose second half is usually the null label. Both halves of the result carry the guided noise; what is
        not guided (the variance, and with `cfg_channels=3` the noise channels from the fourth on) is each
        half's own.

        `cfg_channels=3` guides the first min(3, C) channels, as the original does and as its published results were
        made; "all" guides all C. By the paper's appendix A, a scale 1 + x on three channels acts like 1 + 3x/4 on four.

        `cfg_scale`: a finite number, or a tensor of (N,) or (N, 1, 1, 1), one scale a sample.

        Source: Ho & Salimans 2022; Peebles & Xie, section 3.1 and appendix A. Raises as `forward`.
        """
        require_choice("cfg_channels", cfg_channels, (3, "all"))
        require_floating("x", x)
        if x.dim() != 4 or x.shape[0] % 2:
            raise ValueError(
                f"x: guidance needs an even batch [conditional; unconditional] of 4-D images, "
                f"got shape {tuple(x.shape)}"
            )
        scale = _guidance_scale(cfg_scale, x.shape[0] // 2, x)
        half = x[: x.shape[0] // 2]
        # Not self.forward: a compiled model, fully_shard and hooks act on calls.
        out = self(torch.cat([half, half]), t, y)
        guided = self.in_channels if cfg_channels == "all" else min(3, self.in_channels)
        eps, rest = out[:, :guided], out[:, guided:]
        cond, uncond = eps.chunk(2)
        eps = uncond + scale * (cond - uncond)
        return torch.cat([torch.cat([eps, eps]), rest], dim=1)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Tokens to images: (N, T, P*P*out_channels) -> (N, out_channels, H, W)."""
        grid = self.x_embedder.grid_size
        if x.dim() == 3 and x.shape[1] != grid[0] * grid[1]:
            side = math.isqrt(x.shape[1])
            grid = (side, side)  # as the original, which takes any square number of tokens
        return ops.unpatchify(x, self.patch_size, self.out_channels, grid)

    def _forward_tokens(
        self, x: Tensor, t: Tensor, y: Tensor, return_hidden: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        t, y = self._check(x, t, y)
        if checks_values(x):
            self.check_values(x, t, y)
        for index in return_hidden:
            if not 0 <= index < len(self.blocks):
                raise ValueError(
                    f"return_hidden={list(return_hidden)}: block indices are 0 .. {len(self.blocks) - 1}"
                )
        x = self._embed(x)
        drop = self.training and self.y_embedder.training  # a trainer may drop labels itself
        t, y = self.t_embedder(t), self.y_embedder(y, drop)
        if self.conditioning == "in_context":
            x = torch.cat([x, t.unsqueeze(1).to(x.dtype), y.unsqueeze(1).to(x.dtype)], dim=1)
        c = (
            torch.stack([t, y.to(t.dtype)], dim=1)
            if self.conditioning == "cross_attention"
            else t + y
        )

        hidden: list[Tensor] = []
        pending: Pending = ()
        for index, block in enumerate(self.blocks):
            if self.recompute_blocks and torch.is_grad_enabled():
                stream = materialise(x, pending)
                x = checkpoint(block, stream, c, use_reentrant=False, preserve_rng_state=False)
                pending = ()
            elif hands_on(block):
                x, pending = block(x, c, pending)
            else:
                x, pending = block(materialise(x, pending), c), ()
            if index in return_hidden:
                x, pending = materialise(x, pending), ()
                hidden.append(self._image_tokens(x))
        if pending and hands_on(self.final_layer):
            return self.final_layer(x, c, pending), hidden
        return self.final_layer(self._image_tokens(materialise(x, pending)), c), hidden

    def _embed(self, x: Tensor) -> Tensor:
        """The residual stream (N, T, D) before the first block."""
        x = self.x_embedder(x) + self.pos_embed
        if self.residual_dtype is not None:
            return x.to(self.residual_dtype)
        return x.float() if autocast_enabled(x.device) else x

    def _image_tokens(self, x: Tensor) -> Tensor:
        return x[:, :-2] if self.conditioning == "in_context" else x

    def _check(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Raises for a wrong type, shape, dtype or device; returns t as (N,) and y as an index.

        Embedders of another class, which somebody put in, know themselves what they take.
        """
        require_floating("x", x)
        if type(self.x_embedder) is PatchEmbed:
            channels = getattr(self.x_embedder.proj, "in_channels", self.in_channels)
            expected = (channels, *self.x_embedder.img_size)
            if x.dim() != 4 or tuple(x.shape[1:]) != expected:
                raise ValueError(
                    f"x: expected shape (N, {', '.join(map(str, expected))}) from in_channels={channels} and "
                    f"input_size={expected[1:]}, got {tuple(x.shape)}{self._hint(x)}"
                )
        dtype = self.pos_embed.dtype
        if x.dtype != dtype:
            autocast = autocast_enabled(x.device)
            if not autocast or torch.float64 in (x.dtype, dtype):
                raise TypeError(
                    f"x: has dtype {x.dtype}, the model {dtype}; cast one of them, or use torch.autocast for "
                    "float32 weights"
                )
        n = x.shape[0]  # len(x) would be a constant to a compiler
        for name, value in (("t", t), ("y", y)):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{name}: expected a tensor of shape ({n},), got {type(value).__name__}"
                )
        if t.dim() == 0:
            t = t.expand(n)
        if t.shape != (n,):
            raise ValueError(f"t: expected shape ({n},) or a scalar, got {tuple(t.shape)}")
        if t.dtype is torch.bfloat16:
            raise TypeError(
                "t: has dtype torch.bfloat16, which turns 999 into 1000; use int64 or float32"
            )
        if t.dtype is torch.bool or t.is_complex():
            raise TypeError(f"t: expected integers or floats, got dtype {t.dtype}")
        require_same_device(x=x, t=t, y=y, model=self.pos_embed)
        if type(self.y_embedder) is not LabelEmbedder:
            return t, y
        if y.dtype not in _INTEGERS:
            raise TypeError(f"y: expected integer labels, got dtype {y.dtype}")
        if y.shape != (n,):
            one_hot = y.dim() == 2 and y.shape[1] in (self.num_classes, self.num_classes + 1)
            hint = "; for one-hot labels use y.argmax(1)" if one_hot else ""
            raise ValueError(f"y: expected shape ({n},), got {tuple(y.shape)}{hint}")
        return t, y if y.dtype in (torch.int64, torch.int32) else y.long()

    def _hint(self, x: Tensor) -> str:
        if x.dim() == 3:
            return "; add a batch dimension with x.unsqueeze(0)"
        if x.dim() == 4 and x.shape[-1] == self.in_channels and x.shape[1] != self.in_channels:
            return "; channels come second: x.permute(0, 3, 1, 2)"
        if x.dim() == 4 and x.shape[1] == self.in_channels:
            if any(size % self.patch_size for size in x.shape[2:]):
                return f"; height and width must be divisible by patch_size={self.patch_size}"
            return f"; for this size make the model with input_size={tuple(x.shape[2:])}"
        return ""

    def check_values(self, x: Tensor | None, t: Tensor | None, y: Tensor | None) -> None:
        """Reads values from the device; raises ValueError for labels or timesteps out of range, NaN and Inf.

        Called once at the entry of sampling and training, and on every call under `fastdit.validate("full")`. None
        skips an argument. Warns if all t are fractions up to 1, since timesteps are 0 .. num_timesteps - 1.
        """
        if y is not None and y.numel() and type(self.y_embedder) is LabelEmbedder:
            highest = self.num_classes - 1 if self.null_label is None else self.num_classes
            wrong = ((y < 0) | (y > highest)).nonzero()
            if len(wrong):
                index = int(wrong[0])
                label = int(y[index])
                hint = ""
                if label == self.num_classes:
                    hint = "; this model has no null class (class_dropout_prob=0), so guidance is not available"
                elif label < 0 and self.null_label is not None:
                    hint = f"; the null label is {self.null_label}"
                raise ValueError(f"y[{index}]={label}: allowed are 0 .. {highest}{hint}")
        if t is not None and t.numel():
            # Continuous times of other processes may reach the end. A NaN fails both comparisons.
            last = self.num_timesteps if t.is_floating_point() else self.num_timesteps - 1
            bad = (~((t >= 0) & (t <= last))).nonzero()
            if len(bad):
                index = int(bad[0])
                raise ValueError(
                    f"t[{index}]={t.reshape(-1)[index].item()}: allowed are 0 .. {last}, "
                    f"from the model's num_timesteps={self.num_timesteps}"
                )
            if t.is_floating_point() and bool((t <= 1).all()) and bool((t != t.round()).any()):
                warnings.warn(
                    "t: all timesteps are fractions up to 1; this model takes timesteps 0 .. "
                    f"{self.num_timesteps - 1}",
                    stacklevel=2,
                )
        if x is not None and not bool(x.isfinite().all()):
            raise ValueError(f"x: has {int((~x.isfinite()).sum())} values that are NaN or Inf")


def _positive_integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}={value!r}: must be a positive integer")
    return int(value)


def _guidance_scale(cfg_scale: float | Tensor, n: int, x: Tensor) -> float | Tensor:
    """`cfg_scale` as a finite number or as (N, 1, 1, 1)."""
    if isinstance(cfg_scale, Tensor):
        if cfg_scale.dim() == 0:
            return cfg_scale
        if tuple(cfg_scale.shape) not in ((n,), (n, 1, 1, 1)):
            raise ValueError(
                f"cfg_scale: expected a number or a tensor of shape ({n},) or ({n}, 1, 1, 1), one scale a sample, "
                f"got shape {tuple(cfg_scale.shape)}"
            )
        require_same_device(x=x, cfg_scale=cfg_scale)
        if checks_values(x) and not bool(cfg_scale.isfinite().all()):
            raise ValueError(f"cfg_scale={cfg_scale.tolist()}: must be finite")
        return cfg_scale.reshape(n, 1, 1, 1).to(x.dtype)
    if not isinstance(cfg_scale, numbers.Real) or isinstance(cfg_scale, bool):
        raise TypeError(f"cfg_scale={cfg_scale!r}: expected a number or a tensor")
    if cfg_scale != cfg_scale or cfg_scale in (float("inf"), float("-inf")):
        raise ValueError(f"cfg_scale={cfg_scale!r}: must be finite")
    return float(cfg_scale)


# The models of the paper, table 1.


def DiT_XL_2(**kwargs: Any) -> DiT:
    return DiT(depth=28, hidden_size=1152, patch_size=2, num_heads=16, **kwargs)


def DiT_XL_4(**kwargs: Any) -> DiT:
    return DiT(depth=28, hidden_size=1152, patch_size=4, num_heads=16, **kwargs)


def DiT_XL_8(**kwargs: Any) -> DiT:
    return DiT(depth=28, hidden_size=1152, patch_size=8, num_heads=16, **kwargs)


def DiT_L_2(**kwargs: Any) -> DiT:
    return DiT(depth=24, hidden_size=1024, patch_size=2, num_heads=16, **kwargs)


def DiT_L_4(**kwargs: Any) -> DiT:
    return DiT(depth=24, hidden_size=1024, patch_size=4, num_heads=16, **kwargs)


def DiT_L_8(**kwargs: Any) -> DiT:
    return DiT(depth=24, hidden_size=1024, patch_size=8, num_heads=16, **kwargs)


def DiT_B_2(**kwargs: Any) -> DiT:
    return DiT(depth=12, hidden_size=768, patch_size=2, num_heads=12, **kwargs)


def DiT_B_4(**kwargs: Any) -> DiT:
    return DiT(depth=12, hidden_size=768, patch_size=4, num_heads=12, **kwargs)


def DiT_B_8(**kwargs: Any) -> DiT:
    return DiT(depth=12, hidden_size=768, patch_size=8, num_heads=12, **kwargs)


def DiT_S_2(**kwargs: Any) -> DiT:
    return DiT(depth=12, hidden_size=384, patch_size=2, num_heads=6, **kwargs)


def DiT_S_4(**kwargs: Any) -> DiT:
    return DiT(depth=12, hidden_size=384, patch_size=4, num_heads=6, **kwargs)


def DiT_S_8(**kwargs: Any) -> DiT:
    return DiT(depth=12, hidden_size=384, patch_size=8, num_heads=6, **kwargs)


DiT_models = {
    "DiT-XL/2": DiT_XL_2,
    "DiT-XL/4": DiT_XL_4,
    "DiT-XL/8": DiT_XL_8,
    "DiT-L/2": DiT_L_2,
    "DiT-L/4": DiT_L_4,
    "DiT-L/8": DiT_L_8,
    "DiT-B/2": DiT_B_2,
    "DiT-B/4": DiT_B_4,
    "DiT-B/8": DiT_B_8,
    "DiT-S/2": DiT_S_2,
    "DiT-S/4": DiT_S_4,
    "DiT-S/8": DiT_S_8,
}
