"""Whole Lumina2 pictures against diffusers' Lumina2Pipeline: same files, same noise, same noise levels, same text features; samplers, CFG, decoder.

The pipeline runs the very networks that the files were written from, with its rescaling of CFG. Text features are our engine's own, which
tests/backend/families/test_lumina2.py holds to transformers. fp32 throughout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Lumina2Pipeline
from torch import Tensor

from backend.checkpoint_file import CheckpointError
from backend.nn.padded_text import pad_text
from tests.support.dit_checkpoints import LAYOUTS, DitFiles
from tests.support.flow_pictures import (
    ONE_PIXEL_STEP,
    SIDE,
    STEPS,
    Prompts,
    check_same,
    check_saved,
    library_picture,
    load,
    make_scheduler,
    our_picture,
    random_picture,
    shifted_sigmas,
    start_from_picture,
)
from tests.support.lumina2_networks import write_lumina2

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("on_the_cpu"),
]
NOISE = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
CFG = 3.0


@pytest.fixture(scope="module", params=LAYOUTS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DitFiles:
    return write_lumina2(tmp_path_factory.mktemp("lumina2"), request.param)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> DitFiles:
    return write_lumina2(tmp_path_factory.mktemp("lumina2"))


def check_picture(files: DitFiles, sampler: str = "Euler", *, starts_in_the_middle: bool = False) -> None:
    engine = load(files.checkpoint, files.modules)
    prompts = [Prompts(["a red cat"]), Prompts(["dark"])]
    prompts[1].is_negative_prompt = True
    texts, sigmas, start = [engine.get_learned_conditioning(prompt) for prompt in prompts], shifted_sigmas(engine), NOISE
    if starts_in_the_middle:
        picture, sigmas = random_picture(), sigmas[STEPS // 2 :]
        with torch.no_grad():
            encoded = (files.vae.encode(picture * 2 - 1).latent_dist.mode() - 0.1159) * 0.3611
        start = start_from_picture(engine, picture, encoded, NOISE, sigmas[0])
    library = _library_picture(files, sampler, texts, sigmas, start)
    check_same(our_picture(engine, sampler, sigmas, start, texts[0], cfg=CFG, uncond=texts[1]), library)


def _library_picture(files: DitFiles, sampler: str, texts: Any, sigmas: Tensor, latents: Tensor, **fields: Any) -> Tensor:
    pipeline = Lumina2Pipeline(
        scheduler=make_scheduler(sampler, sigmas), vae=files.vae, transformer=files.transformer, text_encoder=None, tokenizer=None
    )
    features = [one["crossattn"] for one in texts]
    longest = max(one.shape[1] for one in features)
    text, negative = (pad_text(one, longest) for one in features)
    masks = [(torch.arange(longest)[None] < one.shape[1]).long() for one in features]
    return library_picture(
        pipeline, sigmas=sigmas, prompt_embeds=text, prompt_attention_mask=masks[0], negative_prompt_embeds=negative,
        negative_prompt_attention_mask=masks[1], guidance_scale=CFG, latents=latents, **fields,
    )  # fmt: skip


def test_pictures_of_every_layout_are_the_pipeline_s(files: DitFiles) -> None:
    check_picture(files)


def test_a_multistep_sampler_and_img2img_are_the_pipeline_s(original: DitFiles) -> None:
    check_picture(original, "DPM++ 2M")
    check_picture(original, starts_in_the_middle=True)


def test_cfg_is_rescaled_and_truncated_as_the_pipeline_does(original: DitFiles) -> None:
    """Rescaled by the family; truncated by "Skip Late CFG". Each changes the picture."""
    engine = load(original.checkpoint, original.modules)
    prompts = [Prompts(["a red cat"]), Prompts(["dark"])]
    prompts[1].is_negative_prompt = True
    texts, sigmas = [engine.get_learned_conditioning(prompt) for prompt in prompts], shifted_sigmas(engine)
    whole = our_picture(engine, "Euler", sigmas, NOISE, texts[0], cfg=CFG, uncond=texts[1])
    for ratio in (0.25, 0.5):
        cut = our_picture(engine, "Euler", sigmas, NOISE, texts[0], cfg=CFG, uncond=texts[1], skipped_late=1 - ratio)
        check_same(cut, _library_picture(original, "Euler", texts, sigmas, NOISE, cfg_trunc_ratio=ratio))
        assert (cut - whole).abs().mean() > ONE_PIXEL_STEP
    assert (_library_picture(original, "Euler", texts, sigmas, NOISE, cfg_normalization=False) - whole).abs().mean() > ONE_PIXEL_STEP


def test_what_is_missing_is_said_by_name(original: DitFiles) -> None:
    with pytest.raises(CheckpointError) as refused:
        load(original.checkpoint, original.modules[:1])
    assert str(refused.value) == (
        "lumina2.safetensors needs a Gemma2 text encoder: put gemma_2_2b_fp16.safetensors (5.2 GB) into models/text_encoder and choose it under "
        "'VAE / Text Encoder', or use a checkpoint that has one."
    )


def test_the_model_is_saved_as_one_file_that_loads(original: DitFiles, tmp_path: Path) -> None:
    engine = load(original.checkpoint, original.modules)
    again = check_saved(engine, tmp_path / "whole.safetensors")
    one, other = (found.get_learned_conditioning(Prompts(["a red cat"])) for found in (engine, again))
    assert isinstance(one, dict) and isinstance(other, dict) and torch.equal(one["crossattn"], other["crossattn"]), "the tokenizer too"
