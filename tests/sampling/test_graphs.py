"""What goes wrong with CUDA graphs, on a GPU and, as far as there is no difference, with the recordings of the CPU.

The oracle is always the same: a replay gives the bits of single steps.
"""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
from torch import Tensor, nn

from fastdit import DiT, Sampler, create_diffusion
from fastdit.sampling import graphs as graphs_module
from fastdit.sampling.engine import Engine
from fastdit.sampling.graphs import WARM_UPS, CudaGraph
from fastdit.testing import assert_same_bits

from .helpers import STEPS, both, device_of, draw, graphs, make_model, overlap, stepwise

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes", [{}, {"input_size": (8, 16)}, {"hidden_size": 144, "in_channels": 1}]
)
def test_the_same_bits(
    device: str, changes: dict[str, Any], dtype: torch.dtype, cfg_scale: float
) -> None:
    model = make_model(device, **changes).to(dtype)
    sampler = Sampler(model, steps=STEPS, cuda_graph=True)
    seen = []
    for call in range(3):
        seen.append(both(model, [call, call + 1], sampler, seed=call, cfg_scale=cfg_scale))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
    assert not torch.equal(seen[0], seen[1])


def test_generators_go_on(device: str) -> None:
    """G1 to G5: noise is drawn outside of the graph, so its stream is that of single steps, before and after."""
    model = make_model(device)
    sampler = Sampler(model, steps=STEPS, cuda_graph=True)
    generators = [torch.Generator(device).manual_seed(3) for _ in range(2)]
    single = Sampler(model, steps=STEPS, cuda_graph=False)
    for _ in range(2):
        out = sampler([1, 2], generator=generators[0], progress=False)
        assert_same_bits("images", out, single([1, 2], generator=generators[1], progress=False))
    drawn = [torch.randn(4, generator=each, device=device) for each in generators]
    assert_same_bits("what comes next", *drawn)
    torch.manual_seed(5)
    expected = torch.randn(4, device=device)
    torch.manual_seed(5)
    both(model, [1])
    assert_same_bits("the global one", torch.randn(4, device=device), expected)


def test_a_failed_recording_leaves_everything_usable(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G11, G12: the exception is raised inside of the capture."""
    model = make_model(device)
    stream = torch.cuda.current_stream() if device == "cuda" else None
    calls: list[int] = []
    plain = DiT.forward_modulated

    def failing(self: DiT, x: Tensor, modulations: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == (2 if device == "cpu" else 4):  # after the warm-ups
            raise RuntimeError("out of memory")
        return plain(self, x, modulations)

    with monkeypatch.context() as broken:
        broken.setattr(DiT, "forward_modulated", failing)
        with pytest.warns(UserWarning, match="recording a step failed: out of memory"):
            out = Sampler(model, steps=STEPS)([1, 2], progress=False)
    if device == "cuda":
        assert torch.cuda.current_stream() == stream
        torch.cuda.empty_cache()
    assert_same_bits("fallback", out, stepwise(model, [1, 2]))
    both(model, [1, 2])
    train(model)


def train(model: DiT) -> None:
    device = device_of(model)
    x = torch.randn(1, model.in_channels, *model.input_size, device=device)
    model(x, torch.tensor([1], device=device), torch.tensor([1], device=device)).sum().backward()


def test_shapes_in_any_order(device: str) -> None:
    """G13, G23, G25: recordings share memory pools, some are let go, others replayed, with junk in between."""
    model = make_model(device)
    sampler = Sampler(model, steps=STEPS, cuda_graph=True, largest_number_of_graphs=3)
    order = [1, 2, 3, 1, 3, 2, 4, 1, 5, 2, 4]
    random.Random(0).shuffle(order)
    for n in order:
        both(model, list(range(n)), sampler)
        junk = [torch.full((1 << 16,), torch.nan, device=device) for _ in range(4)]
        del junk


def test_autocast(device: str) -> None:
    """G17: what autocast caches of the weights is freed when it ends."""
    model = make_model(device)
    sampler = Sampler(model, steps=STEPS, cuda_graph=True)
    for _ in range(2):
        with torch.autocast(device, torch.bfloat16):
            both(model, [1, 2], sampler)
        both(model, [1, 2], sampler)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)


def test_right_after_a_training_step(device: str) -> None:
    """G18."""
    model = make_model(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sampler = Sampler(model, steps=STEPS, cuda_graph=True)
    x = torch.randn(2, model.in_channels, *model.input_size, device=device)
    t = torch.tensor([3, 500], device=device)
    y = torch.tensor([1, 2], device=device)
    for _ in range(2):
        create_diffusion("").training_losses(model, x, t, {"y": y})["loss"].mean().backward()
        optimizer.step()
        both(model, [1, 2], sampler)
        assert model.training
    optimizer.zero_grad()


@pytest.mark.parametrize("first", ["grad", "no_grad", "inference"])
@pytest.mark.parametrize("second", ["grad", "no_grad", "inference"])
def test_grad_modes(device: str, first: str, second: str) -> None:
    """G19."""
    modes = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
    }
    model = make_model(device)
    sampler = Sampler(model, steps=STEPS, cuda_graph=True)
    for mode in (first, second):
        with modes[mode]():
            out = both(model, [1, 2], sampler)
        assert not out.is_inference()


def test_static_memory_outlives_the_callers(device: str) -> None:
    """G27."""
    model = make_model(device)
    sampler = Sampler(model, steps=STEPS, cuda_graph=True)
    labels = torch.tensor([1, 2])
    scale = torch.tensor([2.0, 3.0], device=device)
    expected = sampler(labels, cfg_scale=scale, progress=False).clone()
    del labels, scale
    gc.collect()
    junk = [torch.full((1 << 16,), torch.nan, device=device) for _ in range(8)]
    again = sampler([1, 2], cfg_scale=torch.tensor([2.0, 3.0]), progress=False)
    assert_same_bits("again", again, expected)
    del junk


# ------------------------------------------------------------------ only a GPU shows these


@pytest.mark.gpu
def test_a_step_waits_for_nothing() -> None:
    """G7."""
    model = make_model("cuda")
    engine = Sampler(model, steps=STEPS)._engine(torch.device("cuda", 0), torch.float32)
    labels = torch.tensor([1, 2], device="cuda")
    with torch.no_grad():
        buffers = engine._allocate(labels, torch.ones(2, device="cuda"), True, torch.float32)
        engine._to_first_step(buffers)
        engine._step(buffers, True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine._step(buffers, True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def run_alone(function: Callable[[], None], **environment: str) -> None:
    """In a process of its own: what a broken capture leaves of torch would be the next test's, too."""
    name = function.__name__
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.sampling.test_graphs import {name}\n{name}()"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def first_call() -> None:
    both(make_model("cuda"), [1, 2])


@pytest.mark.gpu
def test_the_first_call_of_a_process(tmp_path: Path) -> None:
    """G10: no kernel is compiled or loaded inside of a capture."""
    run_alone(first_call, TRITON_CACHE_DIR=str(tmp_path))


class OutOfMemory(CudaGraph):
    """After the warm-ups the device gives no more memory; the pool of a graph would be new memory throughout."""

    def __init__(
        self, function: Callable[[], None], reset: Callable[[], None], device: torch.device
    ) -> None:
        calls: list[bool] = []

        def filling() -> None:
            calls.append(torch.cuda.is_current_stream_capturing())
            function()
            if len(calls) == WARM_UPS:
                torch.cuda.set_per_process_memory_fraction(0.0, device)

        try:
            super().__init__(filling, reset, device)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        raise AssertionError(f"it had memory enough: {calls}")


def out_of_memory() -> None:
    model = make_model("cuda")
    other = Sampler(model, steps=STEPS, cuda_graph=True)
    both(model, [3], other)  # with it comes what torch keeps for the generators of all graphs
    sampler = Sampler(model, steps=STEPS)
    stream = torch.cuda.current_stream()
    with patch.object(Engine, "capture", OutOfMemory):
        with pytest.warns(UserWarning, match="recording a step failed: ") as said:
            out = draw(sampler, [1, 2])
        assert sum("recording a step failed" in str(each.message) for each in said) == 1
        with pytest.raises(RuntimeError):
            draw(Sampler(model, steps=STEPS, cuda_graph=True), [1, 2])
    assert torch.cuda.current_stream() == stream
    assert not graphs(sampler)
    torch.cuda.empty_cache()
    assert_same_bits("fallback", out, stepwise(model, [1, 2]))
    both(model, [1, 2], sampler)
    assert len(graphs(sampler)) == 1
    both(model, [3], other)
    train(model)


@pytest.mark.gpu
def test_out_of_memory_in_a_capture() -> None:
    """G11, G12: the allocator's own error. Single steps go on; the next call records; what was recorded is replayed."""
    run_alone(out_of_memory)


def not_permitted() -> None:
    model = make_model("cuda")
    stream = torch.cuda.current_stream()
    plain = DiT.forward_modulated

    def waiting(self: DiT, x: Tensor, modulations: Tensor) -> Tensor:
        out = plain(self, x, modulations)
        out.sum().item()
        return out

    with (
        patch.object(DiT, "forward_modulated", waiting),
        pytest.warns(UserWarning, match="recording a step failed: "),
    ):
        out = draw(Sampler(model, steps=STEPS), [1, 2])
    assert torch.cuda.current_stream() == stream
    assert_same_bits("fallback", out, stepwise(model, [1, 2]))


@pytest.mark.gpu
def test_a_capture_that_is_not_permitted() -> None:
    """G12: a step that waits for the device, after which CUDA refuses to end the capture, too."""
    run_alone(not_permitted)


@pytest.mark.gpu
def test_weights_from_another_stream() -> None:
    """G20."""
    model = make_model("cuda")
    sampler = Sampler(model, steps=STEPS, cuda_graph=True)
    both(model, [1, 2], sampler)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        torch.cuda._sleep(100_000_000)
        for parameter in model.parameters():
            parameter.mul_(1.1)
    torch.cuda.current_stream().wait_stream(side)
    both(model, [1, 2], sampler)


@pytest.mark.gpu
def test_other_threads_use_the_device() -> None:
    """G21: pinning of memory, and allocations, while a step is captured."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            torch.randn(1 << 12).pin_memory().to("cuda", non_blocking=True).sum().item()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for n in range(1, 5):
            both(make_model("cuda", seed=n), list(range(n)))
    finally:
        stop.set()
        thread.join()


@pytest.mark.gpu
def test_release_gives_the_memory_back() -> None:
    """G24."""
    model = make_model("cuda")
    both(model, [1, 2])
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # else kept for every stream that there ever was
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    sampler = Sampler(model, steps=STEPS, cuda_graph=True)
    for n in (8, 64):
        sampler(list(range(10)) * n, progress=False, batch_size=10 * n)
    sampler.release()
    del sampler
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + (4 << 20)


def most_memory(model: DiT, cuda_graph: bool, decode: Callable[[Tensor], Tensor]) -> int:
    """Bytes that the allocator held at most while images were drawn and decoded, beside what it held before."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # else kept for every stream that there ever was
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    sampler = Sampler(model, steps=STEPS, cuda_graph=cuda_graph)
    with torch.no_grad():
        decode(draw(sampler, [i % 10 for i in range(512)], batch_size=512))
    most = torch.cuda.max_memory_reserved() - before
    sampler.release()
    return most


@pytest.mark.gpu
def test_memory_left_for_a_decoder() -> None:
    """G24: a graph keeps what a block of single steps needs, and no more; all else can be decoded with."""
    model = make_model("cuda")
    decoder = nn.Sequential(
        nn.ConvTranspose2d(4, 64, 4, stride=4), nn.SiLU(), nn.Conv2d(64, 3, 3, padding=1)
    ).cuda()
    drawing = most_memory(model, False, lambda images: images)
    single = most_memory(model, False, decoder)
    by_graph = most_memory(model, True, decoder)
    assert single > drawing
    # The allocator takes large memory in pieces of 20 MiB: at most one begun in a graph's pool, and one beside it.
    assert by_graph <= single + drawing + (40 << 20)


class Devices:
    """Which CUDA device is the current one, where there is none; and at which something was done."""

    def __init__(self) -> None:
        self.current, self.stack, self.seen = 0, [0], []

    def note(self, *_: Any, **__: Any) -> Any:
        self.seen.append(self.current)
        return self

    wait_stream = replay = reset = note

    def device(self, device: torch.device) -> Devices:
        self.stack.append(device.index)
        return self

    def __enter__(self) -> Devices:
        self.current = self.stack[-1]
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.pop()
        self.current = self.stack[-1]


def test_the_device_of_the_model_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """G26: launches, captures and replays go to the current device, whatever their tensors say."""
    devices = Devices()
    for name in ("CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: devices)
    monkeypatch.setattr(graphs_module, "_stream", lambda _: devices)
    monkeypatch.setattr(torch.cuda, "device", devices.device)
    entered = nullcontext()
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: devices.note() and entered)
    monkeypatch.setattr(torch.cuda, "stream", lambda *_: entered)
    graph = CudaGraph(devices.note, devices.note, torch.device("cuda", 1))
    graph.replay()
    # Two waits, three warm-ups with a reset each, the capture and its one run, the replay.
    assert devices.seen == [1] * (2 + 2 * 3 + 2 + 1)
    assert devices.current == 0


def test_captures_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """To begin one waits for the whole device, which is not allowed while another thread captures."""
    for name in ("CUDAGraph", "current_stream", "device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(graphs_module, "_stream", MagicMock())
    first, second = threading.Event(), threading.Event()
    overlapped: list[bool] = []

    def waiting() -> None:
        if not first.is_set():
            first.set()
            overlapped.append(second.wait(0.5))

    def capture(function: Any) -> None:
        CudaGraph(function, lambda: None, torch.device("cuda", 0))

    threads = [threading.Thread(target=capture, args=(each,)) for each in (waiting, second.set)]
    overlap(threads, first)
    assert overlapped == [False]
    assert second.is_set()


@pytest.mark.gpu
def test_models_captured_in_several_threads() -> None:
    out: dict[tuple[int, int], Tensor] = {}

    def run(seed: int) -> None:
        for n in range(1, 5):
            sampler = Sampler(model[seed], steps=STEPS, cuda_graph=True)
            out[seed, n] = sampler([1] * n, progress=False)

    model = [make_model("cuda", seed=seed) for seed in range(4)]
    expected = {
        (seed, n): Sampler(model[seed], steps=STEPS, cuda_graph=False)([1] * n, progress=False)
        for seed in range(4)
        for n in range(1, 5)
    }
    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key, images in expected.items():
        assert_same_bits(f"{key}", out[key], images)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_model_on_another_device() -> None:
    """G26."""
    both(make_model("cuda:1"), [1, 2], cfg_scale=2.0)


@pytest.mark.parametrize("when", ["begin", "end"])
def test_a_capture_that_raises_leaves_the_callers_stream(
    monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """G12: torch does not go back to it where a capture cannot be begun, or, having been made invalid, not be ended."""
    for name in ("CUDAGraph", "device"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    side, callers = MagicMock(), MagicMock()
    current = [callers]

    @contextmanager
    def stream(to: Any) -> Iterator[None]:
        before, current[0] = current[0], to
        try:
            yield
        finally:
            current[0] = before

    @contextmanager
    def graph(*_: Any, stream: Any, **__: Any) -> Iterator[None]:
        current[0] = stream
        if when == "begin":
            raise RuntimeError("out of memory")
        yield
        raise RuntimeError("invalid")

    monkeypatch.setattr(graphs_module, "_stream", lambda *_: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current[0])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(RuntimeError):
        CudaGraph(lambda: None, lambda: None, torch.device("cuda", 0))
    assert current == [callers]
