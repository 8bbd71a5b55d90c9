"""Whole Flux.1 pictures against diffusers' FluxPipeline: same files, same noise, same noise levels, same text features; sampler, guidance, decoder.

The pipeline runs the very networks that the files were written from; ours are loaded from the files. Text features are our engine's own (T5 and CLIP
have tests against transformers). fp32 throughout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxPipeline,
)
from torch import Tensor

from backend.diffusion_engine.base import ForgeDiffusionEngine
from backend.families.inpainting import mask_behind_picture
from tests.support import flow_pictures
from tests.support.flow_pictures import (
    ONE_PIXEL_STEP,
    SIDE,
    STEPS,
    Prompts,
    check_same,
    check_saved,
    make_scheduler,
    our_picture,
    random_picture,
    shifted_sigmas,
    start_from_picture,
)
from tests.support.flux_checkpoints import LAYOUTS, FluxFiles, write_flux

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("on_the_cpu"),
]


def load(tmp_path: Path, layout: str = "original", **changes: Any) -> tuple[FluxFiles, ForgeDiffusionEngine]:
    files = write_flux(tmp_path, layout, **changes)
    return files, flow_pictures.load(files.checkpoint, files.modules)


def library_picture(files: FluxFiles, kind: Any, scheduler: Any, text: dict[str, Tensor], sigmas: Tensor, guidance: float, **fields: Any) -> Tensor:
    pipeline = kind(
        scheduler=scheduler, vae=files.vae, transformer=files.flux, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None
    )
    embeds = {"prompt_embeds": text["crossattn"], "pooled_prompt_embeds": text["vector"]}
    return flow_pictures.library_picture(pipeline, sigmas=sigmas, guidance_scale=guidance, **embeds, **fields)


def pack(x: Tensor) -> Tensor:
    return FluxPipeline._pack_latents(x, *x.shape)  # type: ignore[no-any-return]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M"])
def test_pictures_are_the_pipeline_s(tmp_path: Path, layout: str, sampler: str) -> None:
    files, engine = load(tmp_path, layout)
    prompts = Prompts(["a red cat", "a green dog"])
    prompts.distilled_cfg_scale = 4.5
    text = engine.get_learned_conditioning(prompts)
    assert isinstance(text, dict) and text["guidance"].tolist() == [4.5, 4.5]
    sigmas = shifted_sigmas(engine)
    noise = torch.randn(2, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    library = library_picture(files, FluxPipeline, make_scheduler(sampler, sigmas), text, sigmas, 4.5, latents=pack(noise))
    ours = our_picture(engine, sampler, sigmas, noise, text)
    check_same(ours, library)
    text["guidance"] = text["guidance"] * 2
    assert (our_picture(engine, sampler, sigmas, noise, text) - ours).abs().mean() > ONE_PIXEL_STEP, "guidance acts"


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M"])
def test_schnell_is_the_pipeline_s(tmp_path: Path, sampler: str) -> None:
    files, engine = load(tmp_path, guidance_embeds=False)
    text = engine.get_learned_conditioning(Prompts(["a red cat"]))
    assert isinstance(text, dict) and not engine.use_distilled_cfg_scale and "guidance" not in text
    sigmas = shifted_sigmas(engine)
    noise = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    library = library_picture(files, FluxPipeline, make_scheduler(sampler, sigmas), text, sigmas, 0.0, latents=pack(noise))
    check_same(our_picture(engine, sampler, sigmas, noise, text), library)


def test_true_guidance_is_the_pipeline_s(tmp_path: Path) -> None:
    """With a CFG scale above 1 the negative prompt acts, as in the library's true CFG."""
    files, engine = load(tmp_path)
    text, negative = (engine.get_learned_conditioning(Prompts([prompt])) for prompt in ("a red cat", "dark"))
    assert isinstance(text, dict) and isinstance(negative, dict)
    sigmas = shifted_sigmas(engine)
    noise = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    extra = {"negative_prompt_embeds": negative["crossattn"], "negative_pooled_prompt_embeds": negative["vector"], "true_cfg_scale": 3.0}
    library = library_picture(files, FluxPipeline, make_scheduler("Euler", sigmas), text, sigmas, 3.5, latents=pack(noise), **extra)
    check_same(our_picture(engine, "Euler", sigmas, noise, text, cfg=3.0, uncond=negative), library)


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M"])
def test_img2img_starts_and_ends_as_the_pipeline_s(tmp_path: Path, sampler: str) -> None:
    """From half the way on: (1 - t) x0 + t * noise."""
    files, engine = load(tmp_path)
    text = engine.get_learned_conditioning(Prompts(["a red cat"]))
    assert isinstance(text, dict)
    sigmas = shifted_sigmas(engine)
    picture, noise = random_picture(), torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(4))
    part = sigmas[STEPS // 2 :]
    with torch.no_grad():
        encoded = (files.vae.encode(picture * 2 - 1).latent_dist.mode() - 0.1159) * 0.3611
    start = start_from_picture(engine, picture, encoded, noise, part[0])
    if sampler == "Euler":  # the library's pipeline from the picture on, with its own encoding and start
        library = library_picture(
            files, FluxImg2ImgPipeline, make_scheduler(sampler, sigmas), text, sigmas, 3.5, image=picture, strength=0.5, latents=pack(start)
        )
    else:
        library = library_picture(files, FluxPipeline, make_scheduler(sampler, part), text, part, 3.5, latents=pack(start))
    check_same(our_picture(engine, sampler, part, start, text), library)


def test_fill_is_the_pipeline_s(tmp_path: Path) -> None:
    """Channels of a Fill model: latents, the masked picture's latents, and the mask's pixels."""
    files, engine = load(tmp_path, in_channels=384, out_channels=64)
    assert engine.is_inpaint
    text = engine.get_learned_conditioning(Prompts(["a red cat"]))
    assert isinstance(text, dict)
    sigmas = shifted_sigmas(engine)
    generator = torch.Generator().manual_seed(4)
    picture = torch.rand(1, 3, 8 * SIDE, 8 * SIDE, generator=generator)
    noise = torch.randn(1, 16, SIDE, SIDE, generator=generator)
    mask = torch.zeros(1, 1, 8 * SIDE, 8 * SIDE)
    mask[..., 5:41, : 4 * SIDE + 3] = 1.0
    with torch.no_grad():
        masked = (files.vae.encode((picture * 2 - 1) * (1 - mask)).latent_dist.mode() - 0.1159) * 0.3611
    given = {"image": picture, "mask_image": mask, "latents": pack(noise), "strength": 1.0}
    library = library_picture(files, FluxFillPipeline, make_scheduler("Euler", sigmas), text, sigmas, 3.5, **given)
    image_cond = mask_behind_picture(mask, masked, factor=8)
    check_same(our_picture(engine, "Euler", sigmas, noise, text, image_cond=image_cond), library)


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M"])
def test_kontext_reads_a_reference_as_the_pipeline_does(tmp_path: Path, sampler: str) -> None:
    """A reference of another size than the picture; true CFG, where both branches see it."""
    files, engine = load(tmp_path)
    text, negative = (engine.get_learned_conditioning(Prompts([prompt] * 2)) for prompt in ("a red cat", "dark"))
    assert isinstance(text, dict) and isinstance(negative, dict)
    sigmas, generator = shifted_sigmas(engine), torch.Generator().manual_seed(4)
    picture, noise = torch.rand(1, 3, 6 * SIDE, 10 * SIDE, generator=generator), torch.randn(2, 16, SIDE, SIDE, generator=generator)
    extra = {"negative_prompt_embeds": negative["crossattn"], "negative_pooled_prompt_embeds": negative["vector"], "true_cfg_scale": 2.0}
    with torch.no_grad():
        reference = (files.vae.encode(picture[..., :48, :80] * 2 - 1).latent_dist.mode() - 0.1159) * 0.3611
    given = {"image": reference, "latents": pack(noise), "_auto_resize": False, "max_area": (8 * SIDE) ** 2, **extra}
    library = library_picture(files, FluxKontextPipeline, make_scheduler(sampler, sigmas), text, sigmas, 3.5, **given)
    unet = engine.forge_objects.unet = engine.forge_objects.unet.clone()
    unet.set_reference_latents([reference])
    ours = our_picture(engine, sampler, sigmas, noise, text, cfg=2.0, uncond=negative)
    check_same(ours, library)
    unet.set_reference_latents([])
    assert (our_picture(engine, sampler, sigmas, noise, text, cfg=2.0, uncond=negative) - ours).abs().mean() > ONE_PIXEL_STEP, "the reference acts"


def test_a_model_of_edges_or_depth_is_the_pipeline_s(tmp_path: Path) -> None:
    """Channels of a Canny or Depth model: the picture's latents, then those of the edges."""
    files, engine = load(tmp_path, in_channels=128, out_channels=64)
    assert not engine.is_inpaint and engine.takes_control_picture
    text = engine.get_learned_conditioning(Prompts(["a red cat"]))
    assert isinstance(text, dict)
    sigmas, generator = shifted_sigmas(engine), torch.Generator().manual_seed(4)
    noise, edges = torch.randn(1, 16, SIDE, SIDE, generator=generator), torch.randn(1, 16, SIDE, SIDE, generator=generator)
    library = library_picture(
        files, FluxControlPipeline, make_scheduler("Euler", sigmas), text, sigmas, 3.5, control_image=pack(edges), latents=pack(noise)
    )
    unet = engine.forge_objects.unet = engine.forge_objects.unet.clone()
    unet.extra_concat_condition = edges
    check_same(our_picture(engine, "Euler", sigmas, noise, text), library)


def test_the_model_is_saved_as_one_file_that_loads(tmp_path: Path) -> None:
    _, engine = load(tmp_path)
    check_saved(engine, tmp_path / "whole.safetensors")
