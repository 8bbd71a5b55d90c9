"""Conversion between pixels and latents: encoding, decoding with the NaN check, latent upscaling, and extra channels of inpainting models.

Shapes: B pictures, C channels, H W rows and columns. The model's latent format defines how much smaller latents are than pixels.
Pixel tensors are BCHW, 0..1 unless stated otherwise. Must not know requests or settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from backend.families.inpainting import mask_before_picture
from backend.families.latent_format import LatentFormat
from backend.patcher.vae import NansError
from modules import devices
from modules.processing.constants import opt_C, opt_f


class DecodedSamples(list[Tensor]):
    """Pictures that are already decoded: one CHW tensor each, -1..1."""

    already_decoded = True


def latent_format_of(model: Any) -> LatentFormat:
    """The model's latent format; Stable Diffusion's for a model that declares none (from an extension)."""
    return getattr(model, "latent_format", None) or LatentFormat(channels=opt_C, factor=opt_f, scale=1.0)


def decode_latent_batch(model: Any, batch: Tensor, target_device: torch.device | None = None, check_for_nans: bool = False) -> DecodedSamples:
    """Latents BCHW to pictures, one at a time, so that a picture does not depend on its position in the batch. Raises devices.NansException."""
    samples = DecodedSamples()
    if check_for_nans:
        devices.test_for_nans(batch, "unet")
        batch = torch.nan_to_num(batch)
    for sample_CHW in _decode_each(model, batch):
        if check_for_nans:
            devices.test_for_nans(sample_CHW, "vae")
        samples.append(sample_CHW if target_device is None else sample_CHW.to(target_device))
    return samples


def _decode_each(model: Any, batch: Tensor) -> Iterator[Tensor]:
    """Each picture alone, CHW; in parallel if there are several slots."""
    try:
        together = model.decode_first_stage_on_all_slots(batch) if len(batch) > 1 and hasattr(model, "decode_first_stage_on_all_slots") else None
        for index, latent_CHW in enumerate(batch):
            yield model.decode_first_stage(latent_CHW[None])[0] if together is None else together[index]
    except NansError as error:
        raise devices.NansException(str(error)) from error


def encode_pixels(model: Any, pixels_BCHW: Tensor) -> Tensor:
    """Pictures 0..1 to latents, one at a time. fp32."""
    latents = [model.get_first_stage_encoding(model.encode_first_stage(picture[None] * 2 - 1)) for picture in pixels_BCHW]
    return torch.cat(latents).float()


def pil_to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of equal size as BCHW, 0..1, fp32."""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images])).movedim(-1, 1).contiguous()


def pixels_to_pil(pixels_CHW: Tensor) -> Image.Image:
    """One picture 0..1 as 8-bit RGB, rounded to nearest."""
    values_HWC = pixels_CHW.float().clamp(0, 1).mul(255).round().to(torch.uint8).movedim(0, -1)
    return Image.fromarray(values_HWC.cpu().numpy())


def mask_to_latent(mask: Image.Image, height: int, width: int, *, hard: bool) -> Tensor:
    """The mask at latent size, (1, 1, h, w), 1 where the picture is repainted. `hard` rounds to 0 and 1."""
    small = mask.convert("RGB").resize((width, height)).convert("L")
    values = torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)[None, None]
    return values.round() if hard else values


def upscale_latent(samples_BCHW: Tensor, width_px: int, height_px: int, mode: dict[str, Any], *, factor: int = opt_f) -> Tensor:
    """Latents interpolated to the size of a `width_px` x `height_px` picture; a latent is `factor` pixels wide and high."""
    size = (height_px // factor, width_px // factor)
    return functional.interpolate(samples_BCHW, size=size, mode=mode["mode"], antialias=mode["antialias"])


# Image conditioning: an inpainting model takes a mask and the masked picture in addition to latents (5 more channels for a UNet). Other models
# take none; extensions expect a tensor of size 1 for them, which the denoiser never sees (the model declares what it takes, not the shape).


def no_image_conditioning(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.new_zeros(x_BCHW.shape[0], 5, 1, 1)


def txt2img_image_conditioning(model: Any, x_BCHW: Tensor, width_px: int, height_px: int) -> Tensor:
    """For an inpainting model: everything is masked, so the masked picture is uniform gray (0 on the scale -1..1)."""
    if not model.is_inpaint:
        return no_image_conditioning(x_BCHW)
    gray_BCHW = torch.full((1, 3, height_px, width_px), 0.5)
    masked_BCHW = encode_pixels(model, gray_BCHW).to(x_BCHW)
    conditioning_BCHW = _join_inpaint(model)(torch.ones_like(gray_BCHW[:, :1]), masked_BCHW)
    return conditioning_BCHW.expand(x_BCHW.shape[0], -1, -1, -1)


def _join_inpaint(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """How the model's family makes channels of mask and masked picture; Stable Diffusion's way for a model without a family."""
    family = getattr(model, "family_facts", None)
    return mask_before_picture if family is None else family.join_inpaint


def inpainting_image_conditioning(
    model: Any, source_BCHW: Tensor | None, latent_BCHW: Tensor, image_mask: Any = None, *, round_mask: bool = True, mask_weight: float = 1.0
) -> Tensor:
    """For an inpainting model: the mask at latent size and the encoded picture (`source_BCHW`, -1..1) with the masked part removed.

    `image_mask` is a PIL mask, a tensor (1, 1, H, W) or None for everything masked. With `mask_weight` 0 nothing of the picture is hidden.
    `source_BCHW` is None for latents that never were pixels: everything is repainted."""
    if not model.is_inpaint:
        return no_image_conditioning(latent_BCHW)
    if source_BCHW is None:
        height, width = latent_BCHW.shape[-2:]
        return txt2img_image_conditioning(model, latent_BCHW, width * opt_f, height * opt_f)
    mask_B1HW = _pixel_mask(image_mask, source_BCHW, round_mask)
    shown_BCHW = torch.lerp(source_BCHW, source_BCHW * (1 - mask_B1HW), mask_weight)
    masked_BCHW = encode_pixels(model, shown_BCHW * 0.5 + 0.5).to(latent_BCHW)
    return _join_inpaint(model)(mask_B1HW, masked_BCHW)


def _pixel_mask(image_mask: Any, source_BCHW: Tensor, round_mask: bool) -> Tensor:
    if image_mask is None:
        return source_BCHW.new_ones(1, 1, *source_BCHW.shape[-2:])
    if isinstance(image_mask, Tensor):
        mask = image_mask.to(source_BCHW)
    else:
        mask = torch.from_numpy(np.asarray(image_mask.convert("L"), dtype=np.float32) / 255)[None, None].to(source_BCHW)
    return mask.round() if round_mask else mask
