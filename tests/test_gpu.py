"""The numbers on a CUDA device: the same model, the same rules, no waiting for the device inside a step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastdit
from fastdit import reference
from fastdit.testing import assert_gradient_close, assert_model_close, assert_same_bits

pytestmark = pytest.mark.gpu

# head_dim 72, as DiT-XL's
CONFIG = {
    "input_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 144,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 10,
}
CONDITIONINGS = ["adaln_zero", "adaln", "cross_attention", "in_context"]


def models(conditioning: str) -> tuple[fastdit.DiT, reference.DiT]:
    torch.manual_seed(0)
    model = fastdit.DiT(**CONFIG, conditioning=conditioning)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.04)
    oracle = reference.DiT(**CONFIG, conditioning=conditioning)
    oracle.load_state_dict(model.state_dict())
    return model.cuda().eval(), oracle.eval()


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, 16, 16, generator=generator).to(dtype)
    return x, torch.tensor([0, 1, 250, 500, 998, 999]), torch.tensor([0, 1, 2, 5, 9, 10])


def outputs_and_gradients(
    model: nn.Module, dtype: torch.dtype, device: str, values: torch.dtype
) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).to(values).to(device=device, dtype=dtype)
    x, t, y = inputs(values)
    out = model(x.to(device, dtype), t.to(device), y.to(device))
    generator = torch.Generator().manual_seed(2)
    weighting = torch.randn(out.shape, generator=generator).to(values).to(device, dtype)
    (out * weighting).sum().backward()
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"forward": out.detach().cpu(), **found}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_numbers(conditioning: str, dtype: torch.dtype) -> None:
    """N1-N3 and N8: outputs and all gradients; float32 without TF32."""
    assert not torch.backends.cuda.matmul.allow_tf32
    model, oracle = models(conditioning)
    exact = outputs_and_gradients(oracle, torch.float64, "cpu", dtype)
    plain = outputs_and_gradients(oracle, dtype, "cuda", dtype)
    out = outputs_and_gradients(model, dtype, "cuda", dtype)
    assert exact.keys() == plain.keys() == out.keys()
    assert_model_close("forward", out.pop("forward"), exact.pop("forward"), plain.pop("forward"))
    for name, gradient in out.items():
        assert_gradient_close(name, gradient, exact[name], plain[name], summed=6 * 64)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_compiled(conditioning: str) -> None:
    model, oracle = models(conditioning)
    x, t, y = (value.cuda() for value in inputs(torch.float32))
    with torch.no_grad():
        out = torch.compile(model, fullgraph=True)(x, t, y)
        exact = oracle.double()(x.double().cpu(), t.cpu(), y.cpu())
        plain = model(x, t, y)
    assert_model_close("compiled", out.cpu(), exact, plain.cpu())


def test_a_sampling_step_does_not_wait() -> None:
    model, _ = models("adaln_zero")
    diffusion = fastdit.create_diffusion("10")
    x, _, y = (value.cuda() for value in inputs(torch.float32))
    t = torch.full((6,), 5, device="cuda")
    step_arguments = {"clip_denoised": False, "model_kwargs": {"y": y}}
    with torch.no_grad():
        diffusion.p_sample(model, x, t, **step_arguments)  # makes the tables
        diffusion.ddim_sample(model, x, t, **step_arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            diffusion.p_sample(model, x, t, **step_arguments)
            diffusion.ddim_sample(model, x, t, **step_arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_does_not_wait() -> None:
    model, _ = models("adaln_zero")
    model.train()
    diffusion = fastdit.create_diffusion("")
    x, t, y = (value.cuda() for value in inputs(torch.float32))
    diffusion.training_losses(model, x, t, {"y": y})["loss"].mean().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        diffusion.training_losses(model, x, t, {"y": y})["loss"].mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_samples_repeat_and_match_the_cpu() -> None:
    """N10 between devices needs the same noise: given, not drawn."""
    model, _ = models("adaln_zero")
    diffusion = fastdit.create_diffusion("10")
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(10, 2, 4, 16, 16, generator=generator)
    start = torch.randn(2, 4, 16, 16, generator=generator)

    def draw(device: str) -> torch.Tensor:
        y = torch.tensor([1, 2], device=device)
        with torch.no_grad():
            return diffusion.p_sample_loop(
                copy.deepcopy(model).to(device),
                start.shape,
                noise=start.to(device),
                step_noise=noise.to(device),
                clip_denoised=False,
                model_kwargs={"y": y},
                device=device,
            ).cpu()

    on_gpu, on_cpu = draw("cuda"), draw("cpu")
    assert_same_bits("a second run", draw("cuda"), on_gpu)
    assert (on_gpu - on_cpu).norm() <= 1e-4 * on_cpu.norm()


def test_capture_in_a_graph() -> None:
    """A forward pass can be captured and replayed, and reads its inputs and weights anew."""
    model, _ = models("adaln_zero")
    x, t, y = (value.cuda() for value in inputs(torch.float32))
    stream = torch.cuda.Stream()
    with torch.no_grad():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(x, t, y)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x, t, y)
        x.mul_(0.5)
        model.final_layer.linear.weight.add_(0.1)
        graph.replay()
        assert_same_bits("replayed", out, model(x, t, y))
