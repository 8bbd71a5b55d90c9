"""The Extensions tab: lists what is installed and chooses what to load at the next start.

Must not know what an extension does. Users install and update extensions with git in the `extensions` folder; the tab says so.
"""

from __future__ import annotations

import html
import logging
from typing import TYPE_CHECKING, Any

import gradio as gr

from modules.errors import OptionError
from modules.ui.shown_text import plaintext_to_html

if TYPE_CHECKING:
    from modules.application import Application

log = logging.getLogger(__name__)

KINDS = ("none", "extra", "all")
RESTART_JS = "(...values) => { restart_reload(); return values; }"


class ExtensionsHandlers:
    """Handlers of the tab's buttons."""

    def __init__(self, app: Application) -> None:
        self.app = app

    def names(self) -> list[str]:
        """Extensions that can be turned on or off."""
        return [extension.name for extension in self.app.extensions]

    def switched_on(self) -> list[str]:
        disabled = set(self.app.options.disabled_extensions or [])
        return [name for name in self.names() if name not in disabled]

    def save(self, wanted: list[str] | None, disable_all: str) -> str:
        """Save the switches; they take effect at the next start. Returns an HTML line saying what was done."""
        app, on = self.app, set(wanted or [])
        if app.config.disable_extension_access:
            return plaintext_to_html(
                "Extensions cannot be turned on or off from other computers. Start with --enable-insecure-extension-access to allow it.", "error"
            )
        unknown = [name for name in app.options.disabled_extensions or [] if name not in self.names()]
        try:
            app.options.set("disabled_extensions", [*unknown, *(name for name in self.names() if name not in on)])
            app.options.set("disable_all_extensions", disable_all if disable_all in KINDS else "none")
            app.save_options()
        except (OptionError, OSError) as error:
            return plaintext_to_html(f"The switches could not be saved: {error}", "error")
        return plaintext_to_html("Saved. Takes effect at the next start.")

    def save_and_restart(self, wanted: list[str] | None, disable_all: str) -> str:
        """Like save(), then restart if the program can."""
        said = self.save(wanted, disable_all)
        if "class='error'" not in said:
            self.app.state.request_restart()
        return said

    def table(self) -> str:
        """A table of every extension: its source and its state."""
        rows = "".join(self._row(extension) for extension in self.app.extensions)
        if not rows:
            return plaintext_to_html(f"There are no extensions. Put extension folders into {self.app.config.extensions_dir} and restart.")
        head = "<tr><th>Extension</th><th>From</th><th>Branch</th><th>Version</th><th>State</th></tr>"
        return f"<table id='extensions'><thead>{head}</thead><tbody>{rows}</tbody></table>"

    @staticmethod
    def _row(extension: Any) -> str:
        extension.read_info_from_repo()
        source = "built-in" if extension.is_builtin else extension.remote or "folder"
        state = "on" if extension.enabled else extension.status or "off"
        cells = (extension.name, source, extension.branch or "", extension.version, state)
        return f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in cells)}</tr>"


def create_extensions_tab(app: Application, item: gr.Tab) -> None:
    """Build the tab inside the current gradio context; `item` is the main tab around it."""
    handlers = ExtensionsHandlers(app)
    options = app.options
    with gr.Row():
        apply = gr.Button("Apply and restart" if app.restartable else "Apply", variant="primary", elem_id="extensions_apply")
        disable_all = gr.Radio(
            label="Load no extensions", choices=list(KINDS), value=options.disable_all_extensions, elem_id="extensions_disable_all", scale=3
        )
    result = gr.HTML(elem_id="extensions_result")
    wanted = gr.CheckboxGroup(label="To be loaded", choices=handlers.names(), value=handlers.switched_on(), elem_id="extensions_enabled_list")
    table = gr.HTML(elem_id="extensions_installed_html")
    gr.HTML(
        plaintext_to_html(f"To install an extension, clone it into {app.config.extensions_dir} and restart. To update one, run git pull there."),
        elem_id="extensions_how_to_install",
    )
    inputs = [wanted, disable_all]
    if app.restartable and not app.config.disable_extension_access:
        apply.click(
            handlers.save_and_restart, js=RESTART_JS, inputs=inputs, outputs=[result], show_progress="hidden", queue=False, api_visibility="private"
        )
    else:
        apply.click(handlers.save, inputs=inputs, outputs=[result], show_progress="hidden", queue=False, api_visibility="private")
    item.select(handlers.table, outputs=[table], show_progress="hidden", queue=False, api_visibility="private")
