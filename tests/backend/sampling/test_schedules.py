"""Schedules. References: diffusers' schedulers, closed forms, published tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import AysSchedules
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.modules.k_prediction import Prediction
from backend.sampling.schedules import SCHEDULES, ScheduleSettings, compute_sigmas, discard_next_to_last_sigma, find_schedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside the library, with numpy 2

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
NAMES = [spec.name for spec in SCHEDULES]


@pytest.fixture(scope="module")
def predictor() -> Prediction:
    return Prediction()


def _library(num_steps: int, **config: object) -> torch.Tensor:
    scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION, **config)
    scheduler.set_timesteps(num_steps)
    return scheduler.sigmas


@pytest.mark.parametrize("num_steps", [2, 7, 20, 50])
@pytest.mark.parametrize(
    ("name", "config", "tolerance"),
    [
        ("uniform", {"timestep_spacing": "linspace"}, 1e-3),  # the library interpolates over sigma, not log sigma
        ("automatic", {"timestep_spacing": "linspace"}, 1e-3),
        ("normal", {"timestep_spacing": "linspace"}, 1e-3),
        ("ddim", {"timestep_spacing": "leading", "steps_offset": 1}, 1e-5),
        ("turbo", {"timestep_spacing": "trailing"}, 1e-5),
        ("karras", {"use_karras_sigmas": True}, 1e-4),
        ("exponential", {"use_exponential_sigmas": True}, 1e-4),
        ("beta", {"use_beta_sigmas": True}, 1e-4),
    ],
)
def test_it_is_the_librarys(predictor: Prediction, name: str, config: dict[str, object], tolerance: float, num_steps: int) -> None:
    library = _library(num_steps, **config)
    torch.testing.assert_close(compute_sigmas(name, num_steps, predictor), library, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@given(num_steps=st.integers(1, 150), zero_snr=st.booleans())
@settings(max_examples=15, deadline=None)
def test_every_schedule_goes_down_to_zero_in_its_steps(name: str, num_steps: int, zero_snr: bool) -> None:
    predictor = Prediction(zero_terminal_snr=zero_snr)
    sigmas = compute_sigmas(name, num_steps, predictor)
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas.dtype == torch.float32
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    assert float(sigmas[0]) <= float(predictor.sigma_max) * 1.001


@pytest.mark.parametrize("name", NAMES)
def test_one_step_starts_at_the_top(predictor: Prediction, name: str) -> None:
    expected = float(predictor.sigmas[1]) if name == "ddim" else float(predictor.sigma_max)  # DDIM's first timestep is 1 for every stride
    assert compute_sigmas(name, 1, predictor).tolist() == pytest.approx([expected, 0.0], rel=1e-3)


def test_simple_takes_every_so_many_th_entry(predictor: Prediction) -> None:
    table = predictor.sigmas
    expected = torch.stack([table[999], table[749], table[499], table[249], torch.tensor(0.0)])
    assert torch.equal(compute_sigmas("simple", 4, predictor), expected)
    assert torch.equal(compute_sigmas("simple", 3, predictor)[:-1], table[[999, 666, 333]])


def test_sgm_uniform_leaves_out_the_last_timestep(predictor: Prediction) -> None:
    expected = predictor.sigma(torch.tensor([999.0, 749.25, 499.5, 249.75]))
    torch.testing.assert_close(compute_sigmas("SGM Uniform", 4, predictor)[:-1], expected, rtol=1e-4, atol=0)
    assert torch.equal(compute_sigmas("SGMUniform", 4, predictor), compute_sigmas("sgm_uniform", 4, predictor))


def test_kl_optimal_is_even_in_the_arctangent(predictor: Prediction) -> None:
    angles = compute_sigmas("kl_optimal", 10, predictor)[:-1].double().atan()
    steps = angles.diff()
    torch.testing.assert_close(steps, steps[:1].expand(9), rtol=1e-4, atol=1e-6)
    assert float(steps[0]) == pytest.approx((math.atan(float(predictor.sigma_min)) - math.atan(float(predictor.sigma_max))) / 10, rel=1e-4)


def test_polyexponential_bends_with_rho(predictor: Prediction) -> None:
    torch.testing.assert_close(compute_sigmas("polyexponential", 9, predictor), compute_sigmas("exponential", 9, predictor))
    bent = compute_sigmas("polyexponential", 9, predictor, ScheduleSettings(rho=2.0))[:-1].double().log()
    share = (bent - bent[-1]) / (bent[0] - bent[-1])
    torch.testing.assert_close(share, torch.linspace(1, 0, 9, dtype=torch.float64) ** 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("is_sdxl", "key"), [(False, "StableDiffusionSigmas"), (True, "StableDiffusionXLSigmas")])
@pytest.mark.parametrize("name", ["align_your_steps", "align_your_steps_11"])
def test_align_your_steps_has_the_published_table(predictor: Prediction, name: str, is_sdxl: bool, key: str) -> None:
    published = AysSchedules[key]  # ten levels and 0; the project's page ends with 0.029 before that
    sigmas = compute_sigmas(name, 11, predictor, ScheduleSettings(is_sdxl=is_sdxl))
    assert sigmas.tolist() == pytest.approx([*published[:-1], 0.029, 0.0])


def test_fitted_tables_are_interpolated_over_log_sigma(predictor: Prediction) -> None:
    table = np.array(AysSchedules["StableDiffusionSigmas"][:-1] + [0.029])
    expected = np.exp(np.interp(np.linspace(0, 10, 25), np.arange(11), np.log(table)))
    assert compute_sigmas("align_your_steps", 25, predictor)[:-1].tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize(("name", "levels"), [("align_your_steps_32", 32), ("align_your_steps_GITS", 11)])
def test_other_fitted_tables(predictor: Prediction, name: str, levels: int) -> None:
    sd1, sdxl = (compute_sigmas(name, levels, predictor, ScheduleSettings(is_sdxl=is_sdxl)) for is_sdxl in (False, True))
    assert sd1[0] == sdxl[0] == pytest.approx(14.615)
    assert not torch.equal(sd1, sdxl)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("automatic", "uniform")])
def test_a_range_the_user_sets_is_kept(predictor: Prediction, name: str) -> None:
    sigmas = compute_sigmas(name, 12, predictor, ScheduleSettings(sigma_min=0.1, sigma_max=10.0))
    assert float(sigmas[0]) == pytest.approx(10.0, rel=1e-3)
    ends_early = name in ("sgm_uniform", "kl_optimal")  # their last level above 0 is above sigma_min
    assert float(sigmas[-2]) > 0.1 if ends_early else float(sigmas[-2]) == pytest.approx(0.1, rel=1e-3)


def test_rho_reaches_karras(predictor: Prediction) -> None:
    assert torch.equal(compute_sigmas("karras", 8, predictor), compute_sigmas("karras", 8, predictor, ScheduleSettings(rho=7.0)))
    assert compute_sigmas("karras", 8, predictor, ScheduleSettings(rho=3.0))[4] > compute_sigmas("karras", 8, predictor)[4]


def test_beta_parameters_reach_beta(predictor: Prediction) -> None:
    even = compute_sigmas("beta", 5, predictor, ScheduleSettings(beta_alpha=1.0, beta_beta=1.0))
    low, high = float(predictor.sigma_min), float(predictor.sigma_max)
    assert even[:-1].tolist() == pytest.approx(np.linspace(high, low, 5).tolist(), rel=1e-4)


def test_names_labels_and_order_are_those_of_the_contract() -> None:
    assert [(spec.name, spec.label) for spec in SCHEDULES] == [
        ("automatic", "Automatic"), ("uniform", "Uniform"), ("karras", "Karras"), ("exponential", "Exponential"),
        ("polyexponential", "Polyexponential"), ("sgm_uniform", "SGM Uniform"), ("kl_optimal", "KL Optimal"),
        ("align_your_steps", "Align Your Steps"), ("simple", "Simple"), ("normal", "Normal"), ("ddim", "DDIM"), ("beta", "Beta"), ("turbo", "Turbo"),
        ("align_your_steps_GITS", "Align Your Steps GITS"), ("align_your_steps_11", "Align Your Steps 11"),
        ("align_your_steps_32", "Align Your Steps 32"),
    ]  # fmt: skip
    assert (find_schedule("Karras").default_rho, find_schedule("polyexponential").default_rho, find_schedule("simple").default_rho) == (
        7.0,
        1.0,
        -1.0,
    )


def test_discarding_the_penultimate() -> None:
    assert discard_next_to_last_sigma(torch.tensor([3.0, 2.0, 1.0, 0.0])).tolist() == [3.0, 2.0, 0.0]


def test_nonsense_is_refused_with_what_would_do(predictor: Prediction) -> None:
    with pytest.raises(ValueError, match=r"Schedule 'quick' is unknown\. Use one of Automatic, Uniform"):
        compute_sigmas("quick", 5, predictor)
    with pytest.raises(ValueError, match="0 sampling steps"):
        compute_sigmas("karras", 0, predictor)
    with pytest.raises(ValueError, match="sigma_max must be above"):
        compute_sigmas("karras", 5, predictor, ScheduleSettings(sigma_min=20.0))
    with pytest.raises(ValueError, match="sigma_max is nan"):
        ScheduleSettings(sigma_max=math.nan)
