from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdit
from fastdit import reference
from fastdit.models import DiT_models, multiply_adds
from fastdit.testing import assert_model_close, relative_rms

from .helpers import (
    CONDITIONINGS,
    assert_matches_reference,
    each_conditioning,
    make_inputs,
    make_model,
    twin,
)

GOLDEN = Path(__file__).parents[1] / "golden"
FORMULA = json.loads((GOLDEN / "formula_dit.json").read_text())
ZOO = json.loads((GOLDEN / "model_zoo.json").read_text())

both = pytest.mark.parametrize(
    "implementation", [reference.DiT, fastdit.DiT], ids=["reference", "fastdit"]
)


# The original's outputs.


def _golden_model(
    implementation: Callable[..., nn.Module],
    config: dict[str, Any],
    weights: dict[str, Tensor],
    dtype: torch.dtype,
) -> Any:
    model = implementation(**config).to(dtype).eval()
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()})
    return model


def _assert_golden(found: Tensor, golden: Tensor, exact: Tensor, limit: float) -> None:
    """Within `limit` of the golden tensor's rms, and at most twice as far from float64 as the golden tensor is."""
    found, exact = found.detach(), exact.detach()
    assert found.dtype == torch.float32
    assert relative_rms(found, golden) <= limit
    assert (found - exact).abs().max() <= 2 * (golden - exact).abs().max()


@both
def test_golden_forward_and_gradients(
    implementation: Any,
    golden_config: dict[str, Any],
    golden_weights: dict[str, Tensor],
    golden_tensors: dict[str, Tensor],
) -> None:
    results = []
    for kind, dtype in ((implementation, torch.float32), (reference.DiT, torch.float64)):
        model = _golden_model(kind, golden_config, golden_weights, dtype)
        x = golden_tensors["x"].to(dtype, copy=True).requires_grad_()
        out = model(x, golden_tensors["t"], golden_tensors["y"])
        (out * golden_tensors["grad_weighting"].to(dtype)).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((out, {"x": x.grad, **gradients}))
    (out, gradients), (exact, exact_gradients) = results
    _assert_golden(out, golden_tensors["forward"], exact, 1e-5)
    names = [name[5:] for name in golden_tensors if name.startswith("grad.")]
    assert len(names) == 16
    for name in names:
        golden = golden_tensors[f"grad.{name}"]
        _assert_golden(gradients[name], golden, exact_gradients[name], 1e-4)


@both
def test_golden_guidance(
    implementation: Any,
    golden_config: dict[str, Any],
    golden_weights: dict[str, Tensor],
    golden_tensors: dict[str, Tensor],
) -> None:
    x, t = golden_tensors["x"].repeat(2, 1, 1, 1), golden_tensors["t"].repeat(2)
    y = torch.cat([golden_tensors["y"], torch.full_like(golden_tensors["y"], 10)])
    model = _golden_model(implementation, golden_config, golden_weights, torch.float32)
    exact_model = _golden_model(reference.DiT, golden_config, golden_weights, torch.float64)
    with torch.no_grad():
        found = model.forward_with_cfg(x, t, y, 4.0)
        exact = exact_model.forward_with_cfg(x.double(), t, y, 4.0)
    _assert_golden(found, golden_tensors["forward_with_cfg_scale_4"], exact, 1e-5)


def _wave(phase: int, *shape: int, amplitude: float = 1.0) -> Tensor:
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (amplitude * torch.sin(0.37 * i + 1.3 * phase)).float().view(shape)


@both
def test_golden_formula(implementation: Any) -> None:
    model = implementation(**FORMULA["config"]).eval()
    weights = model.state_dict()
    assert list(weights) == FORMULA["key_order"]
    for k, (name, weight) in enumerate(weights.items()):
        if name != "pos_embed":
            weight.copy_(_wave(k, *weight.shape, amplitude=0.1))
    guided = FORMULA["forward_with_cfg"]
    with torch.no_grad():
        outputs = {
            "forward": model(
                _wave(100, 3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 10])
            ),
            "forward_with_cfg": model.forward_with_cfg(
                _wave(101, 4, 4, 8, 8), torch.tensor(guided["t"]), torch.tensor(guided["y"]), 4.0
            ),
        }
    for call, out in outputs.items():
        expected, flat = FORMULA[call], out.double().flatten()
        limit = 1e-5 * math.hypot(expected["mean"], expected["std"])
        assert list(out.shape) == expected["shape"]
        for index, value in expected["at"].items():
            assert flat[int(index)].item() == pytest.approx(value, rel=0, abs=limit)
        assert flat.mean().item() == pytest.approx(expected["mean"], rel=0, abs=limit)
        assert flat.std().item() == pytest.approx(expected["std"], rel=0, abs=limit)
        assert flat.abs().sum().item() == pytest.approx(expected["abs_sum"], rel=1e-5)


# The original's sizes, names and initialisation.


def _assert_zoo(model: nn.Module, name: str) -> None:
    expected = ZOO[name]
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == expected["params"]
    assert sum(p.numel() for p in parameters if p.requires_grad) == expected["trainable_params"]
    assert not list(model.buffers())
    if "state_dict" in expected:
        shapes = [[key, list(value.shape)] for key, value in model.state_dict().items()]
        assert shapes == [[key, shape] for key, shape in expected["state_dict"].items()]
    assert len(model.state_dict()) == 10 * len(model.blocks) + 12


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name: str) -> None:
    assert list(DiT_models) == list(ZOO)
    with torch.device("meta"):
        _assert_zoo(DiT_models[name](), name)


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-XL/2"])
def test_reference_has_the_same_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        _assert_zoo(reference.DiT(**DiT_models[name]().config), name)


def test_zoo_constructors_are_exported() -> None:
    for name, constructor in DiT_models.items():
        assert getattr(fastdit, name.replace("-", "_").replace("/", "_")) is constructor


def test_initialisation_is_the_originals_for_a_seed() -> None:
    torch.manual_seed(0)
    weights = DiT_models["DiT-S/2"]().state_dict()
    sums = {  # of facebookresearch/DiT on CPU, torch 2.13
        "x_embedder.proj.weight": 5.336886,
        "t_embedder.mlp.0.weight": -3.060853,
        "blocks.0.attn.qkv.weight": 25.466588,
        "blocks.11.mlp.fc2.weight": 5.890011,
        "pos_embed": 44720.338543,
    }
    for name, expected in sums.items():
        assert weights[name].double().sum().item() == pytest.approx(expected, rel=0, abs=1e-6)


@each_conditioning
def test_initialisation(conditioning: str) -> None:
    model = fastdit.DiT(
        input_size=4, hidden_size=64, depth=2, num_heads=2, conditioning=conditioning
    )
    modulations = 0
    for name, parameter in model.named_parameters():
        modulation = "adaLN_modulation" in name
        modulations += modulation
        zero = name.startswith("final_layer.linear") or (
            name.endswith("bias") or (modulation and conditioning == "adaln_zero")
        )
        assert bool((parameter == 0).all()) == zero, name
        if name.startswith("t_embedder") and name.endswith("weight"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
    assert modulations == {"adaln_zero": 6, "adaln": 6}.get(conditioning, 0)
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.05)
    x, t, y = make_inputs(model)
    assert torch.equal(model(x, t, y), torch.zeros(3, 8, 4, 4))


def test_constructor_is_the_originals() -> None:
    with torch.device("meta"):
        model = fastdit.DiT()
        positional = fastdit.DiT(16, 4, 3, 96, 2, 6, 2.0, 0.0, 7, False)
    assert model.config == {
        "input_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 1152,
        "depth": 28,
        "num_heads": 16,
        "mlp_ratio": 4.0,
        "class_dropout_prob": 0.1,
        "num_classes": 1000,
        "learn_sigma": True,
        "conditioning": "adaln_zero",
    }
    assert list(positional.config.values())[:10] == [16, 4, 3, 96, 2, 6, 2.0, 0.0, 7, False]
    assert (model.in_channels, model.out_channels, model.learn_sigma) == (4, 8, True)
    assert (model.patch_size, model.num_heads, model.null_label) == (2, 16, 1000)
    assert (model.x_embedder.num_patches, model.x_embedder.patch_size) == (256, (2, 2))
    assert (positional.out_channels, positional.null_label, positional.input_size) == (
        3,
        None,
        (16, 16),
    )


@each_conditioning
def test_config_makes_the_same_model(conditioning: str) -> None:
    model = make_model(
        conditioning, input_size=(4, 8), mlp_ratio=2.5, class_dropout_prob=0.0, learn_sigma=False
    )
    config = json.loads(json.dumps(model.config))
    other = fastdit.DiT(**config).eval()
    other.load_state_dict(model.state_dict())
    inputs = make_inputs(model)
    assert other.config == config
    assert torch.equal(other(*inputs), model(*inputs))


@pytest.mark.parametrize(
    ("conditioning", "parameters", "giga"),
    [  # Peebles & Xie, figure 5 and section 3.2; without the frozen position embedding
        ("adaln_zero", 675, 118.64),
        ("adaln", 600, 118.56),
        ("cross_attention", 598, 137.62),
        ("in_context", 449, 119.37),
    ],
)
def test_sizes_of_the_paper(conditioning: str, parameters: int, giga: float) -> None:
    with torch.device("meta"):
        model = DiT_models["DiT-XL/2"](conditioning=conditioning)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert round(trained / 1e6) == parameters
    assert multiply_adds(model) / 1e9 == pytest.approx(giga, abs=0.03)


def test_multiply_adds_by_hand() -> None:
    model = make_model(input_size=(4, 8), learn_sigma=False)
    d, tokens, depth = 48, 8, 3
    block = tokens * (3 * d * d + d * d + 8 * d * d) + 2 * tokens * tokens * d + 6 * d * d
    ends = tokens * 16 * d + 256 * d + d * d + tokens * d * 16 + 2 * d * d
    assert multiply_adds(model) == depth * block + ends


def test_multiply_adds_is_not_disturbed_by_validation() -> None:
    model = make_model()
    expected = multiply_adds(model)
    with fastdit.validate("full"):
        assert multiply_adds(model) == expected


# Against the reference.


@each_conditioning
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_matches_the_reference(conditioning: str, dtype: torch.dtype) -> None:
    model = make_model(conditioning, hidden_size=144).to(dtype)
    assert_matches_reference(model, *make_inputs(model, dtype=dtype))


@pytest.mark.parametrize(
    "arguments",
    [
        {"patch_size": 4},
        {"patch_size": 1, "input_size": 4},
        {"in_channels": 1, "learn_sigma": False},
        {"in_channels": 8, "num_classes": 1, "mlp_ratio": 1.5},
        {"class_dropout_prob": 0.0, "depth": 1, "num_heads": 1},
        {"input_size": (2, 6)},
        {"input_size": 2},  # a single token
    ],
    ids=str,
)
def test_other_sizes_match_the_reference(arguments: dict[str, Any]) -> None:
    model = make_model(**arguments)
    assert_matches_reference(model, *make_inputs(model))


@each_conditioning
def test_label_dropout_in_training(conditioning: str) -> None:
    model = make_model(conditioning, class_dropout_prob=0.5).train()
    x, t, y = make_inputs(model, n=8)
    y = torch.arange(8)
    torch.manual_seed(3)
    out = model(x, t, y)
    torch.manual_seed(3)
    drop = torch.rand(8) < 0.5  # the original's only draw
    assert 0 < drop.sum() < 8
    assert torch.equal(out, model.eval()(x, t, torch.where(drop, 10, y)))


def test_dropout_of_every_label_and_of_none() -> None:
    for probability in (0.0, 1.0):
        model = make_model(class_dropout_prob=probability)
        x, t, _ = make_inputs(model)
        y = torch.tensor([1, 2, 3])
        null = torch.full_like(y, 10) if probability else y
        assert torch.equal(model.train()(x, t, y), model.eval()(x, t, null))


def test_label_and_timestep_matter() -> None:
    model = make_model()
    x, t, y = make_inputs(model)
    out = model(x, t, y)
    for changed in (model(x, t + 1, y), model(x, t, (y + 1) % 10)):
        assert all((changed - out).abs().amax((1, 2, 3)) > 1e-3)


def test_neighbouring_timesteps_differ_in_bfloat16() -> None:
    model = make_model().bfloat16()
    x, _, y = make_inputs(model, n=2, dtype=torch.bfloat16)
    x, y = x[:1].expand(2, -1, -1, -1), y[:1].expand(2)
    a, b = model(x, torch.tensor([256, 257]), y)
    assert not torch.equal(a, b)  # 257 is no bfloat16 number


@each_conditioning
def test_samples_do_not_see_each_other(conditioning: str) -> None:
    model = make_model(conditioning)
    x, t, y = make_inputs(model, n=4)
    with torch.no_grad():
        whole = model(x, t, y)
        exact = twin(model, torch.float64)(x.double(), t, y)
        flipped = model(x.flip(0), t.flip(0), y.flip(0)).flip(0)
        assert_model_close("flipped", flipped, exact, whole)
        alone = model(x[2:3], t[2:3], y[2:3])
        assert_model_close("alone", alone, exact[2:3], whole[2:3])
        for bad in (math.nan, math.inf):
            poisoned = x.clone()
            poisoned[1, 0, 0, 0] = bad
            out = model(poisoned, t, y)
            assert torch.equal(out[[0, 2, 3]], whole[[0, 2, 3]])
            assert not out[1].isfinite().any()


# Guidance.


def _guided(
    model: fastdit.DiT, x: Tensor, t: Tensor, y: Tensor, scale: float | Tensor, channels: int
) -> Tensor:
    """What guidance means, sample by sample and channel by channel."""
    n = len(x) // 2
    cond, uncond = model(torch.cat([x[:n], x[:n]]), t, y).chunk(2)
    scales = scale.tolist() if isinstance(scale, Tensor) else [scale] * n
    out = torch.cat([cond, uncond]).clone()
    for i, s in enumerate(scales):
        for channel in range(channels):
            a, b = cond[i, channel], uncond[i, channel]
            out[i, channel] = out[n + i, channel] = b + s * (a - b)
    return out


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize(
    ("in_channels", "cfg_channels", "guided"),
    [(4, 3, 3), (4, "all", 4), (1, 3, 1), (1, "all", 1), (2, 3, 2), (8, 3, 3), (8, "all", 8)],
)
def test_guided_channels(
    in_channels: int, cfg_channels: Any, guided: int, learn_sigma: bool
) -> None:
    model = make_model(in_channels=in_channels, learn_sigma=learn_sigma, depth=1)
    x, t, y = make_inputs(model, n=4)
    for scale in (4.0, 0, -1.5, 1e6, torch.tensor([0.5, 7.0])):
        with torch.no_grad():
            out = model.forward_with_cfg(x, t, y, scale, cfg_channels=cfg_channels)
            assert torch.equal(out, _guided(model, x, t, y, scale, guided))
            if cfg_channels == 3:
                assert torch.equal(out, model.forward_with_cfg(x, t, y, scale))


def test_guidance_ignores_the_second_half_of_x() -> None:
    model = make_model()
    x, t, y = make_inputs(model, n=4)
    with torch.no_grad():
        out = model.forward_with_cfg(x, t, y, 2.0)
        assert torch.equal(model.forward_with_cfg(torch.cat([x[:2], -x[2:]]), t, y, 2.0), out)


@pytest.mark.parametrize(
    "scale",
    [
        torch.tensor([2.0, 5.0]),
        torch.tensor([2.0, 5.0]).view(2, 1, 1, 1),
        torch.tensor([2, 5]),
        torch.tensor([2.0, 5.0], dtype=torch.float64),
    ],
    ids=["(N,)", "(N, 1, 1, 1)", "integers", "double"],
)
def test_one_scale_a_sample(scale: Tensor) -> None:
    model = make_model()
    x, t, y = make_inputs(model, n=4)
    with torch.no_grad():
        out = model.forward_with_cfg(x, t, y, scale)
        assert out.dtype == torch.float32
        for i, number in enumerate((2.0, 5.0)):
            alone = model.forward_with_cfg(x, t, y, number)
            assert torch.equal(out[[i, i + 2]], alone[[i, i + 2]])
        assert torch.equal(
            model.forward_with_cfg(x, t, y, torch.tensor(5.0)),
            model.forward_with_cfg(x, t, y, 5.0),
        )


def test_guidance_of_scale_one_is_the_conditional_model() -> None:
    model = make_model()
    x, t, y = make_inputs(model, n=4)
    with torch.no_grad():
        out = model.forward_with_cfg(x, t, y, 1.0)[:2]
        conditional = model(x[:2], t[:2], y[:2])
        exact = twin(model, torch.float64)(x[:2].double(), t[:2], y[:2])
    assert_model_close("scale 1", out, exact, conditional)


# Arguments that the original does not have.


@each_conditioning
def test_rectangular_input(conditioning: str) -> None:
    model = make_model(conditioning, input_size=(4, 12))
    assert_matches_reference(model, *make_inputs(model))
    square = make_model(conditioning, input_size=12)
    grid = square.pos_embed.view(6, 6, 48)
    assert torch.equal(model.pos_embed.view(2, 6, 48), grid[:2])
    tall = make_model(conditioning, input_size=(12, 4))
    assert torch.equal(tall.pos_embed.view(6, 2, 48), grid[:, :2])
    assert not torch.equal(grid[:2], grid[:, :2].transpose(0, 1))


def test_rectangular_output_keeps_rows_and_columns() -> None:
    """With one pixel a patch and no blocks' influence, a pixel's output depends on that pixel and its position only."""
    model = make_model(input_size=(2, 3), patch_size=1, depth=1)
    for name, parameter in model.blocks.named_parameters():
        if name.endswith(("attn.proj.weight", "attn.proj.bias")):
            parameter.data.zero_()
    x, t, y = make_inputs(model, n=1)
    with torch.no_grad():
        out = model(x, t, y)
        changed = x.clone()
        changed[0, :, 1, 2] += 1
        moved = (model(changed, t, y) - out).abs().sum(1)[0] > 0
    assert moved.nonzero().tolist() == [[1, 2]]


@each_conditioning
def test_return_hidden_is_what_a_hook_sees(conditioning: str) -> None:
    model = make_model(conditioning)
    inputs = make_inputs(model)
    with torch.no_grad():
        plain = model(*inputs)
        out, hidden = model(*inputs, return_hidden=[2, 0])
        assert torch.equal(out, plain)
        assert model(*inputs, return_hidden=[])[1] == []
        seen: list[Tensor] = []
        handles = [
            model.blocks[i].register_forward_hook(lambda m, a, o: seen.append(o)) for i in (0, 2)
        ]
        model(*inputs)
        for handle in handles:
            handle.remove()
    assert [h.shape for h in hidden] == [(3, 16, 48)] * 2
    for returned, observed in zip(hidden, seen, strict=True):
        image_tokens = observed[:, :-2] if conditioning == "in_context" else observed
        assert torch.equal(returned, image_tokens)


@each_conditioning
def test_return_hidden_is_differentiable_and_right(conditioning: str) -> None:
    model = make_model(conditioning)
    x, t, y = make_inputs(model)
    streams = []
    for dtype in (torch.float32, torch.float64):
        other = twin(model, dtype)
        other.blocks[1].register_forward_hook(lambda m, a, o: streams.append(o[:, :16]))
        other(x.to(dtype), t, y)
    _, (hidden,) = model(x, t, y, return_hidden=[1])
    assert_model_close("hidden", hidden.detach(), streams[1].detach(), streams[0].detach())
    hidden.square().sum().backward()
    assert model.blocks[1].mlp.fc2.weight.grad.abs().sum() > 0
    assert model.blocks[2].mlp.fc2.weight.grad is None


@each_conditioning
def test_forward_tokens_is_forward_before_unpatchify(conditioning: str) -> None:
    model = make_model(conditioning, input_size=(4, 6))
    inputs = make_inputs(model)
    with torch.no_grad():
        tokens = model.forward_tokens(*inputs)
        assert tokens.shape == (3, 6, 2 * 2 * 8)
        out = model(*inputs)
    # out[c, 2h + p, 2w + q] = tokens[h * W + w, (p * 2 + q) * 8 + c]
    for c, h, p, w, q in ((0, 0, 0, 0, 1), (7, 1, 1, 2, 0), (3, 1, 0, 1, 1)):
        assert torch.equal(
            out[:, c, 2 * h + p, 2 * w + q], tokens[:, h * 3 + w, (p * 2 + q) * 8 + c]
        )
    assert torch.equal(model.unpatchify(tokens), out)


def test_unpatchify_takes_any_square_number_of_tokens() -> None:
    """As the original's; otherwise the grid is the model's."""
    model = make_model(input_size=(4, 6))
    tokens = torch.randn(2, 25, 32)
    images = model.unpatchify(tokens)
    assert images.shape == (2, 8, 10, 10)
    assert torch.equal(images[:, 3, 2, 5], tokens[:, 5 + 2, 8 + 3])
    with pytest.raises(ValueError, match=r"tokens: .*got \(2, 7, 32\)"):
        model.unpatchify(torch.randn(2, 7, 32))
    with pytest.raises(ValueError, match=r"tokens: .*got \(6, 32\)"):
        model.unpatchify(torch.randn(6, 32))


@each_conditioning
def test_wide_residual_stream_is_more_accurate(conditioning: str) -> None:
    errors = []
    for residual_dtype in (None, torch.float32):
        model = make_model(conditioning, depth=8, residual_dtype=residual_dtype).bfloat16()
        inputs = make_inputs(model, n=4, dtype=torch.bfloat16)
        with torch.no_grad():
            out, (hidden,) = model(*inputs, return_hidden=[7])
            exact = twin(model, torch.float64)(inputs[0].double(), *inputs[1:])
        assert out.dtype == torch.bfloat16
        assert hidden.dtype == (residual_dtype or torch.bfloat16)
        errors.append(relative_rms(out, exact))
    assert errors[1] < 0.9 * errors[0]


@each_conditioning
def test_autocast_keeps_the_residual_stream_in_float32(conditioning: str) -> None:
    model = make_model(conditioning)
    x, t, y = make_inputs(model)
    with torch.no_grad():
        exact = twin(model, torch.float64)(x.double(), t, y)
        with torch.autocast("cpu", torch.bfloat16):
            plain = twin(model, torch.float32)(x, t, y)
            out, hidden = model(x, t, y, return_hidden=range(3))
            low, _ = model(x.bfloat16(), t, y, return_hidden=range(3))
    assert out.dtype == low.dtype == torch.bfloat16
    assert {h.dtype for h in hidden} == {torch.float32}
    assert_model_close("autocast", out, exact, plain)
    for weights, residual_dtype, expected in (
        (torch.bfloat16, None, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ):
        model.to(weights).residual_dtype = residual_dtype
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            _, hidden = model(x, t, y, return_hidden=[0])
        assert hidden[0].dtype == expected


@each_conditioning
def test_gradients_under_autocast(conditioning: str) -> None:
    """As far from float64 as the reference under autocast, and in the dtype of the weights."""
    model = make_model(conditioning)
    x, t, y = make_inputs(model)
    gradients = []
    for other, dtype in (
        (model, torch.float32),
        (twin(model, torch.float32), torch.float32),
        (twin(model, torch.float64), torch.float64),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
            loss = other(x.to(dtype), t, y).float().square().mean()
        loss.backward()
        gradients.append({n: p.grad for n, p in other.named_parameters() if p.requires_grad})
    out, plain, exact = gradients
    for name, gradient in out.items():
        assert gradient.dtype == torch.float32
        allowed = 2 * relative_rms(plain[name], exact[name])
        assert relative_rms(gradient, exact[name]) <= allowed, name


def test_conditionings_differ() -> None:
    names = [tuple(make_model(c).state_dict()) for c in CONDITIONINGS]
    assert len(set(names)) == 3  # adaLN has the names of adaLN-Zero, in other shapes
    shapes = [
        make_model(c).state_dict().get("blocks.0.adaLN_modulation.1.weight") for c in CONDITIONINGS
    ]
    assert [None if s is None else len(s) for s in shapes] == [288, 192, None, None]
