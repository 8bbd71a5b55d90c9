"""Parses an infotext into values: current names, and a default for every key that may be missing. `parameters` exposes it under the name that
extensions import.

Must not know the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from modules.infotext.civitai import UNKNOWN_SAMPLER, is_civitai_flux, reread_flux
from modules.infotext.foreign import COMFY_SAMPLERS, COMFY_SCHEDULES
from modules.infotext.text import parse_infotext
from modules.infotext.versions import backcompat
from modules.jobs.context import installed_context

DEFAULTS: Mapping[str, str] = {
    "Clip skip": "1",
    "Hires resize-1": "0",
    "Hires resize-2": "0",
    "Hires sampler": "Use same sampler",
    "Hires schedule type": "Use same scheduler",
    "Hires checkpoint": "Use same checkpoint",
    "Hires prompt": "",
    "Hires negative prompt": "",
    "Mask mode": "Inpaint masked",
    "Masked content": "original",
    "Inpaint area": "Whole picture",
    "Masked area padding": "32",
    "RNG": "GPU",
    "Schedule type": "Automatic",
    "Schedule max sigma": "0",
    "Schedule min sigma": "0",
    "Schedule rho": "0",
    "VAE Encoder": "Full",
    "VAE Decoder": "Full",
    "FP8 weight": "Disable",
    "Cache FP16 weight for LoRA": "False",
    "Refiner switch by sampling steps": "False",
    "Emphasis": "Original",
    "Shift": "0",
    "Shift by size": "False",
    "Forge flow schedules": "False",
}
"""The meaning of a missing key. Infotexts omit these, so pasting one must reset them."""

OLD_FIRST_PASS_AREA_PX = 512 * 512
_LARGEST_SIDE_PX = 1_000_000
_OTHER_SPELLINGS = {"Beta scheduler alpha": "Beta schedule alpha", "Beta scheduler beta": "Beta schedule beta"}


def parse_generation_parameters(x: str, skip_fields: Sequence[str] | None = None) -> dict[str, Any]:
    """The contents of an infotext, as strings by key, with a default for every key it may omit.

    `skip_fields` (default: the setting infotext_skip_pasting) are keys to leave out. A text without parameters yields only its prompts and the
    defaults.
    """
    application = installed_context()
    options = None if application is None else application.options
    if skip_fields is None:
        skip_fields = list(options.infotext_skip_pasting) if options is not None else []
    params: dict[str, Any] = dict(parse_infotext(x))
    if is_civitai_flux(params):
        reread_flux(params)
    _use_our_names(params)
    _restore_old_hires_sizes(params, bool(options and options.use_old_hires_fix_width_height))
    if application is not None:
        _take_out_styles(params, application)
    for key, value in DEFAULTS.items():
        params.setdefault(key, value)
    for first_pass, second_pass in (("CFG scale", "Hires CFG Scale"), ("Distilled CFG Scale", "Hires Distilled CFG Scale")):
        if first_pass in params:  # without a separate value, the hires pass used the same one
            params.setdefault(second_pass, params[first_pass])
    if options is None or options.auto_backcompat:
        backcompat(params)
    for key in skip_fields:
        params.pop(key, None)
    return params


def _use_our_names(params: MutableMapping[str, Any]) -> None:
    """Keys, samplers and schedules as other programs spell them, by the names they have here."""
    for theirs, ours in _OTHER_SPELLINGS.items():
        if theirs in params:
            params.setdefault(ours, params.pop(theirs))
    sampler = params.get("Sampler")
    if sampler is None:
        return
    if sampler == UNKNOWN_SAMPLER:  # Civitai writes it for models that its own list does not know
        del params["Sampler"]
        return
    name, schedule = _comfy_names(sampler)
    if name is not None:
        params["Sampler"] = name
        if schedule is not None:
            params.setdefault("Schedule type", schedule)
    written = params.get("Schedule type")
    if written is not None:
        params["Schedule type"] = COMFY_SCHEDULES.get(written, written)


def _comfy_names(sampler: str) -> tuple[str | None, str | None]:
    """(sampler, schedule) from ComfyUI's spelling, which may join the two with an underscore or a space."""
    if sampler in COMFY_SAMPLERS:
        return COMFY_SAMPLERS[sampler], None
    for comfy_schedule, schedule in COMFY_SCHEDULES.items():
        for joint in ("_", " "):
            name = sampler.removesuffix(f"{joint}{comfy_schedule}")
            if name != sampler and name in COMFY_SAMPLERS:
                return COMFY_SAMPLERS[name], schedule
    return None, None


def old_first_pass_size_px(width_px: int, height_px: int) -> tuple[int, int]:
    """First pass size of hires fix before sizes were recorded: about 512x512 px in the picture's aspect ratio, sides multiples of 64."""
    scale = math.sqrt(OLD_FIRST_PASS_AREA_PX / (width_px * height_px))
    return math.ceil(scale * width_px / 64) * 64, math.ceil(scale * height_px / 64) * 64


def _restore_old_hires_sizes(params: MutableMapping[str, Any], keep_old_meaning: bool) -> None:
    """In old infotexts, Size was the final size: move it to `Hires resize`, and `First pass size` to Size."""
    try:
        first = int(params["First pass size-1"]), int(params["First pass size-2"])
        final = int(params["Size-1"]), int(params["Size-2"])
    except (KeyError, ValueError):
        return
    if keep_old_meaning or not all(0 < side <= _LARGEST_SIDE_PX for side in final):
        return
    if 0 in first:
        first = old_first_pass_size_px(*final)
    params.update({"Size-1": str(first[0]), "Size-2": str(first[1]), "Hires resize-1": str(final[0]), "Hires resize-2": str(final[1])})


def _take_out_styles(params: MutableMapping[str, Any], application: Any) -> None:
    """Find saved styles in the prompts, according to the setting infotext_styles: Ignore, Discard, Apply, Apply if any."""
    mode = application.options.infotext_styles
    styles = getattr(application, "styles", None)
    if mode == "Ignore" or styles is None:
        return
    found, prompt, negative_prompt = styles.extract_styles_from_prompt(params.get("Prompt", ""), params.get("Negative prompt", ""))
    params["Prompt"], params["Negative prompt"] = prompt, negative_prompt
    if mode == "Apply" or (mode == "Apply if any" and found):
        params["Styles array"] = found
