"""Samples one batch of txt2img: from noise to latents, then the second pass if hires fix is on.

Shapes: B pictures, C channels, H W latent rows and columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modules.pictures.resizing import CROP_AND_RESIZE, flatten, resize_by_mode
from modules.processing.hires import prepare_hires, sample_hires_pass
from modules.processing.image_conditions import condition_on_nothing
from modules.processing.latents import DecodedSamples, decode_latent_batch, encode_pixels, pil_to_pixels
from modules.processing.networks import prepare_networks, run_sampling_hook
from modules.processing.overrides import overridden, step_of
from modules.processing.refiner import refining
from modules.samplers import registry

if TYPE_CHECKING:
    from modules.processing.request import StableDiffusionProcessingTxt2Img


def prepare_txt2img(p: StableDiffusionProcessingTxt2Img) -> None:
    """What all batches share. Raises RequestError."""
    if p.enable_hr:
        prepare_hires(p)


def sample_txt2img(p: StableDiffusionProcessingTxt2Img, c: Any, uc: Any) -> Tensor | DecodedSamples:
    """Latents of the batch, or decoded pictures if the second pass returns them."""
    p.sampler = registry.create_sampler(p.sampler_name, p.sd_model)
    samples_BCHW = _first_pass_from_image(p) if p.enable_hr and p.firstpass_image is not None else _first_pass(p, c, uc)
    if not p.enable_hr:
        return samples_BCHW
    decoded = None if p.latent_scale_mode is not None else torch.stack(decode_latent_batch(p.sd_model, samples_BCHW, check_for_nans=True))
    second_pass = overridden(p, "sample_hr_pass")
    if second_pass is not None:
        return second_pass(samples_BCHW, decoded, p.seeds, p.subseeds, p.subseed_strength, p.prompts)
    return sample_hires_pass(p, samples_BCHW, decoded)


def _first_pass(p: StableDiffusionProcessingTxt2Img, c: Any, uc: Any) -> Tensor:
    noise_BCHW = p.rng.first()
    prepare_networks(p)
    noise_BCHW = run_sampling_hook(p, noise_BCHW, noise_BCHW, c, uc)
    conditioning = step_of(p, "txt2img_image_conditioning", condition_on_nothing)
    with refining(p):
        samples: Tensor = p.sampler.sample(p, noise_BCHW, c, uc, image_conditioning=conditioning(noise_BCHW))
    return samples


def _first_pass_from_image(p: StableDiffusionProcessingTxt2Img) -> Tensor:
    """Use a finished picture as the first pass; every picture of the batch starts from its latents."""
    assert p.firstpass_image is not None
    image = flatten(p.firstpass_image, p.options.img2img_background_color)
    image = resize_by_mode(CROP_AND_RESIZE, image, p.width, p.height)
    return encode_pixels(p.sd_model, pil_to_pixels([image])).repeat(p.batch_size, 1, 1, 1)
