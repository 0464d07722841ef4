"""Training with the operators against the specification, and what only a GPU shows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdit import DiT, create_diffusion, reference, use_backend
from fastdit.training import AdamWEMA, Trainer, train

from .helpers import tensors, tiny

STEPS = 32
SIZES: dict[str, Any] = {"hidden_size": 64, "depth": 2, "num_heads": 2, "num_classes": 10}


def _losses(model: nn.Module, update: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Of so many steps on batches that do not depend on the model."""
    generator = torch.Generator().manual_seed(0)
    diffusion, losses = create_diffusion(""), []
    for _ in range(STEPS):
        x0 = torch.randn(4, 4, 8, 8, generator=generator).to(device)
        noise = torch.randn(4, 4, 8, 8, generator=generator).to(device)
        t = torch.randint(1000, (4,), generator=generator).to(device)
        y = torch.randint(10, (4,), generator=generator).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = diffusion.training_losses(model, x0, t, {"y": y}, noise)["loss"].mean()
        loss.backward()
        update()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_many_steps_are_those_of_the_reference(device: str, dtype: torch.dtype) -> None:
    """The reference with torch's optimizer; tolerances are those that Liger-Kernel holds its models to."""
    torch.manual_seed(0)
    model = DiT(8, 2, 4, **SIZES)
    for parameter in model.parameters():
        if parameter.requires_grad:  # as initialised, blocks are the identity
            nn.init.normal_(parameter, std=0.02)
    original = reference.DiT(8, 2, 4, **SIZES)
    original.load_state_dict(copy.deepcopy(model.state_dict()))
    on = torch.device(device)
    model, original = model.to(on).eval(), original.to(on).eval()

    ours = AdamWEMA(model)

    def update() -> None:
        ours.update(1e-4)
        ours.zero_grad()

    theirs = torch.optim.AdamW(original.parameters(), lr=1e-4, weight_decay=0)

    def update_original() -> None:
        theirs.step()
        theirs.zero_grad()

    found = _losses(model, update, on, dtype)
    with use_backend("reference"):
        expected = _losses(original, update_original, on, dtype)
    close: dict[str, float] = (
        {"rtol": 2e-5, "atol": 0} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 1e-2}
    )
    torch.testing.assert_close(found, expected, **close)
    weights = original.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=5e-3)
    assert not torch.equal(found[0], found[-1])


@pytest.mark.gpu
def test_a_step_waits_for_nothing(tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": "cuda", "precision": "bf16", "compile": "off"}
    config = tiny(tmp_path / "run", gradient_clip=1.0, more_ema_decays=(0.5,), **options)
    trainer = Trainer(config, torch.device("cuda"))
    batches = trainer._batches()
    for _ in range(3):  # the first is checked, kernels are compiled
        trainer._update(*next(batches))
    x0, y = next(batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.flags = (
            None  # reading those of the step before is a wait, for what is done long ago
        )
        trainer._update(x0, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.summed == 4


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["off", "blocks"])
def test_resumed_on_a_gpu_bit_for_bit(compile: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": "cuda", "precision": "bf16", "compile": compile}
    whole = train(tiny(tmp_path / "whole", steps=8, **options))
    train(tiny(tmp_path / "run", steps=4, **options))
    run = train(tiny(tmp_path / "run", steps=8, resume=True, **options))
    found, expected = tensors(run, 8), tensors(whole, 8)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.gpu
def test_a_step_that_is_not_finite_changes_nothing_on_a_gpu(tmp_path: Path) -> None:
    trainer = Trainer(tiny(tmp_path / "run", device="cuda", compile="off"), torch.device("cuda"))
    batches = trainer._batches()
    trainer._update(*next(batches))
    before = {name: value.clone() for name, value in trainer.optimizer.state().items()}
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    x0, y = next(batches)
    trainer._update(x0 * torch.nan, y)
    after = trainer.optimizer.state()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    now = trainer.model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in weights.items())
    assert trainer.sums[-1].item() == 1
