"""Whole Qwen-Image pictures against diffusers' pipelines: same files, same noise, same noise levels; texts, samplers, CFG with its rescaling,
decoder, references, a LoRA.

The pipelines run the very networks that the files were written from, their own text encoder included. fp32 throughout.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPlusPipeline, QwenImageImg2ImgPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from backend.checkpoint_file import CheckpointError
from backend.families.qwenimage.text import EDIT_TEMPLATE, RECIPES, TEMPLATE, is_first_edit
from backend.patcher.lora_files import match_lora, parse_lora
from backend.text_processing.picture_chat_engine import NoVisionError
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
    our_latents,
    our_picture,
    random_picture,
    shifted_sigmas,
    start_from_picture,
)
from tests.support.flux_checkpoints import write_flux
from tests.support.qwenimage_networks import library_pack, make_qwen_vae, text_tensors, wan_tensors, write_qwenimage
from tests.support.zimage_networks import qwen_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("on_the_cpu"),
]
NOISE = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
CFG = 3.0
PROMPT, NEGATIVE = "a red cat on a mat " * 6, "dark"
PICTURES = [np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8) for seed, height, width in ((1, 60, 90), (2, 80, 64))]
REFERENCES = [np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8) for seed, height, width in ((1, 64, 64), (2, 32, 128))]
"""Of sides that the pipeline keeps."""


@pytest.fixture(scope="module", params=LAYOUTS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DitFiles:
    return write_qwenimage(tmp_path_factory.mktemp("qwenimage"), request.param)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> DitFiles:
    return write_qwenimage(tmp_path_factory.mktemp("qwenimage"))


def make_pipeline(files: DitFiles, kind: Any, sampler: str, sigmas: Tensor, **parts: Any) -> Any:
    return kind(
        scheduler=make_scheduler(sampler, sigmas), vae=files.vae, transformer=files.transformer, text_encoder=files.texts["qwen25_vl"],
        tokenizer=qwen_tokenizer(), **parts,
    )  # fmt: skip


def library_picture(files: DitFiles, kind: Any, sampler: str, sigmas: Tensor, cfg: float = CFG, **fields: Any) -> Tensor:
    pipeline = make_pipeline(files, kind, sampler, sigmas)
    return flow_pictures.library_picture(pipeline, PROMPT, negative_prompt=NEGATIVE, true_cfg_scale=cfg, sigmas=sigmas, **fields)


def encode(engine: Any, pictures: tuple[np.ndarray, ...] = ()) -> list[dict[str, Tensor]]:
    found = []
    for prompt in (PROMPT, NEGATIVE):
        prompts = Prompts([prompt])
        prompts.pictures = pictures
        found.append(engine.get_learned_conditioning(prompts))
    return found


def our_guided_picture(engine: Any, sampler: str = "Euler", cfg: float = CFG) -> Tensor:
    texts, sigmas = encode(engine), shifted_sigmas(engine)
    return our_picture(engine, sampler, sigmas, NOISE, texts[0], cfg=cfg, uncond=texts[1])


def test_pictures_of_every_layout_are_the_pipeline_s(files: DitFiles) -> None:
    """Prompt and negative prompt have unlike lengths and run in one call; CFG keeps the length of each token's flow."""
    engine = load(files.checkpoint, files.modules)
    library = library_picture(files, QwenImagePipeline, "Euler", shifted_sigmas(engine), latents=library_pack(NOISE))
    check_same(our_guided_picture(engine), library)


@pytest.mark.parametrize(("sampler", "cfg"), [("DPM++ 2M", CFG), ("Euler", 1.0)])
def test_a_multistep_sampler_and_cfg_of_one_are_the_pipeline_s(original: DitFiles, sampler: str, cfg: float) -> None:
    engine = load(original.checkpoint, original.modules)
    library = library_picture(original, QwenImagePipeline, sampler, shifted_sigmas(engine), cfg, latents=library_pack(NOISE))
    check_same(our_guided_picture(engine, sampler, cfg), library)


def test_without_rescaling_cfg_gives_another_picture(original: DitFiles) -> None:
    engine = load(original.checkpoint, original.modules)
    rescaled = our_guided_picture(engine)
    del engine.forge_objects.unet.model_options["guidance_rescale"]
    assert (our_guided_picture(engine) - rescaled).abs().mean() > 0.2 * ONE_PIXEL_STEP, "ten times the tolerance of these tests"


def test_img2img_is_the_pipeline_s(original: DitFiles) -> None:
    """From half the way on, with the VAE's means and deviations by channel."""
    engine = load(original.checkpoint, original.modules)
    texts, sigmas, picture = encode(engine), shifted_sigmas(engine), random_picture()
    part = sigmas[STEPS // 2 :]
    pipeline = make_pipeline(original, QwenImageImg2ImgPipeline, "Euler", sigmas)
    with torch.no_grad():
        encoded = pipeline._encode_vae_image((picture * 2 - 1).unsqueeze(2), torch.Generator().manual_seed(0)).squeeze(2)
    start = start_from_picture(engine, picture, encoded, NOISE, part[0])
    library = library_picture(original, QwenImageImg2ImgPipeline, "Euler", sigmas, image=picture, strength=0.5, latents=library_pack(start))
    check_same(our_picture(engine, "Euler", part, start, texts[0], cfg=CFG, uncond=texts[1]), library)


def test_a_lora_gives_the_pipeline_s_picture(original: DitFiles) -> None:
    """A file in the trainers' usual spelling, read by the library's own loader for the one picture and by ours for the other."""
    generator, file = torch.Generator().manual_seed(5), {}
    for name in ("to_q", "add_v_proj", "to_out.0"):
        for number in range(3):
            layer = f"transformer_blocks.{number}.attn.{name}"
            file[f"transformer.{layer}.lora_A.weight"] = torch.randn(4, 48, generator=generator) * 0.2
            file[f"transformer.{layer}.lora_B.weight"] = torch.randn(48, 4, generator=generator) * 0.2
    engine = load(original.checkpoint, original.modules)
    plain = our_guided_picture(engine)
    unet = engine.forge_objects.unet
    patches = match_lora(parse_lora("test", file), unet, None, model_family="Qwen-Image")
    assert patches.unmatched == () and len(patches.unet) == 9
    unet.add_patches(filename="test", patches=dict(patches.unet), strength_patch=0.7)
    unet.refresh_loras()
    ours = our_guided_picture(engine)
    assert (ours - plain).abs().mean() > ONE_PIXEL_STEP
    sigmas = shifted_sigmas(engine)
    merged = write_merged(original, file, 0.7)
    check_same(ours, library_picture(merged, QwenImagePipeline, "Euler", sigmas, latents=library_pack(NOISE)))


def write_merged(files: DitFiles, file: dict[str, Tensor], strength: float) -> DitFiles:
    """The library's network with W + strength * B A."""
    transformer = deepcopy(files.transformer)
    for key, down in file.items():
        if key.endswith(".lora_A.weight"):
            layer = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            transformer.get_submodule(layer).weight.add_(strength * file[key.replace("lora_A", "lora_B")] @ down)
    return replace(files, transformer=transformer)


# references


def library_inputs(pictures: list[np.ndarray], prompt: str, label: str, area_px: int) -> dict[str, Tensor]:
    """The encoder's inputs by transformers' own processing of pictures, sizes as the pipeline computes them, and text put together by hand."""
    shown = []
    for picture in pictures:
        width, height = pipeline_qwenimage_edit_plus.calculate_dimensions(area_px, picture.shape[1] / picture.shape[0])
        shown.append(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 16384)
    pixels = processor(images=shown, return_tensors="pt")
    text = "".join(
        label.format(number) + "<|vision_start|>" + "<|image_pad|>" * int(grid.prod() // 4) + "<|vision_end|>"
        for number, grid in enumerate(pixels["image_grid_thw"], 1)
    )
    ids = qwen_tokenizer()([EDIT_TEMPLATE.before + text + prompt + EDIT_TEMPLATE.after], return_tensors="pt").input_ids
    return {"input_ids": ids, **pixels, "mm_token_type_ids": (ids == 151_655).int()}


def library_features(files: DitFiles, pictures: list[np.ndarray], prompt: str, label: str, area_px: int) -> Tensor:
    """transformers' features of the last layer, with the places of pictures, which the pipeline's call leaves out with this transformers."""
    inputs = library_inputs(pictures, prompt, label, area_px)
    with torch.no_grad():
        found = files.texts["qwen25_vl"](**inputs, output_hidden_states=True).hidden_states[-1]
    return found[:, EDIT_TEMPLATE.num_dropped :]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["qwen_image_edit_2509", "qwen_image_edit"])
def test_the_encoder_sees_pictures_as_transformers_does(tmp_path: Path, name: str) -> None:
    """Two small pictures with numbers for later models, one larger one without for the first."""
    files = write_qwenimage(tmp_path, name=name)
    engine = load(files.checkpoint, files.modules)
    recipe = RECIPES[is_first_edit(str(files.checkpoint))]
    pictures = PICTURES if name.endswith("2509") else PICTURES[:1]
    if not name.endswith("2509"):  # a quarter of the published area, for time
        recipe = type(recipe)(template=recipe.template, label=recipe.label, area_px=recipe.area_px // 4)
        engine.text_engines[1].with_pictures = recipe
    assert engine.is_edit_model
    for text, prompt in zip(encode(engine, tuple(pictures)), (PROMPT, NEGATIVE)):
        wanted = library_features(files, pictures, prompt, recipe.label, recipe.area_px)
        torch.testing.assert_close(text["crossattn"].float(), wanted, atol=2e-4, rtol=1e-4)
        assert text["text_lengths"].tolist() == [wanted.shape[1]]


@pytest.mark.parametrize("name", ["qwen_image_edit_2509", "qwen_image_edit_2511"])
def test_references_give_the_pipeline_s_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Two references of unlike sides, which the pipeline encodes itself; 2511's get the modulation of time 0."""
    files = write_qwenimage(tmp_path, name=name, zero_cond_t=name.endswith("2511"))
    engine = load(files.checkpoint, files.modules)
    texts, sigmas = encode(engine, tuple(REFERENCES)), shifted_sigmas(engine)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64)
    pipeline = make_pipeline(files, QwenImageEditPlusPipeline, "Euler", sigmas, processor=None)
    features = [library_features(files, REFERENCES, prompt, RECIPES[0].label, RECIPES[0].area_px) for prompt in (PROMPT, NEGATIVE)]
    library = flow_pictures.library_picture(
        pipeline, [Image.fromarray(picture) for picture in REFERENCES], prompt_embeds=features[0], negative_prompt_embeds=features[1],
        true_cfg_scale=CFG, latents=library_pack(NOISE), sigmas=sigmas,
    )  # fmt: skip
    pixels = [torch.from_numpy(picture).movedim(-1, 0)[None].float() / 127.5 - 1 for picture in REFERENCES]
    without = our_latents(engine, "Euler", sigmas, NOISE, texts[0], cfg=CFG, uncond=texts[1])
    engine.forge_objects.unet.set_reference_latents([engine.encode_first_stage(one) for one in pixels])
    check_same(our_picture(engine, "Euler", sigmas, NOISE, texts[0], cfg=CFG, uncond=texts[1]), library)
    assert (our_latents(engine, "Euler", sigmas, NOISE, texts[0], cfg=CFG, uncond=texts[1]) - without).abs().mean() > 2e-3


def test_templates_drop_the_instruction_alone() -> None:
    for template in (TEMPLATE, EDIT_TEMPLATE):
        tokens = qwen_tokenizer()(template.before).input_ids
        assert qwen_tokenizer().decode(tokens[template.num_dropped - 3 : template.num_dropped]) == "<|im_start|>user\n"


# files


def test_what_is_missing_or_wrong_is_said_by_name(original: DitFiles, tmp_path: Path) -> None:
    text = original.modules[1]
    with pytest.raises(CheckpointError) as refused:
        load(original.checkpoint, ())
    assert str(refused.value) == (
        "qwen_image.safetensors needs a Qwen2.5-VL text encoder and a VAE: put qwen_2.5_vl_7b_fp8_scaled.safetensors (9.4 GB) into "
        "models/text_encoder and qwen_image_vae.safetensors (0.25 GB) into models/VAE and choose them under 'VAE / Text Encoder', or use a "
        "checkpoint that has them."
    )
    flux = write_flux(tmp_path / "flux", "original", name="flux")
    wrong = next(path for path in flux.modules if path.parent.name == "VAE")
    with pytest.raises(CheckpointError, match=r"is a VAE of another family of models; Qwen-Image needs qwen_image_vae\.safetensors"):
        load(original.checkpoint, (wrong, text))
    for tensors in (wan_tensors(make_qwen_vae()), make_qwen_vae().state_dict()):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match=r"other\.safetensors: was chosen .* but is the VAE of Qwen-Image and Wan 2\.1"):
            load(flux.checkpoint, (tmp_path / "other.safetensors",))


def test_an_encoder_in_fp8_sees_pictures_too(tmp_path: Path) -> None:
    """Reference: the same numbers, rounded to fp8, in fp32."""
    files = write_qwenimage(tmp_path, name="qwen_image_edit_2509")
    tensors = text_tensors(files.texts["qwen25_vl"])
    stored = {key: tensor.to(torch.float8_e4m3fn) if tensor.ndim > 1 else tensor.contiguous() for key, tensor in tensors.items()}
    found = []
    for name, file in (("fp8", stored), ("fp32", {key: tensor.float() for key, tensor in stored.items()})):
        save_file(file, tmp_path / f"{name}.safetensors")
        engine = load(files.checkpoint, (files.modules[0], tmp_path / f"{name}.safetensors"))
        found.append(encode(engine, tuple(PICTURES[:1]))[1]["crossattn"])
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


def test_an_encoder_without_its_tower_reads_prompts_and_says_what_it_lacks(original: DitFiles, tmp_path: Path) -> None:
    tensors = text_tensors(original.texts["qwen25_vl"])
    save_file({key: tensor.contiguous() for key, tensor in tensors.items() if "visual" not in key}, tmp_path / "text.safetensors")
    engine = load(original.checkpoint, (original.modules[0], tmp_path / "text.safetensors"))
    assert torch.equal(encode(engine)[0]["crossattn"], encode(load(original.checkpoint, original.modules))[0]["crossattn"])
    with pytest.raises(NoVisionError, match="has no picture tower"):
        encode(engine, tuple(PICTURES))


def test_the_model_is_saved_as_one_file_that_loads(tmp_path: Path) -> None:
    files = write_qwenimage(tmp_path, name="qwen_image_edit_2511", zero_cond_t=True)
    engine = load(files.checkpoint, files.modules)
    again = check_saved(engine, tmp_path / "whole.safetensors")
    assert again.forge_objects.unet.model.diffusion_model.config.zero_cond_t, "though the name does not say so"
