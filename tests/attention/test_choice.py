"""What `auto` chooses on CUDA, which stand-ins for tensors show without a GPU, and what refusals say."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastdit
from fastdit.attention import (
    BACKENDS,
    CHOICES,
    STATIC_ORDER,
    Like,
    choice,
    choose,
    describe,
    registry,
)

CUDA = torch.device("cuda", 0)


def like(
    *shape: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = CUDA,
    training: bool = False,
) -> Like:
    return Like(shape or (4, 256, 16, 72), dtype, device, training)


def chosen(q: Like, k: Like | None = None, **options: object) -> str:
    k = q if k is None else k
    return choose(q, k, k, **options)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that no measurement is shipped for, on which every kernel of torch and this project runs."""
    monkeypatch.setattr(choice, "device_name", lambda device: f"A {device.type}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def measured(direction: str, batch: int = 4, **seconds: float) -> None:
    key = registry.Key("bfloat16", batch, 256, 256, 16, 72, direction)
    registry.save("A cuda", [(key, backend, value) for backend, value in seconds.items()])
    choice.forget()


def test_the_choices() -> None:
    assert ("auto", *BACKENDS) == CHOICES
    assert set(BACKENDS) == {
        "sdpa",
        "cudnn",
        "sdpa_flash",
        "sdpa_efficient",
        "flash_attn",
        "flash_attn_4",
        "xformers",
        "triton",
        "reference",
    }
    assert STATIC_ORDER == ("sdpa", "triton", "reference")


def test_elsewhere_it_is_torchs_own() -> None:
    for kind in ("cpu", "meta"):
        q = like(device=torch.device(kind), training=True)
        assert chosen(q) == chosen(q, deterministic=False) == "sdpa"


def test_without_a_measurement() -> None:
    """Without a backward torch's own; with one what gives the same bits every time, unless that is not asked for."""
    assert chosen(like()) == "sdpa"
    assert chosen(like(training=True)) == "triton"
    assert chosen(like(training=True), deterministic=False) == "sdpa"
    with torch.no_grad():
        assert chosen(like(training=True)) == "sdpa"


def test_deterministic_algorithms_make_torchs_own_deterministic() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen(like(training=True)) == "sdpa"
        with pytest.raises(
            RuntimeError, match=r"cudnn: torch.use_deterministic_algorithms\(True\)"
        ):
            chosen(like(), backend="cudnn")
    finally:
        torch.use_deterministic_algorithms(False)
    assert chosen(like(training=True)) == "triton"


@pytest.mark.parametrize(
    "q",
    [
        like(4, 256, 16, 20, training=True),
        like(dtype=torch.float64, training=True),
        like(4, 256, 16, 136, training=True),
    ],
)
def test_what_no_kernel_takes_is_plain_torch_and_said_once(q: Like) -> None:
    with pytest.warns(UserWarning, match="attention runs in plain torch: triton: "):
        assert chosen(q) == "reference"
    choice.forget()
    assert chosen(q) == "reference"  # a second warning would be an error


def test_measurement_goes_first() -> None:
    measured("inference", triton=3.0, cudnn=1.0, sdpa_flash=2.0)
    measured("training", triton=3.0, sdpa_flash=2.0)
    measured("training, any order", cudnn=1.0, triton=3.0)
    assert chosen(like()) == "cudnn"
    assert chosen(like(training=True), deterministic=False) == "cudnn"
    # What is written there by hand does not get around the rule.
    assert chosen(like(training=True)) == "triton"


@pytest.mark.parametrize("batch", [3, 4])
def test_measurement_holds_for_its_bucket(batch: int) -> None:
    measured("inference", triton=1.0)
    assert chosen(like(batch, 256, 16, 72)) == "triton"


@pytest.mark.parametrize(
    "other",
    [
        like(5, 256, 16, 72),
        like(2, 256, 16, 72),
        like(4, 255, 16, 72),
        like(4, 256, 8, 72),
        like(4, 256, 16, 64),
        like(dtype=torch.float16),
    ],
)
def test_measurement_holds_for_nothing_else(other: Like) -> None:
    measured("inference", triton=1.0)
    assert chosen(other) == "sdpa"
    assert chosen(like(), like(4, 2, 16, 72)) == "sdpa"


def test_measured_backend_that_is_gone_is_passed_over() -> None:
    measured("inference", xformers=1.0, of_another_version=2.0, triton=3.0)
    assert chosen(like()) == "triton"


def test_choice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(like()) == "sdpa"
    key = registry.Key("bfloat16", 4, 256, 256, 16, 72, "inference")
    registry.save("A cuda", [(key, "triton", 1.0)])
    assert chosen(like()) == "sdpa"
    choice.forget()
    assert chosen(like()) == "triton"


def test_use_backend() -> None:
    cpu = like(device=torch.device("cpu"))
    with fastdit.use_backend("reference"):
        assert {chosen(like(), backend=name) for name in CHOICES} == {"reference"}
    with fastdit.use_backend("triton"):
        assert chosen(like()) == chosen(cpu) == "triton"
        assert chosen(like(), backend="sdpa") == "sdpa"
        assert chosen(like(1, 4, 2, 12, device=torch.device("cpu"))) == "sdpa"
    with fastdit.use_backend("native"):
        assert chosen(cpu) == "sdpa"


def test_named_backend_is_taken_whatever_was_measured() -> None:
    measured("training", triton=1.0)
    for name in ("cudnn", "sdpa_flash", "sdpa_efficient", "sdpa", "reference"):
        assert chosen(like(training=True), backend=name) == name


@pytest.mark.parametrize(
    ("backend", "q", "reason"),
    [
        ("cudnn", like(4, 256, 16, 136), "head_dim=136: it takes multiples of 8 up to 128"),
        ("cudnn", like(dtype=torch.float32), "torch.float32 is not one of float16, bfloat16"),
        ("sdpa_flash", like(4, 256, 16, 264), "head_dim=264: it takes up to 256"),
        ("sdpa_flash", like(0, 256, 16, 72), "it takes no empty tensors"),
        ("sdpa_efficient", like(4, 256, 16, 4), "head_dim=4: it takes multiples of 8"),
        ("triton", like(4, 256, 16, 12), "head_dim=12: it takes multiples of 8 up to 128"),
        ("triton", like(dtype=torch.float64), "torch.float64 is not one of float16"),
        ("flash_attn", like(), "none of the packages .*, flash_attn is installed"),
        ("flash_attn_4", like(), r"flash-attn-4 \(flash_attn.cute\) is not installed"),
        ("xformers", like(), "the package xformers is not installed"),
        ("cudnn", like(device=torch.device("cpu")), "it runs on cuda, not on cpu"),
    ],
)
def test_refusals(backend: str, q: Like, reason: str) -> None:
    with pytest.raises(
        RuntimeError, match=f"backend '{backend}' cannot run .*; {backend}: .*{reason}"
    ):
        chosen(q, backend=backend)


def test_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reasons = dict(describe(like()))
    for name in ("cudnn", "sdpa_flash", "flash_attn"):
        assert "it needs compute capability 8.0, this is 7.5" in reasons[name]
    assert "it needs compute capability 9.0, this is 7.5" in reasons["flash_attn_4"]
    assert reasons["sdpa"] == reasons["sdpa_efficient"] == []


def test_torch_is_asked_about_real_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer for stand-ins is this project's alone, since torch wants tensors."""
    from fastdit.attention import limits

    q = torch.randn(1, 4, 2, 8, dtype=torch.bfloat16)
    assert limits.refusal(torch.backends.cuda.can_use_cudnn_attention, q, q, q) == []
    assert limits.refusal(torch.backends.cuda.can_use_cudnn_attention, *[like()] * 3) == []


def test_describe_says_why() -> None:
    reasons = dict(describe(Like((1, 4, 2, 8), torch.float32, torch.device("cpu"))))
    assert list(reasons) == list(BACKENDS)
    assert reasons["sdpa"] == reasons["sdpa_flash"] == reasons["reference"] == []
    assert reasons["cudnn"][0] == "it runs on cuda, not on cpu"


def test_nothing_optional_is_imported() -> None:
    """Not by the package, a forward, a backward, or a description."""
    code = """
import sys, torch, fastdit
from fastdit import attention, ops
model = fastdit.DiT(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3)
model(torch.randn(2, 4, 4, 4), torch.tensor([1, 2]), torch.tensor([0, 1])).sum().backward()
attention.describe()
optional = ("flash_attn", "flash_attn_interface", "xformers", "torch._dynamo", "torch._inductor")
print([name for name in optional if name in sys.modules])
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600
    )
    assert found.stdout.strip() == "[]"
