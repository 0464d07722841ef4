"""`out = softmax(scale q k^T) v` per head: the scores of a block of queries stay on the chip, forward and backward.

Shapes: q, out, dout, dq (N, T, H, K); k, v, dk, dv (N, S, H, K); lse and delta (N, H, T) in float32. float16, bfloat16
or float32, head_dim K a multiple of 8 up to 128; no mask, no dropout. q, k and v are read where they lie, also as views
of a packed projection (N, T, 3, H, K).

Forward, over blocks of keys, for every query the largest score m and l = sum 2^(score - m) so far: what was summed
before is rescaled whenever m grows. Scores are taken times log2(e), for the hardware's exponential is 2^x;
lse = ln(sum_S exp(scale q k^T)).

Backward, from p = exp(scale q k^T - lse) and delta = sum_K out dout: dv = p^T dout, ds = p (dout v^T - delta),
dq = scale ds k, dk = scale ds^T q. One kernel owns queries and goes over the keys for dq, one owns keys and goes over
the queries for dk and dv. There are no atomics.

Source: Dao et al. 2022 (FlashAttention), Dao 2023 (FlashAttention-2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .rows import most_registers

LARGEST_K = 128
WIDE_FLOAT32 = 96  # beyond it the tiles of float32 are smaller, or values do not fit the registers
STRIDE = 8  # divides every stride, so that 16 bytes divide every row of 16-bit values
LOG2_E = tl.constexpr(1.0 / math.log(2.0))


@triton.jit
def _head(pointer, program, sample_stride, HEAD: tl.constexpr, H: tl.constexpr):
    """The first value of head `program` of all N * H; `sample_stride` counts 8 values, HEAD one."""
    sample = (program // H).to(tl.int64)
    return pointer + sample * sample_stride * 8 + (program % H).to(tl.int64) * HEAD


# A block of rows of a head is a tuple: its MAIN columns, and the TAIL columns after these where there are any.


@triton.jit
def _offsets(TOKEN: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr):
    """Where a block of ROWS rows lies, from the first of them on."""
    rows = tl.arange(0, ROWS)[:, None] * TOKEN
    main = rows + tl.arange(0, MAIN)[None, :]
    if TAIL:
        return main, rows + MAIN + tl.arange(0, TAIL)[None, :]
    else:
        return (main,)


@triton.jit
def _inside(rows, COLUMNS: tl.constexpr, offsets, WHOLE: tl.constexpr):
    """Which of these there are, of `rows` rows and COLUMNS columns."""
    ROWS: tl.constexpr = offsets.shape[0]
    WIDTH: tl.constexpr = offsets.shape[1]
    inside = tl.full([ROWS, WIDTH], True, tl.int1)
    if not WHOLE:
        inside = inside & (tl.arange(0, ROWS) < rows)[:, None]
    if WIDTH > COLUMNS:
        inside = inside & (tl.arange(0, WIDTH) < COLUMNS)[None, :]
    return inside


@triton.jit
def _load(head, first, count, at, TOKEN: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr):
    """The rows `first` ... of a head; zero past row `count` and past K."""
    head += tl.cast(first, tl.int64) * TOKEN
    main = tl.load(head + at[0], mask=_inside(count - first, K, at[0], WHOLE), other=0.0)
    if len(at) > 1:
        inside = _inside(count - first, K - at[0].shape[1], at[1], WHOLE)
        return main, tl.load(head + at[1], mask=inside, other=0.0)
    else:
        return (main,)


@triton.jit
def _load_row(row, first, count, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """A number of each of the tokens `first` ..., (1, BLOCK); zero past `count`."""
    at = row + (first + tl.arange(0, BLOCK)[None, :])
    if WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=tl.arange(0, BLOCK)[None, :] < count - first, other=0.0)


@triton.jit
def _store(head, first, count, x, at, TOKEN: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr):
    dtype: tl.constexpr = head.dtype.element_ty
    head += tl.cast(first, tl.int64) * TOKEN
    tl.store(head + at[0], x[0].to(dtype), mask=_inside(count - first, K, at[0], WHOLE))
    if len(at) > 1:
        inside = _inside(count - first, K - at[0].shape[1], at[1], WHOLE)
        tl.store(head + at[1], x[1].to(dtype), mask=inside)


@triton.jit
def _scaled(x, factor):
    """x times a number, or a column of one a row."""
    if len(x) > 1:
        return x[0] * factor, x[1] * factor
    else:
        return (x[0] * factor,)


@triton.jit
def _inner(a, b):
    """a b^T over all of K. Products of float32 are exact, as those of torch."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if len(a) > 1:
        product = tl.dot(a[1], tl.trans(b[1]), product, input_precision="ieee")
    return product


@triton.jit
def _add_product(total, weights, x):
    """total + weights x. The weights are rounded to the dtype of x."""
    weights = weights.to(x[0].dtype)
    main = tl.dot(weights, x[0], total[0], input_precision="ieee")
    if len(x) > 1:
        return main, tl.dot(weights, x[1], total[1], input_precision="ieee")
    else:
        return (main,)


@triton.jit
def _zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    main = tl.zeros([ROWS, MAIN], tl.float32)
    if TAIL:
        return main, tl.zeros([ROWS, TAIL], tl.float32)
    else:
        return (main,)


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    tokens,
    keys,
    scale_log2,
    q_sample,
    kv_sample,
    H: tl.constexpr,
    K: tl.constexpr,
    Q_TOKEN: tl.constexpr,
    Q_HEAD: tl.constexpr,
    KV_TOKEN: tl.constexpr,
    KV_HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WHOLE_T: tl.constexpr,
    WHOLE_S: tl.constexpr,
):
    blocks = tl.cdiv(tokens, BLOCK_T)
    program = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * BLOCK_T
    q_head = _head(q, program, q_sample, Q_HEAD, H)
    k_head = _head(k, program, kv_sample, KV_HEAD, H)
    v_head = _head(v, program, kv_sample, KV_HEAD, H)
    q_at, kv_at = _offsets(Q_TOKEN, MAIN, TAIL, BLOCK_T), _offsets(KV_TOKEN, MAIN, TAIL, BLOCK_S)
    query = _load(q_head, first, tokens, q_at, Q_TOKEN, K, WHOLE_T)

    largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    attended = _zeros(BLOCK_T, MAIN, TAIL)
    for start in range(0, keys, BLOCK_S):
        key = _load(k_head, start, keys, kv_at, KV_TOKEN, K, WHOLE_S)
        score = _inner(query, key)
        if not WHOLE_S:
            inside = tl.arange(0, BLOCK_S) < keys - start
            score = tl.where(inside[None, :], score, float("-inf"))
        before = largest
        largest = tl.maximum(before, tl.max(score, 1) * scale_log2)
        p = tl.exp2(score * scale_log2 - largest[:, None])
        shrink = tl.exp2(before - largest)
        total = total * shrink + tl.sum(p, 1)
        value = _load(v_head, start, keys, kv_at, KV_TOKEN, K, WHOLE_S)
        attended = _add_product(_scaled(attended, shrink[:, None]), p, value)

    sample_stride = tl.cast(tokens, tl.int64) * (H * K // 8)
    out_head = _head(out, program, sample_stride, K, H)
    out_at = _offsets(H * K, MAIN, TAIL, BLOCK_T)
    attended = _scaled(attended, 1.0 / total[:, None])
    _store(out_head, first, tokens, attended, out_at, H * K, K, WHOLE_T)
    token = first + tl.arange(0, BLOCK_T)
    row = lse + program.to(tl.int64) * tokens
    tl.store(row + token, (largest + tl.log2(total)) / LOG2_E, mask=token < tokens)


@triton.jit
def _backward_q_kernel(
    dout,
    q,
    k,
    v,
    out,
    lse,
    dq,
    delta,
    tokens,
    keys,
    scale,
    scale_log2,
    q_sample,
    kv_sample,
    dq_sample,
    H: tl.constexpr,
    K: tl.constexpr,
    Q_TOKEN: tl.constexpr,
    Q_HEAD: tl.constexpr,
    KV_TOKEN: tl.constexpr,
    KV_HEAD: tl.constexpr,
    DQ_TOKEN: tl.constexpr,
    DQ_HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WHOLE_T: tl.constexpr,
    WHOLE_S: tl.constexpr,
):
    blocks = tl.cdiv(tokens, BLOCK_T)
    program = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * BLOCK_T
    token = first + tl.arange(0, BLOCK_T)
    row = program.to(tl.int64) * tokens
    sample_stride = tl.cast(tokens, tl.int64) * (H * K // 8)

    dout_head = _head(dout, program, sample_stride, K, H)
    out_head = _head(out, program, sample_stride, K, H)
    out_at = _offsets(H * K, MAIN, TAIL, BLOCK_T)
    arriving = _load(dout_head, first, tokens, out_at, H * K, K, WHOLE_T)
    gave = _load(out_head, first, tokens, out_at, H * K, K, WHOLE_T)
    row_delta = tl.sum(arriving[0].to(tl.float32) * gave[0].to(tl.float32), 1)
    if TAIL:
        row_delta += tl.sum(arriving[1].to(tl.float32) * gave[1].to(tl.float32), 1)
    tl.store(delta + row + token, row_delta, mask=token < tokens)

    q_head = _head(q, program, q_sample, Q_HEAD, H)
    k_head = _head(k, program, kv_sample, KV_HEAD, H)
    v_head = _head(v, program, kv_sample, KV_HEAD, H)
    q_at, kv_at = _offsets(Q_TOKEN, MAIN, TAIL, BLOCK_T), _offsets(KV_TOKEN, MAIN, TAIL, BLOCK_S)
    query = _load(q_head, first, tokens, q_at, Q_TOKEN, K, WHOLE_T)
    row_lse = tl.load(lse + row + token, mask=token < tokens, other=0.0) * LOG2_E
    sums = _zeros(BLOCK_T, MAIN, TAIL)
    for start in range(0, keys, BLOCK_S):
        key = _load(k_head, start, keys, kv_at, KV_TOKEN, K, WHOLE_S)
        score = _inner(query, key)
        p = tl.exp2(score * scale_log2 - row_lse[:, None])
        if not WHOLE_S:
            # A very negative lse makes p infinite there, and infinity times a key of zero is none.
            p = tl.where((tl.arange(0, BLOCK_S) < keys - start)[None, :], p, 0.0)
        value = _load(v_head, start, keys, kv_at, KV_TOKEN, K, WHOLE_S)
        ds = p * (_inner(arriving, value) - row_delta[:, None])
        sums = _add_product(sums, ds, key)

    dq_head = _head(dq, program, dq_sample, DQ_HEAD, H)
    dq_at = _offsets(DQ_TOKEN, MAIN, TAIL, BLOCK_T)
    _store(dq_head, first, tokens, _scaled(sums, scale), dq_at, DQ_TOKEN, K, WHOLE_T)


@triton.jit
def _backward_kv_kernel(
    dout,
    q,
    k,
    v,
    lse,
    delta,
    dk,
    dv,
    tokens,
    keys,
    scale,
    scale_log2,
    q_sample,
    kv_sample,
    dkv_sample,
    H: tl.constexpr,
    K: tl.constexpr,
    Q_TOKEN: tl.constexpr,
    Q_HEAD: tl.constexpr,
    KV_TOKEN: tl.constexpr,
    KV_HEAD: tl.constexpr,
    DKV_TOKEN: tl.constexpr,
    DKV_HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WHOLE_T: tl.constexpr,
    WHOLE_S: tl.constexpr,
):
    blocks = tl.cdiv(keys, BLOCK_S)
    program = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * BLOCK_S
    row = program.to(tl.int64) * tokens
    sample_stride = tl.cast(tokens, tl.int64) * (H * K // 8)

    dout_head = _head(dout, program, sample_stride, K, H)
    q_head = _head(q, program, q_sample, Q_HEAD, H)
    k_head = _head(k, program, kv_sample, KV_HEAD, H)
    v_head = _head(v, program, kv_sample, KV_HEAD, H)
    q_at, kv_at = _offsets(Q_TOKEN, MAIN, TAIL, BLOCK_T), _offsets(KV_TOKEN, MAIN, TAIL, BLOCK_S)
    out_at = _offsets(H * K, MAIN, TAIL, BLOCK_T)
    key = _load(k_head, first, keys, kv_at, KV_TOKEN, K, WHOLE_S)
    value = _load(v_head, first, keys, kv_at, KV_TOKEN, K, WHOLE_S)
    dk_sums, dv_sums = _zeros(BLOCK_S, MAIN, TAIL), _zeros(BLOCK_S, MAIN, TAIL)
    # Everything is transposed, (keys, queries). Queries past the last add nothing, for their dout and delta are zero;
    # keys past the last are not stored.
    for start in range(0, tokens, BLOCK_T):
        row_lse = _load_row(lse + row, start, tokens, BLOCK_T, WHOLE_T) * LOG2_E
        query = _load(q_head, start, tokens, q_at, Q_TOKEN, K, WHOLE_T)
        score = _inner(key, query)
        p = tl.exp2(score * scale_log2 - row_lse)
        arriving = _load(dout_head, start, tokens, out_at, H * K, K, WHOLE_T)
        dv_sums = _add_product(dv_sums, p, arriving)
        row_delta = _load_row(delta + row, start, tokens, BLOCK_T, WHOLE_T)
        ds = p * (_inner(value, arriving) - row_delta)
        dk_sums = _add_product(dk_sums, ds, query)

    dk_head = _head(dk, program, dkv_sample, DKV_HEAD, H)
    dv_head = _head(dv, program, dkv_sample, DKV_HEAD, H)
    dkv_at = _offsets(DKV_TOKEN, MAIN, TAIL, BLOCK_S)
    _store(dv_head, first, keys, dv_sums, dkv_at, DKV_TOKEN, K, WHOLE_S)
    _store(dk_head, first, keys, _scaled(dk_sums, scale), dkv_at, DKV_TOKEN, K, WHOLE_S)


def split(head_dim: int) -> tuple[int, int]:
    """K as a power of two and a tail, at least 16 each, that waste least: 72 is 64 + 16 and 88 is 64 + 32.

    The tail is 0 where one part holds K without it being wider than two: 64, 104, 128. Raises ValueError for a K that
    is no multiple of 8 up to 128.
    """
    if head_dim % 8 or not 8 <= head_dim <= LARGEST_K:
        raise ValueError(f"head_dim={head_dim}: allowed are multiples of 8 up to {LARGEST_K}")
    main = max(16, 1 << (head_dim.bit_length() - 1))
    tail = max(16, triton.next_power_of_2(head_dim - main)) if head_dim > main else 0
    return (2 * main, 0) if tail == main else (main, tail)


@dataclass(frozen=True)
class AttentionTile:
    """A program's queries and keys at a time (it owns the one and goes over the other), its warps and registers."""

    block_t: int
    block_s: int
    num_warps: int
    maxnreg: int | None


def _block(largest: int, count: int) -> int:
    return max(16, min(largest, triton.next_power_of_2(count)))


def _tile(block_t: int, block_s: int, owned: int, itemsize: int) -> AttentionTile:
    """16 of the owned rows a warp, as the tensor cores take them, but 4 warps at least.

    Float32 does not run on tensor cores: 8 warps. Left to itself the assembler spills there to fit one program more.
    """
    if itemsize == 2:
        return AttentionTile(block_t, block_s, max(4, owned // 16), None)
    return AttentionTile(block_t, block_s, 8, most_registers(255, 8))


def forward_tile(t: int, s: int, head_dim: int, itemsize: int) -> AttentionTile:
    """Owns queries. Two stages of 64 keys of K = 128 fit the 99 KiB of shared memory of the smallest GPUs."""
    largest_t, largest_s = (
        (128, 64) if itemsize == 2 else (32 if head_dim > WIDE_FLOAT32 else 64, 32)
    )
    block_t = _block(largest_t, t)
    return _tile(block_t, _block(largest_s, s), block_t, itemsize)


def backward_q_tile(t: int, s: int, itemsize: int) -> AttentionTile:
    """Owns queries."""
    largest = 64 if itemsize == 2 else 32
    block_t = _block(largest, t)
    return _tile(block_t, _block(largest, s), block_t, itemsize)


def backward_kv_tile(t: int, s: int, head_dim: int, itemsize: int) -> AttentionTile:
    """Owns keys. 64 queries at a time fit the registers where K is narrow and none of them is masked."""
    if itemsize == 4:
        block_s = _block(32, s)
        return _tile(_block(16 if head_dim > WIDE_FLOAT32 else 32, t), block_s, block_s, itemsize)
    block_s = _block(64, s)
    few = t % 64 or head_dim > 80 or block_s < 64
    return _tile(_block(32 if few else 64, t), block_s, block_s, itemsize)


NUM_STAGES = 2  # what the next step needs is loaded during this one


def readable(x: Tensor) -> Tensor:
    """x (N, T, H, K) as the kernels read it: its last dimension dense, the strides of the others multiples of 8."""
    return x if _fits(x) else x.contiguous()


def _fits(x: Tensor) -> bool:
    *outer, last = zip(x.shape, x.stride(), strict=True)
    return last[1] == 1 and all(size == 1 or stride % STRIDE == 0 for size, stride in outer)


def _readable_pair(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Both, with the same strides."""
    k, v = readable(k), readable(v)
    return (k, v) if k.stride() == v.stride() else (k.contiguous(), v.contiguous())


def _result(name: str, given: Tensor | None, like: Tensor) -> Tensor:
    if given is None:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if given.shape != like.shape or given.dtype != like.dtype or not _fits(given):
        raise ValueError(
            f"{name}: expected {like.dtype} {tuple(like.shape)} with a dense last dimension and strides of multiples "
            f"of {STRIDE}, got {given.dtype} {tuple(given.shape)} with strides {given.stride()}"
        )
    return given


def _constants(q: Tensor, k: Tensor, tile: AttentionTile) -> dict[str, int | bool]:
    """What is compiled into a kernel: what the layers of a model have in common."""
    main, tail = split(q.shape[3])
    return {
        "H": q.shape[2],
        "K": q.shape[3],
        "Q_TOKEN": q.stride(1),
        "Q_HEAD": q.stride(2),
        "KV_TOKEN": k.stride(1),
        "KV_HEAD": k.stride(2),
        "MAIN": main,
        "TAIL": tail,
        "BLOCK_T": tile.block_t,
        "BLOCK_S": tile.block_s,
        "WHOLE_T": q.shape[1] % tile.block_t == 0,
        "WHOLE_S": k.shape[1] % tile.block_s == 0,
    }


def _log2(scale: float) -> float:
    if not scale > 0.0:
        raise ValueError(f"scale={scale}: expected a positive number")
    return scale * LOG2_E.value


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out (N, T, H, K), dense, and lse (N, H, T). Without keys (S = 0) they are 0 and -inf.

    Raises ValueError for a head_dim that `split` refuses, and for a scale that is not positive.
    """
    n, t, heads, _ = q.shape
    s = k.shape[1]
    scale_log2 = _log2(scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((n, heads, t), dtype=torch.float32, device=q.device)
    if s == 0:
        return out.zero_(), lse.fill_(-math.inf)
    q = readable(q)
    k, v = _readable_pair(k, v)
    tile = forward_tile(t, s, q.shape[3], q.element_size())
    launch(
        _forward_kernel,
        (n * heads * triton.cdiv(t, tile.block_t),),
        q,
        k,
        v,
        out,
        lse,
        t,
        s,
        scale_log2,
        q.stride(0) // STRIDE,
        k.stride(0) // STRIDE,
        **_constants(q, k, tile),
        num_warps=tile.num_warps,
        maxnreg=tile.maxnreg,
        num_stages=NUM_STAGES,
    )
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, dense, or in the tensors that are given for them: views of one packed (N, T, 3, H, K), say.

    Raises ValueError for given tensors of another shape, dtype or layout; dk and dv must have the same strides.
    """
    n, t, heads, head_dim = q.shape
    s = k.shape[1]
    scale_log2 = _log2(scale)
    dq, dk, dv = _result("dq", dq, q), _result("dk", dk, k), _result("dv", dv, v)
    if dk.stride() != dv.stride():
        raise ValueError(f"dv: expected the strides of dk, {dk.stride()}, got {dv.stride()}")
    dout, out, lse, q = dout.contiguous(), out.contiguous(), lse.contiguous(), readable(q)
    k, v = _readable_pair(k, v)
    delta = torch.empty_like(lse)
    tile = backward_q_tile(t, s, q.element_size())
    launch(
        _backward_q_kernel,
        (n * heads * triton.cdiv(t, tile.block_t),),
        dout,
        q,
        k,
        v,
        out,
        lse,
        dq,
        delta,
        t,
        s,
        scale,
        scale_log2,
        q.stride(0) // STRIDE,
        k.stride(0) // STRIDE,
        dq.stride(0) // STRIDE,
        DQ_TOKEN=dq.stride(1),
        DQ_HEAD=dq.stride(2),
        **_constants(q, k, tile),
        num_warps=tile.num_warps,
        maxnreg=tile.maxnreg,
        num_stages=NUM_STAGES,
    )
    tile = backward_kv_tile(t, s, head_dim, q.element_size())
    launch(
        _backward_kv_kernel,
        (n * heads * triton.cdiv(s, tile.block_s),),
        dout,
        q,
        k,
        v,
        lse,
        delta,
        dk,
        dv,
        t,
        s,
        scale,
        scale_log2,
        q.stride(0) // STRIDE,
        k.stride(0) // STRIDE,
        dk.stride(0) // STRIDE,
        DKV_TOKEN=dk.stride(1),
        DKV_HEAD=dk.stride(2),
        **_constants(q, k, tile),
        num_warps=tile.num_warps,
        maxnreg=tile.maxnreg,
        num_stages=NUM_STAGES,
    )
    return dq, dk, dv
