"""The whole model on the Triton kernels: the reference's numbers, forward, backward, trained, compiled and distributed.

In the interpreter without a GPU, and, marked gpu, on one.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastdit
from fastdit import ops
from fastdit.testing import (
    assert_gradient_close,
    assert_model_close,
    assert_same_bits,
    assert_training_close,
)

from .helpers import each_conditioning, make_inputs, make_model, output_and_gradients, twin

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU"),
        id="interpreter",
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
each_device = pytest.mark.parametrize("device", DEVICES)
# Dynamo looks at `.grad` of what it is given and hides the warning, which `filterwarnings = error` has raised by then.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with fastdit.use_backend("triton"):
        yield


def small(device: str, conditioning: str = "adaln_zero", **arguments: Any) -> fastdit.DiT:
    """Few tokens, because the interpreter takes its time for each; head_dim 12 and D 24 are no powers of two."""
    given = {"input_size": 4, "hidden_size": 24, "depth": 2, **arguments}
    return make_model(conditioning, **given).to(device)


def inputs(model: fastdit.DiT, device: str, **arguments: Any) -> tuple[Tensor, ...]:
    return tuple(value.to(device) for value in make_inputs(model, **arguments))


def on_cpu(result: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    return result[0].cpu(), {name: gradient.cpu() for name, gradient in result[1].items()}


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_conditioning
def test_numbers(conditioning: str, dtype: torch.dtype, device: str) -> None:
    """N8, and all gradients by N3."""
    model = small(device, conditioning).to(dtype)
    assert_numbers(model, inputs(model, device, dtype=dtype))


@pytest.mark.slow
@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_of_a_small_model(dtype: torch.dtype, device: str) -> None:
    """The width and the depth of DiT-S/8, on four tokens: in float32 no value is off by 1e-5 of the output's rms.

    All weights have a std of 0.03; from 0.05 on plain torch, too, is off by more.
    """
    sizes = {"input_size": 16, "patch_size": 8, "hidden_size": 384, "depth": 12, "num_heads": 6}
    model = make_model(**sizes)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.03, generator=generator)
    model = model.to(device, dtype)
    out, exact = assert_numbers(model, inputs(model, device, n=2, dtype=dtype))
    if dtype is torch.float32:
        largest = float((out.double() - exact).abs().max())
        assert largest <= 1e-5 * float(exact.square().mean().sqrt())


def assert_numbers(model: fastdit.DiT, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Output and gradients, held against the reference in float64; the output, and that of the reference."""
    device, dtype = given[0].device, given[0].dtype
    out, gradients = on_cpu(output_and_gradients(model, *given))
    with fastdit.use_backend("reference"):
        plain, plain_gradients = on_cpu(output_and_gradients(twin(model, dtype).to(device), *given))
        x, t, y = (value.cpu() for value in given)
        other = twin(model.cpu(), torch.float64)
        exact, exact_gradients = output_and_gradients(other, x.double(), t, y)
    assert_model_close("output", out, exact, plain)
    assert gradients.keys() == exact_gradients.keys()
    for name, gradient in gradients.items():
        summed = 0 if name == "x" else len(x) * model.x_embedder.num_patches
        assert_gradient_close(
            name, gradient, exact_gradients[name], plain_gradients[name], summed=summed
        )
    return out, exact


@each_device
def test_float32_stream_of_a_bfloat16_model(device: str) -> None:
    model = small(device, residual_dtype=torch.float32).bfloat16()
    given = inputs(model, device, dtype=torch.bfloat16)
    out, gradients = on_cpu(output_and_gradients(model, *given))
    with fastdit.use_backend("reference"):
        plain, plain_gradients = on_cpu(output_and_gradients(model, *given))
        x, t, y = (value.cpu() for value in given)
        other = twin(model.cpu(), torch.float64)
        exact, exact_gradients = output_and_gradients(other, x.double(), t, y)
    assert_model_close("output", out, exact, plain)
    for name, gradient in gradients.items():
        assert_gradient_close(
            name, gradient, exact_gradients[name], plain_gradients[name], summed=3 * 4
        )


@each_device
def test_autocast(device: str) -> None:
    model = small(device)
    given = inputs(model, device)

    def run(backend: str) -> tuple[Tensor, dict[str, Tensor]]:
        with fastdit.use_backend(backend), torch.autocast(device, torch.bfloat16):
            return on_cpu(output_and_gradients(model, *given))

    (out, gradients), (plain, plain_gradients) = run("triton"), run("reference")
    with fastdit.use_backend("reference"):
        x, t, y = (value.cpu() for value in given)
        exact, exact_gradients = output_and_gradients(
            twin(copy.deepcopy(model).cpu(), torch.float64), x.double(), t, y
        )
    assert_model_close("output", out.bfloat16(), exact, plain.bfloat16())
    # Gradients of float32 weights, made of products in bfloat16: held to bfloat16's rule.
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        narrow, plain_narrow = gradient.bfloat16(), plain_gradients[name].bfloat16()
        assert_gradient_close(name, narrow, exact_gradients[name], plain_narrow, summed=3 * 4)


@each_device
def test_repeats_are_the_same_bits(device: str) -> None:
    model = small(device)
    given = inputs(model, device)
    out, gradients = output_and_gradients(model, *given)
    again, gradients_again = output_and_gradients(model, *given)
    assert_same_bits("output", again, out)
    for name, gradient in gradients.items():
        assert_same_bits(name, gradients_again[name], gradient)


def train(
    model: nn.Module, given: tuple[Tensor, ...], steps: int, autocast: bool
) -> tuple[list[float], dict[str, Tensor]]:
    """AdamW on one batch, whose target is a fixed draw: losses and final weights."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(3)
    losses = []
    target: Tensor | None = None
    for _ in range(steps):
        with torch.autocast(given[0].device.type, torch.bfloat16, enabled=autocast):
            out = model(*given)
        if target is None:
            target = torch.randn(out.shape, generator=generator).to(out.device)
        loss = (out.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: value.detach().cpu() for name, value in model.state_dict().items()}


@each_device
@pytest.mark.parametrize(
    "autocast", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
def test_training_is_the_references(autocast: bool, device: str) -> None:
    """N9 over 32 steps."""
    model = small(device, depth=1)
    given = inputs(model, device, n=1)
    losses, weights = train(copy.deepcopy(model), given, 32, autocast)
    with fastdit.use_backend("reference"):
        expected, expected_weights = train(copy.deepcopy(model), given, 32, autocast)
    assert losses[-1] < 0.9 * losses[0]
    dtype = torch.bfloat16 if autocast else torch.float32
    # A bias of the keys moves no softmax: its gradient is rounding noise, which Adam blows up to its full step.
    for state in (weights, expected_weights):
        state["blocks.0.attn.qkv.bias"][24:48] = 0
    assert_training_close(losses, expected, weights, expected_weights, dtype=dtype)


def compiled_whole(model: fastdit.DiT, backend: Any) -> nn.Module:
    return torch.compile(model, fullgraph=True, backend=backend)


def compiled_blocks(model: fastdit.DiT, backend: Any) -> nn.Module:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, fullgraph=True, backend=backend)
    return model


@each_device
@pytest.mark.parametrize("compile_model", [compiled_whole, compiled_blocks])
def test_compiled(compile_model: Callable[..., nn.Module], device: str) -> None:
    """Whole and block by block, forward and backward, in three batch sizes: one more graph for all but the first."""
    torch._dynamo.reset()
    model = small(device, depth=1 if compile_model is compiled_whole else 2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compile_model(copy.deepcopy(model), counter)
    graphs = []
    for n in (2, 3, 4):
        given = inputs(model, device, n=n)
        out, gradients = output_and_gradients(compiled, *given)
        with fastdit.use_backend("reference"):
            expected, expected_gradients = output_and_gradients(model, *given)
        torch.testing.assert_close(out, expected)
        for found, wanted in zip(gradients.values(), expected_gradients.values(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        graphs.append(counter.frame_count)
    kinds = 1 if compile_model is compiled_whole else 2  # the first block has nothing pending
    assert graphs[0] == kinds
    assert graphs[-1] <= 2 * kinds
    torch._dynamo.reset()


def test_only_whole_regions_are_opaque_to_a_compiler() -> None:
    """Patches, a lone residual and casts are plain torch in the graph; seams and the perceptron are operators."""
    torch._dynamo.reset()
    model = small("cpu")
    seen: set[str] = set()

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.update(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=backend)(*make_inputs(model))
    assert {name for name in seen if "fastdit" in name} == {
        "fastdit.layer_norm_modulate",
        "fastdit.gated_residual_layer_norm_modulate",
        "fastdit.mlp_gelu_inference",
    }
    torch._dynamo.reset()


@pytest.mark.parametrize("path", ["attn", "attn.qkv", "attn.proj", "mlp", "mlp.fc1", "norm1"])
def test_a_hook_inside_of_a_block_is_called(path: str) -> None:
    """With its arguments and results as the original has them: the block does not reach over it."""
    model = small("cpu")
    given = make_inputs(model)
    expected, expected_gradients = output_and_gradients(model, *given)
    seen: list[tuple[Tensor, Tensor]] = []
    hooked = model.blocks[1].get_submodule(path)
    hooked.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    out, gradients = output_and_gradients(model, *given)
    assert len(seen) == 1
    with torch.no_grad():
        torch.testing.assert_close(type(hooked).forward(hooked, seen[0][0]), seen[0][1])
    torch.testing.assert_close(out, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5)


@each_device
def test_checkpointed_blocks(device: str) -> None:
    model = small(device)
    given = inputs(model, device)
    expected, expected_gradients = output_and_gradients(model, *given)
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(
            forward, *args, use_reentrant=False
        )
    out, gradients = output_and_gradients(model, *given)
    torch.testing.assert_close(out, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5)


@each_device
def test_kept_activations(device: str) -> None:
    """Bytes that a block keeps for its backward, per token and byte of D: 28 with a float32 stream, as designed."""
    model = small(device, depth=3, residual_dtype=torch.float32).bfloat16()
    given = inputs(model, device, n=2, dtype=torch.bfloat16)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in owned and saved.dim() == 3 and saved.shape[1] == 4:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    def bytes_kept(backend: str) -> int:
        kept.clear()
        with (
            fastdit.use_backend(backend),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved),
        ):
            out = model(*given)
        del out
        return sum(kept.values())

    # Of three blocks and what surrounds them; attention, which is torch's here, keeps 4-D tensors besides.
    assert bytes_kept("triton") < 0.7 * bytes_kept("reference")


_TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tests import interpreter
interpreter.correct()
import fastdit
from tests.models.test_kernels import inputs, output_and_gradients, small

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
fastdit.use_backend("triton")
model = small("cpu", depth=1)
x, t, y = inputs(model, "cpu", n=4)
part = slice(2 * rank, 2 * rank + 2)
wrapped = DistributedDataParallel(model)
wrapped(x[part], t[part], y[part]).square().mean().backward()
torch.save({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, f"{folder}/{rank}.pt")

sharded = small("cpu", depth=2)
mesh = dist.init_device_mesh("cpu", (2,))
for block in sharded.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(sharded, mesh=mesh)
sharded(x[part], t[part], y[part]).square().mean().backward()
gradients = {name: p.grad.full_tensor() for name, p in sharded.named_parameters() if p.grad is not None}
torch.save(gradients, f"{folder}/sharded-{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
def test_two_processes(tmp_path: Path) -> None:
    """DDP's gradients are those of the whole batch in one process, and FSDP2's too, whose weights come and go."""
    root = Path(fastdit.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "TRITON_INTERPRET": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _TWO_PROCESSES, str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
    finally:
        for process in ranks:
            with process:
                process.kill()
    for kind, depth in (("", 1), ("sharded-", 2)):
        model = small("cpu", depth=depth)
        model(*inputs(model, "cpu", n=4)).square().mean().backward()
        found = [torch.load(tmp_path / f"{kind}{rank}.pt", weights_only=True) for rank in range(2)]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(found[0][name], parameter.grad, rtol=1e-5, atol=1e-6)
                assert torch.equal(found[0][name], found[1][name]), name


@pytest.mark.gpu
def test_automatically_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has to be chosen: the kernels are what runs on CUDA."""
    model = small("cuda")
    with fastdit.use_backend("auto"):
        assert ops.recomputes(model.pos_embed)
        with torch.profiler.profile() as profile, torch.no_grad():
            model(*inputs(model, "cuda"))
    names = {event.name for event in profile.events()}
    assert "fastdit::gated_residual_layer_norm_modulate" in names
    assert "fastdit::mlp_gelu_inference" in names


@pytest.mark.gpu
def test_captured_training_step() -> None:
    """Forward and backward in one CUDA graph, replayed on other data: the eager gradients, to the bit."""
    model = small("cuda")
    x, t, y = inputs(model, "cuda")

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(x, t, y).square().sum().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    captured = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    x.mul_(0.5)
    graph.replay()
    replayed = {name: gradient.clone() for name, gradient in captured.items()}
    step()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_same_bits(name, replayed[name], parameter.grad)
