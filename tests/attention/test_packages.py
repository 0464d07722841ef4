"""The optional packages, by stand-ins that compute through the reference: how they are called, and when imported."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdit import ops, reference
from fastdit.attention import flash_attn, flash_attn_4, limits, xformers
from fastdit.testing import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

Calls = list[tuple[str, dict[str, Any]]]


@pytest.fixture(autouse=True)
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages run on this machine's CPU, as on a Hopper GPU; what was found before is forgotten."""
    for module in (flash_attn, flash_attn_4, xformers):
        monkeypatch.setattr(module, "limits", lambda *_, **__: [])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash_attn, "_found", {})
    monkeypatch.setattr(xformers, "_found", {})


@pytest.fixture
def calls() -> Calls:
    return []


def install(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> ModuleType:
    module = ModuleType(name)
    for function, value in functions.items():
        setattr(module, function, value)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def flash(calls: Calls, name: str) -> Any:
    """`flash_attn_func` of versions 2 and 3, as far as it is used."""

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: Any = None, deterministic: bool = False
    ) -> Any:
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        calls.append((name, {"softmax_scale": softmax_scale, "deterministic": deterministic}))
        out = reference.attention(q, k, v, scale=softmax_scale)
        return (out, None) if name == "tuple" else out

    return flash_attn_func


def draw(dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> list[Tensor]:
    q, k, v = (torch.randn(2, t, 2, 8).to(dtype).requires_grad_(grad) for t in (5, 3, 3))
    return [q, k, v]


@pytest.mark.parametrize("deterministic", [True, False])
def test_flash_attn_2(monkeypatch: pytest.MonkeyPatch, calls: Calls, deterministic: bool) -> None:
    install(monkeypatch, "flash_attn", flash_attn_func=flash(calls, "2"))
    q, k, v = draw()
    out = ops.attention(q, k, v, scale=0.3, backend="flash_attn", deterministic=deterministic)
    assert_same_bits("output", out, reference.attention(q, k, v, scale=0.3))
    assert calls == [("2", {"softmax_scale": 0.3, "deterministic": deterministic})]


def test_flash_attn_takes_any_strides(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    install(monkeypatch, "flash_attn", flash_attn_func=flash(calls, "2"))
    q, k, v = (x.mT.contiguous().mT for x in draw())
    ops.attention(q, k, v, backend="flash_attn")
    assert len(calls) == 1


def test_flash_attn_3_goes_first_on_hopper(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    install(monkeypatch, "flash_attn", flash_attn_func=flash(calls, "2"))
    install(monkeypatch, "flash_attn_interface", flash_attn_func=flash(calls, "tuple"))
    q, k, v = draw()
    out = ops.attention(q, k, v, backend="flash_attn")
    assert_same_bits("output", out, reference.attention(q, k, v))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert flash_attn.reasons_not_usable(q, k, v) == []
    ops.attention(q, k, v, backend="flash_attn")
    assert [name for name, _ in calls] == ["tuple", "2"]


def test_fa3_fwd_is_for_inference(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    install(monkeypatch, "fa3_fwd_interface", flash_attn_func=flash(calls, "fwd"))
    assert flash_attn.reasons_not_usable(*draw()) == []
    assert flash_attn.reasons_not_usable(*draw(torch.float16)) == [
        "fa3_fwd_interface has no float16"
    ]
    assert flash_attn.reasons_not_usable(*draw(grad=True)) == ["fa3_fwd_interface has no backward"]
    with torch.no_grad():
        assert flash_attn.reasons_not_usable(*draw(grad=True)) == []
    install(monkeypatch, "flash_attn", flash_attn_func=flash(calls, "2"))
    ops.attention(*draw(), backend="flash_attn")
    ops.attention(*draw(grad=True), backend="flash_attn").sum().backward()
    assert [name for name, _ in calls] == ["fwd", "2"]


def test_broken_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn")
    with pytest.raises(
        RuntimeError, match=r"flash_attn: flash_attn cannot be used: .*flash_attn_func"
    ):
        ops.attention(*draw(), backend="flash_attn")
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    (reason,) = xformers.reasons_not_usable(*draw())
    assert reason.startswith("xformers.ops cannot be used: ")


def test_xformers(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, scale: Any = None) -> Tensor:
        calls.append(("xformers", {"scale": scale}))
        return reference.attention(q, k, v, scale=scale)

    install(monkeypatch, "xformers")
    install(monkeypatch, "xformers.ops", memory_efficient_attention=memory_efficient_attention)
    q, k, v = draw()
    out = ops.attention(q, k, v, scale=0.3, backend="xformers")
    assert_same_bits("output", out, reference.attention(q, k, v, scale=0.3))
    assert calls == [("xformers", {"scale": 0.3})]
    assert not xformers.is_deterministic(q)


# ----------------------------------------------------------------------------------------------------- version 4


@pytest.fixture
def version_4(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> Calls:
    """The two functions of `flash_attn.cute.interface`, with what is used of their signatures."""
    operator = torch.ops.fastdit

    def _flash_attn_fwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: Any = None,
        tile_mn: Any = None,
        return_lse: bool = False,
    ) -> tuple[Any, ...]:
        calls.append(("forward", {"tile_mn": tile_mn, "return_lse": return_lse}))
        out, lse = operator.attention(q, k, v, softmax_scale)
        return out, lse, None, None

    def _flash_attn_bwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        softmax_scale: Any = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, ...]:
        calls.append(("backward", {"deterministic": deterministic}))
        return operator.attention_backward(dout, q, k, v, out, lse, softmax_scale)

    functions = {"_flash_attn_fwd": _flash_attn_fwd, "_flash_attn_bwd": _flash_attn_bwd}
    install(monkeypatch, flash_attn_4.INTERFACE, **functions)
    return calls


@pytest.mark.parametrize("deterministic", [True, False])
def test_flash_attn_4(version_4: Calls, deterministic: bool) -> None:
    inputs = draw(torch.float32, grad=True)
    out = ops.attention(*inputs, scale=0.3, backend="flash_attn_4", deterministic=deterministic)
    expected = reference.attention(*inputs, scale=0.3)
    torch.testing.assert_close(out, expected)
    dout = torch.randn(out.shape)
    found = torch.autograd.grad(out, inputs, dout)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, inputs, dout), strict=True):
        torch.testing.assert_close(gradient, wanted)
    # There is no Hopper here, so the tile is its own choice.
    assert version_4 == [
        ("forward", {"tile_mn": None, "return_lse": True}),
        ("backward", {"deterministic": deterministic}),
    ]


def test_flash_attn_4_is_opaque_to_a_compiler(version_4: Calls) -> None:
    torch._dynamo.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, backend="flash_attn_4")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    inputs = draw(torch.float32, grad=True)
    out = compiled(*inputs)
    assert [name for name, _ in version_4] == ["forward"]
    found = torch.autograd.grad(out.square().sum(), inputs)
    expected = torch.autograd.grad(reference.attention(*inputs).square().sum(), inputs)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)
    torch._dynamo.reset()


def test_flash_attn_4_opcheck(version_4: Calls) -> None:
    q, k, v = draw(torch.float32)
    forward = torch.ops.fastdit.flash_attn_4.default
    torch.library.opcheck(forward, (q, k, v, 0.3))
    out, lse = forward(q, k, v, 0.3)
    backward = torch.ops.fastdit.flash_attn_4_backward.default
    torch.library.opcheck(backward, (torch.randn(out.shape), q, k, v, out, lse, 0.3, True))


def test_old_flash_attn_4_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def _flash_attn_fwd(q: Tensor, k: Tensor, v: Tensor, m_block_size: int = 128) -> None: ...

    install(monkeypatch, flash_attn_4.INTERFACE, _flash_attn_fwd=_flash_attn_fwd)
    assert flash_attn_4.reasons_not_usable(*draw()) == [
        "this version of flash_attn.cute has no tile_mn",
        "this version of flash_attn.cute has no return_lse",
    ]


def test_forbidden_import_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    assert not limits.is_installed("xformers")
    assert limits.is_installed("torch")
    assert not limits.is_installed("no_such_package_at_all")
