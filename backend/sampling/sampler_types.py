"""A sampler's inputs and reports: settings, noise, step info, and the walk that all samplers share.

A sampler is a pure function of (denoise, x, sigmas); everything that varies is behind `denoise`. Must not know networks, guidance or devices.

Noise levels are sigmas of x = x0 + sigma * noise or, for flow models (`settings.is_flow`), times of x = (1 - t) x0 + t * noise. The flow from noise
to picture has the same form in both, dx/dsigma = (x - x0) / sigma, so samplers that add no noise are the same for both.

Shapes: B batch, C channels, H W latent rows and columns, T noise levels (one more than steps).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

LONGEST_GROWTH = 3.0
"""Steps of a flow that are longer than the one before by more than this go without what that one showed."""
BrownianNoise = Callable[[float, float], Tensor]
"""(sigma, sigma_next) -> noise of unit variance, consistent with one Brownian path per image."""


class Denoise(Protocol):
    """x0 (B, C, H, W) of noisy latents at noise levels (B,).

    A denoiser for CFG++ also has `last_uncond_BCHW`: the unconditional x0 of its latest call. One with a method `note_level` is told the noise
    level as a number before each call, so that it need not read it from the device.
    """

    def __call__(self, x_BCHW: Tensor, sigma_B: Tensor, /) -> Tensor: ...


class NoiseSource(Protocol):
    """Gaussian noise with one generator per image."""

    def next(self, x_BCHW: Tensor) -> Tensor:
        """New unit noise like `x_BCHW`."""
        ...

    def brownian(self, x_BCHW: Tensor, sigma_min: float, sigma_max: float) -> BrownianNoise:
        """Noise from Brownian paths over the given range of noise levels."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerSettings:
    """Options for samplers. Each sampler reads the ones it uses.

    `eta`: share of fresh noise; None means the sampler's own default. `s_*`: stochastic churn of Karras et al. 2022, algorithm 2. `is_flow`:
    noise levels are times of a rectified flow.
    """

    eta: float | None = None
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0
    uni_pc_variant: str = "bh1"
    uni_pc_order: int = 3
    uni_pc_lower_order_final: bool = True
    is_flow: bool = False

    def __post_init__(self) -> None:
        if self.uni_pc_variant not in ("bh1", "bh2"):
            raise ValueError(f"UniPC variant {self.uni_pc_variant!r} is unknown. Use bh1 or bh2.")
        if self.uni_pc_order < 1:
            raise ValueError(f"UniPC order {self.uni_pc_order} was requested; it must be at least 1.")

    def eta_or(self, default: float) -> float:
        return default if self.eta is None else self.eta


@dataclass(frozen=True, slots=True)
class StepInfo:
    """One step: its index, its noise level, its noisy input latents, and the denoised latents."""

    index: int
    sigma: float
    x: Tensor
    denoised: Tensor


OnStep = Callable[[StepInfo], None]
"""Called once per step, after the step's first denoising. An exception ends the sampling."""


class Walk:
    """The walk down the noise levels: host copies of the levels, the denoiser for a whole batch, and the report of each step."""

    def __init__(self, denoise: Denoise, sigmas_T: Tensor, on_step: OnStep | None) -> None:
        self.sigmas: list[float] = [float(sigma) for sigma in sigmas_T.tolist()]
        self.on_step = on_step
        self._denoise = denoise
        self._note_level: Callable[[float], None] | None = getattr(denoise, "note_level", None)
        if len(self.sigmas) < 2:
            raise ValueError(f"Sampling needs at least two noise levels, and got {len(self.sigmas)}: {self.sigmas}.")
        if self.sigmas[0] <= 0 or not all(math.isfinite(sigma) for sigma in self.sigmas):
            raise ValueError(f"The first noise level must be above 0 and all levels finite; the schedule is {self.sigmas}.")

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    def __iter__(self) -> Iterator[tuple[int, float, float]]:
        """(index, sigma, sigma_next) of each step."""
        return iter((index, self.sigmas[index], self.sigmas[index + 1]) for index in range(self.num_steps))

    def denoise(self, x_BCHW: Tensor, sigma: float) -> Tensor:
        """x0 at one noise level for the whole batch."""
        if self._note_level is not None:
            self._note_level(sigma)
        return self._denoise(x_BCHW, x_BCHW.new_full((x_BCHW.shape[0],), sigma))

    def step(self, index: int, x_BCHW: Tensor, sigma: float) -> Tensor:
        """x0 at the start of a step, reported."""
        denoised_BCHW = self.denoise(x_BCHW, sigma)
        self.report(index, sigma, x_BCHW, denoised_BCHW)
        return denoised_BCHW

    def report(self, index: int, sigma: float, x_BCHW: Tensor, denoised_BCHW: Tensor) -> None:
        if self.on_step is not None:
            self.on_step(StepInfo(index, sigma, x_BCHW, denoised_BCHW))

    @property
    def positive_range(self) -> tuple[float, float]:
        """The smallest level above 0, and the largest."""
        return min(sigma for sigma in self.sigmas if sigma > 0), max(self.sigmas)


def derivative(x_BCHW: Tensor, denoised_BCHW: Tensor, sigma: float) -> Tensor:
    """dx/dsigma of the probability flow ODE; also the predicted noise. Karras et al. 2022, eq. 1 and 3."""
    return (x_BCHW - denoised_BCHW) / sigma


def split_ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(sigma_down, sigma_up): step to `sigma_down` without noise; noise of `sigma_up` then leads to `sigma_next`.

    With eta 1 this is the posterior of the diffusion (Ho et al. 2020, eq. 7, in sigmas).
    """
    if eta == 0 or sigma_next == 0:
        return sigma_next, 0.0
    sigma_up = min(sigma_next, eta * math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
    return math.sqrt(sigma_next**2 - sigma_up**2), sigma_up


def split_ancestral_flow(time: float, time_next: float, eta: float) -> tuple[float, float, float]:
    """(time_down, kept, time_up) of a rectified flow: step to `time_down` without noise; x * kept + noise * time_up is then at `time_next`.

    eta moves `time_down` from `time_next` (eta 0) to `time_next`^2 / `time` (eta 1). `kept` scales the picture's share from 1 - time_down to
    1 - time_next, and the noise supplies the missing variance: time_up^2 = time_next^2 - (kept * time_down)^2.
    """
    if eta == 0 or time_next == 0:
        return time_next, 1.0, 0.0
    time_down = time_next * (1 + (time_next / time - 1) * eta)
    kept = (1 - time_next) / (1 - time_down)
    return time_down, kept, math.sqrt(max(0.0, time_next**2 - (kept * time_down) ** 2))


def split_step(settings: SamplerSettings, sigma: float, sigma_next: float, eta: float) -> tuple[float, float, float]:
    """(sigma_down, kept, sigma_up) of an ancestral step, for the model's kind of noise levels."""
    if settings.is_flow:
        return split_ancestral_flow(sigma, sigma_next, eta)
    sigma_down, sigma_up = split_ancestral(sigma, sigma_next, eta)
    return sigma_down, 1.0, sigma_up


def add_noise(x_BCHW: Tensor, fresh_BCHW: Tensor, kept: float, amount: float) -> Tensor:
    """x * kept + noise * amount."""
    return (x_BCHW if kept == 1.0 else x_BCHW * kept) + fresh_BCHW * amount


def churn(x_BCHW: Tensor, sigma: float, num_steps: int, settings: SamplerSettings, noise: NoiseSource) -> tuple[Tensor, float]:
    """Raise latents to a higher noise level with fresh noise. Returns them and the level. Karras et al. 2022, algorithm 2, lines 4 to 6.

    With churn on, every step draws noise, so that the range (s_tmin, s_tmax) does not shift later draws.
    """
    if settings.s_churn <= 0:
        return x_BCHW, sigma
    fresh_BCHW = noise.next(x_BCHW)
    if not settings.s_tmin <= sigma <= settings.s_tmax:
        return x_BCHW, sigma
    raised = sigma * (1 + min(settings.s_churn / num_steps, math.sqrt(2) - 1))
    if settings.is_flow:
        raised = min(raised, 1.0)
        kept = (1 - raised) / (1 - sigma) if sigma < 1 else 1.0
        return add_noise(x_BCHW, fresh_BCHW, kept, settings.s_noise * math.sqrt(max(0.0, raised**2 - (kept * sigma) ** 2))), raised
    return x_BCHW + fresh_BCHW * (settings.s_noise * math.sqrt(raised**2 - sigma**2)), raised
