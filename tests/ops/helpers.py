"""One computation three ways (exact, plain, tested), outputs and gradients, held to the rules of `fastdit.testing`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdit.ops.operation import Operation
from fastdit.testing import assert_close, assert_gradient_close, assert_same_bits, layouts

Function = Callable[..., Any]
Inputs = Mapping[str, Tensor | None]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# N, T, D: a plain one, DiT-XL's head_dim, nothing even, single elements, and no sample.
SIZES = [(2, 16, 64), (3, 5, 72), (3, 7, 33), (1, 1, 8), (2, 1, 1), (0, 4, 8)]
each_size = pytest.mark.parametrize("size", SIZES, ids=str)


_F = Callable[..., None]


def _ways(*names: str) -> Callable[[_F], _F]:
    marks = {
        "interpreter": pytest.mark.skipif(
            torch.cuda.is_available(), reason="the kernels run on the GPU"
        ),
        "cuda": pytest.mark.gpu,
    }
    ways = [pytest.param(name, marks=marks.get(name, ())) for name in names]

    def mark(test: _F) -> _F:
        return pytest.mark.usefixtures("way")(
            pytest.mark.parametrize("way", ways, indirect=True)(test)
        )

    return mark


# A test of an operation runs in plain torch; through the registered operator and its own backward; through the Triton
# kernels in the interpreter; and, with a GPU, through the kernels on it, everything then being made there.
both_ways = _ways("plain", "operator")
every_way = _ways("plain", "operator", "interpreter", "cuda")
kernels_only = _ways("interpreter", "cuda")

# For the kernels: batches of 1, 2, 3 and 5, odd numbers of tokens, more tokens than a slice has rows, and a D on both
# sides of every power of two that a tile can have.
KERNEL_SIZES = [
    (1, 1, 1),
    (2, 3, 3),
    (5, 3, 17),
    (3, 1, 63),
    (2, 17, 72),
    (1, 3, 127),
    (2, 2, 129),
    (3, 2, 384),
    (1, 2, 1023),
    (2, 2, 1152),
    (1, 2, 1500),
    (2, 37, 8),
]
each_kernel_size = pytest.mark.parametrize("size", KERNEL_SIZES, ids=str)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def _as_tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _run(
    function: Function, inputs: Inputs, cotangents: list[Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    leaves = {
        name: value if value is None else value.detach().requires_grad_()
        for name, value in inputs.items()
    }
    outputs = _as_tuple(function(**leaves))
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    arriving = [weight.to(out.dtype) for out, weight in zip(outputs, cotangents, strict=True)]
    gradients = torch.autograd.grad(outputs, list(given.values()), arriving)
    return [out.detach() for out in outputs], dict(zip(given, gradients, strict=True))


def assert_operation_close(
    function: Function, reference: Function, inputs: Inputs, *, summed: Mapping[str, int]
) -> None:
    """Outputs by N1 and N2, gradients by N3; `summed` holds over how many terms the gradient of an input is summed.

    Dtypes and shapes are those of the reference on the same inputs, and no input is changed.
    """
    before = {name: None if v is None else v.clone() for name, v in inputs.items()}
    expected = _as_tuple(reference(**inputs))
    # In 16 bits, so that the weighting is the same number in every dtype.
    cotangents = [torch.randn(out.shape).bfloat16() for out in expected]
    out, gradients = _run(function, inputs, cotangents)
    plain, plain_gradients = _run(reference, inputs, cotangents)
    wide = {name: None if v is None else v.double() for name, v in inputs.items()}
    exact, exact_gradients = _run(reference, wide, cotangents)
    for i, (found, wanted) in enumerate(zip(out, expected, strict=True)):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        if found.dtype is torch.float64:  # there is no oracle above it
            torch.testing.assert_close(found, exact[i])
        else:
            assert_close(f"output {i}", found, exact[i], plain[i])
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype, name
        if gradient.dtype is torch.float64:
            torch.testing.assert_close(gradient, exact_gradients[name])
            continue
        assert_gradient_close(
            f"gradient of {name}",
            gradient,
            exact_gradients[name],
            plain_gradients[name],
            summed=summed.get(name, 0),
        )
    for name, value in inputs.items():
        assert value is None or torch.equal(value, before[name]), f"{name} was changed"


def assert_layouts_do_not_matter(
    function: Function, inputs: Inputs, *, summed: Mapping[str, int]
) -> None:
    """N5: every input, and the gradient that arrives, in every layout: the same bits out and back.

    Gradients that are sums are the same up to the order of the sum (N3), which plain torch takes from the layout.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    cotangents = [torch.randn(out.shape).to(out.dtype) for out in _as_tuple(function(**inputs))]
    ones = [torch.ones_like(cotangent) for cotangent in cotangents]

    def compare(case: str, inputs: Inputs, cotangents: list[Tensor], expected: Any) -> None:
        outputs, gradients = _run(function, inputs, cotangents)
        for found, same in zip(outputs, expected[0], strict=True):
            assert_same_bits(f"{case}, output", found, same)
        for name, gradient in gradients.items():
            same = expected[1][name]
            if name in summed:
                assert_gradient_close(name, gradient, same.double(), same, summed=summed[name])
            else:
                assert_same_bits(f"{case}, gradient of {name}", gradient, same)

    expected = _run(function, inputs, cotangents)
    for name, value in given.items():
        for layout, variant in layouts(value).items():
            compare(f"{name} {layout}", {**inputs, name: variant}, cotangents, expected)
    for i, cotangent in enumerate(cotangents):
        for layout, variant in layouts(cotangent).items():
            changed = [*cotangents[:i], variant, *cotangents[i + 1 :]]
            compare(f"gradient {i} {layout}", inputs, changed, expected)
    expanded = [torch.ones((), dtype=c.dtype).expand(c.shape) for c in cotangents]
    compare("expanded gradient", inputs, expanded, _run(function, inputs, ones))


def assert_gradcheck(function: Function, inputs: Inputs) -> None:
    """The backward against finite differences, in float64."""
    names = [name for name, value in inputs.items() if value is not None]
    leaves = [inputs[name].double().detach().requires_grad_() for name in names]
    constant = {name: None for name, value in inputs.items() if value is None}
    assert torch.autograd.gradcheck(
        lambda *tensors: function(**dict(zip(names, tensors, strict=True)), **constant), leaves
    )


each_opcheck = pytest.mark.parametrize("case", ["plain", "transposed", "batch 0", "odd", "mixed"])


def opcheck_inputs(
    case: str,
) -> tuple[Callable[..., Tensor], tuple[int, int, int], torch.dtype]:
    """How to draw a tensor, N, T, D, and the dtype of what is not the residual stream."""
    size = {"batch 0": (0, 4, 8), "odd": (3, 5, 7)}.get(case, (2, 4, 8))

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        value = draw(*shape, dtype=dtype)
        return layouts(value)["transposed"] if case == "transposed" else value

    return make, size, torch.bfloat16 if case == "mixed" else torch.float32


def _operations(module: ModuleType) -> list[Operation]:
    """FORWARD, and INFERENCE and BACKWARD of those that have them."""
    names = ("FORWARD", "INFERENCE", "BACKWARD")
    return [getattr(module, name) for name in names if hasattr(module, name)]


def watch_kernels(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[str]:
    """The names of the operations of `module` whose kernels run, as they run."""
    calls: list[str] = []
    for operation in _operations(module):
        kernel = operation.implementations["triton"]

        def watched(
            *arguments: Any, operation: Operation = operation, kernel: Function = kernel
        ) -> Any:
            calls.append(operation.name)
            return kernel(*arguments)

        monkeypatch.setitem(operation.implementations, "triton", watched)
    return calls


def fill_native(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[str]:
    """Fills the native slots of an operation's module with the reference, on a machine that can run them.

    The public function then goes through the registered operator and its backward; returns the names of what ran.
    """
    calls: list[str] = []
    for operation in _operations(module):

        def native(*arguments: Any, operation: Operation = operation) -> Any:
            calls.append(operation.name)
            dense = (a.contiguous() if isinstance(a, Tensor) else a for a in arguments)
            return operation.implementations["reference"](*dense)

        monkeypatch.setitem(operation.implementations, "native", native)
    monkeypatch.setattr("fastdit.ops.operation.reasons_not_usable", lambda *_: [])
    return calls


def need_memory(gib: int) -> None:
    """Skips a test where the GPU has less: what it reads, writes and keeps, and a little more."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] // 2**30
    if free < gib:
        pytest.skip(f"it needs {gib} GiB of the GPU's memory, {free} GiB are free")
