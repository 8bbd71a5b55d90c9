"""A unit as pages, API clients and other extensions give it, and helpers they call."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from PIL import Image

from lib_controlnet.enums import BatchOption, ControlMode, ControlNetUnionControlType, HiResFixOption, InputMode, ResizeMode
from modules.errors import RequestError

__all__ = [
    "BatchOption", "ControlMode", "ControlNetUnionControlType", "ControlNetUnit", "HiResFixOption", "InputMode", "ResizeMode", "UiControlNetUnit",
    "control_mode_from_value",
    "get_api_version", "get_max_models_num", "pixel_perfect_resolution", "resize_mode_from_value", "to_base64_nparray",
]  # fmt: skip

_OLD_KEYS = {"input_image": "image", "mask": "mask_image", "preprocessor": "module"}
_CHOICES: dict[str, Any] = {"resize_mode": ResizeMode, "control_mode": ControlMode, "hr_option": HiResFixOption, "input_mode": InputMode}
_NO_UNION_TYPES = ("", "all", "none", "unknown")
_NUMBERS = ("weight", "processor_res", "threshold_a", "threshold_b", "guidance_start", "guidance_end")


@dataclass
class ControlNetUnit:
    """One unit. Pictures are arrays (H, W, C) or base64 texts; -1 stands for the preprocessor's own value."""

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
        """The unit of an API request. Unknown keys are left out, old ones understood. Raises RequestError for a wrong value, by name."""
        known = {field.name for field in fields(cls)}
        named = {_OLD_KEYS.get(key, key): value for key, value in values.items() if _OLD_KEYS.get(key, key) in known}
        if isinstance(named.get("image"), Mapping):
            picture = named["image"]
            named["image"] = picture.get("image")
            named.setdefault("mask_image", picture.get("mask"))
        unit = cls(**{key: value for key, value in named.items() if value is not None})
        unit.normalise()
        return unit

    def normalise(self) -> None:
        """Bring choices and numbers into their types. Raises RequestError."""
        for name, choice in _CHOICES.items():
            try:
                setattr(self, name, choice.read(getattr(self, name)))
            except ValueError as error:
                raise RequestError(f"ControlNet's {name}: {error}") from error
        self.union_control_type = _read_union_type(self.union_control_type)
        for name in _NUMBERS:
            value = getattr(self, name)
            try:
                number = float(value)
            except (TypeError, ValueError) as error:
                raise RequestError(f"ControlNet's {name} is {value!r}; it must be a number.") from error
            if not math.isfinite(number):
                raise RequestError(f"ControlNet's {name} is {value!r}; it must be a finite number.")
            setattr(self, name, number)
        self.module, self.model = str(self.module or "None"), str(self.model or "None")
        if not 0.0 <= self.guidance_start <= self.guidance_end <= 1.0:
            raise RequestError(
                f"ControlNet's guidance_start is {self.guidance_start:g} and guidance_end {self.guidance_end:g}; "
                "they lie between 0 and 1, the start not after the end."
            )


def _read_union_type(value: Any) -> ControlNetUnionControlType | None:
    """None where it is left to the preprocessor. Raises RequestError."""
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
    """How many units a tab has."""
    from modules import shared

    return int(shared.opts.control_net_unit_count)


def resize_mode_from_value(value: Any) -> ResizeMode:
    """The resize mode that a text or number means."""
    return ResizeMode.read(value)


def control_mode_from_value(value: Any) -> ControlMode:
    """The control mode that a text or number means."""
    return ControlMode.read(value)


def pixel_perfect_resolution(image: np.ndarray, target_H: int, target_W: int, resize_mode: ResizeMode) -> int:
    """The preprocessor's resolution (the shorter side) at which one pixel of the map is one of the picture that is made."""
    height, width = image.shape[:2]
    scales = float(target_H) / height, float(target_W) / width
    scale = min(scales) if resize_mode is ResizeMode.OUTER_FIT else max(scales)
    return max(64, round(scale * min(height, width)))


def to_base64_nparray(encoding: str) -> np.ndarray:
    """The picture of a base64 text, with or without the head of a data URL, as (H, W, 3) or (H, W, 4). Raises RequestError."""
    try:
        data = base64.b64decode(encoding.split(",", 1)[1] if encoding.startswith("data:") else encoding)
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGBA" if "A" in image.getbands() else "RGB"))
    except (ValueError, OSError, SyntaxError, IndexError) as error:
        raise RequestError("A picture of ControlNet cannot be decoded; send a PNG, JPEG or WEBP file as base64.") from error
