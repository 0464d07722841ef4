"""What users wrap, hook, swap or cast gives the plain call's numbers, and is called where the original calls it."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fastdit
from fastdit import ops
from fastdit.models.blocks import hands_on
from fastdit.testing import assert_model_close, layouts

from .helpers import (
    TINY,
    assert_matches_reference,
    assert_same_call,
    each_conditioning,
    make_inputs,
    make_model,
    output_and_gradients,
    redraw,
    twin,
)

# Dynamo looks at `.grad` of what it is given and hides the warning, which `filterwarnings = error` has raised by then.
dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

# Hooks.


@each_conditioning
@pytest.mark.parametrize("path", ["blocks.1", "final_layer"])
def test_hook_on_a_block_sees_the_originals_call(conditioning: str, path: str) -> None:
    model, plain = make_model(conditioning).double(), make_model(conditioning).double()
    x, _, y = make_inputs(model, dtype=torch.float64)
    t = torch.zeros(3)  # whose embedding is exact in float32
    reference_calls: list[Any] = []
    other = twin(model, torch.float64)
    other.get_submodule(path).register_forward_hook(
        lambda m, a, o: reference_calls.append((a[0], o))
    )
    other(x, t, y)
    calls: list[Any] = []
    hooked = model.get_submodule(path)
    hooked.register_forward_pre_hook(lambda m, args: calls.append(args))
    hooked.register_forward_hook(lambda m, args, out: calls.append((args[0], out)))
    assert_same_call(model, plain, x, t, y)
    arguments, found = calls
    assert len(arguments) == 2
    assert all(isinstance(a, Tensor) for a in arguments)
    for value, expected in zip(found, reference_calls[0], strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    "path",
    [
        "x_embedder",
        "x_embedder.proj",
        "t_embedder.mlp.0",
        "y_embedder.embedding_table",
        "blocks.1",
        "blocks.1.norm1",
        "blocks.1.attn",
        "blocks.1.attn.qkv",
        "blocks.1.attn.proj",
        "blocks.1.norm2",
        "blocks.1.mlp",
        "blocks.1.mlp.fc1",
        "blocks.1.mlp.act",
        "blocks.1.mlp.fc2",
        "blocks.1.adaLN_modulation.1",
        "final_layer",
        "final_layer.norm_final",
        "final_layer.linear",
    ],
)
def test_every_submodule_is_called_once_where_it_has_a_hook(path: str) -> None:
    model = make_model()
    inputs = make_inputs(model)
    expected = output_and_gradients(model, *inputs)[0]
    exact = twin(model, torch.float64)(inputs[0].double(), *inputs[1:])
    module = model.get_submodule(path)
    seen: list[Any] = []
    kinds: list[Callable[..., Any]] = [
        lambda: module.register_forward_hook(lambda m, a, o: seen.append(o)),
        lambda: module.register_forward_pre_hook(lambda m, a: seen.append(a)),
    ]
    if not path.startswith(("t_embedder", "y_embedder")):  # whose inputs have no gradient
        kinds.append(lambda: module.register_full_backward_hook(lambda m, i, o: seen.append(o)))
    for register in kinds:
        handle = register()
        found = output_and_gradients(model, *inputs)[0]
        handle.remove()
        assert len(seen) == 1, path
        seen.clear()
        assert_model_close(path, found, exact, expected)
    double = module.register_forward_hook(lambda m, a, o: o * 2)
    changed = output_and_gradients(model, *inputs)[0]
    double.remove()
    assert (changed - expected).abs().max() > 1e-3  # what the hook returns is used
    assert torch.equal(output_and_gradients(model, *inputs)[0], expected)


def test_global_hooks_see_every_submodule() -> None:
    """Profilers and FLOP counters register hooks on all modules at once."""
    model = make_model(depth=1)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(m))
    try:
        model(*make_inputs(model))
    finally:
        handle.remove()
    containers = (nn.ModuleList,)
    missed = [
        n for n, m in model.named_modules() if m not in seen and not isinstance(m, containers)
    ]
    assert missed == []


def test_patched_forward_is_called() -> None:
    """As accelerate does it: an attribute of the instance, not a hook."""
    model = make_model()
    inputs = make_inputs(model)
    expected = model(*inputs)
    for path in (
        "x_embedder.proj",
        "blocks.1",
        "blocks.1.norm1",
        "blocks.1.mlp.fc1",
        "final_layer",
    ):
        module = model.get_submodule(path)
        original, calls = module.forward, []

        def patched(*args: Any, calls: Any = calls, original: Any = original) -> Any:
            calls.append(len(args))
            return original(*args)

        module.forward = patched
        torch.testing.assert_close(model(*inputs), expected)
        assert calls == [2 if path in ("blocks.1", "final_layer") else 1]
        del module.forward


# Activation checkpointing.


@each_conditioning
@pytest.mark.parametrize("how", ["checkpoint", "checkpoint_wrapper", "inside"])
def test_checkpointed_blocks(conditioning: str, how: str) -> None:
    model = make_model(conditioning)
    blocks = model.blocks
    runs: list[int] = []
    for i, block in enumerate(blocks):
        block.attn.register_forward_pre_hook(lambda *_, i=i: runs.append(i))
        if how == "checkpoint_wrapper":
            blocks[i] = checkpoint_wrapper(block)
        elif how == "checkpoint":
            block.forward = _checkpointed(block.forward)
        else:
            blocks[i] = _Checkpointed(block)
    assert_same_call(model, make_model(conditioning), *make_inputs(model))
    assert sorted(runs) == [0, 0, 1, 1, 2, 2]  # forward, and again in backward


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


class _Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return checkpoint(self.block, x, c, use_reentrant=False)


def test_checkpoint_passes_pending_through() -> None:
    model, plain = make_model(depth=1), make_model(depth=1)
    block, other = model.blocks[0], plain.blocks[0]
    results = []
    for run in (
        lambda *a: checkpoint(block, *a, use_reentrant=False),
        lambda *a: other(*a),
    ):
        torch.manual_seed(4)
        x, c, branch, gate = (
            torch.randn(shape, requires_grad=True)
            for shape in ((2, 5, 48), (2, 48), (2, 5, 48), (2, 48))
        )
        stream, (branch_out, gate_out) = run(x, c, (branch, gate))
        (stream.sum() + (branch_out * gate_out.unsqueeze(1)).sum()).backward()
        results.append([stream, branch_out, gate_out, x.grad, c.grad, branch.grad, gate.grad])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


# Compiled blocks (the graphs are counted in test_compile.py).


@dynamo
@pytest.mark.parametrize("compiled", [[0, 1, 2], [1]], ids=["all", "only the second"])
def test_blocks_replaced_by_compiled_ones(compiled: list[int]) -> None:
    torch._dynamo.reset()
    model, plain = make_model(), make_model()
    for i in compiled:
        model.blocks[i] = torch.compile(model.blocks[i], backend="aot_eager", fullgraph=True)
    assert all(hands_on(block) for block in model.blocks)
    inputs = make_inputs(model)
    out, gradients = output_and_gradients(model, *inputs)
    expected, expected_gradients = output_and_gradients(plain, *inputs)
    torch.testing.assert_close(out, expected)
    for found, wanted in zip(gradients.values(), expected_gradients.values(), strict=True):
        torch.testing.assert_close(found, wanted)


@dynamo
def test_hook_on_a_compiled_block_sees_the_originals_call() -> None:
    torch._dynamo.reset()
    model = make_model(depth=2)
    expected = make_model(depth=2)(*make_inputs(model))
    seen: list[Any] = []
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    model.blocks[1].register_forward_hook(lambda m, a, o: seen.append((len(a), o.shape)))
    torch.testing.assert_close(model(*make_inputs(model)), expected)
    assert seen == [(2, (3, 16, 48))]


# Distributed: one process is enough to have FSDP's hooks, sharded parameters and casts.


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


# The pending branch is a view of its matrix product, and nothing changes it in place, of which FSDP warns.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
@pytest.mark.usefixtures("process_group")
@each_conditioning
def test_fully_shard_on_every_block(conditioning: str) -> None:
    model, plain = make_model(conditioning), make_model(conditioning)
    mesh = dist.init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(block, FSDPModule) for block in model.blocks)
    adaptive = conditioning in ("adaln_zero", "adaln")
    assert [hands_on(block) for block in model.blocks] == [adaptive] * 3
    inputs = make_inputs(model)
    out, gradients = output_and_gradients(model, *inputs)
    expected, expected_gradients = output_and_gradients(plain, *inputs)
    assert torch.equal(out, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        whole = gradient if name == "x" else gradient.full_tensor()
        assert torch.equal(whole, expected_gradients[name]), name


# Submodules of other kinds.


class _LoRA(nn.Module):
    """A low-rank update beside a linear layer, as adapters are attached."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


@pytest.mark.parametrize(
    "path",
    [
        "attn.qkv",
        "attn.proj",
        "mlp.fc1",
        "mlp.fc2",
        "adaLN_modulation.1",
    ],
)
def test_adapter_is_the_merged_weight(path: str) -> None:
    model = make_model()
    inputs = make_inputs(model)
    merged = copy.deepcopy(model)
    parent, leaf = path.rsplit(".", 1)
    for block, other in zip(model.blocks, merged.blocks, strict=True):
        adapter = _LoRA(block.get_submodule(path))
        setattr(block.get_submodule(parent), leaf, adapter)
        other.get_submodule(path).weight.data += adapter.b.weight.data @ adapter.a.weight.data
    with torch.no_grad():
        exact = twin(merged, torch.float64)(inputs[0].double(), *inputs[1:])
        assert_model_close("adapter", model(*inputs), exact, merged(*inputs))
    model(*inputs).sum().backward()
    adapter = model.blocks[1].get_submodule(path)
    assert adapter.a.weight.grad.abs().sum() > 0


class _Recorded(Tensor):
    """A weight like a quantised one: an own type, which wants to see what is done with it."""

    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.linear:
            cls.seen.append(args[0].shape)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_weight_of_another_tensor_type(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(depth=1)
    inputs = make_inputs(model)
    expected = model(*inputs)
    fused = []
    mlp_gelu = ops.mlp_gelu
    monkeypatch.setattr(ops, "mlp_gelu", lambda *a: fused.append(1) or mlp_gelu(*a))
    assert torch.equal(model(*inputs), expected)
    assert len(fused) == 1
    linear = model.blocks[0].mlp.fc1
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(_Recorded))
    _Recorded.seen.clear()
    out = model(*inputs)
    assert _Recorded.seen[0] == (3, 16, 48)
    assert torch.equal(out.as_subclass(Tensor), expected)
    assert len(fused) == 1  # not again: a fused kernel would read the weight as if it were plain


@pytest.mark.parametrize(
    "path", ["x_embedder.proj", "blocks.1.norm2", "blocks.1.mlp.act", "blocks.1.mlp.fc2"]
)
def test_subclass_of_a_submodule_is_called(path: str) -> None:
    """A quantised or otherwise changed layer is often a subclass of the layer."""
    model = make_model()
    inputs = make_inputs(model)
    expected = model(*inputs)
    module = model.get_submodule(path)
    calls: list[int] = []

    class Changed(type(module)):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(x)

    module.__class__ = Changed
    torch.testing.assert_close(model(*inputs), expected)
    assert calls == [1]


def test_parametrised_linear_layer() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model, doubled = make_model(), make_model()
    doubled.blocks[1].mlp.fc1.weight.data *= 2
    doubled.x_embedder.proj.weight.data *= 2
    parametrize.register_parametrization(model.blocks[1].mlp.fc1, "weight", Doubled())
    parametrize.register_parametrization(model.x_embedder.proj, "weight", Doubled())
    torch.testing.assert_close(model(*make_inputs(model)), doubled(*make_inputs(model)))


def test_foreign_block_is_called_with_x_and_c() -> None:
    class Foreign(nn.Module):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return x * 2 + c.unsqueeze(1)

    model = make_model()
    model.blocks[1] = Foreign()
    x, t, y = make_inputs(model)
    exact = twin(make_model(), torch.float64)
    exact.blocks[1] = Foreign()
    plain = twin(make_model(), torch.float32)
    plain.blocks[1] = Foreign()
    with torch.no_grad():
        assert_model_close("foreign", model(x, t, y), exact(x.double(), t, y), plain(x, t, y))


def test_foreign_final_layer_is_called_with_x_and_c() -> None:
    class Foreign(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return 2 * self.inner(x, c)

    model = make_model()
    inputs = make_inputs(model)
    expected = 2 * model(*inputs)
    model.final_layer = Foreign(model.final_layer)
    torch.testing.assert_close(model(*inputs), expected)


def test_functional_call() -> None:
    model, other = make_model(), make_model()
    redraw(other, seed=9)
    inputs = make_inputs(model)
    out = torch.func.functional_call(model, dict(other.named_parameters()), inputs)
    assert torch.equal(out, other(*inputs))


def test_per_sample_gradients() -> None:
    model = make_model(depth=1)
    x, t, y = make_inputs(model)
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return (
            torch.func.functional_call(model, weights, (x[None], t[None], y[None])).square().sum()
        )

    with fastdit.use_backend("reference"):  # torch's fused attention has no rule for vmap
        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(weights, x, t, y)
    model(x, t, y).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-4)


# Dtypes, copies, and weights that are replaced.


@each_conditioning
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cast_model(conditioning: str, dtype: torch.dtype) -> None:
    cast = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}[dtype]
    model = getattr(make_model(conditioning), cast)()
    x, t, y = make_inputs(model, dtype=dtype)
    if dtype is torch.float64:
        t = torch.zeros(3)  # whose embedding is exact in float32
        torch.testing.assert_close(model(x, t, y), twin(model, dtype)(x, t, y))
    else:
        assert_matches_reference(model, x, t, y)


def _deepcopy(model: fastdit.DiT) -> fastdit.DiT:
    return copy.deepcopy(model)


def _pickle(model: fastdit.DiT) -> fastdit.DiT:
    return pickle.loads(pickle.dumps(model))  # noqa: S301


def _save(model: fastdit.DiT) -> fastdit.DiT:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_conditioning
@pytest.mark.parametrize("duplicate", [_deepcopy, _pickle, _save])
def test_copies(conditioning: str, duplicate: Callable[[fastdit.DiT], fastdit.DiT]) -> None:
    model = make_model(conditioning, residual_dtype=torch.float64)
    inputs = make_inputs(model)
    model(*inputs)
    other = duplicate(model)
    assert other.residual_dtype is torch.float64
    assert other.config == model.config
    assert_same_call(other, model, *inputs)
    other.blocks[0].mlp.fc1.weight.data.zero_()
    assert not torch.equal(other(*inputs), model(*inputs))


@pytest.mark.parametrize("how", ["assign", "copy", "data", "module", "in place"])
def test_replaced_weights_are_used(how: str) -> None:
    model, other = make_model(), make_model()
    redraw(other, seed=9)
    inputs = make_inputs(model)
    stale = model(*inputs)
    if how in ("assign", "copy"):
        model.load_state_dict(other.state_dict(), assign=how == "assign")
    elif how == "module":
        for name, child in list(other.named_children()):
            setattr(model, name, child)
    else:
        for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
            if how == "data":
                parameter.data = new.data.clone()
            else:
                with torch.no_grad():
                    parameter.copy_(new)
    assert_same_call(model, other, *inputs)
    assert not torch.equal(model(*inputs), stale)


def test_parameters_are_ordinary() -> None:
    for parameter in make_model().parameters():
        assert type(parameter) is nn.Parameter
        assert parameter.is_leaf
        assert parameter._base is None
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4


# Layouts, sizes and modes.


@each_conditioning
def test_layouts_give_the_same_bits(conditioning: str) -> None:
    model = make_model(conditioning)
    x, t, y = make_inputs(model)
    expected, gradients = output_and_gradients(model, x, t, y)
    variants = {**layouts(x), "channels last": x.to(memory_format=torch.channels_last)}
    spaced_t, spaced_y = layouts(t)["every second element"], layouts(y)["every second element"]
    for name, variant in variants.items():
        assert torch.equal(variant, x)
        found = model(variant, spaced_t, spaced_y)
        assert torch.equal(found, expected), name
    single = (x[:1].expand(3, -1, -1, -1), t[:1].expand(3), y[:1].expand(3))
    assert torch.equal(model(*single), model(*(a.clone() for a in single)))
    assert torch.equal(model(x, t[0], y), model(x, t[:1].expand(3), y))  # t for all
    # Gradients that arrive expanded (from a sum) or flipped.
    for reduce in (Tensor.sum, lambda out: out.flip(0).permute(0, 2, 3, 1)[..., ::2].sum()):
        results = []
        for contiguous in (False, True):
            model.zero_grad()
            out = model(x, t, y)
            (gradient,) = torch.autograd.grad(reduce(out), out)
            out.backward(gradient.clone(memory_format=torch.contiguous_format))
            if not contiguous:
                model.zero_grad()
                reduce(model(x, t, y)).backward()
            results.append([p.grad for p in model.parameters() if p.requires_grad])
        for found, wanted in zip(*results, strict=True):
            assert torch.equal(found, wanted)
    assert gradients


@each_conditioning
def test_empty_batch(conditioning: str) -> None:
    model = make_model(conditioning)
    x, t, y = make_inputs(model, n=0)
    out, (hidden,) = model(x, t, y, return_hidden=[1])
    assert out.shape == (0, 8, 8, 8)
    assert hidden.shape == (0, 16, 48)
    assert model.forward_tokens(x, t, y).shape == (0, 16, 32)
    assert model.forward_with_cfg(x, t, y, 4.0).shape == (0, 8, 8, 8)
    model.train()(x, t, y).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_two_threads() -> None:
    model = make_model()
    batches = [make_inputs(model, seed=seed) for seed in range(2)]
    expected = [model(*batch) for batch in batches]
    found: list[list[Tensor]] = [[], []]

    def work(i: int) -> None:
        with torch.no_grad():
            found[i] += [model(*batches[i]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, wanted in zip(found, expected, strict=True):
        assert len(outputs) == 20
        assert all(torch.equal(out, wanted) for out in outputs)


@each_conditioning
def test_inference_mode(conditioning: str) -> None:
    model = make_model(conditioning)
    inputs = make_inputs(model)
    expected = model(*inputs)
    with torch.inference_mode():
        out = model(*inputs)
        cached = tuple(a.clone() for a in inputs)
    assert torch.equal(out, expected)
    with torch.no_grad():
        assert torch.equal(model(*cached), expected)
    # An inference tensor trains after a clone, and nothing of the model was spoilt.
    assert_same_call(model, make_model(conditioning), *(a.clone() for a in cached))


def test_meta_device_gives_shapes_without_memory() -> None:
    with torch.device("meta"):
        model = fastdit.DiT(**TINY)
        x, labels = torch.empty(3, 4, 8, 8), torch.empty(3, dtype=torch.int64)
        out = model(x, labels, labels)
        guided = model.forward_with_cfg(x[:2], labels[:2], labels[:2], 2.0)
    assert (out.device.type, out.shape, guided.shape) == ("meta", (3, 8, 8, 8), (2, 8, 8, 8))


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = fastdit.DiT(**TINY)
        out = model(torch.randn(3, 4, 8, 8), torch.zeros(3), torch.zeros(3, dtype=torch.int64))
        out.sum().backward()
    assert out.shape == (3, 8, 8, 8)
