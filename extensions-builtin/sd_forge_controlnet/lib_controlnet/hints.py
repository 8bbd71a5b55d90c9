"""From a unit's picture to the hint of a pass: reading, cropping to the inpainted part, preprocessing, and resizing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from lib_controlnet.enums import ResizeMode
from lib_controlnet.external_code import ControlNetUnit, image_to_array, pixel_perfect_resolution, to_base64_nparray
from modules import masking
from modules.errors import RequestError
from modules.pictures.resizing import CROP_AND_RESIZE, JUST_RESIZE, RESIZE_AND_FILL, flatten, resize_by_mode, to_8_bit
from modules.processing.img2img import inpaint_mask, only_masked_region
from modules_forge.utils import HWC3


@dataclass
class Hint:
    """A preprocessed picture (H, W, 3) and optionally its mask (H, W), 0..1. `shown` is what the gallery displays."""

    picture: np.ndarray
    mask: np.ndarray | None
    resize_mode: ResizeMode
    preprocessor: Any

    def tensors(self, width_px: int, height_px: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(hint (1, 3, height, width), mask (1, 1, height, width) or None), 0..1, at the size of a pass."""
        cond = torch.from_numpy(fit(self.picture, self.resize_mode, width_px, height_px).astype(np.float32) / 255.0).permute(2, 0, 1)[None]
        if self.mask is None:
            return cond.contiguous(), None
        fills = self.resize_mode is ResizeMode.OUTER_FIT and self.preprocessor.fill_mask_with_one_when_resize_and_fill
        mask = fit_mask(self.mask, self.resize_mode, width_px, height_px, outside=1.0 if fills else 0.0)
        return cond.contiguous(), torch.from_numpy(mask)[None, None]


def make_hints(p: Any, unit: ControlNetUnit, preprocessor: Any, number: int) -> list[Hint]:
    """The hints of a unit: one for all pictures; or one per picture, if img2img starts from several and the unit has none of its own.

    Raises RequestError if there is no picture or one cannot be read."""
    count = 1 if as_given(unit) is not None else max(len(getattr(p, "init_images", None) or ()), 1)
    return [_make_hint(p, unit, preprocessor, number, place) for place in range(count)]


def stack_hints(hints: Sequence[Hint], width_px: int, height_px: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(hints (1 or I, 3, height, width), mask (1 or I, 1, height, width) or None) at the size of a pass; a shared mask appears once."""
    pairs = [hint.tensors(width_px, height_px) for hint in hints]
    masks = [mask for _, mask in pairs if mask is not None]
    shared = masks[:1] if all(torch.equal(mask, masks[0]) for mask in masks) else masks
    return torch.cat([cond for cond, _ in pairs]), torch.cat(shared) if masks else None


def _make_hint(p: Any, unit: ControlNetUnit, preprocessor: Any, number: int, place: int) -> Hint:
    picture, mask = read_pictures(p, unit, number, place)
    mode = resize_mode_of(p, unit)
    if preprocessor.corp_image_with_a1111_mask_when_in_img2img_inpaint_tab:
        picture, mask = crop_to_inpainted_part(p, picture, mask, mode)
    resolution = choose_resolution(p, unit, preprocessor, picture, mode)
    found = preprocessor(
        input_image=picture, resolution=resolution, input_mask=None if mask is None else mask[..., None],
        slider_1=_own_or(unit.threshold_a), slider_2=_own_or(unit.threshold_b), slider_3=None,
    )  # fmt: skip
    if not isinstance(found, np.ndarray):
        raise RequestError(f"ControlNet unit {number}: the preprocessor {preprocessor.name!r} returns no picture; it needs another kind of model.")
    return Hint(HWC3(found), mask, mode, preprocessor)


def _own_or(value: float) -> float | None:
    return None if value < 0 else value


def choose_resolution(p: Any, unit: ControlNetUnit, preprocessor: Any, picture: np.ndarray, mode: ResizeMode) -> int:
    """The resolution: pixel perfect, as requested, or the preprocessor's default."""
    if unit.pixel_perfect:
        return pixel_perfect_resolution(picture, int(p.height), int(p.width), mode)
    own = preprocessor.slider_resolution.gradio_update_kwargs
    return int(own["value"]) if unit.processor_res <= 0 else int(min(max(unit.processor_res, 64), 4096))


def read_pictures(p: Any, unit: ControlNetUnit, number: int, place: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """(picture (H, W, 3), mask (H, W) 0..1 or None): the unit's own, else img2img's picture `place` in its batch."""
    picture = as_array(as_given(unit))
    mask = _as_mask(unit.mask_image)
    if picture is None:
        initial = getattr(p, "init_images", None)
        if not initial:
            raise RequestError(f"ControlNet unit {number} is enabled but has no image. Add one, or disable the unit.")
        picture = np.asarray(flatten(initial[place], p.options.img2img_background_color))
        if mask is None and getattr(p, "image_mask", None) is not None:
            mask = _as_mask(inpaint_mask(p, blurred=False))
    if mask is not None and mask.shape != picture.shape[:2]:
        mask = _as_mask(Image.fromarray((mask * 255).astype(np.uint8)).resize(picture.shape[1::-1], Image.Resampling.NEAREST))
    return HWC3(picture), mask


def resize_mode_of(p: Any, unit: ControlNetUnit) -> ResizeMode:
    """The unit's resize mode; img2img's if the hint is img2img's picture, so that both align."""
    if as_given(unit) is None and getattr(p, "init_images", None):
        return ResizeMode.read(int(p.resize_mode))
    return unit.resize_mode


def as_given(unit: ControlNetUnit) -> Any:
    """The unit's own picture; None if it has none."""
    given = unit.generated_image if unit.use_preview_as_input and unit.generated_image is not None else unit.image
    return None if isinstance(given, str) and not given.strip() else given


def as_array(given: Any) -> np.ndarray | None:
    """A picture from the page, a client or another extension: 8 bits, upright, transparency only as an alpha channel."""
    if given is None or (isinstance(given, str) and not given.strip()):
        return None
    if isinstance(given, str):
        return to_base64_nparray(given)
    if isinstance(given, Mapping):
        return as_array(next((given[name] for name in ("image", "composite", "background") if given.get(name) is not None), None))
    if isinstance(given, Image.Image):
        return image_to_array(given)
    return to_8_bit(np.asarray(given))


def _as_mask(given: Any) -> np.ndarray | None:
    """A mask 0..1: the picture's transparency if it has any, else its brightest channel. An empty mask counts as none."""
    array = as_array(given)
    if array is None:
        return None
    if array.ndim == 3 and array.shape[2] == 4 and array[..., 3].min() < 255:
        grey = np.where(array[..., 3] > 128, 255, 0).astype(np.uint8)
    else:
        grey = array if array.ndim == 2 else array[..., :3].max(axis=2)
    kept = np.asarray(masking.drop_background(Image.fromarray(np.ascontiguousarray(grey))))
    return kept.astype(np.float32) / 255.0 if kept.any() else None


def crop_to_inpainted_part(p: Any, picture: np.ndarray, mask: np.ndarray | None, mode: ResizeMode) -> tuple[np.ndarray, np.ndarray | None]:
    """For img2img's "only masked": crop the hint by the picture's crop box and resize it to the job's size in the same way.

    A picture of another size is first resized to the initial picture's size using `mode`."""
    if getattr(p, "image_mask", None) is None or not getattr(p, "inpaint_full_res", False):
        return picture, mask
    whole = inpaint_mask(p)
    region = only_masked_region(p, whole)
    if region is None:
        return picture, mask

    def cut(values: np.ndarray, *, outside: int | None) -> np.ndarray:
        image = Image.fromarray(values)
        if image.size != whole.size:
            image = _resized(image, mode, *whole.size, fill=tuple(int(value) for value in _edge_color(values)) if outside is None else outside)
        return np.asarray(resize_by_mode(RESIZE_AND_FILL, image.crop(region), int(p.width), int(p.height)))

    if mask is not None:
        mask = cut((mask * 255).astype(np.uint8), outside=0).astype(np.float32) / 255.0
    return cut(picture, outside=None), mask


def fit(picture: np.ndarray, mode: ResizeMode, width_px: int, height_px: int) -> np.ndarray:
    """Resize a hint. Two-color maps keep exactly two colors; the border added by "Resize and Fill" has the color of the edges."""
    if picture.shape[:2] == (height_px, width_px):
        return picture
    image = Image.fromarray(picture)
    result = np.array(_resized(image, mode, width_px, height_px, fill=tuple(int(value) for value in _edge_color(picture))))
    if np.isin(picture, (0, 255)).all():
        result = np.where(result > 127, 255, 0).astype(np.uint8)
    return result


def fit_mask(mask: np.ndarray, mode: ResizeMode, width_px: int, height_px: int, *, outside: float) -> np.ndarray:
    """Resize a mask; `outside` is the value of the border added by "Resize and Fill"."""
    image = Image.fromarray((mask * 255).astype(np.uint8))
    return np.asarray(_resized(image, mode, width_px, height_px, fill=int(outside * 255)), dtype=np.float32) / 255.0


def _edge_color(picture: np.ndarray) -> np.ndarray:
    edges = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    return np.median(edges, axis=0)


def _resized(image: Image.Image, mode: ResizeMode, width_px: int, height_px: int, *, fill: Any) -> Image.Image:
    if mode is not ResizeMode.OUTER_FIT:  # resize like img2img does
        return resize_by_mode(JUST_RESIZE if mode is ResizeMode.RESIZE else CROP_AND_RESIZE, image, width_px, height_px)
    scale = min(width_px / image.width, height_px / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    scaled = image.resize(size, Image.Resampling.LANCZOS)
    result = Image.new(image.mode, (width_px, height_px), fill)
    result.paste(scaled, ((width_px - size[0]) // 2, (height_px - size[1]) // 2))
    return result
