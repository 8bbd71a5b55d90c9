"""Whole Krea 2 pictures against diffusers' Krea2Pipeline: same files, same noise, same noise levels; texts, samplers, CFG, decoder, a LoRA.

The pipeline runs the very networks that the files were written from, its own text encoder included. It writes CFG as cond + s (cond - uncond): its s
is our CFG scale less 1. fp32 throughout.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Krea2Pipeline
from safetensors.torch import save_file
from torch import Tensor

from backend.checkpoint_file import CheckpointError
from backend.patcher.lora_files import match_lora, parse_lora
from tests.support import flow_pictures
from tests.support.dit_checkpoints import LAYOUTS, DitFiles
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
from tests.support.krea2_networks import TAPS, write_krea2
from tests.support.qwenimage_networks import library_pack
from tests.support.zimage_networks import qwen_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("on_the_cpu"),
]
NOISE = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
CFG = 3.0
PROMPT, NEGATIVE = "a red cat on a mat " * 6, "dark"


@pytest.fixture(scope="module", params=LAYOUTS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DitFiles:
    return write_krea2(tmp_path_factory.mktemp("krea2"), request.param)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> DitFiles:
    return write_krea2(tmp_path_factory.mktemp("krea2"))


def library_picture(files: DitFiles, sampler: str, sigmas: Tensor, latents: Tensor, cfg: float = CFG) -> Tensor:
    pipeline = Krea2Pipeline(
        scheduler=make_scheduler(sampler, sigmas), vae=files.vae, transformer=files.transformer, text_encoder=files.texts["qwen3_vl"],
        tokenizer=qwen_tokenizer(), text_encoder_select_layers=TAPS, is_distilled=True,
    )  # fmt: skip
    return flow_pictures.library_picture(
        pipeline, PROMPT, negative_prompt=NEGATIVE, guidance_scale=cfg - 1, sigmas=sigmas, latents=library_pack(latents), max_sequence_length=64
    )


def encode(engine: Any) -> list[dict[str, Tensor]]:
    return [engine.get_learned_conditioning(Prompts([prompt])) for prompt in (PROMPT, NEGATIVE)]


def ours(engine: Any, sampler: str = "Euler", cfg: float = CFG, sigmas: Tensor | None = None, start: Tensor = NOISE) -> Tensor:
    texts = encode(engine)
    return our_picture(engine, sampler, shifted_sigmas(engine) if sigmas is None else sigmas, start, texts[0], cfg=cfg, uncond=texts[1])


def test_pictures_of_every_layout_are_the_pipeline_s(files: DitFiles) -> None:
    """Prompt and negative prompt have unlike lengths and run in one call. The pipeline pads between a prompt and its end, which get no place."""
    engine = load(files.checkpoint, files.modules)
    check_same(ours(engine), library_picture(files, "Euler", shifted_sigmas(engine), NOISE))


@pytest.mark.parametrize(("sampler", "cfg"), [("DPM++ 2M", CFG), ("Euler", 1.0)])
def test_a_multistep_sampler_and_turbo_s_scale_are_the_pipeline_s(original: DitFiles, sampler: str, cfg: float) -> None:
    engine = load(original.checkpoint, original.modules)
    check_same(ours(engine, sampler, cfg), library_picture(original, sampler, shifted_sigmas(engine), NOISE, cfg))


def test_img2img_is_the_pipeline_s_from_half_the_way_on(original: DitFiles) -> None:
    engine = load(original.checkpoint, original.modules)
    part, picture = shifted_sigmas(engine)[STEPS // 2 :], random_picture()
    std, mean = (torch.tensor(original.vae.config[name]).view(1, 16, 1, 1) for name in ("latents_std", "latents_mean"))
    with torch.no_grad():
        encoded = (original.vae.encode((picture * 2 - 1).unsqueeze(2)).latent_dist.mode().squeeze(2) - mean) / std
    start = start_from_picture(engine, picture, encoded, NOISE, part[0])
    check_same(ours(engine, sigmas=part, start=start), library_picture(original, "Euler", part, start))


def test_a_lora_gives_the_pipeline_s_picture(original: DitFiles) -> None:
    """A file with the original names, as trainers write them, against the library's network with W + strength * B A."""
    generator, file, transformer = torch.Generator().manual_seed(5), {}, deepcopy(original.transformer)
    for name, theirs, out_width in (("attn.wk", "attn.to_k", 32), ("attn.gate", "attn.to_gate", 64), ("mlp.up", "ff.up", 96)):
        for number in range(3):
            down, up = torch.randn(4, 64, generator=generator) * 0.2, torch.randn(out_width, 4, generator=generator) * 0.2
            file |= {f"diffusion_model.blocks.{number}.{name}.lora_A.weight": down, f"diffusion_model.blocks.{number}.{name}.lora_B.weight": up}
            transformer.get_submodule(f"transformer_blocks.{number}.{theirs}").weight.add_(0.7 * up @ down)
    engine = load(original.checkpoint, original.modules)
    plain, unet = ours(engine), engine.forge_objects.unet
    patches = match_lora(parse_lora("test", file), unet, None, model_family="Krea 2")
    assert patches.unmatched == () and len(patches.unet) == 9
    unet.add_patches(filename="test", patches=dict(patches.unet), strength_patch=0.7)
    unet.refresh_loras()
    changed = ours(engine)
    assert (changed - plain).abs().mean() > ONE_PIXEL_STEP
    check_same(changed, library_picture(replace(original, transformer=transformer), "Euler", shifted_sigmas(engine), NOISE))


def test_another_qwen3_is_not_taken_for_qwen3_vl(original: DitFiles, tmp_path: Path) -> None:
    """Qwen3-4B has the same widths; only the picture tower's tensors beside it tell Qwen3-VL."""
    tensors = {
        f"model.{key.removeprefix('language_model.')}": one for key, one in original.texts["qwen3_vl"].state_dict().items() if "visual" not in key
    }
    save_file({key: one.contiguous() for key, one in tensors.items()}, tmp_path / "qwen_3_4b.safetensors")
    with pytest.raises(CheckpointError, match=r"qwen_3_4b\.safetensors: was chosen as VAE / Text Encoder, but"):
        load(original.checkpoint, (original.modules[0], tmp_path / "qwen_3_4b.safetensors"))
    with pytest.raises(CheckpointError, match=r"needs a Qwen3-VL text encoder: put qwen3vl_4b_bf16\.safetensors \(8\.9 GB\)"):
        load(original.checkpoint, original.modules[:1])


def test_the_model_is_saved_as_one_file_that_loads(original: DitFiles, tmp_path: Path) -> None:
    """With a block's table in one row, as the original files have it."""
    engine = load(original.checkpoint, original.modules)
    check_saved(engine, tmp_path / "whole.safetensors")
