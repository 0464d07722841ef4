"""The fused sampling steps, against the samplers of `GaussianDiffusion` and `DiT.forward_with_cfg`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdit
from fastdit.diffusion import GaussianDiffusion, create_diffusion
from fastdit.models import DiT
from fastdit.testing import (
    Guarded,
    assert_close,
    assert_row_local,
    assert_same_bits,
    assert_trajectory_close,
    layouts,
    poisoned_memory,
)

from .helpers import both_ways, draw, every_way, kernels_only, need_memory

MODULE = importlib.import_module("fastdit.ops.diffusion_step")
ddpm_step, ddim_step = MODULE.ddpm_step, MODULE.ddim_step
OPERATOR = torch.ops.fastdit.diffusion_step.default
STEPS = 10
OneInput = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A diffusion process and a call of a step; `scale` is None, a number, or the shape of a tensor."""

    sampler: str = "ddpm"
    n: int = 2
    channels: int = 4
    patch_size: int = 2
    grid: tuple[int, int] = (2, 3)
    learned: bool = True
    scale: Any = 4.0
    cfg_channels: Any = 3
    clip: bool = False
    predict_xstart: bool = False
    sigma_small: bool = False
    eta: float = 0.0
    t: int = 5

    def diffusion(self) -> GaussianDiffusion:
        return create_diffusion(
            str(STEPS),
            learn_sigma=self.learned,
            predict_xstart=self.predict_xstart,
            sigma_small=self.sigma_small,
        )

    def inputs(
        self, dtype: torch.dtype = torch.float32, x_dtype: torch.dtype | None = None
    ) -> dict[str, Tensor | None]:
        """The tensors, on the default device: what a model gave in `dtype`, the state in `x_dtype`."""
        x_dtype = x_dtype or torch.promote_types(dtype, torch.float32)
        h, w = self.grid
        p, c = self.patch_size, self.channels
        batch = self.n if self.scale is None else 2 * self.n
        shape = (self.n, c, h * p, w * p)
        tokens = draw(batch, h * w, p * p * (2 * c if self.learned else c), dtype=dtype)
        x, noise = draw(*shape, dtype=x_dtype), draw(*shape, dtype=x_dtype)
        table = self.diffusion().step_table(
            self.sampler,
            eta=self.eta,
            device=x.device,
            dtype=torch.promote_types(x_dtype, torch.float32),
        )
        scale = self.scale
        if isinstance(scale, tuple):
            scale = 4 * torch.rand(scale)
        return {
            "tokens": tokens,
            "x": x,
            "noise": noise,
            "table": table,
            "step": torch.tensor([self.t]),
            "cfg_scale": scale,
        }

    def run(self, inputs: dict[str, Any]) -> Tensor:
        step = ddpm_step if self.sampler == "ddpm" else ddim_step
        return step(
            **inputs,
            patch_size=self.patch_size,
            cfg_channels=self.cfg_channels,
            clip_denoised=self.clip,
        )

    def by_the_sampler(self, inputs: dict[str, Any], wide: bool = False) -> Tensor:
        """The same by `p_sample` or `ddim_sample`, in the dtypes of `inputs` or all in float64."""
        cast = (lambda value: value.double()) if wide else (lambda value: value)
        x, scale = cast(inputs["x"]), inputs["cfg_scale"]
        if isinstance(scale, Tensor):
            scale = cast(scale).to(x.dtype).reshape(-1, 1, 1, 1)
        images = move(
            cast(inputs["tokens"]), self.patch_size, 2 * self.channels if self.learned else None, x
        )

        def model(x: Tensor, t: Tensor) -> Tensor:
            if scale is None:
                return images
            cond, uncond = images.chunk(2)
            guided = self.channels if self.cfg_channels == "all" else min(3, self.channels)
            eps, rest = cond[:, :guided], cond[:, guided:]
            eps = uncond[:, :guided] + scale * (eps - uncond[:, :guided])
            return torch.cat([eps, rest], dim=1)

        t = torch.full((self.n,), int(inputs["step"]))
        step_noise = cast(torch.zeros_like(x) if inputs["noise"] is None else inputs["noise"])
        diffusion = self.diffusion()
        if self.sampler == "ddpm":
            out = diffusion.p_sample(model, x, t, self.clip, step_noise=step_noise)
        else:
            out = diffusion.ddim_sample(model, x, t, self.clip, eta=self.eta, step_noise=step_noise)
        return out["sample"]

    def check(self, dtype: torch.dtype, x_dtype: torch.dtype | None = None) -> None:
        self.compare(self.inputs(dtype, x_dtype))

    def compare(self, inputs: dict[str, Any]) -> None:
        """N1 and N2 against the samplers in float64; the inputs are unchanged."""
        before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
        out, x = self.run(inputs), inputs["x"]
        assert (out.shape, out.dtype, out.is_contiguous()) == (x.shape, x.dtype, True)
        exact = self.by_the_sampler(inputs, wide=True)
        if x.dtype is torch.float64:  # there is no oracle above it
            torch.testing.assert_close(out, exact)
        else:
            assert_close(str(self), out, exact, self.by_the_sampler(inputs))
        for name, value in before.items():
            assert torch.equal(inputs[name], value), f"{name} was changed"


def move(tokens: Tensor, p: int, channels: int | None, x: Tensor) -> Tensor:
    """Unpatchify, pixel by pixel: `out[c, p h + i, p w + j] = tokens[h W + w, (p i + j) K + c]`."""
    _, c, height, width = x.shape
    k = channels or c
    out = tokens.new_empty(len(tokens), k, height, width)
    for row in range(height):
        for column in range(width):
            token = (row // p) * (width // p) + column // p
            first = (p * (row % p) + column % p) * k
            out[:, :, row, column] = tokens[:, token, first : first + k]
    return out


# What a kernel has to get right: batches, odd patches and grids, numbers of channels on both sides of powers of two,
# images of more than one tile and with a tile that they do not fill.
CASES = [
    Case(n=1, grid=(4, 4)),
    Case(n=2),
    Case(n=3, patch_size=4, grid=(1, 2)),
    Case(n=5, channels=1, patch_size=8, grid=(1, 1)),
    Case(n=0),
    Case(n=2, channels=3, patch_size=3, grid=(3, 1)),
    Case(n=1, channels=5, patch_size=1, grid=(5, 7)),
    Case(n=2, grid=(7, 9)),
    Case(n=1, channels=1, patch_size=5, grid=(5, 5)),
    Case(n=2, scale=None),
    Case(n=3, scale=(3,), cfg_channels="all"),
    Case(n=2, scale=(2, 1, 1, 1)),
    Case(n=2, scale=()),
    Case(n=1, scale=(1,), channels=3, cfg_channels="all"),
    Case(n=2, learned=False),
    Case(n=2, learned=False, sigma_small=True, scale=None, channels=3),
    Case(n=2, clip=True),
    Case(n=2, predict_xstart=True),
    Case(n=2, t=0),
    Case(n=2, t=1),
    Case(n=2, t=STEPS - 1),
    Case(n=2, t=STEPS - 1, clip=True, scale=None),
    Case("ddim", n=2),
    Case("ddim", n=3, grid=(3, 5), scale=(3,)),
    Case("ddim", n=2, eta=1.0, cfg_channels="all"),
    Case("ddim", n=2, eta=0.5, channels=3, patch_size=3, scale=None),
    Case("ddim", n=2, eta=0.5, clip=True, t=STEPS - 1),
    Case("ddim", n=1, eta=0.5, t=0),
    Case("ddim", n=2, learned=False, predict_xstart=True),
    Case("ddim", n=2, t=1, clip=True),
    Case("ddim", n=0, scale=None),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: str(CASES.index(case)))


@both_ways
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@each_case
def test_matches_the_sampler(dtype: torch.dtype, case: Case) -> None:
    case.check(dtype)


@kernels_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_case
def test_kernel_matches_the_sampler(dtype: torch.dtype, case: Case) -> None:
    case.check(dtype)


@every_way
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [Case(t=7), Case("ddim", t=7, eta=0.5)], ids=["ddpm", "ddim"])
def test_dtype_of_the_state(case: Case, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    case.check(dtype, x_dtype)


@every_way
def test_the_other_tensors_have_their_own_dtypes() -> None:
    case = Case(n=2, scale=(2,))
    inputs = case.inputs(torch.float16)
    inputs["noise"] = inputs["noise"].bfloat16()
    inputs["cfg_scale"] = inputs["cfg_scale"].bfloat16()
    case.compare(inputs)


@every_way
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_no_noise_at_the_last_step(sampler: str) -> None:
    case = Case(sampler, eta=1.0 if sampler == "ddim" else 0.0, t=0)
    inputs = case.inputs()
    other = {**inputs, "noise": draw(*inputs["x"].shape)}
    assert_same_bits("t = 0", case.run(other), case.run(inputs))
    for each in (inputs, other):
        each["step"] = torch.tensor(1)
    assert not torch.equal(case.run(other), case.run(inputs))


@every_way
def test_ddim_without_noise() -> None:
    case = Case("ddim")
    inputs = case.inputs()
    assert_same_bits("eta = 0", case.run({**inputs, "noise": None}), case.run(inputs))


@every_way
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("scale", [(), (2,)], ids=str)
def test_step_and_scale_are_read_in_every_call(sampler: str, scale: Any) -> None:
    """What a captured graph replays: the same tensors, whose values somebody changes in place."""
    case = Case(sampler, scale=scale, eta=0.5 if sampler == "ddim" else 0.0)
    inputs = case.inputs()
    found = [case.run(inputs)]
    inputs["step"].fill_(2)
    found.append(case.run(inputs))
    inputs["cfg_scale"].mul_(2)
    found.append(case.run(inputs))
    inputs["x"].copy_(found[0])
    inputs["noise"].normal_()
    case.compare(inputs)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


@pytest.mark.gpu
def test_a_captured_graph_runs_any_step() -> None:
    case = Case(n=3, scale=())
    with torch.device("cuda"), torch.no_grad():
        inputs = case.inputs(torch.bfloat16)
        case.run(inputs)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = case.run(inputs)
        for t, scale in ((STEPS - 1, 1.5), (4, 4.0), (0, 0.5)):
            inputs["step"].fill_(t)
            inputs["cfg_scale"].fill_(scale)
            inputs["x"].normal_()
            graph.replay()
            assert_same_bits(f"step {t}", out, case.run(inputs))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [Case(n=64, grid=(16, 16)), Case("ddim", n=64, grid=(16, 16), eta=0.5)],
    ids=["ddpm", "ddim"],
)
def test_a_thousand_repeats_are_the_same_bits(case: Case) -> None:
    with torch.device("cuda"), fastdit.use_backend("triton"):
        inputs = case.inputs(torch.bfloat16)
        expected = case.run(inputs)
        for _ in range(1000):
            assert_same_bits("repeat", case.run(inputs), expected)


def assert_last_sample(case: Case, x_dtype: torch.dtype) -> None:
    """It is what it is alone."""
    inputs = case.inputs(torch.bfloat16, x_dtype)
    alone = {name: inputs[name][-1:] for name in ("x", "noise")}
    last = [-1] if case.scale is None else [case.n - 1, -1]  # with the label, and without one
    alone["tokens"] = inputs["tokens"][last]
    assert_same_bits("last sample", case.run(inputs)[-1:], case.run({**inputs, **alone}))


# More elements than 2^31: tokens of a guided step; and the state, the noise and the result of one that is not.
LONG = 2**31 + 2**20
LONG_CASES = {
    "tokens": (Case(n=LONG // 2**14 + 1, grid=(16, 16)), torch.float32),
    "state": (
        Case(n=LONG // 2**12 + 1, grid=(16, 16), learned=False, scale=None),
        torch.bfloat16,
    ),
}


@kernels_only
@pytest.mark.parametrize("name", LONG_CASES)
def test_the_last_sample(name: str) -> None:
    case, x_dtype = LONG_CASES[name]
    assert_last_sample(replace(case, n=3, grid=(2, 3)), x_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LONG_CASES)
def test_long_tensors(name: str) -> None:
    need_memory(28)  # all is drawn in float32
    case, x_dtype = LONG_CASES[name]
    with torch.device("cuda"), fastdit.use_backend("triton"):
        assert_last_sample(case, x_dtype)


def tiny_dit() -> DiT:
    model = DiT(
        input_size=(4, 6),
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        depth=2,
        num_heads=2,
        num_classes=5,
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


@every_way
@pytest.mark.parametrize("cfg_channels", [3, "all"])
@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
@torch.no_grad()
def test_trajectory_of_a_guided_model(sampler: str, eta: float, cfg_channels: Any) -> None:
    """N10: ten steps on `forward_tokens` are those of the samplers on `forward_with_cfg`, in float64."""
    model, diffusion = tiny_dit(), create_diffusion(str(STEPS))
    y = torch.tensor([1, 4, model.null_label, model.null_label])
    scale, noise = torch.tensor([1.5, 4.0]), draw(STEPS, 2, 4, 4, 6)
    x = draw(2, 4, 4, 6)
    table = diffusion.step_table(sampler, eta=eta, device=x.device)
    step = ddpm_step if sampler == "ddpm" else ddim_step
    t = torch.tensor([STEPS])
    timesteps = torch.tensor(diffusion.timestep_map)
    state, states = x, []
    for i in range(STEPS):
        t.sub_(1)
        with fastdit.use_backend("reference"):
            tokens = model.forward_tokens(torch.cat([state, state]), timesteps[t].expand(4), y)
        state = step(
            *(tokens, state, noise[i], table, t),
            patch_size=2,
            cfg_scale=scale,
            cfg_channels=cfg_channels,
        )
        states.append(state)

    loop, options = (diffusion.p_sample_loop_progressive, {})
    if sampler == "ddim":
        loop, options = diffusion.ddim_sample_loop_progressive, {"eta": eta}
    kwargs = {"y": y, "cfg_scale": scale.double(), "cfg_channels": cfg_channels}
    with fastdit.use_backend("reference"):
        expected = loop(
            model.double().forward_with_cfg,
            (4, 4, 4, 6),
            torch.cat([x, x]).double(),
            False,
            model_kwargs=kwargs,
            step_noise=torch.cat([noise, noise], dim=1).double(),
            **options,
        )
        expected = torch.stack([out["sample"][:2] for out in expected])
    assert_trajectory_close(f"{sampler} eta={eta}", torch.stack(states), expected)


def one_input(case: Case, inputs: dict[str, Any]) -> dict[str, tuple[OneInput, Tensor]]:
    """The step as a function of each input alone, of each half of the tokens too, and that input."""
    cond, uncond = inputs["tokens"].chunk(2)
    return {
        "x": (lambda x: case.run({**inputs, "x": x}), inputs["x"]),
        "noise": (lambda noise: case.run({**inputs, "noise": noise}), inputs["noise"]),
        "cfg_scale": (lambda scale: case.run({**inputs, "cfg_scale": scale}), inputs["cfg_scale"]),
        "conditional": (
            lambda half: case.run({**inputs, "tokens": torch.cat([half, uncond])}),
            cond,
        ),
        "unconditional": (
            lambda half: case.run({**inputs, "tokens": torch.cat([cond, half])}),
            uncond,
        ),
    }


@every_way
def test_samples_are_independent() -> None:
    case = Case(n=3, scale=(3,))
    inputs = case.inputs()
    for name, (function, value) in one_input(case, inputs).items():
        assert_row_local(name, function, value, 1)
    alone = {name: inputs[name][1:2] for name in ("x", "noise", "cfg_scale")}
    alone["tokens"] = inputs["tokens"][[1, 4]]
    assert_same_bits("alone", case.run({**inputs, **alone}), case.run(inputs)[1:2])


@every_way
def test_a_clamped_nan_is_a_nan() -> None:
    case = Case(n=3, scale=(3,), clip=True)
    functions = one_input(case, case.inputs())
    for name in ("x", "noise", "conditional", "unconditional"):
        function, value = functions[name]
        dirty = value.clone()
        dirty[1].view(-1)[0] = math.nan
        out = function(dirty)
        assert_same_bits(name, out[[0, 2]], function(value)[[0, 2]])
        assert out[1].isnan().sum() == 1, name


@every_way
@pytest.mark.parametrize(
    "case", [Case(scale=(2,)), Case("ddim", eta=0.5, scale=(2,))], ids=["ddpm", "ddim"]
)
def test_layouts(case: Case) -> None:
    inputs = case.inputs()
    expected = case.run(inputs)
    for name, value in inputs.items():
        for layout, variant in layouts(value).items():
            assert_same_bits(f"{name} {layout}", case.run({**inputs, name: variant}), expected)
    assert_same_bits("scalar step", case.run({**inputs, "step": inputs["step"][0]}), expected)
    one = inputs["cfg_scale"][0]
    assert_same_bits(
        "one scale",
        case.run({**inputs, "cfg_scale": one.expand(2)}),
        case.run({**inputs, "cfg_scale": one}),
    )


@every_way
@pytest.mark.parametrize(
    "case",
    [Case(scale=(2,)), Case(n=1, channels=3, patch_size=3, grid=(5, 5)), Case("ddim", scale=None)],
    ids=["a tile", "two tiles", "ddim"],
)
def test_memory(case: Case) -> None:
    for t in (0, STEPS - 1):
        inputs = {**case.inputs(), "step": torch.tensor([t])}
        expected = case.run(inputs)
        guarded = {
            name: Guarded(value)
            for name, value in inputs.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        with poisoned_memory():
            out = case.run({**inputs, **{name: guard.tensor for name, guard in guarded.items()}})
        assert_same_bits(f"step {t}", out, expected)
        for name, guard in guarded.items():
            guard.check(name)


@kernels_only
def test_nothing_is_written_outside_of_the_results() -> None:
    """Of two tiles, the second not full, and of channels that are no power of two."""
    case = Case(n=1, channels=3, patch_size=3, grid=(5, 5))
    inputs = case.inputs()
    with poisoned_memory():
        case.run(inputs)


@kernels_only
def test_the_kernel_does_not_take_float64() -> None:
    case = Case()
    inputs = case.inputs()
    for name in ("tokens", "x", "noise", "table"):
        with pytest.raises(RuntimeError, match=r"cannot run diffusion_step: torch.float64 is not"):
            case.run({**inputs, name: inputs[name].double()})
    case.run(inputs)


@both_ways
@pytest.mark.parametrize("name", ["tokens", "x", "noise"])
def test_there_is_no_gradient(name: str) -> None:
    case = Case(scale=(2,))
    inputs = case.inputs()
    inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match=r"ddpm_step has no gradient: .*torch.no_grad"):
        case.run(inputs)
    with torch.no_grad():
        assert not case.run(inputs).requires_grad


@both_ways
@pytest.mark.parametrize("case", [Case(scale=(2,)), Case("ddim", scale=4.0)], ids=["ddpm", "ddim"])
def test_whole_graph(case: Case) -> None:
    inputs = case.inputs()
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), case.run(inputs))


@pytest.mark.parametrize("layout", ["plain", "transposed"])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case(scale=(2,)), torch.float32),
        (Case(n=0), torch.float32),
        (Case(n=3, grid=(1, 5), scale=None, learned=False), torch.float32),
        (Case(scale=()), torch.bfloat16),
        (Case("ddim"), torch.bfloat16),
    ],
    ids=["plain", "batch 0", "odd", "mixed", "ddim"],
)
def test_opcheck(case: Case, dtype: torch.dtype, layout: str) -> None:
    inputs = case.inputs(dtype)
    if layout == "transposed":
        for name in ("tokens", "x", "noise", "table"):
            inputs[name] = layouts(inputs[name])["transposed"]
    scale = inputs.pop("cfg_scale")
    number = None if isinstance(scale, Tensor) else scale
    scale = scale if isinstance(scale, Tensor) else None
    torch.library.opcheck(OPERATOR, (*inputs.values(), scale, number, 3, case.patch_size, True))
    if case.sampler == "ddim":
        inputs["noise"] = None
        torch.library.opcheck(
            OPERATOR, (*inputs.values(), scale, number, 3, case.patch_size, False)
        )


def test_fake_shapes() -> None:
    case = Case(scale=(2,))
    meta = {name: value.to("meta") for name, value in case.inputs(torch.bfloat16).items()}
    out = case.run(meta)
    assert (out.shape, out.dtype, out.device.type) == (meta["x"].shape, torch.float32, "meta")
    meta = [*meta.values(), None, 3, 2, False]
    assert OPERATOR(*meta).shape == out.shape


ones = torch.ones


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": ones(2, 4, 6)},
            ValueError,
            r"x: expected shape \(N, C, .*patch_size=2.*\(2, 4, 6\)",
        ),
        ({"x": ones(2, 4, 5, 6)}, ValueError, r"divisible by patch_size=2, got \(2, 4, 5, 6\)"),
        ({"x": ones(2, 4, 4, 6).long()}, TypeError, r"x: .*torch.int64"),
        ({"tokens": [1.0]}, TypeError, "tokens: expected a tensor, got list"),
        (
            {"tokens": ones(2, 6, 32)},
            ValueError,
            r"tokens: .*\(4, 6, 16\) or.*\(4, 6, 32\).*guidance, got",
        ),
        ({"cfg_scale": None}, ValueError, r"tokens: .*\(2, 6, 32\).*no guidance, got \(4, 6, 32\)"),
        ({"tokens": ones(4, 6, 24)}, ValueError, r"tokens: .*got \(4, 6, 24\)"),
        (
            {"tokens": ones(4, 6, 16)},
            ValueError,
            r"table: has 7 columns and tokens C channels.* 5 with C",
        ),
        (
            {"table": ones(10, 5)},
            ValueError,
            r"table: has 5 columns and tokens 2C channels: allowed are 7",
        ),
        ({"table": ones(10, 7).half()}, TypeError, "table: has dtype torch.float16"),
        (
            {"table": ones(7)},
            ValueError,
            r"table: expected shape \(num_timesteps, 5\) or.*got \(7,\)",
        ),
        ({"table": ones(0, 7)}, ValueError, r"table: .*got \(0, 7\)"),
        ({"table": ones(10, 6)}, ValueError, r"table: .*got \(10, 6\)"),
        ({"noise": None}, TypeError, "noise: expected a tensor, got NoneType"),
        ({"noise": ones(2, 4, 6, 4)}, ValueError, r"noise: .*\(2, 4, 4, 6\), got \(2, 4, 6, 4\)"),
        ({"step": 3}, TypeError, "step: expected an int64 tensor of one element, got int"),
        ({"step": torch.tensor(3.0)}, TypeError, "step: .*got torch.float32"),
        (
            {"step": torch.tensor([3, 3])},
            ValueError,
            r"step: expected one element, got shape \(2,\)",
        ),
        ({"step": torch.tensor(3, device="meta")}, ValueError, "step is on meta"),
        (
            {"cfg_scale": ones(3)},
            ValueError,
            r"cfg_scale: .*\(2,\) or \(2, 1, 1, 1\), got shape \(3,\)",
        ),
        ({"cfg_scale": ones(2).long()}, TypeError, "cfg_scale: .*torch.int64"),
        ({"cfg_scale": ones(2, device="meta")}, ValueError, "cfg_scale is on meta"),
        ({"cfg_scale": "4"}, TypeError, "cfg_scale='4': expected a number, a tensor or None"),
        ({"cfg_scale": math.inf}, ValueError, "cfg_scale=inf: must be finite"),
        ({"cfg_channels": 4}, ValueError, "cfg_channels=4: allowed are 3, 'all'"),
        ({"patch_size": 0}, ValueError, "patch_size=0"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = {**Case().inputs(), "patch_size": 2}
    with pytest.raises(error, match=message):
        ddpm_step(**{**inputs, **change})


def test_the_samplers_take_their_own_tables() -> None:
    inputs = Case().inputs()
    with pytest.raises(
        ValueError, match=r"table: has 7 columns: allowed are 5, of step_table\('ddim'\)"
    ):
        ddim_step(**inputs, patch_size=2)
    with pytest.raises(ValueError, match="table: has 5 columns"):
        ddpm_step(**{**inputs, "table": Case("ddim").inputs()["table"]}, patch_size=2)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (Case(), {"step": torch.tensor(10)}, "step=10: allowed are 0 to 9"),
        (Case(), {"step": torch.tensor([-1])}, "step=-1: allowed are 0 to 9"),
        (Case("ddim", eta=0.5), {"noise": None}, "noise=None: step 5 of this table adds noise"),
        (Case(), {"cfg_scale": torch.tensor(math.nan)}, "cfg_scale=nan: must be finite"),
    ],
    ids=["past the end", "negative", "noise", "cfg_scale"],
)
def test_values_are_checked_in_full_validation(
    case: Case, change: dict[str, Any], message: str
) -> None:
    inputs = case.inputs()
    with fastdit.validate("full"):
        case.run(inputs)
        with pytest.raises(ValueError, match=message):
            case.run({**inputs, **change})


@pytest.mark.parametrize("t", [-1, STEPS])
def test_the_reference_refuses_a_step_that_is_not_in_the_table(t: int) -> None:
    case = Case()
    with pytest.raises(IndexError):
        case.run({**case.inputs(), "step": torch.tensor(t)})
