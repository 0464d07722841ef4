"""AdamW and the averages of the weights, in one pass over all parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..models import DiT
from ..ops import adamw_ema_


def averaged_copy(model: DiT) -> DiT:
    """A copy of `model` in evaluation mode and float32, in which an average of its weights begins.

    Float32, for at a decay of 0.9999 an average in bfloat16 does not move at all.
    """
    return copy.deepcopy(model).float().eval().requires_grad_(False)


class AdamWEMA:
    """AdamW (betas 0.9, 0.999) of the trained parameters of a model, and averages that follow every update:

        average <- average + (1 - decay) (weight - average)

    The parameters are float32, DTensors too, as `fully_shard` makes them; moments and averages are sharded alike.
    Learning rate, clipping and the decision to leave everything as it is are read from the device (`update`).

    Arguments: `averages` are copies of `model` (`averaged_copy`), each with the decay of its average. What is not
    trained (`pos_embed`) is not averaged, and stays equal to the last bit. See `fastdit.ops.adamw_ema_`.

    Source: Peebles & Xie 2023, section 4 (decay 0.9999).
    """

    def __init__(
        self,
        model: nn.Module,
        averages: Sequence[tuple[nn.Module, float]] = (),
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.exp_avgs = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self.exp_avg_sqs = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self.step = torch.zeros(1, device=self.parameters[0].device)
        named = [dict(average.named_parameters()) for average, _ in averages]
        self.averages = [[each[name] for name in self.names] for each in named]
        self.decays = [decay for _, decay in averages]
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay

    def update(
        self, lr: float | Tensor, *, clip: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        """One step with the gradients times `clip`; where `found_inf` is not zero, nothing changes at all.

        Parameters without a gradient, and their averages, stay as they are.
        """
        has = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        chosen = [[each[i] for i in has] for each in (self.parameters, *self._moments())]
        grads = [self.parameters[i].grad for i in has]
        adamw_ema_(
            chosen[0],
            [grad for grad in grads if grad is not None],
            chosen[1],
            chosen[2],
            self.step,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            clip=clip,
            found_inf=found_inf,
            emas=[[average[i] for i in has] for average in self.averages],
            ema_decays=self.decays,
        )

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """The tensors themselves: `step`, and exp_avg and exp_avg_sq of every parameter."""
        named = zip(("exp_avg", "exp_avg_sq"), self._moments(), strict=True)
        moments = {
            f"{moment}.{name}": value
            for moment, values in named
            for name, value in zip(self.names, values, strict=True)
        }
        return {"step": self.step, **moments}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes the values of tensors like those of `state`; of whole ones each process takes its shard."""
        for name, own in self.state().items():
            given = state[name]
            if given is own:
                continue
            if hasattr(own, "full_tensor") and not hasattr(given, "full_tensor"):
                from torch.distributed.tensor import distribute_tensor

                given = distribute_tensor(
                    given.to(own.device),
                    own.device_mesh,  # type: ignore[attr-defined]
                    own.placements,  # type: ignore[attr-defined]
                    src_data_rank=None,
                )
            own.copy_(given)

    def _moments(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.exp_avgs, self.exp_avg_sqs
