"""Whole Chroma pictures against diffusers' ChromaPipeline: same files, same noise, same noise levels, same text features; samplers, CFG, decoder.

The pipeline runs the very networks that the files were written from. It adds its text mask to the scores as numbers instead of leaving keys out, so
it is given texts without padding; tests/backend/families/test_chroma.py holds texts of different lengths. fp32 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ChromaImg2ImgPipeline, ChromaPipeline, FluxPipeline
from torch import Tensor

from backend.checkpoint_file import CheckpointError
from backend.diffusion_engine.chroma import Chroma
from tests.support.chroma_networks import write_chroma
from tests.support.dit_checkpoints import LAYOUTS, DitFiles, save
from tests.support.flow_pictures import (
    ONE_PIXEL_STEP,
    SIDE,
    STEPS,
    Prompts,
    check_same,
    cpu_engine,
    load,
    make_scheduler,
    our_picture,
    shifted_sigmas,
)
from tests.support.flux_networks import make_vae

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")
NOISE = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
CFG = 3.0


@pytest.fixture(autouse=True)
def _engine() -> Iterator[None]:
    with cpu_engine():
        yield


@pytest.fixture(scope="module", params=LAYOUTS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DitFiles:
    return write_chroma(tmp_path_factory.mktemp("chroma"), request.param)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> DitFiles:
    return write_chroma(tmp_path_factory.mktemp("chroma"))


def encode(engine: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return tuple(engine.get_learned_conditioning(Prompts([prompt])) for prompt in ("a red cat", "dark, blurry, and out of focus"))  # type: ignore[return-value]


def library_picture(files: DitFiles, kind: Any, sampler: str, texts: tuple[dict[str, Tensor], ...], sigmas: Tensor, **fields: Any) -> Tensor:
    pipeline = kind(scheduler=make_scheduler(sampler, sigmas), vae=files.vae, transformer=files.transformer, text_encoder=None, tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    text, negative = (one["crossattn"] for one in texts)
    masks = {
        "prompt_attention_mask": torch.ones(text.shape[:2]), "negative_prompt_attention_mask": torch.ones(negative.shape[:2]),
    }  # fmt: skip
    arguments = {"height": 8 * SIDE, "width": 8 * SIDE, "sigmas": sigmas[:-1].tolist(), "num_inference_steps": len(sigmas) - 1, **masks, **fields}
    return pipeline(  # type: ignore[no-any-return]
        prompt_embeds=text, negative_prompt_embeds=negative, guidance_scale=CFG, output_type="pt", **arguments
    ).images


def pack(x: Tensor) -> Tensor:
    return FluxPipeline._pack_latents(x, *x.shape)  # type: ignore[no-any-return]


def test_pictures_of_every_layout_are_the_pipeline_s(files: DitFiles) -> None:
    engine = load(files.checkpoint, files.modules)
    texts = encode(engine)
    assert isinstance(engine, Chroma) and not engine.use_distilled_cfg_scale
    assert texts[0]["crossattn"].shape[1] != texts[1]["crossattn"].shape[1], "both branches run in one call all the same"
    sigmas = shifted_sigmas(engine)
    library = library_picture(files, ChromaPipeline, "Euler", texts, sigmas, latents=pack(NOISE))
    check_same(our_picture(engine, "Euler", sigmas, NOISE, texts[0], cfg=CFG, uncond=texts[1]), library)


def test_a_multistep_sampler_is_the_pipeline_s(original: DitFiles) -> None:
    engine = load(original.checkpoint, original.modules)
    texts, sigmas = encode(engine), shifted_sigmas(engine)
    library = library_picture(original, ChromaPipeline, "DPM++ 2M", texts, sigmas, latents=pack(NOISE))
    check_same(our_picture(engine, "DPM++ 2M", sigmas, NOISE, texts[0], cfg=CFG, uncond=texts[1]), library)


def test_img2img_is_the_pipeline_s(original: DitFiles) -> None:
    """From half the way on: (1 - t) x0 + t * noise."""
    engine = load(original.checkpoint, original.modules)
    texts, sigmas = encode(engine), shifted_sigmas(engine)
    part = sigmas[STEPS // 2 :]
    picture = torch.rand(1, 3, 8 * SIDE, 8 * SIDE, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        encoded = (original.vae.encode(picture * 2 - 1).latent_dist.mode() - 0.1159) * 0.3611
    start = engine.forge_objects.unet.model.predictor.noise_scaling(part[0], NOISE, engine.encode_first_stage(picture * 2 - 1))
    library_start = part[0] * NOISE + (1 - part[0]) * encoded
    assert (start - library_start).abs().max() < 2e-3, "the posterior is narrow"
    library = library_picture(
        original, ChromaImg2ImgPipeline, "Euler", texts, sigmas, image=picture, strength=0.5, latents=pack(library_start)
    )  # fmt: skip
    check_same(our_picture(engine, "Euler", part, library_start, texts[0], cfg=CFG, uncond=texts[1]), library)
    assert (our_picture(engine, "Euler", part, start, texts[0], cfg=CFG, uncond=texts[1]) - library).abs().mean() < ONE_PIXEL_STEP


def test_what_is_missing_and_what_is_wrong_is_said(original: DitFiles, tmp_path: Path) -> None:
    vae, t5 = original.modules
    with pytest.raises(CheckpointError, match=r"chroma\.safetensors needs a T5-XXL text encoder: put t5xxl_fp16\.safetensors \(9\.5 GB\)"):
        load(original.checkpoint, (vae,))
    save(tmp_path / "sd.safetensors", make_vae(latent_channels=4).state_dict())
    with pytest.raises(CheckpointError, match=r"sd\.safetensors: is a VAE with 4 latent channels; Chroma needs one with 16"):
        load(original.checkpoint, (tmp_path / "sd.safetensors", t5))


def test_the_model_is_saved_as_one_file_that_loads(original: DitFiles, tmp_path: Path) -> None:
    engine = load(original.checkpoint, original.modules)
    engine.save_checkpoint(tmp_path / "whole.safetensors")
    again = load(tmp_path / "whole.safetensors")
    for find in (lambda one: one.forge_objects.unet.model.diffusion_model, lambda one: one.first_stage_model, lambda one: one.cond_stage_model):
        before, after = find(engine).state_dict(), find(again).state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
