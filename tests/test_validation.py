from __future__ import annotations

import pytest
import torch

import fastdit
from fastdit.validation import (
    autocast_enabled,
    checks_values,
    nearest,
    require_choice,
    require_floating,
    require_same_device,
    validate,
)


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTDIT_VALIDATE", raising=False)
    monkeypatch.setattr(validate, "_mode", None)


X = torch.ones(1)


def test_nearest() -> None:
    assert nearest("patch_szie", ["patch_size", "depth"]) == "; did you mean 'patch_size'?"
    assert nearest("zzz", ["patch_size", "depth"]) == ""


def test_require_choice() -> None:
    require_choice("k", 3, (3, "all"))
    with pytest.raises(ValueError, match=r"^k='al': allowed are 3, 'all'; did you mean 'all'\?$"):
        require_choice("k", "al", (3, "all"))
    with pytest.raises(ValueError, match=r"^k=4: allowed are 3, 'all'$"):
        require_choice("k", 4, iter((3, "all")))


def test_require_floating() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        require_floating("x", torch.ones(2, dtype=dtype))
    require_floating("x", torch.ones(2, device="meta"))
    require_floating("x", torch.nn.Parameter(torch.ones(2)))
    bad = {
        "torch.int64": torch.ones(2).long(),
        "torch.bool": torch.ones(2) > 0,
        "torch.complex64": torch.ones(2) + 0j,
        "sparse_coo": torch.ones(2).to_sparse(),
        "got list": [1.0],
        "got NoneType": None,
        "got float": 1.0,
    }
    for message, value in bad.items():
        with pytest.raises(TypeError, match=f"^x: expected .*{message}"):
            require_floating("x", value)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_require_floating_refuses_quantised_tensors() -> None:
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"x: .*torch\.qint8"):
        require_floating("x", quantised)


def test_require_same_device() -> None:
    require_same_device(a=X, b=None, c=X)
    require_same_device()
    with pytest.raises(ValueError, match="a is on cpu, c is on meta: all must be on one device"):
        require_same_device(a=X, b=None, c=X.to("meta"))


def test_autocast_enabled() -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert not autocast_enabled(cpu)
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_enabled(cpu)
        assert not autocast_enabled(meta)


def test_modes() -> None:
    assert fastdit.validate is validate
    assert not checks_values(X)
    with validate("full"):
        assert checks_values(X)
        with validate("shapes"):
            assert not checks_values(X)
            with pytest.raises(KeyError), validate("full"):
                raise KeyError
            assert not checks_values(X)
        assert checks_values(X)
    assert not checks_values(X)
    validate("full")
    assert checks_values(X)
    with pytest.raises(ValueError, match=r"mode='ful'.*did you mean 'full'"):
        validate("ful")
    assert checks_values(X)


def test_there_are_no_values_on_meta_or_while_compiling() -> None:
    with validate("full"):
        assert not checks_values(torch.ones(1, device="meta"))
        compiled = torch.compile(
            lambda x: x + 1 if checks_values(x) else x - 1, backend="eager", fullgraph=True
        )
        assert compiled(X).item() == 0


def test_environment_sets_the_initial_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIT_VALIDATE", "full")
    assert checks_values(X)
    monkeypatch.setenv("FASTDIT_VALIDATE", "shapes")
    assert checks_values(X)  # read once
    monkeypatch.setattr(validate, "_mode", None)
    assert not checks_values(X)
    monkeypatch.setattr(validate, "_mode", None)
    monkeypatch.setenv("FASTDIT_VALIDATE", "nothing")
    with pytest.raises(ValueError, match="FASTDIT_VALIDATE='nothing': allowed are"):
        checks_values(X)


def test_values_are_not_read_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    with validate("full"):
        assert not checks_values(X)
        capturing[0] = False
        assert checks_values(X)
