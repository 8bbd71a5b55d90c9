"""img2img: resizes the picture and its mask, encodes, samples, and keeps overlays for pasting back.

Shapes: B pictures, C channels, H W rows and columns. prepare_img2img fills the request (`p`) before the first batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from modules.errors import RequestError
from modules.pictures import images, masking
from modules.pictures.resizing import flatten, plain
from modules.processing.compositing import blur_mask, create_binary_mask, overlay_of, paste_box, setup_color_correction
from modules.processing.image_conditions import condition_on_picture
from modules.processing.latents import encode_pixels, latent_format_of, mask_to_latent, pil_to_pixels, upscale_latent
from modules.processing.networks import prepare_networks, run_sampling_hook
from modules.processing.overrides import step_of
from modules.processing.refiner import refining
from modules.processing.saving import save_or_comment
from modules.samplers import noise as rng
from modules.samplers import registry
from modules.scripts.hook_arguments import MaskBlendArgs

if TYPE_CHECKING:
    from modules.processing.request import StableDiffusionProcessingImg2Img

JUST_RESIZE, LATENT_RESIZE = 0, 3
FILL, ORIGINAL, LATENT_NOISE, LATENT_NOTHING = 0, 1, 2, 3


def prepare_img2img(p: StableDiffusionProcessingImg2Img) -> None:
    """Set everything that all batches share. Raises RequestError."""
    p.extra_generation_params["Denoising strength"] = p.denoising_strength
    crop = _prepare_mask(p)
    p.run_hook_with("before_process_init_images", {"crop_region": crop, "image_mask": p.image_mask})
    prepared = _prepare_pictures(p, crop)
    p.sampler = registry.create_sampler(p.sampler_name, p.sd_model)
    pixels_BCHW = pil_to_pixels(_one_for_each(p, prepared))
    p.init_latent = _encode(p, pixels_BCHW)
    _prepare_latent_mask(p)
    mask = p.image_mask if p.image_mask is not None and p.image_mask.size == (p.width, p.height) else None
    condition = step_of(p, "img2img_image_conditioning", condition_on_picture)
    p.image_conditioning = condition(pixels_BCHW * 2 - 1, p.init_latent, mask, p.mask_round)


# Mask


def _prepare_mask(p: StableDiffusionProcessingImg2Img) -> masking.Box | None:
    """Set p.image_mask and p.mask_for_overlay. Returns the region to work on for "only masked", else None."""
    if p.image_mask is None:
        return None
    mask = inpaint_mask(p)
    if p.inpainting_mask_invert:
        p.extra_generation_params["Mask mode"] = "Inpaint not masked"
    if p.mask_blur_x > 0 or p.mask_blur_y > 0:
        p.extra_generation_params["Mask blur"] = p.mask_blur if p.mask_blur is not None else f"{p.mask_blur_x}x{p.mask_blur_y}"
    p.image_mask = p.mask_for_overlay = mask
    if p.inpaint_full_res:
        return _only_masked(p, mask)
    _whole_picture(p, mask)
    return None


def inpaint_mask(p: StableDiffusionProcessingImg2Img, *, blurred: bool = True) -> Image.Image:
    """The request's mask (L), white where the picture is repainted. For "only masked", pass it at the size of the picture it is cropped from."""
    mask = create_binary_mask(plain(p.image_mask), round=p.mask_round)
    if p.inpaint_full_res and p.init_images and mask.size != p.init_images[0].size:
        mask = mask.resize(p.init_images[0].size, Image.Resampling.BILINEAR)
    mask = masking.drop_background(ImageOps.invert(mask) if p.inpainting_mask_invert else mask)
    if blurred and (p.mask_blur_x > 0 or p.mask_blur_y > 0):
        mask = blur_mask(mask, p.mask_blur_x, p.mask_blur_y)
    return mask


def only_masked_region(p: StableDiffusionProcessingImg2Img, mask: Image.Image) -> masking.Box | None:
    """The "only masked" box for a mask from inpaint_mask(); None if nothing is masked. ControlNet hints are cropped by it too."""
    region = masking.get_crop_region_v2(mask, p.inpaint_full_res_padding)
    return None if region is None else masking.expand_crop_region(region, p.width, p.height, mask.width, mask.height)


def _whole_picture(p: StableDiffusionProcessingImg2Img, mask: Image.Image) -> None:
    p.image_mask = images.resize_image(min(p.resize_mode, 2), mask, p.width, p.height)
    p.mask_for_overlay = _grown_mask(p.image_mask)


def _only_masked(p: StableDiffusionProcessingImg2Img, mask: Image.Image) -> masking.Box | None:
    p.extra_generation_params["Inpaint area"] = "Only masked"
    p.extra_generation_params["Masked area padding"] = p.inpaint_full_res_padding
    region = only_masked_region(p, mask)
    if region is None:
        p.comment("Nothing is masked, so the picture stays unchanged. Paint over the part to repaint.")
        _whole_picture(p, mask)
        return None
    p.image_mask = images.resize_image(JUST_RESIZE, mask.crop(region), p.width, p.height)
    p.paste_to = paste_box(region)
    return region


def _grown_mask(mask: Image.Image) -> Image.Image:
    """The mask for pasting back over the whole picture: doubled, so that blurred edges are not cut off."""
    return Image.fromarray(np.clip(np.asarray(mask, dtype=np.float32) * 2, 0, 255).astype(np.uint8))


# Pictures


def _prepare_pictures(p: StableDiffusionProcessingImg2Img, crop: masking.Box | None) -> list[Image.Image]:
    """The initial pictures at the job's size, RGB, with masked parts filled. Also stores overlays and colors."""
    if not p.init_images:
        raise RequestError("img2img needs a picture to start from: init_images is empty.")
    match_colors = p.color_corrections is None and p.options.img2img_color_correction
    masked = p.image_mask is not None
    _fit_latent_mask(p, crop)
    p.color_corrections = [] if match_colors else p.color_corrections
    p.overlay_images = [] if masked else p.overlay_images
    prepared = []
    for picture in p.init_images:
        image = flatten(picture, p.options.img2img_background_color)
        _note_picture(p, picture, image)
        if crop is None and p.resize_mode != LATENT_RESIZE:
            image = images.resize_image(p.resize_mode, image, p.width, p.height)
        if masked:
            _keep_overlay(p, image)
        if crop is not None:
            image = images.resize_image(2, image.crop(crop), p.width, p.height)
        if masked and p.inpainting_fill == FILL:
            image = masking.fill(image, p.latent_mask or p.image_mask)
        if match_colors and p.color_corrections is not None:
            p.color_corrections.append(setup_color_correction(image))
        prepared.append(image)
    if masked:
        p.extra_generation_params["Masked content"] = ("fill", None, "latent noise", "latent nothing")[p.inpainting_fill]
    _same_size(prepared)
    return prepared


def _fit_latent_mask(p: StableDiffusionProcessingImg2Img, crop: masking.Box | None) -> None:
    """If the latent mask has the initial picture's size, resize it the same way; a mask of any other size is stretched later."""
    if p.latent_mask is None or p.init_images is None:
        return
    mask = create_binary_mask(plain(p.latent_mask), round=p.mask_round)
    if mask.size == p.init_images[0].size != (p.width, p.height):
        mode = JUST_RESIZE if crop is not None else min(p.resize_mode, 2) if p.resize_mode != LATENT_RESIZE else JUST_RESIZE
        mask = images.resize_image(mode, mask.crop(crop) if crop is not None else mask, p.width, p.height)
    p.latent_mask = mask


def _note_picture(p: StableDiffusionProcessingImg2Img, picture: Image.Image, image: Image.Image) -> None:
    """Record the hash of the source picture, and save it if the settings say so."""
    if not p.options.save_init_img:
        return
    p.init_img_hash = hashlib.md5(np.asarray(image).tobytes(), usedforsecurity=False).hexdigest()
    save_or_comment(p, image, p.options.outdir_init_images, "", forced_filename=p.init_img_hash, save_to_dirs=False)


def _keep_overlay(p: StableDiffusionProcessingImg2Img, image: Image.Image) -> None:
    assert p.overlay_images is not None
    if not p.options.overlay_inpaint:
        return
    mask = p.mask_for_overlay if p.mask_for_overlay.size == image.size else p.mask_for_overlay.resize(image.size)
    p.overlay_images.append(overlay_of(image, mask))


def _same_size(pictures: list[Image.Image]) -> None:
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise RequestError(
            f"init_images have different sizes ({', '.join(f'{w}x{h}' for w, h in sorted(sizes))}); all pictures of a job must have the same size."
        )


def _one_for_each(p: StableDiffusionProcessingImg2Img, pictures: list[Image.Image]) -> list[Image.Image]:
    """One picture per batch entry: a single one is repeated; several set the batch size."""
    if len(pictures) == 1:
        for kept in (p.overlay_images, p.color_corrections):
            if kept:
                kept[:] = kept[:1] * p.batch_size
        return pictures * p.batch_size
    if len(pictures) != p.batch_size:
        raise RequestError(f"{len(pictures)} init_images were given with batch_size {p.batch_size}; give one picture, or batch_size of them.")
    return pictures


# Latents


def _encode(p: StableDiffusionProcessingImg2Img, pixels_BCHW: Tensor) -> Tensor:
    if p.resize_mode != LATENT_RESIZE:
        return encode_pixels(p.sd_model, pixels_BCHW)
    factor = latent_format_of(p.sd_model).factor
    height, width = (side // factor * factor for side in pixels_BCHW.shape[-2:])
    if min(height, width) < factor:
        raise RequestError(f"init_images are {pixels_BCHW.shape[-1]}x{pixels_BCHW.shape[-2]}; the smallest picture is {factor}x{factor}.")
    latents_BCHW = encode_pixels(p.sd_model, pixels_BCHW[..., :height, :width])
    return upscale_latent(latents_BCHW, p.width, p.height, {"mode": "bilinear", "antialias": False}, factor=factor)


def _prepare_latent_mask(p: StableDiffusionProcessingImg2Img) -> None:
    """Set p.mask (1 where the original stays) and p.nmask (1 where it is repainted), and fill masked latents as requested."""
    p.latent_before_noise = None
    if p.image_mask is None:
        return
    latent_mask = p.latent_mask if p.latent_mask is not None else p.image_mask
    new = mask_to_latent(latent_mask, p.init_latent.shape[2], p.init_latent.shape[3], hard=p.mask_round).to(p.init_latent)
    p.mask, p.nmask = (1 - new).expand_as(p.init_latent), new.expand_as(p.init_latent)
    if p.inpainting_fill == LATENT_NOISE:
        p.latent_before_noise = p.init_latent
        _fill_with_noise(p, p.all_seeds[: p.init_latent.shape[0]])
    elif p.inpainting_fill == LATENT_NOTHING:
        p.init_latent = p.init_latent * p.mask


def _fill_with_noise(p: StableDiffusionProcessingImg2Img, seeds: Sequence[int]) -> None:
    """Fill each picture's masked part with noise from its own seed, independent of its batch."""
    noise = torch.stack([_noise_of_seed(p, seed) for seed in seeds]).to(p.latent_before_noise)
    p.init_latent = p.latent_before_noise * p.mask + noise * p.nmask


def _noise_of_seed(p: StableDiffusionProcessingImg2Img, seed: int) -> Tensor:
    return rng.ImageRNG(tuple(p.init_latent.shape[1:]), [seed], source=p.options.randn_source).first()[0]


# Sampling


def sample_img2img(p: StableDiffusionProcessingImg2Img, c: Any, uc: Any) -> Tensor:
    """Latents of the batch."""
    if p.sampler.sd_model is not p.sd_model:  # an earlier batch ended with the refiner
        p.sampler = registry.create_sampler(p.sampler_name, p.sd_model)
    if p.latent_before_noise is not None and p.iteration > 0:
        _fill_with_noise(p, p.seeds)
    noise_BCHW = p.rng.first()
    multiplier = p.options.initial_noise_multiplier if p.initial_noise_multiplier is None else p.initial_noise_multiplier
    if multiplier != 1.0:
        p.extra_generation_params["Noise multiplier"] = multiplier
        noise_BCHW = noise_BCHW * multiplier
    prepare_networks(p)
    noise_BCHW = run_sampling_hook(p, p.init_latent, noise_BCHW, c, uc)
    with refining(p):
        samples_BCHW: Tensor = p.sampler.sample_img2img(p, p.init_latent, noise_BCHW, c, uc, image_conditioning=p.image_conditioning)
    if p.mask is None:
        return samples_BCHW
    blended = samples_BCHW * p.nmask.to(samples_BCHW) + p.init_latent.to(samples_BCHW) * p.mask.to(samples_BCHW)
    blend = MaskBlendArgs(samples_BCHW, p.nmask, p.init_latent, p.mask, blended)
    p.run_hook_with("on_mask_blend", blend)
    result: Tensor = blend.blended_latent
    return result
