"""Whole SD3.5 pictures against diffusers' StableDiffusion3Pipeline: same files, same noise, same noise levels; texts, samplers, CFG, decoder.

The pipeline runs the very networks that the files were written from, its own text encoders included. fp32 throughout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from backend.checkpoint_file import CheckpointError
from backend.diffusion_engine.sd35 import StableDiffusion3
from backend.text_processing.clip_tokenizer import build_clip_tokenizer
from modules.errors import RequestError
from modules_forge.unet_patching import StepWindow
from tests.support import flow_pictures
from tests.support.dit_checkpoints import LAYOUTS, DitFiles
from tests.support.extensions import import_builtin
from tests.support.flow_pictures import (
    ONE_PIXEL_STEP,
    SIDE,
    STEPS,
    Prompts,
    check_same,
    check_saved,
    load,
    make_scheduler,
    our_picture,
    random_picture,
    shifted_sigmas,
    start_from_picture,
)
from tests.support.sd3_networks import PLAIN, write_sd3
from tests.support.t5_encoders import t5_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("on_the_cpu"),
]
NOISE = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
CFG = 3.0
PROMPT, NEGATIVE = "a red cat", "dark and blurry"


@pytest.fixture(scope="module", params=LAYOUTS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DitFiles:
    return write_sd3(tmp_path_factory.mktemp("sd3"), request.param)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> DitFiles:
    return write_sd3(tmp_path_factory.mktemp("sd3"))


def make_pipeline(files: DitFiles, kind: Any, scheduler: Any) -> Any:
    """With text encoders and tokenizers; CLIP-L's pooled text is not projected, as its identity says in the published pipelines."""
    return kind(
        transformer=files.transformer, scheduler=scheduler, vae=files.vae, text_encoder=_with_identity(files.texts["clip_l"]),
        tokenizer=build_clip_tokenizer(), text_encoder_2=files.texts["clip_g"], tokenizer_2=build_clip_tokenizer(pad_token_id=0),
        text_encoder_3=files.texts.get("t5xxl"), tokenizer_3=t5_tokenizer() if "t5xxl" in files.texts else None,
    )  # fmt: skip


def _with_identity(clip: Any) -> CLIPTextModelWithProjection:
    projected = CLIPTextModelWithProjection(clip.config)
    state = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in clip.state_dict().items()}
    projected.load_state_dict({**state, "text_projection.weight": torch.eye(clip.config.hidden_size)})
    return projected.eval()


def library_picture(files: DitFiles, kind: Any, sampler: str, sigmas: Tensor, **fields: Any) -> Tensor:
    pipeline = make_pipeline(files, kind, make_scheduler(sampler, sigmas))
    return flow_pictures.library_picture(pipeline, PROMPT, negative_prompt=NEGATIVE, guidance_scale=CFG, sigmas=sigmas, **fields)


def encode(engine: Any) -> list[dict[str, Tensor]]:
    return [engine.get_learned_conditioning(Prompts([prompt])) for prompt in (PROMPT, NEGATIVE)]


def check_picture(files: DitFiles, sampler: str = "Euler") -> None:
    engine = load(files.checkpoint, files.modules)
    texts, sigmas = encode(engine), shifted_sigmas(engine)
    assert isinstance(engine, StableDiffusion3) and engine.is_sd3 and engine.is_webui_legacy_model()
    library = library_picture(files, StableDiffusion3Pipeline, sampler, sigmas, latents=NOISE)
    check_same(our_picture(engine, sampler, sigmas, NOISE, texts[0], cfg=CFG, uncond=texts[1]), library)


def test_pictures_of_every_layout_are_the_pipeline_s(files: DitFiles) -> None:
    check_picture(files)


def test_a_multistep_sampler_is_the_pipeline_s(original: DitFiles) -> None:
    check_picture(original, "DPM++ 2M")


def test_without_t5_and_with_the_first_sd3_s_blocks(tmp_path: Path) -> None:
    """As "sd3_medium_incl_clips": zeros take T5's place."""
    files = write_sd3(tmp_path, "all-in-one", with_t5=False, **PLAIN)
    check_picture(files)
    engine: Any = load(files.checkpoint)
    assert engine.text_processing_engine_t5 is None and engine.text_processing_engine_g is engine.text_engines[1]


def test_img2img_is_the_pipeline_s(original: DitFiles) -> None:
    """From half the way on: (1 - t) x0 + t * noise."""
    engine = load(original.checkpoint, original.modules)
    texts, sigmas = encode(engine), shifted_sigmas(engine)
    part = sigmas[STEPS // 2 :]
    picture = random_picture()
    with torch.no_grad():
        encoded = (original.vae.encode(picture * 2 - 1).latent_dist.mode() - 0.0609) * 1.5305
    library = library_picture(
        original, StableDiffusion3Img2ImgPipeline, "Euler", sigmas, image=encoded, strength=0.5, generator=torch.Generator().manual_seed(6)
    )
    noise = torch.randn(NOISE.shape, generator=torch.Generator().manual_seed(6))
    start = start_from_picture(engine, picture, encoded, noise, part[0], tolerance=6e-3)
    check_same(our_picture(engine, "Euler", part, start, texts[0], cfg=CFG, uncond=texts[1]), library)


def test_skip_layer_guidance_is_the_pipeline_s(original: DitFiles) -> None:
    script = import_builtin("sd_forge_skip_layer_guidance/scripts", "forge_skip_layer_guidance")
    engine = load(original.checkpoint, original.modules)
    texts, sigmas = encode(engine), shifted_sigmas(engine)
    plain = our_picture(engine, "Euler", sigmas, NOISE, texts[0], cfg=CFG, uncond=texts[1])
    unet = engine.forge_objects.unet = engine.forge_objects.unet.clone()
    unet.set_model_sampler_post_cfg_function(script.SkipLayerGuidance([1], 2.8, StepWindow(None, 0.0, 1.0)))
    every_step = {"skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 2.0}
    library = library_picture(original, StableDiffusion3Pipeline, "Euler", sigmas, latents=NOISE, skip_guidance_layers=[1], **every_step)
    ours = our_picture(engine, "Euler", sigmas, NOISE, texts[0], cfg=CFG, uncond=texts[1])
    check_same(ours, library)
    assert (ours - plain).abs().mean() > ONE_PIXEL_STEP
    assert script.parse_layers(" 9,7 , 8,", 24) == [7, 8, 9]
    for wrong in ("", "seven", "24", "-1", "1e1", "\u0667"):
        with pytest.raises(RequestError, match=r"slg_layers is .*blocks from 0 to 23"):
            script.parse_layers(wrong, 24)


def test_an_empty_negative_prompt_is_zeros(original: DitFiles) -> None:
    engine = load(original.checkpoint, original.modules)
    prompts = Prompts([""])
    prompts.is_negative_prompt = True
    empty = engine.get_learned_conditioning(prompts)
    assert isinstance(empty, dict) and not empty["crossattn"].any() and not empty["vector"].any()
    assert empty["crossattn"].shape == encode(engine)[0]["crossattn"].shape


def test_what_is_missing_is_said_and_t5_is_not(original: DitFiles) -> None:
    vae, _, _, t5 = original.modules
    with pytest.raises(CheckpointError) as refused:
        load(original.checkpoint, (vae, t5))
    assert str(refused.value) == (
        "sd35.safetensors needs a CLIP-L text encoder and an OpenCLIP bigG text encoder: put clip_l.safetensors (0.25 GB) and clip_g.safetensors "
        "(1.39 GB) into models/text_encoder and choose them under 'VAE / Text Encoder', or use a checkpoint that has them."
    )


def test_the_model_is_saved_as_one_file_that_loads(original: DitFiles, tmp_path: Path) -> None:
    engine = load(original.checkpoint, original.modules)
    check_saved(engine, tmp_path / "whole.safetensors")
