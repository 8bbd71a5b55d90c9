"""Pictures of whole jobs against diffusers' own pipelines: same file, seed, prompts, noise levels; from the request to 8-bit pixels.

tests/parity compares the engine for every family; this file covers what a job adds: seeds and noise, schedules, masks, decoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from backend.text_processing.clip_tokenizer import build_clip_tokenizer
from modules.application import Application, install
from modules.processing import Processed
from tests.support.checkpoints import ReferenceModels
from tests.support.narrow_application import SIDE_PX, gradient, img2img, narrow_application, run, txt2img

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")  # diffusers' own

STEPS, SCALE, SEED = 6, 5.0, 11
PROMPT, NEGATIVE = "a red cat on a sofa", "dark, blurry"
ONE_LEVEL = 1 / 255

Loaded = tuple[Application, dict[str, ReferenceModels]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    with narrow_application(tmp_path_factory.mktemp("parity"), "sd15", "sd21_v", "sdxl") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    with narrow_application(tmp_path_factory.mktemp("inpaint"), "sd15", inpaint=True) as loaded:
        yield loaded


def build_pipeline(reference: ReferenceModels, scheduler: Any, *, inpaint: bool = False) -> Any:
    """diffusers' pipeline of the family, with the networks that the file was written from."""
    common = {"vae": reference.vae, "unet": reference.unet, "scheduler": scheduler, "text_encoder": reference.text_encoders[0]}
    if reference.family == "sdxl":
        tokenizers = {"tokenizer": build_clip_tokenizer(), "tokenizer_2": build_clip_tokenizer(pad_token_id=0)}
        pipeline: Any = StableDiffusionXLPipeline(**common, **tokenizers, text_encoder_2=reference.text_encoders[1], add_watermarker=False)
    else:
        kind = StableDiffusionInpaintPipeline if inpaint else StableDiffusionPipeline
        tokenizer = build_clip_tokenizer() if reference.family == "sd15" else build_clip_tokenizer(pad_token_id=0)
        pipeline = kind(**common, tokenizer=tokenizer, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_scheduler(name: str, reference: ReferenceModels) -> Any:
    config = {**reference.scheduler_config(), "timestep_spacing": "linspace", "steps_offset": 0, "use_karras_sigmas": True}
    if name == "Euler":
        return EulerDiscreteScheduler.from_config(config)
    return DPMSolverMultistepScheduler.from_config({**config, "final_sigmas_type": "zero", "euler_at_final": True})


def start_of(name: str) -> torch.Tensor:
    """torch's noise for the seed, as with `randn_source` CPU; DPM-Solver starts at variance 1, Euler at sigma."""
    noise = torch.randn(1, 4, SIDE_PX // 8, SIDE_PX // 8, generator=torch.Generator().manual_seed(SEED))
    sigma_max = 14.6146
    return noise if name == "Euler" else noise * sigma_max / (sigma_max**2 + 1) ** 0.5


def expected_picture(reference: ReferenceModels, name: str, **arguments: Any) -> np.ndarray:
    scheduler = build_scheduler(name, reference)
    pipeline = build_pipeline(reference, scheduler, inpaint="image" in arguments)
    latents = start_of(name)
    if name == "Euler":  # multiplied by the largest level, or its variance-preserving equivalent, depending on the scheduler's spacing
        scheduler.set_timesteps(STEPS)
        latents = latents * float(scheduler.sigmas[0]) / float(scheduler.init_noise_sigma)
    size = {"width": SIDE_PX, "height": SIDE_PX, "guidance_scale": SCALE, "num_inference_steps": STEPS, "output_type": "np"}
    picture: np.ndarray = pipeline(prompt=PROMPT, negative_prompt=NEGATIVE, latents=latents, **size, **arguments).images[0]
    return picture


def as_floats(result: Processed) -> np.ndarray:
    return np.asarray(result.images[0].convert("RGB"), dtype=np.float64) / 255


def fields_of(family: str, name: str) -> dict[str, Any]:
    """DPM-Solver in diffusers rounds its timesteps; here a setting does that."""
    overrides = {"sd_model_checkpoint": family, "enable_quantization": name != "Euler", "randn_source": "CPU", "samples_save": False}
    common = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "steps": STEPS, "cfg_scale": SCALE, "seed": SEED}
    return {**common, "sampler_name": name, "scheduler": "Karras", "override_settings": overrides}


@pytest.mark.parametrize(("family", "name"), [("sd15", "Euler"), ("sd15", "DPM++ 2M"), ("sd21_v", "Euler"), ("sdxl", "DPM++ 2M")])
def test_txt2img(models: Loaded, family: str, name: str) -> None:
    app, references = models
    install(app)
    expected = expected_picture(references[family], name)
    assert np.abs(as_floats(run(txt2img(**fields_of(family, name)))) - expected).mean() < ONE_LEVEL
    assert expected.std() > 0.03


def test_what_an_inpainting_checkpoint_is_shown(inpainting: Loaded) -> None:
    """The mask at latent size, then the latents of the masked picture: the five additional channels of the UNet's training."""
    app, references = inpainting
    install(app)
    reference, picture = references["sd15"], gradient(SIDE_PX, SIDE_PX)
    mask = Image.new("L", (SIDE_PX, SIDE_PX), 0)
    mask.paste(255, (SIDE_PX // 2, 0, SIDE_PX, SIDE_PX))
    source = torch.from_numpy(np.asarray(picture, dtype=np.float32)).movedim(-1, 0)[None] / 127.5 - 1
    with torch.no_grad():
        expected = reference.vae.encode(source * torch.from_numpy(np.asarray(mask) < 128)).latent_dist.mode() * reference.latent_scale
    request = img2img(**fields_of("sd15", "Euler"), init_images=[picture], mask=mask, mask_blur=0, inpaint_full_res=False)
    result = run(request)
    assert torch.equal(request.image_conditioning[:, :1, :, :4], torch.zeros(1, 1, 8, 4))
    assert torch.equal(request.image_conditioning[:, :1, :, 4:], torch.ones(1, 1, 8, 4))
    assert torch.allclose(request.image_conditioning[:, 1:], expected, atol=1e-4)
    assert "Conditional mask weight: 1.0" in result.infotexts[0]
    weak = img2img(**fields_of("sd15", "Euler"), init_images=[picture], mask=mask, mask_blur=0, inpaint_full_res=False, inpainting_fill=1)
    weak.override_settings["inpainting_mask_weight"] = 0.0
    run(weak)
    with torch.no_grad():
        whole = reference.vae.encode(source).latent_dist.mode() * reference.latent_scale
    assert torch.allclose(weak.image_conditioning[:, 1:], whole, atol=1e-4)


def test_an_inpainting_checkpoint_makes_pictures_from_a_prompt_alone(inpainting: Loaded) -> None:
    """As diffusers does with everything masked."""
    app, references = inpainting
    install(app)
    reference = references["sd15"]
    gray = torch.zeros(1, 3, SIDE_PX, SIDE_PX)
    with torch.no_grad():
        masked_latents = reference.vae.encode(gray).latent_dist.mode() * reference.latent_scale
    white = Image.new("L", (SIDE_PX, SIDE_PX), 255)
    arguments = {"image": gradient(SIDE_PX, SIDE_PX), "mask_image": white, "masked_image_latents": masked_latents, "strength": 1.0}
    expected = expected_picture(reference, "Euler", **arguments)
    assert np.abs(as_floats(run(txt2img(**fields_of("sd15", "Euler")))) - expected).mean() < ONE_LEVEL
    hires = run(txt2img(**fields_of("sd15", "Euler"), enable_hr=True, hr_scale=1.5, hr_upscaler="Latent", hr_cfg=SCALE))
    assert hires.images[0].size == (96, 96)
