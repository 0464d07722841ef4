"""Which backend attention runs in.

`auto` is, on CUDA, the fastest that was measured there for the dtype, the shape and the direction (`registry`) and, for
want of a measurement, the first of `STATIC_ORDER`; of both only what takes the inputs and, in training, what has a
deterministic backward, since a run that is resumed has to go on with the same bits. cuDNN's has none in torch, nor have
the other kernels behind `sdpa` outside of `torch.use_deterministic_algorithms(True)`: what is left then is `triton`.
Elsewhere `auto` is `sdpa`. Optional packages are taken if they were measured, and are not imported before.

`use_backend("reference")` goes over everything. `use_backend("triton")` puts `triton` first in `auto`, on every device,
so that a model whose head_dim the kernel does not take still runs in Triton everywhere else.

A choice is made once for each device, dtype, shape, batch bucket and direction. To a compiler it is a constant.
"""

from __future__ import annotations

import warnings

import torch

from ..backend import active_backend
from ..validation import require_choice
from .backends import BACKENDS, CHOICES
from .limits import Described, Like, needs_gradient
from .registry import Key, bucket, device_name, direction, fastest

STATIC_ORDER = ("sdpa", "triton", "reference")
CHOOSES_ON = {"cuda"}  # the types of devices where there is more than one to choose from

# By the arguments of `_answer`: the backend, or the message of the error.
_answers: dict[tuple[object, ...], str] = {}
_said: set[str] = set()


def choose(
    q: Described, k: Described, v: Described, backend: str = "auto", deterministic: bool = True
) -> str:
    """The name of the backend that runs for these inputs, where `backend` is asked for.

    Raises ValueError for an unknown name, and RuntimeError with the inputs and the reasons of every backend where the
    one that was asked for cannot run.
    """
    if backend not in CHOICES:
        require_choice("backend", backend, CHOICES)
    active = active_backend()
    if active == "reference":
        return "reference"
    if backend == "auto" and active != "triton" and q.device.type not in CHOOSES_ON:
        return "sdpa"
    if backend in ("sdpa", "reference"):
        return backend
    n, t, heads, head_dim = q.shape
    s = k.shape[1]
    if (
        torch.compiler.is_compiling()
    ):  # sizes may be symbols; those that ranges are made of become constants
        t, s, heads, head_dim = (len(range(size)) for size in (t, s, heads, head_dim))
    place = (
        backend,
        active == "triton",
        q.device,
        q.dtype,
        bucket(n),
        t,
        s,
        heads,
        head_dim,
        needs_gradient(q, k, v),
        deterministic,
        torch.are_deterministic_algorithms_enabled(),
    )
    if torch.compiler.is_compiling():
        answer = _answer(*place)
    elif place in _answers:
        answer = _answers[place]
    else:
        answer = _answers[place] = _answer(*place, q, k, v)
    if answer not in BACKENDS:
        raise RuntimeError(answer)
    return answer


def describe(
    q: Described | None = None, k: Described | None = None, v: Described | None = None
) -> list[tuple[str, list[str]]]:
    """Every backend with the reasons why it cannot take these inputs on this machine.

    By default those of DiT-XL/2 for one image of 256 pixels, in bfloat16, on CUDA where there is any.
    """
    if q is None:
        has_cuda = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device() if has_cuda else 0)
        q = Like((1, 256, 16, 72), torch.bfloat16, device if has_cuda else torch.device("cpu"))
    k = q if k is None else k
    v = k if v is None else v
    return [(name, each.reasons_not_usable(q, k, v)) for name, each in BACKENDS.items()]


def forget() -> None:
    """Every choice is made again: something was measured, installed, or switched off."""
    _answers.clear()


def _answer(
    backend: str,
    triton_first: bool,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    keys: int,
    heads: int,
    head_dim: int,
    training: bool,
    deterministic: bool,
    deterministic_algorithms: bool,
    q: Described | None = None,
    k: Described | None = None,
    v: Described | None = None,
) -> str:
    """The backend, or the message of the error. A compiler has no tensors to ask about."""
    if q is None or k is None or v is None:
        q = Like((batch, tokens, heads, head_dim), dtype, device, training)
        k = v = Like((batch, keys, heads, head_dim), dtype, device, training)
    if backend != "auto":
        reasons = BACKENDS[backend].reasons_not_usable(q, k, v)
        return _message(backend, q, k, v) if reasons else backend
    order: tuple[str, ...] = STATIC_ORDER
    if device.type in CHOOSES_ON:
        key = Key(
            str(dtype).removeprefix("torch."),
            batch,
            tokens,
            keys,
            heads,
            head_dim,
            direction(training, deterministic),
        )
        order = (*fastest(device_name(device), key), *order)
    for name in ("triton", *order) if triton_first else order:
        if name not in BACKENDS:  # of another version
            continue
        if training and deterministic and not BACKENDS[name].is_deterministic(q):
            continue
        if not BACKENDS[name].reasons_not_usable(q, k, v):
            break
    if name == "reference":
        _say_once("; ".join(BACKENDS["triton"].reasons_not_usable(q, k, v)))
    return name


# What `torch.compiler.assume_constant_result` sets; calling that would import the compiler, which takes seconds.
_answer._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _message(backend: str, q: Described, k: Described, v: Described) -> str:
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip("qkv", (q, k, v), strict=True))
    found = describe(q, k, v)
    reasons = "; ".join(
        f"{name}: {'usable' if not why else ', '.join(why)}"
        for name, why in sorted(found, key=lambda one: one[0] != backend)
    )
    return (
        f"attention backend {backend!r} cannot run {shapes} in {q.dtype} on {q.device}; {reasons}"
    )


def _say_once(reason: str) -> None:
    """Warns, once, that `auto` has nothing but plain torch on a GPU."""
    if reason not in _said:
        _said.add(reason)
        warnings.warn(f"fastdit: attention runs in plain torch: triton: {reason}", stacklevel=4)
