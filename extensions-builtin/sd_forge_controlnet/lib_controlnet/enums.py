"""The choices of a unit, parsed from texts in any case, from numbers, and from older names."""

from __future__ import annotations

from enum import Enum
from typing import Any, TypeVar

ChoiceT = TypeVar("ChoiceT", bound="Choice")


class Choice(Enum):
    """A choice with the text shown on the page and in infotexts. The order of members defines their numbers."""

    @classmethod
    def read(cls: type[ChoiceT], value: Any) -> ChoiceT:
        """The member for a text, a number, or a member of any class with the same text. Raises ValueError listing the valid texts."""
        if isinstance(value, Enum):
            value = value.value
        members = list(cls)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer():
            number = cls._from_number(int(value))
            if 0 <= number < len(members):
                return members[number]
        if isinstance(value, str):
            wanted = _plain(value)
            for member in members:
                if wanted in (_plain(member.value), _plain(member.name), *(_plain(old) for old in cls._old_names().get(member.name, ()))):
                    return member
        raise ValueError(
            f"{value!r} is not a {cls.__name__}; use one of {', '.join(repr(member.value) for member in members)} or 0 to {len(members) - 1}."
        )

    @classmethod
    def _from_number(cls, number: int) -> int:
        return number

    @classmethod
    def _old_names(cls) -> dict[str, tuple[str, ...]]:
        return {}


def _plain(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


class ResizeMode(Choice):
    """How a hint is fitted to the picture's aspect ratio."""

    RESIZE = "Just Resize"
    INNER_FIT = "Crop and Resize"
    OUTER_FIT = "Resize and Fill"

    @classmethod
    def _from_number(cls, number: int) -> int:
        return 0 if number == 3 else number

    @classmethod
    def _old_names(cls) -> dict[str, tuple[str, ...]]:
        return {
            "INNER_FIT": ("Inner Fit (Scale to Fit)", "Scale to Fit (Inner Fit)"),
            "OUTER_FIT": ("Outer Fit (Shrink to Fit)", "Envelope (Outer Fit)"),
        }

    def int_value(self) -> int:
        """The number that API clients send."""
        return list(ResizeMode).index(self)


class ControlMode(Choice):
    """Whether the prompt or the ControlNet has more influence."""

    BALANCED = "Balanced"
    PROMPT = "My prompt is more important"
    CONTROL = "ControlNet is more important"


class HiResFixOption(Choice):
    """In which passes of hires fix a unit is active."""

    BOTH = "Both"
    LOW_RES_ONLY = "Low res only"
    HIGH_RES_ONLY = "High res only"


class ControlNetUnionControlType(Choice):
    """The kinds of hints that ControlNet Unions accept, in numerical order."""

    OPENPOSE = "OpenPose"
    DEPTH = "Depth"
    SOFTEDGE = "Soft Edge"
    HARDEDGE = "Hard Edge"
    NORMAL_MAP = "Normal Map"
    SEGMENTATION = "Segmentation"
    TILE = "Tile"
    INPAINT = "Inpaint"

    @classmethod
    def _old_names(cls) -> dict[str, tuple[str, ...]]:
        return {
            "SOFTEDGE": ("Scribble", "Sketch", "hed", "pidi", "ted", "hed/pidi/scribble/ted"),
            "HARDEDGE": ("Canny", "Lineart", "MLSD", "anime_lineart", "canny/lineart/anime_lineart/mlsd"),
            "NORMAL_MAP": ("Normal",),
            "SEGMENTATION": ("Segment", "Seg"),
            "TILE": ("Blur",),
            "INPAINT": ("Repaint",),
        }

    @property
    def number(self) -> int:
        """The number passed to the network."""
        return list(type(self)).index(self)


class InputMode(Choice):
    """Where a unit's pictures come from."""

    SIMPLE = "simple"
    BATCH = "batch"
    MERGE = "merge"


class BatchOption(Choice):
    """How several pictures of a unit are used."""

    DEFAULT = "All ControlNet units for all images in a batch"
    SEPARATE = "Each ControlNet unit for each image in a batch"
