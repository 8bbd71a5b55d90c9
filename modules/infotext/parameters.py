"""Generation parameters under the names that extensions import: parsing with all defaults, settings that an infotext asks for, paste fields.

The text form itself is modules/infotext/text.py; the buttons that fill a page's controls are modules/infotext/paste.py. Must not know tabs.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from modules.errors import OptionError
from modules.infotext.foreign import COMFY_SAMPLERS, COMFY_SCHEDULES
from modules.infotext.paste import (
    ParamBinding,
    PasteField,
    add_paste_fields,
    bind_buttons,
    connect_paste_params_buttons,
    create_buttons,
    image_from_url_text,
    paste_fields,
    register_paste_params_button,
    registered_param_bindings,
    reset,
    send_image_and_dimensions,
)
from modules.infotext.text import build_infotext, iterate_pairs, parse_infotext, quote, unquote
from modules.infotext.versions import backcompat
from modules.jobs.context import installed_context

__all__ = [
    "ParamBinding",
    "PasteField",
    "add_paste_fields",
    "bind_buttons",
    "build_infotext",
    "connect_paste_params_buttons",
    "create_buttons",
    "create_override_settings_dict",
    "get_override_settings",
    "image_from_url_text",
    "parse_generation_parameters",
    "paste_fields",
    "quote",
    "register_paste_params_button",
    "registered_param_bindings",
    "reset",
    "send_image_and_dimensions",
    "unquote",
]

log = logging.getLogger(__name__)

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
}
"""What a missing key means. Written infotexts leave these out, so that pasting one must set them back."""

OLD_FIRST_PASS_AREA_PX = 512 * 512
_LARGEST_SIDE_PX = 1_000_000
_MODULE_KEY = re.compile(r"(?:Hires )?Module \d+")
_UNKNOWN_SAMPLER = "Undefined"


def _application() -> Any:
    return installed_context()


def parse_generation_parameters(x: str, skip_fields: Sequence[str] | None = None) -> dict[str, Any]:
    """What an infotext says, as texts by key, with a default for every key it may leave out.

    `skip_fields` (default: the setting infotext_skip_pasting) are keys to leave out. A text without parameters gives its prompts alone
    and the defaults.
    """
    application = _application()
    options = None if application is None else application.options
    if skip_fields is None:
        skip_fields = list(options.infotext_skip_pasting) if options is not None else []
    params: dict[str, Any] = dict(parse_infotext(x))
    _use_our_names(params)
    _restore_old_hires_sizes(params, bool(options and options.use_old_hires_fix_width_height))
    if application is not None:
        _take_out_styles(params, application)
    for key, value in DEFAULTS.items():
        params.setdefault(key, value)
    for first_pass, second_pass in (("CFG scale", "Hires CFG Scale"), ("Distilled CFG Scale", "Hires Distilled CFG Scale")):
        if first_pass in params:  # who wrote no other one, used the same in the hires pass
            params.setdefault(second_pass, params[first_pass])
    if options is None or options.auto_backcompat:
        backcompat(params)
    for key in skip_fields:
        params.pop(key, None)
    return params


def _use_our_names(params: MutableMapping[str, Any]) -> None:
    """Samplers and schedules as other programs spell them, by the names they have here."""
    sampler = params.get("Sampler")
    if sampler is None:
        return
    if sampler == _UNKNOWN_SAMPLER:  # Civitai writes it for models that its own list does not know
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
    """(sampler, schedule) of ComfyUI's spelling, which may join both by an underscore or a space."""
    if sampler in COMFY_SAMPLERS:
        return COMFY_SAMPLERS[sampler], None
    for comfy_schedule, schedule in COMFY_SCHEDULES.items():
        for joint in ("_", " "):
            name = sampler.removesuffix(f"{joint}{comfy_schedule}")
            if name != sampler and name in COMFY_SAMPLERS:
                return COMFY_SAMPLERS[name], schedule
    return None, None


def old_first_pass_size_px(width_px: int, height_px: int) -> tuple[int, int]:
    """The first pass that hires fix made before its sizes were written out: about 512x512 px in the picture's shape, sides multiples of 64."""
    scale = math.sqrt(OLD_FIRST_PASS_AREA_PX / (width_px * height_px))
    return math.ceil(scale * width_px / 64) * 64, math.ceil(scale * height_px / 64) * 64


def _restore_old_hires_sizes(params: MutableMapping[str, Any], keep_old_meaning: bool) -> None:
    """In old infotexts Size was the final size: it becomes `Hires resize`, and `First pass size` becomes Size."""
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
    """Find saved styles in the prompts, as the setting infotext_styles says: Ignore, Discard, Apply, Apply if any."""
    mode = application.options.infotext_styles
    styles = getattr(application, "styles", None)
    if mode == "Ignore" or styles is None:
        return
    found, prompt, negative_prompt = styles.extract_styles_from_prompt(params.get("Prompt", ""), params.get("Negative prompt", ""))
    params["Prompt"], params["Negative prompt"] = prompt, negative_prompt
    if mode == "Apply" or (mode == "Apply if any" and found):
        params["Styles array"] = found


# Settings that an infotext asks for


def _infotext_options(options: Any) -> dict[str, str]:
    """infotext key -> setting."""
    return {info.infotext: key for key, info in options.data_labels.items() if getattr(info, "infotext", None)}


def get_override_settings(params: Mapping[str, Any], *, skip_fields: Iterable[str] | None = None) -> list[tuple[str, str, Any]]:
    """(infotext key, setting, value) of every setting that `params` want otherwise than it is now.

    `skip_fields` are infotext keys that something else takes care of. Values a setting cannot take are left out with a warning.
    """
    application = _application()
    if application is None:
        return []
    skip = set(skip_fields or ())
    wanted: list[tuple[str, str, Any]] = []
    for infotext_key, setting in _infotext_options(application.options).items():
        if infotext_key in skip or params.get(infotext_key) is None:
            continue
        if setting == "sd_model_checkpoint":
            wanted += _wanted_checkpoint(params, application)
            continue
        try:
            value = application.options.cast_value(setting, params[infotext_key])
        except OptionError as error:
            log.warning("infotext %s: %s It is left out.", infotext_key, error)
            continue
        if value != getattr(application.options, setting, None):
            wanted.append((infotext_key, setting, value))
    if "Module 1" not in skip:
        wanted += _wanted_modules(params, application)
    return wanted


def _wanted_checkpoint(params: Mapping[str, Any], application: Any) -> list[tuple[str, str, Any]]:
    """The checkpoint that the infotext names, if it is here and another one than the selected; nothing when the settings say to leave it."""
    if application.options.disable_weights_auto_swap:
        return []
    info = application.checkpoints.find(params["Model hash"]) or application.checkpoints.find(params.get("Model"))
    if info is None or info is application.checkpoints.find(application.options.sd_model_checkpoint):
        return []
    return [("Model hash", "sd_model_checkpoint", info.title)]


def _wanted_modules(params: Mapping[str, Any], application: Any) -> list[tuple[str, str, Any]]:
    """VAE and text encoder files that the infotext names (`Module 1`, `Module 2` ...) and that are here."""
    stems = _module_stems(params)
    if not stems:
        return []
    files = {path.stem: str(path) for path in application.additional_modules.files.values()}
    found = [files[stem] for stem in stems if stem in files]
    if not found or found == list(application.options.forge_additional_modules):
        return []
    return [("Module 1", "forge_additional_modules", found)]


def _module_stems(params: Mapping[str, Any]) -> list[str]:
    return [value for key, value in params.items() if _MODULE_KEY.fullmatch(key) and not key.startswith("Hires")]


def missing_modules(params: Mapping[str, Any], application: Any) -> list[str]:
    """VAE and text encoder files that the infotext names and that are not here."""
    here = {path.stem for path in application.additional_modules.files.values()}
    return [stem for stem in _module_stems(params) if stem not in here]


def create_override_settings_dict(text_pairs: Iterable[str]) -> dict[str, Any]:
    """Settings by key from texts `infotext key: value`, as the page's override field holds them. Unknown keys are left out."""
    application = _application()
    if application is None:
        return {}
    by_infotext = _infotext_options(application.options)
    overrides: dict[str, Any] = {}
    for pair in text_pairs:
        infotext_key, colon, value = pair.partition(":")
        setting = by_infotext.get(infotext_key.strip())
        if infotext_key.strip() == "Module 1":
            setting, value = "forge_additional_modules", value.strip().removeprefix("[").removesuffix("]")
        if not colon or setting is None:
            continue
        if isinstance(application.options.get_default(setting), list):
            overrides[setting] = [item.strip().strip("'\"") for item in value.split(",") if item.strip()]
            continue
        overrides[setting] = application.options.cast_value(setting, value.strip())
    return overrides


def parse_pairs(line: str) -> dict[str, str]:
    """The `Key: value` pairs of one line."""
    return dict(iterate_pairs(line))
