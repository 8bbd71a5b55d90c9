"""Whole Lumina2 pictures against diffusers' Lumina2Pipeline: same files, same noise, same noise levels, same text features; samplers, CFG, decoder.

The pipeline runs the very networks that the files were written from, without its rescaling of CFG. Text features are our engine's own, which
tests/backend/families/test_lumina2.py holds to transformers. fp32 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Lumina2Pipeline
from torch import Tensor

from backend.checkpoint_file import CheckpointError
from backend.nn.padded_text import pad_text
from tests.support.dit_checkpoints import LAYOUTS, DitFiles
from tests.support.flow_pictures import SIDE, STEPS, Prompts, check_same, cpu_engine, load, make_scheduler, our_picture, shifted_sigmas
from tests.support.lumina2_networks import write_lumina2

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")
NOISE = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
CFG = 3.0


@pytest.fixture(autouse=True)
def _engine() -> Iterator[None]:
    with cpu_engine():
        yield


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
    if starts_in_the_middle:  # img2img: (1 - t) x0 + t * noise
        picture = torch.rand(1, 3, 8 * SIDE, 8 * SIDE, generator=torch.Generator().manual_seed(4)) * 2 - 1
        sigmas = sigmas[STEPS // 2 :]
        with torch.no_grad():
            encoded = (files.vae.encode(picture).latent_dist.mode() - 0.1159) * 0.3611
        start = sigmas[0] * NOISE + (1 - sigmas[0]) * encoded
        ours = engine.forge_objects.unet.model.predictor.noise_scaling(sigmas[0], NOISE, engine.encode_first_stage(picture))
        assert (ours - start).abs().max() < 2e-3, "the posterior is narrow"
    library = _library_picture(files, sampler, texts, sigmas, start)
    check_same(our_picture(engine, sampler, sigmas, start, texts[0], cfg=CFG, uncond=texts[1]), library)


def _library_picture(files: DitFiles, sampler: str, texts: Any, sigmas: Tensor, latents: Tensor) -> Tensor:
    pipeline = Lumina2Pipeline(
        scheduler=make_scheduler(sampler, sigmas), vae=files.vae, transformer=files.transformer, text_encoder=None, tokenizer=None
    )
    pipeline.set_progress_bar_config(disable=True)
    features = [one["crossattn"] for one in texts]
    longest = max(one.shape[1] for one in features)
    text, negative = (pad_text(one, longest) for one in features)
    masks = [(torch.arange(longest)[None] < one.shape[1]).long() for one in features]
    return pipeline(  # type: ignore[no-any-return]
        prompt_embeds=text, prompt_attention_mask=masks[0], negative_prompt_embeds=negative, negative_prompt_attention_mask=masks[1],
        height=8 * SIDE, width=8 * SIDE, guidance_scale=CFG, cfg_normalization=False, sigmas=sigmas[:-1].tolist(),
        num_inference_steps=len(sigmas) - 1, latents=latents, output_type="pt",
    ).images  # fmt: skip


def test_pictures_of_every_layout_are_the_pipeline_s(files: DitFiles) -> None:
    check_picture(files)


def test_a_multistep_sampler_and_img2img_are_the_pipeline_s(original: DitFiles) -> None:
    check_picture(original, "DPM++ 2M")
    check_picture(original, starts_in_the_middle=True)


def test_what_is_missing_is_said_by_name(original: DitFiles) -> None:
    with pytest.raises(CheckpointError) as refused:
        load(original.checkpoint, original.modules[:1])
    assert str(refused.value) == (
        "lumina2.safetensors needs a Gemma2 text encoder: put gemma_2_2b_fp16.safetensors (5.2 GB) into models/text_encoder and choose it under "
        "'VAE / Text Encoder', or use a checkpoint that has one."
    )


def test_the_model_is_saved_as_one_file_that_loads(original: DitFiles, tmp_path: Path) -> None:
    engine = load(original.checkpoint, original.modules)
    engine.save_checkpoint(tmp_path / "whole.safetensors")
    again = load(tmp_path / "whole.safetensors")
    for find in (lambda one: one.forge_objects.unet.model.diffusion_model, lambda one: one.first_stage_model, lambda one: one.cond_stage_model):
        before, after = find(engine).state_dict(), find(again).state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    one, other = (found.get_learned_conditioning(Prompts(["a red cat"])) for found in (engine, again))
    assert isinstance(one, dict) and isinstance(other, dict) and torch.equal(one["crossattn"], other["crossattn"]), "the tokenizer too"
