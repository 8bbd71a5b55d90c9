"""Whole pictures against diffusers' pipelines: same file, prompts, noise and noise levels; text encoders, guidance, sampler and decoder.

The pipelines use the networks that the checkpoint was written from; ours are loaded from the file. fp32 throughout, so pictures agree far
below one step of an 8-bit pixel.
"""

from __future__ import annotations

import gc
from collections import UserList
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

from backend import memory_management
from backend.args import BackendConfig
from backend.devices.probing import probe_devices
from backend.diffusion_engine.base import ForgeDiffusionEngine
from backend.loader import load_checkpoint
from backend.sampling.registry import find_sampler
from backend.sampling.sampler_types import SamplerSettings
from backend.sampling.sampling_function import denoise_guided, sampling_cleanup, sampling_prepare
from backend.text_processing.clip_tokenizer import EOS_TOKEN_ID, build_clip_tokenizer
from tests.backend.sampling.toys import one_stream
from tests.support.checkpoints import ReferenceModels, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")

CONFIG = BackendConfig()
PROMPT, NEGATIVE = "a red cat on a chair, evening", "blurry, dark"
NUM_STEPS, CFG = 6, 5.0
ONE_PIXEL_STEP = 1 / 255


@pytest.fixture(autouse=True)
def _cpu_engine() -> Iterator[None]:
    memory_management.configure(CONFIG, probe_devices(BackendConfig(device_ids=("cpu",))))
    yield
    memory_management.unload_all_models()


class _Prompts(UserList):  # type: ignore[type-arg]
    """A list of prompts that knows the picture it is for."""

    def __init__(self, texts: list[str], *, side_px: int, is_negative_prompt: bool = False) -> None:
        super().__init__(texts)
        self.width = self.height = side_px
        self.is_negative_prompt = is_negative_prompt


# the library's picture


@cache
def _tokenizer(pad_token_id: int) -> Any:
    return build_clip_tokenizer(pad_token_id=pad_token_id)


def _pipeline(models: ReferenceModels, scheduler: Any) -> Any:
    is_inpaint = models.unet.config.in_channels == 9
    parts: dict[str, Any] = {"unet": models.unet, "vae": models.vae, "scheduler": scheduler, "text_encoder": models.text_encoders[0]}
    if models.family == "sdxl":
        kind: Any = StableDiffusionXLInpaintPipeline if is_inpaint else StableDiffusionXLPipeline
        parts |= {"tokenizer": _tokenizer(EOS_TOKEN_ID), "tokenizer_2": _tokenizer(0), "text_encoder_2": models.text_encoders[1]}
        parts |= {"add_watermarker": False}
    else:
        kind = StableDiffusionInpaintPipeline if is_inpaint else StableDiffusionPipeline
        parts |= {"tokenizer": _tokenizer(EOS_TOKEN_ID if models.family == "sd15" else 0)}
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = kind(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _library_picture(models: ReferenceModels, scheduler: Any, noise: Tensor, inpaint: dict[str, Tensor], cfg: float = CFG) -> Tensor:
    side_px = noise.shape[-1] * 8
    result = _pipeline(models, scheduler)(
        prompt=[PROMPT] * noise.shape[0], negative_prompt=[NEGATIVE] * noise.shape[0], height=side_px, width=side_px, guidance_scale=cfg,
        num_inference_steps=scheduler.config.steps_for_test, latents=noise, output_type="pt", **_inpaint_arguments(models, inpaint),
    )  # fmt: skip
    return result.images


def _inpaint_arguments(models: ReferenceModels, inpaint: dict[str, Tensor]) -> dict[str, Any]:
    """A picture, a mask, and the masked picture's latents, so that no random encoding is involved."""
    if not inpaint:
        return {}
    return {"image": inpaint["picture"], "mask_image": inpaint["mask"], "masked_image_latents": inpaint["latents"], "strength": 1.0}


def _scheduler(name: str, models: ReferenceModels) -> Any:
    config = {**models.scheduler_config(), "timestep_spacing": "linspace", "steps_offset": 0, "use_karras_sigmas": True}
    if name == "Euler":
        scheduler: Any = EulerDiscreteScheduler.from_config(config)
    else:
        scheduler = DPMSolverMultistepScheduler.from_config({**config, "final_sigmas_type": "zero", "euler_at_final": True})
    scheduler.register_to_config(steps_for_test=NUM_STEPS)
    scheduler.set_timesteps(NUM_STEPS)
    return scheduler


# our picture


@torch.inference_mode()
def _our_picture(engine: ForgeDiffusionEngine, sampler: str, sigmas: Tensor, start: Tensor, inpaint: dict[str, Tensor], cfg: float = CFG) -> Tensor:
    side_px, batch = start.shape[-1] * 8, start.shape[0]
    cond = engine.get_learned_conditioning(_Prompts([PROMPT] * batch, side_px=side_px))
    uncond = engine.get_learned_conditioning(_Prompts([NEGATIVE] * batch, side_px=side_px, is_negative_prompt=True))
    image_cond = None
    if inpaint:
        mask = torch.nn.functional.interpolate(inpaint["mask"], size=start.shape[-2:])
        image_cond = torch.cat([mask, inpaint["latents"]], dim=1).expand(batch, -1, -1, -1)
    unet = engine.forge_objects.unet

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return denoise_guided(unet, x, sigma, text_cond=cond, text_uncond=uncond, cond_scale=cfg, image_cond=image_cond)[0]

    sampling_prepare(unet, start)
    latents = find_sampler(sampler).function(denoise, start, sigmas, settings=SamplerSettings(), noise=one_stream())
    sampling_cleanup(unet)
    return engine.decode_first_stage(latents).clamp(-1, 1) / 2 + 0.5


def _start(sampler: str, engine: ForgeDiffusionEngine, sigmas: Tensor, noise: Tensor) -> Tensor:
    """The pipelines' start: Euler's is noise times sigma, DPM-Solver's is unit noise in the variance-preserving form."""
    predictor = engine.forge_objects.unet.model.predictor
    return predictor.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), max_denoise=sampler != "Euler")


CASES = [("sd15", False), ("sd15", True), ("sd20", False), ("sd21_v", False), ("sdxl", False), ("sdxl", True)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0] + ("-inpaint" if case[1] else ""))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ReferenceModels, ForgeDiffusionEngine]:
    memory_management.configure(CONFIG, probe_devices(BackendConfig(device_ids=("cpu",))))
    family, inpaint = request.param
    path = tmp_path_factory.mktemp("parity") / f"{family}.safetensors"
    models = write_checkpoint(path, family, inpaint=inpaint, prediction="v_prediction" if family == "sd21_v" else "epsilon")
    return models, load_checkpoint(path, config=CONFIG)


def _masked_picture(models: ReferenceModels, side: int) -> dict[str, Tensor]:
    if models.unet.config.in_channels != 9:
        return {}
    generator = torch.Generator().manual_seed(4)
    mask = torch.zeros(1, 1, 8 * side, 8 * side)
    mask[..., : 4 * side] = 1.0
    return {
        "picture": torch.rand(1, 3, 8 * side, 8 * side, generator=generator),
        "mask": mask,
        "latents": torch.randn(1, 4, side, side, generator=generator),
    }


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M"])
@pytest.mark.parametrize("batch", [1, 2])
def test_pictures_are_the_pipelines(loaded: tuple[ReferenceModels, ForgeDiffusionEngine], sampler: str, batch: int) -> None:
    models, engine = loaded
    noise = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    inpaint = _masked_picture(models, 8)
    scheduler = _scheduler(sampler, models)
    # DPMSolverMultistepScheduler rounds the timesteps of its Karras levels; the option of that name does so here.
    engine.forge_objects.unet.model.predictor.quantize_timesteps = sampler != "Euler"
    ours = _our_picture(engine, sampler, scheduler.sigmas, _start(sampler, engine, scheduler.sigmas, noise), inpaint)
    library = _library_picture(models, scheduler, noise, inpaint)
    assert library.shape == (batch, 3, 64, 64)
    assert library.std() > 0.05, "a picture, not a plane"
    assert (ours - library).abs().mean() < 0.02 * ONE_PIXEL_STEP
    assert (ours - library).abs().max() < ONE_PIXEL_STEP


def test_without_guidance(loaded: tuple[ReferenceModels, ForgeDiffusionEngine]) -> None:
    """At scale 1 neither implementation runs the unconditional branch."""
    models, engine = loaded
    noise, inpaint = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), _masked_picture(models, 8)
    scheduler = _scheduler("Euler", models)
    engine.forge_objects.unet.model.predictor.quantize_timesteps = False
    ours = _our_picture(engine, "Euler", scheduler.sigmas, _start("Euler", engine, scheduler.sigmas, noise), inpaint, cfg=1.0)
    library = _library_picture(models, scheduler, noise, inpaint, cfg=1.0)
    assert (ours - library).abs().mean() < 0.02 * ONE_PIXEL_STEP


@pytest.mark.slow
@pytest.mark.nightly
def test_a_network_of_full_width(tmp_path: Path) -> None:
    """SD1.5's own widths (320 to 1280 channels; its text encoder narrow), written in fp16, at 128 pixels; about 6.5 GB of memory."""
    path = tmp_path / "full.safetensors"
    models = write_checkpoint(path, "sd15", width=320, dtype=torch.float16)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    scheduler = _scheduler("Euler", models)
    sigmas = scheduler.sigmas
    library = _library_picture(models, scheduler, noise, {})
    del models
    gc.collect()
    engine = load_checkpoint(path, config=CONFIG)
    ours = _our_picture(engine, "Euler", sigmas, _start("Euler", engine, sigmas, noise), {})
    assert (ours - library).abs().mean() < 0.02 * ONE_PIXEL_STEP
