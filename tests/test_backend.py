from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastdit
from fastdit import ops
from fastdit.backend import (
    BACKENDS,
    CHOICES,
    active_backend,
    describe,
    reasons_not_usable,
    use_backend,
)

ROOT = Path(fastdit.__file__).parents[1]


@pytest.fixture(autouse=True)
def _restored() -> object:
    before = active_backend()
    yield
    use_backend(before)


def test_default_is_auto() -> None:
    assert CHOICES == ("auto", "reference", "native", "triton")
    assert fastdit.use_backend is use_backend
    assert active_backend() == os.environ.get("FASTDIT_BACKEND", "auto")


def test_call_sets_it_for_the_process() -> None:
    use_backend("reference")
    assert active_backend() == "reference"
    use_backend("auto")
    assert active_backend() == "auto"


def test_nested_blocks_restore_what_was_before() -> None:
    use_backend("auto")
    with use_backend("reference"):
        assert active_backend() == "reference"
        with use_backend("native"):
            assert active_backend() == "native"
            use_backend("triton")
        assert active_backend() == "reference"
        with pytest.raises(KeyError), use_backend("native"):
            raise KeyError
        assert active_backend() == "reference"
    assert active_backend() == "auto"


@pytest.mark.parametrize("name", ["cuda", "Reference", "tritn", "", None])
def test_unknown_name_is_refused_and_changes_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=r"name=.*allowed are 'auto', 'reference'") as error:
        use_backend(name)
    assert repr(name) in str(error.value)
    assert ("did you mean 'triton'" in str(error.value)) == (name == "tritn")
    assert active_backend() == "auto"


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"triton": False, "fastdit._C": False}
    monkeypatch.setattr("fastdit.backend._FOUND", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert reasons_not_usable("reference", "cpu") == []
    assert reasons_not_usable("native", "cpu") == ["the compiled extension fastdit._C is not built"]
    assert reasons_not_usable("triton") == [
        "the package triton is not installed",
        "there is no CUDA device, and TRITON_INTERPRET=1 is not set",
    ]
    assert describe() == [(name, reasons_not_usable(name)) for name in BACKENDS]
    found.update({"triton": True, "fastdit._C": True})
    assert reasons_not_usable("native", "cuda") == []
    assert len(reasons_not_usable("triton", "cpu")) == 1
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reasons_not_usable("triton", "cpu") == []
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert reasons_not_usable("triton", "cuda") == []
    assert reasons_not_usable("triton", "cpu") == ["it runs on cuda, not on cpu"]
    with pytest.raises(ValueError, match="backend='auto'"):
        reasons_not_usable("auto")


def test_attention_follows_the_reference_backend() -> None:
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    with use_backend("reference"):
        plain = ops.attention(q, q, q)
    assert "scaled_dot_product" in _names(ops.attention(q, q, q))
    assert "scaled_dot_product" not in _names(plain)


def _names(tensor: torch.Tensor) -> str:
    """The names of the operations that made `tensor`."""
    names, nodes = [], [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        names.append(node.name())
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return " ".join(names).replace("ScaledDotProduct", "scaled_dot_product")


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_environment_variables_set_the_initial_modes() -> None:
    code = (
        "import torch, fastdit, fastdit.backend as b; print(b.active_backend());"
        "m = fastdit.DiT(4, 2, 1, 16, 1, 2, num_classes=3).eval();"
        "x, t, y = torch.ones(1, 1, 4, 4), torch.tensor([5000]), torch.tensor([1]);"
        "m(x, t, y)"
    )
    result = _python(code, FASTDIT_BACKEND="reference", FASTDIT_VALIDATE="full")
    assert result.stdout.strip() == "reference"
    assert "ValueError: t[0]=5000" in result.stderr


def test_unknown_backend_in_the_environment_is_named() -> None:
    result = _python("import fastdit.backend", FASTDIT_BACKEND="tritn")
    assert result.returncode == 1
    assert "ValueError: FASTDIT_BACKEND='tritn'" in result.stderr
    assert "did you mean 'triton'?" in result.stderr
