"""Which infotext key fills which field of a generation request, in reading order.

The page's paste button and the API's `infotext` field use this table. Pure data; must not know gradio or the request classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_HIRES_MODULE = re.compile(r"Hires Module \d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class InfotextField:
    """Infotext `key` fills request field `field`; a function in its place may read several keys (None: not mentioned)."""

    field: str
    key: str | Callable[[Mapping[str, Any]], Any]

    def read(self, params: Mapping[str, Any]) -> Any:
        """This field's value from a parsed infotext; None if absent."""
        return self.key(params) if callable(self.key) else params.get(self.key)


def _wants_hires(params: Mapping[str, Any]) -> bool | None:
    named = any(key in params for key in ("Hires upscale", "Hires upscaler", "Hires resize-1"))
    upscaled = bool(params.get("Hires upscale") or params.get("Hires upscaler")) or str(params.get("Hires resize-1", "0")) != "0"
    return True if named and upscaled and "Denoising strength" in params else None


def _styles(params: Mapping[str, Any]) -> list[str] | None:
    styles = params.get("Styles array")
    return list(styles) if isinstance(styles, (list, tuple)) else None


def _hires_modules(params: Mapping[str, Any]) -> list[str] | None:
    """Names of the second pass's files; the words for "as in the first pass" where the text has a second pass and names none."""
    named = [str(value) for key, value in params.items() if _HIRES_MODULE.fullmatch(key)]
    return named or (["Use same choices"] if _wants_hires(params) else None)


def _fields(*pairs: tuple[str, str | Callable[[Mapping[str, Any]], Any]]) -> tuple[InfotextField, ...]:
    return tuple(InfotextField(field=field, key=key) for field, key in pairs)


COMMON_FIELDS = _fields(
    ("prompt", "Prompt"),
    ("negative_prompt", "Negative prompt"),
    ("styles", _styles),
    ("steps", "Steps"),
    ("sampler_name", "Sampler"),
    ("scheduler", "Schedule type"),
    ("cfg_scale", "CFG scale"),
    ("distilled_cfg_scale", "Distilled CFG Scale"),
    ("seed", "Seed"),
    ("subseed", "Variation seed"),
    ("subseed_strength", "Variation seed strength"),
    ("seed_resize_from_w", "Seed resize from-1"),
    ("seed_resize_from_h", "Seed resize from-2"),
    ("width", "Size-1"),
    ("height", "Size-2"),
    ("batch_size", "Batch size"),
    ("denoising_strength", "Denoising strength"),
    ("enable_refiner", lambda params: True if params.get("Refiner") else None),
    ("refiner_checkpoint", "Refiner"),
    ("refiner_switch_at", "Refiner switch at"),
)

TXT2IMG_FIELDS = COMMON_FIELDS + _fields(
    ("enable_hr", _wants_hires),
    ("hr_scale", "Hires upscale"),
    ("hr_upscaler", "Hires upscaler"),
    ("hr_second_pass_steps", "Hires steps"),
    ("hr_resize_x", "Hires resize-1"),
    ("hr_resize_y", "Hires resize-2"),
    ("hr_checkpoint_name", "Hires checkpoint"),
    ("hr_additional_modules", _hires_modules),
    ("hr_sampler_name", "Hires sampler"),
    ("hr_scheduler", "Hires schedule type"),
    ("hr_prompt", "Hires prompt"),
    ("hr_negative_prompt", "Hires negative prompt"),
    ("hr_cfg", "Hires CFG Scale"),
    ("hr_distilled_cfg", "Hires Distilled CFG Scale"),
)

IMG2IMG_FIELDS = COMMON_FIELDS + _fields(
    ("image_cfg_scale", "Image CFG scale"),
    ("mask_blur", "Mask blur"),
    ("inpaint_full_res_padding", "Masked area padding"),
)

FIELDS_BY_TAB = {"txt2img": TXT2IMG_FIELDS, "img2img": IMG2IMG_FIELDS}
