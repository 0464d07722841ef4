"""What one GPU can do at the shapes of DiT-XL/2, measured with plain torch before anything is tuned.

    python benchmarks/calibrate.py            # what was measured today at this commit is skipped
    python benchmarks/calibrate.py --parts copy matmul --force

Parts, one result file each: launch overhead, copies by size, matrix products in bf16 and fp8, linear +
tanh GELU, attention by SDPA backend, and Inductor's kernels for one DiT block. The other benchmarks
hold their numbers against the ceilings found here. Needs torch, triton and numpy, nothing of fastdit.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

if not __package__:  # started as a file: the package `benchmarks` lies in the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measure import Bench, Candidate, Prepared, kernel_times, relative_error, say, timed
from benchmarks.results import Row, environment_of, read_rows, table, with_fractions, write_rows

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Sizes:
    """The shapes of one run."""

    copies: tuple[int, ...]  # bytes read + bytes written
    square: int  # the matrix product that shows the ceiling
    rows: tuple[int, ...]  # M: the tokens of a batch
    linears: dict[str, tuple[int, int]]  # name: (K, N)
    heads: int
    head_dims: tuple[int, ...]
    attention: tuple[tuple[int, int], ...]  # (N, T)
    block: tuple[int, int, int]  # N, T, heads of 72
    launches: int
    rounds: int  # samples of each provider


FULL = Sizes(
    copies=tuple(mb * 10**6 for mb in (20, 40, 80, 160, 320, 640, 1280, 2560, 8000)),
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

# ------------------------------------------------------------------------------------------------ launch


def launch(bench: Bench, sizes: Sizes) -> Iterator[Row]:
    """Time of a kernel that does next to nothing: launched by itself, and as a node of a CUDA graph."""
    count, on_gpu = sizes.launches, bench.device.type == "cuda"
    one = torch.zeros(1, device=bench.device)

    def launch_all() -> None:
        for _ in range(count):
            one.add_(1)

    def eager_seconds() -> float:
        start = time.perf_counter()
        launch_all()
        if on_gpu:
            torch.cuda.synchronize(bench.device)
        return (time.perf_counter() - start) / count

    def prepare() -> Prepared:
        if not on_gpu:
            raise RuntimeError("CUDA graphs need a GPU")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch_all()

        def error() -> float:
            one.zero_()
            graph.replay()
            return relative_error([one], [torch.full_like(one, count)])

        return Prepared(lambda _: graph.replay(), error)

    eager_seconds()
    shape = {"launches": count}
    row = Row("launch", "one-element add", "eager", shape, "float32", "time")
    yield timed(row, [eager_seconds() for _ in range(bench.rounds)])
    graph = Candidate("graph node", "float32", prepare, repeats=count)
    yield from bench.compare(row.suite, row.case, shape, row.metric, [graph])


# -------------------------------------------------------------------------------------------------- copy


def copy(bench: Bench, sizes: Sizes) -> Iterator[Row]:
    """Bandwidth of device-to-device copies: bytes read plus bytes written, over the time."""
    for size in sizes.copies:
        candidate = Candidate("copy_", "bfloat16", copy_prepare(bench, size), bytes=size)
        yield from bench.compare("copy", "copy", {"bytes": size}, "bandwidth", [candidate])


def copy_prepare(bench: Bench, size: int) -> Callable[[], Prepared]:
    def prepare() -> Prepared:
        elements = size // 4  # of 2 bytes, each read once and written once
        sets = [(bench.normal(elements), bench.normal(elements)) for _ in bench.sets(size)]

        def run(i: int) -> Tensor:
            target, source = sets[i % len(sets)]
            return target.copy_(source)

        return Prepared(run, lambda: 0.0 if torch.equal(run(0), sets[0][1]) else math.inf)

    return prepare


# ------------------------------------------------------------------------------------------------ matmul


@dataclass(frozen=True)
class Product:
    """a (rows, inner) @ b (inner, columns), each stored as autograd finds it: by rows or transposed."""

    rows: int
    inner: int
    columns: int
    a_transposed: bool
    b_transposed: bool

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns

    def bytes(self, width: int) -> int:
        """Both operands, of `width` bytes an element, read once; the bf16 result written once."""
        return width * self.inner * (self.rows + self.columns) + 2 * self.rows * self.columns

    def operands(self, bench: Bench) -> tuple[Tensor, Tensor]:
        a, b = (self.rows, self.inner), (self.inner, self.columns)
        return (
            bench.normal(*a[::-1]).t() if self.a_transposed else bench.normal(*a),
            bench.normal(*b[::-1]).t() if self.b_transposed else bench.normal(*b),
        )


def linear_products(m: int, k: int, n: int) -> dict[str, Product]:
    """What y = x W^T, with x (M, K) and W (N, K), computes forward and backward."""
    return {
        "forward": Product(m, k, n, False, True),  # x W^T
        "dgrad": Product(m, n, k, False, False),  # dy W
        "wgrad": Product(n, m, k, True, False),  # dy^T x
    }


def matmul(bench: Bench, sizes: Sizes) -> Iterator[Row]:
    """Rate of the linears of a block, forward and backward, and of a large square as the ceiling."""
    products = [("square", (sizes.square,) * 3, Product(*(sizes.square,) * 3, False, True))]
    for linear, (k, n) in sizes.linears.items():
        for m in sizes.rows:
            for case, product in linear_products(m, k, n).items():
                products.append((f"{linear} {case}", (m, k, n), product))
    for case, (m, k, n), product in products:
        shape = {"M": m, "K": k, "N": n}
        yield from bench.compare("matmul", case, shape, "rate", matmul_candidates(bench, product))


def matmul_candidates(bench: Bench, product: Product) -> list[Candidate]:
    def bf16() -> Prepared:
        sets = [product.operands(bench) for _ in bench.sets(product.bytes(2))]
        a, b = sets[0]
        return Prepared(
            run=lambda i: torch.mm(*sets[i % len(sets)]),
            error=lambda: relative_error([torch.mm(a, b)], [a.float() @ b.float()]),
        )

    def fp8() -> Prepared:
        # The hardware wants a by rows and b by columns. Bringing them there is not counted.
        sets = [
            [
                quantise_rows(bench.normal(size, product.inner))
                for size in (product.rows, product.columns)
            ]
            for _ in bench.sets(product.bytes(1))
        ]

        def run(i: int) -> Tensor:
            (a, a_scale), (b, b_scale) = sets[i % len(sets)]
            scales = (a_scale, b_scale.t())
            return torch._scaled_mm(
                a, b.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True
            )

        def error() -> float:
            (a, a_scale), (b, b_scale) = sets[0]
            return relative_error([run(0)], [(a.float() * a_scale) @ (b.float() * b_scale).t()])

        return Prepared(run, error)

    wide, narrow = product.bytes(2), product.bytes(1)
    return [
        Candidate("mm", "bfloat16", bf16, wide, product.flops),
        Candidate("scaled_mm rowwise", "float8_e4m3fn", fp8, narrow, product.flops),
    ]


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` in fp8 and an fp32 scale for each row: x is about quantised * scale."""
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).to(torch.float8_e4m3fn), scale


# -------------------------------------------------------------------------------------------------- gelu


def gelu(bench: Bench, sizes: Sizes) -> Iterator[Row]:
    """Time of linear + tanh GELU: as two operations, and with the GELU in the product's epilogue."""
    k, n = sizes.linears["fc1"]
    for m in sizes.rows:
        moved, flops = 2 * (m * k + n * k + n + m * n), 2 * m * k * n
        candidates = [
            Candidate(provider, "bfloat16", gelu_prepare(bench, act, m, k, n), moved, flops)
            for provider, act in (("linear, gelu", linear_gelu), ("addmm_activation", addmm_gelu))
        ]
        shape = {"M": m, "K": k, "N": n}
        yield from bench.compare("gelu", "fc1 + tanh GELU", shape, "time", candidates)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def addmm_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


def gelu_prepare(
    bench: Bench, act: Callable[[Tensor, Tensor, Tensor], Tensor], m: int, k: int, n: int
) -> Callable[[], Prepared]:
    def prepare() -> Prepared:
        require_tanh(act, bench.device)
        sets = [
            (bench.normal(m, k), bench.normal(n, k) * k**-0.5, bench.normal(n))
            for _ in bench.sets(2 * (m * k + n * k + n))
        ]

        def error() -> float:
            exact = linear_gelu(*(tensor.float() for tensor in sets[0]))
            return relative_error([act(*sets[0])], [exact])

        return Prepared(lambda i: act(*sets[i % len(sets)]), error)

    return prepare


def require_tanh(act: Callable[[Tensor, Tensor, Tensor], Tensor], device: torch.device) -> None:
    """Raises RuntimeError if `act` applies the erf GELU, a difference that bf16 would hide."""
    x = torch.linspace(-4, 4, 64, device=device).reshape(8, 8)
    result = act(x, torch.eye(8, device=device), torch.zeros(8, device=device))
    if (result - F.gelu(x, approximate="tanh")).norm() >= (result - F.gelu(x)).norm():
        raise RuntimeError(f"applies the erf GELU on {device.type}; DiT has the tanh GELU")


# --------------------------------------------------------------------------------------------- attention

BACKENDS: dict[str, SDPBackend | None] = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(bench: Bench, sizes: Sizes) -> Iterator[Row]:
    """Time of scaled_dot_product_attention by backend; `kernels` tells which one the default is."""
    for d in sizes.head_dims:
        for n, t in sizes.attention:
            shape = {"N": n, "H": sizes.heads, "T": t, "K": d}
            for backward, case in ((False, "forward"), (True, "backward")):
                moved, flops = attention_cost(n, sizes.heads, t, d, backward)
                candidates = []
                for name, backend in BACKENDS.items():
                    prepare = attention_prepare(bench, backend, n, sizes.heads, t, d, backward)
                    candidates.append(Candidate(name, "bfloat16", prepare, moved, flops))
                yield from bench.compare("attention", case, shape, "time", candidates)


def attention_cost(n: int, h: int, t: int, d: int, backward: bool) -> tuple[int, int]:
    """Bytes of q, k, v, out (backward also of their gradients) in bf16, and the products' FLOPs.

    Two products forward, five backward, which computes the scores once more.
    """
    tensors, products = (8, 5) if backward else (4, 2)
    return tensors * 2 * n * h * t * d, products * 2 * n * h * t * t * d


def attention_prepare(
    bench: Bench, backend: SDPBackend | None, n: int, h: int, t: int, d: int, backward: bool
) -> Callable[[], Prepared]:
    def inputs() -> tuple[Tensor, ...]:
        """q, k, v, output gradient: (N, H, T, K), laid out as DiT cuts them out of its tokens."""
        qkv = bench.normal(n, t, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        gradient = bench.normal(n, t, h, d).transpose(1, 2)
        return *(x.detach().requires_grad_(backward) for x in qkv), gradient

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    def prepare() -> Prepared:
        sets = [inputs() for _ in bench.sets(2 * 4 * n * h * t * d)]
        with warnings.catch_warnings(record=True) as notes:  # torch warns why, and then raises
            warnings.simplefilter("always")
            try:
                outputs = [forward(q, k, v) for q, k, v, _ in sets]
            except RuntimeError as failure:
                why = [str(failure), *(str(note.message) for note in notes)]
                raise RuntimeError(" ".join(why)) from failure

        def run(i: int) -> tuple[Tensor, ...]:
            q, k, v, gradient = sets[i % len(sets)]
            if not backward:
                return (forward(q, k, v),)
            out = outputs[i % len(sets)]
            return torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)

        def error() -> float:
            """Of the first sample: its scores are small enough to be written out in fp32."""
            q, k, v, gradient = (x[:1].detach().float().requires_grad_() for x in sets[0])
            exact = (q @ k.transpose(-2, -1) * d**-0.5).softmax(dim=-1) @ v
            expected = torch.autograd.grad(exact, (q, k, v), gradient) if backward else (exact,)
            return relative_error([x[:1] for x in run(0)], expected)

        return Prepared(run, error)

    return prepare


# ---------------------------------------------------------------------------------------------- inductor


class Block(nn.Module):
    """A DiT block with adaLN-Zero in plain torch, as the work to be measured; no weight is zero."""

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
        modulation = self.modulation(F.silu(c)).unsqueeze(1).chunk(6, dim=-1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_msa) + shift_msa
        x = x + gate_msa * self.attend(h)
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_mlp) + shift_mlp
        return x + gate_mlp * self.fc2(F.gelu(self.fc1(h), approximate="tanh"))

    def attend(self, h: Tensor) -> Tensor:
        n, t, hidden = h.shape
        qkv = self.qkv(h).reshape(n, t, 3, self.heads, hidden // self.heads)
        out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        return self.proj(out.transpose(1, 2).reshape(n, t, hidden))


def block_flops(n: int, t: int, hidden: int, backward: bool) -> int:
    """The products of 12 D^2 weights with every token, of 6 D^2 with every sample, and of attention.

    Forward and backward together need each weight three times, and seven attention products of T x T.
    """
    linears = 2 * (12 * n * t + 6 * n) * hidden**2
    scores = 2 * n * t * t * hidden
    return 3 * linears + 7 * scores if backward else linears + 2 * scores


def inductor(bench: Bench, sizes: Sizes) -> Iterator[Row]:
    """Time of one block, eager and compiled; then the kernels of the compiled one, with their GB/s.

    A kernel's bytes are those that Inductor counts. Matrix products and attention come from libraries
    and have a time only.
    """
    n, t, heads = sizes.block
    hidden = 72 * heads
    shape = {"N": n, "T": t, "D": hidden}
    block = Block(hidden, heads).to(bench.device, torch.bfloat16)
    exact = Block(hidden, heads).to(bench.device)
    exact.load_state_dict(block.state_dict())
    sets = [  # x, c and the gradient of the output
        [bench.normal(n, t, hidden), bench.normal(n, hidden), bench.normal(n, t, hidden)]
        for _ in bench.sets(3 * 2 * n * t * hidden)
    ]
    compiled = cast(nn.Module, torch.compile(block, fullgraph=True))
    code: list[str] = []

    def forward(model: nn.Module, i: int) -> tuple[Tensor, ...]:
        """The output, then what it was computed from."""
        x, c, _ = (tensor.to(next(model.parameters()).dtype) for tensor in sets[i % len(sets)])
        leaves = (x.detach().requires_grad_(), c.detach().requires_grad_(), *model.parameters())
        return model(*leaves[:2]), *leaves

    def backward(forwarded: tuple[Tensor, ...], i: int) -> tuple[Tensor, ...]:
        gradient = sets[i % len(sets)][2].to(forwarded[0].dtype)
        return torch.autograd.grad(forwarded[0], forwarded[1:], gradient)

    def work(model: nn.Module, both: bool, i: int) -> tuple[Tensor, ...]:
        forwarded = forward(model, i)
        return backward(forwarded, i) if both else forwarded[:1]

    def prepare(model: nn.Module, both: bool) -> Callable[[], Prepared]:
        def ready() -> Prepared:
            if model is compiled and not code:
                say("  compiling the block ...")
                code.extend(generated_code(lambda: work(compiled, True, 0)))
            return Prepared(
                run=lambda i: work(model, both, i),
                error=lambda: relative_error(work(model, both, 0), work(exact, both, 0)),
            )

        return ready

    for case, both in (("forward", False), ("forward + backward", True)):
        flops = block_flops(n, t, hidden, both)
        models = {"eager": block, "inductor": compiled}
        candidates = [
            Candidate(name, "bfloat16", prepare(model, both), flops=flops)
            for name, model in models.items()
        ]
        yield from bench.compare("inductor", case, shape, "time", candidates)

    if bench.device.type != "cuda" or not code:
        reason = "the times of kernels need a GPU" if code else "the block was not compiled"
        row = Row("inductor", "kernels", "inductor", shape, "bfloat16", "bandwidth")
        yield replace(row, reason=reason)
        return
    calls = 5  # all outputs are kept until their backward is profiled
    forwarded = [forward(compiled, i) for i in range(calls)]
    times = {
        "forward": kernel_times(lambda i: forward(compiled, i), bench.device, calls),
        "backward": kernel_times(lambda i: backward(forwarded[i], i), bench.device, calls),
    }
    for direction, kernels in times.items():
        for kernel, seconds in kernels.items():
            case = f"{direction}, {len(seconds) / calls:g} x {kernel}"
            row = Row("inductor", case, "inductor", shape, "bfloat16", "time", kernels=[kernel])
            if moved := triton_kernel_bytes(code).get(kernel):
                row = replace(row, metric="bandwidth", bytes=moved)
            yield timed(row, seconds)


def generated_code(first_call: Callable[[], object]) -> list[str]:
    """What Inductor writes while `first_call` compiles, with the bytes that each kernel moves."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    with config.patch(benchmark_kernel=True):
        return run_and_get_code(first_call)[1]


def triton_kernel_bytes(code: Sequence[str]) -> dict[str, int]:
    """Bytes by kernel name."""
    found: dict[str, int] = {}
    for line in "\n".join(code).splitlines():
        name = re.search(r"inductor_meta=.*'kernel_name': '(\w+)'", line)
        gigabytes = re.search(r"'kernel_num_gb': ([0-9.e+-]+)", line)
        if name and gigabytes:
            found[name[1]] = round(float(gigabytes[1]) * 1e9)
    return found


# ------------------------------------------------------------------------------------------ command line

# In this order: once used, the profiler slows launches down; and ceilings come before what needs them.
PARTS: dict[str, Callable[[Bench, Sizes], Iterator[Row]]] = {
    "launch": launch,
    "copy": copy,
    "matmul": matmul,
    "gelu": gelu,
    "attention": attention,
    "inductor": inductor,
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    device = torch.device("cpu")
    if options.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    elif options.device == "cuda":
        parser().error("--device cuda: torch sees no GPU; allowed here are auto and cpu")
    sizes = SMALL if options.small else FULL
    environment = environment_of(device)
    folder = environment.folder(options.output)
    if options.small:  # a trial never stands in for a measurement
        folder = folder.with_name(f"{folder.name}-small")

    rows: list[Row] = []
    for part in (part for part in PARTS if part in options.parts):
        path = folder / f"{part}.json"
        if path.exists() and not options.force:
            say(f"{part}: skipped, {path} exists (--force measures again)")
            rows += read_rows(path)
            continue
        say(f"{part}: on {environment.device}")
        start = time.monotonic()
        measured = list(PARTS[part](Bench(device, sizes.rounds, options.time_limit), sizes))
        measured = with_fractions(measured, [*measured, *ceiling_rows(folder, besides=part)])
        write_rows(path, measured, environment)
        say(f"{part}: {time.monotonic() - start:.0f} s, {path}")
        rows += measured
    print(table(rows))


def ceiling_rows(folder: Path, besides: str) -> list[Row]:
    """What other parts of this run have measured of the ceilings."""
    paths = [folder / f"{part}.json" for part in ("copy", "matmul") if part != besides]
    return [row for path in paths if path.exists() for row in read_rows(path)]


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add, names = options.add_argument, list(PARTS)
    add("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    add("--output", type=Path, default=RESULTS, help="folder for the results (%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    add("--small", action="store_true", help="tiny shapes, to try the program without a GPU")
    add("--force", action="store_true", help="measure again what has a result file")
    limit = "seconds per part; a case that starts later is a row without a value (%(default)s)"
    add("--time-limit", type=float, default=480, help=limit)
    return options


if __name__ == "__main__":
    main()
