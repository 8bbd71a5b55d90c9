"""Scripts of extensions on the page: their controls in a generation tab, section by section, and the tabs they add.

Must not know what a script does, nor the other controls of a tab.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component

from modules import scripts
from modules.launch.guest_calls import call_guest
from modules.pictures.postprocessing_operations import build_runner
from modules.scripts import callbacks, gradio_compatibility
from modules.scripts.postprocessing import ScriptPostprocessingRunner
from modules.scripts.runner import ScriptRunner

if TYPE_CHECKING:
    from modules.application import Application

log = logging.getLogger(__name__)

ARGUMENT = "script_argument_"
"""Name of a script control among the inputs of a tab: this prefix and the slot index."""


class TabScripts:
    """The scripts of the tab being built. `section` inserts the controls of one section, `rest` all others."""

    def __init__(self, runner: ScriptRunner, tab: str) -> None:
        self.runner = runner
        self.tab = tab
        self._built: set[str | None] = {None}

    def section(self, name: str) -> None:
        """The controls of scripts that ask for section `name`."""
        self._built.add(name)
        self.runner.setup_ui_for_section(name)

    def rest(self) -> None:
        """Controls of sections that the tab does not have, then those without a section, then the Script dropdown."""
        unknown = {script.section for script in self.runner.alwayson_scripts} - self._built
        for section in sorted(str(name) for name in unknown):
            self.section(section)
        with gr.Column(elem_id=f"{self.tab}_script_container", elem_classes=["script-container"]):
            self.runner.setup_ui()

    def inputs(self) -> dict[str, Component]:
        """All controls, keyed by slot name."""
        return {f"{ARGUMENT}{slot}": control for slot, control in enumerate(self.runner.inputs)}


def no_scripts(tab: str) -> TabScripts:
    """A tab without scripts: only the dropdown."""
    return TabScripts(ScriptRunner(), tab)


def arguments_from(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """The flat argument list of all scripts, taken from a tab's input values."""
    count = sum(name.startswith(ARGUMENT) for name in values)
    return tuple(values[f"{ARGUMENT}{slot}"] for slot in range(count))


@contextlib.contextmanager
def tab_scripts(app: Application, tab: str) -> Iterator[TabScripts]:
    """The scripts of `tab`, as they were made when extensions were loaded, while it is built."""
    runner = app.script_runners.get(tab)
    if runner is None:
        runner = ScriptRunner()
    runner.prepare_ui()
    scripts.set_current(runner)
    try:
        yield TabScripts(runner, tab)
    finally:
        scripts.set_current(None)


def postprocessing_runner() -> ScriptPostprocessingRunner:
    """The operations of the Extras tab: built-in ones and those of extensions."""
    runner = build_runner()
    runner.initialize_scripts(scripts.postprocessing_scripts_data)
    scripts.set_postprocessing(runner)
    return runner


@contextlib.contextmanager
def page_build() -> Iterator[None]:
    """While a page is built: support old gradio habits, and notify listeners of every control."""
    gradio_compatibility.install()
    callbacks.before_ui_callback()
    with gradio_compatibility.watching_components(_before, _after):
        yield


def name_its_kind(component: Any) -> None:
    """Give a control the class of its kind (`gradio-slider`, `gradio-row` ...), by which scripts and style sheets of extensions find it."""
    classes = [f"gradio-{component.get_block_name()}"]
    if getattr(component, "multiselect", False):
        classes.append("multiselect")
    component.elem_classes = [*classes, *(name for name in component.elem_classes or [] if name not in classes)]


def _before(component: Any, **kwargs: Any) -> None:
    if scripts.scripts_current is not None:
        scripts.scripts_current.before_component(component, **kwargs)
    callbacks.before_component_callback(component, **kwargs)


def _after(component: Any, **kwargs: Any) -> None:
    name_its_kind(component)
    callbacks.after_component_callback(component, **kwargs)
    if scripts.scripts_current is not None:
        scripts.scripts_current.after_component(component, **kwargs)


def create_extension_tabs() -> None:
    """Build the tabs of extensions inside the current gr.Tabs."""
    for interface, title, elem_id in _tabs():
        with gr.Tab(title, id=elem_id, elem_id=f"tab_{elem_id}"):
            call_guest(interface.render, f"tab {title!r} of an extension could not be built; the page is built without its content")


def _tabs() -> Iterator[tuple[Any, str, str]]:
    seen: set[str] = set()
    with gradio_compatibility.outside_of_page():
        entries = callbacks.ui_tabs_callback()
    for entry in entries:
        try:
            interface, title, elem_id = entry
        except (TypeError, ValueError):
            log.error("on_ui_tabs: an extension returned %r; expected (Blocks, title, elem_id). The tab is left out.", entry)
            continue
        if elem_id in seen:
            log.error("on_ui_tabs: two tabs have the id %r; the second, %r, is left out.", elem_id, title)
            continue
        seen.add(elem_id)
        yield interface, title, elem_id
