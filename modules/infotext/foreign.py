"""Converts NovelAI's picture metadata to an infotext. Also re-exports modules/infotext/comfy.py for ComfyUI's graphs.

Pure: text in, text out. Must not know files, images or settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modules.infotext.comfy import COMFY_SAMPLERS, COMFY_SCHEDULES, infotext_from_comfy, json_object
from modules.infotext.text import build_infotext

__all__ = ["COMFY_SAMPLERS", "COMFY_SCHEDULES", "infotext_from_comfy", "infotext_from_novelai", "infotext_from_novelai_json"]

NOVELAI_SAMPLERS = {
    "k_dpmpp_2m": "DPM++ 2M",
    "k_dpmpp_sde": "DPM++ SDE",
    "k_dpmpp_2m_sde": "DPM++ 2M SDE",
    "k_dpmpp_2s_ancestral": "DPM++ 2S a",
    "k_dpm_fast": "DPM fast",
    "k_dpm_2": "DPM2",
    "k_dpm_2_ancestral": "DPM2 a",
    "k_euler": "Euler",
    "k_euler_ancestral": "Euler a",
    "k_heun": "Heun",
    "k_lms": "LMS",
    "ddim": "DDIM",
    "ddim_v3": "DDIM",
    "plms": "PLMS",
}
NOVELAI_CLIP_SKIP = 2
NOVELAI_ENSD = 31337


def infotext_from_novelai(description: str, comment: str, size_px: tuple[int, int]) -> str | None:
    """The infotext of a NovelAI picture from its `Description` and `Comment` chunks; None if the comment is not NovelAI's JSON."""
    settings = json_object(comment)
    return None if settings is None else _from_settings(description, settings, size_px)


def _from_settings(description: str, settings: Mapping[str, Any], size_px: tuple[int, int]) -> str | None:
    if "steps" not in settings:
        return None
    sampler = str(settings.get("sampler", ""))
    params = {
        "Steps": settings["steps"],
        "Sampler": NOVELAI_SAMPLERS.get(sampler, "Euler a"),
        "CFG scale": settings.get("scale"),
        "Seed": settings.get("seed"),
        "Size": f"{size_px[0]}x{size_px[1]}",
        "Denoising strength": settings.get("strength"),
        "Clip skip": NOVELAI_CLIP_SKIP,
        "ENSD": NOVELAI_ENSD,
    }
    prompt = description or str(settings.get("prompt", ""))
    return build_infotext(prompt, str(settings.get("uc") or ""), params)


def infotext_from_novelai_json(text: str, size_px: tuple[int, int]) -> str | None:
    """The infotext from the JSON object that NovelAI hides in the alpha bits (its chunks). None for any other text."""
    chunks = json_object(text)
    if chunks is None or not isinstance(chunks.get("Comment"), (str, dict)):
        return None
    settings = chunks["Comment"] if isinstance(chunks["Comment"], dict) else json_object(chunks["Comment"])
    return None if settings is None else _from_settings(str(chunks.get("Description") or ""), settings, size_px)
