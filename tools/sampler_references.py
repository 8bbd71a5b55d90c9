"""References for the samplers: each as another implementation or formula, with the product's signature.

A reference is called like a sampler, `(denoise, x, sigmas, *, settings, noise, on_step=None)`, so that it can replace a sampler in a toy problem
and in the product. diffusers' schedulers get exactly the sampler's noise levels and random numbers. Nothing here may import a sampler's
formula: only the registry's names, and the restart steps of Restart.

Shapes: B batch, C channels, H W rows and columns, T noise levels.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from backend.sampling.sampler_types import Denoise, NoiseSource, SamplerSettings

Run = Callable[[Denoise, Tensor, Tensor, NoiseSource], Tensor]
Prepare = Callable[[Any, Tensor, NoiseSource, Tensor], None]
SCHEDULERS = "diffusers.schedulers"


@dataclass(frozen=True, slots=True)
class Reference:
    """`source` names it; `limits` says what it does not cover. `settings`: sampler settings for which both are the same method."""

    source: str
    run: Run
    limits: str = ""
    settings: SamplerSettings = field(default_factory=SamplerSettings)

    def __call__(
        self, denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: Any = None
    ) -> Tensor:
        """The reference in a sampler's place, computed in fp64; reports no steps."""
        result = self.run(denoise, x_BCHW.double(), sigmas_T.double(), noise)
        return result.to(x_BCHW)


# diffusers


def _scheduler(name: str, module: str, num_steps: int, **config: Any) -> Any:
    made = getattr(importlib.import_module(f"{SCHEDULERS}.{module}"), name)(**config)
    made.set_timesteps(num_steps)
    return made


@contextmanager
def _drawing_from(noise: NoiseSource, x_BCHW: Tensor, module: str) -> Iterator[None]:
    """Make the library draw its random tensors from the sampler's noise."""
    source = importlib.import_module(f"{SCHEDULERS}.{module}")

    def draw(shape: Any, dtype: Any = None, **_: Any) -> Tensor:
        return noise.next(x_BCHW).to(dtype or x_BCHW.dtype)

    with warnings.catch_warnings(), mock.patch.object(source, "randn_tensor", draw) if hasattr(source, "randn_tensor") else mock.MagicMock():
        warnings.simplefilter("ignore")
        yield


def _count_down(num: int) -> Tensor:
    """Timesteps that only encode their order."""
    return torch.arange(num, 0, -1, dtype=torch.float64)


def _in_exploding_form(name: str, module: str, *, doubled: bool = False, prepare: Prepare | None = None) -> Run:
    """A scheduler whose samples are x0 + sigma * noise. `doubled`: it steps twice per level, so its list contains each inner level twice."""

    def run(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor:
        num_steps = len(sigmas) - 1
        scheduler = _scheduler(name, module, num_steps)
        scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]]) if doubled else sigmas
        scheduler.timesteps = _count_down(2 * num_steps - 1 if doubled else num_steps)
        if prepare is not None:
            prepare(scheduler, sigmas, noise, x)
        with _drawing_from(noise, x, module):
            for timestep in scheduler.timesteps:
                scale = scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), timestep)
                sigma = (1 / scale**2 - 1).clamp(min=0).sqrt().expand(len(x))
                predicted = (x - denoise(x, sigma)) / sigma[0]
                x = scheduler.step(predicted, timestep, x).prev_sample.double()
        return x

    return run


def _middles(scheduler: Any, sigmas: Tensor, noise: NoiseSource, x: Tensor) -> None:
    """KDPM2 evaluates at the geometric middle of each step."""
    middles = (sigmas[:-2] * sigmas[1:-1]).sqrt().repeat_interleave(2)
    scheduler.sigmas_interpol = torch.cat([sigmas[:1], middles, sigmas.new_zeros(1)])


def _ancestral_middles(scheduler: Any, sigmas: Tensor, noise: NoiseSource, x: Tensor) -> None:
    """KDPM2 with the posterior's noise: Ho et al. 2020, eq. 7, in terms of noise levels."""
    now, then = sigmas[:-1], sigmas[1:]
    up = then * (1 - (then / now) ** 2).sqrt()
    down = (then**2 - up**2).clamp(min=0).sqrt()
    middle = (now * down).sqrt()
    scheduler.sigmas_interpol = torch.cat([middle[:-1].repeat_interleave(2), middle.new_zeros(2)])
    scheduler.sigmas_up = torch.cat([up[:-1].repeat_interleave(2), up.new_zeros(2)])
    scheduler.sigmas_down = torch.cat([down[:-1].repeat_interleave(2), down.new_zeros(2)])


def _brownian_paths(scheduler: Any, sigmas: Tensor, noise: NoiseSource, x: Tensor) -> None:
    paths = noise.brownian(x, float(sigmas[sigmas > 0].min()), float(sigmas.max()))
    scheduler.noise_sampler = lambda sigma, sigma_next: paths(float(sigma), float(sigma_next))


def _in_preserving_form(name: str, module: str, *, brownian: bool = False, **config: Any) -> Run:
    """A scheduler whose samples are scaled to unit variance, and which stores a list of noise levels."""

    def run(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor:
        scheduler = _scheduler(name, module, len(sigmas) - 1, **config)
        scheduler.sigmas, scheduler.timesteps = sigmas, _count_down(len(sigmas) - 1)
        paths = noise.brownian(x, float(sigmas[sigmas > 0].min()), float(sigmas.max())) if brownian else None
        sample = x / (1 + sigmas[0] ** 2).sqrt()
        with _drawing_from(noise, x, module):
            for index, timestep in enumerate(scheduler.timesteps):
                sigma, sigma_next = float(sigmas[index]), float(sigmas[index + 1])
                x = sample * math.sqrt(1 + sigma**2)
                fresh = {} if paths is None else {"variance_noise": paths(sigma, sigma_next) if sigma_next > 0 else torch.zeros_like(x)}
                sample = scheduler.step(_slope(denoise, x, sigma), timestep, sample, **fresh).prev_sample.double()
        return sample * (1 + sigmas[-1] ** 2).sqrt()

    return run


def _almost_to_zero(run: Run) -> Run:
    def nearly(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor:
        return run(denoise, x, torch.cat([sigmas[:-1], sigmas[-2:-1] * 1e-9]), noise)

    return nearly


def _slope(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
    return (x - denoise(x, x.new_full((len(x),), sigma))) / sigma


def _in_alpha_form(name: str, module: str, *, repeats_second: bool = False, **config: Any) -> Run:
    """A scheduler that looks up alphas by integer timesteps: its table contains exactly the schedule's levels."""

    def run(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor:
        num_steps = len(sigmas) - 1
        scheduler = _scheduler(name, module, num_steps, num_train_timesteps=num_steps, **config)
        ascending = sigmas[:-1].flip(0)
        scheduler.alphas_cumprod = 1 / (1 + ascending**2)
        scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
        sample = x / (1 + sigmas[0] ** 2).sqrt()
        with _drawing_from(noise, x, module):
            for timestep in [int(step) for step in scheduler.timesteps]:
                sigma = float(ascending[timestep])
                predicted = _slope(denoise, sample * math.sqrt(1 + sigma**2), sigma)
                sample = scheduler.step(predicted, timestep, sample).prev_sample.double()
        return sample

    return run


def _ddim_cfgpp(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor:
    """CFG++ (Chung et al. 2024, algorithm 2): the library's DDIM step from the combination of unconditional noise and guided x0."""
    num_steps = len(sigmas) - 1
    scheduler = _scheduler("DDIMScheduler", "scheduling_ddim", num_steps, num_train_timesteps=num_steps, clip_sample=False)
    ascending = sigmas[:-1].flip(0)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = 1 / (1 + ascending**2), torch.ones((), dtype=torch.float64)
    sample = x / (1 + sigmas[0] ** 2).sqrt()
    for timestep in [int(step) for step in scheduler.timesteps]:
        sigma = float(ascending[timestep])
        x = sample * math.sqrt(1 + sigma**2)
        x0 = denoise(x, x.new_full((len(x),), sigma))
        uncond = getattr(denoise, "last_uncond_BCHW", None)
        predicted = (x - (x0 if uncond is None else uncond)) / sigma
        sample = scheduler.step(predicted, timestep, (x0 + sigma * predicted) / math.sqrt(1 + sigma**2)).prev_sample
    return sample


def _lcm(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor:
    """The table has one additional entry below, so that the library's boundary scaling (1 at timestep 0) has no effect."""
    num_steps = len(sigmas) - 1
    config = {"num_train_timesteps": num_steps + 1, "original_inference_steps": num_steps + 1, "clip_sample": False, "timestep_scaling": 1e9}
    scheduler = _scheduler("LCMScheduler", "scheduling_lcm", num_steps, **config)
    ascending = torch.cat([sigmas[-2:-1] / 2, sigmas[:-1].flip(0)])
    scheduler.alphas_cumprod, scheduler.timesteps = 1 / (1 + ascending**2), torch.arange(num_steps, 0, -1)
    sample = x / (1 + sigmas[0] ** 2).sqrt()
    with _drawing_from(noise, x, "scheduling_lcm"):
        for timestep in scheduler.timesteps:
            sigma = float(ascending[timestep])
            predicted = _slope(denoise, sample * math.sqrt(1 + sigma**2), sigma)
            sample = scheduler.step(predicted, timestep, sample).prev_sample
    return sample


def _ipndm(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor:
    """The library's IPNDM predicts velocities with its own alphas and betas; here they come from the schedule."""
    scheduler = _scheduler("IPNDMScheduler", "scheduling_ipndm", len(sigmas) - 1)
    scheduler.alphas = 1 / (1 + sigmas**2).sqrt()
    scheduler.betas, scheduler.timesteps = sigmas * scheduler.alphas, _count_down(len(sigmas) - 1)
    sample = x * scheduler.alphas[0]
    for index, timestep in enumerate(scheduler.timesteps):
        slope = _slope(denoise, sample / scheduler.alphas[index], float(sigmas[index]))
        velocity = (slope - sample * scheduler.betas[index]) / scheduler.alphas[index]
        sample = scheduler.step(velocity, timestep, sample).prev_sample
    return sample


def _dpmpp_2s(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor:
    """The library's one-step solver of order 2: every second level is the geometric middle of a step. The last step is of order 1."""
    middles = (sigmas[:-2] * sigmas[1:-1]).sqrt()
    levels = torch.cat([torch.stack([sigmas[:-2], middles], dim=1).flatten(), sigmas[-2:]])
    scheduler = _scheduler(
        "DPMSolverSinglestepScheduler", "scheduling_dpmsolver_singlestep", len(levels) - 1, final_sigmas_type="zero", lower_order_final=True
    )
    scheduler.sigmas, scheduler.timesteps = levels, _count_down(len(levels) - 1)
    scheduler.order_list = [1, 2] * len(middles) + [1]
    sample = x / (1 + levels[0] ** 2).sqrt()
    for index, timestep in enumerate(scheduler.timesteps):
        slope = _slope(denoise, sample * (1 + levels[index] ** 2).sqrt(), float(levels[index]))
        sample = scheduler.step(slope, timestep, sample).prev_sample.double()
    return sample


# formulas


def _deis(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor:
    """tAB-DEIS of order 3 (Zhang and Chen 2023, eq. 15), integrated by scipy's adaptive quadrature in the time of the linear-beta SDE."""
    from scipy import integrate, interpolate, optimize

    top, bottom, epsilon = math.log(1 + 80.0**2), math.log(1 + 0.002**2), 1e-3  # Karras et al. 2022: sigma 80 at time 1, 0.002 at 0.001
    slope_of_beta, beta_min = np.linalg.solve(np.array([[0.5, 1.0], [epsilon**2 / 2, epsilon]]), np.array([top, bottom]))

    def time_of(sigma: float) -> float:
        return float(optimize.brentq(lambda t: slope_of_beta * t * t / 2 + beta_min * t - math.log1p(sigma * sigma), 0, 4, xtol=1e-15, rtol=1e-14))

    levels, slopes = sigmas.tolist(), list[Tensor]()
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        slopes = [_slope(denoise, x, sigma), *slopes[:2]]
        nodes = [time_of(level) for level in levels[max(0, index - 2) : index + 1][::-1]]
        weights = [sigma_next - sigma]
        if len(nodes) > 1 and sigma_next > 0:
            bases = [interpolate.lagrange(nodes, [float(other == node) for other in range(len(nodes))]) for node in range(len(nodes))]
            weights = [integrate.quad(lambda s, basis=basis: basis(time_of(s)), sigma, sigma_next, epsabs=1e-9, epsrel=1e-9)[0] for basis in bases]
        for weight, slope in zip(weights, slopes):
            x = x + slope * weight
    return x


def _restart(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor:
    """Restart (Xu et al. 2023, algorithm 1) with the library's Heun: between descents, noise leads back up."""
    from backend.sampling.samplers_one_step import restart_steps

    heun = _in_exploding_form("HeunDiscreteScheduler", "scheduling_heun_discrete", doubled=True)
    pairs = restart_steps(sigmas.tolist())
    ways, reached = [[pairs[0][0]]], pairs[0][0]
    for sigma, sigma_next in pairs:
        if sigma > reached:
            ways.append([sigma])
        ways[-1].append(sigma_next)
        reached = sigma_next
    for way, following in zip(ways, [*ways[1:], None]):
        x = _down_to_a_level_above_zero(denoise, x, way) if way[-1] > 0 else heun(denoise, x, torch.tensor(way, dtype=torch.float64), noise)
        if following is not None:
            x = x + noise.next(x) * math.sqrt(following[0] ** 2 - way[-1] ** 2)
    return x


def _down_to_a_level_above_zero(denoise: Denoise, x: Tensor, way: list[float]) -> Tensor:
    """Heun's trapezoid written out, because the library's scheduler can only end at 0."""
    for sigma, sigma_next in pairwise(way):
        slope = _slope(denoise, x, sigma)
        x = x + (slope + _slope(denoise, x + slope * (sigma_next - sigma), sigma_next)) * 0.5 * (sigma_next - sigma)
    return x


_MULTISTEP, _UNIPC = "scheduling_dpmsolver_multistep", "scheduling_unipc_multistep"
_DPM_SDE = {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero"}

LIBRARY_REFERENCES: dict[str, Reference] = {
    "DPM++ 2M": Reference("DPMSolverMultistepScheduler", _in_preserving_form("DPMSolverMultistepScheduler", _MULTISTEP, euler_at_final=True)),
    "DPM++ SDE": Reference(
        "DPMSolverSDEScheduler", _in_exploding_form("DPMSolverSDEScheduler", "scheduling_dpmsolver_sde", doubled=True, prepare=_brownian_paths)
    ),
    "DPM++ 2M SDE": Reference(
        "DPMSolverMultistepScheduler, sde, midpoint",
        _in_preserving_form("DPMSolverMultistepScheduler", _MULTISTEP, brownian=True, solver_type="midpoint", **_DPM_SDE),
    ),
    "DPM++ 2M SDE Heun": Reference(
        "DPMSolverMultistepScheduler, sde, heun",
        _in_preserving_form("DPMSolverMultistepScheduler", _MULTISTEP, brownian=True, solver_type="heun", **_DPM_SDE),
    ),
    "DPM++ 2S a": Reference("DPMSolverSinglestepScheduler, order 2", _dpmpp_2s, limits="at eta 0", settings=SamplerSettings(eta=0.0)),
    "DPM++ 3M SDE": Reference(
        "DPMSolverMultistepScheduler, order 3",
        _in_preserving_form(
            "DPMSolverMultistepScheduler", _MULTISTEP, solver_order=3, solver_type="heun", lower_order_final=False, euler_at_final=True
        ),
        limits="at eta 0; of the noisy form the library has the sign of one constant wrong",
        settings=SamplerSettings(eta=0.0),
    ),
    "Euler a": Reference(
        "EulerAncestralDiscreteScheduler", _in_exploding_form("EulerAncestralDiscreteScheduler", "scheduling_euler_ancestral_discrete")
    ),
    "Euler": Reference("EulerDiscreteScheduler", _in_exploding_form("EulerDiscreteScheduler", "scheduling_euler_discrete")),
    "LMS": Reference("LMSDiscreteScheduler", _in_exploding_form("LMSDiscreteScheduler", "scheduling_lms_discrete"), "its quadrature stops at 1e-4"),
    "Heun": Reference("HeunDiscreteScheduler", _in_exploding_form("HeunDiscreteScheduler", "scheduling_heun_discrete", doubled=True)),
    "DPM2": Reference(
        "KDPM2DiscreteScheduler", _in_exploding_form("KDPM2DiscreteScheduler", "scheduling_k_dpm_2_discrete", doubled=True, prepare=_middles)
    ),
    "DPM2 a": Reference(
        "KDPM2AncestralDiscreteScheduler",
        _in_exploding_form("KDPM2AncestralDiscreteScheduler", "scheduling_k_dpm_2_ancestral_discrete", doubled=True, prepare=_ancestral_middles),
    ),
    "Restart": Reference("HeunDiscreteScheduler on each way down", _restart, "where it restarts is the product's"),
    "IPNDM": Reference("IPNDMScheduler", _ipndm),
    "IPNDM_V": Reference("LMSDiscreteScheduler", _in_exploding_form("LMSDiscreteScheduler", "scheduling_lms_discrete"), "the same method"),
    "DEIS": Reference("eq. 15 of its paper by scipy", _deis, "the library's DEIS interpolates over log sigma"),
    "DDIM": Reference("DDIMScheduler", _in_alpha_form("DDIMScheduler", "scheduling_ddim", clip_sample=False)),
    "DDIM CFG++": Reference("DDIMScheduler's step, with the paper's exchange of noise", _ddim_cfgpp),
    "PLMS": Reference("PNDMScheduler", _in_alpha_form("PNDMScheduler", "scheduling_pndm", skip_prk_steps=True)),
    "UniPC": Reference(
        "UniPCMultistepScheduler",
        _almost_to_zero(_in_preserving_form("UniPCMultistepScheduler", _UNIPC, solver_type="bh1", solver_order=3)),
        limits="the library gives NaN at 0, and goes to a billionth of the last level instead",
    ),
    "LCM": Reference("LCMScheduler", _lcm),
    "DDPM": Reference("DDPMScheduler", _in_alpha_form("DDPMScheduler", "scheduling_ddpm", clip_sample=False)),
}
"""By sampler. DPM fast, DPM adaptive and HeunPP2 have no counterpart in the library."""


# k-diffusion's published module, if the caller has unpacked it


_K_DIFFUSION_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM++ 2M": ("sample_dpmpp_2m", {}),
    "DPM++ SDE": ("sample_dpmpp_sde", {}),
    "DPM++ 2M SDE": ("sample_dpmpp_2m_sde", {}),
    "DPM++ 2M SDE Heun": ("sample_dpmpp_2m_sde", {"solver_type": "heun"}),
    "DPM++ 2S a": ("sample_dpmpp_2s_ancestral", {}),
    "DPM++ 3M SDE": ("sample_dpmpp_3m_sde", {}),
    "Euler a": ("sample_euler_ancestral", {}),
    "Euler": ("sample_euler", {}),
    "LMS": ("sample_lms", {}),
    "Heun": ("sample_heun", {}),
    "DPM2": ("sample_dpm_2", {}),
    "DPM2 a": ("sample_dpm_2_ancestral", {}),
    "DPM fast": ("sample_dpm_fast", {"eta": 1.0}),
    "DPM adaptive": ("sample_dpm_adaptive", {"eta": 1.0}),
}
_TAKES_NOISE = {"DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 2S a", "DPM++ 3M SDE", "Euler a", "DPM2 a", "DPM fast", "DPM adaptive"}
_BROWNIAN = {"DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE"}


def load_k_diffusion(folder: Path) -> dict[str, Reference]:
    """References from the file sampling.py in an unpacked k-diffusion (`pip download k-diffusion --no-deps --no-binary :all:`).

    Only that file is loaded; its other imports are replaced by empty modules.
    """
    package = types.ModuleType("k_diffusion_published")
    package.__path__ = []
    helpers = types.ModuleType("k_diffusion_published.utils")
    helpers.append_dims = lambda x, dims: x.reshape(*x.shape, *[1] * (dims - x.ndim))  # type: ignore[attr-defined]
    integrator = types.ModuleType("torchdiffeq")
    integrator.odeint = None  # type: ignore[attr-defined]
    package.utils = helpers  # type: ignore[attr-defined]
    stubs = {"k_diffusion_published": package, "k_diffusion_published.utils": helpers, "torchdiffeq": integrator}
    spec = importlib.util.spec_from_file_location("k_diffusion_published.sampling", folder / "k_diffusion" / "sampling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    added = {name: stub for name, stub in stubs.items() if sys.modules.setdefault(name, stub) is stub}
    try:
        spec.loader.exec_module(module)
    finally:
        for name in added:
            del sys.modules[name]
    return {name: Reference(f"k-diffusion {function}", _k_diffusion(module, name)) for name, (function, _) in _K_DIFFUSION_NAMES.items()}


def _k_diffusion(module: Any, name: str) -> Run:
    function, settings = _K_DIFFUSION_NAMES[name]

    def run(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor:
        positive = sigmas[sigmas > 0]
        arguments: dict[str, Any] = {**settings, "disable": True}
        if name in _BROWNIAN:
            paths = noise.brownian(x, float(positive.min()), float(positive.max()))
            arguments["noise_sampler"] = lambda sigma, sigma_next: paths(float(sigma), float(sigma_next))
        elif name in _TAKES_NOISE:
            arguments["noise_sampler"] = lambda *_: noise.next(x)
        levels: tuple[Any, ...] = (sigmas,)
        if name == "DPM fast":
            levels = (float(positive.min()), float(positive.max()), len(sigmas) - 1)
        elif name == "DPM adaptive":
            levels = (float(positive.min()), float(positive.max()))
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # two of its functions store times in the default dtype
        try:
            result: Tensor = getattr(module, function)(denoise, x, *levels, **arguments)
        finally:
            torch.set_default_dtype(before)
        return result

    return run
