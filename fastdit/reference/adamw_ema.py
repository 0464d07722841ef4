"""AdamW and moving averages of the weights in plain torch: the specification of `fastdit.ops.adamw_ema_`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | Tensor | None = None,
    found_inf: Tensor | None = None,
    emas: Sequence[Sequence[Tensor]] = (),
    ema_decays: Sequence[float] = (),
    copies: Sequence[Tensor] | None = None,
) -> None:
    """One step of AdamW, then one of every average; everything in place, nothing is read from the device.

    With t = step + 1 and g = clip * grad (clip None meaning 1), in the dtype of the parameters:

        p <- (1 - lr weight_decay) p
        m <- m + (1 - beta1) (g - m)                    v <- beta2 v + (1 - beta2) g²
        p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
        ema <- ema + (1 - decay) (p - ema)              copy <- p, rounded
        step <- t

    All lists are like `params`; what depends on t alone is computed in float64. Where `found_inf` is not zero, nothing
    changes, not even `step`.

    Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2; the order of the arithmetic
    is that of torch.optim.AdamW.
    """
    beta1, beta2 = betas
    if not isinstance(lr, Tensor):
        lr = torch.full((), lr, dtype=torch.float64, device=step.device)
    t = step.double().reshape(()) + 1
    learning_rate = lr.double().reshape(())
    decay = 1 - learning_rate * weight_decay
    step_size = learning_rate / (1 - beta1**t)
    correction2 = (1 - beta2**t).sqrt()
    scalars = (decay, step_size, correction2)
    bad = None if found_inf is None else found_inf.reshape(()) != 0

    def write(target: Tensor, value: Tensor) -> None:
        target.copy_(value if bad is None else torch.where(bad, target, value.to(target.dtype)))

    for i, (p, grad, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        decay, step_size, correction2 = (scalar.to(p.dtype) for scalar in scalars)
        g = grad.to(p.dtype)
        if clip is not None:
            g = g * (clip.to(p.dtype).reshape(()) if isinstance(clip, Tensor) else clip)
        m_new = m.lerp(g, 1 - beta1)
        v_new = (v * beta2).addcmul_(g, g, value=1 - beta2)
        p_new = p * decay - step_size * m_new / (v_new.sqrt() / correction2 + eps)
        write(p, p_new)
        write(m, m_new)
        write(v, v_new)
        for ema, ema_decay in zip(emas, ema_decays, strict=True):
            write(ema[i], ema[i].lerp(p_new, 1 - ema_decay))
        if copies is not None:
            write(copies[i], p_new)
    write(step, step + 1)
