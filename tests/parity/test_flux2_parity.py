"""Whole Flux.2-klein pictures against diffusers' Flux2KleinPipeline: same files, same noise, same noise levels; texts, samplers, CFG, references,
LoRA, and the VAE's folded and normalized latents.

The pipeline runs the very networks that the files were written from, its own text encoder included. fp32 throughout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from torch import Tensor

from backend.checkpoint_file import CheckpointError
from backend.patcher.lora_files import match_lora, parse_lora
from modules.processing.latents import pil_to_pixels
from tests.support.dit_checkpoints import LAYOUTS, DitFiles, save
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
from tests.support.flux2_networks import make_flux2_vae, original_vae, write_flux2
from tests.support.flux_networks import make_vae
from tests.support.zimage_networks import qwen_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("on_the_cpu"),
]
NOISE = torch.randn(1, 128, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(3))
CFG = 3.0
PROMPT = "a red cat on a mat " * 6
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The published template for a question that is answered without thinking."""


@pytest.fixture(scope="module", params=LAYOUTS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DitFiles:
    return write_flux2(tmp_path_factory.mktemp("flux2"), request.param)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> DitFiles:
    return write_flux2(tmp_path_factory.mktemp("flux2"))


def klein_picture(files: DitFiles, sampler: str, sigmas: Tensor, cfg: float = CFG, transformer: Any = None, **fields: Any) -> Tensor:
    """The pipeline's negative prompt is always empty."""
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = TEMPLATE
    pipeline = Flux2KleinPipeline(
        scheduler=make_scheduler(sampler, sigmas), vae=files.vae, transformer=transformer or files.transformer, text_encoder=files.texts["qwen3"],
        tokenizer=tokenizer,
    )  # fmt: skip
    fields = {"prompt": PROMPT, "guidance_scale": cfg, "text_encoder_out_layers": (1, 2, 3), **fields}
    return library_picture(pipeline, sigmas=sigmas, **fields)


def encode(engine: Any) -> list[dict[str, Tensor]]:
    return [engine.get_learned_conditioning(Prompts([prompt])) for prompt in (PROMPT, "")]


def check_picture(files: DitFiles, sampler: str = "Euler", cfg: float = CFG) -> None:
    engine = load(files.checkpoint, files.modules)
    texts, sigmas = encode(engine), shifted_sigmas(engine)
    assert texts[0]["crossattn"].shape == (1, 512, 48)
    library = klein_picture(files, sampler, sigmas, cfg, latents=NOISE)
    check_same(our_picture(engine, sampler, sigmas, NOISE, texts[0], cfg=cfg, uncond=texts[1]), library)


def test_pictures_of_every_layout_are_the_pipeline_s(files: DitFiles) -> None:
    check_picture(files)


@pytest.mark.parametrize(("sampler", "cfg"), [("DPM++ 2M", CFG), ("Euler", 1.0)])
def test_a_multistep_sampler_and_the_distilled_model_s_scale_are_the_pipeline_s(original: DitFiles, sampler: str, cfg: float) -> None:
    check_picture(original, sampler, cfg)


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M"])
def test_img2img_is_the_pipeline_s(original: DitFiles, sampler: str) -> None:
    """From half the way on. The library has no pipeline for it, so it is given the first latents."""
    engine = load(original.checkpoint, original.modules)
    texts, part, picture = encode(engine), shifted_sigmas(engine)[STEPS // 2 :], random_picture()
    with torch.no_grad():
        encoded = Flux2KleinPipeline._patchify_latents(original.vae.encode(picture * 2 - 1).latent_dist.mode())
        bn = original.vae.bn
        encoded = (encoded - bn.running_mean[:, None, None]) / (bn.running_var[:, None, None] + 1e-4).sqrt()
    start = start_from_picture(engine, picture, encoded, NOISE, part[0])
    library = klein_picture(original, sampler, part, latents=start)
    check_same(our_picture(engine, sampler, part, start, texts[0], cfg=CFG, uncond=texts[1]), library)


@pytest.mark.parametrize(("sampler", "count"), [("Euler", 1), ("DPM++ 2M", 2)])
def test_references_are_read_as_the_pipeline_does(original: DitFiles, sampler: str, count: int) -> None:
    """References of other sizes than the picture's, seen by both branches."""
    engine = load(original.checkpoint, original.modules)
    texts, sigmas = encode(engine), shifted_sigmas(engine)
    sizes = [(320, 256), (128, 256)][:count]
    pixels = [random_picture(seed, height=height, width=width)[0] for seed, (width, height) in enumerate(sizes)]
    pictures = [Image.fromarray((one.movedim(0, -1) * 255).byte().numpy()) for one in pixels]
    library = klein_picture(original, sampler, sigmas, latents=NOISE, image=pictures)
    unet = engine.forge_objects.unet = engine.forge_objects.unet.clone()
    unet.set_reference_latents([engine.encode_first_stage(pil_to_pixels([one]) * 2 - 1) for one in pictures])
    ours = our_picture(engine, sampler, sigmas, NOISE, texts[0], cfg=CFG, uncond=texts[1])
    check_same(ours, library)
    unet.set_reference_latents([])
    without = our_picture(engine, sampler, sigmas, NOISE, texts[0], cfg=CFG, uncond=texts[1])
    assert (without - ours).abs().mean() > 0.2 * ONE_PIXEL_STEP, "ten times what counts as the same: 512 tokens of text outweigh those of pictures"


def test_a_lora_makes_the_picture_of_hand_merged_weights(original: DitFiles, tmp_path: Path) -> None:
    """A kohya file over the fused matrices of the original layout; the library runs the network with up @ down added to its parts."""
    engine = load(original.checkpoint, original.modules)
    texts, sigmas = encode(engine), shifted_sigmas(engine)
    generator = torch.Generator().manual_seed(9)
    merged, file = write_flux2(tmp_path).transformer, {}
    for block, attn in enumerate(one.attn for one in merged.transformer_blocks):
        up, down = torch.randn(3 * 48, 2, generator=generator) * 0.3, torch.randn(2, 48, generator=generator) * 0.3
        name = f"lora_unet_double_blocks_{block}_img_attn_qkv"
        file |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(1.0)}
        for part, layer in zip((up @ down * 0.5).chunk(3), (attn.to_q, attn.to_k, attn.to_v)):
            layer.weight += part
    for block, attn in enumerate(one.attn for one in merged.single_transformer_blocks):
        up, down = torch.randn(attn.to_qkv_mlp_proj.out_features, 2, generator=generator) * 0.3, torch.randn(2, 48, generator=generator) * 0.3
        name = f"diffusion_model.single_blocks.{block}.linear1"
        file |= {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
        attn.to_qkv_mlp_proj.weight += up @ down
    unet = engine.forge_objects.unet = engine.forge_objects.unet.clone()
    matched = match_lora(parse_lora("bold", file), unet, None, model_family="Flux.2-klein")
    assert matched.unmatched == ()
    plain = our_picture(engine, "Euler", sigmas, NOISE, texts[0], cfg=CFG, uncond=texts[1])
    unet.add_patches(filename="bold", patches=dict(matched.unet), strength_patch=1.0)
    unet.refresh_loras()
    ours = our_picture(engine, "Euler", sigmas, NOISE, texts[0], cfg=CFG, uncond=texts[1])
    check_same(ours, klein_picture(original, "Euler", sigmas, transformer=merged, latents=NOISE))
    assert (ours - plain).abs().mean() > ONE_PIXEL_STEP


def test_what_is_missing_and_what_is_wrong_is_said(original: DitFiles, tmp_path: Path) -> None:
    vae, qwen = original.modules
    with pytest.raises(CheckpointError) as refused:
        load(original.checkpoint, (vae,))
    assert str(refused.value) == (
        "flux-2-klein-4b.safetensors needs a Qwen3 text encoder: put qwen_3_4b.safetensors (8.0 GB; for klein 9B qwen_3_8b.safetensors, 15.1 GB) "
        "into models/text_encoder and choose it under 'VAE / Text Encoder', or use a checkpoint that has one."
    )
    with pytest.raises(CheckpointError, match=r"needs a VAE: put flux2-vae\.safetensors \(0\.34 GB\) into models/VAE"):
        load(original.checkpoint, (qwen,))
    save(tmp_path / "ae.safetensors", make_vae().state_dict())
    with pytest.raises(CheckpointError, match=r"16 latent channels; Flux\.2-klein needs one with 32. 16 channels belong to Flux and SD3"):
        load(original.checkpoint, (tmp_path / "ae.safetensors", qwen))
    for change, what in (
        ({}, r"no bn\.running_var"),
        ({"bn.running_var": torch.ones(64)}, r"a misshapen bn\.running_var"),
        ({"bn.running_var": torch.full((128,), float("nan"))}, "are no numbers"),
    ):
        tensors = {key: one for key, one in make_flux2_vae().state_dict().items() if not key.startswith("bn.") or key.endswith("mean")}
        save(tmp_path / "without.safetensors", {**tensors, **change})
        with pytest.raises(CheckpointError, match=rf"without\.safetensors: .*{what}"):
            load(original.checkpoint, (tmp_path / "without.safetensors", qwen))


def test_a_narrower_decoder_is_loaded(original: DitFiles, tmp_path: Path) -> None:
    """The published small decoder has other widths than its encoder. In both layouts."""
    small = make_flux2_vae(block_out_channels=(32, 64, 64, 64), decoder_block_out_channels=(32, 32, 64, 64))
    z = torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    for tensors in (original_vae(small), small.state_dict()):
        save(tmp_path / "small.safetensors", tensors)
        engine = load(original.checkpoint, (tmp_path / "small.safetensors", original.modules[1]))
        with torch.no_grad():
            torch.testing.assert_close(engine.first_stage_model.decode(z).sample, small.decode(z).sample)


def test_the_model_is_saved_as_one_file_that_loads(original: DitFiles, tmp_path: Path) -> None:
    engine = load(original.checkpoint, original.modules)
    again = check_saved(engine, tmp_path / "whole.safetensors")
    assert again.latent_format == engine.latent_format and again.latent_format.shift != 0.0
