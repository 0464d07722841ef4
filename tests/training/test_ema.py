"""The averaged weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit import DiT
from fastdit.testing import assert_close, assert_same_bits
from fastdit.training import EMA

DECAY = 0.9999
UPDATES = 60


def _model() -> DiT:
    return DiT(8, 4, 1, hidden_size=32, depth=1, num_heads=2, num_classes=3)


def _walk(model: DiT) -> None:
    """Moves every trained weight, as an optimizer would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def test_average_is_that_of_the_formula_in_float64() -> None:
    model = _model()
    ema = EMA(model, DECAY)

    def averages(dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: value.detach().to(dtype) for name, value in model.named_parameters()}

    exact, plain = averages(torch.float64), averages(torch.float32)
    for _ in range(UPDATES):
        _walk(model)
        ema.update()
        for expected in (exact, plain):
            for name, value in model.named_parameters():
                weight = value.detach().to(expected[name].dtype)
                expected[name] = DECAY * expected[name] + (1 - DECAY) * weight
    for name, value in ema.model.named_parameters():
        if name != "pos_embed":
            assert_close(name, value, exact[name], plain[name])


def test_average_moves_at_a_decay_at_which_bfloat16_would_stand_still() -> None:
    model = _model()
    ema = EMA(model, DECAY)
    before = ema.model.final_layer.linear.weight.clone()
    for _ in range(UPDATES):
        _walk(model)
        ema.update()
    moved = ema.model.final_layer.linear.weight - before
    assert bool((moved != 0).all())


def test_position_embedding_stays_bit_for_bit() -> None:
    model = _model()
    ema = EMA(model, 0.3)
    for _ in range(UPDATES):
        _walk(model)
        ema.update()
    assert_same_bits("pos_embed", ema.model.pos_embed, model.pos_embed)


def test_average_is_a_copy_for_evaluation_without_gradients() -> None:
    model = _model().train()
    ema = EMA(model, DECAY)
    assert model.training
    assert not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    _walk(model)
    assert not torch.equal(ema.model.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
