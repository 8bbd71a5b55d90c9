"""Samplers against diffusers' schedulers: same noise levels, same toy denoiser, same random numbers, in fp64.

Diffusers formulates its updates in other variables (timesteps, alphas, predicted noise), which makes it an independent implementation.
"""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from torch import Tensor

from backend.modules.k_prediction import Prediction
from backend.sampling import samplers
from backend.sampling.sampler_types import SamplerSettings, Walk
from backend.sampling.samplers_multistep import _sample_adams
from backend.sampling.schedules import compute_sigmas
from tests.backend.sampling.toys import OneStream, denoise_two_peaks, one_stream

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore:Should have:UserWarning")

STABLE_DIFFUSION: dict[str, Any] = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "timestep_spacing": "trailing",
}  # fmt: skip
NUM_STEPS = 12


def _start() -> Tensor:
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def _make(name: str, **config: Any) -> Any:
    scheduler = getattr(diffusers, name)(**{**STABLE_DIFFUSION, **config})
    scheduler.set_timesteps(NUM_STEPS)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    return scheduler


def _run_exploding(scheduler: Any, x: Tensor, **step_args: Any) -> Tensor:
    """A scheduler with samples x0 + sigma * noise. Its noise level is derived from its scaling of the model's input."""
    for timestep in scheduler.timesteps:
        scale = scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), timestep)
        sigma = (1 / scale**2 - 1).clamp(min=0).sqrt()
        noise = (x - denoise_two_peaks(x, sigma)) / sigma
        x = scheduler.step(noise, timestep, x, **step_args).prev_sample
    return x


def _run_preserving(scheduler: Any, x: Tensor, sigmas: Tensor, **step_args: Any) -> Tensor:
    """A scheduler whose samples are scaled to unit variance."""
    sample = x / (1 + sigmas[0] ** 2).sqrt()
    for index, timestep in enumerate(scheduler.timesteps):
        sigma = sigmas[index : index + 1].double()
        x = sample * (1 + sigma**2).sqrt()
        noise = (x - denoise_two_peaks(x, sigma)) / sigma
        sample = scheduler.step(noise, timestep, sample, **step_args).prev_sample
    return sample * (1 + sigmas[-1] ** 2).sqrt()


def _ours(sampler: Any, sigmas: Tensor, noise: OneStream | None = None, **settings: Any) -> Tensor:
    x = _start() * sigmas[0]
    return sampler(denoise_two_peaks, x, sigmas, settings=SamplerSettings(**settings), noise=noise or one_stream())


def _levels(scheduler: Any) -> Tensor:
    """The scheduler's noise levels, each once, with 0 at the end."""
    return torch.cat([torch.unique_consecutive(scheduler.sigmas[scheduler.sigmas > 0]), torch.zeros(1, dtype=torch.float64)])


def _check(ours: Tensor, library: Tensor, tolerance: float = 1e-6) -> None:
    assert library.std() > 0.5
    torch.testing.assert_close(ours, library, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("karras", [False, True], ids=["trailing", "karras"])
@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        (samplers.sample_euler, "EulerDiscreteScheduler"),
        (samplers.sample_heun, "HeunDiscreteScheduler"),
        (samplers.sample_dpm_2, "KDPM2DiscreteScheduler"),
        (samplers.sample_lms, "LMSDiscreteScheduler"),
    ],
)
def test_deterministic_in_sigmas(sampler: Any, name: str, karras: bool) -> None:
    scheduler = _make(name, use_karras_sigmas=karras)
    if hasattr(scheduler, "sigmas_interpol"):
        scheduler.sigmas_interpol = _midpoints(scheduler)
    sigmas = _levels(scheduler)
    tolerance = 1e-3 if name == "LMSDiscreteScheduler" else 1e-6  # its quadrature stops at 1e-4
    _check(_ours(sampler, sigmas), _run_exploding(scheduler, _start() * sigmas[0]), tolerance)


def _midpoints(scheduler: Any) -> Tensor:
    """KDPM2's geometric midpoints, recomputed from the levels in fp64."""
    levels = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2]])
    middles = levels.log().lerp(levels.roll(1).log(), 0.5).exp()
    return torch.cat([middles[:1], middles[1:].repeat_interleave(2), middles[-1:]])


def test_euler_with_churn() -> None:
    """The library calls the model before it churns; here it is called again afterward, as in the paper."""
    scheduler = _make("EulerDiscreteScheduler", use_karras_sigmas=True)
    sigmas, churn = _levels(scheduler), {"s_churn": 4.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.003}
    generator, x = torch.Generator().manual_seed(0), _start() * sigmas[0]
    for timestep, sigma in zip(scheduler.timesteps, sigmas.tolist()):
        raised = sigma * (1 + min(4.0 / NUM_STEPS, 2**0.5 - 1)) if 0.1 <= sigma <= 10.0 else sigma
        state = generator.get_state()
        noisy = x + torch.randn(x.shape, generator=generator, dtype=x.dtype) * 1.003 * (raised**2 - sigma**2) ** 0.5
        noise = (noisy - denoise_two_peaks(noisy, torch.tensor([raised]))) / raised
        scheduler.scale_model_input(x, timestep)
        x = scheduler.step(noise, timestep, x, generator=torch.Generator().set_state(state), **churn).prev_sample
    _check(_ours(samplers.sample_euler, sigmas, **churn), x)


def test_euler_ancestral() -> None:
    scheduler = _make("EulerAncestralDiscreteScheduler")
    sigmas = _levels(scheduler)
    library = _run_exploding(scheduler, _start() * sigmas[0], generator=torch.Generator().manual_seed(0))
    _check(_ours(samplers.sample_euler_ancestral, sigmas), library)


def test_dpm_2_ancestral() -> None:
    scheduler = _make("KDPM2AncestralDiscreteScheduler")
    sigmas = _levels(scheduler)
    library = _run_exploding(scheduler, _start() * sigmas[0], generator=torch.Generator().manual_seed(0))
    _check(_ours(samplers.sample_dpm_2_ancestral, sigmas), library, 1e-4)  # its midpoints and ancestral splits are fp32


@pytest.mark.parametrize("karras", [False, True], ids=["trailing", "karras"])
def test_dpmpp_2m(karras: bool) -> None:
    scheduler = _make("DPMSolverMultistepScheduler", use_karras_sigmas=karras, final_sigmas_type="zero", euler_at_final=True)
    sigmas = _levels(scheduler)
    library = _run_preserving(scheduler, _start() * sigmas[0], sigmas)
    _check(_ours(samplers.sample_dpmpp_2m, sigmas), library)


@pytest.mark.parametrize(("sampler", "solver"), [(samplers.sample_dpmpp_2m_sde, "midpoint"), (samplers.sample_dpmpp_2m_sde_heun, "heun")])
def test_dpmpp_2m_sde(sampler: Any, solver: str) -> None:
    scheduler = _make(
        "DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", solver_type=solver, use_exponential_sigmas=True, final_sigmas_type="zero"
    )  # fmt: skip
    sigmas = _levels(scheduler)
    library = _run_preserving(scheduler, _start() * sigmas[0], sigmas, generator=torch.Generator().manual_seed(0))
    _check(_ours(sampler, sigmas, one_stream(draw_dtype=torch.float32)), library, 1e-5)  # it draws one tensor per step, in fp32


def test_dpmpp_3m_without_noise() -> None:
    """The library's version 0.42 has one constant with the wrong sign in the stochastic third order; test_sampler_properties.py tests that part."""
    order = {"solver_order": 3, "solver_type": "heun", "lower_order_final": False}
    scheduler = _make("DPMSolverMultistepScheduler", use_exponential_sigmas=True, final_sigmas_type="zero", **order)
    sigmas = _levels(scheduler)
    _check(_ours(samplers.sample_dpmpp_3m_sde, sigmas, eta=0.0), _run_preserving(scheduler, _start() * sigmas[0], sigmas), 1e-5)


def test_dpmpp_sde() -> None:
    scheduler = _make("DPMSolverSDEScheduler", use_karras_sigmas=True, noise_sampler_seed=5)
    sigmas = _levels(scheduler)
    library = _run_exploding(scheduler, _start() * sigmas[0])

    def brownian(x: Tensor, low: float, high: float) -> Any:
        sampler = BrownianTreeNoiseSampler(x, low, high, 5)
        return lambda sigma, sigma_next: sampler(torch.tensor(sigma, dtype=torch.float64), torch.tensor(sigma_next, dtype=torch.float64))

    noise = OneStream(torch.Generator(), brownian_noise=brownian)
    _check(_ours(samplers.sample_dpmpp_sde, sigmas, noise), library, 1e-4)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("lower", [True, False])
def test_unipc(variant: str, order: int, lower: bool) -> None:
    scheduler = _make("UniPCMultistepScheduler", solver_type=variant, solver_order=order, use_karras_sigmas=True, lower_order_final=lower)
    sigmas = _levels(scheduler)
    if not lower or variant == "bh1":  # where the library gives NaN at a last level of 0
        scheduler.sigmas[-1] = sigmas[-1] = sigmas[-2] / 2
    library = _run_preserving(scheduler, _start() * sigmas[0], sigmas)
    settings = {"uni_pc_variant": variant, "uni_pc_order": order, "uni_pc_lower_order_final": lower}
    _check(_ours(samplers.sample_unipc, sigmas, **settings), library, 1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_machinery_in_log_sigma(order: int) -> None:
    """The library's DEIS interpolates over log sigma; ours over time. The same routine does both."""
    scheduler = _make("DEISMultistepScheduler", solver_order=order, use_karras_sigmas=True, lower_order_final=False)
    scheduler.sigmas[-1] = scheduler.sigmas[-2] / 2
    sigmas = scheduler.sigmas
    library = _run_preserving(scheduler, _start() * sigmas[0], sigmas)
    ours = _sample_adams(Walk(denoise_two_peaks, sigmas, None), _start() * sigmas[0], order=order, coordinate=math.log)
    _check(ours, library, 1e-5)


def _timestep_levels(scheduler: Any) -> Tensor:
    """Noise levels at a scheduler's whole timesteps, and 0."""
    alphas = scheduler.alphas_cumprod.double()[torch.unique_consecutive(scheduler.timesteps)]
    return torch.cat([((1 - alphas) / alphas).sqrt(), torch.zeros(1, dtype=torch.float64)])


def _double_tables(scheduler: Any) -> Any:
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return scheduler


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim(eta: float) -> None:
    scheduler = _double_tables(_make("DDIMScheduler", clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading", steps_offset=1))
    scheduler.set_timesteps(10)
    sigmas = _timestep_levels(scheduler)
    library = _run_preserving(scheduler, _start() * sigmas[0], sigmas, eta=eta, generator=torch.Generator().manual_seed(0))
    _check(_ours(samplers.sample_ddim, sigmas, eta=eta), library)


def test_ddpm() -> None:
    scheduler = _double_tables(_make("DDPMScheduler", clip_sample=False, timestep_spacing="leading", steps_offset=1))
    scheduler.set_timesteps(10)
    sigmas = _timestep_levels(scheduler)
    library = _run_preserving(scheduler, _start() * sigmas[0], sigmas, generator=torch.Generator().manual_seed(0))
    _check(_ours(samplers.sample_ddpm, sigmas), library, 1e-4)  # at timestep 0, alpha is the table's first and not one


def test_plms() -> None:
    scheduler = _double_tables(_make("PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=True, timestep_spacing="leading", steps_offset=1))
    scheduler.set_timesteps(10)
    sigmas = _timestep_levels(scheduler)
    repeated = torch.cat([sigmas[:2], sigmas[1:]])  # its first step looks at the second level twice
    _check(_ours(samplers.sample_plms, sigmas), _run_preserving(scheduler, _start() * sigmas[0], repeated))


def test_lcm() -> None:
    scheduler = _double_tables(_make("LCMScheduler", timestep_spacing="leading", clip_sample=False, set_alpha_to_one=True))
    scheduler.set_timesteps(4)
    sigmas = _timestep_levels(scheduler)
    library = _run_preserving(scheduler, _start() * sigmas[0], sigmas, generator=torch.Generator().manual_seed(0))
    _check(_ours(samplers.sample_lcm, sigmas), library, 1e-3)  # the library's boundary scaling, which is 1 up to 1e-6 at these timesteps


def test_the_levels_are_those_of_the_models_table() -> None:
    """The library's karras levels are ours, so that the pictures of both can be compared."""
    sigmas = _levels(_make("EulerDiscreteScheduler", use_karras_sigmas=True, timestep_spacing="linspace"))
    torch.testing.assert_close(compute_sigmas("karras", NUM_STEPS, Prediction()), sigmas.float(), rtol=1e-4, atol=1e-6)
