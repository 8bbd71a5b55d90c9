"""Whole Chroma pictures against diffusers' ChromaPipeline: same files, same noise, same noise levels, same text features; samplers, CFG, decoder.

The pipeline runs the very networks that the files were written from. It adds its text mask to the scores as numbers instead of leaving keys out, so
it is given texts without padding; tests/backend/families/test_chroma.py holds texts of different lengths. fp32 throughout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ChromaImg2ImgPipeline, ChromaPipeline, FluxPipeline
from torch import Tensor

from backend.checkpoint_file import CheckpointError
from backend.diffusion_engine.chroma import Chroma
from tests.support import flow_pictures
from tests.support.chroma_networks import write_chroma
from tests.support.dit_checkpoints import LAYOUTS, DitFiles, save
from tests.support.flow_pictures import (
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
from tests.support.flux_networks import make_vae

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("on_the_cpu"),
]
NOISE = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
CFG = 3.0


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
    text, negative = (one["crossattn"] for one in texts)
    masks = {
        "prompt_attention_mask": torch.ones(text.shape[:2]), "negative_prompt_attention_mask": torch.ones(negative.shape[:2]),
    }  # fmt: skip
    return flow_pictures.library_picture(
        pipeline, sigmas=sigmas, prompt_embeds=text, negative_prompt_embeds=negative, guidance_scale=CFG, **masks, **fields
    )  # fmt: skip


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
    picture = random_picture()
    with torch.no_grad():
        encoded = (original.vae.encode(picture * 2 - 1).latent_dist.mode() - 0.1159) * 0.3611
    start = start_from_picture(engine, picture, encoded, NOISE, part[0])
    library = library_picture(original, ChromaImg2ImgPipeline, "Euler", texts, sigmas, image=picture, strength=0.5, latents=pack(start))
    check_same(our_picture(engine, "Euler", part, start, texts[0], cfg=CFG, uncond=texts[1]), library)


def test_what_is_missing_and_what_is_wrong_is_said(original: DitFiles, tmp_path: Path) -> None:
    vae, t5 = original.modules
    with pytest.raises(CheckpointError, match=r"chroma\.safetensors needs a T5-XXL text encoder: put t5xxl_fp16\.safetensors \(9\.5 GB\)"):
        load(original.checkpoint, (vae,))
    save(tmp_path / "sd.safetensors", make_vae(latent_channels=4).state_dict())
    with pytest.raises(CheckpointError, match=r"sd\.safetensors: is a VAE with 4 latent channels; Chroma needs one with 16"):
        load(original.checkpoint, (tmp_path / "sd.safetensors", t5))


def test_the_model_is_saved_as_one_file_that_loads(original: DitFiles, tmp_path: Path) -> None:
    engine = load(original.checkpoint, original.modules)
    check_saved(engine, tmp_path / "whole.safetensors")
