"""Generation parameters under the names that extensions import: parsing with all defaults, setting overrides from an infotext, paste fields.

Reading is modules/infotext/reading.py, the text form itself modules/infotext/text.py; the buttons that fill a page's controls are
modules/infotext/paste.py. Must not know tabs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from modules.errors import OptionError
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
from modules.infotext.reading import parse_generation_parameters
from modules.infotext.text import build_infotext, iterate_pairs, quote, unquote
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

_MODULE_KEY = re.compile(r"(?:Hires )?Module \d+")


infotext_to_setting_name_mapping: list[tuple[str, str]] = []
"""(infotext key, setting) of extensions that add theirs here; today's way is OptionInfo(infotext=...)."""


def _application() -> Any:
    return installed_context()


# Setting overrides from an infotext


def _infotext_options(options: Any) -> dict[str, str]:
    """infotext key -> setting: those that settings name, and those that extensions added."""
    named = {info.infotext: key for key, info in options.data_labels.items() if getattr(info, "infotext", None)}
    return {**named, **dict(infotext_to_setting_name_mapping)}


def get_override_settings(params: Mapping[str, Any], *, skip_fields: Iterable[str] | None = None) -> list[tuple[str, str, Any]]:
    """(infotext key, setting, value) of every setting that `params` wants to differ from its current value.

    `skip_fields` are infotext keys handled elsewhere. Values that a setting does not accept are left out with a warning.
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
    """The infotext's checkpoint, if it exists here and is not selected already; nothing if the settings say to ignore it."""
    if application.options.disable_weights_auto_swap:
        return []
    info = application.checkpoints.find(params["Model hash"]) or application.checkpoints.find(params.get("Model"))
    if info is None or info is application.checkpoints.find(application.options.sd_model_checkpoint):
        return []
    return [("Model hash", "sd_model_checkpoint", info.title)]


def _wanted_modules(params: Mapping[str, Any], application: Any) -> list[tuple[str, str, Any]]:
    """VAE and text encoder files from the infotext (`Module 1`, `Module 2` ...) that exist here."""
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
    """VAE and text encoder files from the infotext that do not exist here."""
    here = {path.stem for path in application.additional_modules.files.values()}
    return [stem for stem in _module_stems(params) if stem not in here]


def create_override_settings_dict(text_pairs: Iterable[str]) -> dict[str, Any]:
    """Settings by key from `infotext key: value` texts, the format of the page's override field. Unknown keys are dropped."""
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
