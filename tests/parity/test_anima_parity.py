"""Whole Anima pictures against diffusers' modular pipeline: same files, same noise, same noise levels; texts, samplers, CFG, decoder.

The pipeline runs the very networks that the files were written from, its own text encoder included. fp32 throughout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance
from diffusers.modular_pipelines.anima.modular_blocks_anima import AnimaAutoBlocks
from torch import Tensor

from backend.checkpoint_file import CheckpointError
from backend.text_processing.t5_tokenizer import build_t5_tokenizer
from tests.support.anima_networks import LEAST_TEXT, without_torchvision, write_anima
from tests.support.dit_checkpoints import DitFiles
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
from tests.support.zimage_networks import qwen_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("on_the_cpu"),
]
NOISE = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
CFG = 3.0
PROMPT, NEGATIVE = "a red cat on a mat " * 6, "dark"


@pytest.fixture(scope="module", params=["original", "all-in-one"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DitFiles:
    return write_anima(tmp_path_factory.mktemp("anima"), request.param)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> DitFiles:
    return write_anima(tmp_path_factory.mktemp("anima"))


def library_picture(files: DitFiles, sampler: str, sigmas: Tensor, latents: Tensor, cfg: float = CFG) -> Tensor:
    pipeline = AnimaAutoBlocks().init_pipeline()
    pipeline.update_components(
        text_encoder=files.texts["qwen3"], tokenizer=qwen_tokenizer(), t5_tokenizer=build_t5_tokenizer(),
        text_conditioner=files.transformer.text_conditioner, transformer=files.transformer.transformer, vae=files.vae,
        scheduler=make_scheduler(sampler, sigmas), guider=ClassifierFreeGuidance(guidance_scale=cfg),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    with without_torchvision():
        return pipeline(  # type: ignore[no-any-return]
            prompt=PROMPT, negative_prompt=NEGATIVE, latents=latents.unsqueeze(2), sigmas=sigmas[:-1].tolist(), num_inference_steps=len(sigmas) - 1,
            height=8 * SIDE, width=8 * SIDE, output_type="pt", output="images",
        )  # fmt: skip


def encode(engine: Any) -> list[dict[str, Tensor]]:
    return [engine.get_learned_conditioning(Prompts([prompt])) for prompt in (PROMPT, NEGATIVE)]


def ours(engine: Any, sampler: str = "Euler", cfg: float = CFG, sigmas: Tensor | None = None, start: Tensor = NOISE) -> Tensor:
    texts = encode(engine)
    return our_picture(engine, sampler, shifted_sigmas(engine) if sigmas is None else sigmas, start, texts[0], cfg=cfg, uncond=texts[1])


def test_pictures_of_every_layout_are_the_pipeline_s(files: DitFiles) -> None:
    """Prompt and negative prompt have unlike lengths and run in one call."""
    engine = load(files.checkpoint, files.modules)
    check_same(ours(engine), library_picture(files, "Euler", shifted_sigmas(engine), NOISE))


def test_a_multistep_sampler_is_the_pipeline_s(original: DitFiles) -> None:
    engine = load(original.checkpoint, original.modules)
    check_same(ours(engine, "DPM++ 2M"), library_picture(original, "DPM++ 2M", shifted_sigmas(engine), NOISE))


def test_img2img_is_the_pipeline_s_from_half_the_way_on(original: DitFiles) -> None:
    engine = load(original.checkpoint, original.modules)
    part, picture = shifted_sigmas(engine)[STEPS // 2 :], random_picture()
    std, mean = (torch.tensor(original.vae.config[name]).view(1, 16, 1, 1) for name in ("latents_std", "latents_mean"))
    with torch.no_grad():
        encoded = (original.vae.encode((picture * 2 - 1).unsqueeze(2)).latent_dist.mode().squeeze(2) - mean) / std
    start = start_from_picture(engine, picture, encoded, NOISE, part[0])
    check_same(ours(engine, sigmas=part, start=start), library_picture(original, "Euler", part, start))


def test_emphasis_weighs_t5_s_tokens_alone_and_break_only_separates(original: DitFiles) -> None:
    engine = load(original.checkpoint, original.modules)
    plain, heavy, parted = (engine.get_learned_conditioning(Prompts([prompt])) for prompt in ("a red cat", "a (red:1.5) cat", "a red BREAK cat"))
    assert torch.equal(plain["crossattn"], heavy["crossattn"]) and torch.equal(plain["second_ids"], heavy["second_ids"])
    assert plain["second_weights"].unique().tolist() == [1.0] and sorted(heavy["second_weights"].unique().tolist()) == [1.0, 1.5]
    assert plain["second_ids"].shape == (1, LEAST_TEXT) and plain["second_lengths"].tolist() == parted["second_lengths"].tolist()
    empty = engine.get_learned_conditioning(Prompts([""]))
    assert empty["text_lengths"].tolist() == [1] and empty["second_lengths"].tolist() == [1]


def test_what_is_missing_is_said_by_name(original: DitFiles) -> None:
    with pytest.raises(CheckpointError, match=r"needs a Qwen3 text encoder: put qwen_3_06b_base\.safetensors \(1\.2 GB\) into models/text_encoder"):
        load(original.checkpoint, original.modules[:1])


def test_the_model_is_saved_as_one_file_that_loads(original: DitFiles, tmp_path: Path) -> None:
    check_saved(load(original.checkpoint, original.modules), tmp_path / "whole.safetensors")
