"""The DPM-Solver family: fast, adaptive, and DPM-Solver++ in its one-step, multistep and stochastic forms.

In these formulas time is t = -log sigma, half the log signal-to-noise ratio in the variance-exploding form. See sampler_types.py for what
all samplers share and for shapes. Must not know networks, guidance or devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from backend.sampling.sampler_types import (
    LONGEST_GROWTH,
    Denoise,
    NoiseSource,
    OnStep,
    SamplerSettings,
    Walk,
    add_noise,
    derivative,
    split_ancestral,
    split_step,
)


@torch.no_grad()
def sample_dpmpp_2m(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """DPM-Solver++(2M). Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", algorithm 2."""
    walk = Walk(denoise, sigmas_T, on_step)
    old_BCHW: Tensor | None = None
    for index, sigma, sigma_next in walk:
        denoised_BCHW = walk.step(index, x_BCHW, sigma)
        target_BCHW = denoised_BCHW
        step, last_step = (math.log(sigma / sigma_next) if sigma_next > 0 else math.inf), _last_step(walk, index)
        if old_BCHW is not None and sigma_next > 0 and _may_extrapolate(settings, step, last_step):
            ratio = last_step / step
            target_BCHW = denoised_BCHW + (denoised_BCHW - old_BCHW) / (2 * ratio)
        x_BCHW = target_BCHW + (x_BCHW - target_BCHW) * (sigma_next / sigma)
        old_BCHW = denoised_BCHW
    return x_BCHW


@torch.no_grad()
def sample_dpmpp_2s_ancestral(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """Ancestral sampling with DPM-Solver++(2S) steps. Lu et al. 2022 (DPM-Solver++), algorithm 1 with r = 1/2; Song et al. 2021, appendix F."""
    walk, eta = Walk(denoise, sigmas_T, on_step), settings.eta_or(1.0)
    for index, sigma, sigma_next in walk:
        denoised_BCHW = walk.step(index, x_BCHW, sigma)
        sigma_down, kept, sigma_up = split_step(settings, sigma, sigma_next, eta)
        if sigma_down > 0:
            middle = math.sqrt(sigma * sigma_down)
            denoised_BCHW = walk.denoise(_blend(denoised_BCHW, x_BCHW, middle / sigma), middle)
        x_BCHW = _blend(denoised_BCHW, x_BCHW, sigma_down / sigma)
        if sigma_next > 0:
            x_BCHW = add_noise(x_BCHW, noise.next(x_BCHW), kept, settings.s_noise * sigma_up)
    return x_BCHW


@torch.no_grad()
def sample_dpmpp_sde(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """DPM-Solver++ for the SDE, one step with a midpoint (r = 1/2). Lu et al. 2022 (DPM-Solver++), section 5, with ancestral noise at both stages."""
    walk, eta = Walk(denoise, sigmas_T, on_step), settings.eta_or(1.0)
    brownian = noise.brownian(x_BCHW, *walk.positive_range)
    for index, sigma, sigma_next in walk:
        denoised_BCHW = walk.step(index, x_BCHW, sigma)
        if sigma_next == 0:
            x_BCHW = denoised_BCHW
            continue
        middle = math.sqrt(sigma * sigma_next)
        down, up = split_ancestral(sigma, middle, eta)
        middle_BCHW = _blend(denoised_BCHW, x_BCHW, down / sigma) + brownian(sigma, middle) * (settings.s_noise * up)
        there_BCHW = walk.denoise(middle_BCHW, middle)
        down, up = split_ancestral(sigma, sigma_next, eta)
        x_BCHW = _blend(there_BCHW, x_BCHW, down / sigma) + brownian(sigma, sigma_next) * (settings.s_noise * up)
    return x_BCHW


@torch.no_grad()
def sample_dpmpp_2m_sde(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """SDE-DPM-Solver++(2M), midpoint form. Lu et al. 2022 (DPM-Solver++), section 5 and appendix E."""
    return _sample_2m_sde(Walk(denoise, sigmas_T, on_step), x_BCHW, settings, noise, lambda decay, ratio: 0.5 * -math.expm1(-decay) / ratio)


@torch.no_grad()
def sample_dpmpp_2m_sde_heun(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """SDE-DPM-Solver++(2M), with the exact integral of the linear term. Lu et al. 2022 (DPM-Solver++), section 5 and appendix E."""
    return _sample_2m_sde(Walk(denoise, sigmas_T, on_step), x_BCHW, settings, noise, lambda decay, ratio: _phi_2(decay) / ratio)


def _sample_2m_sde(
    walk: Walk, x_BCHW: Tensor, settings: SamplerSettings, noise: NoiseSource, slope_weight: Callable[[float, float], float]
) -> Tensor:
    """`slope_weight(decay, ratio)`: weight of the change of x0 over the last step, where `ratio` = last step / this step."""
    eta, brownian = settings.eta_or(1.0), noise.brownian(x_BCHW, *walk.positive_range)
    old_BCHW: Tensor | None = None
    for index, sigma, sigma_next in walk:
        denoised_BCHW = walk.step(index, x_BCHW, sigma)
        if sigma_next == 0:
            x_BCHW = denoised_BCHW
            continue
        step = math.log(sigma / sigma_next)
        decay = step * (1 + eta)
        x_BCHW = _blend(denoised_BCHW, x_BCHW, math.exp(-decay))
        last_step = _last_step(walk, index)
        if old_BCHW is not None and _may_extrapolate(settings, step, last_step):
            ratio = last_step / step
            x_BCHW = x_BCHW + (denoised_BCHW - old_BCHW) * slope_weight(decay, ratio)
        if eta > 0:
            x_BCHW = x_BCHW + brownian(sigma, sigma_next) * _sde_noise(sigma_next, step, eta, settings)
        old_BCHW = denoised_BCHW
    return x_BCHW


@torch.no_grad()
def sample_dpmpp_3m_sde(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """SDE-DPM-Solver++(3M): quadratic extrapolation of x0 from three steps. Lu et al. 2022 (DPM-Solver++), section 5, third order of appendix A.

    As published and as commonly implemented, the quadratic term has half the weight that third order would need, so the measured order is 2.
    """
    walk, eta = Walk(denoise, sigmas_T, on_step), settings.eta_or(1.0)
    brownian = noise.brownian(x_BCHW, *walk.positive_range)
    history: list[tuple[float, Tensor]] = []  # (step that led away, x0), newest first
    for index, sigma, sigma_next in walk:
        denoised_BCHW = walk.step(index, x_BCHW, sigma)
        if sigma_next == 0:
            x_BCHW = denoised_BCHW
            continue
        step = math.log(sigma / sigma_next)
        decay = step * (1 + eta)
        if history and not _may_extrapolate(settings, step, history[0][0]):
            history = []
        x_BCHW = _blend(denoised_BCHW, x_BCHW, math.exp(-decay)) + _extrapolate(denoised_BCHW, history, step, decay)
        if eta > 0:
            x_BCHW = x_BCHW + brownian(sigma, sigma_next) * _sde_noise(sigma_next, step, eta, settings)
        history = [(step, denoised_BCHW), *history[:1]]
    return x_BCHW


def _extrapolate(denoised_BCHW: Tensor, history: list[tuple[float, Tensor]], step: float, decay: float) -> Tensor | float:
    """The first and second order terms of x0's divided differences, weighted with phi functions of the decay."""
    if not history:
        return 0.0
    (last_step, old_BCHW), phi_2 = history[0], _phi_2(decay)
    ratio = last_step / step
    slope_BCHW = (denoised_BCHW - old_BCHW) / ratio
    if len(history) == 1:
        return slope_BCHW * phi_2
    older_step, older_BCHW = history[1]
    older_ratio = older_step / step
    older_slope_BCHW = (old_BCHW - older_BCHW) / older_ratio
    bend_BCHW = (slope_BCHW - older_slope_BCHW) / (ratio + older_ratio)
    return (slope_BCHW + bend_BCHW * ratio) * phi_2 - bend_BCHW * (phi_2 / decay - 0.5)


def _last_step(walk: Walk, index: int) -> float:
    """The step that led to this one, in log sigma; 0 for the first."""
    return math.log(walk.sigmas[index - 1] / walk.sigmas[index]) if index > 0 else 0.0


def _may_extrapolate(settings: SamplerSettings, step: float, last_step: float) -> bool:
    """Whether x0 may be continued over a step of this length in log sigma from what the last one showed.

    A flow's schedule that is even in time and ends just above 0 has a last step many times as long as the one before it; the slope continued over
    that would be most of the result.
    """
    return not settings.is_flow or step <= LONGEST_GROWTH * last_step


def _phi_2(decay: float) -> float:
    """expm1(-d) / d + 1."""
    return math.expm1(-decay) / decay + 1


def _sde_noise(sigma_next: float, step: float, eta: float, settings: SamplerSettings) -> float:
    return settings.s_noise * sigma_next * math.sqrt(-math.expm1(-2 * eta * step))


def _blend(denoised_BCHW: Tensor, x_BCHW: Tensor, kept: float) -> Tensor:
    """The exact step for a constant x0: keeps the share `kept` of the distance to it."""
    return denoised_BCHW + (x_BCHW - denoised_BCHW) * kept


# DPM-Solver with predicted noise


class _NoiseSolver:
    """DPM-Solver steps of order 1 to 3 from one state, sharing noise predictions at equal points. Lu et al. 2022, "DPM-Solver", appendix B."""

    def __init__(self, walk: Walk, x_BCHW: Tensor, sigma: float) -> None:
        self._walk, self._x_BCHW, self.sigma = walk, x_BCHW, sigma
        self.denoised_BCHW = walk.denoise(x_BCHW, sigma)
        self._first_BCHW = derivative(x_BCHW, self.denoised_BCHW, sigma)
        self._later: dict[tuple[float, float], Tensor] = {}

    def step(self, order: int, sigma_next: float, r1: float | None = None) -> Tensor:
        if order == 1:
            return self._first_order(sigma_next)
        return self._second_order(sigma_next, 0.5 if r1 is None else r1) if order == 2 else self._third_order(sigma_next)

    def _first_order(self, sigma_next: float) -> Tensor:
        return self._x_BCHW + self._first_BCHW * (sigma_next - self.sigma)

    def _second_order(self, sigma_next: float, r1: float) -> Tensor:
        change_BCHW = self._change_at(r1, sigma_next)
        return self._first_order(sigma_next) + change_BCHW * ((sigma_next - self.sigma) / (2 * r1))

    def _third_order(self, sigma_next: float, r1: float = 1 / 3, r2: float = 2 / 3) -> Tensor:
        step = math.log(self.sigma / sigma_next)
        sigma_2 = self._sigma_at(r2, sigma_next)
        guess_BCHW = self._first_order(sigma_2) - self._change_at(r1, sigma_next) * (sigma_2 * (r2 / r1) * (math.expm1(r2 * step) / (r2 * step) - 1))
        change_BCHW = derivative(guess_BCHW, self._walk.denoise(guess_BCHW, sigma_2), sigma_2) - self._first_BCHW
        return self._first_order(sigma_next) - change_BCHW * (sigma_next / r2 * (math.expm1(step) / step - 1))

    def _change_at(self, share: float, sigma_next: float) -> Tensor:
        """The change of the predicted noise after `share` of the step, reached by a first-order step."""
        key = (share, sigma_next)
        if key not in self._later:
            sigma = self._sigma_at(share, sigma_next)
            guess_BCHW = self._first_order(sigma)
            self._later[key] = derivative(guess_BCHW, self._walk.denoise(guess_BCHW, sigma), sigma) - self._first_BCHW
        return self._later[key]

    def _sigma_at(self, share: float, sigma_next: float) -> float:
        return math.exp(math.log(self.sigma) + share * math.log(sigma_next / self.sigma))


@torch.no_grad()
def sample_dpm_fast(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """DPM-Solver-fast: steps of order 3, then one of order 1 or 2, as many network calls as steps. Lu et al. 2022 (DPM-Solver), section 3.4.

    Uses only the two ends of the schedule and spaces its own steps evenly in log sigma. Ends at the last level above 0.
    """
    walk, eta = Walk(denoise, sigmas_T, on_step), settings.eta_or(1.0)
    sigma_min, sigma_max = _open_range(walk)
    if sigma_min == sigma_max:
        return walk.step(0, x_BCHW, sigma_max)
    orders = fast_orders(walk.num_steps)
    levels = [math.exp(math.log(sigma_max) + math.log(sigma_min / sigma_max) * index / len(orders)) for index in range(len(orders) + 1)]
    for index, (order, sigma, sigma_next) in enumerate(zip(orders, levels, levels[1:])):
        sigma_down, sigma_up = _split_not_below(sigma, sigma_next, eta, sigma_min)
        solver = _NoiseSolver(walk, x_BCHW, sigma)
        walk.report(index, sigma, x_BCHW, solver.denoised_BCHW)
        x_BCHW = solver.step(order, sigma_down)
        if sigma_up > 0:
            x_BCHW = x_BCHW + noise.next(x_BCHW) * (settings.s_noise * sigma_up)
    return x_BCHW


def fast_orders(num_calls: int) -> list[int]:
    """The orders of DPM-Solver-fast's steps, which sum to the number of network calls."""
    thirds, rest = divmod(num_calls, 3)
    return [3] * (thirds - 1) + [2, 1] if rest == 0 else [3] * thirds + [rest]


ADAPTIVE_RTOL, ADAPTIVE_ATOL, ADAPTIVE_FIRST_STEP, ADAPTIVE_ACCEPT = 0.05, 0.0078, 0.05, 0.81
ADAPTIVE_MAX_STEPS = 1000


@torch.no_grad()
def sample_dpm_adaptive(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """DPM-Solver-23 with step sizes from the difference between orders 2 and 3. Lu et al. 2022 (DPM-Solver), appendix C, algorithm 5.

    Uses only the two ends of the schedule. Ends at the last level above 0. An integral controller with an arctangent limiter sets the step sizes
    (Soederlind and Wang 2006, "Adaptive Time-Stepping and Computational Stability").
    """
    walk, eta = Walk(denoise, sigmas_T, on_step), settings.eta_or(1.0)
    sigma_min, sigma = _open_range(walk)
    if sigma_min == sigma:
        return walk.step(0, x_BCHW, sigma)
    step, previous_BCHW, exponent = ADAPTIVE_FIRST_STEP, x_BCHW, 1 / (1.5 if eta else 3.0)
    for index in range(ADAPTIVE_MAX_STEPS):
        sigma_next = max(sigma_min, sigma * math.exp(-step))
        sigma_down, sigma_up = _split_not_below(sigma, sigma_next, eta, sigma_min)
        solver = _NoiseSolver(walk, x_BCHW, sigma)
        walk.report(index, sigma, x_BCHW, solver.denoised_BCHW)
        low_BCHW, high_BCHW = solver.step(2, sigma_down, r1=1 / 3), solver.step(3, sigma_down)
        factor = 1 + math.atan((1 / (_adaptive_error(low_BCHW, high_BCHW, previous_BCHW) + 1e-8)) ** exponent - 1)
        step *= factor
        if factor < ADAPTIVE_ACCEPT:
            continue
        previous_BCHW, x_BCHW, sigma = low_BCHW, high_BCHW, sigma_next
        if sigma_up > 0:
            x_BCHW = x_BCHW + noise.next(x_BCHW) * (settings.s_noise * sigma_up)
        if math.log(sigma / sigma_min) <= 1e-5:
            return x_BCHW
    raise RuntimeError(f"DPM adaptive did not reach noise level {sigma_min} in {ADAPTIVE_MAX_STEPS} steps (it is at {sigma}). Use another sampler.")


def _adaptive_error(low_BCHW: Tensor, high_BCHW: Tensor, previous_BCHW: Tensor) -> float:
    """Root mean square of the difference between the two orders, relative to the tolerance."""
    tolerance = (ADAPTIVE_RTOL * torch.maximum(low_BCHW.abs(), previous_BCHW.abs())).clamp(min=ADAPTIVE_ATOL)
    return float(((low_BCHW - high_BCHW) / tolerance).square().mean().sqrt())


def _open_range(walk: Walk) -> tuple[float, float]:
    """The last level above 0, and the first level."""
    return walk.positive_range[0], walk.sigmas[0]


def _split_not_below(sigma: float, sigma_next: float, eta: float, sigma_min: float) -> tuple[float, float]:
    """Like split_ancestral, but with sigma_down at least `sigma_min`."""
    sigma_down = max(sigma_min, split_ancestral(sigma, sigma_next, eta)[0])
    return sigma_down, math.sqrt(max(0.0, sigma_next**2 - sigma_down**2))
