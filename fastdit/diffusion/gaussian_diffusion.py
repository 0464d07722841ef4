"""Gaussian diffusion: what a model makes of the forward process, training losses and samplers.

t counts this process's own steps, 0 … num_timesteps-1; a respaced process has fewer than the
original one, and the model is always given the original's index, `timestep_map[t]`. Each
coefficient is a table over t, made once in float64 and kept on each device on which it is used, so
a step copies nothing to the device and reads nothing back. Arithmetic is done in float32 (float64
for float64 inputs), and a state is returned in the dtype in which it came.

Sources: Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Nichol & Dhariwal 2021 (Improved DDPM),
Dhariwal & Nichol 2021 (guidance).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..reference.diffusion_step import StepCoefficients
from ..validation import require_choice, require_floating
from .forward_process import Array, ForwardProcess
from .inputs import check_timesteps, noise_like, require_like, start_noise
from .losses import discretized_gaussian_log_likelihood, mean_flat, normal_kl

MEAN_TYPES = ("epsilon", "x_start")
FIXED_VARIANCES = {
    "fixed_large": ("large_variance", "large_log_variance"),
    "fixed_small": ("posterior_variance", "posterior_log_variance_clipped"),
}
VARIANCE_TYPES = ("learned_range", *FIXED_VARIANCES)
LOSS_TYPES = ("mse", "rescaled_mse", "kl", "rescaled_kl")

Model = Callable[..., Any]
Kwargs = dict[str, Any]


class GaussianDiffusion(ForwardProcess):
    """A forward process, and what a model makes of it: training losses and samplers.

    Args:
        betas, use_timesteps: as `ForwardProcess`.
        mean_type: what the model predicts, `"epsilon"` or `"x_start"`.
        variance_type: `"learned_range"` (the model's second half of channels interpolates between
            the logarithms of beta and of the posterior's variance), `"fixed_large"` (beta) or
            `"fixed_small"` (the posterior's variance).
        loss_type: `"mse"` (plus the variational bound where the variance is learned),
            `"rescaled_mse"` (the same with the bound times num_timesteps / 1000), `"kl"` (the bound
            alone) or `"rescaled_kl"` (times num_timesteps).

    Attributes as `ForwardProcess`. Raises ValueError naming the argument.
    """

    def __init__(
        self,
        betas: Array,
        use_timesteps: Collection[int] | None = None,
        *,
        mean_type: str = "epsilon",
        variance_type: str = "learned_range",
        loss_type: str = "mse",
    ) -> None:
        super().__init__(betas, use_timesteps)
        require_choice("mean_type", mean_type, MEAN_TYPES)
        require_choice("variance_type", variance_type, VARIANCE_TYPES)
        require_choice("loss_type", loss_type, LOSS_TYPES)
        self.mean_type, self.variance_type, self.loss_type = mean_type, variance_type, loss_type

    # ------------------------------------------------------------------ one step of the model p

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Kwargs | None = None,
    ) -> dict[str, Any]:
        """The model's p(x_{t-1} | x_t), and its guess of x_0.

        mean: the posterior's (DDPM eq. 7) at the guessed x_0, which is
        (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t) (DDPM eq. 15) or the model's output itself.
        log-variance, where learned: f log beta_t + (1 - f) log(posterior variance_t) with
        f = (v + 1) / 2 and v the second half of the model's channels (Improved DDPM eq. 15).

        Args:
            model: called as `model(x, timestep_map[t], **model_kwargs)` with int64 timesteps;
                returns (N, C, …), or (N, 2C, …) with a learned variance, or a tuple of that and
                anything else.
            x: x_t, (N, C, …) floating.
            t: (N,) int64.
            clip_denoised: clamp the guessed x_0 to [-1, 1].
            denoised_fn: applied to the guessed x_0 before it is clamped.

        Returns mean, variance, log_variance and pred_xstart of x's shape, and `extra`, the rest of
        what the model returned or None.
        """
        output, extra = self._model_output(model, x, t, model_kwargs)
        return self._p_mean_variance(output, x, t, clip_denoised, denoised_fn) | {"extra": extra}

    def _model_output(
        self, model: Model, x: Tensor, t: Tensor, model_kwargs: Kwargs | None
    ) -> tuple[Tensor, Any]:
        check_timesteps("x", x, t, self.num_timesteps)
        output = model(x, self._original_timesteps(t, x), **(model_kwargs or {}))
        output, extra = output if isinstance(output, tuple) else (output, None)
        learned = self.variance_type == "learned_range"
        expected = (x.shape[0], x.shape[1] * (2 if learned else 1), *x.shape[2:])
        if output.shape != expected:
            raise ValueError(
                f"model returned shape {tuple(output.shape)} for x of shape {tuple(x.shape)}: "
                f"learn_sigma={learned} needs {'2C' if learned else 'C'} channels, {expected}"
            )
        return output.to(torch.promote_types(output.dtype, torch.float32)), extra

    def _p_mean_variance(
        self,
        output: Tensor,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Any]:
        if self.variance_type == "learned_range":
            output, v = output.chunk(2, dim=1)
            low, high = self._at(t, x, "posterior_log_variance_clipped", "log_betas")
            fraction = (v + 1) / 2
            log_variance = fraction * high + (1 - fraction) * low
            variance = torch.exp(log_variance)
        else:
            names = FIXED_VARIANCES[self.variance_type]
            variance, log_variance = (row.expand_as(x) for row in self._at(t, x, *names))
        is_noise = self.mean_type == "epsilon"
        pred_xstart = self._xstart_from_noise(x, t, output) if is_noise else output
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        return {
            "mean": self.q_posterior_mean_variance(pred_xstart, x, t)[0],
            "variance": variance,
            "log_variance": log_variance,
            "pred_xstart": pred_xstart,
        }

    def _xstart_from_noise(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        recip, recipm1 = self._at(t, x, "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
        return recip * x - recipm1 * noise

    def _noise_from_xstart(self, x: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        recip, recipm1 = self._at(t, x, "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
        return (recip * x - x_start) / recipm1

    def condition_mean(
        self,
        cond_fn: Model,
        p_mean_var: dict[str, Any],
        x: Tensor,
        t: Tensor,
        model_kwargs: Kwargs | None = None,
    ) -> Tensor:
        """The mean moved by guidance: mean + variance · cond_fn(x, timestep_map[t], …).

        `cond_fn` is called with `**model_kwargs` too and returns the gradient of log p(y | x_t) by
        x (Dhariwal & Nichol 2021, algorithm 1).
        """
        check_timesteps("x", x, t, self.num_timesteps)
        gradient = cond_fn(x, self._original_timesteps(t, x), **(model_kwargs or {}))
        moved: Tensor = p_mean_var["mean"] + p_mean_var["variance"] * gradient
        return moved

    def condition_score(
        self,
        cond_fn: Model,
        p_mean_var: dict[str, Any],
        x: Tensor,
        t: Tensor,
        model_kwargs: Kwargs | None = None,
    ) -> dict[str, Any]:
        """`p_mean_var` with its noise replaced by
        eps - sqrt(1 - abar_t) · cond_fn(x, timestep_map[t], **model_kwargs), and pred_xstart and
        mean made from that (Dhariwal & Nichol 2021, algorithm 2).
        """
        check_timesteps("x", x, t, self.num_timesteps)
        gradient = cond_fn(x, self._original_timesteps(t, x), **(model_kwargs or {}))
        (abar,) = self._at(t, x, "alphas_cumprod")
        noise = self._noise_from_xstart(x, t, p_mean_var["pred_xstart"])
        pred_xstart = self._xstart_from_noise(x, t, noise - (1 - abar).sqrt() * gradient)
        mean = self.q_posterior_mean_variance(pred_xstart, x, t)[0]
        return p_mean_var | {"pred_xstart": pred_xstart, "mean": mean}

    # ------------------------------------------------------------------ samplers, one step

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs | None = None,
        *,
        step_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """x_{t-1} drawn from p(x_{t-1} | x_t): mean + [t > 0] exp(log_variance / 2) noise.

        DDPM algorithm 2. Arguments as `p_mean_variance`, and `cond_fn` as `condition_mean`. The
        noise is `step_noise` of x's shape, or drawn as `torch.randn_like(x)` does, from `generator`
        or the global one, at t = 0 too. Returns sample (x's dtype) and pred_xstart, (N, C, …).
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = noise_like(x, "step_noise", step_noise, generator)
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs)
        spread = _not_first(t, x) * torch.exp(0.5 * out["log_variance"])
        sample = out["mean"] + spread * noise
        return {"sample": sample.to(x.dtype), "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs | None = None,
        eta: float = 0.0,
        *,
        step_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """x_{t-1} by DDIM eq. 12:

        sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1} - sigma²) eps + [t > 0] sigma noise with
        sigma = eta sqrt((1 - abar_{t-1}) / (1 - abar_t)) sqrt(1 - abar_t / abar_{t-1}) (eq. 16),
        x_0 = pred_xstart and eps the noise that leads from it to x. Noise is drawn even where eta
        is 0, so that a seed means the same images for any eta. Arguments and result as `p_sample`,
        but `cond_fn` as `condition_score`.
        """
        if not 0 <= eta < math.inf:
            raise ValueError(f"eta={eta}: allowed are values from 0 on")
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        eps = self._noise_from_xstart(x, t, out["pred_xstart"])
        abar, abar_prev = self._at(t, x, "alphas_cumprod", "alphas_cumprod_prev")
        sigma = eta * torch.sqrt((1 - abar_prev) / (1 - abar)) * torch.sqrt(1 - abar / abar_prev)
        noise = noise_like(x, "step_noise", step_noise, generator)
        mean = (
            out["pred_xstart"] * torch.sqrt(abar_prev) + torch.sqrt(1 - abar_prev - sigma**2) * eps
        )
        sample = mean + _not_first(t, x) * sigma * noise
        return {"sample": sample.to(x.dtype), "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """x_{t+1} by the deterministic DDIM step run the other way (DDIM section 4.3, eq. 14):
        sqrt(abar_{t+1}) x_0 + sqrt(1 - abar_{t+1}) eps.

        Arguments and result as `ddim_sample`. Raises ValueError for an `eta` other than 0.
        """
        if eta != 0:
            raise ValueError(f"eta={eta}: only the deterministic process, eta=0, can be reversed")
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        eps = self._noise_from_xstart(x, t, out["pred_xstart"])
        (abar_next,) = self._at(t, x, "alphas_cumprod_next")
        sample = out["pred_xstart"] * torch.sqrt(abar_next) + torch.sqrt(1 - abar_next) * eps
        return {"sample": sample.to(x.dtype), "pred_xstart": out["pred_xstart"]}

    def step_table(
        self,
        sampler: str,
        *,
        eta: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The coefficients of every step, as `fastdit.ops.ddpm_step` and `ddim_step` take them.

        Row t holds the `fastdit.reference.diffusion_step.StepCoefficients` of step t: 7 columns for
        `"ddpm"` with a learned variance, else 5. Made in float64, rounded once, and copied to the
        device: a run makes it once.

        Args:
            sampler: `"ddpm"`, as `p_sample`, or `"ddim"`, as `ddim_sample`.
            eta: DDIM's share of noise, 0 (deterministic) to 1 (as much as the posterior has).
            device: where the table is to be; None means the CPU.
            dtype: float32, or float64 for the reference.

        Returns (num_timesteps, 5 or 7). Raises ValueError for another sampler or eta.
        """
        require_choice("sampler", sampler, ("ddpm", "ddim"))
        if not 0 <= eta <= (1 if sampler == "ddim" else 0):
            raise ValueError(
                f"eta={eta}: allowed are 0 to 1 with sampler='ddim', and 0 with 'ddpm'"
            )
        tables = self.tables(torch.device("cpu"), torch.float64)
        abar, abar_prev = tables["alphas_cumprod"], tables["alphas_cumprod_prev"]
        if self.mean_type == "epsilon":  # DDPM eq. 15
            x0_of_x = tables["sqrt_recip_alphas_cumprod"]
            x0_of_output = -tables["sqrt_recipm1_alphas_cumprod"]
        else:
            x0_of_x, x0_of_output = torch.zeros_like(abar), torch.ones_like(abar)

        log_variances: tuple[Tensor, ...] = ()
        if sampler == "ddim":  # eq. 12 and 16; eps = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t)
            noise = eta * torch.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
            mean_of_x = torch.sqrt((1 - abar_prev - noise**2) / (1 - abar))
            mean_of_x0 = torch.sqrt(abar_prev) - mean_of_x * torch.sqrt(abar)
        else:  # DDPM eq. 7
            mean_of_x0, mean_of_x = tables["posterior_mean_coef1"], tables["posterior_mean_coef2"]
            noise = torch.ones_like(abar)
            noise[0] = 0  # the last step of a run adds none
            if self.variance_type == "learned_range":
                log_variances = tables["posterior_log_variance_clipped"], tables["log_betas"]
            else:
                noise = noise * torch.sqrt(tables[FIXED_VARIANCES[self.variance_type][0]])
        columns = StepCoefficients(
            x0_of_x, x0_of_output, mean_of_x0, mean_of_x, noise, *log_variances
        )
        return torch.stack([c for c in columns if c is not None], dim=1).to(device, dtype)

    # ------------------------------------------------------------------ samplers, all steps

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        step_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples of the model, `shape` = (N, C, …): `p_sample` from the last step to step 0.

        Args:
            noise: the x_T to start from; drawn in float32 where None.
            device: where it is drawn; None means the model's.
            progress: show a progress bar.
            step_noise: (num_timesteps, *shape), the noise of the i-th executed step at i, instead
                of drawn noise.
            generator: what draws the noise; None means the global one.
            model, clip_denoised, denoised_fn, cond_fn, model_kwargs: as `p_sample`.

        Without `step_noise` one `torch.randn_like` is drawn in each step, so a global seed gives
        the images that it gives with the original.
        """
        return _last(
            self.p_sample_loop_progressive(
                model,
                shape,
                noise,
                clip_denoised,
                denoised_fn,
                cond_fn,
                model_kwargs,
                device,
                progress,
                step_noise=step_noise,
                generator=generator,
            )
        )

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        step_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """`p_sample_loop`, giving out what `p_sample` returns after each step."""
        step = partial(
            self.p_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            generator=generator,
        )
        x = start_noise(model, shape, noise, device, generator)
        return self._loop(step, x, step_noise, progress)

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        step_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As `p_sample_loop`, by `ddim_sample`."""
        return _last(
            self.ddim_sample_loop_progressive(
                model,
                shape,
                noise,
                clip_denoised,
                denoised_fn,
                cond_fn,
                model_kwargs,
                device,
                progress,
                eta,
                step_noise=step_noise,
                generator=generator,
            )
        )

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        step_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """`ddim_sample_loop`, giving out what `ddim_sample` returns after each step."""
        step = partial(
            self.ddim_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            eta=eta,
            generator=generator,
        )
        x = start_noise(model, shape, noise, device, generator)
        return self._loop(step, x, step_noise, progress)

    def _loop(
        self,
        step: Callable[..., dict[str, Tensor]],
        x: Tensor,
        step_noise: Tensor | None,
        progress: bool,
    ) -> Iterator[dict[str, Tensor]]:
        if step_noise is not None:
            require_like("step_noise", step_noise, (self.num_timesteps, *x.shape), x)
        return self._steps(step, x, step_noise, progress)

    def _steps(
        self,
        step: Callable[..., dict[str, Tensor]],
        x: Tensor,
        step_noise: Tensor | None,
        progress: bool,
    ) -> Iterator[dict[str, Tensor]]:
        for i, t in enumerate(_with_progress(self._timesteps(x), progress)):
            with torch.no_grad():
                out = step(x, t, step_noise=None if step_noise is None else step_noise[i])
            yield out
            x = out["sample"]

    def _timesteps(self, x: Tensor) -> Sequence[Tensor]:
        """t of each executed step, last step first: num_timesteps tensors (N,), made on the device
        in one go.
        """
        t = torch.arange(self.num_timesteps - 1, -1, -1, device=x.device)
        return t[:, None].repeat(1, x.shape[0]).unbind()

    # ------------------------------------------------------------------ training and likelihood

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Kwargs | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of each sample at its timestep: a dict of tensors (N,), at least float32.

        mse: mean over C, H, W of (noise - eps)², or (x_0 - output)² (DDPM eq. 14).
        vb: the bound's term of t in bits per dimension, by which only the variance is trained: eps
        is detached. Present where the variance is learned.
        loss: mse + vb (Improved DDPM eq. 16 with weight 1), or with a "kl" loss type the bound
        alone, trained as a whole.

        `model` and `model_kwargs` as `p_mean_variance`; `x_start`, `t`, `noise` as `q_sample`.
        """
        check_timesteps("x_start", x_start, t, self.num_timesteps)
        noise = noise_like(x_start, "noise", noise)
        x_t = self.q_sample(x_start, t, noise)
        output, _ = self._model_output(model, x_t, t, model_kwargs)
        if self.loss_type in ("kl", "rescaled_kl"):
            scale = self.num_timesteps if self.loss_type == "rescaled_kl" else 1
            p = self._p_mean_variance(output, x_t, t, clip_denoised=False)
            return {"loss": scale * self._bound(x_start, x_t, t, p)}

        target = noise if self.mean_type == "epsilon" else x_start
        if self.variance_type != "learned_range":
            mse = mean_flat((target - output) ** 2)
            return {"mse": mse, "loss": mse}
        prediction, v = output.chunk(2, dim=1)
        mse = mean_flat((target - prediction) ** 2)
        only_v = torch.cat([prediction.detach(), v], dim=1)
        p = self._p_mean_variance(only_v, x_t, t, clip_denoised=False)
        vb = self._bound(x_start, x_t, t, p)
        if self.loss_type == "rescaled_mse":
            vb = vb * (self.num_timesteps / 1000.0)
        return {"vb": vb, "mse": mse, "loss": mse + vb}

    def _bound(self, x_start: Tensor, x_t: Tensor, t: Tensor, p: dict[str, Any]) -> Tensor:
        """The term of t of the variational bound (DDPM eq. 5), in bits per dimension, (N,):
        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0 and -log p(x_0 | x_1) at t = 0.
        """
        mean, _, log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        kl = mean_flat(normal_kl(mean, log_variance, p["mean"], p["log_variance"]))
        log_likelihood = mean_flat(
            discretized_gaussian_log_likelihood(x_start, p["mean"], 0.5 * p["log_variance"])
        )
        return torch.where(t == 0, -log_likelihood, kl) / math.log(2.0)

    def calc_bpd_loop(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Kwargs | None = None,
    ) -> dict[str, Tensor]:
        """The variational bound of `x_start` (N, C, …), in bits per dimension (DDPM eq. 5).

        Returns, with S = num_timesteps and the last step first: vb (N, S), the bound's terms;
        prior_bpd (N,), the KL of q(x_T | x_0) to N(0, I); total_bpd (N,), their sum; xstart_mse and
        mse (N, S), the mean squared errors of the guessed x_0 and noise. Noise is drawn once a step
        by `torch.randn_like(x_start)`.
        """
        require_floating("x_start", x_start)
        steps = self._timesteps(x_start)
        terms: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for t in steps:
            with torch.no_grad():
                noise = torch.randn_like(x_start)
                x_t = self.q_sample(x_start, t, noise)
                p = self.p_mean_variance(
                    model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs
                )
                predicted_noise = self._noise_from_xstart(x_t, t, p["pred_xstart"])
                terms["vb"].append(self._bound(x_start, x_t, t, p))
                terms["xstart_mse"].append(mean_flat((p["pred_xstart"] - x_start) ** 2))
                terms["mse"].append(mean_flat((predicted_noise - noise) ** 2))
        stacked = {name: torch.stack(values, dim=1) for name, values in terms.items()}
        prior_bpd = self._prior_bpd(x_start, steps[0])
        return stacked | {
            "prior_bpd": prior_bpd,
            "total_bpd": stacked["vb"].sum(dim=1) + prior_bpd,
        }

    def _prior_bpd(self, x_start: Tensor, last: Tensor) -> Tensor:
        mean, _, log_variance = self.q_mean_variance(x_start, last)
        zero = torch.zeros_like(mean)
        return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2.0)


def _not_first(t: Tensor, x: Tensor) -> Tensor:
    """1 where t > 0 and 0 at t = 0, whose step adds no noise; (N, 1, …)."""
    return (t != 0).to(x.dtype).view((-1,) + (1,) * (x.ndim - 1))


def _with_progress(steps: Sequence[Tensor], progress: bool) -> Sequence[Tensor]:
    if not progress:
        return steps
    from tqdm.auto import tqdm

    bar: Sequence[Tensor] = tqdm(steps)
    return bar


def _last(steps: Iterator[dict[str, Tensor]]) -> Tensor:
    for out in steps:
        sample = out["sample"]
    return sample
