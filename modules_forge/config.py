"""Extensions that must not be loaded because their function is built in; loading both would apply it twice."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

INSTEAD: Mapping[str, str] = MappingProxyType(
    {
        "sd-webui-controlnet": "ControlNet is built in; use its panel in the txt2img and img2img tabs",
        "multidiffusion-upscaler-for-automatic1111": "use the panels MultiDiffusion Integrated and Regional Prompts, which do the same",
        "forge_space_example": "spaces are not part of this program",
    }
)
"""Folder name -> what to use instead."""

always_disabled_extensions = list(INSTEAD)
