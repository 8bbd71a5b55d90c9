"""The script host under the names that extensions import: their base class, the loaded scripts, and the runners of the tabs.

Reading order: `base` (`Script`), `hooks` and `hook_arguments` (every hook, with its arguments), `loading` (finds and imports files),
`runner` (the scripts of one tab), `controls` and `without_page` (script arguments, with and without a page), `callbacks` and `events`
(events outside a job), `postprocessing` (operations of the Extras tab), `installed` and `extension_order` (extension folders),
`installing` (git).
The rest: `arguments`, `files`, `gradio_compatibility`, `hook_signatures`.

Example: extensions/tiler/scripts/tiler.py defines `class Tiler(scripts.Script)` with `process(self, p, enabled)`. `loading` imports the
file, the class goes into `scripts_data`, `ScriptRunner` creates one instance per tab, `hooks` checks the signature, and processing calls
`p.scripts.process(p)`. A new hook needs a row in `hooks`, a call in modules/processing and a heading in docs/extensions.md.

webui.py loads the extensions of an application with `load_scripts`. Importing this package loads nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from modules.app_config import SCRIPT_DIR
from modules.scripts import callbacks as script_callbacks
from modules.scripts import installed as extensions
from modules.scripts.arguments import checked_value, checked_values
from modules.scripts.base import AlwaysVisible, Script, ScriptBuiltinUI
from modules.scripts.files import ScriptClassData, ScriptFile
from modules.scripts.hook_arguments import (
    MaskBlendArgs,
    OnComponent,
    PostprocessBatchListArgs,
    PostprocessImageArgs,
    PostProcessMaskOverlayArgs,
    PostSampleArgs,
)
from modules.scripts.loading import Basedir, import_scripts, list_files_with_name, list_scripts
from modules.scripts.postprocessing import ScriptPostprocessingRunner
from modules.scripts.runner import ScriptRunner

if TYPE_CHECKING:
    from modules.application import Application

__all__ = [
    "AlwaysVisible",
    "MaskBlendArgs",
    "OnComponent",
    "PostProcessMaskOverlayArgs",
    "PostSampleArgs",
    "PostprocessBatchListArgs",
    "PostprocessImageArgs",
    "Script",
    "ScriptBuiltinUI",
    "ScriptClassData",
    "ScriptFile",
    "ScriptRunner",
    "basedir",
    "checked_value",
    "checked_values",
    "list_files_with_name",
    "list_scripts",
    "load_scripts",
    "reload_scripts",
    "script_callbacks",
    "scripts_data",
]

scripts_data: list[ScriptClassData] = []
"""Classes of scripts, in load order."""
postprocessing_scripts_data: list[ScriptClassData] = []
"""Classes of operations of the Extras tab."""
loaded_scripts = scripts_data

_basedir = Basedir()
_FOLDER_OF_OURS = str(SCRIPT_DIR / "extensions-builtin")


def _is_ours(path: str) -> bool:
    return path.startswith(_FOLDER_OF_OURS)


scripts_txt2img = ScriptRunner(lambda: scripts_data, _is_ours)
scripts_img2img = ScriptRunner(lambda: scripts_data, _is_ours)
scripts_postproc = ScriptPostprocessingRunner()
scripts_current: ScriptRunner | None = None
"""The runner of the tab being built."""


def basedir() -> str:
    """The folder of the extension whose script is being imported; valid only during the import."""
    return _basedir.current


def load_scripts(app: Application | None = None) -> None:
    """Find the application's extensions, import their scripts, and give the application the runners of its tabs."""
    from modules.application import current_application  # extensions call this without an application

    app = current_application() if app is None else app
    unload_scripts()
    app.extensions = extensions.list_extensions(app.config, app.options)
    script_callbacks.order_rules[:] = [rule for owner in extensions.active() for rule in owner.metadata.list_callback_order_instructions()]
    if extensions.active():
        _support_old_gradio()
    for data in import_scripts(_basedir):
        (scripts_data if issubclass(data.script_class, Script) else postprocessing_scripts_data).append(data)
    app.script_runners = {"txt2img": scripts_txt2img, "img2img": scripts_img2img}
    for runner in app.script_runners.values():  # before settings are collected: constructors of scripts register callbacks too
        runner.initialize_scripts(runner is scripts_img2img)
    script_callbacks.ui_settings_callback()
    app.models.on_loaded[:] = [*(known for known in app.models.on_loaded if known is not _model_loaded), _model_loaded]


def _support_old_gradio() -> None:
    from modules.scripts import gradio_compatibility  # imports gradio

    gradio_compatibility.install()


def _model_loaded(engine: Any) -> None:
    script_callbacks.model_loaded_callback(engine)


def unload_scripts() -> None:
    """Let every extension undo its patches, then forget them all."""
    script_callbacks.script_unloaded_callback()
    script_callbacks.clear_callbacks()
    scripts_data.clear()
    postprocessing_scripts_data.clear()
    extensions.forget()
    for runner in (scripts_txt2img, scripts_img2img):
        runner.initialize_scripts(runner is scripts_img2img)
        runner.prepare_ui()


def reload_scripts() -> None:
    """Load everything again."""
    load_scripts()


def set_postprocessing(runner: ScriptPostprocessingRunner) -> None:
    """Set the operations of the Extras tab."""
    sys.modules[__name__].scripts_postproc = runner  # type: ignore[attr-defined]  # a name that extensions read here


def set_current(runner: ScriptRunner | None) -> None:
    """Set the tab being built."""
    sys.modules[__name__].scripts_current = runner  # type: ignore[attr-defined]  # a name that extensions read here
