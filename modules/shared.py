"""The lobby: what extensions read from `modules.shared`. Every name is looked up in the installed application on access.

This program's own modules never import this file; they take what they need as arguments. It contains only names that extensions may rely on;
tests/modules/test_shared.py has the list.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from modules.pictures.upscaler_list import available_upscalers
from modules.processing.constants import LATENT_UPSCALE_MODES
from modules.settings.options import OptionHTML, OptionInfo, options_section
from modules.settings.table import restricted_opts

if TYPE_CHECKING:
    from modules.application import Application

__all__ = ["OptionHTML", "OptionInfo", "latent_upscale_default_mode", "latent_upscale_modes", "options_section", "restricted_opts"]

latent_upscale_default_mode = "Latent"
latent_upscale_modes = LATENT_UPSCALE_MODES
batch_cond_uncond = True
parallel_processing_allowed = True
weight_load_location = None
hypernetworks: dict[str, Any] = {}
loaded_hypernetworks: list[Any] = []
face_restorers: list[Any] = []
interrogator = None
clip_model = None
settings_components: dict[str, Any] = {}
tab_names: list[str] = []
progress_print_out = None
mem_mon = None
options_templates: dict[str, Any] = {}
xformers_available = False


def _app() -> Application:
    from modules.application import current_application  # the application imports this file's neighbors

    return current_application()


class _CommandLine:
    """The flags by name with underscores; unknown names are None, because old extensions ask for removed flags."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _app().config.flags.get(name)

    def __contains__(self, name: str) -> bool:
        """Whether there is such a flag, set or not, as with argparse's own."""
        return name in _app().config.flags


class _TotalProgress:
    """`total_tqdm`: kept for extensions that clear or update it; the job shows its own progress."""

    def reset(self) -> None: ...

    def update(self) -> None: ...

    def updateTotal(self, new_total: int) -> None: ...

    def clear(self) -> None: ...


cmd_opts = _CommandLine()
total_tqdm = _TotalProgress()

_FROM_APPLICATION: dict[str, Callable[[Application], Any]] = {
    "opts": lambda app: app.options,
    "state": lambda app: app.state,
    "sd_model": lambda app: app.models.engine,
    "demo": lambda app: app.demo,
    "prompt_styles": lambda app: app.styles,
    "config_filename": lambda app: str(app.config.settings_file),
    "styles_filename": lambda app: [str(path) for path in app.config.styles_files],
    "hide_dirs": lambda app: {"visible": not app.config.hide_ui_dir_config},
    "gradio_theme": lambda app: getattr(app.demo, "theme", None),
    "data_path": lambda app: str(app.config.data_dir),
    "models_path": lambda app: str(app.config.models_dir),
    "sd_upscalers": lambda app: available_upscalers(),
    "hf_endpoint": lambda app: "https://huggingface.co",
}

# names defined elsewhere, imported on access
_ELSEWHERE = {
    "device": ("devices", "device"),
    "parser": ("cmd_args", "parser"),
    "natural_sort_key": ("util", "natural_sort_key"),
    "listfiles": ("util", "listfiles"),
    "walk_files": ("util", "walk_files"),
    "html_path": ("util", "html_path"),
    "html": ("util", "html"),
    "list_checkpoint_tiles": ("sd_models", "checkpoint_tiles"),
    "refresh_checkpoints": ("sd_models", "list_models"),
    "list_samplers": ("sd_samplers", "visible_sampler_names"),
}


def __getattr__(name: str) -> Any:
    if name in _FROM_APPLICATION:
        return _FROM_APPLICATION[name](_app())
    if name in _ELSEWHERE:
        module, attribute = _ELSEWHERE[name]
        return getattr(importlib.import_module(f"modules.{module}"), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def ldm_print(*args: Any, **kwargs: Any) -> None:
    """Kept for extensions that call it."""


def reload_hypernetworks() -> None:
    """Kept for extensions that call it; there are no hypernetworks."""


def reload_gradio_theme(theme_name: str | None = None) -> None:
    """Kept for extensions that call it; the theme is fixed when the page is built."""
