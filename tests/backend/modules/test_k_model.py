"""KModel against the library's UNet with the scalings of its Euler scheduler."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from backend.modules.k_model import KModel
from backend.modules.k_prediction import Prediction
from tests.support.checkpoints import build_models

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside the library, with numpy 2

SIGMA = 3.0


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, 8, 8) * SIGMA, torch.full((2,), SIGMA), torch.randn(2, 77, 64)


def test_it_denoises_as_the_library_does() -> None:
    models = build_models(Path("none"), "sd15")
    x, sigma, context = _inputs()
    scheduler = EulerDiscreteScheduler.from_config(models.scheduler_config())
    scheduler.set_timesteps(sigmas=[SIGMA, 0.0])
    with torch.no_grad():
        output = models.unet(scheduler.scale_model_input(x, scheduler.timesteps[0]), scheduler.timesteps[0], context).sample
    expected = scheduler.step(output, scheduler.timesteps[0], x).pred_original_sample
    denoised = KModel(models.unet, Prediction()).apply_model(x, sigma, c_crossattn=context)
    torch.testing.assert_close(denoised, expected, rtol=1e-4, atol=1e-4)
    assert denoised.dtype == torch.float32


def test_an_inpainting_model_reads_mask_and_masked_picture() -> None:
    models = build_models(Path("none"), "sd15", inpaint=True)
    x, sigma, context = _inputs()
    concat = torch.randn(2, 5, 8, 8)
    predictor = Prediction()
    with torch.no_grad():
        model_input = torch.cat([predictor.calculate_input(sigma, x), concat], dim=1)
        output = models.unet(model_input, predictor.timestep(sigma), context).sample
    denoised = KModel(models.unet, predictor).apply_model(x, sigma, c_concat=concat, c_crossattn=context)
    torch.testing.assert_close(denoised, x - SIGMA * output)


def test_sdxl_takes_its_vector() -> None:
    models = build_models(Path("none"), "sdxl")
    x, sigma, _ = _inputs()
    context, y = torch.randn(2, 77, models.unet.config.cross_attention_dim), torch.randn(2, 1600)
    model = KModel(models.unet, Prediction())
    assert not torch.equal(model.apply_model(x, sigma, c_crossattn=context, y=y), model.apply_model(x, sigma, c_crossattn=context, y=y * 2))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
def test_weights_may_be_stored_in_another_type_than_they_compute_in(storage: torch.dtype) -> None:
    unet = build_models(Path("none"), "sd15").unet
    full = KModel(copy.deepcopy(unet), Prediction())
    small = KModel(unet, Prediction(), storage_dtype=storage, computation_dtype=torch.float32)
    assert unet.down_blocks[0].resnets[0].conv1.weight.dtype == storage
    x, sigma, context = _inputs()
    torch.testing.assert_close(small.apply_model(x, sigma, c_crossattn=context), full.apply_model(x, sigma, c_crossattn=context), rtol=0.05, atol=0.3)
    assert unet.down_blocks[0].resnets[0].conv1.weight.dtype == storage


def test_fp8_storage() -> None:
    unet = build_models(Path("none"), "sd15").unet
    model = KModel(unet, Prediction(), storage_dtype=torch.float8_e4m3fn, computation_dtype=torch.bfloat16)
    x, sigma, context = _inputs()
    denoised = model.apply_model(x, sigma, c_crossattn=context)
    assert denoised.isfinite().all()
    assert denoised.dtype == torch.float32
    assert unet.down_blocks[0].resnets[0].conv1.weight.dtype == torch.float8_e4m3fn


def test_types_follow_the_arguments() -> None:
    model = KModel(build_models(Path("none"), "sd15").unet, Prediction(), storage_dtype=torch.bfloat16)
    assert model.computation_dtype == torch.bfloat16
    assert next(model.diffusion_model.parameters()).dtype == torch.bfloat16
    assert model.predictor.sigmas.dtype == torch.float32


def test_weights_are_registered_once_and_under_the_librarys_names() -> None:
    unet = build_models(Path("none"), "sd15").unet
    model = KModel(unet, Prediction())
    names = [name for name, _ in model.named_parameters()]
    assert names == [f"diffusion_model.{name}" for name, _ in unet.named_parameters()]


def test_working_memory_grows_with_the_batch_and_the_type() -> None:
    unet = build_models(Path("none"), "sd15").unet
    model = KModel(unet, Prediction())
    assert model.memory_required([2, 4, 64, 64]) == 2 * model.memory_required([1, 4, 64, 64])
    assert model.memory_required([1, 4, 64, 64]) == 2.0 * 26 * 32 * 64 * 64 * 4
    without_outer_transformers = KModel(build_models(Path("none"), "sdxl").unet, Prediction(), computation_dtype=torch.bfloat16)
    assert without_outer_transformers.memory_required([1, 4, 64, 64]) == 2.0 * 16 * 32 * 64 * 64 * 2
