"""Rectified flow: the prediction, its schedules and its samplers. References: diffusers' FlowMatchEulerDiscreteScheduler, and closed forms.

Closed form: all data are one picture x0. Then x at time t is (1 - t) x0 + t * noise, every exact sampler returns x0, and after a step that adds
noise, the share of noise must be exactly the next time.
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy import stats

from backend.modules.k_prediction import FlowPrediction, Prediction, mu_of_tokens, shift_from_mu, shift_time, unshift_time
from backend.sampling.flow_form import to_sigma, to_time
from backend.sampling.registry import SAMPLERS, find_sampler
from backend.sampling.sampler_types import SamplerSettings, StepInfo, churn, split_ancestral_flow
from backend.sampling.schedules import SCHEDULES, ScheduleSettings, compute_sigmas
from tests.backend.sampling.toys import one_stream

FLOW = SamplerSettings(is_flow=True)
X0 = torch.linspace(-1.5, 1.5, 48).reshape(1, 3, 4, 4)


def noise_like(x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shift", [1.0, 3.0, math.exp(1.15)])
def test_noising_and_flow_are_those_of_the_library(shift: float) -> None:
    predictor = FlowPrediction(shift=shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    torch.testing.assert_close(predictor.sigmas, scheduler.sigmas.flip(0), atol=1e-6, rtol=1e-6)
    noise, time = noise_like(X0), scheduler.sigmas[300:301]
    noisy = predictor.noise_scaling(time, noise, X0)
    torch.testing.assert_close(noisy, scheduler.scale_noise(X0, scheduler.timesteps[300:301], noise))
    torch.testing.assert_close(predictor.calculate_denoised(time, noise - X0, noisy), X0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(predictor.timestep(time), scheduler.timesteps[300:301], atol=1e-3, rtol=1e-6)
    assert torch.equal(predictor.calculate_input(time, noisy), noisy)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [4, 10, 25])
def test_simple_is_the_schedule_that_pipelines_pass_to_the_library(shift: float, num_steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / num_steps, num_steps).numpy())
    torch.testing.assert_close(compute_sigmas("simple", num_steps, FlowPrediction(shift=shift)), scheduler.sigmas, atol=1e-6, rtol=1e-5)


def test_a_shift_by_mu_is_the_library_s() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for tokens in (256, 1024, 4096, 16384):
        mu = mu_of_tokens(tokens)
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 0.05, 20).numpy(), mu=mu)
        sigmas = compute_sigmas("simple", 20, FlowPrediction(shift=shift_from_mu(mu)))
        torch.testing.assert_close(sigmas, scheduler.sigmas, atol=1e-6, rtol=1e-5)
    assert (mu_of_tokens(256), mu_of_tokens(4096)) == (0.5, pytest.approx(1.15))


def test_places_in_the_table_and_noise_levels_are_each_other_s_inverse() -> None:
    predictor = FlowPrediction(shift=3.0)
    places = torch.tensor([0.0, 1.5, 500.25, 999.0])
    torch.testing.assert_close(predictor.position(predictor.sigma(places)), places, atol=0.05, rtol=1e-4)
    torch.testing.assert_close(predictor.sigma(torch.arange(1000)), predictor.sigmas)
    times = torch.rand(9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(unshift_time(shift_time(times, 3.0), 3.0), times)
    torch.testing.assert_close(to_time(to_sigma(times)), times)
    assert predictor.percent_to_sigma(0.5) == pytest.approx(0.75) and predictor.percent_to_sigma(1.0) == 0.0
    assert predictor.percent_to_sigma(0.0) > 1.0
    assert FlowPrediction(time_is_clean=True, multiplier=1.0).timestep(torch.tensor([0.25])).item() == 0.75
    with pytest.raises(ValueError, match="shift of 0"):
        FlowPrediction(shift=0)


@pytest.mark.parametrize("spec", [spec for spec in SCHEDULES if not spec.is_fitted_to_diffusion], ids=lambda spec: spec.name)
def test_every_schedule_goes_down_from_one_to_nothing(spec) -> None:  # type: ignore[no-untyped-def]
    sigmas = compute_sigmas(spec.name, 8, FlowPrediction(shift=3.0))
    assert len(sigmas) == 9 and sigmas[-1] == 0
    assert bool((sigmas[:-1] > sigmas[1:]).all())
    assert 0.9 < sigmas[0] <= 1.0 + 1e-6


@pytest.mark.parametrize("spec", [spec for spec in SCHEDULES if spec.is_fitted_to_diffusion], ids=lambda spec: spec.name)
def test_schedules_fitted_to_stable_diffusion_are_refused_by_name(spec) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=f"{spec.label}.*flow model.*Simple"):
        compute_sigmas(spec.name, 8, FlowPrediction())


@pytest.mark.parametrize("name", ["Restart", "DPM fast", "DPM adaptive"])
def test_samplers_without_a_form_for_flows_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*flow model.*Euler"):
        find_sampler(name).compute_sigmas("simple", 4, FlowPrediction())
    find_sampler(name).compute_sigmas("simple", 4, Prediction())


SAMPLED = [spec for spec in SAMPLERS if spec.flow_form != "none"]


def run_flow(name: str, denoise, start: torch.Tensor, sigmas: torch.Tensor, settings: SamplerSettings = FLOW, **arguments):  # type: ignore[no-untyped-def]
    function = find_sampler(name).function_for(FlowPrediction())
    return function(denoise, start, sigmas, settings=settings, noise=one_stream(3), **arguments)


@pytest.mark.parametrize("spec", SAMPLED, ids=lambda spec: spec.name)
def test_every_sampler_ends_at_the_only_picture_there_is(spec) -> None:  # type: ignore[no-untyped-def]
    steps: list[StepInfo] = []
    sigmas = compute_sigmas("simple", 6, FlowPrediction(shift=3.0))
    got = run_flow(spec.name, lambda x, t: X0.expand_as(x), noise_like(X0), sigmas, on_step=steps.append)
    torch.testing.assert_close(got, X0, atol=2e-4, rtol=1e-4)
    assert len(steps) == 6
    torch.testing.assert_close(torch.tensor([step.sigma for step in steps]), sigmas[:-1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [spec.name for spec in SAMPLED if spec.eta_option or spec.name in ("LCM", "DDPM", "Euler", "Heun")])
def test_a_step_leaves_as_much_noise_as_its_time_says(name: str) -> None:
    """Latents at time t are Gaussian around the only picture x0: mean (1 - t) x0, deviation t. Stopped halfway, they must be that."""
    x0 = torch.full((4, 4, 32, 32), 0.7)
    settings = SamplerSettings(is_flow=True, eta=1.0, s_churn=3.0 if name in ("Euler", "Heun") else 0.0)
    times = torch.tensor([1.0, 0.8, 0.6, 0.4])
    seen: list[StepInfo] = []
    run_flow(name, lambda x, t: x0.expand_as(x), noise_like(x0), torch.cat([times, torch.zeros(1)]), settings, on_step=seen.append)
    for step in seen[1:]:
        mean, deviation = step.x.mean().item(), step.x.std().item()
        assert mean == pytest.approx((1 - step.sigma) * 0.7, abs=0.02), name
        assert deviation == pytest.approx(step.sigma, abs=0.02), name


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_an_ancestral_step_keeps_the_share_of_the_picture(eta: float) -> None:
    down, kept, up = split_ancestral_flow(0.8, 0.5, eta)
    assert kept * (1 - down) == pytest.approx(0.5)
    assert math.hypot(kept * down, up) == pytest.approx(0.5)
    assert (up > 0) is (eta > 0)
    assert split_ancestral_flow(0.8, 0.0, eta) == (0.0, 1.0, 0.0)


def test_churn_never_leaves_the_range_of_times() -> None:
    settings = SamplerSettings(is_flow=True, s_churn=100.0)
    for time in (1.0, 0.9, 0.3):
        x, raised = churn((1 - time) * torch.ones(1, 4, 64, 64) + time * noise_like(torch.empty(1, 4, 64, 64)), time, 4, settings, one_stream(5))
        assert time <= raised <= 1.0
        assert x.std().item() == pytest.approx(raised, abs=0.02) and x.mean().item() == pytest.approx(1 - raised, abs=0.03)


def test_euler_is_the_library_s_euler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 0.1, 10).numpy())
    x = start = noise_like(X0)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        x = scheduler.step(torch.tanh(x) * (0.5 + sigma), timestep, x).prev_sample
    predictor = FlowPrediction(shift=3.0)

    def denoise(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return predictor.calculate_denoised(time, torch.tanh(latents) * (0.5 + time[:, None, None, None]), latents)

    torch.testing.assert_close(run_flow("Euler", denoise, start, compute_sigmas("simple", 10, predictor)), x, atol=1e-5, rtol=1e-5)


def beta_times(predictor: FlowPrediction, num_steps: int, alpha: float, beta: float) -> list[float]:
    """Lee et al. 2024: the quantiles of a beta distribution are the timesteps, which the model's table turns into noise levels."""

    quantiles = [float(stats.beta.ppf(1 - step / num_steps, alpha, beta)) for step in range(num_steps)]
    table = predictor.sigmas
    return [float(table[round(quantile * (len(table) - 1))]) for quantile in quantiles]


@pytest.mark.parametrize("num_steps", [4, 20])
def test_beta_s_quantiles_are_times_before_the_shift(num_steps: int) -> None:
    predictor = FlowPrediction(shift=math.exp(1.15), timesteps=10000)
    sigmas = compute_sigmas("beta", num_steps, predictor, ScheduleSettings(beta_alpha=0.6, beta_beta=0.6))
    torch.testing.assert_close(sigmas[:-1], torch.tensor(beta_times(predictor, num_steps, 0.6, 0.6)), atol=2e-4, rtol=1e-3)


def test_schedules_as_forge_computes_them() -> None:
    """Forge's table of Flux.1 is shifted (mu 1.15, 10000 entries); times that are computed, not looked up, are not."""
    predictor = FlowPrediction(shift=math.exp(1.15), timesteps=10000)
    lowest = float(predictor.sigmas[0])
    assert lowest == pytest.approx(3.157e-4, rel=1e-3)
    forge = ScheduleSettings(unshifted=True)
    torch.testing.assert_close(compute_sigmas("normal", 4, predictor, forge), torch.tensor([1, 0.66677, 0.33354, lowest, 0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(compute_sigmas("sgm_uniform", 4, predictor, forge), torch.tensor([1, 0.75008, 0.50016, 0.25024, 0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(compute_sigmas("beta", 3, predictor, forge), torch.tensor([1, 0.50016, lowest, 0]), atol=1e-4, rtol=0)
    for name in ("simple", "ddim", "karras", "exponential", "kl_optimal"):
        assert torch.equal(compute_sigmas(name, 7, predictor, forge), compute_sigmas(name, 7, predictor))
    for name in ("normal", "sgm_uniform", "beta"):
        assert bool((compute_sigmas(name, 7, predictor)[1:-2] > compute_sigmas(name, 7, predictor, forge)[1:-2] + 0.05).all())
        assert torch.equal(compute_sigmas(name, 7, Prediction(), forge), compute_sigmas(name, 7, Prediction()))
