"""Samplers without memory of earlier steps: Euler, Heun, DPM2 and their ancestral forms, DDIM, DDPM, LCM, Restart.

Each is its formula. See sampler_types.py for what they share and for shapes. Must not know networks, guidance or devices.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from backend.sampling.sampler_types import (
    Denoise,
    NoiseSource,
    OnStep,
    SamplerSettings,
    Walk,
    add_noise,
    churn,
    derivative,
    split_ancestral,
    split_step,
)
from backend.sampling.schedules import karras_sigmas


@torch.no_grad()
def sample_euler(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """Euler steps with churn. Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 2."""
    walk = Walk(denoise, sigmas_T, on_step)
    for index, sigma, sigma_next in walk:
        x_BCHW, sigma_hat = churn(x_BCHW, sigma, walk.num_steps, settings, noise)
        denoised_BCHW = walk.step(index, x_BCHW, sigma_hat)
        x_BCHW = x_BCHW + derivative(x_BCHW, denoised_BCHW, sigma_hat) * (sigma_next - sigma_hat)
    return x_BCHW


@torch.no_grad()
def sample_euler_ancestral(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """Ancestral sampling with Euler steps. Song et al. 2021, "Score-Based Generative Modeling through SDEs", appendix F, in sigmas."""
    walk, eta = Walk(denoise, sigmas_T, on_step), settings.eta_or(1.0)
    for index, sigma, sigma_next in walk:
        denoised_BCHW = walk.step(index, x_BCHW, sigma)
        sigma_down, kept, sigma_up = split_step(settings, sigma, sigma_next, eta)
        x_BCHW = x_BCHW + derivative(x_BCHW, denoised_BCHW, sigma) * (sigma_down - sigma)
        if sigma_next > 0:
            x_BCHW = add_noise(x_BCHW, noise.next(x_BCHW), kept, settings.s_noise * sigma_up)
    return x_BCHW


@torch.no_grad()
def sample_heun(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """Heun steps with churn; the last step, to zero, is an Euler step. Karras et al. 2022, algorithm 2."""
    walk = Walk(denoise, sigmas_T, on_step)
    for index, sigma, sigma_next in walk:
        x_BCHW, sigma_hat = churn(x_BCHW, sigma, walk.num_steps, settings, noise)
        x_BCHW = _heun_step(walk, x_BCHW, walk.step(index, x_BCHW, sigma_hat), sigma_hat, sigma_next)
    return x_BCHW


def _heun_step(walk: Walk, x_BCHW: Tensor, denoised_BCHW: Tensor, sigma: float, sigma_next: float) -> Tensor:
    slope_BCHW = derivative(x_BCHW, denoised_BCHW, sigma)
    euler_BCHW = x_BCHW + slope_BCHW * (sigma_next - sigma)
    if sigma_next == 0:
        return euler_BCHW
    slope_there_BCHW = derivative(euler_BCHW, walk.denoise(euler_BCHW, sigma_next), sigma_next)
    return x_BCHW + (slope_BCHW + slope_there_BCHW) * ((sigma_next - sigma) / 2)


@torch.no_grad()
def sample_heunpp2(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """Heun++: averages the slopes of the next one or two levels with weights that fall with their noise.

    Source: the published definition of Heun++ (sd-webui-samplers-scheduler, MIT): weights sigma / (k sigma_0) for the k - 1 later slopes, the
    rest for the first; k = 3, in the next-to-last step 2, and the last step is Euler.
    """
    walk = Walk(denoise, sigmas_T, on_step)
    for index, sigma, sigma_next in walk:
        x_BCHW, sigma_hat = churn(x_BCHW, sigma, walk.num_steps, settings, noise)
        first_BCHW = slope_BCHW = derivative(x_BCHW, walk.step(index, x_BCHW, sigma_hat), sigma_hat)
        later = [level for level in walk.sigmas[index + 1 : index + 3] if level != walk.sigmas[-1]]
        at_BCHW, at_sigma, first_weight = x_BCHW, sigma_hat, 1.0
        mixed_BCHW = torch.zeros_like(x_BCHW)
        for level in later:
            at_BCHW = at_BCHW + slope_BCHW * (level - at_sigma)
            at_sigma, weight = level, level / ((len(later) + 1) * walk.sigmas[0])
            slope_BCHW = derivative(at_BCHW, walk.denoise(at_BCHW, at_sigma), at_sigma)
            mixed_BCHW, first_weight = mixed_BCHW + slope_BCHW * weight, first_weight - weight
        x_BCHW = x_BCHW + (mixed_BCHW + first_BCHW * first_weight) * (sigma_next - sigma_hat)
    return x_BCHW


@torch.no_grad()
def sample_dpm_2(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """Midpoint steps in log sigma, with churn. Lu et al. 2022, "DPM-Solver", DPM-Solver-2, and Karras et al. 2022, algorithm 2."""
    walk = Walk(denoise, sigmas_T, on_step)
    for index, sigma, sigma_next in walk:
        x_BCHW, sigma_hat = churn(x_BCHW, sigma, walk.num_steps, settings, noise)
        x_BCHW = _midpoint_step(walk, x_BCHW, walk.step(index, x_BCHW, sigma_hat), sigma_hat, sigma_next)
    return x_BCHW


@torch.no_grad()
def sample_dpm_2_ancestral(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """Ancestral sampling with midpoint steps in log sigma. Lu et al. 2022, DPM-Solver-2; Song et al. 2021, appendix F."""
    walk, eta = Walk(denoise, sigmas_T, on_step), settings.eta_or(1.0)
    for index, sigma, sigma_next in walk:
        denoised_BCHW = walk.step(index, x_BCHW, sigma)
        sigma_down, kept, sigma_up = split_step(settings, sigma, sigma_next, eta)
        x_BCHW = _midpoint_step(walk, x_BCHW, denoised_BCHW, sigma, sigma_down)
        if sigma_next > 0:
            x_BCHW = add_noise(x_BCHW, noise.next(x_BCHW), kept, settings.s_noise * sigma_up)
    return x_BCHW


def _midpoint_step(walk: Walk, x_BCHW: Tensor, denoised_BCHW: Tensor, sigma: float, sigma_next: float) -> Tensor:
    slope_BCHW = derivative(x_BCHW, denoised_BCHW, sigma)
    if sigma_next == 0:
        return x_BCHW + slope_BCHW * (sigma_next - sigma)
    middle = math.sqrt(sigma * sigma_next)
    middle_BCHW = x_BCHW + slope_BCHW * (middle - sigma)
    return x_BCHW + derivative(middle_BCHW, walk.denoise(middle_BCHW, middle), middle) * (sigma_next - sigma)


@torch.no_grad()
def sample_ddim(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """DDIM. eta 0 (the default) adds no noise, eta 1 is DDPM. Song et al. 2020, "Denoising Diffusion Implicit Models", eq. 12 and 16."""
    walk, eta = Walk(denoise, sigmas_T, on_step), settings.eta_or(0.0)
    for index, sigma, sigma_next in walk:
        denoised_BCHW = walk.step(index, x_BCHW, sigma)
        x_BCHW = _ddim_step(denoised_BCHW, derivative(x_BCHW, denoised_BCHW, sigma), x_BCHW, sigma, sigma_next, eta, noise)
    return x_BCHW


@torch.no_grad()
def sample_ddim_cfgpp(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """DDIM that renoises with the unconditional noise. Chung et al. 2024, "CFG++: Manifold-constrained Classifier Free Guidance", algorithm 2.

    Reads the denoiser's `last_uncond_BCHW`; without it this is DDIM.
    """
    walk, eta = Walk(denoise, sigmas_T, on_step), settings.eta_or(0.0)
    for index, sigma, sigma_next in walk:
        denoised_BCHW = walk.step(index, x_BCHW, sigma)
        uncond_BCHW: Tensor | None = getattr(denoise, "last_uncond_BCHW", None)
        slope_BCHW = derivative(x_BCHW, denoised_BCHW if uncond_BCHW is None else uncond_BCHW, sigma)
        x_BCHW = _ddim_step(denoised_BCHW, slope_BCHW, x_BCHW, sigma, sigma_next, eta, noise)
    return x_BCHW


def _ddim_step(
    denoised_BCHW: Tensor, slope_BCHW: Tensor, x_BCHW: Tensor, sigma: float, sigma_next: float, eta: float, noise: NoiseSource
) -> Tensor:  # fmt: skip
    sigma_down, sigma_up = split_ancestral(sigma, sigma_next, eta)
    next_BCHW = denoised_BCHW + slope_BCHW * sigma_down
    return next_BCHW + noise.next(x_BCHW) * sigma_up if sigma_up > 0 else next_BCHW


@torch.no_grad()
def sample_ddpm(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """Samples the posterior of the diffusion in every step. Ho et al. 2020, "Denoising Diffusion Probabilistic Models", eq. 6 and 7, in sigmas."""
    walk = Walk(denoise, sigmas_T, on_step)
    for index, sigma, sigma_next in walk:
        denoised_BCHW = walk.step(index, x_BCHW, sigma)
        shrink = (sigma_next / sigma) ** 2
        x_BCHW = denoised_BCHW + (x_BCHW - denoised_BCHW) * shrink
        if sigma_next > 0:
            x_BCHW = x_BCHW + noise.next(x_BCHW) * (sigma_next * math.sqrt(1 - shrink))
    return x_BCHW


@torch.no_grad()
def sample_lcm(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """Denoise, renoise to the next level, repeat. Luo et al. 2023, "Latent Consistency Models", algorithm 3 (Song et al. 2023, algorithm 1)."""
    walk = Walk(denoise, sigmas_T, on_step)
    for index, sigma, sigma_next in walk:
        denoised_BCHW = walk.step(index, x_BCHW, sigma)
        x_BCHW = denoised_BCHW + noise.next(x_BCHW) * sigma_next if sigma_next > 0 else denoised_BCHW
    return x_BCHW


RESTART_SIGMA_MIN, RESTART_SIGMA_MAX = 0.1, 2.0


@torch.no_grad()
def sample_restart(
    denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
) -> Tensor:
    """Heun steps that, near the end, add noise back and go down again. Xu et al. 2023, "Restart Sampling", algorithm 1.

    With 20 steps or more, some steps are spent on restarts between noise levels 0.1 and 2: one restart of 9 steps; with 36 or more, two restarts of
    a quarter of the steps each.
    """
    walk = Walk(denoise, sigmas_T, on_step)
    steps = restart_steps(walk.sigmas)
    reached = steps[0][0]  # equals the first level up to rounding, which must not cause a draw of noise
    for index, (sigma, sigma_next) in enumerate(steps):
        if sigma > reached:
            x_BCHW = x_BCHW + noise.next(x_BCHW) * (settings.s_noise * math.sqrt(sigma**2 - reached**2))
        x_BCHW = _heun_step(walk, x_BCHW, walk.step(index, x_BCHW, sigma), sigma, sigma_next)
        reached = sigma_next
    return x_BCHW


def restart_steps(sigmas: list[float]) -> list[tuple[float, float]]:
    """The (sigma, sigma_next) pairs of Restart for a schedule that ends with 0. No restarts below 20 steps."""
    num_steps = len(sigmas) - 1
    if num_steps < 20:
        return list(pairwise(sigmas))
    num_restart_steps, num_restarts = (num_steps // 4, 2) if num_steps >= 36 else (9, 1)
    main = karras_sigmas(num_steps - num_restart_steps * num_restarts, sigmas[-2], sigmas[0]).tolist()
    low = min(range(len(main)), key=lambda index: abs(main[index] - RESTART_SIGMA_MIN))
    high = min(range(len(main)), key=lambda index: abs(main[index] - RESTART_SIGMA_MAX))
    again: list[tuple[float, float]] = []
    if high < low and main[low] > 0:
        levels = karras_sigmas(num_restart_steps + 1, main[low], main[high]).tolist()[:-1]
        again = list(pairwise(levels)) * num_restarts
    pairs = list(pairwise(main))
    return pairs[:low] + again + pairs[low:]
