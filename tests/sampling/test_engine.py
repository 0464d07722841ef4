"""The engine: a recording gives the same bits as single steps, whatever changes between the calls."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastdit import DiT, Sampler, create_diffusion, sample
from fastdit.sampling import engine as engine_module
from fastdit.sampling.engine import CHUNK, Engine
from fastdit.sampling.graphs import contents
from fastdit.sampling.sample import _turn
from fastdit.sampling.samplers import make_steps
from fastdit.testing import assert_close, assert_same_bits, assert_trajectory_close

from .helpers import STEPS, device_of, draw, graphs, make_model, overlap, stepwise
from .recording import NoSync, Recording

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def model() -> DiT:
    return make_model()


# ------------------------------------------------------------------ recordings and single steps


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes", [{}, {"in_channels": 1, "input_size": (4, 8)}, {"depth": 1, "num_classes": 3}]
)
def test_the_same_bits(
    recordings: list[Recording], changes: dict[str, Any], dtype: torch.dtype, cfg_scale: float
) -> None:
    """Three calls one after the other, with other seeds, labels and weights."""
    model = make_model(**changes).to(dtype)
    sampler = Sampler(model, steps=STEPS)
    for call in range(3):
        labels = [(call + i) % 3 for i in range(2)]
        options = {"seed": call, "cfg_scale": cfg_scale}
        assert_same_bits(
            f"{call}", draw(sampler, labels, **options), stepwise(model, labels, **options)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    (recording,) = recordings
    assert recording.replays == 3 * STEPS


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 0.5},
        {"sampler": "dpm++"},
        {"guidance_interval": (0.2, 0.7)},
        {"cfg_channels": "all"},
    ],
)
@pytest.mark.parametrize("conditioning", ["adaln_zero", "in_context"])
def test_the_same_bits_in_every_mode(
    recordings: list[Recording], options: dict[str, Any], conditioning: str
) -> None:
    model = make_model(conditioning=conditioning)
    sampler = Sampler(model, steps=STEPS, **options)
    for seed in (1, 2):
        out = draw(sampler, [1, 2, 3], seed=seed)
        assert_same_bits(str(options), out, stepwise(model, [1, 2, 3], seed=seed, **options))
    assert len(recordings) == (2 if "guidance_interval" in options else 1)


def test_more_steps_than_lie_ready(recordings: list[Recording], model: DiT) -> None:
    steps = 2 * CHUNK + 3
    out = draw(Sampler(model, steps=steps), [1, 2], seed=4)
    assert_same_bits("images", out, stepwise(model, [1, 2], seed=4, steps=steps))


def test_a_small_table(
    recordings: list[Recording], model: DiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is short fewer modulations lie ready, within what rounding leaves."""
    expected = stepwise(model, [1, 2, 3], seed=4)
    monkeypatch.setattr(engine_module, "TABLE_BYTES", 1)
    for cuda_graph in (False, "auto"):
        out = draw(Sampler(model, steps=STEPS, cuda_graph=cuda_graph), [1, 2, 3], seed=4)
        assert_trajectory_close("images", out[None], expected[None])


def test_numbers_are_not_baked_in(device: str) -> None:
    """Guidance, labels, seeds: all of them reach a recording that is there already (G6, G8)."""
    model = make_model(device)
    sampler = Sampler(model, steps=STEPS, cuda_graph=True)
    for options in (
        {"cfg_scale": 2.0},
        {"cfg_scale": 5.0},
        {"cfg_scale": torch.tensor([1.0, 3.0])},
        {"seed": 7},
        {"seed": [7, 8]},
    ):
        out = draw(sampler, [1, 2], **options)
        assert_same_bits(str(options), out, stepwise(model, [1, 2], **options))
    assert_same_bits("labels", draw(sampler, [5, 9]), stepwise(model, [5, 9]))
    assert len(graphs(sampler)) == 1


def test_other_dtypes_and_no_guidance_between_the_calls(device: str) -> None:
    """G8: what was recorded for one is not replayed for the other, to and fro."""
    model = make_model(device)
    sampler = Sampler(model, steps=STEPS, cuda_graph=True)
    for dtype, cfg_scale in [
        (torch.float32, 2.0),
        (torch.float32, 1.0),
        (torch.bfloat16, 1.0),
        (torch.bfloat16, 2.0),
        (torch.float32, 2.0),
        (torch.float32, 1.0),
    ]:
        model.to(dtype)
        out = draw(sampler, [1, 2], cfg_scale=cfg_scale)
        expected = stepwise(model, [1, 2], cfg_scale=cfg_scale)
        assert_same_bits(f"{dtype}, {cfg_scale}", out, expected)


def test_results_are_never_the_memory_of_a_graph(device: str) -> None:
    """G9."""
    model = make_model(device)
    sampler = Sampler(model, steps=STEPS, cuda_graph=True)
    first = draw(sampler, [1, 2], seed=1)
    kept = first.clone()
    draw(sampler, [3, 4], seed=2)
    assert_same_bits("first", first, kept)
    first.fill_(torch.nan)
    assert_same_bits("third", draw(sampler, [1, 2], seed=1), kept)
    whole = draw(sampler, [1, 2, 3, 4], batch_size=2)
    blocks = list(sampler.blocks([1, 2, 3, 4], batch_size=2, progress=False))
    assert_same_bits("blocks", torch.cat([images for _, images in blocks]), whole)


def replace_layer(model: DiT) -> None:
    model.blocks[0].attn.qkv = make_model(device_of(model), 5).blocks[0].attn.qkv


def replace_data(model: DiT) -> None:
    model.blocks[1].mlp.fc1.weight.data = torch.randn_like(model.blocks[1].mlp.fc1.weight)


def assign(model: DiT) -> None:
    model.load_state_dict(make_model(device_of(model), 6).state_dict(), assign=True)


def in_place(model: DiT) -> None:
    model.load_state_dict(make_model(device_of(model), 7).state_dict())


def other_dtype(model: DiT) -> None:
    model.double()
    model.float()


def lora(model: DiT) -> None:
    inner = model.blocks[0].attn.proj
    model.blocks[0].attn.proj = nn.Sequential(
        inner, nn.Linear(inner.out_features, inner.out_features, device=device_of(model))
    )


@pytest.mark.parametrize(
    "change", [replace_layer, replace_data, assign, in_place, other_dtype, lora]
)
def test_replaced_weights_are_noticed(device: str, change: Callable[[DiT], None]) -> None:
    """G14, G16."""
    model = make_model(device)
    sampler = Sampler(model, steps=STEPS, cuda_graph=True)
    draw(sampler, [1, 2])
    change(model)
    assert_same_bits(change.__name__, draw(sampler, [1, 2]), stepwise(model, [1, 2]))


@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_were_loaded_in_part(device: str, assign: bool) -> None:
    """G16: what was loaded before the error is what is sampled."""
    model = make_model(device)
    sampler = Sampler(model, steps=STEPS, cuda_graph=True)
    before = draw(sampler, [1, 2])
    state = make_model(device, 6).state_dict()
    state["blocks.1.mlp.fc2.weight"] = state["blocks.1.mlp.fc2.weight"][:1]
    with pytest.raises(RuntimeError, match=r"size mismatch for blocks\.1\.mlp\.fc2\.weight"):
        model.load_state_dict(state, assign=assign)
    out = draw(sampler, [1, 2])
    assert_same_bits("images", out, stepwise(model, [1, 2]))
    assert not torch.equal(out, before)


@contextmanager
def borrowed(model: DiT, weights: dict[str, Tensor]) -> Iterator[None]:
    """As averages are swapped in for a while."""
    own = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = own[name]


def test_a_swap_that_raises_and_is_undone(device: str) -> None:
    """G16: in the middle of the swap, and in what is done with the other weights."""
    model = make_model(device)
    sampler = Sampler(model, steps=STEPS, cuda_graph=True)
    before = draw(sampler, [1, 2])
    weights = dict(make_model(device, 6).state_dict())

    def broken() -> None:
        out = draw(sampler, [1, 2])
        assert_same_bits("swapped", out, stepwise(model, [1, 2]))
        assert not torch.equal(out, before)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), borrowed(model, weights):
        broken()
    assert_same_bits("undone", draw(sampler, [1, 2]), before)
    del weights["blocks.1.mlp.fc2.weight"]
    with pytest.raises(KeyError), borrowed(model, weights):
        pass
    assert_same_bits("never done", draw(sampler, [1, 2]), before)
    assert_same_bits("single steps", before, stepwise(model, [1, 2]))


class Adapters(nn.Module):
    """As in peft: adapters are switched by a flag, and all of them stay."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.active = base, ["a"]
        self.adapters = nn.ModuleDict(
            {name: nn.Linear(base.in_features, base.out_features) for name in "ab"}
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        for name in self.active:
            out = out + self.adapters[name](x)
        return out


def other_adapter(model: DiT) -> None:
    model.blocks[0].attn.proj.active = ["b"]


def no_adapter(model: DiT) -> None:
    model.blocks[0].attn.proj.active.clear()


def swapped_adapters(model: DiT) -> None:
    adapters = model.blocks[0].attn.proj.adapters
    adapters["a"], adapters["b"] = adapters["b"], adapters["a"]


def other_activation(model: DiT) -> None:
    model.blocks[0].mlp.act = nn.ReLU()


def other_forward(model: DiT) -> None:
    act = model.blocks[0].mlp.act
    act.forward = torch.relu


def other_residual_dtype(model: DiT) -> None:
    model.residual_dtype = torch.float64


def other_scale(model: DiT) -> None:
    model.blocks[1].attn.scale *= 3


def other_attention(model: DiT) -> None:
    model.set_attention("reference")


def other_use_of_a_block(model: DiT) -> None:
    model.blocks[2] = model.blocks[1]


@pytest.mark.parametrize(
    "change",
    [
        other_adapter,
        no_adapter,
        swapped_adapters,
        other_activation,
        other_forward,
        other_residual_dtype,
        other_scale,
        other_attention,
        other_use_of_a_block,
    ],
)
def test_changes_beside_the_weights_are_noticed(device: str, change: Callable[[DiT], None]) -> None:
    """G14."""
    model = make_model(device, depth=3)
    model.blocks[0].attn.proj = Adapters(model.blocks[0].attn.proj).to(device)
    model.blocks[2] = model.blocks[0]
    sampler = Sampler(model, steps=STEPS, cuda_graph=True)
    draw(sampler, [1, 2])
    draw(sampler, [3, 4])
    (first,) = graphs(sampler)
    change(model)
    assert_same_bits(change.__name__, draw(sampler, [1, 2]), stepwise(model, [1, 2]))
    assert len(graphs(sampler)) == 2
    assert graphs(sampler)[0] is first


@pytest.mark.parametrize(
    ("switch", "value"),
    [(torch.backends.cuda.matmul, "tf32"), (torch.backends.cudnn.conv, "ieee")],
)
def test_another_precision_is_noticed(
    recordings: list[Recording], model: DiT, switch: Any, value: str
) -> None:
    """Also set by name, after which torch refuses to tell the precision in the older way."""
    sampler = Sampler(model, steps=STEPS)
    draw(sampler, [1])
    before = switch.fp32_precision
    assert before != value
    switch.fp32_precision = value
    try:
        draw(sampler, [1])
    finally:
        switch.fp32_precision = before
    assert len(recordings) == 2
    draw(sampler, [1])
    assert len(recordings) == 2


def test_a_module_that_is_gone_is_not_taken_for_a_new_one(model: DiT) -> None:
    """Python gives the number of an object that is gone to the next one."""
    seen = []
    for _ in range(4):
        model.blocks[0].mlp.act = nn.GELU(approximate="tanh")
        seen.append(contents(model))
        assert seen[-1] == contents(model)
    assert all(one != other for one, other in itertools.combinations(seen, 2))


def test_every_parameter_is_read(device: str) -> None:
    """Changed in place, one at a time: no copy of any weight is kept (G15)."""
    model = make_model(device, depth=1)
    sampler = Sampler(model, steps=STEPS, cuda_graph=True)
    draw(sampler, [1])
    (first,) = graphs(sampler)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.add_(0.01)
        assert_same_bits(name, draw(sampler, [1]), stepwise(model, [1]))
    assert graphs(sampler) == [first]


def test_hooks_are_called(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """G22: a replay would pass them over."""
    model = make_model(device)
    sampler = Sampler(model, steps=STEPS)
    draw(sampler, [1])
    (graph,) = graphs(sampler)
    seen: list[int] = []
    handle = model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match=r"without CUDA graphs: blocks\.0 has hooks"):
        draw(sampler, [1])
    assert len(seen) == STEPS
    handle.remove()
    replay, replays = graph.replay, []
    monkeypatch.setattr(graph, "replay", lambda: replays.append(replay()))
    draw(sampler, [1])
    assert len(replays) == STEPS
    model.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"cuda_graph=True: blocks\.0 has hooks"):
        sample(model, [1], steps=STEPS, cuda_graph=True, progress=False)


def test_offloaded_weights(device: str) -> None:
    """G22: they are there while their layer is called, each time at another place; said once, and not for each call."""
    model = make_model(device)
    expected = stepwise(model, [1, 2])
    sampler = Sampler(model, steps=STEPS)
    assert_same_bits("before", draw(sampler, [1, 2]), expected)
    mlp = model.blocks[1].mlp
    kept = mlp.fc1.weight.detach().cpu().clone()

    def load(*_: Any) -> None:
        mlp.fc1.weight.data = kept.to(device, copy=True)

    def offload(*_: Any) -> None:
        mlp.fc1.weight.data.fill_(torch.nan)  # whoever still reads it draws NaN
        mlp.fc1.weight.data = torch.empty(0, device=device)

    offload()
    mlp.fc1.register_forward_pre_hook(load)
    mlp.fc2.register_forward_pre_hook(offload)
    with pytest.warns(UserWarning, match="without CUDA graphs") as said:
        out = [draw(sampler, [1, 2]) for _ in range(3)]
    assert [str(each.message) for each in said] == [
        "fastdit: sampling without CUDA graphs: blocks.1.mlp.fc1 has hooks, which a replay would pass over"
    ]
    for images in out:
        assert_same_bits("single steps", images, stepwise(model, [1, 2]))
    assert_trajectory_close("without hooks", out[0][None], expected[None])


def test_the_number_of_recordings_is_bounded(recordings: list[Recording], model: DiT) -> None:
    """G25; and all are let go together (G13)."""
    sampler = Sampler(model, steps=STEPS, largest_number_of_graphs=3)
    for n in range(1, 9):
        out = draw(sampler, [1] * n)
        assert_same_bits(f"{n}", out, stepwise(model, [1] * n))
        assert sum(not one.released for one in recordings) <= 3
    sampler.release()
    assert all(one.released for one in recordings)
    assert_same_bits("after", draw(sampler, [1]), stepwise(model, [1]))


def test_a_failed_recording_falls_back(recordings: list[Recording], model: DiT) -> None:
    """G11, G12."""
    Recording.fail = True
    sampler = Sampler(model, steps=STEPS)
    with pytest.warns(UserWarning, match="recording a step failed: out of memory"):
        out = draw(sampler, [1, 2])
    assert_same_bits("fallback", out, stepwise(model, [1, 2]))
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(model, [1], steps=STEPS, cuda_graph=True, progress=False)
    Recording.fail = False
    assert_same_bits("after", draw(sampler, [1, 2]), stepwise(model, [1, 2]))
    assert len(recordings) == 1


def test_stopped_in_the_middle(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """G28: Ctrl-C at any step leaves nothing that the next call would see."""
    model = make_model(device)
    sampler = Sampler(model, steps=STEPS, cuda_graph=True)
    draw(sampler, [1, 2])
    (graph,) = graphs(sampler)
    replay, calls = graph.replay, []

    def interrupted() -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        replay()

    monkeypatch.setattr(graph, "replay", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(sampler, [3, 4])
    assert_same_bits("next", draw(sampler, [1, 2]), stepwise(model, [1, 2]))
    assert len(calls) == 4 + STEPS


def test_threads_take_turns(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """G29: one engine, one recording, and no thread ends the eval mode that another one draws in."""
    made: list[Any] = []
    record = Engine.capture.__init__

    def counting(graph: Any, *args: Any) -> None:
        made.append(graph)
        record(graph, *args)

    def slowly(*args: Any) -> Any:
        time.sleep(0.05)  # so that all threads are in here together, unless they take turns
        return make_steps(*args)

    monkeypatch.setattr(sys.modules[Sampler.__module__], "make_steps", slowly)
    monkeypatch.setattr(Engine.capture, "__init__", counting)
    model = make_model(device)
    sampler = Sampler(model, steps=STEPS, cuda_graph=True)
    expected = [stepwise(model, [i, i + 1], seed=i) for i in range(4)]
    out: dict[int, Tensor] = {}
    model.train()

    def run(i: int) -> None:
        out[i] = draw(sampler, [i, i + 1], seed=i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert_same_bits(f"thread {i}", out[i], expected[i])
    assert made == graphs(sampler)
    assert len(made) == 1
    assert model.training


def test_samplers_of_one_model_take_turns(monkeypatch: pytest.MonkeyPatch, model: DiT) -> None:
    """Eval mode is the model's: who ends first would end it for the others."""
    first, second = threading.Event(), threading.Event()
    overlapped: list[bool] = []
    plain = DiT.forward_modulated

    def waiting(self: DiT, x: Tensor, modulations: Tensor) -> Tensor:
        if threading.current_thread().name == "second":
            second.set()
        elif not first.is_set():
            first.set()
            overlapped.append(second.wait(0.5))
        assert not self.training
        return plain(self, x, modulations)

    expected = stepwise(model, [1, 2])
    model.train()
    monkeypatch.setattr(DiT, "forward_modulated", waiting)
    out: dict[str, Tensor] = {}

    def run(name: str) -> None:
        out[name] = stepwise(model, [1, 2])

    threads = [threading.Thread(target=run, args=(name,), name=name) for name in ("one", "second")]
    overlap(threads, first)
    assert overlapped == [False]
    for name in ("one", "second"):
        assert_same_bits(name, out[name], expected)
    assert model.training


def test_interrupted_on_the_way_to_eval_mode(model: DiT) -> None:
    model.train()
    model.blocks[1].eval()
    flags = [module.training for module in model.modules()]

    def interrupted() -> None:
        model.blocks[0].eval()
        raise KeyboardInterrupt

    model.eval = interrupted  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        stepwise(model, [1])
    assert [module.training for module in model.modules()] == flags


def pickled(sampler: Sampler) -> Any:
    return pickle.loads(pickle.dumps(sampler))  # noqa: S301


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickled])
def test_copies(
    recordings: list[Recording], model: DiT, copied: Callable[[Sampler], Sampler]
) -> None:
    """With the model's values and nothing recorded."""
    sampler = Sampler(model, steps=STEPS, sampler="dpm++")
    expected = draw(sampler, [1, 2])
    other = copied(sampler)
    assert_same_bits("the copy", draw(other, [1, 2]), expected)
    assert len(recordings) == 2
    other.release()
    assert [one.released for one in recordings] == [False, True]
    assert_same_bits("the first", draw(sampler, [1, 2]), expected)


def test_few_steps_are_not_worth_one(recordings: list[Recording], model: DiT) -> None:
    sample(model, [1], steps=3, progress=False)
    assert not recordings
    out = sample(model, [1], steps=3, progress=False, cuda_graph=True)
    assert_same_bits("three", out, stepwise(model, [1], steps=3))
    assert len(recordings) == 1


def test_on_the_cpu_there_are_none(model: DiT) -> None:
    with pytest.raises(ValueError, match="cuda_graph=True: the model is on cpu"):
        sample(model, [1], steps=STEPS, cuda_graph=True, progress=False)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("conditioning", ["adaln_zero", "cross_attention"])
def test_a_step_waits_for_nothing(sampler: Any, conditioning: str, guided: bool) -> None:
    """G7: no number is read back from the device, none is sent there."""
    model = make_model(conditioning=conditioning)
    whole = Sampler(model, steps=4, sampler=sampler)._engine(CPU, torch.float32)
    labels = torch.tensor([1, 2])
    scale = torch.tensor([2.0, 2.0]) if guided else None
    with torch.no_grad():
        buffers = whole._allocate(labels, scale, conditioning == "adaln_zero", torch.float32)
        whole._to_first_step(buffers)
        with NoSync():
            whole._step(buffers, guided)
    assert buffers.step.item() == 2


# ------------------------------------------------------------------ the numbers


class GivenNoise:
    def __init__(self, start: Tensor, steps: Tensor) -> None:
        self.first, self.steps, self.next = start, steps, 0

    def start(self) -> Tensor:
        return self.first

    def step(self, out: Tensor) -> None:
        out.copy_(self.steps[self.next])
        self.next += 1


@pytest.mark.parametrize("kind", ["ddpm10_cfg4", "ddim10"])
@pytest.mark.parametrize("recorded", [False, True])
def test_golden_trajectories(
    kind: str, recorded: bool, recordings: list[Recording], golden_weights: dict[str, Tensor]
) -> None:
    """The original's own states, from its own noise."""
    config = json.loads((GOLDEN / "tiny_dit.config.json").read_text())
    model = DiT(**config).eval()
    model.load_state_dict(golden_weights)
    golden = load_file(GOLDEN / f"tiny_dit.{kind}.safetensors")
    guided = kind.startswith("ddpm")
    diffusion = create_diffusion("10" if guided else "ddim10")
    steps = make_steps(diffusion, "ddpm" if guided else "ddim", 0.0, CPU, torch.float32)
    count = len(golden["z"]) // 2 if guided else len(golden["z"])
    engine = Engine(
        model,
        steps,
        cfg_channels=3,
        guided=[True] * 10,
        cuda_graph="auto" if recorded else False,
        largest_number_of_graphs=1,
    )
    states: list[Tensor] = []
    with torch.no_grad():
        engine.block(
            golden["y"][:count],
            torch.full((count,), 4.0) if guided else None,
            GivenNoise(golden["z"][:count], golden["noise"][:, :count]),
            torch.float32,
            tqdm(disable=True),
            states,
        )
    assert len(recordings) == recorded
    assert_trajectory_close(kind, torch.stack(states[1:]), golden["trajectory"][:, :count])


@pytest.mark.parametrize("conditioning", ["adaln", "adaln_zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modulations_are_those_of_every_step(
    conditioning: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed once for many steps, or by the model itself in every step: equal within N1, against float64."""
    model = make_model(conditioning=conditioning).to(dtype)
    exact = copy.deepcopy(model).double()
    seen: list[tuple[Tensor, Tensor]] = []
    plain = DiT.forward_modulated

    def noting(self: DiT, x: Tensor, modulations: Tensor) -> Tensor:
        seen.append((x, plain(self, x, modulations)))
        return seen[-1][1]

    monkeypatch.setattr(DiT, "forward_modulated", noting)
    stepwise(model, [2, 1, 2], steps=CHUNK + 2, cfg_scale=2.0)
    y = torch.tensor([2, 1, 2, 10, 10, 10])
    timesteps = reversed(create_diffusion(str(CHUNK + 2)).timestep_map)
    with torch.no_grad():
        for (x, out), timestep in zip(seen, timesteps, strict=True):
            t = torch.full_like(y, timestep)
            assert_close(
                f"t={timestep}",
                out,
                exact.forward_tokens(x.double(), t, y),
                model.forward_tokens(x, t, y),
            )


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_dpm_solver_is_of_second_order(spread: float) -> None:
    """Data that are normal with standard deviation s: the flow keeps x / sqrt(abar s² + 1 - abar), in closed form."""
    errors = []
    for steps in (80, 160, 320):
        diffusion = create_diffusion(str(steps), learn_sigma=False, diffusion_steps=4000)
        update = make_steps(diffusion, "dpm++", 0.0, CPU, torch.float64).update
        abar = torch.from_numpy(diffusion.alphas_cumprod)
        variance = abar * spread**2 + 1 - abar
        x = torch.full((1, 1, 1, 1), 1.7, dtype=torch.float64)
        start, memory = x.clone(), torch.zeros_like(x)
        for i in range(steps - 1, 0, -1):  # the last step, to sigma = 0, is of first order
            eps = (1 - abar[i]).sqrt() * x / variance[i]
            x = update(eps.reshape(1, 1, 1), x, None, memory, torch.tensor([i]), patch_size=1)
        exact = start * (variance[0] / variance[-1]).sqrt()
        errors.append((x - exact).abs().item())
    # Halving the steps' length divides the error by four, and not by two.
    assert errors[0] / errors[1] > 3.5
    assert errors[1] / errors[2] > 3.5


def test_guidance_interval(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    plain = DiT.forward_modulated

    def counting(self: DiT, x: Tensor, modulations: Tensor) -> Tensor:
        counts.append(len(x))
        return plain(self, x, modulations)

    monkeypatch.setattr(DiT, "forward_modulated", counting)
    # Timesteps 0, 111, 222, ... 999, from the last on.
    draw_one = {"steps": 10, "progress": False, "cfg_scale": 3.0}
    some = sample(model, [1], guidance_interval=(0.3, 0.7), **draw_one)
    assert counts == [1, 1, 1, 2, 2, 2, 2, 1, 1, 1]
    every = sample(model, [1], guidance_interval=(0, 1), **draw_one)
    assert_same_bits("all", every, sample(model, [1], **draw_one))
    none = sample(model, [1], guidance_interval=(0.05, 0.06), **draw_one)
    unguided = sample(model, [1], steps=10, progress=False, cfg_scale=1.0)
    assert_trajectory_close("none", none[None], unguided[None])
    assert not torch.equal(some, every)


@pytest.mark.parametrize(
    ("interval", "error"),
    [
        ((0.5, 0.2), ValueError),
        ((-0.1, 0.2), ValueError),
        ((0.1, 1.2), ValueError),
        ((0.1, float("nan")), ValueError),
        (0.5, TypeError),
        ((0.1,), TypeError),
    ],
)
def test_bad_intervals(model: DiT, interval: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="guidance_interval"):
        sample(model, [1], steps=2, guidance_interval=interval)


# ------------------------------------------------------------------ noise


def test_images_with_their_own_seeds(model: DiT) -> None:
    """An image depends on its seed and nothing beside it."""
    together = stepwise(model, [1, 2, 3], seed=[5, 6, 7])
    for i, seed in enumerate([5, 6, 7]):
        alone = stepwise(model, [i + 1], seed=torch.tensor([seed]), batch_size=1)
        assert_trajectory_close(f"image {i}", together[None, i : i + 1], alone[None])
    other = stepwise(model, [1, 2, 3], seed=[5, 6, 8])
    assert not torch.equal(other[2], together[2])
    with pytest.raises(ValueError, match="seed: 2 for 3 labels"):
        stepwise(model, [1, 2, 3], seed=[5, 6])


def test_a_generator(model: DiT) -> None:
    """Draws as the original does: x_T, then the noise of every step."""
    drawn = [stepwise(model, [1, 2], generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert_same_bits("again", *drawn)
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn(2, 4, 4, 4, generator=generator) for _ in range(STEPS + 1)]
    diffusion = create_diffusion(str(STEPS))
    with torch.no_grad():
        expected = diffusion.p_sample_loop(
            lambda x, t: model.forward_with_cfg(
                torch.cat([x, x]), torch.cat([t, t]), torch.tensor([1, 2, 10, 10]), 1.5
            )[:2],
            (2, 4, 4, 4),
            noise[0],
            clip_denoised=False,
            step_noise=torch.stack(noise[1:]),
        )
    assert_trajectory_close("loop", drawn[0][None], expected[None])
    with pytest.raises(ValueError, match="seed=3 and a generator"):
        stepwise(model, [1], seed=3, generator=generator)


def test_a_generator_of_another_device(device: str) -> None:
    """G8."""
    model = make_model("meta" if device == "cpu" else device)
    found = "meta" if device == "cpu" else "cuda:0"
    with pytest.raises(ValueError, match=f"generator: is on cpu, the model on {found}$"):
        sample(model, [1], steps=STEPS, generator=torch.Generator(), progress=False)


def test_trajectory(model: DiT) -> None:
    images, states = sample(
        model, [1, 2, 3], steps=5, batch_size=2, return_trajectory=True, progress=False
    )
    assert states.shape == (6, 3, 4, 4, 4)
    assert_same_bits("last", states[-1], images)
    assert len({state.sum().item() for state in states}) == 6
    images, states = sample(model, [], steps=5, return_trajectory=True, progress=False)
    assert (len(images), states.shape) == (0, (6, 0, 4, 4, 4))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sampler": "euler"}, ValueError, "sampler='euler'"),
        ({"sampler": "dpm++", "eta": 0.5}, ValueError, "eta=0.5"),
        ({"cuda_graph": "maybe"}, ValueError, "cuda_graph='maybe'"),
        ({"generator": [torch.Generator()]}, TypeError, "generator=.*expected a torch.Generator"),
        ({"seed": "7"}, TypeError, "seed='7'"),
        ({"seed": [1, -1]}, ValueError, "seed=-1"),
        ({"seed": [True, 2]}, TypeError, "seed=True"),
        ({"steps": 0, "sampler": "dpm++"}, ValueError, "steps=0"),
    ],
)
def test_bad_options(
    model: DiT, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sample(model, [1, 2], **({"steps": 2, "progress": False} | options))


def test_few_steps_of_every_sampler(model: DiT) -> None:
    for sampler in ("ddpm", "ddim", "dpm++"):
        for steps in (1, 2, 3):
            out = sample(model, [1], steps=steps, sampler=sampler, progress=False)
            assert out.isfinite().all()


def test_a_compiled_model(device: str) -> None:
    """G30: it is called as it is."""
    model = make_model(device)
    compiled = torch.compile(model, backend="eager")
    out = sample(compiled, [1, 2], steps=STEPS, progress=False)
    expected = stepwise(model, [1, 2])
    assert_trajectory_close("compiled", out[None], expected[None])
    assert _turn(compiled) is _turn(model)


@pytest.fixture
def one_process() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_wrapped_models(device: str) -> None:
    """G30: out of a wrapper, which hides what it is, a model has to be taken; there it is recorded as any other."""
    model = make_model(device).train()
    wrapped = nn.parallel.DistributedDataParallel(model)
    for wrapper in (wrapped, nn.DataParallel(model)):
        name = type(wrapper).__name__
        with pytest.raises(
            TypeError, match=rf"^model: a {name} has no in_channels; pass model\.module$"
        ):
            sample(wrapper, [1])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sampler = Sampler(wrapped.module, steps=STEPS, cuda_graph=True)
    size = model.input_size
    for call in range(2):
        out = draw(sampler, [1, 2], seed=call)
        assert_same_bits("images", out, stepwise(model, [1, 2], seed=call))
        t = torch.tensor([3, 500], device=device)
        wrapped(torch.randn(2, 4, *size, device=device), t, t % 10).square().mean().backward()
        optimizer.step()
        assert model.training
    assert len(graphs(sampler)) == 1


def test_weights_that_accelerate_offloads(device: str) -> None:
    """G22: it replaces `forward`, and marks the module with `_hf_hook`; a replay would pass that over, too."""
    model = make_model(device)
    sampler = Sampler(model, steps=STEPS)
    draw(sampler, [1, 2])
    layer = model.blocks[1].mlp.fc1
    kept, plain = layer.weight.detach().cpu().clone(), layer.forward

    def forward(x: Tensor) -> Tensor:
        layer.weight.data = kept.to(device, copy=True)
        out = plain(x)
        layer.weight.data = torch.empty(0, device=device)
        return out

    layer.forward, layer._hf_hook = forward, object()
    with pytest.warns(UserWarning, match=r"without CUDA graphs: blocks\.1\.mlp\.fc1 has hooks"):
        draw(sampler, [1, 2])
    kept *= 1.5
    assert_same_bits("images", draw(sampler, [1, 2]), stepwise(model, [1, 2]))
