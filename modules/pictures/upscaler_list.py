"""The list of upscalers shared by page, API and extensions."""

from __future__ import annotations

import functools

from modules.jobs.context import installed_context
from modules.pictures.upscaler import UpscalerData, builtin_upscalers
from modules.pictures.upscaler_models import replace_entries


@functools.lru_cache(maxsize=1)
def _shared_list() -> list[UpscalerData]:
    return builtin_upscalers()


def available_upscalers() -> list[UpscalerData]:
    """The list shared by page, API and extensions (`shared.sd_upscalers`): built-in ones, current model files, and entries added by
    extensions."""
    app = installed_context()
    entries = _shared_list()
    replace_entries(entries, None if app is None else app.upscaler_models)
    return entries
