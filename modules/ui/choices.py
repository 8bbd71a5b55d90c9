"""The choices in the page's dropdowns: samplers, schedules, files and styles."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from modules.pictures.upscaler_list import available_upscalers
from modules.processing.constants import LATENT_UPSCALE_MODES
from modules.samplers import registry
from modules.samplers import schedules as sd_schedulers
from modules.settings.inert import WHAT_IS_TRUE
from modules.ui.localization import NONE, find_localizations, read_localization
from modules.ui.page import THEMES
from modules.ui.part_order import PARTS
from modules.ui.sections import Choices, Defaults

if TYPE_CHECKING:
    from modules.application import Application

MAIN_TABS = ("Txt2img", "Img2img", "Extras", "PNG Info", "Checkpoint Merger", "Checkpoint tools", "History", "Queue", "Settings", "Extensions")


def sampler_names() -> list[str]:
    """Sampler names in list order, without those the user hides."""
    return list(registry.visible_sampler_names())


def schedule_labels() -> list[str]:
    return [schedule.label for schedule in sd_schedulers.schedulers]


def generation_choices(app: Application) -> Choices:
    """Dropdown choices of txt2img and img2img."""
    return Choices(
        samplers=sampler_names(),
        schedulers=schedule_labels(),
        upscalers=upscaler_names(),
        checkpoints=_titles(app),
        modules=list(app.additional_modules.files),
    )


def _titles(app: Application) -> list[str]:
    return app.checkpoints.titles(use_short=app.options.sd_checkpoint_dropdown_use_short)


def checkpoint_titles(app: Application) -> list[str]:
    """Titles of the checkpoints that are in the folders now."""
    app.checkpoints.refresh()
    return _titles(app)


def upscaler_names() -> list[str]:
    """Upscalers for hires fix: the latent modes, then the image upscalers."""
    return [*LATENT_UPSCALE_MODES, *(entry.name for entry in available_upscalers() if entry.name != "None")]


def setting_choices(app: Application) -> dict[str, list[str]]:
    """Choices of settings that are known only while the server runs."""
    vaes = ["Automatic", "None", *app.additional_modules.vaes]
    texts = {"localizations": [NONE, *localization_files(app)], "tabs": list(MAIN_TABS), "parts": list(PARTS)}
    settings = [key for key, info in app.options.data_labels.items() if info.section and info.section[0] is not None and key not in WHAT_IS_TRUE]
    return {**texts, "settings": settings, "samplers": sampler_names(), "schedulers": schedule_labels(), "themes": list(THEMES), "vaes": vaes}


def localization_files(app: Application) -> dict[str, Path]:
    """The localization files of the program and of extensions, by name."""
    folders = [Path(str(app.config.flags["localizations_dir"])), app.config.data_dir / "localizations"]
    return find_localizations([*folders, *(Path(extension.path) / "localizations" for extension in app.extensions if extension.enabled)])


def localization_table(app: Application) -> dict[str, str]:
    """The table of the chosen localization; empty for none."""
    file = localization_files(app).get(str(app.options.localization))
    return {} if file is None else read_localization(file)


def style_names(app: Application) -> list[str]:
    return app.styles.names()


def existing(defaults: Defaults, size_px: tuple[int, int] | None) -> Defaults:
    """`defaults` with unknown sampler and schedule names replaced, and with `size_px` if one is given."""
    samplers, schedules = sampler_names(), schedule_labels()
    sampler = defaults.sampler if defaults.sampler in samplers else samplers[0]
    scheduler = defaults.scheduler if defaults.scheduler in schedules else schedules[0]
    width, height = size_px or (defaults.width_px, defaults.height_px)
    return dataclasses.replace(defaults, sampler=sampler, scheduler=scheduler, width_px=width, height_px=height)
