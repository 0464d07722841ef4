from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdit
from fastdit.ops.adamw_ema import adamw_ema_
from fastdit.reference import adamw_ema as reference
from fastdit.testing import Guarded, assert_close, assert_same_bits, layouts, poisoned_memory

from .helpers import both_ways, draw, every_way, kernels_only, need_memory

MODULE = importlib.import_module("fastdit.ops.adamw_ema")
OPERATOR = torch.ops.fastdit.adamw_ema_.default

Lists = list[Tensor]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
DECAYS = [0.9, 0.3, 0.0]  # both sides of where a lerp changes its form, and its end

GRAD_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_grad_dtype = pytest.mark.parametrize(
    "grad_dtype", GRAD_DTYPES, ids=lambda d: str(d).removeprefix("torch.")
)
# A program goes over 4096 values: around that, several of them, few values, none, and lists of all of these.
SIZES = [
    [(1,)],
    [(3,)],
    [(17,)],
    [(4095,)],
    [(4096,)],
    [(4097,)],
    [(100, 100)],
    [(0,)],
    [],
    [(3, 5), (0, 4), (4097,), (), (2, 32)],
]
each_sizes = pytest.mark.parametrize("shapes", SIZES, ids=str)


@dataclass
class State:
    """Everything that a step changes."""

    params: Lists
    exp_avgs: Lists
    exp_avg_sqs: Lists
    step: Tensor
    emas: list[Lists]
    copies: Lists | None = None

    def all(self) -> dict[str, Lists]:
        lists = {
            "params": self.params,
            "exp_avgs": self.exp_avgs,
            "exp_avg_sqs": self.exp_avg_sqs,
            "step": [self.step],
            "copies": self.copies or [],
        }
        return lists | {f"emas[{i}]": ema for i, ema in enumerate(self.emas)}

    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        """The same, with every tensor but the step changed."""

        def each(tensors: Lists) -> Lists:
            return [change(t) for t in tensors]

        return State(
            each(self.params),
            each(self.exp_avgs),
            each(self.exp_avg_sqs),
            self.step.clone(),
            [each(ema) for ema in self.emas],
            None if self.copies is None else each(self.copies),
        )

    def clone(self) -> State:
        return self.map(Tensor.clone)


def first_state(
    shapes: Sequence[tuple[int, ...]], emas: int = 0, copies: torch.dtype | None = None
) -> State:
    """Before the first step: an average is a copy of the weights and the moments are zero."""
    params = [draw(*shape) for shape in shapes]
    return State(
        params,
        [torch.zeros_like(p) for p in params],
        [torch.zeros_like(p) for p in params],
        torch.zeros(()),
        [[p.clone() for p in params] for _ in range(emas)],
        None if copies is None else [torch.zeros_like(p, dtype=copies) for p in params],
    )


def later_state(
    shapes: Sequence[tuple[int, ...]], emas: int = 1, copies: torch.dtype | None = None
) -> State:
    """In the midst of a training, nothing zero."""
    state = first_state(shapes, emas, copies)
    state.step.fill_(7)
    for tensors in (*state.emas, state.exp_avgs):
        for t in tensors:
            t.copy_(torch.randn_like(t))
    for t in state.exp_avg_sqs:
        t.copy_(torch.rand_like(t))
    return state


def draw_like(params: Lists, dtype: torch.dtype = torch.float32) -> Lists:
    return [torch.randn_like(p).to(dtype) for p in params]


def run(function: Callable[..., None], state: State, grads: Lists, **options: Any) -> None:
    function(
        state.params,
        grads,
        state.exp_avgs,
        state.exp_avg_sqs,
        state.step,
        **{**OPTIONS, **options},
        emas=state.emas,
        ema_decays=DECAYS[: len(state.emas)],
        copies=state.copies,
    )


def torch_steps(state: State, steps: list[Lists], clip: float | None, **options: Any) -> None:
    """What plain torch does: AdamW, one tensor after the other, and the averages as `fastdit.training` has them."""
    weights = [torch.nn.Parameter(p) for p in state.params]
    optimizer = torch.optim.AdamW(weights or [torch.zeros(1)], foreach=False, **OPTIONS | options)
    for grads in steps:
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.float() if clip is None else grad.float() * clip
        optimizer.step()
        for ema, decay in zip(state.emas, DECAYS, strict=False):
            if ema:
                torch._foreach_lerp_(ema, [w.detach() for w in weights], 1 - decay)
    for i, weight in enumerate(weights):
        state.params[i] = weight.detach()
        state.exp_avgs[i] = optimizer.state[weight]["exp_avg"]
        state.exp_avg_sqs[i] = optimizer.state[weight]["exp_avg_sq"]
    state.step += len(steps)


def assert_state_close(out: State, exact: State, plain: State) -> None:
    """N1 and N2 over all values of a list; copies are the weights, rounded."""
    assert out.step == exact.step == plain.step
    for name, tensors in out.all().items():
        if tensors and name not in ("step", "copies"):
            values = (
                torch.cat([t.reshape(-1) for t in state.all()[name]])
                for state in (out, exact, plain)
            )
            assert_close(name, *values)
    for i, copy in enumerate(out.copies or []):
        assert_same_bits(f"copies[{i}]", copy, out.params[i].to(copy.dtype))


def assert_same_state(case: str, out: State, expected: State) -> None:
    for name, tensors in expected.all().items():
        for i, (found, same) in enumerate(zip(out.all()[name], tensors, strict=True)):
            assert_same_bits(f"{case}: {name}[{i}]", found, same)


def compare(
    state: State, steps: list[Lists], *, clip: float | None = None, **options: Any
) -> State:
    """`state` after these steps, held against float64 and against torch.optim.AdamW."""
    exact = state.map(Tensor.double)
    plain = replace(state.clone(), copies=None)
    for grads in steps:
        run(adamw_ema_, state, grads, clip=clip, **options)
        wide = [grad.double() for grad in grads]
        run(reference.adamw_ema_, exact, wide, clip=clip, **options)
    torch_steps(plain, steps, clip, **options)
    assert_state_close(state, exact, plain)
    return state


@both_ways
@each_grad_dtype
@each_sizes
def test_matches_torch(shapes: list[tuple[int, ...]], grad_dtype: torch.dtype) -> None:
    state = first_state(shapes, emas=1, copies=torch.bfloat16)
    compare(state, [draw_like(state.params, grad_dtype) for _ in range(3)])


@kernels_only
@each_grad_dtype
@each_sizes
def test_kernel_sizes(shapes: list[tuple[int, ...]], grad_dtype: torch.dtype) -> None:
    """0 to 3 averages, with and without copies, in turns; the moments of the second step are not zero."""
    turn = SIZES.index(shapes) + GRAD_DTYPES.index(grad_dtype)
    copies = (None, torch.bfloat16, torch.float16)[turn % 3]
    state = first_state(shapes, emas=turn % 4, copies=copies)
    compare(state, [draw_like(state.params, grad_dtype) for _ in range(2)])


@every_way
@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.0},
        {"betas": (0.0, 0.5)},
        {"betas": (0.99, 0.0), "eps": 1e-3},
        {"clip": 0.37},
        {"clip": 0.0, "weight_decay": 0.5},
        {"lr": 0.0},
    ],
    ids=str,
)
def test_options(options: dict[str, Any]) -> None:
    state = first_state([(70,)], emas=3, copies=torch.float16)
    compare(state, [draw_like(state.params) for _ in range(3)], **options)


@every_way
def test_a_decay_of_zero_is_the_weights() -> None:
    state = later_state([(300,)], emas=3)
    assert DECAYS[2] == 0
    run(adamw_ema_, state, draw_like(state.params))
    assert_same_bits("average", state.emas[2][0], state.params[0])


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Lists:
    """The parameters that torch's own pass on a CPU was given, in all calls."""
    given: Lists = []
    original = torch._fused_adamw_

    def watched(params: Lists, *args: Any, **options: Any) -> None:
        given.extend(params)
        original(params, *args, **options)

    monkeypatch.setattr(torch, "_fused_adamw_", watched)
    return given


@pytest.mark.parametrize(
    "options", [{}, {"clip": 0.37}, {"betas": (0.0, 0.5), "eps": 1e-3}], ids=str
)
@each_sizes
def test_fused_on_a_cpu(
    shapes: list[tuple[int, ...]], options: dict[str, Any], fused: Lists
) -> None:
    state = first_state(shapes, emas=3)
    steps = [draw_like(state.params) for _ in range(3)]
    before = [[grad.clone() for grad in grads] for grads in steps]
    compare(state, steps, **options)
    assert len(fused) == 3 * len(shapes)
    for grads, same in zip(steps, before, strict=True):  # clipped, but not in place
        for grad, expected in zip(grads, same, strict=True):
            assert_same_bits("gradient", grad, expected)


def test_fused_on_a_cpu_is_that_of_torch_to_the_last_bit() -> None:
    state = first_state([(33, 5), (4097,), (3,)])
    weights = [torch.nn.Parameter(p.clone()) for p in state.params]
    optimizer = torch.optim.AdamW(weights, fused=True, **OPTIONS)
    for _ in range(5):
        grads = draw_like(state.params)
        run(adamw_ema_, state, grads)
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        optimizer.step()
    moments = [optimizer.state[weight] for weight in weights]
    expected = State(
        [weight.detach() for weight in weights],
        [each["exp_avg"] for each in moments],
        [each["exp_avg_sq"] for each in moments],
        torch.tensor(5.0),
        [],
    )
    assert_same_state("torch.optim.AdamW", state, expected)


@pytest.mark.parametrize("step_dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_fused_on_a_cpu_takes_numbers_and_tensors(
    step_dtype: torch.dtype, shape: tuple[int, ...], fused: Lists
) -> None:
    state = later_state([(70,), (3, 4)])
    other = state.clone()
    other.step = other.step.to(step_dtype).reshape(shape)
    grads = draw_like(state.params)
    run(adamw_ema_, state, grads, clip=0.25)
    lr = torch.tensor(OPTIONS["lr"], dtype=torch.float64).reshape(shape)
    clip = torch.tensor(0.25).reshape(shape)
    run(adamw_ema_, other, grads, lr=lr, clip=clip, found_inf=torch.zeros(shape))
    assert len(fused) == 4
    assert other.step.dtype is step_dtype
    assert int(other.step) == int(state.step) == 8
    other.step = state.step
    assert_same_state("tensors", other, state)


@pytest.mark.parametrize("flag", [torch.float32, torch.bool, torch.int32])
def test_fused_on_a_cpu_leaves_a_bad_step_out(flag: torch.dtype, fused: Lists) -> None:
    state = later_state([(70,), (3,)], emas=3)
    before = state.clone()
    grads = [grad * torch.nan for grad in draw_like(state.params)]
    run(adamw_ema_, state, grads, found_inf=torch.ones((1,), dtype=flag))
    assert fused == []
    assert_same_state("bad step", state, before)


def test_fused_on_a_cpu_takes_permuted_parameters(fused: Lists) -> None:
    def permuted(t: Tensor) -> Tensor:
        return t.to(memory_format=torch.channels_last)

    contiguous = later_state([(2, 3, 4, 5)])
    state = contiguous.map(lambda t: permuted(t.clone()))
    grads = draw_like(contiguous.params)
    run(adamw_ema_, state, [permuted(grad) for grad in grads])
    assert len(fused) == 1
    run(adamw_ema_, contiguous, grads)
    assert_same_state("channels_last", state, contiguous)


@pytest.mark.parametrize(
    "case", ["reference", "copies", "bfloat16 gradients", "float64", "other strides"]
)
def test_not_fused_on_a_cpu(case: str, fused: Lists) -> None:
    """What torch's own pass cannot do, or what was asked to run in plain torch, is as it is in the reference."""
    state = later_state([(4, 6)], copies=torch.bfloat16 if case == "copies" else None)
    if case == "float64":
        state = state.map(Tensor.double)
    expected = state.clone()
    grads = [torch.randn_like(p) for p in state.params]
    if case == "bfloat16 gradients":
        grads = [grad.bfloat16() for grad in grads]
    if case == "other strides":
        grads = [grad.mT.contiguous().mT for grad in grads]
    with fastdit.use_backend("reference" if case == "reference" else "auto"):
        run(adamw_ema_, state, grads)
    assert fused == []
    run(reference.adamw_ema_, expected, grads)
    assert_same_state(case, state, expected)


@every_way
def test_many_steps() -> None:
    state = first_state([(40,), (3,)], emas=1)
    compare(state, [draw_like(state.params, torch.bfloat16) for _ in range(30)])


@every_way
@pytest.mark.parametrize("done", [0, 1, 10, 10**6])
def test_bias_corrections_do_not_cancel(done: int) -> None:
    """From weights of zero, so that they are nothing but the update: 1 - 0.999 in float32 would show.

    With the moments of a constant gradient, the update is the learning rate wherever in the training it is.
    """
    grad = draw(60)
    state = first_state([(60,)])
    for moment, power, beta in ((state.exp_avgs, 1, 0.9), (state.exp_avg_sqs, 2, 0.999)):
        moment[0].copy_(grad.double() ** power * (1 - beta**done))
    state.params[0].zero_()
    state.step.fill_(done)
    exact, plain = state.map(Tensor.double), state.clone()
    run(reference.adamw_ema_, exact, [grad.double()], lr=1.0, weight_decay=0.0)
    run(adamw_ema_, state, [grad], lr=1.0, weight_decay=0.0)
    torch.testing.assert_close(exact.params[0].abs(), torch.ones(60).double(), rtol=1e-4, atol=0)
    weight = torch.nn.Parameter(plain.params[0])
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0, foreach=False)
    optimizer.state[weight] = {
        "step": plain.step,
        "exp_avg": plain.exp_avgs[0],
        "exp_avg_sq": plain.exp_avg_sqs[0],
    }
    weight.grad = grad
    optimizer.step()
    assert_state_close(state, exact, replace(plain, params=[weight.detach()]))


@every_way
@pytest.mark.parametrize("step_dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_numbers_and_tensors(step_dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """lr and clip as numbers and as tensors on the device are the same, and a step is counted in either dtype."""
    numbers = later_state([(9,)])
    tensors = numbers.clone()
    tensors.step = tensors.step.to(step_dtype).reshape(shape)
    grads = draw_like(numbers.params)
    run(adamw_ema_, numbers, grads, lr=0.125, clip=0.5)
    assert numbers.step == 8
    lr, clip = torch.full(shape, 0.125), torch.full(shape, 0.5, dtype=torch.float64)
    run(adamw_ema_, tensors, grads, lr=lr, clip=clip)
    assert (tensors.step.dtype, tensors.step.shape) == (step_dtype, shape)
    tensors.step = tensors.step.float().reshape(())
    assert_same_state("tensors", tensors, numbers)


@every_way
@pytest.mark.parametrize("flag", [torch.float32, torch.bool, torch.int32])
def test_a_bad_step_changes_nothing(flag: torch.dtype) -> None:
    state = later_state([(5000,), (3,)], emas=2, copies=torch.bfloat16)
    before = state.clone()
    grads = draw_like(state.params)
    dirty = [torch.full_like(grad, value) for grad, value in zip(grads, (torch.nan, torch.inf))]  # noqa: B905
    run(adamw_ema_, state, dirty, found_inf=torch.ones(1).to(flag))
    assert_same_state("bad", state, before)
    # A good one is as if nobody had asked.
    run(adamw_ema_, state, grads, found_inf=torch.zeros(()).to(flag))
    run(adamw_ema_, before, grads)
    assert_same_state("good", state, before)
    assert state.step == 8


@both_ways
def test_nan_in_gradients_without_a_flag() -> None:
    """NaN reaches what it touches and nothing else."""
    clean = later_state([(6,), (6,)])
    dirty, grads = clean.clone(), draw_like(clean.params)
    run(adamw_ema_, clean, grads)
    grads[0][2] = torch.nan
    run(adamw_ema_, dirty, grads)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "emas[0]"):
        spoilt = dirty.all()[name][0].isnan()
        assert spoilt.tolist() == [False, False, True, False, False, False]
        assert_same_bits(name, dirty.all()[name][0][~spoilt], clean.all()[name][0][~spoilt])
        assert_same_bits(name, dirty.all()[name][1], clean.all()[name][1])


class ReadsNothing(TorchDispatchMode):
    """Raises where a value goes from the device to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a value was read from the device")
        return func(*args, **(kwargs or {}))


@every_way
def test_nothing_is_read_from_the_device() -> None:
    state = later_state([(6,), (3, 4)], copies=torch.bfloat16)
    scalars = {"lr": torch.tensor(0.1), "clip": torch.tensor(0.5), "found_inf": torch.tensor(0.0)}
    with ReadsNothing():
        run(adamw_ema_, state, draw_like(state.params), **scalars)
    with ReadsNothing(), pytest.raises(AssertionError, match="was read"):
        float(state.step)


def shifted(t: Tensor) -> Tensor:
    return layouts(t)["shifted by one element"] if t.dim() else t.clone()


@every_way
@pytest.mark.parametrize("moved", ["params", "grads", "exp_avgs", "emas[0]", "copies"])
def test_addresses_that_are_not_aligned(moved: str) -> None:
    """The same bits as from aligned ones, for one tensor of three: the others are read in vectors."""
    aligned = later_state([(64,), (4100,), (64,)], copies=torch.bfloat16)
    state, grads = aligned.clone(), draw_like(aligned.params, torch.bfloat16)
    run(adamw_ema_, aligned, grads)
    tensors = grads if moved == "grads" else state.all()[moved]
    tensors[1] = shifted(tensors[1])
    run(adamw_ema_, state, grads)
    assert_same_state(moved, state, aligned)


@every_way
def test_layouts_of_gradients() -> None:
    expected = later_state([(4, 6)])
    state, grad = expected.clone(), draw(4, 6)
    run(adamw_ema_, expected, [grad])
    for name, variant in layouts(grad).items():
        out = state.clone()
        run(adamw_ema_, out, [variant])
        assert_same_state(name, out, expected)
    broadcast, ones = state.clone(), state.clone()
    run(adamw_ema_, broadcast, [torch.ones(()).expand(4, 6)])
    run(adamw_ema_, ones, [torch.ones(4, 6)])
    assert_same_state("expanded", broadcast, ones)


@every_way
@pytest.mark.parametrize("grads_alike", [True, False])
def test_permuted_parameters(grads_alike: bool) -> None:
    """channels_last: dense, and everything of a parameter in the same order."""
    expected = later_state([(5, 4, 2, 2), (7,)], copies=torch.bfloat16)
    grads = draw_like(expected.params)

    def permute(t: Tensor) -> Tensor:
        t = t.clone()
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    state = expected.map(permute)
    assert not state.params[0].is_contiguous()
    run(adamw_ema_, expected, grads)
    run(adamw_ema_, state, [permute(grad) for grad in grads] if grads_alike else grads)
    assert_same_state("permuted", state, expected)
    assert state.params[0].is_contiguous(memory_format=torch.channels_last)


@every_way
def test_memory() -> None:
    """N7: 256 NaN before and after every tensor stay, and none of them is read."""
    shapes = [(3,), (4097,), (32,)]
    expected = later_state(shapes, emas=2, copies=torch.float16)
    guards: list[Guarded] = []

    def guard(t: Tensor) -> Tensor:
        guards.append(Guarded(t))
        return guards[-1].tensor

    state = expected.map(guard)
    grads = draw_like(expected.params, torch.float16)
    run(adamw_ema_, expected, grads)
    with poisoned_memory():
        run(adamw_ema_, state, [guard(grad) for grad in grads])
    assert_same_state("guarded", state, expected)
    assert len(guards) == 21
    for i, each in enumerate(guards):
        each.check(str(i))


@both_ways
def test_float64() -> None:
    """Plain torch takes weights in float64; the gradients are then narrower or not."""
    state = later_state([(6,)], emas=1).map(Tensor.double)
    grads = draw_like(state.params)
    expected = state.clone()
    run(reference.adamw_ema_, expected, [grads[0].double()])
    run(adamw_ema_, state, grads)
    assert_same_state("float64", state, expected)


def test_kernels_refuse_float64() -> None:
    state = later_state([(6,)], emas=1).map(Tensor.double)
    with (
        fastdit.use_backend("triton"),
        pytest.raises(RuntimeError, match=r"torch\.float64 is not float32"),
    ):
        run(adamw_ema_, state, draw_like(state.params))


@every_way
@pytest.mark.parametrize("name", ["params", "copies", "emas[0]"])
def test_autograd_sees_the_change(name: str) -> None:
    """What a forward saved of a tensor is not there any more after a step."""
    state = later_state([(6,)], copies=torch.bfloat16)
    tensor = state.all()[name][0].requires_grad_()
    loss = tensor.square().sum()
    run(adamw_ema_, state, draw_like(state.params))
    assert tensor.is_leaf
    assert tensor.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_way
def test_compiled() -> None:
    expected = later_state([(6,), (3, 4)], emas=2, copies=torch.bfloat16)
    state, grads = expected.clone(), draw_like(expected.params)
    run(adamw_ema_, expected, grads, clip=0.5)
    compiled = torch.compile(adamw_ema_, backend="aot_eager", fullgraph=True)
    run(compiled, state, grads, clip=0.5)
    assert_same_state("compiled", state, expected)


# Shards of DTensors.


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (1,))
    torch.distributed.destroy_process_group()


@every_way
def test_shards(mesh: Any) -> None:
    """Of DTensors the shards change, among them an empty one, and plain tensors stand beside them.

    One gradient may still be on its way from the other devices.
    """
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor, Shard

    def distribute(t: Tensor) -> Tensor:
        whole = (9, *t.shape[1:])  # as if another device had the rest
        stride = torch.empty(whole, device="meta").stride()
        return DTensor.from_local(
            t, mesh, [Shard(0)], run_check=False, shape=torch.Size(whole), stride=stride
        )

    def shard(t: Tensor) -> Tensor:
        return distribute(t.clone()) if t.dim() > 1 else t.clone()

    expected = later_state([(5, 4), (0, 3), (7,)], copies=torch.bfloat16)
    grads = draw_like(expected.params)
    state = expected.map(shard)
    state.params = [torch.nn.Parameter(p) for p in state.params]
    assert [type(p) is torch.nn.Parameter for p in state.params] == [False, False, True]
    with torch.no_grad():
        inside = state.params[0].to_local()
    x = torch.ones(5, 4, requires_grad=True)
    losses = [state.params[0].square().sum(), (x * inside).sum()]
    run(adamw_ema_, expected, grads)
    arriving = distribute(AsyncCollectiveTensor(grads[0]))
    run(adamw_ema_, state, [arriving, *(shard(grad) for grad in grads[1:])])

    def local(t: Tensor) -> Tensor:
        return t.to_local() if isinstance(t, DTensor) else t

    assert_same_state("shards", state.map(local), expected)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_shards_that_do_not_fit(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    state = later_state([(5, 4)], emas=0)
    grads = [DTensor.from_local(torch.ones(5, 4), mesh, [Partial()], run_check=False)]
    state = state.map(lambda t: DTensor.from_local(t, mesh, [Replicate()], run_check=False))
    with pytest.raises(ValueError, match=r"grads\[0\]: is \(Partial\(sum\),\).*distributed alike"):
        run(adamw_ema_, state, grads)


# Where the kernels find the tensors.


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What was written into tables since the test began, which is not with a cache of other tests."""
    kernels = importlib.import_module("fastdit.kernels.adamw_ema")
    monkeypatch.setattr(kernels, "_cache", type(kernels._cache)())
    written: list[tuple[int, ...]] = []
    original = torch._foreach_add_

    def watched(tensors: Any, values: Any) -> None:
        written.append(tuple(values))
        original(tensors, values)

    monkeypatch.setattr(torch, "_foreach_add_", watched)
    return written


@kernels_only
def test_tables_are_made_once_and_renewed(tables: list[tuple[int, ...]]) -> None:
    state = first_state([(5,), (6, 2)], emas=1, copies=torch.bfloat16)
    expected, grads = state.clone(), draw_like(state.params)

    def step() -> list[tuple[int, ...]]:
        """A step; the tables that were made in it."""
        run(reference.adamw_ema_, expected, grads)
        run(adamw_ema_, state, grads)
        for name, tensors in state.all().items():
            for found, same in zip(tensors, expected.all()[name], strict=True):
                torch.testing.assert_close(found, same)
        made = tables.copy()
        tables.clear()
        return made

    assert len(step()) == 8  # 6 lists, the sizes, the numbers of chunks
    assert step() == []
    grads = [grads[0], torch.randn(6, 2)]
    assert step() == [tuple(grad.data_ptr() for grad in grads)]
    state.params[0] = state.params[0].clone()
    assert step() == [tuple(p.data_ptr() for p in state.params)]
    assert step() == []


class Streams:
    """What a cache sees of CUDA: the current stream, and whether it captures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.capturing = Stream(), False
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)


class Stream:
    def __init__(self) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


class Table:
    def __init__(self) -> None:
        self.streams: list[Stream] = []

    def record_stream(self, stream: Stream) -> None:
        self.streams.append(stream)


@kernels_only
def test_tables_and_streams(tables: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is made on one stream, another waits for it; a graph keeps what it reads, and makes what is missing."""
    state = first_state([(2,)])
    run(adamw_ema_, state, draw_like(state.params))  # by the kernel, as every test of it
    kernels = importlib.import_module("fastdit.kernels.adamw_ema")
    captured: dict[object, Any] = {}
    monkeypatch.setattr(kernels, "_captured", captured)
    streams = Streams(monkeypatch)

    def cached(key: str) -> Any:
        return kernels._cached(key, torch.device("cuda", 0), Table)

    table, first = cached("a"), streams.current
    assert cached("a") is table
    streams.current = Stream()
    assert cached("a") is table
    assert (streams.current.waited, table.streams) == ([first], [streams.current])
    assert cached("a") is table
    assert len(streams.current.waited) == 1

    streams.capturing = True
    assert cached("a") is table
    assert captured == {"a": table}
    inside = cached("b")
    assert cached("b") is not inside
    assert "b" not in captured
    streams.capturing = False
    assert cached("b") is not inside

    for i in range(1000):
        cached(str(i))
    assert len(kernels._cache) <= 200
    assert captured == {"a": table}


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    """Replays read lr and the gradients where they are; the gradients of the capture are new tensors."""
    with torch.device("cuda"), fastdit.use_backend("triton"):
        expected = later_state([(5000,), (3,), (64, 64)], copies=torch.bfloat16)
        state, source, lr = expected.clone(), draw_like(expected.params), torch.tensor(0.5)

        def step(state: State) -> None:
            run(adamw_ema_, state, [2 * grad for grad in source], lr=lr)

        start = state.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(state)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(state)
        for name, tensors in start.all().items():
            for t, before in zip(state.all()[name], tensors, strict=True):
                t.copy_(before)
        for value in (0.5, 0.25, 0.125):
            lr.fill_(value)
            for grad in source:
                grad.mul_(value)
            graph.replay()
            step(expected)
        assert_same_state("captured", state, expected)


@pytest.mark.gpu
def test_a_thousand_repeats_are_the_same_bits() -> None:
    with torch.device("cuda"), fastdit.use_backend("triton"):
        start = later_state([(300, 300), (4097,), (3,)], emas=2, copies=torch.bfloat16)
        grads = draw_like(start.params, torch.bfloat16)
        expected = start.clone()
        run(adamw_ema_, expected, grads)
        for _ in range(1000):
            state = start.clone()
            run(adamw_ema_, state, grads)
            assert_same_state("repeat", state, expected)


def assert_last_values(size: int) -> None:
    """Of one long parameter: the last are what they are alone."""
    state = later_state([(size,)], emas=0, copies=torch.bfloat16)
    grads = draw_like(state.params, torch.bfloat16)
    last = slice(size - 4097, None)
    alone = state.map(lambda t: t[last].clone())
    run(adamw_ema_, state, grads)
    run(adamw_ema_, alone, [grad[last].clone() for grad in grads])
    assert_same_state("last values", state.map(lambda t: t[last]), alone)


@kernels_only
def test_the_last_values() -> None:
    assert_last_values(3 * 4096 + 5)


@pytest.mark.gpu
def test_long_parameter() -> None:
    """Of more than 2^31 values."""
    need_memory(48)  # three and a draw in float32, two in bfloat16
    with torch.device("cuda"), fastdit.use_backend("triton"):
        assert_last_values(2**31 + 2**20 + 3)


# The registered operator.


@pytest.mark.parametrize("case", ["plain", "nothing else", "empty", "no tensors"])
def test_opcheck(case: str) -> None:
    shapes = {"empty": [(0, 3), (4,)], "no tensors": []}.get(case, [(4, 3), (5,)])
    bare = case == "nothing else"
    state = later_state(shapes, emas=0 if bare else 2, copies=None if bare else torch.bfloat16)
    scalars = (None, None) if bare else (torch.tensor(0.5), torch.tensor(0.0))
    arguments = (
        state.step,
        state.params,
        draw_like(state.params),
        state.exp_avgs,
        state.exp_avg_sqs,
        [t for ema in state.emas for t in ema],
        state.copies or [],
        torch.tensor(0.1),
        *scalars,
        0.9,
        0.999,
        1e-8,
        0.1,
        DECAYS[: len(state.emas)],
    )
    torch.library.opcheck(OPERATOR, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": torch.ones(3, 2)}, TypeError, "params: expected a list of tensors, got a ten"),
        ({"grads": [torch.ones(2)]}, ValueError, "grads: expected 2 tensors, as many .* got 1"),
        ({"copies": []}, ValueError, "copies: expected 2 tensors.* got 0"),
        ({"emas": [[torch.ones(2)]]}, ValueError, r"emas\[0\]: expected 2 tensors.* got 1"),
        ({"emas": [torch.ones(2, 2)]}, TypeError, r"emas\[0\]: expected a list of tensors"),
        ({"ema_decays": [0.9, 0.9]}, ValueError, "ema_decays: expected 1 values, .* got 2"),
        ({"ema_decays": [1.5]}, ValueError, r"ema_decays\[0\]=1.5: must be in \[0, 1\]"),
        ({"ema_decays": [float("nan")]}, ValueError, r"ema_decays\[0\]=nan"),
        ({"grads": [torch.ones(2), None]}, TypeError, r"grads\[1\]: .* got NoneType"),
        ({"grads": [torch.ones(2), torch.ones(4)]}, ValueError, r"grads\[1\]: .*\(3,\).*\(4,\)"),
        (
            {"grads": [torch.ones(2), torch.ones(3).half()]},
            TypeError,
            r"grads\[1\]: expected torch.float32 as grads\[0\], got torch.float16",
        ),
        (
            {"grads": [torch.ones(2).double(), torch.ones(3).double()]},
            TypeError,
            r"grads\[0\]: .*torch.bfloat16 or torch.float16 or torch.float32, got dtype torch.flo",
        ),
        ({"grads": [torch.ones(2).to_sparse(), torch.ones(3)]}, TypeError, "layout torch.sparse"),
        ({"exp_avgs": [torch.ones(2).half()] * 2}, TypeError, r"exp_avgs\[0\]: .*torch.float16"),
        (
            {"params": [torch.ones(2).bfloat16(), torch.ones(3)]},
            TypeError,
            r"params\[0\]: expected torch.float32 or torch.float64, got torch.bfloat16, in which",
        ),
        (
            {"params": [torch.ones(2), torch.ones(3).double()]},
            TypeError,
            r"params\[1\]: expected torch.float32 as params\[0\], got torch.float64",
        ),
        ({"copies": [torch.ones(2), torch.ones(3)]}, TypeError, r"copies\[0\]: .*torch.float32"),
        (
            {"params": [torch.ones(4)[::2], torch.ones(3)]},
            ValueError,
            r"params\[0\]: expected a tensor without gaps or overlaps .* strides \(2,\)",
        ),
        (
            {"params": [torch.ones(1).expand(2), torch.ones(3)]},
            ValueError,
            r"params\[0\]: .*overlaps .* strides \(0,\)",
        ),
        (
            {"exp_avg_sqs": [torch.ones(4)[::2], torch.ones(3)]},
            ValueError,
            r"exp_avg_sqs\[0\]: expected strides \(1,\) as params\[0\], got \(2,\)",
        ),
        (
            {"grads": [torch.ones(2), torch.ones(3, device="meta")]},
            ValueError,
            r"grads\[1\] is on meta, step is on cpu",
        ),
        ({"step": torch.zeros((), device="meta")}, ValueError, r"params\[0\] is on cpu, step is"),
        ({"step": 3}, TypeError, "step: expected a plain tensor, got int"),
        ({"step": torch.zeros(2)}, ValueError, r"step: expected one element, got shape \(2,\)"),
        ({"step": torch.zeros(()).half()}, TypeError, "step: .*float32 or torch.int64, got .*16"),
        ({"lr": -1e-4}, ValueError, "lr=-0.0001: must be finite and not negative"),
        ({"lr": float("nan")}, ValueError, "lr=nan"),
        ({"lr": torch.ones(3)}, ValueError, "lr: expected one element"),
        ({"lr": torch.tensor(1)}, TypeError, "lr: .*torch.int64"),
        ({"lr": torch.ones((), device="meta")}, ValueError, "lr is on meta, step is on cpu"),
        ({"clip": float("inf")}, ValueError, "clip=inf: must be finite"),
        ({"found_inf": True}, TypeError, "found_inf: expected a plain tensor, got bool"),
        ({"found_inf": torch.zeros(2)}, ValueError, "found_inf: expected one element"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas=\(0.9, 1.0\): both must be in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, ValueError, "betas="),
        ({"eps": 0.0}, ValueError, "eps=0.0: must be positive"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1"),
    ],
    ids=str,
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        name: [torch.ones(2), torch.ones(3)]
        for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")
    }
    arguments |= {"step": torch.zeros(()), "emas": [[torch.ones(2), torch.ones(3)]]}
    arguments |= {"lr": 0.1, "ema_decays": [0.9]}
    before = [t.clone() for t in arguments["params"]]
    with pytest.raises(error, match=message):
        adamw_ema_(**{**arguments, **change})
    assert all(torch.equal(t, b) for t, b in zip(arguments["params"], before, strict=True))


def test_refuses_other_subclasses() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    state = later_state([(3,)], emas=0)
    state.params = [TwoTensor(torch.ones(3), torch.ones(3))]
    with pytest.raises(TypeError, match=r"params\[0\]: expected a plain tensor or a DTensor, got"):
        run(adamw_ema_, state, [torch.ones(3)])
