"""A unit as passed by pages, API clients and other extensions, and helper functions they call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from PIL import Image

from lib_controlnet.enums import BatchOption, ControlMode, ControlNetUnionControlType, HiResFixOption, InputMode, ResizeMode
from modules.api.pictures import decode_picture
from modules.errors import RequestError
from modules.pictures.resizing import fix_image

__all__ = [
    "BatchOption", "ControlMode", "ControlNetUnionControlType", "ControlNetUnit", "HiResFixOption", "InputMode", "ResizeMode", "UiControlNetUnit",
    "control_mode_from_value",
    "get_api_version", "get_max_models_num", "pixel_perfect_resolution", "resize_mode_from_value", "to_base64_nparray",
]  # fmt: skip

_OLD_KEYS = {"input_image": "image", "mask": "mask_image", "preprocessor": "module"}
_CHOICES: dict[str, Any] = {"resize_mode": ResizeMode, "control_mode": ControlMode, "hr_option": HiResFixOption, "input_mode": InputMode}
_NO_UNION_TYPES = ("", "all", "none", "unknown")
_PICTURE_KEYS = ("image", "composite", "background")
_PICTURES = ("image", "mask_image", "generated_image")
_SWITCHES = ("enabled", "pixel_perfect", "save_detected_map", "use_preview_as_input")
_NUMBERS = ("weight", "processor_res", "threshold_a", "threshold_b", "guidance_start", "guidance_end")


@dataclass
class ControlNetUnit:
    """One unit. Pictures are arrays (H, W, C) or base64 texts; -1 means the preprocessor's default."""

    input_mode: InputMode = InputMode.SIMPLE
    use_preview_as_input: bool = False
    batch_image_dir: str = ""
    batch_mask_dir: str = ""
    batch_input_gallery: Any = None
    batch_mask_gallery: Any = None
    generated_image: Any = None
    mask_image: Any = None
    mask_image_fg: Any = None
    hr_option: HiResFixOption = HiResFixOption.BOTH
    enabled: bool = True
    module: str = "None"
    model: str = "None"
    weight: float = 1.0
    image: Any = None
    image_fg: Any = None
    resize_mode: ResizeMode = ResizeMode.INNER_FIT
    processor_res: float = -1
    threshold_a: float = -1
    threshold_b: float = -1
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    pixel_perfect: bool = False
    control_mode: ControlMode = ControlMode.BALANCED
    save_detected_map: bool = True
    union_control_type: ControlNetUnionControlType | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ControlNetUnit:
        """The unit of an API request. Ignores unknown keys and accepts old ones. Raises RequestError naming an invalid value."""
        known = {field.name for field in fields(cls)}
        named: dict[str, Any] = {}
        for key, value in values.items():
            name = _OLD_KEYS.get(key, key)
            if name in known and (value is not None or name not in named):
                named[name] = value
        _take_apart(named)
        unit = cls(**{key: value for key, value in named.items() if value is not None})
        unit.normalise()
        return unit

    def normalise(self) -> None:
        """Convert pictures, switches, choices and numbers to their types. Raises RequestError."""
        for name in _PICTURES:
            _check_picture(name, getattr(self, name))
        for name in _SWITCHES:
            setattr(self, name, _read_switch(name, getattr(self, name)))
        for name, choice in _CHOICES.items():
            try:
                setattr(self, name, choice.read(getattr(self, name)))
            except ValueError as error:
                raise RequestError(f"ControlNet's {name}: {error}") from error
        self.union_control_type = _read_union_type(self.union_control_type)
        for name in _NUMBERS:
            value = getattr(self, name)
            try:
                number = math.nan if isinstance(value, bool) else float(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise RequestError(f"ControlNet's {name} is {_short(value)}; it must be a number.") from error
            if not math.isfinite(number):
                raise RequestError(f"ControlNet's {name} is {_short(value)}; it must be a finite number.")
            setattr(self, name, number)
        for name in ("module", "model"):
            setattr(self, name, _read_name(name, getattr(self, name)))
        if self.input_mode is not InputMode.SIMPLE:
            raise RequestError(
                f"ControlNet's input_mode is {self.input_mode.value!r}; only 'simple' (one picture per unit) is supported. Send one unit per picture."
            )
        if not 0.0 <= self.guidance_start <= self.guidance_end <= 1.0:
            raise RequestError(
                f"ControlNet's guidance_start is {self.guidance_start:g} and guidance_end {self.guidance_end:g}; "
                "both must be between 0 and 1, with start <= end."
            )


def _take_apart(named: dict[str, Any]) -> None:
    """Split a picture with its mask, {"image": ..., "mask": ...} or [picture, mask], into two fields. Raises RequestError."""
    given, mask = named.get("image"), None
    if isinstance(given, Mapping):
        if not any(name in given for name in _PICTURE_KEYS):
            raise RequestError(f"ControlNet's image is an object with {', '.join(map(str, given)) or '(none)'}; send its picture as 'image'.")
        given, mask = next((given[name] for name in _PICTURE_KEYS if given.get(name) is not None), None), given.get("mask")
    elif isinstance(given, (list, tuple)):
        if not 1 <= len(given) <= 2 or not all(one is None or isinstance(one, (str, Image.Image, np.ndarray)) for one in given):
            raise RequestError(f"ControlNet's image is a list of {len(given)}; send one base64 picture, or a picture and its mask.")
        given, mask = (*given, None)[:2]
    named["image"] = given
    if mask is not None and named.get("mask_image") is None:
        named["mask_image"] = mask


def _check_picture(name: str, value: Any) -> None:
    """Raises RequestError for anything but a picture: a number, true, an object without a picture."""
    if value is None or isinstance(value, (str, Image.Image)):
        return
    if isinstance(value, Mapping):
        for key in _PICTURE_KEYS:
            _check_picture(name, value.get(key))
        return
    shape = getattr(value, "shape", ())
    if (
        isinstance(value, np.ndarray)
        and value.dtype.kind in "uifb"
        and (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4)))
        and value.size
    ):
        return
    raise RequestError(f"ControlNet's {name} is {_short(value)}; send a picture as base64.")


def _read_switch(name: str, value: Any) -> bool:
    """true and false, 1 and 0, and their common spellings. Raises RequestError."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    words = {**dict.fromkeys(("true", "1", "yes", "on"), True), **dict.fromkeys(("false", "0", "no", "off"), False)}
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    raise RequestError(f"ControlNet's {name} is {_short(value)}; it must be true or false.")


def _read_name(name: str, value: Any) -> str:
    """The name of a preprocessor or model; an empty value means "None". Raises RequestError."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return "None"
    if not isinstance(value, str):
        raise RequestError(f"ControlNet's {name} is {_short(value)}; it must be a name from /controlnet/{name}_list.")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read_union_type(value: Any) -> ControlNetUnionControlType | None:
    """None if the preprocessor should decide. Raises RequestError."""
    text = getattr(value, "value", value)
    if text is None or (isinstance(text, str) and text.strip().lower() in _NO_UNION_TYPES):
        return None
    try:
        return ControlNetUnionControlType.read(value)
    except ValueError as error:
        raise RequestError(f"ControlNet's union_control_type: {error}") from error


UiControlNetUnit = ControlNetUnit


def get_api_version() -> int:
    """The version of this interface."""
    return 2


def get_max_models_num() -> int:
    """Number of units per tab."""
    from modules import shared

    return int(shared.opts.control_net_unit_count)


def resize_mode_from_value(value: Any) -> ResizeMode:
    """The resize mode for a text or number."""
    return ResizeMode.read(value)


def control_mode_from_value(value: Any) -> ControlMode:
    """The control mode for a text or number."""
    return ControlMode.read(value)


def pixel_perfect_resolution(image: np.ndarray, target_H: int, target_W: int, resize_mode: ResizeMode) -> int:
    """The preprocessor resolution (shorter side) at which one pixel of the map equals one pixel of the generated picture."""
    height, width = image.shape[:2]
    scales = float(target_H) / height, float(target_W) / width
    scale = min(scales) if resize_mode is ResizeMode.OUTER_FIT else max(scales)
    return max(64, round(scale * min(height, width)))


def to_base64_nparray(encoding: str) -> np.ndarray:
    """The picture in a base64 text or data URL, upright, as (H, W, 3) or (H, W, 4). Raises RequestError."""
    return image_to_array(decode_picture(encoding, "ControlNet's picture"))


def image_to_array(image: Image.Image) -> np.ndarray:
    """A picture, upright, 8 bits per channel, as (H, W, 3), or (H, W, 4) if it has transparency in any form."""
    fixed = fix_image(image)
    assert fixed is not None
    return np.asarray(fixed.convert("RGBA" if "A" in fixed.getbands() else "RGB"))
