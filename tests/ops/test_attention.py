from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdit
from fastdit import ops, reference
from fastdit.attention import BACKENDS, flash_attn_4
from fastdit.testing import (
    Guarded,
    assert_gradient_close,
    assert_row_local,
    assert_same_bits,
    layouts,
    poisoned_memory,
)

from .helpers import (
    Inputs,
    assert_gradcheck,
    assert_operation_close,
    draw,
    each_dtype,
    kernels_only,
)

MODULE = importlib.import_module("fastdit.ops.attention")
FORWARD = torch.ops.fastdit.attention.default
BACKWARD = torch.ops.fastdit.attention_backward.default
PACKED_BACKWARD = torch.ops.fastdit.attention_qkvpacked_backward.default

# Dynamo looks at `.grad` of what it is given and hides the warning, which `filterwarnings = error` has raised by then.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of bfloat16: the interpreter would multiply their bits. Numpy, in which it computes, would warn of Inf."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    language = importlib.import_module("triton.language")
    product = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == language.bfloat16:
            a, b = (self.cast_impl(x, language.float32) for x in (a, b))
        return product(self, a, b, *rest)

    monkeypatch.setattr(builder, "create_dot", create_dot)
    with np.errstate(all="ignore"):
        yield


each_backend = pytest.mark.parametrize("backend", ["auto", "reference"])
each_size = pytest.mark.parametrize(
    ("n", "t", "s", "heads", "head_dim"),
    [
        (2, 16, 16, 2, 64),
        (1, 9, 9, 2, 72),  # DiT-XL's
        (2, 7, 2, 3, 20),  # the cross-attention block's two tokens
        (2, 1, 3, 1, 8),
        (2, 5, 3, 1, 1),
        (0, 4, 4, 2, 8),
    ],
)


def make(
    n: int, t: int, s: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> Inputs:
    k, v = (draw(n, s, heads, head_dim, dtype=dtype) for _ in range(2))
    return {"q": draw(n, t, heads, head_dim, dtype=dtype), "k": k, "v": v}


@each_backend
@each_dtype
@each_size
def test_matches_the_reference(
    backend: str, dtype: torch.dtype, n: int, t: int, s: int, heads: int, head_dim: int
) -> None:
    inputs = make(n, t, s, heads, head_dim, dtype)
    with fastdit.use_backend(backend):
        assert_operation_close(
            ops.attention, reference.attention, inputs, summed={"k": max(t, 2), "v": max(t, 2)}
        )


@each_backend
@pytest.mark.parametrize("scale", [None, 0.0, 0.3, 2.0])
def test_scale(backend: str, scale: float | None) -> None:
    inputs = make(2, 5, 4, 2, 8, torch.float64)
    with fastdit.use_backend(backend):
        found = ops.attention(**inputs, scale=scale)
    q, k, v = (value.transpose(1, 2) for value in inputs.values())
    weights = (q @ k.mT * (8**-0.5 if scale is None else scale)).softmax(-1)
    torch.testing.assert_close(found, (weights @ v).transpose(1, 2))
    torch.testing.assert_close(
        found, F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    )


@each_backend
def test_gradcheck(backend: str) -> None:
    with fastdit.use_backend(backend):
        assert_gradcheck(ops.attention, make(1, 3, 2, 2, 4))


@each_backend
def test_layouts(backend: str) -> None:
    """The matrix products take other paths for other strides, so the bits may differ, the accuracy may not."""
    inputs = make(2, 4, 6, 2, 8)
    packed = draw(2, 4, 3, 2, 8).unbind(2)  # how a block hands them out
    variants = [dict(zip("qkv", packed, strict=True))]
    for name, value in inputs.items():
        variants += [{**inputs, name: variant} for variant in layouts(value).values()]
    with fastdit.use_backend(backend):
        for variant in variants:
            sums = dict.fromkeys("qkv", 6)
            assert_operation_close(ops.attention, reference.attention, variant, summed=sums)


@each_backend
def test_one_key_is_its_value(backend: str) -> None:
    q, k, v = make(2, 3, 1, 2, 8).values()
    with fastdit.use_backend(backend):
        assert torch.equal(ops.attention(q, k, v), v.expand(2, 3, 2, 8))


@each_backend
def test_rows_and_memory(backend: str) -> None:
    inputs = make(3, 4, 4, 2, 8)
    with fastdit.use_backend(backend):
        expected = ops.attention(**inputs)
        q, k, v = inputs.values()
        assert_row_local("v", lambda v: ops.attention(q, k, v), v, 1)
        for changed in ("q", "k"):  # a NaN there may give a weight of zero, but in its sample only
            dirty = inputs[changed].clone()
            dirty[1] = torch.nan
            out = ops.attention(**{**inputs, changed: dirty})
            assert torch.equal(out[[0, 2]], expected[[0, 2]])
        guarded = {name: Guarded(value) for name, value in inputs.items()}
        with poisoned_memory():
            out = ops.attention(**{n: g.tensor.requires_grad_() for n, g in guarded.items()})
            out.sum().backward()
    assert torch.equal(out, expected)
    for name, guard in guarded.items():
        guard.check(name)
        assert guard.tensor.grad.isfinite().all()


@each_backend
def test_large_logits_do_not_overflow(backend: str) -> None:
    inputs = {name: value * 5 for name, value in make(2, 8, 8, 2, 16, torch.float16).items()}
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    with fastdit.use_backend(backend):
        out = ops.attention(**leaves)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())


def test_fake_shapes() -> None:
    q, k = torch.empty(2, 5, 2, 8, device="meta"), torch.empty(2, 3, 2, 8, device="meta")
    for backend in ("auto", "reference"):
        with fastdit.use_backend(backend):
            assert ops.attention(q, k, k).shape == (2, 5, 2, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(2, 4, 8)}, ValueError, r"q, k, v: expected shapes .*got \(2, 4, 8\)"),
        ({"k": torch.ones(2, 3, 2, 8)}, ValueError, r"got .*\(2, 3, 2, 8\), \(2, 4, 2, 8\)"),
        ({"q": torch.ones(2, 4, 3, 8)}, ValueError, r"got \(2, 4, 3, 8\)"),
        ({"q": torch.ones(3, 4, 2, 8)}, ValueError, r"got \(3, 4, 2, 8\)"),
        ({"v": torch.ones(2, 4, 2, 8).double()}, TypeError, "v: .*dtype of q.*got torch.float64"),
        ({"k": torch.ones(2, 4, 2, 8).int()}, TypeError, "k: .*torch.int32"),
        ({"k": None}, TypeError, "k: expected a tensor, got NoneType"),
        ({"v": torch.ones(2, 4, 2, 8, device="meta")}, ValueError, "q is on cpu.*v is on meta"),
    ],
    ids=lambda value: "" if isinstance(value, type) else str(value)[:40],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.attention(**{**make(2, 4, 4, 2, 8), **change})


# ------------------------------------------------------------------------------------------ explicit backends


# Those that this machine has without a GPU; sdpa_flash is torch's for CPUs.
@pytest.mark.parametrize("backend", ["sdpa", "sdpa_flash", "reference"])
@each_dtype
@pytest.mark.parametrize(("t", "s", "head_dim"), [(16, 16, 64), (9, 9, 72), (7, 2, 20)])
def test_named_backend_matches_the_reference(
    backend: str, dtype: torch.dtype, t: int, s: int, head_dim: int
) -> None:
    def attention(**inputs: Any) -> torch.Tensor:
        return ops.attention(**inputs, backend=backend)

    inputs = make(2, t, s, 2, head_dim, dtype)
    assert_operation_close(attention, reference.attention, inputs, summed={"k": t, "v": t})


def check_backend(backend: str, t: int, s: int, head_dim: int) -> None:
    """FlashAttention's rule in bfloat16 for out, dq, dk and dv, of views of a projection; and the bits of a repeat.

    These only where the backend promises them.
    """
    n, heads = 2, 4
    if t == s:
        q, k, v = draw(n, t, 3, heads, head_dim, dtype=torch.bfloat16).unbind(2)
    else:
        q = draw(n, t, heads, head_dim, dtype=torch.bfloat16)
        k, v = draw(n, s, 2, heads, head_dim, dtype=torch.bfloat16).unbind(2)
    dout = draw(n, t, heads, head_dim, dtype=torch.bfloat16)

    def run(attention: Any, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    def attend(*inputs: torch.Tensor) -> torch.Tensor:
        return ops.attention(*inputs, backend=backend)

    leaf = q.detach().requires_grad_()  # some backends have no backward
    if reasons := BACKENDS[backend].reasons_not_usable(leaf, k, v):
        pytest.skip(f"{backend}: {'; '.join(reasons)}")
    found = run(attend)
    plain, exact = run(reference.attention), run(reference.attention, torch.float64)
    names = ("out", "dq", "dk", "dv")
    for name, *results in zip(names, found, exact, plain, strict=True):
        assert_gradient_close(f"{backend}: {name}", *results)
    if BACKENDS[backend].is_deterministic(q):
        for name, one, same in zip(names, run(attend), found, strict=True):
            assert_same_bits(f"{backend}: {name}", one, same)


@pytest.mark.parametrize("backend", ["sdpa", "sdpa_flash", "triton"])
@pytest.mark.parametrize(("t", "s"), [(33, 33), (40, 2)])
def test_backend_follows_the_rule(backend: str, t: int, s: int) -> None:
    check_backend(backend, t, s, 72)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize(("t", "s"), [(63, 63), (256, 256), (258, 258), (256, 2)])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_every_backend_on_a_gpu(backend: str, t: int, s: int, head_dim: int) -> None:
    """All that are usable there; of the others the reason."""
    with torch.device("cuda"):
        check_backend(backend, t, s, head_dim)


@pytest.mark.parametrize(("capability", "tile"), [((9, 0), (128, 128)), ((10, 0), None)])
def test_tile_of_flash_attn_4(
    capability: tuple[int, int], tile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors on CUDA, which hold nothing: on Hopper it is told to take 128 x 128."""
    tiles: list[Any] = []

    def forward(
        q: torch.Tensor, *_: Any, tile_mn: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert q.device.type == "cuda"
        tiles.append(tile_mn)
        return torch.empty_like(q), q.new_empty(2, 16, 256, dtype=torch.float32)

    interface = ModuleType(flash_attn_4.INTERFACE)
    interface._flash_attn_fwd = forward
    monkeypatch.setitem(sys.modules, flash_attn_4.INTERFACE, interface)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        q, k, v = torch.empty(2, 256, 3, 16, 72, device="cuda", dtype=torch.bfloat16).unbind(2)
        # The operator itself, for which its fake would stand in.
        flash_attn_4._forward(q, k, v, 72**-0.5)
    assert tiles == [tile]


def test_named_backend_takes_any_strides() -> None:
    inputs = {n: layouts(v)["every second element"] for n, v in make(2, 4, 4, 2, 8).items()}
    expected = reference.attention(**inputs)
    for backend in ("sdpa", "sdpa_flash", "triton"):
        torch.testing.assert_close(ops.attention(**inputs, backend=backend), expected)


def test_unknown_backend_and_one_that_cannot_run() -> None:
    inputs = make(2, 4, 4, 2, 8)
    with pytest.raises(ValueError, match=r"backend='cudn': allowed are 'auto', .*mean 'cudnn'"):
        ops.attention(**inputs, backend="cudn")
    with pytest.raises(RuntimeError) as refused:
        ops.attention(**inputs, backend="cudnn")
    message = str(refused.value)
    assert message.startswith(
        "attention backend 'cudnn' cannot run q (2, 4, 2, 8), k (2, 4, 2, 8), v (2, 4, 2, 8) in torch.float32 on cpu; "
        "cudnn: it runs on cuda, not on cpu, torch.float32 is not one of float16, bfloat16; "
    )
    assert "\n" not in message
    assert all(f"; {name}: " in message for name in BACKENDS)
    assert "; sdpa: usable" in message


# ------------------------------------------------------------------------------------------------- the kernel


@kernels_only
@each_dtype
@pytest.mark.parametrize(
    ("n", "t", "s", "heads", "head_dim"),
    [
        (2, 16, 16, 2, 64),
        (1, 20, 20, 2, 72),
        (2, 7, 2, 3, 24),
        (2, 2, 17, 2, 128),
        (3, 5, 3, 1, 8),
        (0, 4, 4, 2, 8),
    ],
)
def test_kernel_matches_the_reference(
    dtype: torch.dtype, n: int, t: int, s: int, heads: int, head_dim: int
) -> None:
    inputs = make(n, t, s, heads, head_dim, dtype)
    sums = {"q": max(s, 2), "k": max(t, 2), "v": max(t, 2)}
    assert_operation_close(ops.attention, reference.attention, inputs, summed=sums)


@kernels_only
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_scale_of_the_kernel(scale: float) -> None:
    def scaled(attention: Any) -> Any:
        return lambda **inputs: attention(**inputs, scale=scale)

    inputs = make(2, 5, 4, 2, 8)
    sums = {"q": 4, "k": 5, "v": 5}
    assert_operation_close(scaled(ops.attention), scaled(reference.attention), inputs, summed=sums)


@kernels_only
def test_kernel_reads_nothing_else() -> None:
    guarded = {name: Guarded(value) for name, value in make(3, 5, 7, 2, 24).items()}
    with poisoned_memory():
        out = ops.attention(**{n: g.tensor.requires_grad_() for n, g in guarded.items()})
        out.sum().backward()
    assert out.isfinite().all()
    for name, guard in guarded.items():
        guard.check(name)
        assert guard.tensor.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_operator_without_the_kernel_is_the_operation(backend: str) -> None:
    """In float64 no kernel runs; the lse is the one that the kernel keeps."""
    inputs = make(2, 5, 3, 2, 8, torch.float64)
    with fastdit.use_backend(backend):
        out, lse = FORWARD(*inputs.values(), 0.3)
        torch.testing.assert_close(out, reference.attention(**inputs, scale=0.3))
        scores = torch.einsum("nthk,nshk->nhts", inputs["q"], inputs["k"]) * 0.3
        torch.testing.assert_close(lse, scores.logsumexp(-1))
        assert_gradcheck(lambda q, k, v: MODULE.Attention.apply(q, k, v, 0.3), inputs)


@kernels_only
def test_lse_of_the_kernel() -> None:
    q, k, v = make(2, 5, 3, 2, 8).values()
    lse = FORWARD(q, k, v, 0.3)[1]
    scores = torch.einsum("nthk,nshk->nhts", q, k) * 0.3
    assert lse.dtype is torch.float32
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("case", ["plain", "16 bits", "batch 0", "transposed"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_opcheck(backend: str, case: str) -> None:
    n, dtype = (0 if case == "batch 0" else 2), torch.bfloat16 if case == "16 bits" else None
    shapes = [(n, 2, 2, 8), (n, 3, 2, 8), (n, 3, 2, 8), (n, 2, 2, 8), (n, 2, 3, 2, 8)]
    tensors = [draw(*shape, dtype=dtype or torch.float32) for shape in shapes]
    if case == "transposed":
        tensors = [layouts(x)["transposed"] for x in tensors]
    q, k, v, dout, qkv = tensors
    with fastdit.use_backend(backend):
        out, lse = FORWARD(q, k, v, 0.3)
        torch.library.opcheck(FORWARD, (q, k, v, 0.3))
        if n:  # torch's check of the schema fails for an empty view
            torch.library.opcheck(FORWARD, (*qkv.unbind(2), 0.3))
        torch.library.opcheck(BACKWARD, (dout, q, k, v, out, lse, 0.3))
        out, lse = FORWARD(*qkv.unbind(2), 0.3)
        torch.library.opcheck(PACKED_BACKWARD, (dout, qkv, out, lse, 0.3))


def test_second_derivative_is_refused() -> None:
    leaves = {n: v.requires_grad_() for n, v in make(1, 3, 3, 1, 8).items()}
    out = ops.attention(**leaves, backend="triton")
    (first,) = torch.autograd.grad(out.square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        first.sum().backward()


# ----------------------------------------------------------------------------------------- packed projections


def packed_run(backend: str, qkv: torch.Tensor, *, packed: bool) -> list[torch.Tensor]:
    """The output (N, T, H * K) and the gradient of qkv."""
    leaf = qkv.detach().requires_grad_()
    if packed:
        out = ops.attention_qkvpacked(leaf, scale=0.3, backend=backend)
    else:
        out = ops.attention(*leaf.unbind(2), scale=0.3, backend=backend).flatten(2)
    generator = torch.Generator(qkv.device).manual_seed(1)
    weights = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaf, weights)]


@pytest.mark.parametrize("backend", ["auto", "sdpa", "sdpa_flash", "reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_is_unpacked(backend: str, dtype: torch.dtype) -> None:
    """Bit for bit, output and gradient, from (N, T, 3, H, K) and from (N, T, 3 * H * K)."""
    qkv = draw(2, 5, 3, 2, 24, dtype=dtype)
    out, gradient = packed_run(backend, qkv, packed=True)
    expected, expected_gradient = packed_run(backend, qkv, packed=False)
    assert out.shape == (2, 5, 48)
    assert_same_bits("output", out, expected)
    assert_same_bits("gradient", gradient, expected_gradient)
    flat = ops.attention_qkvpacked(qkv.flatten(2), 2, scale=0.3, backend=backend)
    assert_same_bits("flat", flat, expected)


@kernels_only
def test_packed_kernel_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets views of qkv, writes views of one gradient, and its output is the next projection's input."""
    kernel = importlib.import_module("fastdit.kernels.attention")
    qkv = draw(2, 5, 3, 2, 8).requires_grad_()
    seen: list[Any] = []

    def watch(function: Any) -> Any:
        return lambda *arguments: (seen.append(arguments), function(*arguments))[1]

    # The operator has found the function already; the packed backward looks for it.
    forward = MODULE.FORWARD.implementations
    monkeypatch.setitem(forward, "triton", watch(forward["triton"]))
    monkeypatch.setattr(kernel, "backward", watch(kernel.backward))
    out = ops.attention_qkvpacked(qkv)
    out.sum().backward()
    read, backward = seen
    storage = qkv.untyped_storage().data_ptr()
    assert all(x.untyped_storage().data_ptr() == storage for x in read[:3])
    assert len(written := backward[7:]) == 3
    assert len({x.untyped_storage().data_ptr() for x in written}) == 1
    assert torch.equal(torch.stack(written, 2), qkv.grad)
    assert out.is_contiguous()


def test_packed_gradient_is_right() -> None:
    """Against float64; that of the kernel, too."""
    qkv = draw(2, 20, 3, 2, 24)
    exact = packed_run("reference", qkv.double(), packed=True)[1]
    plain = packed_run("reference", qkv, packed=True)[1]
    for backend in ("auto", "triton"):
        gradient = packed_run(backend, qkv, packed=True)[1]
        assert_gradient_close(backend, gradient, exact, plain, summed=20)


@pytest.mark.parametrize(
    ("shape", "num_heads"),
    [((2, 4, 48), None), ((2, 4, 48), 5), ((2, 4, 2, 2, 8), None), ((2, 4, 3, 2, 8), 3), ((4,), 1)],
)
def test_packed_bad_input(shape: tuple[int, ...], num_heads: int | None) -> None:
    message = rf"qkv: expected shape .*\({', '.join(map(str, shape))},?\) and num_heads={num_heads}"
    with pytest.raises(ValueError, match=message):
        ops.attention_qkvpacked(torch.ones(shape), num_heads)


# --------------------------------------------------------------------------------------------------- compiled


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["sdpa_flash", "triton"])
def test_whole_graph(backend: str) -> None:
    """One graph, forward and backward, in two batch sizes; the kernel is opaque to it, torch's own is not."""
    targets: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def both(q: Any, kv: Any, qkv: Any) -> torch.Tensor:
        first = ops.attention(q, *kv.unbind(2), backend=backend)
        return first.flatten(2) + ops.attention_qkvpacked(qkv, 2, backend=backend)

    traced = torch.compile(both, fullgraph=True, backend=compiler)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for n in (2, 3):
        inputs = [
            x.requires_grad_() for x in (draw(n, 5, 2, 8), draw(n, 3, 2, 2, 8), draw(n, 5, 48))
        ]
        out, expected = compiled(*inputs), both(*inputs)
        torch.testing.assert_close(out, expected)
        found = torch.autograd.grad(out.square().sum(), inputs)
        wanted = torch.autograd.grad(expected.square().sum(), inputs)
        for gradient, same in zip(found, wanted, strict=True):
            torch.testing.assert_close(gradient, same)
        with torch.no_grad():
            torch.testing.assert_close(traced(*inputs), expected)
    assert any("fastdit.attention" in target for target in targets) == (backend == "triton")
    assert any("scaled_dot_product" in target for target in targets) == (backend != "triton")
