"""AdamW and the averages of the weights, of a whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdit import DiT, use_backend
from fastdit.testing import assert_close, assert_same_bits
from fastdit.training import AdamWEMA, averaged_copy

DECAYS = (0.9999, 0.5, 0.0)
OPTIONS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
RATES = (1e-2, 5e-3, 2e-2, 1e-2, 1e-2, 1e-3)

# torch's own pass over a parameter, and the specification, which is what a compiler or another dtype gets.
each_way = pytest.mark.parametrize("backend", ["auto", "reference"])


def _model() -> DiT:
    return DiT(8, 4, 1, hidden_size=32, depth=1, num_heads=2, num_classes=3)


def _made(**options: Any) -> tuple[DiT, list[DiT], AdamWEMA]:
    model = _model().train()
    averages = [averaged_copy(model) for _ in DECAYS]
    pairs = list(zip(averages, DECAYS, strict=True))
    return model, averages, AdamWEMA(model, pairs, **(OPTIONS | options))


def _give_gradients(model: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
    """Random ones, whose sizes differ from one parameter to the next."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for index, (_, p) in enumerate(named):
        p.grad = scale * 10.0 ** (index % 5 - 3) * torch.randn_like(p)
    return {name: p.grad.clone() for name, p in named}


def _everything(model: DiT, averages: list[DiT], optimizer: AdamWEMA) -> dict[str, Tensor]:
    models = {"model": model, **{f"average {i}": each for i, each in enumerate(averages)}}
    found = {
        f"{kind}.{n}": v for kind, each in models.items() for n, v in each.state_dict().items()
    }
    found |= optimizer.state()
    return {name: value.detach().clone() for name, value in found.items()}


def _by_formula(
    dtype: torch.dtype,
    weights: dict[str, Tensor],
    steps: list[dict[str, Tensor]],
    clips: list[float],
) -> dict[str, Tensor]:
    """Weights, moments and averages after these steps, in `dtype`."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        p = weight.to(dtype)
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        averages = [p.clone() for _ in DECAYS]
        for t, (lr, gradients, clip) in enumerate(zip(RATES, steps, clips, strict=True), start=1):
            g = gradients[name].to(dtype) * clip
            p = p - lr * 0.1 * p
            m = 0.9 * m + (1 - 0.9) * g
            v = 0.999 * v + (1 - 0.999) * g * g
            p = p - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            averages = [d * a + (1 - d) * p for d, a in zip(DECAYS, averages, strict=True)]
        found |= {f"model.{name}": p, f"exp_avg.{name}": m, f"exp_avg_sq.{name}": v}
        found |= {f"average {i}.{name}": each for i, each in enumerate(averages)}
    return found


@each_way
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("rate", [float, torch.tensor])
def test_steps_are_those_of_the_formula_in_float64(
    backend: str, clipped: bool, rate: Callable[[float], float | Tensor]
) -> None:
    model, averages, optimizer = _made()
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    clips = [0.5, 1.0, 0.25, 1.0, 0.125, 0.75] if clipped else [1.0] * len(RATES)
    steps = []
    for lr, clip in zip(RATES, clips, strict=True):
        steps.append(_give_gradients(model))
        with use_backend(backend):
            optimizer.update(rate(lr), clip=torch.tensor(clip) if clipped else None)
    found = _everything(model, averages, optimizer)
    assert found["step"].tolist() == [len(RATES)]
    exact = _by_formula(torch.float64, weights, steps, clips)
    plain = _by_formula(torch.float32, weights, steps, clips)
    for name, value in exact.items():
        assert_close(name, found[name], value, plain[name])


def test_steps_are_those_of_torch_to_the_last_bit() -> None:
    """Where torch has a pass over a parameter of its own, as on a CPU, it is the one that runs."""
    model, _, optimizer = _made()
    other = _model()
    other.load_state_dict(model.state_dict())
    trained = [p for p in other.parameters() if p.requires_grad]
    expected = torch.optim.AdamW(trained, fused=True, **OPTIONS)
    for lr in RATES:
        gradients = _give_gradients(model)
        for name, p in other.named_parameters():
            p.grad = gradients.get(name)
        optimizer.update(lr)
        expected.param_groups[0]["lr"] = lr
        expected.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_same_bits(name, p, q)
    state = optimizer.state()
    for name, p in zip(optimizer.names, trained, strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert_same_bits(
                f"{moment} of {name}", state[f"{moment}.{name}"], expected.state[p][moment]
            )
        assert float(expected.state[p]["step"]) == float(state["step"]) == len(RATES)


@each_way
def test_average_moves_at_a_decay_at_which_bfloat16_would_stand_still(backend: str) -> None:
    model, averages, optimizer = _made()
    before = averages[0].final_layer.linear.weight.clone()
    for _ in range(60):
        _give_gradients(model)
        with use_backend(backend):
            optimizer.update(1e-3)
    moved = averages[0].final_layer.linear.weight - before
    assert bool((moved != 0).all())


@each_way
def test_position_embedding_stays_bit_for_bit(backend: str) -> None:
    model, averages, optimizer = _made()
    before = model.pos_embed.detach().clone()
    assert "pos_embed" not in optimizer.names
    for _ in range(10):
        _give_gradients(model)
        with use_backend(backend):
            optimizer.update(0.1)
    for each in (model, *averages):
        assert_same_bits("pos_embed", each.pos_embed, before)


@each_way
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("flag", [torch.bool, torch.float32])
def test_bad_step_changes_nothing(backend: str, clip: float | None, flag: torch.dtype) -> None:
    model, averages, optimizer = _made()
    scale = None if clip is None else torch.tensor(clip)
    _give_gradients(model)
    optimizer.update(1e-2, clip=scale)
    before = _everything(model, averages, optimizer)
    for value in (torch.nan, torch.inf, 1.0):
        _give_gradients(model, value)
        with use_backend(backend):
            optimizer.update(1e-2, clip=scale, found_inf=torch.ones((), dtype=flag))
        for name, now in _everything(model, averages, optimizer).items():
            assert_same_bits(name, now, before[name])
    _give_gradients(model)
    with use_backend(backend):
        optimizer.update(1e-2, clip=scale, found_inf=torch.zeros((), dtype=flag))
    after = _everything(model, averages, optimizer)
    assert after["step"].tolist() == [2.0]
    same = {name for name in after if torch.equal(after[name], before[name])}
    assert same == {name for name in after if name.endswith("pos_embed")}


@each_way
def test_parameters_without_a_gradient_stay_as_they_are(backend: str) -> None:
    model, averages, optimizer = _made()
    _give_gradients(model)
    optimizer.update(1e-2)
    before = _everything(model, averages, optimizer)
    without = "blocks.0.mlp.fc1.weight"
    _give_gradients(model)
    dict(model.named_parameters())[without].grad = None
    with use_backend(backend):
        optimizer.update(1e-2)
    after = _everything(model, averages, optimizer)
    same = {name for name in after if torch.equal(after[name], before[name])}
    assert same == {n for n in after if n.endswith("pos_embed") or n.endswith(without)}


def test_gradients_are_let_go() -> None:
    model, _, optimizer = _made()
    _give_gradients(model)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_state_is_named_and_is_the_state_itself() -> None:
    model, _, optimizer = _made()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {f"{m}.{n}": p.shape for m in ("exp_avg", "exp_avg_sq") for n, p in trained.items()}
    assert {n: v.shape for n, v in optimizer.state().items()} == expected | {"step": (1,)}
    assert all(v.dtype is torch.float32 and not v.any() for v in optimizer.state().values())
    assert not any(v.requires_grad for v in optimizer.state().values())
    _give_gradients(model)
    held = optimizer.state()
    optimizer.update(1e-2)
    assert held["step"].tolist() == [1.0]
    for name, value in optimizer.state().items():
        assert held[name] is value


def test_loaded_state_goes_on_as_the_one_it_was_taken_from() -> None:
    model, averages, optimizer = _made()
    for lr in RATES:
        _give_gradients(model)
        optimizer.update(lr)
    state = {name: value.clone() for name, value in optimizer.state().items()}

    other, other_averages, loaded = _made()
    other.load_state_dict(model.state_dict())
    for average, source in zip(other_averages, averages, strict=True):
        average.load_state_dict(source.state_dict())
    own = loaded.state()
    loaded.load_state(state | {"of another": torch.ones(1)})
    for name, value in loaded.state().items():
        assert value is own[name]  # in place, where a captured step would look for it
        assert value is not state[name]
        assert_same_bits(name, value, state[name])
    gradients = _give_gradients(model)
    for name, p in other.named_parameters():
        p.grad = gradients.get(name)
    optimizer.update(1e-2)
    loaded.update(1e-2)
    expected = _everything(model, averages, optimizer)
    for name, value in _everything(other, other_averages, loaded).items():
        assert_same_bits(name, value, expected[name])
    loaded.load_state(loaded.state())  # its own tensors
    assert_same_bits("step", loaded.step, optimizer.step)
    del state["exp_avg.final_layer.linear.bias"]
    with pytest.raises(KeyError, match=r"exp_avg\.final_layer\.linear\.bias"):
        loaded.load_state(state)


def test_average_is_a_copy_for_evaluation_without_gradients() -> None:
    model, averages, optimizer = _made()
    assert model.training
    for average in averages:
        assert not average.training
        assert not any(parameter.requires_grad for parameter in average.parameters())
        for name, value in average.state_dict().items():
            assert_same_bits(name, value, model.state_dict()[name])
    _give_gradients(model)
    optimizer.update(1e-2)
    weight = model.blocks[0].mlp.fc1.weight
    assert not torch.equal(averages[0].blocks[0].mlp.fc1.weight, weight)
    assert_same_bits("decay of 0", averages[2].blocks[0].mlp.fc1.weight, weight)


def test_average_of_a_model_in_bfloat16_is_float32() -> None:
    model = _model().bfloat16()
    average = averaged_copy(model)
    assert {value.dtype for value in average.state_dict().values()} == {torch.float32}
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
