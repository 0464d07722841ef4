"""The slots of an operation: which implementation runs, eager, differentiated and compiled, and what refusals say."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdit
import fastdit.ops as ops_package
from fastdit import ops, reference
from fastdit.ops.operation import Operation, library

from .helpers import draw, fill_native

# Dynamo looks at `.grad` of what it is given and hides the warning, which `filterwarnings = error` has raised by then.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

CASES: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Tensor]]]] = {
    "layer_norm_modulate": (
        ops.layer_norm_modulate,
        lambda n: {"x": draw(n, 4, 8), "shift": draw(n, 8), "scale": draw(n, 8)},
    ),
    "gated_residual": (
        ops.gated_residual,
        lambda n: {"x": draw(n, 4, 8), "branch": draw(n, 4, 8), "gate": draw(n, 8)},
    ),
    "gated_residual_layer_norm_modulate": (
        ops.gated_residual_layer_norm_modulate,
        lambda n: {
            "x": draw(n, 4, 8),
            "branch": draw(n, 4, 8),
            "gate": draw(n, 8),
            "shift": draw(n, 8),
            "scale": draw(n, 8),
        },
    ),
    "mlp_gelu": (
        ops.mlp_gelu,
        lambda n: {
            "x": draw(n, 4, 8),
            "w1": draw(16, 8),
            "b1": draw(16),
            "w2": draw(8, 16),
            "b2": draw(8),
        },
    ),
    "patchify": (lambda x: ops.patchify(x, 2), lambda n: {"x": draw(n, 3, 4, 6)}),
    "unpatchify": (
        lambda tokens: ops.unpatchify(tokens, 2, 3, (2, 3)),
        lambda n: {"tokens": draw(n, 6, 12)},
    ),
}
# Without a backward of their own, or without an operator: their own files test them.
OTHERS = {"attention", "recomputed", "diffusion_step", "adamw_ema"}
# Alone they are pointwise or a copy: a compiler fuses them into what surrounds them.
FUSED_BY_COMPILERS = {"gated_residual", "patchify", "unpatchify"}
each_operation = pytest.mark.parametrize("name", CASES)


def on(device: str) -> Any:
    """What stands for a tensor on a device that this machine may not have."""
    return SimpleNamespace(device=torch.device(device))


def module_of(name: str) -> Any:
    return importlib.import_module(f"fastdit.ops.{name}")


def run(function: Callable[..., Any], inputs: dict[str, Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of all inputs."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(out.square().sum() for out in outputs)
    return [*outputs, *torch.autograd.grad(loss, list(leaves.values()))]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_every_operation_is_tested_and_has_its_reference() -> None:
    modules = {m.name for m in pkgutil.iter_modules(ops_package.__path__)} - {"operation"}
    assert modules - OTHERS == set(CASES) <= set(ops.__all__)
    for module in modules:
        assert (Path(__file__).parent / f"test_{module}.py").exists()
    for name in CASES:
        module = module_of(name)
        assert (module.FORWARD.name, module.BACKWARD.name) == (name, f"{name}_backward")
        for operation in (module.FORWARD, module.BACKWARD):
            assert operation.backends()[0] == "reference"
            assert hasattr(torch.ops.fastdit, operation.name)
        assert callable(getattr(reference, name))


@each_operation
def test_filled_slot_runs_forward_and_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, make = CASES[name]
    inputs = make(2)
    expected = run(function, inputs)
    calls = fill_native(monkeypatch, module_of(name))
    found = run(function, inputs)
    assert calls == [name, f"{name}_backward"]
    for out, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(out, wanted)
    calls.clear()
    with torch.no_grad():
        function(**inputs)
    assert calls == ["mlp_gelu_inference" if name == "mlp_gelu" else name]
    calls.clear()
    with fastdit.use_backend("reference"):
        run(function, inputs)
    assert calls == []
    with fastdit.use_backend("native"):
        run(function, inputs)
    assert calls == [name, f"{name}_backward"]


@each_operation
def test_filled_slot_runs_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, forward and backward, in two shapes; the implementation is opaque to it and is not traced."""
    function, make = CASES[name]
    calls = fill_native(monkeypatch, module_of(name))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n in (2, 3):
        inputs = make(n)
        expected = run(function, inputs)
        compiled(**inputs)
        calls.clear()
        for out, wanted in zip(run(compiled, inputs), expected, strict=True):
            torch.testing.assert_close(out, wanted)
        opaque = name not in FUSED_BY_COMPILERS
        assert calls == ([name, f"{name}_backward"] if opaque else [])


@pytest.mark.filterwarnings("ignore:fastdit.*an autograd kernel was not registered")
@pytest.mark.parametrize("name", ["layer_norm_modulate", "gated_residual", "mlp_gelu"])
def test_second_derivative_is_right_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch has one; a fused backward has no backward of its own and must say so."""
    function, make = CASES[name]
    inputs = {key: value.double().requires_grad_() for key, value in make(2).items()}

    def second() -> None:
        loss = function(**inputs).pow(3).sum()
        first = torch.autograd.grad(loss, list(inputs.values()), create_graph=True)
        sum(gradient.pow(2).sum() for gradient in first).backward()

    second()
    assert all(leaf.grad.isfinite().all() for leaf in inputs.values())
    fill_native(monkeypatch, module_of(name))
    with pytest.raises(RuntimeError, match="twice"):
        second()


@each_operation
def test_plain_torch_is_seen_through(name: str) -> None:
    """Without a filled slot there is nothing opaque in the graph, so that a compiler can fuse it."""
    function, make = CASES[name]
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(function, fullgraph=True, backend=backend)(**make(2))
    assert targets
    assert not [target for target in targets if "fastdit" in target]


def test_slot_is_used_by_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastdit.DiT(
        input_size=4, patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=3
    ).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([1, 2]), torch.tensor([0, 3])
    expected = model(x, t, y)
    calls = {name: fill_native(monkeypatch, module_of(name)) for name in CASES}
    found = model(x, t, y)
    found.sum().backward()
    torch.testing.assert_close(found, expected)
    forward = {name: names.count(name) for name, names in calls.items()}
    assert forward == {
        "layer_norm_modulate": 2,  # the entry of the first block, and again in its backward
        "gated_residual": 0,  # every branch is added by the seam after it
        "gated_residual_layer_norm_modulate": 4,
        "mlp_gelu": 2,
        "patchify": 1,
        "unpatchify": 1,
    }
    assert calls["mlp_gelu"].count("mlp_gelu_backward") == 2


@each_operation
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_chosen_backend_runs_or_says_why_not(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, make = CASES[name]
    module = module_of(name)
    monkeypatch.setattr(
        "fastdit.ops.operation.reasons_not_usable", lambda *_: ["first reason", "second reason"]
    )
    for operation in (module.FORWARD, module.BACKWARD):
        monkeypatch.setattr(operation, "limits", {})
        for other in ("native", "triton"):
            monkeypatch.delitem(operation.implementations, other, raising=False)
    message = (
        f"backend '{backend}' cannot run {name}: it has no {backend} implementation; "
        "first reason; second reason"
    )
    with fastdit.use_backend(backend), pytest.raises(RuntimeError) as error:
        function(**make(2))
    assert str(error.value) == message
    # A filled slot does not help where the machine cannot run it.
    monkeypatch.setitem(module.FORWARD.implementations, backend, None)
    with fastdit.use_backend(backend), pytest.raises(RuntimeError) as error:
        function(**make(2))
    assert str(error.value) == f"backend '{backend}' cannot run {name}: first reason; second reason"
    with fastdit.use_backend("auto"):
        run(function, make(2))  # never raises


@pytest.mark.filterwarnings("ignore:fastdit.*runs in plain torch")
@each_operation
def test_auto_prefers_what_is_filled_and_usable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = module_of(name).FORWARD
    unusable: set[str] = set()
    monkeypatch.setattr(
        "fastdit.ops.operation.reasons_not_usable",
        lambda backend, device: ["broken"] if backend in unusable else [],
    )
    monkeypatch.setitem(operation.implementations, "native", None)
    monkeypatch.setitem(operation.implementations, "triton", None)
    monkeypatch.setattr(operation, "limits", {})
    cpu, cuda, meta, mps = (on(kind) for kind in ("cpu", "cuda", "meta", "mps"))
    chosen = {x.device.type: operation.choose(x) for x in (cpu, cuda, meta, mps)}
    assert chosen == {"cpu": "native", "cuda": "triton", "meta": "reference", "mps": "reference"}
    unusable.add("triton")
    assert operation.choose(cuda) == "native"
    unusable.add("native")
    assert operation.choose(cuda) == "reference"
    assert operation.choose(cpu) == "reference"
    with fastdit.use_backend("reference"):
        assert operation.choose(cuda) == "reference"


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("layer_norm_modulate", {"x": draw(2, 4, 8).double()}, "torch.float64 is not one of"),
        ("layer_norm_modulate", {"scale": draw(2, 8).double()}, "torch.float64 is not one of"),
        ("gated_residual", {"branch": draw(2, 4, 8).double()}, "torch.float64 is not one of"),
        ("patchify", {"x": draw(2, 3, 4, 6).double()}, "torch.float64 is not one of"),
    ],
)
def test_what_a_kernel_cannot_take_is_refused_or_said_once(
    name: str, change: dict[str, Tensor], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, make = CASES[name]
    inputs = {**make(2), **change}
    with fastdit.use_backend("triton"), pytest.raises(RuntimeError, match=reason):
        function(**inputs)
    monkeypatch.setattr("fastdit.ops.operation._PREFERENCE", {"cpu": ("triton",)})
    monkeypatch.setattr("fastdit.ops.operation._said", set())
    with pytest.warns(UserWarning, match=f"{name} runs in plain torch: {reason}"):
        function(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(**inputs)


def test_longest_row() -> None:
    x = torch.zeros(1, 1, 8193)
    with fastdit.use_backend("triton"):
        assert ops.layer_norm_modulate(x[..., :8192]).shape == (1, 1, 8192)
        with pytest.raises(RuntimeError, match=r"D=8193: the kernels take 1 \.\. 8192"):
            ops.layer_norm_modulate(x)


def test_reference_is_usable_by_name_on_every_device() -> None:
    with fastdit.use_backend("reference"):
        for name in CASES:
            assert module_of(name).FORWARD.choose(on("meta")) == "reference"


def test_new_operation_is_registered_for_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel author writes: a schema, a reference and a fake; all three are then in their places."""
    monkeypatch.setattr("fastdit.ops.operation.OPERATIONS", [])
    operation = Operation(
        "testing_double(Tensor x, float by) -> Tensor",
        reference=lambda x, by: x * by,
        fake=lambda x, by: x.new_empty(x.shape),
    )
    assert operation.name == "testing_double"
    x = draw(2, 3)
    assert torch.equal(torch.ops.fastdit.testing_double(x, 2.0), 2 * x)
    assert torch.ops.fastdit.testing_double(x.to("meta"), 2.0).device.type == "meta"
    torch.library.opcheck(torch.ops.fastdit.testing_double.default, (x, 2.0))
    with pytest.raises(RuntimeError, match="testing_double"):
        library.define("testing_double(Tensor x, float by) -> Tensor")
