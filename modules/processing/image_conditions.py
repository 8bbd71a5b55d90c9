"""What an inpainting model takes in addition to the latents of a request's pass; the request (`p`) stores its current conditions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from modules.processing.latents import inpainting_image_conditioning, txt2img_image_conditioning

if TYPE_CHECKING:
    from modules.processing.request import StableDiffusionProcessing


def condition_on_nothing(p: StableDiffusionProcessing, x_BCHW: Tensor, width: int | None = None, height: int | None = None) -> Tensor:
    """For a picture of that size (default: the request's) made from nothing: everything is masked."""
    p.is_using_inpainting_conditioning = p.sd_model.is_inpaint
    return txt2img_image_conditioning(p.sd_model, x_BCHW, width or p.width, height or p.height)


def condition_on_picture(
    p: StableDiffusionProcessing, source_image: Tensor | None, latent_image: Tensor, image_mask: Any = None, round_image_mask: bool = True
) -> Tensor:
    """For a picture (BCHW, -1..1, or None if there are only latents) whose masked part is repainted."""
    p.is_using_inpainting_conditioning = p.sd_model.is_inpaint
    p.image_conditioning_source = (source_image, latent_image, image_mask, round_image_mask)
    p.inpainting_mask_weight = float(p.options.inpainting_mask_weight)
    return inpainting_image_conditioning(
        p.sd_model, source_image, latent_image, image_mask, round_mask=round_image_mask, mask_weight=p.inpainting_mask_weight
    )
