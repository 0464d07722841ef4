"""What one GPU can do at the shapes of DiT-XL/2, measured with plain torch before anything is tuned.

    python benchmarks/calibrate.py            # all parts; what has been measured today at this commit is skipped
    python benchmarks/calibrate.py --parts copy matmul --force

Parts, one result file each: launch overhead, copies by size, matrix products in bf16 and fp8, linear + tanh GELU,
attention by SDPA backend, and Inductor's kernels for one DiT block. The other benchmarks hold their numbers against the
ceilings that are found here (`benchmarks/results.py`). Needs torch, triton and numpy; nothing of fastdit is imported.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel

if not __package__:  # started as a file: the folder above is where the package `benchmarks` lies
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.results import UNITS, Ceilings, Environment, Row, read_rows, table, write_rows

RESULTS = Path(__file__).resolve().parent / "results"

# ------------------------------------------------------------------------------------------------ what is measured


@dataclass(frozen=True)
class Sizes:
    """The shapes of one run."""

    copies: tuple[int, ...]  # bytes read + written
    square: int  # the product that shows the ceiling
    rows: tuple[int, ...]  # M: tokens of the whole batch
    linears: dict[str, tuple[int, int]]  # name: (K, N)
    heads: int
    head_dims: tuple[int, ...]
    attention: tuple[tuple[int, int], ...]  # (N, T)
    block: tuple[int, int, int]  # N, T, heads of 72
    launches: int
    rounds: int  # samples per provider


MB = 1_000_000
FULL = Sizes(
    copies=tuple(size * MB for size in (20, 40, 80, 160, 320, 640, 1280, 2560, 8000)),
    square=8192,
    rows=(512, 2048, 2816, 4096, 16384, 16896),
    linears={"qkv": (1152, 3456), "proj": (1152, 1152), "fc1": (1152, 4608), "fc2": (4608, 1152)},
    heads=16,
    head_dims=(64, 72),
    attention=((64, 256), (16, 1024)),
    block=(64, 256, 16),
    launches=1000,
    rounds=15,
)
SMALL = Sizes(
    copies=(4096, 65536),
    square=64,
    rows=(16, 48),
    linears={"qkv": (32, 96), "fc1": (32, 128)},
    heads=2,
    head_dims=(64, 72),
    attention=((2, 16), (1, 32)),
    block=(2, 16, 1),
    launches=20,
    rounds=3,
)

# Rounding of bf16 operands gives an error of 1e-3 to 1e-2; a wrong scale, layout or formula gives 1e-1 and more.
LARGEST_ERROR = 5e-2
# What torch raises for what a device or a build cannot do (out of memory and a failed compilation are RuntimeErrors).
FAILURES = (RuntimeError, NotImplementedError, ValueError)


class Prepared(NamedTuple):
    """`run(i)` works on the i-th set of inputs (they rotate); `error()` is its relative error on set 0."""

    run: Callable[[int], Any]
    error: Callable[[], float]


@dataclass(frozen=True)
class Candidate:
    """One way to do the work of a case. `prepare` allocates and may fail: that is a row with a reason."""

    provider: str
    dtype: str
    prepare: Callable[[], Prepared]
    bytes: int | None = None
    flops: int | None = None
    repeats: int = 1  # how often one call does this work


# ------------------------------------------------------------------------------------------------ how it is measured


class Stopwatch:
    """Seconds per call of `run`, without the time that the CPU needs to launch it.

    On a GPU a sleeping kernel goes first, so that all calls of a sample wait in the queue when the first one starts.
    If the GPU woke before the last launch, the sample is thrown away and the sleep made longer.
    """

    SAMPLE_SECONDS = 3e-3
    MOST_CALLS = 32
    SHORTEST_SLEEP, LONGEST_SLEEP = 1 << 18, 1 << 26  # cycles: about 0.15 ms and 35 ms

    def __init__(self, run: Callable[[int], Any], device: torch.device) -> None:
        self.run = run
        self.on_gpu = device.type == "cuda"
        self.calls = self.MOST_CALLS if self.on_gpu else 1
        self.sleep = self.SHORTEST_SLEEP
        self.next_set = 0
        self.sample()  # warm-up: autotuning, allocations, clocks
        wanted = self.SAMPLE_SECONDS / max(self.sample(), 1e-9)
        self.calls = max(1, min(self.calls if self.on_gpu else self.MOST_CALLS, round(wanted)))

    def sample(self) -> float:
        """Seconds per call, over one sample of several calls.

        Raises RuntimeError if even a single call cannot be launched ahead, because it waits for the GPU itself.
        """
        if not self.on_gpu:
            start = time.perf_counter()
            self._call()
            return (time.perf_counter() - start) / self.calls
        while (seconds := self._queued_sample()) is None:
            self.sleep *= 2
            if self.sleep > self.LONGEST_SLEEP:  # the queue of launches is full: fewer of them
                if self.calls == 1:
                    raise RuntimeError("cannot be launched ahead of the GPU: it synchronises")
                self.calls, self.sleep = max(1, self.calls // 4), self.SHORTEST_SLEEP
        return seconds / self.calls

    def _queued_sample(self) -> float | None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(self.sleep)
        start.record()
        self._call()
        launched_ahead = not start.query()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 if launched_ahead else None

    def _call(self) -> None:
        for _ in range(self.calls):
            self.run(self.next_set)
            self.next_set += 1


class Bench:
    """What the parts share: the device, the shapes, the time limit, and how rows are made."""

    def __init__(self, device: torch.device, sizes: Sizes, time_limit: float) -> None:
        self.device = device
        self.sizes = sizes
        self.time_limit = time_limit
        self.deadline = time.monotonic() + time_limit
        gpu = device.type == "cuda"
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if gpu else 0
        torch.manual_seed(0)

    def sets(self, set_bytes: int) -> range:
        """As many sets of inputs as it takes that none is still in the L2 cache when its turn comes again."""
        return range(max(2, math.ceil(4 * self.cache_bytes / set_bytes)))

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def compare(
        self,
        suite: str,
        case: str,
        shape: dict[str, int],
        metric: str,
        candidates: Sequence[Candidate],
    ) -> list[Row]:
        """One row per candidate, measured in turns; ratios are against the first one.

        A candidate that cannot run, or whose result is wrong, becomes a row with the reason and no value.
        """
        prepared: dict[str, Prepared] = {}
        watches: dict[str, Stopwatch] = {}
        reasons: dict[str, str] = {}
        for candidate in candidates:
            try:
                if time.monotonic() > self.deadline:
                    raise RuntimeError(
                        f"the time limit of {self.time_limit:g} s for this part was reached"
                    )
                ready = candidate.prepare()
                error = ready.error()
                if not error <= LARGEST_ERROR:  # also true for NaN
                    raise RuntimeError(
                        f"wrong result: relative error {error:.1e}, allowed is {LARGEST_ERROR:.0e}"
                    )
                watches[candidate.provider] = Stopwatch(ready.run, self.device)
                prepared[candidate.provider] = ready
            except FAILURES as failure:
                reasons[candidate.provider] = (
                    " ".join(str(failure).split())[:300] or type(failure).__name__
                )
        samples = in_turns(watches, self.sizes.rounds)
        rows = []
        for candidate in candidates:
            name, first = candidate.provider, candidates[0].provider
            row = Row(
                suite,
                case,
                name,
                shape,
                candidate.dtype,
                metric,
                bytes=candidate.bytes,
                flops=candidate.flops,
            )
            if name in samples:
                kernels = list(kernel_times(prepared[name].run, self.device))
                row = replace(
                    timed(row, [seconds / candidate.repeats for seconds in samples[name]]),
                    kernels=kernels,
                )
                if name != first and first in samples:
                    pairs = zip(samples[first], samples[name], strict=True)
                    row = replace(
                        row, baseline=first, ratio=statistics.median(a / b for a, b in pairs)
                    )
            rows.append(replace(row, reason=reasons.get(name)))
        self.say(rows)
        return rows

    def say(self, rows: Sequence[Row]) -> None:
        """One line of progress."""
        shape = " ".join(f"{key}={size}" for key, size in rows[0].shape.items())
        values = ", ".join(
            f"{row.provider} {row.value:.4g} {row.unit}"
            if row.value is not None
            else f"{row.provider}: {row.reason}"
            for row in rows
        )
        print(f"  {rows[0].case} {shape}: {values}", file=sys.stderr, flush=True)


def in_turns(watches: dict[str, Stopwatch], rounds: int) -> dict[str, list[float]]:
    """`rounds` samples of each watch, A B B A A B ...: a drift of the clock rate meets all of them alike."""
    samples: dict[str, list[float]] = {name: [] for name in watches}
    for turn in range(rounds):
        for name in list(watches)[:: 1 if turn % 2 == 0 else -1]:
            samples[name].append(watches[name].sample())
    return samples


def timed(row: Row, seconds: Sequence[float]) -> Row:
    """`row` with the median of the samples in its unit, and their spread."""
    low, median, high = (float(value) for value in np.percentile(seconds, (25, 50, 75)))
    if row.metric == "time":
        value = median * 1e6
    elif row.metric == "bandwidth":
        value = (row.bytes or 0) / median / 1e9
    else:
        value = (row.flops or 0) / median / 1e12
    return replace(row, value=value, spread=(high - low) / median)


def kernel_times(
    run: Callable[[int], Any], device: torch.device, repeats: int = 1
) -> dict[str, list[float]]:
    """What ran, in order of appearance: seconds of every launch by kernel name (on a CPU: by operator name)."""
    gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profile:
        for i in range(repeats):
            run(i)
        if gpu:
            torch.cuda.synchronize(device)
    times: dict[str, list[float]] = {}
    for event in profile.events():
        ran = (
            event.device_type == DeviceType.CUDA and not event.is_user_annotation
            if gpu
            else "::" in event.name
        )
        if ran:
            times.setdefault(event.name, []).append(event.time_range.elapsed_us() * 1e-6)
    return times


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest ||actual - expected|| / ||expected||; NaN stays NaN."""
    errors = [
        (a.double() - e.double()).norm() / e.double().norm()
        for a, e in zip(actual, expected, strict=True)
    ]
    return float(torch.stack(errors).max())


# ------------------------------------------------------------------------------------------------ the parts


def launch(bench: Bench) -> Iterator[Row]:
    """Microseconds per kernel that does nothing to speak of: launched one by one, and as a node of a CUDA graph."""
    count = bench.sizes.launches
    one = torch.zeros(1, device=bench.device)
    row = Row("launch", "one-element add", "eager", {"launches": count}, "float32", "time")

    def eager() -> float:
        start = time.perf_counter()
        for _ in range(count):
            one.add_(1)
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
        return (time.perf_counter() - start) / count

    eager()
    rows = [timed(row, [eager() for _ in range(bench.sizes.rounds)])]

    def prepare() -> Prepared:
        if bench.device.type != "cuda":
            raise RuntimeError("CUDA graphs need a GPU")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                one.add_(1)

        def error() -> float:
            one.zero_()
            graph.replay()
            return relative_error([one], [torch.full_like(one, count)])

        return Prepared(lambda _: graph.replay(), error)

    yield from rows
    graph = Candidate("graph", "float32", prepare, repeats=count)
    yield from bench.compare("launch", row.case, row.shape, "time", [graph])


def copy(bench: Bench) -> Iterator[Row]:
    """GB/s of device-to-device copies, bytes read plus bytes written."""
    for size in bench.sizes.copies:

        def prepare(
            elements: int = size // 4,
        ) -> Prepared:  # half of the bytes are read, in elements of 2
            pairs = [
                (bench.normal(elements), bench.normal(elements)) for _ in bench.sets(elements * 4)
            ]
            source, target = pairs[0]
            return Prepared(
                lambda i: pairs[i % len(pairs)][1].copy_(pairs[i % len(pairs)][0]),
                lambda: relative_error([target.copy_(source)], [source]),
            )

        candidate = Candidate("copy_", "bfloat16", prepare, bytes=size)
        yield from bench.compare(
            "copy", "device to device", {"bytes": size}, "bandwidth", [candidate]
        )


@dataclass(frozen=True)
class Product:
    """(rows, inner) @ (inner, columns), each operand stored as autograd finds it: row by row or transposed."""

    case: str
    rows: int
    inner: int
    columns: int
    a_transposed: bool
    b_transposed: bool

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns

    def bytes(self, operand_bytes: int) -> int:
        """Both operands read once, the bf16 result written once."""
        return (
            operand_bytes * self.inner * (self.rows + self.columns) + 2 * self.rows * self.columns
        )


def linear_products(m: int, k: int, n: int) -> list[Product]:
    """The three products of y = x W^T with x (M, K) and W (N, K), forward and backward."""
    return [
        Product("forward", m, k, n, False, True),  # x W^T
        Product("dgrad", m, n, k, False, False),  # dy W
        Product("wgrad", n, m, k, True, False),  # dy^T x
    ]


def matmul(bench: Bench) -> Iterator[Row]:
    """TFLOP/s of the four linears of a block and their backward, and of a large square as the ceiling."""
    edge = bench.sizes.square
    square = Product("forward", edge, edge, edge, False, True)
    yield from bench.compare(
        "matmul",
        "square",
        {"M": edge, "K": edge, "N": edge},
        "rate",
        matmul_candidates(bench, square),
    )
    for name, (k, n) in bench.sizes.linears.items():
        for m in bench.sizes.rows:
            for product in linear_products(m, k, n):
                yield from bench.compare(
                    "matmul",
                    f"{name} {product.case}",
                    {"M": m, "K": k, "N": n},
                    "rate",
                    matmul_candidates(bench, product),
                )


def matmul_candidates(bench: Bench, product: Product) -> list[Candidate]:
    def bf16() -> Prepared:
        sets = [
            (
                operand(bench, product.rows, product.inner, product.a_transposed),
                operand(bench, product.inner, product.columns, product.b_transposed),
            )
            for _ in bench.sets(product.bytes(2))
        ]
        a, b = sets[0]
        return Prepared(
            lambda i: torch.mm(*sets[i % len(sets)]),
            lambda: relative_error([torch.mm(a, b)], [a.float() @ b.float()]),
        )

    def fp8() -> Prepared:
        # The hardware wants a by rows and b by columns; the cost of bringing them there is not part of the product.
        sets = [
            (
                quantise_rows(bench.normal(product.rows, product.inner)),
                quantise_rows(bench.normal(product.columns, product.inner)),
            )
            for _ in bench.sets(product.bytes(1))
        ]

        def run(i: int) -> Tensor:
            (a, a_scale), (b, b_scale) = sets[i % len(sets)]
            return torch._scaled_mm(
                a,
                b.t(),
                scale_a=a_scale,
                scale_b=b_scale.t(),
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )

        def error() -> float:
            (a, a_scale), (b, b_scale) = sets[0]
            return relative_error([run(0)], [(a.float() * a_scale) @ (b.float() * b_scale).t()])

        return Prepared(run, error)

    return [
        Candidate("mm", "bfloat16", bf16, bytes=product.bytes(2), flops=product.flops),
        Candidate(
            "scaled_mm rowwise", "float8_e4m3fn", fp8, bytes=product.bytes(1), flops=product.flops
        ),
    ]


def operand(bench: Bench, rows: int, columns: int, transposed: bool) -> Tensor:
    return bench.normal(columns, rows).t() if transposed else bench.normal(rows, columns)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` in fp8 with one fp32 scale for each row: x ~ quantised * scale."""
    scale = x.float().abs().amax(dim=1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def gelu(bench: Bench) -> Iterator[Row]:
    """Microseconds of linear + tanh GELU: as two operations, and with the GELU in the matrix product's epilogue."""
    k, n = bench.sizes.linears["fc1"]
    for m in bench.sizes.rows:
        size, flops = 2 * (m * k + n * k + n + m * n), 2 * m * k * n

        def candidate(provider: str, m: int = m, size: int = size, flops: int = flops) -> Candidate:
            def prepare() -> Prepared:
                if provider == "_addmm_activation":
                    require_tanh_gelu(bench.device)
                sets = [
                    (bench.normal(m, k), bench.normal(n, k) * k**-0.5, bench.normal(n))
                    for _ in bench.sets(size)
                ]

                def run(i: int) -> Tensor:
                    x, weight, bias = sets[i % len(sets)]
                    if provider == "linear, gelu":
                        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
                    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)

                def error() -> float:
                    x, weight, bias = (tensor.float() for tensor in sets[0])
                    return relative_error(
                        [run(0)], [F.gelu(F.linear(x, weight, bias), approximate="tanh")]
                    )

                return Prepared(run, error)

            return Candidate(provider, "bfloat16", prepare, bytes=size, flops=flops)

        candidates = [candidate("linear, gelu"), candidate("_addmm_activation")]
        yield from bench.compare(
            "gelu", "fc1 + tanh GELU", {"M": m, "K": k, "N": n}, "time", candidates
        )


def require_tanh_gelu(device: torch.device) -> None:
    """Raises RuntimeError where `_addmm_activation` applies the erf GELU, which rounding to bf16 would hide."""
    x = torch.linspace(-4, 4, 64, device=device).reshape(8, 8)
    result = torch._addmm_activation(
        torch.zeros(8, device=device), x, torch.eye(8, device=device), use_gelu=True
    )
    if (result - F.gelu(x, approximate="tanh")).norm() >= (result - F.gelu(x)).norm():
        raise RuntimeError(
            f"_addmm_activation applies the erf GELU on {device.type}, not the tanh GELU of DiT"
        )


BACKENDS: dict[str, SDPBackend | None] = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(bench: Bench) -> Iterator[Row]:
    """Microseconds of scaled_dot_product_attention by backend, on q, k, v as DiT cuts them out of one tensor.

    FLOPs are those of the matrix products, two forward and five backward (which computes the scores again).
    """
    h = bench.sizes.heads
    for d in bench.sizes.head_dims:
        for n, t in bench.sizes.attention:
            shape = {"N": n, "H": h, "T": t, "K": d}
            tensor_bytes, product_flops = 2 * n * h * t * d, 2 * n * h * t * t * d
            for case, tensors, products in (("forward", 4, 2), ("backward", 8, 5)):
                candidates = [
                    Candidate(
                        name,
                        "bfloat16",
                        attention_prepare(bench, backend, shape, backward=case == "backward"),
                        bytes=tensors * tensor_bytes,
                        flops=products * product_flops,
                    )
                    for name, backend in BACKENDS.items()
                ]
                yield from bench.compare("attention", case, shape, "time", candidates)


def attention_prepare(
    bench: Bench, backend: SDPBackend | None, shape: dict[str, int], backward: bool
) -> Callable[[], Prepared]:
    n, h, t, d = shape["N"], shape["H"], shape["T"], shape["K"]

    def chosen() -> AbstractContextManager[None]:
        return nullcontext() if backend is None else sdpa_kernel(backend)

    def inputs() -> tuple[Tensor, ...]:
        """q, k, v and the gradient of the output, (N, H, T, K) each, in memory as (N, T, 3, H, K) and (N, T, H, K)."""
        qkv = bench.normal(n, t, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        return *(x.detach().requires_grad_(backward) for x in qkv), bench.normal(
            n, t, h, d
        ).transpose(1, 2)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with chosen():
            return F.scaled_dot_product_attention(q, k, v)

    def prepare() -> Prepared:
        sets = [inputs() for _ in bench.sets(8 * n * h * t * d)]
        with warnings.catch_warnings(
            record=True
        ) as notes:  # torch warns why a backend cannot run, then raises
            warnings.simplefilter("always")
            try:
                outputs = [forward(q, k, v) for q, k, v, _ in sets]
            except RuntimeError as failure:
                raise RuntimeError(
                    " ".join([str(failure), *(str(note.message) for note in notes)])
                ) from failure

        def run(i: int) -> tuple[Tensor, ...]:
            i %= len(sets)
            q, k, v, gradient = sets[i]
            if not backward:
                return (forward(q, k, v),)
            return torch.autograd.grad(outputs[i], (q, k, v), gradient, retain_graph=True)

        def error() -> float:
            """Of the first sample, whose scores are small enough to be written out in fp32."""
            q, k, v, gradient = (x[:1].detach().float().requires_grad_() for x in sets[0])
            expected = ((q @ k.transpose(-2, -1) * d**-0.5).softmax(dim=-1) @ v,)
            if backward:
                expected = torch.autograd.grad(expected[0], (q, k, v), gradient)
            return relative_error([x[:1].detach() for x in run(0)], [x.detach() for x in expected])

        return Prepared(run, error)

    return prepare


class Block(nn.Module):
    """A DiT block with adaLN-Zero in plain torch: the work to be measured, with weights that let nothing vanish."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(hidden, 6 * hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)
        self.fc1 = nn.Linear(hidden, 4 * hidden)
        self.fc2 = nn.Linear(4 * hidden, hidden)
        for linear in (self.modulation, self.qkv, self.proj, self.fc1, self.fc2):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (N, T, D), c (N, D)."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            self.modulation(F.silu(c)).unsqueeze(1).chunk(6, dim=-1)
        )
        x = x + gate_msa * self.attend(self.normalise(x) * (1 + scale_msa) + shift_msa)
        h = self.normalise(x) * (1 + scale_mlp) + shift_mlp
        return x + gate_mlp * self.fc2(F.gelu(self.fc1(h), approximate="tanh"))

    def attend(self, h: Tensor) -> Tensor:
        n, t, hidden = h.shape
        q, k, v = (
            self.qkv(h)
            .reshape(n, t, 3, self.heads, hidden // self.heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        return self.proj(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, hidden)
        )

    @staticmethod
    def normalise(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def block_flops(n: int, t: int, hidden: int, attention_products: int) -> int:
    """Of one forward: 12 D^2 weights for every token, 6 D^2 for every sample, and the products of the attention."""
    return 24 * n * t * hidden**2 + 12 * n * hidden**2 + attention_products * 2 * n * t * t * hidden


def inductor(bench: Bench) -> Iterator[Row]:
    """Microseconds of one block in eager mode and compiled, then every kernel of the compiled block with its GB/s.

    The bytes of a kernel are those that Inductor counts; library kernels (matrix products, attention) have a time only.
    """
    from torch._inductor import config as inductor_config
    from torch._inductor.utils import run_and_get_code

    n, t, heads = bench.sizes.block
    hidden = 72 * heads
    shape = {"N": n, "T": t, "D": hidden}
    block = Block(hidden, heads).to(bench.device, torch.bfloat16)
    exact = Block(hidden, heads).to(bench.device)
    exact.load_state_dict(block.state_dict())
    sets = [
        (
            bench.normal(n, t, hidden).requires_grad_(),
            bench.normal(n, hidden).requires_grad_(),
            bench.normal(n, t, hidden),
        )
        for _ in bench.sets(3 * 2 * n * t * hidden)
    ]
    compiled = torch.compile(block, fullgraph=True)
    sources: list[str] = []

    def gradients(out: Tensor, model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, c, gradient = inputs
        return torch.autograd.grad(out, (x, c, *model.parameters()), gradient)

    def prepare(model: Callable[..., Tensor], backward: bool) -> Callable[[], Prepared]:
        def run(i: int) -> tuple[Tensor, ...]:
            inputs = sets[i % len(sets)]
            out = model(*inputs[:2])
            return (out, *gradients(out, block, inputs)) if backward else (out,)

        def error() -> float:
            x, c, gradient = (tensor.detach().float().requires_grad_() for tensor in sets[0])
            expected = exact(x, c)
            references = (
                (expected, *gradients(expected, exact, (x, c, gradient)))
                if backward
                else (expected,)
            )
            return relative_error([y.detach() for y in run(0)], [y.detach() for y in references])

        def ready() -> Prepared:
            if model is compiled and not sources:
                print("  compiling the block ...", file=sys.stderr, flush=True)
                with inductor_config.patch(
                    benchmark_kernel=True
                ):  # writes each kernel's bytes into the code
                    sources.extend(
                        run_and_get_code(lambda: gradients(compiled(*sets[0][:2]), block, sets[0]))[
                            1
                        ]
                    )
            return Prepared(run, error)

        return ready

    for case, backward, flops in (
        ("forward", False, block_flops(n, t, hidden, 2)),
        ("forward + backward", True, 3 * block_flops(n, t, hidden, 0) + 7 * 2 * n * t * t * hidden),
    ):
        candidates = [
            Candidate("eager", "bfloat16", prepare(block, backward), flops=flops),
            Candidate("inductor", "bfloat16", prepare(compiled, backward), flops=flops),
        ]
        yield from bench.compare("inductor", case, shape, "time", candidates)

    if bench.device.type != "cuda" or not sources:
        reason = (
            "the block was not compiled"
            if not sources
            else "the times of single kernels need a GPU"
        )
        yield Row("inductor", "kernels", "inductor", shape, "bfloat16", "bandwidth", reason=reason)
        return
    repeats = 10
    known = triton_kernel_bytes(sources)
    forward = kernel_times(lambda i: compiled(*sets[i % len(sets)][:2]), bench.device, repeats)
    outputs = [compiled(*sets[i % len(sets)][:2]) for i in range(repeats)]
    backward_times = kernel_times(
        lambda i: gradients(outputs[i], block, sets[i % len(sets)]), bench.device, repeats
    )
    for direction, times in (("forward", forward), ("backward", backward_times)):
        for kernel, seconds in times.items():
            row = Row(
                "inductor",
                f"{direction} kernel {kernel}",
                "inductor",
                shape,
                "bfloat16",
                "time",
                kernels=[kernel],
            )
            if kernel in known:
                row = replace(row, metric="bandwidth", bytes=known[kernel])
            yield timed(row, seconds)


def triton_kernel_bytes(sources: Sequence[str]) -> dict[str, int]:
    """Bytes by kernel name, from the code that Inductor wrote."""
    found: dict[str, int] = {}
    for line in "\n".join(sources).splitlines():
        name = re.search(r"inductor_meta=.*'kernel_name': '(\w+)'", line)
        gigabytes = re.search(r"'kernel_num_gb': ([0-9.e+-]+)", line)
        if name and gigabytes:
            found[name[1]] = round(float(gigabytes[1]) * 1e9)
    return found


# In this order: the profiler slows launches down once it has been used, and the ceilings come before what needs them.
PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "launch": launch,
    "copy": copy,
    "matmul": matmul,
    "gelu": gelu,
    "attention": attention,
    "inductor": inductor,
}

# ------------------------------------------------------------------------------------------------ command line


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    gpu = torch.cuda.is_available()
    if options.device == "cuda" and not gpu:
        parser().error("--device cuda: torch sees no GPU here; allowed are auto and cpu")
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if gpu and options.device != "cpu"
        else torch.device("cpu")
    )
    environment = Environment.of(device)
    folder = environment.folder(options.output)
    if options.small:  # a trial run never stands in for a measurement
        folder = folder.with_name(f"{folder.name}-small")
    rows: list[Row] = []
    for part in PARTS:
        if part not in options.parts:
            continue
        path = folder / f"{part}.json"
        if path.exists() and not options.force:
            print(
                f"{part}: skipped, {path} exists (--force measures again)",
                file=sys.stderr,
                flush=True,
            )
            rows += read_rows(path)
            continue
        print(f"{part}: on {environment.device}", file=sys.stderr, flush=True)
        start = time.monotonic()
        measured = list(
            PARTS[part](Bench(device, SMALL if options.small else FULL, options.time_limit))
        )
        ceilings = Ceilings.measured_in(folder, measured)
        measured = [ceilings.fill(row) for row in measured]
        write_rows(path, measured, environment)
        print(f"{part}: {time.monotonic() - start:.0f} s, {path}", file=sys.stderr, flush=True)
        rows += measured
    print(table(rows))


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help=", ".join(PARTS),
    )
    options.add_argument(
        "--output", type=Path, default=RESULTS, help="folder for the results (%(default)s)"
    )
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options.add_argument(
        "--small", action="store_true", help="tiny shapes, to try the program without a GPU"
    )
    options.add_argument(
        "--force", action="store_true", help="measure parts again whose result file exists"
    )
    options.add_argument(
        "--time-limit",
        type=float,
        default=480,
        help="seconds per part; cases that do not fit are rows without a value",
    )
    return options


if __name__ == "__main__":
    main()
