"""A step neither reads from the device nor copies to it, so that it can be captured in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdit.diffusion import GaussianDiffusion, create_diffusion

from .stubs import smooth_model

# Reading one value; making a tensor out of Python or NumPy values.
FORBIDDEN = (
    "aten._local_scalar_dense",
    "aten.lift_fresh",
    "aten.lift_fresh_copy",
    "aten.scalar_tensor",
)


class OnDeviceOnly(TorchDispatchMode):
    """Raises at an operation that waits for the device or lets a tensor from elsewhere take part.

    On a CPU only the forbidden operations show; on "meta" so does every copy from the host.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.operations = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.operations += 1
        out = func(*args, **(kwargs or {}))
        name = str(func).rsplit(".", 1)[0]
        if name in FORBIDDEN:
            raise AssertionError(f"{name} in a step")
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor) and leaf.device.type != self.device:
                raise AssertionError(f"{name} with a tensor on {leaf.device}")
        return out


def _cond_fn(x: Tensor, t: Tensor) -> Tensor:
    return -x


STEPS: dict[str, Callable[[GaussianDiffusion, Any, Tensor, Tensor], Any]] = {
    "p_sample": lambda d, model, x, t: d.p_sample(model, x, t),
    "p_sample_given_noise": lambda d, model, x, t: d.p_sample(model, x, t, step_noise=x),
    "p_sample_guided": lambda d, model, x, t: d.p_sample(model, x, t, cond_fn=_cond_fn),
    "ddim_sample": lambda d, model, x, t: d.ddim_sample(model, x, t, eta=0.5),
    "ddim_sample_guided": lambda d, model, x, t: d.ddim_sample(model, x, t, cond_fn=_cond_fn),
    "ddim_reverse_sample": lambda d, model, x, t: d.ddim_reverse_sample(model, x, t),
    "training_losses": lambda d, model, x, t: d.training_losses(model, x, t),
    "q_mean_variance": lambda d, model, x, t: d.q_mean_variance(x, t),
    "p_sample_loop": lambda d, model, x, t: d.p_sample_loop(model, x.shape, x),
    "ddim_sample_loop": lambda d, model, x, t: d.ddim_sample_loop(model, x.shape, device=x.device),
    "calc_bpd_loop": lambda d, model, x, t: d.calc_bpd_loop(model, x),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "learned": {},
    "fixed": {"learn_sigma": False},
    "x_start": {"predict_xstart": True, "rescale_learned_sigmas": True},
    "kl": {"use_kl": True},
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_step_stays_on_its_device(
    step: Callable[..., Any], options: dict[str, Any], device: str
) -> None:
    diffusion = create_diffusion("4", **options)
    diffusion.tables(torch.device(device))
    model = smooth_model(2 if options.get("learn_sigma", True) else 1)
    x = torch.zeros(2, 3, 4, 4, device=device)
    t = torch.tensor([0, 3], device=device)
    with OnDeviceOnly(device) as mode:
        step(diffusion, model, x, t)
    assert mode.operations > 0


@pytest.mark.parametrize(
    ("device", "offence"),
    [
        ("cpu", lambda: torch.tensor([3] * 2)),
        ("cpu", lambda: torch.from_numpy(np.ones(2))),
        ("cpu", lambda: torch.zeros(()).item()),
        ("meta", lambda: torch.from_numpy(np.ones(2)).to("meta")),
        ("meta", lambda: torch.zeros(2).to("meta")),
        ("meta", lambda: torch.zeros(2, device="meta") * torch.ones(())),
    ],
)
def test_the_mode_catches_offences(device: str, offence: Callable[[], Any]) -> None:
    with pytest.raises(AssertionError, match="aten"), OnDeviceOnly(device):
        offence()


def test_the_first_use_of_a_device_copies_the_tables() -> None:
    # What the mode above must not see is real: without the tables a step copies them.
    diffusion = create_diffusion("4")
    x, t = torch.zeros(2, 3, 4, 4, device="meta"), torch.tensor([0, 3], device="meta")
    with pytest.raises(AssertionError, match="aten"), OnDeviceOnly("meta"):
        diffusion.p_sample(smooth_model(), x, t)


def test_steps_of_a_run_share_one_table_of_timesteps() -> None:
    seen: list[Tensor] = []

    diffusion = create_diffusion("4")
    original = diffusion.p_sample

    def p_sample(model: Any, x: Tensor, t: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        seen.append(t)
        return original(model, x, t, **kwargs)

    diffusion.p_sample = p_sample  # type: ignore[method-assign]
    diffusion.p_sample_loop(smooth_model(), (2, 3, 4, 4), device="cpu")
    assert [t.tolist() for t in seen] == [[3, 3], [2, 2], [1, 1], [0, 0]]
    assert len({t.untyped_storage().data_ptr() for t in seen}) == 1
