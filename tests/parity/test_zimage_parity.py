"""Whole Z-Image pictures against diffusers' ZImagePipeline: same files, same noise, same noise levels; texts, samplers, CFG, decoder.

The pipeline runs the very networks that the files were written from, its own text encoder included. It writes CFG as cond + s (cond - uncond): its s
is our CFG scale less 1. fp32 throughout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageImg2ImgPipeline, ZImagePipeline
from torch import Tensor

from backend.checkpoint_file import CheckpointError
from tests.support import flow_pictures
from tests.support.dit_checkpoints import LAYOUTS, DitFiles
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
from tests.support.zimage_networks import qwen_tokenizer, write_zimage

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("on_the_cpu"),
]
NOISE = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
CFG = 3.0
PROMPT, NEGATIVE = "a red cat on a mat " * 6, "dark"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The published template for a question alone."""


@pytest.fixture(scope="module", params=LAYOUTS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DitFiles:
    return write_zimage(tmp_path_factory.mktemp("zimage"), request.param)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> DitFiles:
    return write_zimage(tmp_path_factory.mktemp("zimage"))


def library_picture(files: DitFiles, kind: Any, sampler: str, sigmas: Tensor, cfg: float = CFG, **fields: Any) -> Tensor:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = TEMPLATE
    pipeline = kind(
        scheduler=make_scheduler(sampler, sigmas), vae=files.vae, transformer=files.transformer, text_encoder=files.texts["qwen3"],
        tokenizer=tokenizer,
    )  # fmt: skip
    return flow_pictures.library_picture(pipeline, PROMPT, negative_prompt=NEGATIVE, guidance_scale=cfg - 1, sigmas=sigmas, **fields)


def encode(engine: Any) -> list[dict[str, Tensor]]:
    return [engine.get_learned_conditioning(Prompts([prompt])) for prompt in (PROMPT, NEGATIVE)]


def check_picture(files: DitFiles, sampler: str = "Euler", cfg: float = CFG) -> None:
    engine = load(files.checkpoint, files.modules)
    texts, sigmas = encode(engine), shifted_sigmas(engine)
    library = library_picture(files, ZImagePipeline, sampler, sigmas, cfg, latents=NOISE)
    check_same(our_picture(engine, sampler, sigmas, NOISE, texts[0], cfg=cfg, uncond=texts[1]), library)


def test_pictures_of_every_layout_are_the_pipeline_s(files: DitFiles) -> None:
    """Prompt and negative prompt have unlike lengths and run in one call."""
    check_picture(files)


@pytest.mark.parametrize(("sampler", "cfg"), [("DPM++ 2M", CFG), ("Euler", 1.0)])
def test_a_multistep_sampler_and_turbo_s_scale_are_the_pipeline_s(original: DitFiles, sampler: str, cfg: float) -> None:
    check_picture(original, sampler, cfg)


def test_img2img_is_the_pipeline_s(original: DitFiles) -> None:
    """From half the way on: (1 - t) x0 + t * noise."""
    engine = load(original.checkpoint, original.modules)
    texts, sigmas = encode(engine), shifted_sigmas(engine)
    part = sigmas[STEPS // 2 :]
    picture = random_picture()
    with torch.no_grad():
        encoded = (original.vae.encode(picture * 2 - 1).latent_dist.mode() - 0.1159) * 0.3611
    start = start_from_picture(engine, picture, encoded, NOISE, part[0])
    library = library_picture(original, ZImageImg2ImgPipeline, "Euler", sigmas, image=picture, strength=0.5, latents=start)
    check_same(our_picture(engine, "Euler", part, start, texts[0], cfg=CFG, uncond=texts[1]), library)


def test_what_is_missing_is_said_by_name(original: DitFiles) -> None:
    with pytest.raises(CheckpointError) as refused:
        load(original.checkpoint, original.modules[:1])
    assert str(refused.value) == (
        "z_image_turbo.safetensors needs a Qwen3 text encoder: put qwen_3_4b.safetensors (8.0 GB) into models/text_encoder and choose it under "
        "'VAE / Text Encoder', or use a checkpoint that has one."
    )


def test_the_model_is_saved_as_one_file_that_loads(original: DitFiles, tmp_path: Path) -> None:
    engine = load(original.checkpoint, original.modules)
    check_saved(engine, tmp_path / "whole.safetensors")
