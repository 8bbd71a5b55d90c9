"""Soft inpainting's panel, below the inpainting controls."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, ImageFilter, ImageOps
from soft_masks import SoftInpainting

from modules import images, scripts
from modules.processing import uncrop
from modules.ui_components import InputAccordion

TITLE, ENABLED = "Soft Inpainting", "Soft inpainting enabled"
NAMES = tuple(field.name for field in fields(SoftInpainting))
PANEL = (
    ("Schedule bias", "Shifts in which steps the original is kept.", 0, 8, 0.1),
    ("Preservation strength", "How strongly half masked content is kept.", 0, 8, 0.05),
    ("Transition contrast boost", "Restores contrast that half masked places would lose.", 1, 32, 0.5),
    ("Mask influence", "How much the mask itself decides where the original is shown in the end.", 0, 1, 0.05),
    ("Difference threshold", "How much a place may change before the original is no longer shown there.", 0, 8, 0.25),
    ("Difference contrast", "How sharp the border between original and new is.", 0, 8, 0.25),
)
"""(label, what it does, minimum, maximum, step) of each control, in the order of SoftInpainting's fields."""
KEYS = tuple(f"Soft inpainting {label.lower()}" for label, *_ in PANEL)
EDGE_PX = 4


class Script(scripts.Script):
    """Needs a mask; use it with a high mask blur."""

    section = "inpaint"

    def __init__(self) -> None:
        self._masks: list[Image.Image] = []
        self._overlays: list[Image.Image] = []

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible if is_img2img else False

    def ui(self, is_img2img: bool) -> list[Any]:
        start = SoftInpainting()
        with InputAccordion(False, label="Soft inpainting", elem_id="soft_inpainting_enabled") as enabled, gr.Group():
            gr.Markdown("Half masked places are half repainted. Use a high mask blur.")
            sliders = [
                gr.Slider(label=label, info=info, minimum=low, maximum=high, step=step, value=getattr(start, name), elem_id=name)
                for name, (label, info, low, high, step) in zip(NAMES, PANEL)
            ]
        self.infotext_fields = [(enabled, ENABLED), *zip(sliders, KEYS)]
        self.paste_field_names = [ENABLED, *KEYS]
        return [enabled, *sliders]

    def _read(self, p: Any, args: tuple[Any, ...]) -> SoftInpainting | None:
        """What the controls say; None if it does not apply to this job. Raises RequestError."""
        enabled, *numbers = scripts.checked_values(self, args)
        return SoftInpainting(**dict(zip(NAMES, numbers))) if enabled and getattr(p, "image_mask", None) is not None else None

    def process(self, p: Any, *args: Any, **kwargs: Any) -> None:
        self._masks, self._overlays = [], []
        soft = self._read(p, args)
        if soft is not None:
            p.mask_round = False
            p.extra_generation_params[ENABLED] = True
            p.extra_generation_params.update(zip(KEYS, (getattr(soft, name) for name in NAMES)))

    def on_mask_blend(self, p: Any, mba: Any, *args: Any) -> None:
        soft = self._read(p, args)
        if soft is None:
            return
        if mba.is_final_blend:
            mba.blended_latent = mba.current_latent  # the pixels are blended instead
            return
        share = soft.share_of_new(mba.nmask.to(mba.current_latent), float(mba.sigma[0]))
        mba.blended_latent = soft.blend(mba.init_latent.to(mba.current_latent), mba.current_latent, share)

    def post_sample(self, p: Any, ps: Any, *args: Any) -> None:
        soft, nmask = self._read(p, args), getattr(p, "nmask", None)
        if soft is None or nmask is None:
            return
        nmask_HW = nmask.reshape(-1, *nmask.shape[-2:])[0]
        self._masks, self._overlays = [], []
        for number, new_CHW in enumerate(ps.samples):
            original = _original_of(p, number)
            old_CHW = p.init_latent[number % p.init_latent.shape[0]].to(new_CHW)
            mask = _at_picture(soft.changed_places(old_CHW, new_CHW, nmask_HW), p, original.size)
            self._masks.append(mask)
            self._overlays.append(_overlay_of(original, mask))

    def postprocess_maskoverlay(self, p: Any, ppmo: Any, *args: Any) -> None:
        if ppmo.index < len(self._masks):
            ppmo.mask_for_overlay, ppmo.overlay_image = self._masks[ppmo.index], self._overlays[ppmo.index]


def _original_of(p: Any, number: int) -> Image.Image:
    """The picture that the result is pasted over: at the result's size, or whole if only its masked part is repainted."""
    image = images.flatten(p.init_images[number % len(p.init_images)], p.options.img2img_background_color)
    if p.paste_to is None and p.resize_mode != 3:
        image = images.resize_image(p.resize_mode, image, p.width, p.height)
    return image.convert("RGBA")


def _at_picture(places_HW: np.ndarray, p: Any, whole_px: tuple[int, int]) -> Image.Image:
    """The mask of changed places, as large as the picture that is shown, with soft edges."""
    mask = Image.fromarray((255.0 * places_HW).astype(np.uint8)).resize((p.width, p.height), Image.Resampling.BICUBIC)
    mask = mask.filter(ImageFilter.GaussianBlur(radius=EDGE_PX))
    return mask if p.paste_to is None else uncrop(mask, whole_px, p.paste_to).convert("L")


def _overlay_of(original: Image.Image, mask: Image.Image) -> Image.Image:
    """The original where `mask` is black, nothing where it is white."""
    overlay = Image.new("RGBa", original.size)
    overlay.paste(original.convert("RGBa"), mask=ImageOps.invert(mask))
    return overlay.convert("RGBA")
