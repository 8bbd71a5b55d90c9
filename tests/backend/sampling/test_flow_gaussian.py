"""Every sampler on a rectified flow whose answer is known: data that are normal with MEAN and SPREAD, x_t = (1 - t) x0 + t * noise.

Then x_t is normal with mean (1 - t) MEAN and deviation sqrt((1 - t)^2 SPREAD^2 + t^2), E[x0 | x_t] is linear, and the flow keeps
(x_t - mean_t) / deviation_t. Nothing here is taken from a sampler's formulas. Two multistep solvers are also held to diffusers' in flow form.
"""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from backend.modules.k_prediction import FlowPrediction
from backend.sampling.registry import SAMPLERS, find_sampler
from backend.sampling.sampler_types import SamplerSettings
from backend.sampling.schedules import compute_sigmas
from tests.backend.sampling.toys import MEAN, SPREAD, one_stream

SAMPLED = [spec.name for spec in SAMPLERS if spec.flow_form != "none"]
STOCHASTIC = [spec.name for spec in SAMPLERS if spec.flow_form != "none" and (spec.eta_default > 0 or spec.name in ("DDPM", "LCM"))]
DETERMINISTIC = [name for name in SAMPLED if name not in ("DDPM", "LCM")]

# Least order in the number of steps, as for diffusion models.
ORDERS = {
    "Euler": 1, "Euler a": 1, "DDIM": 1, "HeunPP2": 1, "Heun": 2, "DPM2": 2, "DPM2 a": 2, "DPM++ 2M": 2, "DPM++ 2S a": 2, "DPM++ SDE": 2,
    "DPM++ 2M SDE": 2, "DPM++ 2M SDE Heun": 2, "DPM++ 3M SDE": 2, "LMS": 2, "IPNDM_V": 2, "DEIS": 2, "UniPC": 2,
}  # fmt: skip


def marginal(time: float) -> tuple[float, float]:
    """(mean, deviation) of the flow at a time."""
    return (1 - time) * MEAN, math.hypot((1 - time) * SPREAD, time)


def denoise(x_BCHW: Tensor, time_B: Tensor) -> Tensor:
    """E[x0 | x_t]."""
    time = time_B.view(-1, 1, 1, 1)
    kept = 1 - time
    return MEAN + kept * SPREAD**2 / ((kept * SPREAD) ** 2 + time**2) * (x_BCHW - kept * MEAN)


class Denoise:
    """The same with CFG++'s unconditional result, which is here the conditional one."""

    last_uncond_BCHW: Tensor | None = None

    def __call__(self, x_BCHW: Tensor, time_B: Tensor) -> Tensor:
        self.last_uncond_BCHW = denoise(x_BCHW, time_B)
        return self.last_uncond_BCHW


def run(name: str, x: Tensor, times: Tensor, *, eta: float | None = 0.0, noise: Any = None, **settings: Any) -> Tensor:
    chosen = SamplerSettings(is_flow=True, eta=eta, **settings)
    function = find_sampler(name).function_for(FlowPrediction())
    return function(Denoise(), x, times, settings=chosen, noise=noise or one_stream())


def flow(x: Tensor, time: float, time_next: float) -> Tensor:
    """Where the exact flow leads."""
    (mean, deviation), (mean_next, deviation_next) = marginal(time), marginal(time_next)
    return mean_next + (x - mean) / deviation * deviation_next


def start(size: int = 4, time: float = 1.0) -> Tensor:
    mean, deviation = marginal(time)
    return mean + deviation * torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_order_of_convergence(name: str, order: int) -> None:
    """From time 0.95 to 0.1 on uneven steps: doubling the steps divides the error by 2^order."""
    x = start(time=0.95)
    errors = []
    for num_steps in (40, 80, 160):
        times = torch.linspace(0.95**0.5, 0.1**0.5, num_steps + 1, dtype=torch.float64) ** 2
        errors.append(float((run(name, x, times, uni_pc_lower_order_final=False) - flow(x, 0.95, 0.1)).abs().max()))
    assert math.log2(errors[0] / errors[2]) / 2 > order - 0.25, errors


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_from_noise_to_the_picture_that_the_flow_leads_to(name: str) -> None:
    """30 steps of Flux.1's schedule, without added noise: near the exact end, and with 120 as near as the start at time 1 lets any come."""
    x, predictor = start(), FlowPrediction(shift=math.exp(1.15), timesteps=10000)
    errors = []
    for num_steps in (30, 120):
        times = compute_sigmas("simple", num_steps, predictor).double()
        errors.append(float((run(name, x, times) - flow(x, 1.0, 0.0)).abs().mean()))
    assert errors[0] < 0.06 and errors[1] < max(0.5 * errors[0], 0.003), errors


SCHEDULES = ("simple", "normal", "sgm_uniform", "beta", "ddim", "karras", "exponential", "kl_optimal", "uniform", "turbo")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_sampler_on_every_schedule_comes_near_the_picture(name: str, schedule: str) -> None:
    x = start()
    times = compute_sigmas(schedule, 30, FlowPrediction(shift=math.exp(1.15), timesteps=10000)).double()
    assert float((run(name, x, times) - flow(x, 1.0, 0.0)).abs().mean()) < 0.1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_samplers_that_add_noise_give_the_data_s_distribution(name: str, schedule: str) -> None:
    times = compute_sigmas(schedule, 60, FlowPrediction(shift=math.exp(1.15), timesteps=10000)).double()
    result = run(name, start(48), times, eta=None)
    assert float(result.mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(result.std()) == pytest.approx(SPREAD, rel=0.6 if name == "LCM" else 0.15)


# diffusers' solvers in flow form


def library(scheduler: Any, x: Tensor, times: Tensor, **step: Any) -> Tensor:
    """Run a scheduler of diffusers whose model predicts the flow noise - x0, on the noise levels given."""
    scheduler.set_timesteps(len(times) - 1)
    scheduler.sigmas = times.clone()
    scheduler.timesteps = (times[:-1] * 1000).double()
    for index, timestep in enumerate(scheduler.timesteps):
        time = times[index : index + 1].double()
        velocity = (x - denoise(x, time)) / time
        x = scheduler.step(velocity, timestep, x, **step).prev_sample
    return x


def make(name: str, **config: Any) -> Any:
    return getattr(diffusers, name)(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, **config)


TIMES = torch.tensor([0.95, 0.86, 0.75, 0.63, 0.5, 0.36, 0.22, 0.1, 0.04, 0.0], dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
@pytest.mark.parametrize(("name", "solver"), [("DPM++ 2M SDE", "midpoint"), ("DPM++ 2M SDE Heun", "heun")])
def test_dpmpp_2m_sde_is_the_library_s(name: str, solver: str) -> None:
    scheduler = make("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", solver_type=solver)
    x = start(time=0.95)
    expected = library(scheduler, x, TIMES, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(name, x, TIMES, eta=1.0, noise=one_stream(draw_dtype=torch.float32)), expected, rtol=1e-5, atol=1e-5)


def test_heun_is_the_library_s() -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    times = torch.cat([scheduler.sigmas[::2][:8], torch.zeros(1)]).double()
    x = start()
    for index, timestep in enumerate(scheduler.timesteps):
        time = scheduler.sigmas[index if index % 2 == 0 else index + 1][None].double()
        x = scheduler.step((x - denoise(x, time)) / time, timestep, x).prev_sample
    torch.testing.assert_close(run("Heun", start(), times), x.double(), rtol=1e-4, atol=1e-4)
