"""AdamW and any number of moving averages of the weights: one pass over all parameters, in place.

params, exp_avgs, exp_avg_sqs, averages float32; grads float32, bfloat16 or float16; copies, which receive the rounded
weights, bfloat16 or float16. Every tensor is dense, and those of one parameter lie alike in memory, so that the kernel
sees each as a row of values.

A first program advances the step and computes what depends on it alone. Then one launch goes over all tensors, in
chunks: tables on the device hold where a chunk lies and the addresses of the tensors. Threads read four values at once
where the addresses allow it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

CHUNK = 4096  # values that a program goes over
_NUM_WARPS = 8
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _step_kernel(
    step, lr, clip, found_inf, scalars, weight_decay, BETA1: tl.constexpr, BETA2: tl.constexpr
):
    """step + 1, and scalars: whether the step is good, 1 - lr wd, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), clip.

    In float64, for 1 - 0.999 loses three digits of float32; the betas are constants, for an argument is float32.
    """
    good = 1.0
    if found_inf is not None:
        good = tl.where(tl.load(found_inf) != 0, 0.0, 1.0)
    factor = 1.0
    if clip is not None:
        factor = tl.load(clip).to(tl.float32)
    before = tl.load(step).to(tl.float64)
    t = before + 1.0
    rate = tl.load(lr).to(tl.float64)
    correction1 = 1.0 - tl.exp(t * tl.log(tl.full((), BETA1, tl.float64)))
    correction2 = 1.0 - tl.exp(t * tl.log(tl.full((), BETA2, tl.float64)))
    tl.store(step, (before + good).to(step.dtype.element_ty))
    tl.store(scalars, good)
    tl.store(scalars + 1, (1.0 - rate * weight_decay).to(tl.float32))
    tl.store(scalars + 2, (rate / correction1).to(tl.float32))
    tl.store(scalars + 3, (1.0 / tl.sqrt(correction2)).to(tl.float32))
    tl.store(scalars + 4, factor)


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """A pointer to an address that the bytes of VECTOR values divide."""
    pointer = address.to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, VECTOR * DTYPE.primitive_bitwidth // 8)


@triton.jit
def _lerp(start, end, weight):
    """start + weight (end - start), from the nearer end as torch.lerp: a weight of 1 gives `end` itself."""
    near = weight < 0.5
    return tl.where(near, start, end) + tl.where(near, weight, weight - 1.0) * (end - start)


@triton.jit
def _update_chunk(
    p_address,
    g_address,
    m_address,
    v_address,
    ema_addresses,
    copy_address,
    scalars,
    values,
    beta1_weight,
    beta2,
    beta2_weight,
    eps,
    ema_weights,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    decay = tl.load(scalars + 1)
    step_size = tl.load(scalars + 2)
    correction2 = tl.load(scalars + 3)
    clip = tl.load(scalars + 4)
    for start in range(0, values, THREADS * VECTOR):
        at = start + tl.arange(0, THREADS * VECTOR)
        # A division that changes nothing, but says to the compiler that whole vectors are inside or outside.
        inside = at < values // VECTOR * VECTOR
        p_pointer = _pointer(p_address, tl.float32, VECTOR) + at
        m_pointer = _pointer(m_address, tl.float32, VECTOR) + at
        v_pointer = _pointer(v_address, tl.float32, VECTOR) + at
        g = tl.load(_pointer(g_address, GRAD, VECTOR) + at, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(p_pointer, mask=inside, other=0.0)
        m = tl.load(m_pointer, mask=inside, other=0.0)
        v = tl.load(v_pointer, mask=inside, other=0.0)
        # Everything is asked for before anything is waited for.
        averages = ()
        for index in tl.static_range(len(ema_weights)):
            pointer = _pointer(ema_addresses[index], tl.float32, VECTOR) + at
            averages += ((pointer, tl.load(pointer, mask=inside, other=0.0)),)

        g *= clip
        m = _lerp(m, g, beta1_weight)
        v = beta2 * v + beta2_weight * g * g
        # The division is within 2 units in the last place of the update, which are far below those of p. A correctly
        # rounded one takes registers that there are not.
        p = p * decay - step_size * m / (tl.sqrt_rn(v) * correction2 + eps)
        tl.store(p_pointer, p, mask=inside)
        tl.store(m_pointer, m, mask=inside)
        tl.store(v_pointer, v, mask=inside)
        if COPY is not None:
            tl.store(_pointer(copy_address, COPY, VECTOR) + at, p.to(COPY), mask=inside)
        for index in tl.static_range(len(ema_weights)):
            pointer, ema = averages[index]
            tl.store(pointer, _lerp(ema, p, ema_weights[index]), mask=inside)


@triton.jit
def _update_kernel(
    parameters,
    gradients,
    exp_avgs,
    exp_avg_sqs,
    emas,
    copies,
    sizes,
    chunks,
    scalars,
    beta1_weight,
    beta2,
    beta2_weight,
    eps,
    ema_weights,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,
    SIZE: tl.constexpr,
    THREADS: tl.constexpr,
):
    if tl.load(scalars) == 0.0:
        return
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + 2 * program)
    first = tl.load(chunks + 2 * program + 1).to(tl.int64) * SIZE
    values = tl.minimum(tl.load(sizes + tensor) - first, SIZE).to(tl.int32)
    p_address = tl.load(parameters + tensor) + 4 * first
    m_address = tl.load(exp_avgs + tensor) + 4 * first
    v_address = tl.load(exp_avg_sqs + tensor) + 4 * first
    g_address = tl.load(gradients + tensor) + GRAD.primitive_bitwidth // 8 * first
    # The lowest bits of all addresses: four values of 16 bits only need a multiple of 8.
    together = p_address | m_address | v_address | g_address * (32 // GRAD.primitive_bitwidth)
    ema_addresses = ()
    for index in tl.static_range(len(ema_weights)):
        address = tl.load(emas[index] + tensor) + 4 * first
        together |= address
        ema_addresses += (address,)
    copy_address = p_address
    if COPY is not None:
        copy_address = tl.load(copies + tensor) + COPY.primitive_bitwidth // 8 * first
        together |= copy_address * (32 // COPY.primitive_bitwidth)
    if (together % 16 == 0) & (values % 4 == 0):
        _update_chunk(
            p_address, g_address, m_address, v_address, ema_addresses, copy_address, scalars,
            values, beta1_weight, beta2, beta2_weight, eps, ema_weights, GRAD, COPY, THREADS, 4,
        )  # fmt: skip
    else:
        _update_chunk(
            p_address, g_address, m_address, v_address, ema_addresses, copy_address, scalars,
            values, beta1_weight, beta2, beta2_weight, eps, ema_weights, GRAD, COPY, THREADS, 1,
        )  # fmt: skip


def update(
    step: Tensor,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    lr: Tensor,
    clip: Tensor | None,
    found_inf: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decays: Sequence[float],
) -> None:
    """One step. `emas` are the tensors of the first average, then those of the second, ...; `copies` may be empty."""
    scalars = torch.empty(5, dtype=torch.float32, device=step.device)
    launch(
        _step_kernel,
        (1,),
        step,
        lr,
        clip,
        found_inf,
        scalars,
        weight_decay,
        BETA1=beta1,
        BETA2=beta2,
        num_warps=1,
    )
    sizes = tuple(p.numel() for p in params)
    if not any(sizes):
        return
    grads = [_like(grad, p) for grad, p in zip(grads, params, strict=True)]
    chunks = _chunks(sizes, step.device)
    count = len(params)
    averages = [emas[i * count : (i + 1) * count] for i in range(len(ema_decays))]
    launch(
        _update_kernel,
        (len(chunks),),
        _addresses(params),
        _addresses(grads),
        _addresses(exp_avgs),
        _addresses(exp_avg_sqs),
        tuple(_addresses(average) for average in averages),
        _addresses(copies) if copies else None,
        _table(sizes, step.device),
        chunks,
        scalars,
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        tuple(1 - decay for decay in ema_decays),
        GRAD=_DTYPES[grads[0].dtype],
        COPY=_DTYPES[copies[0].dtype] if copies else None,
        SIZE=CHUNK,
        THREADS=32 * _NUM_WARPS,
        num_warps=_NUM_WARPS,
        num_stages=1,
    )


def _like(grad: Tensor, p: Tensor) -> Tensor:
    """`grad`, or a copy of it that lies in memory as `p` does."""
    if grad.stride() == p.stride() or (grad.is_contiguous() and p.is_contiguous()):
        return grad
    return torch.empty_like(p, dtype=grad.dtype).copy_(grad)


# The tables that were made last, and the stream that made them. What a table holds is its key: none is ever wrong.
_LARGEST_CACHE = 128
_cache: OrderedDict[object, tuple[Tensor, torch.cuda.Stream | None]] = OrderedDict()
# Tables that a CUDA graph reads whenever it is replayed, which may be long after they left the cache.
_captured: dict[object, Tensor] = {}


def _cached(key: object, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """What `make` made for this key, on a stream that may read it.

    A table that is made while a graph is captured is part of the graph: it holds nothing before a replay.
    """
    if device.type != "cuda":
        if key not in _cache:
            _cache[key] = make(), None
    else:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if torch.cuda.is_current_stream_capturing():
                if key not in _cache:
                    return make()
                _captured[key] = _cache[key][0]
            elif key not in _cache:
                _cache[key] = make(), stream
            elif _cache[key][1] != stream:
                table, before = _cache[key]
                stream.wait_stream(before)
                table.record_stream(stream)
                _cache[key] = table, stream
    _cache.move_to_end(key)
    while len(_cache) > _LARGEST_CACHE:
        _cache.popitem(last=False)
    return _cache[key][0]


def _table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """`values` in int64 on the device."""

    def make() -> Tensor:
        # They travel as arguments of kernels: nothing is copied from the host, which a captured graph would repeat
        # from memory that is gone.
        table = torch.zeros(len(values), dtype=torch.int64, device=device)
        torch._foreach_add_(table.unbind(), values)
        return table

    return _cached((device, values), device, make)


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    return _table(tuple(t.data_ptr() for t in tensors), tensors[0].device)


def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(chunks, 2) in int32: the tensor that a chunk is of, and which chunk of it."""

    def make() -> Tensor:
        counts = [triton.cdiv(size, CHUNK) for size in sizes]
        count = _table(tuple(counts), device)
        tensor = torch.repeat_interleave(count, output_size=sum(counts))
        start = count.cumsum(0) - count
        chunk = torch.arange(sum(counts), device=device) - start[tensor]
        return torch.stack([tensor, chunk], dim=1).int()

    return _cached((device, "chunks", sizes), device, make)
