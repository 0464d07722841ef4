"""`sample()` against the diffusion's own loops, what its seeds promise, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdit import DiT, create_diffusion
from fastdit.sampling import block_generator, sample
from fastdit.testing import assert_same_bits, assert_trajectory_close

CPU = torch.device("cpu")


def make_model(**changes: Any) -> DiT:
    """A small model whose weights are all drawn: as initialised it would predict zero."""
    sizes = {"input_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 10}
    model = DiT(**{**sizes, **changes})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def model() -> DiT:
    return make_model().eval()


def draw(model: DiT, labels: Any, **options: Any) -> Tensor:
    return sample(model, labels, **{"steps": 4, "progress": False, **options})


def block_noise(seed: int, block: int, steps: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x_T and the noise of every step (steps, *shape), in the order in which a block draws them."""
    generator = block_generator(seed, block, CPU)
    drawn = [torch.randn(shape, generator=generator) for _ in range(steps + 1)]
    return drawn[0], torch.stack(drawn[1:])


def assert_samples_close(name: str, out: Tensor, expected: Tensor) -> None:
    assert_trajectory_close(name, out[None], expected[None])


# ------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("channels", [3, "all"])
@pytest.mark.parametrize(
    ("sampler", "options", "respacing"),
    [
        ("ddpm", {}, "6"),
        ("ddim", {}, "ddim6"),
        ("ddim", {"eta": 0.7}, "ddim6"),
    ],
)
def test_equals_the_loop_on_a_doubled_batch(
    model: DiT, sampler: str, options: dict[str, float], respacing: str, channels: Any
) -> None:
    """As the original samples: the whole state is doubled, and the second half thrown away at the end.

    The images compared are the second block's.
    """
    labels = torch.tensor([1, 3, 5])
    out = draw(
        model,
        [0, 0, 0, *labels],
        steps=6,
        seed=9,
        sampler=sampler,
        cfg_scale=2.5,
        cfg_channels=channels,
        batch_size=3,
        **options,
    )

    x, step_noise = block_noise(9, 1, 6, (3, 4, 4, 4))
    diffusion = create_diffusion(respacing)
    loop: Callable[..., Tensor] = (
        diffusion.p_sample_loop if sampler == "ddpm" else diffusion.ddim_sample_loop
    )
    expected = loop(
        model.forward_with_cfg,
        (6, 4, 4, 4),
        torch.cat([x, x]),
        clip_denoised=False,
        model_kwargs={
            "y": torch.cat([labels, torch.full((3,), 10)]),
            "cfg_scale": 2.5,
            "cfg_channels": channels,
        },
        step_noise=torch.cat([step_noise, step_noise], dim=1),
        **options,
    )
    assert_samples_close(sampler, out[3:], expected[:3])


def test_without_guidance_the_model_sees_each_image_once(model: DiT) -> None:
    seen = []
    hook = model.x_embedder.register_forward_hook(lambda _, x, __: seen.append(len(x[0])))
    out = draw(model, [1, 2, 3], cfg_scale=1)
    assert seen == [3] * 4
    hook.remove()

    # Equal to guidance by 1, which another label's scale turns on for the whole batch.
    guided = draw(model, [1, 2, 3, 4], cfg_scale=torch.tensor([1.0, 1, 1, 2]))
    assert_samples_close("scale 1", out, guided[:3])


def test_a_scale_for_each_image(model: DiT) -> None:
    labels = [1, 2, 3, 4, 5]
    scales = torch.tensor([1.5, 4.0, 0.0, -1.0, 1.0])
    out = draw(model, labels, cfg_scale=scales, batch_size=2)
    for i, scale in enumerate(scales.tolist()):
        alone = draw(model, labels, cfg_scale=scale, batch_size=2)
        assert_samples_close(f"scale {scale}", out[i : i + 1], alone[i : i + 1])


def test_diffusion_options_reach_the_diffusion(model: DiT) -> None:
    x, step_noise = block_noise(0, 0, 4, (2, 4, 4, 4))
    diffusion = create_diffusion("4", noise_schedule="squaredcos_cap_v2", predict_xstart=True)
    expected = diffusion.p_sample_loop(
        model,
        x.shape,
        x,
        clip_denoised=False,
        model_kwargs={"y": torch.tensor([1, 2])},
        step_noise=step_noise,
    )
    options = {"noise_schedule": "squaredcos_cap_v2", "predict_xstart": True}
    out = draw(model, [1, 2], cfg_scale=1, batch_size=2, **options)
    assert_samples_close("cosine, x_0", out, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"learn_sigma": False},
        {"input_size": (4, 8)},
        {"in_channels": 1},
        {"conditioning": "in_context"},
        {"conditioning": "cross_attention"},
    ],
)
def test_every_kind_of_model(changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    out = draw(model, [0, 9, 10])  # 10 is the null class
    assert out.shape == (3, model.in_channels, *model.input_size)
    assert out.std() > 0


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_few_steps(model: DiT, sampler: str, steps: int) -> None:
    assert draw(model, [1], sampler=sampler, steps=steps).isfinite().all()


@pytest.mark.parametrize("scale", [0, -3.0, 1e6])
def test_any_finite_scale(model: DiT, scale: float) -> None:
    assert draw(model, [1, 2], cfg_scale=scale, steps=2).isfinite().all()


def test_dtypes(model: DiT) -> None:
    exact = draw(model.double(), [1, 2])
    assert exact.dtype == torch.float64
    half = draw(model.bfloat16(), [1, 2])
    assert half.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        mixed = draw(model.float(), [1, 2])
    assert mixed.dtype == torch.float32


# ------------------------------------------------------------------ seeds


def test_the_same_images_again_and_others_with_another_seed(model: DiT) -> None:
    first = draw(model, [1, 2, 3], seed=7)
    assert_same_bits("again", draw(model, [1, 2, 3], seed=7), first)
    assert not torch.equal(draw(model, [1, 2, 3], seed=8), first)


def test_a_longer_run_begins_with_the_images_of_a_shorter_one(model: DiT) -> None:
    long = draw(model, [1, 2, 3, 4, 5, 6, 7], batch_size=3)
    for count in (1, 2, 3, 5):
        short = draw(model, [1, 2, 3, 4, 5, 6, 7][:count], batch_size=3)
        assert_samples_close(f"{count} images", long[:count], short)


def test_all_blocks_and_seeds_have_noise_of_their_own(model: DiT) -> None:
    out = torch.cat([draw(model, [1] * 6, batch_size=2, seed=seed) for seed in (0, 1)])
    distances = torch.cdist(out.flatten(1), out.flatten(1)) + torch.eye(len(out))
    assert distances.min() > 0.1


def test_the_global_generator_is_left_alone(model: DiT) -> None:
    before = torch.get_rng_state()
    draw(model, [1, 2])
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------ what surrounds a run


def test_training_flags_are_restored(model: DiT) -> None:
    model.train()
    model.blocks[0].mlp.eval()  # frozen by somebody
    flags = {name: module.training for name, module in model.named_modules()}
    draw(model, [1])
    assert {name: module.training for name, module in model.named_modules()} == flags

    def stop(start: int, images: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(model, [1], callback=stop)
    assert {name: module.training for name, module in model.named_modules()} == flags


def test_labels_are_not_dropped_in_train_mode() -> None:
    model = make_model(class_dropout_prob=1.0)
    assert_same_bits("train mode", draw(model.train(), [1, 2]), draw(model.eval(), [1, 2]))


def test_outputs_can_be_trained_on(model: DiT) -> None:
    with torch.inference_mode():
        images = draw(model, [1, 2])
    assert not images.is_inference()
    assert not images.requires_grad
    model(images, torch.tensor([1, 2]), torch.tensor([1, 2])).sum().backward()
    assert model.x_embedder.proj.weight.grad.abs().sum() > 0


def test_callback_gets_every_block(model: DiT) -> None:
    blocks: list[tuple[int, Tensor]] = []
    out = draw(
        model,
        [1, 2, 3, 4, 5],
        batch_size=2,
        callback=lambda start, images: blocks.append((start, images.clone())),
    )
    assert [(start, len(images)) for start, images in blocks] == [(0, 2), (2, 2), (4, 1)]
    assert_same_bits("blocks", torch.cat([images for _, images in blocks]), out)


def test_progress_shows_images_per_second(
    model: DiT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(model, [1, 2, 3], progress=True)
    assert capsys.readouterr().err == ""  # not a terminal
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    draw(model, [1, 2, 3], progress=True)
    err = capsys.readouterr().err
    assert "3/3" in err
    assert "images/s" in err
    draw(model, [1, 2, 3], progress=False)
    assert capsys.readouterr().err == ""


def test_no_labels_no_images(model: DiT) -> None:
    assert draw(model, []).shape == (0, 4, 4, 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype(model: DiT, dtype: torch.dtype) -> None:
    assert_same_bits(
        str(dtype), draw(model, torch.tensor([1, 9], dtype=dtype)), draw(model, [1, 9])
    )


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([3, -1], ValueError, r"labels\[1\]=-1: allowed are 0 to 9; .*null_label=10"),
        ([11], ValueError, r"labels\[0\]=11: allowed are 0 to 9"),
        ([1.0], TypeError, "labels: .*torch.float32"),
        ([True], TypeError, "labels: .*torch.bool"),
        (
            torch.eye(10, dtype=torch.int64),
            ValueError,
            r"labels: .*\(10, 10\); for one-hot labels use argmax",
        ),
        (torch.tensor([[1], [2]]), ValueError, r"labels: .*\(2, 1\)"),
        (3, ValueError, r"labels: expected shape \(N,\)"),
        (None, TypeError, "labels: .*None"),
        (["3"], TypeError, "labels: .*'3'"),
    ],
)
def test_bad_labels(model: DiT, labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        draw(model, labels)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cfg_scale": float("nan")}, ValueError, "cfg_scale=nan"),
        ({"cfg_scale": float("inf")}, ValueError, "cfg_scale=inf"),
        ({"cfg_scale": None}, TypeError, "cfg_scale=None"),
        ({"cfg_scale": "4"}, TypeError, "cfg_scale='4'"),
        ({"cfg_scale": True}, TypeError, "cfg_scale=True"),
        ({"cfg_scale": torch.ones(3)}, ValueError, r"cfg_scale: .*\(2,\).*\(3,\)"),
        ({"cfg_scale": torch.ones(2, 1)}, ValueError, r"cfg_scale: .*\(2, 1\)"),
        ({"cfg_scale": torch.tensor([1.0, torch.nan])}, ValueError, "cfg_scale=.*nan"),
        ({"cfg_scale": torch.tensor(torch.inf)}, ValueError, "cfg_scale=inf"),
        ({"cfg_channels": 2}, ValueError, "cfg_channels=2: allowed are 3, 'all'"),
        ({"steps": 0}, ValueError, "steps=0: allowed are 1 to 1000"),
        ({"steps": 1001}, ValueError, "steps=1001: allowed are 1 to 1000"),
        ({"steps": 51, "diffusion_steps": 50}, ValueError, "steps=51: allowed are 1 to 50"),
        ({"steps": 2.5}, TypeError, "steps=2.5"),
        ({"steps": True}, TypeError, "steps=True"),
        ({"steps": 60, "sampler": "ddim"}, ValueError, "steps=60 .*nearest counts are 59 and 63"),
        ({"sampler": "dim"}, ValueError, "sampler='dim': .*did you mean 'ddim'"),
        ({"eta": 0.5}, ValueError, "eta=0.5"),
        ({"eta": 1.5, "sampler": "ddim"}, ValueError, "eta=1.5"),
        ({"eta": None}, TypeError, "eta=None"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"seed": None}, TypeError, "seed=None"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"cfg_scal": 2.0}, TypeError, "cfg_scal: .*did you mean 'cfg_scale'"),
        ({"noise_schedul": "linear"}, TypeError, "noise_schedul: .*did you mean 'noise_schedule'"),
        ({"noise_schedule": "line"}, ValueError, "noise_schedule='line'"),
        ({"learn_sigma": False}, ValueError, "learn_sigma=False: the model has learn_sigma=True"),
    ],
)
def test_bad_options(
    model: DiT, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        draw(model, [1, 2], **options)


def test_a_model_without_null_class_is_sampled_without_guidance_only() -> None:
    model = make_model(class_dropout_prob=0.0)
    assert draw(model, [1, 9], cfg_scale=1).isfinite().all()
    with pytest.raises(ValueError, match=r"cfg_scale=1.5: this model has no null class"):
        draw(model, [1, 9], cfg_scale=1.5)
    with pytest.raises(
        ValueError, match=r"labels\[0\]=10: allowed are 0 to 9; this model has no null class"
    ):
        draw(model, [10], cfg_scale=1)


def test_cfg_scale_keeps_its_digits(model: DiT) -> None:
    """It has the dtype of the state, not torch's default one, and not float32 for a float64 model."""
    expected = draw(model, [1, 2], cfg_scale=4.3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        out = draw(model, [1, 2], cfg_scale=4.3)
    finally:
        torch.set_default_dtype(before)
    assert_same_bits("default dtype", out, expected)

    model.double()
    exact = torch.full((2,), 1.1, dtype=torch.float64)
    out = draw(model, [1, 2], cfg_scale=1.1)
    assert_same_bits("float64", out, draw(model, [1, 2], cfg_scale=exact))
    assert not torch.equal(out, draw(model, [1, 2], cfg_scale=exact.float()))


def test_what_is_not_finite_is_named(model: DiT) -> None:
    with torch.no_grad():
        model.y_embedder.embedding_table.weight[7] = torch.nan
    with pytest.raises(
        FloatingPointError, match="2 of 4 images hold NaN or Inf, the first is image 1"
    ):
        draw(model, [1, 7, 2, 7])


@pytest.mark.gpu
def test_on_cuda(model: DiT) -> None:
    model.cuda()
    out = draw(model, [1, 2, 3], batch_size=2, cfg_scale=torch.tensor([1.0, 2, 3]))
    assert out.device.type == "cuda"
    assert_same_bits(
        "again", draw(model, [1, 2, 3], batch_size=2, cfg_scale=torch.tensor([1.0, 2, 3])), out
    )
