"""Runs samplers that add noise on flow models, in the variables for which they are written: x = x0 + sigma * noise.

A flow's x = (1 - t) x0 + t * noise, divided by 1 - t, is x0 + sigma * noise with sigma = t / (1 - t): the same process in other variables, with
the same signal-to-noise ratio. So the formulas of SDE solvers, DDIM and LCM apply unchanged. At t = 1 sigma is infinite, so t is capped at LAST_TIME.

Shapes as in sampler_types.py.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from backend.sampling.sampler_types import Denoise, NoiseSource, OnStep, SamplerSettings, StepInfo

LAST_TIME = 1 - 1e-4
Sample = Callable[..., Tensor]


def in_noise_variables(function: Sample) -> Sample:
    """The sampler for a flow model: takes times, returns the flow's latents, and reports steps in the flow's variables."""

    def sample(
        denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
    ) -> Tensor:
        sigmas = to_sigma(sigmas_T.double())
        first = float(sigmas_T[0])
        start_BCHW = x_BCHW * float(sigmas[0]) / first  # x / (1 - t), and at t = 1, where x is noise, noise * sigma
        report = None if on_step is None else lambda info: on_step(_in_time(info))
        ended_BCHW = function(_FlowDenoise(denoise), start_BCHW, sigmas, settings=settings, noise=noise, on_step=report)
        return ended_BCHW * (1 - float(to_time(sigmas[-1])))

    return sample


def to_sigma(time: Tensor) -> Tensor:
    """t / (1 - t)."""
    held = time.clamp(max=LAST_TIME)
    return held / (1 - held)


def to_time(sigma: Tensor) -> Tensor:
    """sigma / (1 + sigma)."""
    return sigma / (1 + sigma)


def _in_time(info: StepInfo) -> StepInfo:
    return StepInfo(info.index, info.sigma / (1 + info.sigma), info.x / (1 + info.sigma), info.denoised)


class _FlowDenoise:
    """The flow model's x0 for latents and noise levels in the form x0 + sigma * noise."""

    def __init__(self, denoise: Denoise) -> None:
        self._denoise = denoise

    def __call__(self, x_BCHW: Tensor, sigma_B: Tensor, /) -> Tensor:
        time_B = to_time(sigma_B)
        return self._denoise(x_BCHW * (1 - time_B)[:, None, None, None], time_B)

    @property
    def last_uncond_BCHW(self) -> Tensor | None:
        found: Tensor | None = getattr(self._denoise, "last_uncond_BCHW", None)
        return found
