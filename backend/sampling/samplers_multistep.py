"""Samplers that remember earlier steps: LMS, PLMS, IPNDM, DEIS, UniPC.

Each is its formula. See sampler_types.py for what they share and for shapes. Must not know networks, guidance or devices.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from backend.sampling.sampler_types import LONGEST_GROWTH, Denoise, NoiseSource, OnStep, SamplerSettings, Walk, derivative

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Weights for even steps, the newest slope first. Hairer, Norsett and Wanner 1993, section III.1."""


@torch.no_grad()
def sample_lms(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """Linear multistep (Adams-Bashforth for uneven steps) of order 4 in sigma. Katherine Crowson's LMS; Hairer et al. 1993, section III.5."""
    return _sample_adams(Walk(denoise, sigmas_T, on_step), x_BCHW, order=4, coordinate=lambda sigma: sigma)


@torch.no_grad()
def sample_ipndm_v(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """IPNDM with weights for uneven steps, order 4. Zhang and Chen 2023, "Fast Sampling of Diffusion Models with Exponential Integrator", section 3.

    With exact weights this is the linear multistep method, so its pictures equal those of LMS.
    """
    return _sample_adams(Walk(denoise, sigmas_T, on_step), x_BCHW, order=4, coordinate=lambda sigma: sigma)


@torch.no_grad()
def sample_deis(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """tAB-DEIS of order 3: polynomials in the variance-preserving time. Zhang and Chen 2023 (as above), eq. 15; the step to zero is first order."""
    return _sample_adams(Walk(denoise, sigmas_T, on_step), x_BCHW, order=3, coordinate=variance_preserving_time, first_order_to_zero=True)


def _sample_adams(walk: Walk, x_BCHW: Tensor, *, order: int, coordinate: Callable[[float], float], first_order_to_zero: bool = False) -> Tensor:
    """x plus the integral over sigma of the polynomial in `coordinate` through the latest slopes."""
    slopes: deque[Tensor] = deque(maxlen=order)
    for index, sigma, sigma_next in walk:
        slopes.appendleft(derivative(x_BCHW, walk.step(index, x_BCHW, sigma), sigma))
        known = 1 if first_order_to_zero and sigma_next <= 0 else len(slopes)
        nodes = [walk.sigmas[index - back] for back in range(known)]
        x_BCHW = x_BCHW + _weighted(slopes, integrate_lagrange(nodes, sigma, sigma_next, coordinate))
    return x_BCHW


def _weighted(slopes: Sequence[Tensor] | deque[Tensor], weights: Sequence[float]) -> Tensor:
    total = slopes[0] * weights[0]
    for slope, weight in zip(list(slopes)[1:], weights[1:]):
        total = total + slope * weight
    return total


def integrate_lagrange(nodes: Sequence[float], start: float, stop: float, coordinate: Callable[[float], float]) -> list[float]:
    """For each node, the integral over sigma in [start, stop] of its Lagrange polynomial in `coordinate(sigma)`.

    Gauss-Legendre quadrature with 64 points: exact for polynomials in sigma, and up to rounding for the smooth coordinates used here.
    """
    if len(nodes) == 1:
        return [stop - start]
    points, weights = np.polynomial.legendre.leggauss(64)
    half = (stop - start) / 2
    times = np.array([coordinate(float(sigma)) for sigma in start + half * (points + 1)])
    node_times = [coordinate(sigma) for sigma in nodes]
    integrals = []
    for node, node_time in enumerate(node_times):
        values = np.ones_like(times)
        for other, other_time in enumerate(node_times):
            if other != node:
                values = values * (times - other_time) / (node_time - other_time)
        integrals.append(float((values * weights).sum() * half))
    return integrals


_VP_EPSILON, _VP_SIGMA_MIN, _VP_SIGMA_MAX = 1e-3, 0.002, 80.0
_VP_BETA_D = 2 * (math.log(_VP_SIGMA_MIN**2 + 1) / _VP_EPSILON - math.log(_VP_SIGMA_MAX**2 + 1)) / (_VP_EPSILON - 1)
_VP_BETA_MIN = math.log(_VP_SIGMA_MAX**2 + 1) - _VP_BETA_D / 2


def variance_preserving_time(sigma: float) -> float:
    """Time at which the variance-preserving SDE with linear beta has this noise level. Karras et al. 2022, table 1 and appendix C.1.

    The SDE is fixed by sigma 0.002 at time 0.001 and sigma 80 at time 1, the paper's range.
    """
    return (math.sqrt(_VP_BETA_MIN**2 + 2 * _VP_BETA_D * math.log(sigma**2 + 1)) - _VP_BETA_MIN) / _VP_BETA_D


@torch.no_grad()
def sample_ipndm(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """IPNDM: Adams-Bashforth weights for even steps, order rising to 4. Zhang and Chen 2023 (as above), section 3, appendix H.2."""
    walk = Walk(denoise, sigmas_T, on_step)
    slopes: deque[Tensor] = deque(maxlen=4)
    for index, sigma, sigma_next in walk:
        slopes.appendleft(derivative(x_BCHW, walk.step(index, x_BCHW, sigma), sigma))
        x_BCHW = x_BCHW + _weighted(slopes, ADAMS_BASHFORTH[len(slopes) - 1]) * (sigma_next - sigma)
    return x_BCHW


@torch.no_grad()
def sample_plms(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """PLMS: a Heun-like first step, then Adams-Bashforth to order 4. Liu et al. 2022, "Pseudo Numerical Methods", eq. 12 and 13."""
    walk = Walk(denoise, sigmas_T, on_step)
    slopes: deque[Tensor] = deque(maxlen=4)
    for index, sigma, sigma_next in walk:
        slope_BCHW = derivative(x_BCHW, walk.step(index, x_BCHW, sigma), sigma)
        slopes.appendleft(slope_BCHW)
        mixed_BCHW = _weighted(slopes, ADAMS_BASHFORTH[len(slopes) - 1])
        if index == 0 and sigma_next > 0:
            there_BCHW = x_BCHW + slope_BCHW * (sigma_next - sigma)
            mixed_BCHW = (slope_BCHW + derivative(there_BCHW, walk.denoise(there_BCHW, sigma_next), sigma_next)) / 2
        x_BCHW = x_BCHW + mixed_BCHW * (sigma_next - sigma)
    return x_BCHW


@torch.no_grad()
def sample_unipc(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """UniPC with x0 predictions: a multistep predictor, corrected once the next x0 is known. Zhao et al. 2023, "UniPC", algorithms 5 to 8.

    Half the log SNR is -log sigma here. The step to zero is first order, where the predictor equals x0.
    """
    walk = Walk(denoise, sigmas_T, on_step)
    history: deque[tuple[float, Tensor]] = deque(maxlen=settings.uni_pc_order)  # (sigma, x0), newest first
    before_BCHW, order = x_BCHW, 0
    for index, sigma, sigma_next in walk:
        denoised_BCHW = walk.step(index, x_BCHW, sigma)
        if index > 0:
            x_BCHW = _unipc_update(before_BCHW, history, order, sigma, settings.uni_pc_variant, denoised_BCHW)
        history.appendleft((sigma, denoised_BCHW))
        if sigma_next <= 0:
            return denoised_BCHW
        order = min(len(history), walk.num_steps - index) if settings.uni_pc_lower_order_final else len(history)
        if settings.is_flow and index > 0 and math.log(sigma / sigma_next) > LONGEST_GROWTH * math.log(walk.sigmas[index - 1] / sigma):
            order = 1
        before_BCHW = x_BCHW
        x_BCHW = _unipc_update(before_BCHW, history, order, sigma_next, settings.uni_pc_variant, None)
    return x_BCHW


def _unipc_update(
    x_BCHW: Tensor, history: deque[tuple[float, Tensor]], order: int, sigma_next: float, variant: str, corrected_by_BCHW: Tensor | None
) -> Tensor:
    """UniP of `order` from the newest state in `history` to `sigma_next`; UniC if the x0 there is given."""
    sigma, newest_BCHW = history[0]
    step = math.log(sigma / sigma_next)
    ratios = [math.log(sigma / history[back][0]) / step for back in range(1, order)]
    differences = [(history[back][1] - newest_BCHW) / ratio for back, ratio in zip(range(1, order), ratios)]
    if corrected_by_BCHW is not None:
        ratios, differences = [*ratios, 1.0], [*differences, corrected_by_BCHW - newest_BCHW]
    shrink = math.expm1(-step)
    scale = -step if variant == "bh1" else shrink
    result_BCHW = x_BCHW * (sigma_next / sigma) - newest_BCHW * shrink
    for weight, difference in zip(_unipc_weights(ratios, -step, shrink, scale), differences):
        result_BCHW = result_BCHW - difference * (scale * weight)
    return result_BCHW


def _unipc_weights(ratios: Sequence[float], negative_step: float, shrink: float, scale: float) -> list[float]:
    """Solves the order conditions, sum_m a_m r_m^(k-1) = k! phi_(k+1)(-h) (-h)^k / B(h); theorem 3.1. For one ratio 1/2, as in the paper."""
    if len(ratios) <= 1:
        return [0.5] * len(ratios)
    rows, right, phi, factorial = [], [], shrink / negative_step - 1, 1.0
    for power in range(len(ratios)):
        rows.append([ratio**power for ratio in ratios])
        factorial *= power + 1
        right.append(phi * factorial / scale)
        phi = phi / negative_step - 1 / (factorial * (power + 2))
    return [float(weight) for weight in np.linalg.solve(np.array(rows), np.array(right))]
