"""Triton's interpreter, corrected where it is wrong, and made to see what a GPU would not say.

Differences to a GPU that remain: programs run one after the other, so races never show; there are no limits to shared
memory and registers; reads out of bounds give whatever is there; `tl.max` drops NaN.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


class _Kept:
    """The scope of a patch that stays."""

    def restore(self) -> None:
        pass


def correct() -> None:
    """Makes casts from and to bfloat16, and its products, exact, and integer overflow an error; and keeps `tl` patched.

    The interpreter patches `tl` for every launch and for every call of a function in it, which is most of its time.
    """
    builder = interpreter.interpreter_builder
    if getattr(builder.options, "debug", False):
        return
    builder.options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=True)
    original = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        # The interpreter keeps bfloat16 as its bits in uint16; its own cast cuts them off instead of rounding.
        before, after = source.dtype.scalar, target.scalar
        if after == tl.bfloat16 and before != tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            return interpreter.TensorHandle(
                rounded.view(torch.int16).numpy().view(np.uint16), after
            )
        if before == tl.bfloat16 and after != tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(source.data).view(np.int16))
            wide = bits.view(torch.bfloat16).float().numpy()
            return interpreter.TensorHandle(wide.astype(interpreter._get_np_dtype(after)), after)
        return original(self, source, target)

    interpreter.InterpreterBuilder.cast_impl = cast
    product = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        # Of bfloat16 it multiplies the bits.
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return product(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Any) -> _Kept:
        seen = frozenset(id(m) for m in function.__globals__.values() if m is tl or m is tl.core)
        if seen not in patched:
            patched.add(seen)
            patch(function)
        return _Kept()

    interpreter._patch_lang = patch_once
