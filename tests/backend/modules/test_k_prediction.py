"""Noise levels and predictions. References: diffusers' schedulers (their own tables and formulas) and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.modules import k_prediction
from backend.modules.k_prediction import Prediction

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside the library, with numpy 2

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def test_the_table_is_that_of_the_library() -> None:
    library = EulerDiscreteScheduler(**STABLE_DIFFUSION)
    predictor = Prediction()
    torch.testing.assert_close(predictor.alphas_cumprod, library.alphas_cumprod, rtol=1e-5, atol=0)
    sigmas = ((1 - library.alphas_cumprod) / library.alphas_cumprod) ** 0.5
    torch.testing.assert_close(predictor.sigmas, sigmas, rtol=1e-4, atol=0)  # theirs is computed in fp32
    torch.testing.assert_close(predictor.log_sigmas, predictor.sigmas.log())
    assert float(predictor.sigma_min) == pytest.approx(0.02917, abs=1e-4)
    assert float(predictor.sigma_max) == pytest.approx(14.6146, abs=1e-3)


def test_zero_terminal_snr_is_the_librarys() -> None:
    library = DDIMScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True)
    predictor = Prediction(prediction_type="v_prediction", zero_terminal_snr=True)
    torch.testing.assert_close(predictor.alphas_cumprod[:-1], library.alphas_cumprod[:-1], rtol=1e-3, atol=1e-6)
    assert predictor.alphas_cumprod[-1] < 1e-7 < predictor.alphas_cumprod[-2]
    assert float(predictor.sigma_max) == pytest.approx(4518.7, rel=1e-3)


@given(sigma=st.floats(0.001, 30.0))
@settings(max_examples=50, deadline=None)
def test_timesteps_between_entries_are_the_librarys(sigma: float) -> None:
    library = EulerDiscreteScheduler(**STABLE_DIFFUSION)
    predictor = Prediction()
    expected = library._sigma_to_t(np.array(sigma), np.log(np.array(((1 - library.alphas_cumprod) / library.alphas_cumprod) ** 0.5)))
    assert float(predictor.timestep(torch.tensor([sigma]))) == pytest.approx(float(expected), abs=0.01)


@given(timestep=st.floats(0.0, 999.0))
@settings(max_examples=50, deadline=None)
def test_sigma_and_timestep_are_inverse(timestep: float) -> None:
    predictor = Prediction()
    assert float(predictor.timestep(predictor.sigma(torch.tensor([timestep])))) == pytest.approx(timestep, abs=2e-2)


def test_table_entries_map_to_whole_timesteps_and_shapes_are_kept() -> None:
    predictor = Prediction()
    torch.testing.assert_close(predictor.timestep(predictor.sigmas), torch.arange(1000.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(predictor.sigma(torch.arange(1000)), predictor.sigmas, rtol=1e-5, atol=0)
    assert predictor.timestep(torch.tensor(1.0)).shape == ()
    assert predictor.sigma(torch.tensor(500)).shape == ()
    assert predictor.timestep(torch.tensor([[1.0, 2.0]])).shape == (1, 2)


def test_quantized_timesteps_are_whole_and_nearest() -> None:
    predictor = Prediction(quantize_timesteps=True)
    sigmas = torch.linspace(0.03, 14.0, 200)
    quantized = predictor.timestep(sigmas)
    assert torch.equal(quantized, quantized.round())
    nearest = (sigmas.log()[:, None] - predictor.log_sigmas).abs().argmin(dim=1)
    assert torch.equal(quantized.long(), nearest)
    predictor.quantize_timesteps = False
    assert (predictor.timestep(sigmas) - quantized).abs().max() <= 0.5 + 1e-3


def test_percent_to_sigma() -> None:
    predictor = Prediction()
    assert predictor.percent_to_sigma(0.0) > float(predictor.sigma_max)
    assert predictor.percent_to_sigma(1.0) == 0.0
    assert predictor.percent_to_sigma(0.5) == pytest.approx(float(predictor.sigma(torch.tensor(499.5))))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_denoised_is_the_librarys_pred_original_sample(prediction: str) -> None:
    """Diffusers' DDIM scheduler works on variance-preserving samples at whole timesteps; ours on variance-exploding ones."""
    library = DDIMScheduler(**STABLE_DIFFUSION, prediction_type=prediction, clip_sample=False)
    library.set_timesteps(1000)
    predictor = Prediction(prediction_type=prediction)
    x_BCHW, output_BCHW, timestep = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), 600
    sigma_B = predictor.sigmas[timestep].expand(2)
    expected = library.step(output_BCHW, timestep, predictor.calculate_input(sigma_B, x_BCHW)).pred_original_sample
    torch.testing.assert_close(predictor.calculate_denoised(sigma_B, output_BCHW, x_BCHW), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "edm"])
def test_a_perfect_network_gives_back_the_picture(prediction: str) -> None:
    """A perfect network's output by each definition: epsilon = noise, v = alpha noise - s x0, edm's F (Karras 2022, eq. 8)."""
    predictor = Prediction(prediction_type=prediction)
    x0, noise, sigma_B = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.5, 9.0])
    sigma = sigma_B.view(2, 1, 1, 1)
    alpha, s = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
    x = x0 + sigma * noise
    output = {"epsilon": noise, "v_prediction": alpha * noise - s * x0, "edm": (x0 - x / (1 + sigma**2)) * (1 + sigma**2).sqrt() / sigma}[prediction]
    torch.testing.assert_close(predictor.calculate_denoised(sigma_B, output, x), x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(predictor.calculate_input(sigma_B, x), alpha * x0 + s * noise, rtol=1e-5, atol=1e-5)


def test_noise_scaling() -> None:
    predictor = Prediction()
    noise, latent, sigma = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2), torch.tensor(3.0)
    torch.testing.assert_close(predictor.noise_scaling(sigma, noise, latent), latent + 3 * noise)
    torch.testing.assert_close(predictor.noise_scaling(sigma, noise, latent, max_denoise=True), latent + 10**0.5 * noise)
    assert predictor.inverse_noise_scaling(sigma, latent) is latent


def test_from_a_diffusers_scheduler() -> None:
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    predictor = k_prediction.k_prediction_from_diffusers_scheduler(scheduler)
    assert predictor.prediction_type == "v_prediction"
    assert float(predictor.sigma_max) > 4000
    with pytest.raises(NotImplementedError, match="'linear'"):
        k_prediction.k_prediction_from_diffusers_scheduler(DDIMScheduler(beta_schedule="linear"))
    with pytest.raises(NotImplementedError, match="'sample'"):
        k_prediction.k_prediction_from_diffusers_scheduler(DDIMScheduler(**STABLE_DIFFUSION, prediction_type="sample"))


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="'velocity' is unknown"):
        Prediction(prediction_type="velocity")
    with pytest.raises(ValueError, match="'cosine' is unknown"):
        Prediction(beta_schedule="cosine")
