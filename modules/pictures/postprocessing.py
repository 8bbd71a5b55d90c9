"""Upscaling for the Extras tab: one upscaler, or a blend of two.

Takes and returns pictures. Must not know the page, HTTP or files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from modules.errors import RequestError
from modules.infotext.text import build_parameters_line
from modules.pictures.resizing import CROP_AND_RESIZE, flatten, resize_by_mode
from modules.pictures.upscaler import UpscalerData, find_upscaler

BY_FACTOR, TO_SIZE = 0, 1
MAX_RESULT_PX = 16384 * 16384
_MATTE = "#ffffff"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtrasSettings:
    """What to do with a picture. `mode` 0 enlarges by `factor`, 1 to `size_px` (cropped if `crop`).

    `second_visibility` 0..1 is the weight of the second upscaler's picture.
    """

    mode: int = BY_FACTOR
    factor: float = 2.0
    size_px: tuple[int, int] = (512, 512)
    crop: bool = True
    first: str = "None"
    second: str = "None"
    second_visibility: float = 0.0
    face_restoration_visibility: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtrasResult:
    """The picture and its parameter line."""

    image: Image.Image
    infotext: str


def check_extras(settings: ExtrasSettings, upscalers: Sequence[UpscalerData]) -> tuple[UpscalerData, UpscalerData]:
    """Both upscalers. Raises RequestError for unknown names and unavailable features."""
    if settings.face_restoration_visibility > 0:
        raise RequestError(
            "face restoration (gfpgan_visibility or codeformer_visibility) is not available here: the packages of GFPGAN "
            "and CodeFormer need another version of torch, and download models at run time. Send 0."
        )
    return find_upscaler(settings.first, upscalers), find_upscaler(settings.second, upscalers)


def run_extras(image: Image.Image, settings: ExtrasSettings, upscalers: Sequence[UpscalerData]) -> ExtrasResult:
    """`image` processed according to `settings`. Keeps transparency. Raises RequestError."""
    first, second = check_extras(settings, upscalers)
    named = dataclasses.replace(settings, first=first.name, second=second.name)
    return ExtrasResult(image=enlarge(image, settings, upscalers), infotext=build_parameters_line(parameters_of(named)))


def enlarge(image: Image.Image, settings: ExtrasSettings, upscalers: Sequence[UpscalerData]) -> Image.Image:
    """`image` at the size in `settings`; the same object if no upscaler is named. Raises RequestError."""
    first, second = check_extras(settings, upscalers)
    goal_px = goal_size_px(image, settings)
    if goal_px[0] * goal_px[1] > MAX_RESULT_PX:
        limit = f"the limit is {MAX_RESULT_PX // 10**6} megapixels"
        raise RequestError(f"a picture of {goal_px[0]}x{goal_px[1]} px is too large; {limit}. Use a smaller factor.")
    if first.name == "None" and (second.name == "None" or settings.second_visibility == 0):
        return image
    result = _upscaled(image, first, goal_px, settings)
    if second.name != "None" and settings.second_visibility > 0:
        other = _upscaled(image, second, goal_px, settings)
        result = Image.blend(result, other, settings.second_visibility)
    return result


def parameters_of(settings: ExtrasSettings) -> dict[str, object]:
    """Infotext parameters of `settings`; empty if they change nothing."""
    uses_second = settings.second != "None" and settings.second_visibility > 0
    if settings.first == "None" and not uses_second:
        return {}
    params = {**_size_params(settings), "Postprocess upscaler": settings.first}
    if uses_second:
        params |= {"Postprocess upscaler 2": settings.second, "Postprocess upscaler 2 visibility": settings.second_visibility}
    return params


def _size_params(settings: ExtrasSettings) -> dict[str, object]:
    if settings.mode == BY_FACTOR:
        factor = round(settings.factor, 4)
        return {"Postprocess upscale by": int(factor) if factor == int(factor) else factor}
    width_px, height_px = settings.size_px
    return {"Postprocess upscale to": f"{width_px}x{height_px}", "Postprocess crop to": f"{width_px}x{height_px}" if settings.crop else None}


def goal_size_px(image: Image.Image, settings: ExtrasSettings) -> tuple[int, int]:
    """The size before cropping: from the factor, or the smallest size in the picture's aspect ratio that covers the requested one."""
    factor = settings.factor
    if settings.mode == TO_SIZE:
        factor = max(settings.size_px[0] / image.width, settings.size_px[1] / image.height)
    return max(1, round(image.width * factor)), max(1, round(image.height * factor))


def _upscaled(image: Image.Image, upscaler: UpscalerData, goal_px: tuple[int, int], settings: ExtrasSettings) -> Image.Image:
    alpha = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
    result = resize_by_mode(0, flatten(image, _MATTE) if alpha is None else image.convert("RGB"), *goal_px, upscaler)
    if alpha is not None:
        result.putalpha(alpha.resize(result.size, Image.Resampling.LANCZOS))
    if settings.mode == TO_SIZE and settings.crop:
        result = resize_by_mode(CROP_AND_RESIZE, result, *settings.size_px)
    return result
