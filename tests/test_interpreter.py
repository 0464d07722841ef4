"""What tests/interpreter.py corrects: it must still be wrong without it, or the correction can go."""

from __future__ import annotations

import numpy as np
import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the kernels run on the GPU", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter


@triton.jit
def _cast_kernel(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i).to(tl.float32).to(out.dtype.element_ty))


@triton.jit
def _offset_kernel(out, row, D: tl.constexpr):
    tl.store(out, row * D)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
def test_casts_round_as_torch_does(source: torch.dtype, dtype: torch.dtype) -> None:
    x = (torch.randn(4096) * 10 ** torch.linspace(-45, 38, 4096)).to(source)
    x[:4] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0])
    out = torch.empty(4096, dtype=dtype)
    with np.errstate(all="ignore"):  # float16 overflows
        _cast_kernel[(1,)](x, out, SIZE=4096)
    expected = x.float().to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
    assert torch.equal(torch.signbit(out)[1:], torch.signbit(expected)[1:])


def test_the_interpreter_alone_cuts_bfloat16_off() -> None:
    x = torch.tensor([1.0 + 2**-7 - 2**-20])
    bits = interpreter._convert_float(x.numpy(), tl.float32, tl.bfloat16, None)
    assert torch.tensor(bits.astype("int16")).view(torch.bfloat16) != x.bfloat16()


def test_integer_overflow_is_an_error() -> None:
    out = torch.empty(1, dtype=torch.int64)
    _offset_kernel[(1,)](out, 2**20, D=2**10)
    assert out.item() == 2**30
    with pytest.raises(interpreter.InterpreterError, match="int32 overflow"):
        _offset_kernel[(1,)](out, 2**20, D=2**12)
