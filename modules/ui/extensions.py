"""The Extensions tab: what is installed and what is loaded at the next start; updates, installing, an index of what is available, saved states.

Must not know what an extension does, nor how git is called (modules/scripts/installing.py). What is changed counts at the next start.
"""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from modules.errors import OptionError, RequestError
from modules.scripts import installing
from modules.ui.components import ToolButton
from modules.ui.shown_text import plaintext_to_html

if TYPE_CHECKING:
    from modules.application import Application

log = logging.getLogger(__name__)

KINDS = ("none", "extra", "all")
RESTART_JS = "(...values) => { restart_reload(); return values; }"
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
SLOW: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private", "concurrency_limit": 1}
DEFAULT_INDEX = "https://raw.githubusercontent.com/AUTOMATIC1111/stable-diffusion-webui-extensions/master/index.json"


class ExtensionsHandlers:
    """Handlers of the tab's buttons."""

    def __init__(self, app: Application) -> None:
        self.app = app
        self.states_dir = app.config.data_dir / "config_states"

    def names(self) -> list[str]:
        """Extensions that can be turned on or off."""
        return [extension.name for extension in self.app.extensions]

    def switched_on(self) -> list[str]:
        disabled = set(self.app.options.disabled_extensions or [])
        return [name for name in self.names() if name not in disabled]

    def _guarded(self, act: Callable[[], str]) -> str:
        """What `act` says in HTML, or why nothing was done."""
        if self.app.config.disable_extension_access:
            return plaintext_to_html(
                "Extensions cannot be changed from other computers. Start with --enable-insecure-extension-access to allow it.", "error"
            )
        try:
            return plaintext_to_html(act())
        except RequestError as error:
            return plaintext_to_html(str(error), "error")
        except OSError as error:
            return plaintext_to_html(f"The file system refused it: {error}", "error")

    def save(self, wanted: list[str] | None, disable_all: str) -> str:
        """Save the switches; they take effect at the next start. Returns an HTML line saying what was done."""
        on = set(wanted or [])
        return self._guarded(lambda: self._save([name for name in self.names() if name not in on], disable_all))

    def _save(self, off: Sequence[str], disable_all: str) -> str:
        app = self.app
        unknown = [name for name in app.options.disabled_extensions or [] if name not in self.names()]
        try:
            app.options.set("disabled_extensions", [*unknown, *off])
            app.options.set("disable_all_extensions", disable_all if disable_all in KINDS else "none")
            app.save_options()
        except (OptionError, OSError) as error:
            raise RequestError(f"The switches could not be saved: {error}") from error
        return "Saved. Takes effect at the next start."

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
        state = ", ".join(filter(None, ("on" if extension.enabled else "off", extension.status)))
        cells = (extension.name, source, extension.branch or "", extension.version, state)
        return f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in cells)}</tr>"

    # updates

    def _clones(self) -> list[Any]:
        return [extension for extension in self.app.extensions if installing.is_clone(extension)]

    def _each(self, act: Callable[[Any], str]) -> str:
        """What `act` says of every clone; a refusal is its line."""
        lines = []
        for extension in self._clones():
            try:
                lines.append(f"{extension.name}: {act(extension)}")
            except RequestError as error:
                lines.append(f"{extension.name}: {error}")
        return "\n".join(lines) or "No extension is a clone of a repository; the others are updated by copying new files."

    def check_updates(self) -> tuple[str, str]:
        """Returns (table, what was found)."""
        said = self._guarded(lambda: self._each(installing.check_update))
        return self.table(), said

    def update_all(self) -> tuple[str, str]:
        """Returns (table, what was done)."""
        said = self._guarded(lambda: self._each(installing.update))
        return self.table(), said

    # installing

    def install(self, source: str, name: str, branch: str) -> str:
        """Install from an address or a folder; it is loaded at the next start."""

        def act() -> str:
            target = installing.install(source or "", self.app.config.extensions_dir, name=(name or "").strip(), branch=branch or "")
            return f"Installed into {target}. It is loaded, and its own installer run, at the next start."

        return self._guarded(act)

    def available(self, source: str, words: str) -> tuple[str, str]:
        """(table of the index's entries that contain every word, what was said)."""
        found: list[installing.Available] = []

        def act() -> str:
            found.extend(installing.read_index(source or "", self.app.config.data_dir))
            return f"{len(found)} extensions."

        said = self._guarded(act)
        wanted = (words or "").lower().split()
        shown = [one for one in found if all(word in f"{one.name} {one.description} {' '.join(one.tags)}".lower() for word in wanted)]
        return self._available_table(shown) if shown else "", said

    def _available_table(self, entries: Sequence[installing.Available]) -> str:
        present = {str(extension.remote or "").removesuffix(".git").lower() for extension in self.app.extensions}
        rows = []
        for entry in entries:
            call = html.escape(f"install_extension_from_index(this, {json.dumps(entry.url)})", quote=True)
            has = entry.url.removesuffix(".git").lower() in present
            button = "installed" if has else f'<button type="button" class="install-extension" onclick="{call}">Install</button>'
            texts = (f"<b>{html.escape(entry.name)}</b><br><small>{html.escape(', '.join(entry.tags))}</small>", html.escape(entry.description))
            link = f"<small>{html.escape(entry.url)}</small>"
            rows.append(f"<tr><td>{texts[0]}</td><td>{texts[1]}<br>{link}</td><td>{html.escape(entry.added)}</td><td>{button}</td></tr>")
        head = "<tr><th>Extension</th><th>Description</th><th>Added</th><th></th></tr>"
        return f"<table id='available_extensions'><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"

    # saved states

    def states(self) -> list[str]:
        return installing.saved_states(self.states_dir)

    def save_state(self, name: str) -> tuple[Any, str]:
        """Returns (update of the list, what was done)."""

        def act() -> str:
            file = installing.save_state(self.states_dir, self.app.extensions, self.app.options.disabled_extensions or [], name or "")
            return f"Saved as {file.name}."

        said = self._guarded(act)
        return gr.update(choices=self.states(), value=next(iter(self.states()), None)), said

    def restore(self, name: str | None) -> str:
        """Bring extensions to the state `name`."""

        def act() -> str:
            off, done = installing.restore_state(self.states_dir, str(name or ""), self.app.extensions)
            self._save([one for one in off if one in self.names()], self.app.options.disable_all_extensions)
            return "\n".join([*done, "Restored; it counts at the next start."])

        return self._guarded(act)


def create_extensions_tab(app: Application, item: gr.Tab) -> None:
    """Build the tab inside the current gradio context; `item` is the main tab around it."""
    handlers = ExtensionsHandlers(app)
    with gr.Tabs(elem_id="tabs_extensions"):
        with gr.Tab("Installed", id="installed", elem_id="extensions_installed_tab"):
            table = _create_installed(app, handlers)
        with gr.Tab("Available", id="available", elem_id="extensions_available_tab"):
            _create_available(handlers)
        with gr.Tab("Install from URL or folder", id="install_from_url", elem_id="extensions_install_tab"):
            _create_install(app, handlers)
        with gr.Tab("Backup and restore", id="backup", elem_id="extensions_backup_tab"):
            _create_backup(handlers)
    item.select(handlers.table, outputs=[table], **QUIET)


def _create_installed(app: Application, handlers: ExtensionsHandlers) -> gr.HTML:
    with gr.Row(elem_id="extensions_installed_top"):
        apply = gr.Button("Apply and restart" if app.restartable else "Apply", variant="primary", elem_id="extensions_apply")
        check = gr.Button("Check for updates", elem_id="extensions_check")
        update = gr.Button("Update all", elem_id="extensions_update_all")
        disable_all = gr.Radio(
            label="Load no extensions", choices=list(KINDS), value=app.options.disable_all_extensions, elem_id="extensions_disable_all", scale=3
        )
    result = gr.HTML(elem_id="extensions_result")
    wanted = gr.CheckboxGroup(label="To be loaded", choices=handlers.names(), value=handlers.switched_on(), elem_id="extensions_enabled_list")
    table = gr.HTML(elem_id="extensions_installed_html")
    inputs = [wanted, disable_all]
    if app.restartable and not app.config.disable_extension_access:
        apply.click(handlers.save_and_restart, js=RESTART_JS, inputs=inputs, outputs=[result], **QUIET)
    else:
        apply.click(handlers.save, inputs=inputs, outputs=[result], **QUIET)
    check.click(handlers.check_updates, outputs=[table, result], **SLOW)
    update.click(handlers.update_all, outputs=[table, result], **SLOW)
    return table


def _create_available(handlers: ExtensionsHandlers) -> None:
    with gr.Row():
        index = gr.Textbox(
            value=DEFAULT_INDEX, label="Index", info="An address, or the name of a .json file in the data folder", elem_id="extensions_index_url",
            max_lines=1, scale=3,
        )  # fmt: skip
        words = gr.Textbox(label="Search", elem_id="available_extensions_search", max_lines=1)
        load = gr.Button("Load", variant="primary", elem_id="available_extensions_load")
    said = gr.HTML(elem_id="available_extensions_result")
    table = gr.HTML(elem_id="available_extensions_html")
    for event in (load.click, words.submit, index.submit):
        event(handlers.available, inputs=[index, words], outputs=[table, said], **SLOW)


def _create_install(app: Application, handlers: ExtensionsHandlers) -> None:
    text = (
        f"The repository is cloned, or the folder copied, into {app.config.extensions_dir}. Its code runs on the server: install only what you trust."
    )
    gr.HTML(plaintext_to_html(text), elem_id="extensions_how_to_install")
    source = gr.Textbox(label="Address of the repository, or a folder on the server", elem_id="extension_to_install", max_lines=1)
    with gr.Row():
        branch = gr.Textbox(label="Branch", placeholder="Empty: the repository's own", elem_id="extension_to_install_branch", max_lines=1)
        name = gr.Textbox(label="Name of its folder", placeholder="Empty: the repository's name", elem_id="extension_to_install_name", max_lines=1)
    button = gr.Button("Install", variant="primary", elem_id="install_extension_button")
    result = gr.HTML(elem_id="extension_install_result")
    button.click(handlers.install, inputs=[source, name, branch], outputs=[result], **SLOW)


def _create_backup(handlers: ExtensionsHandlers) -> None:
    with gr.Row(elem_id="extensions_backup_top_row"):
        states = gr.Dropdown(label="Saved states", choices=handlers.states(), value=None, elem_id="extension_backup_saved_configs")
        refresh = ToolButton(icon_name="refresh", elem_id="refresh_config_states")
        restore = gr.Button("Restore", elem_id="extension_backup_restore")
    with gr.Row(elem_id="extensions_backup_top_row2"):
        name = gr.Textbox(label="Name", placeholder="What this state is for", elem_id="extension_backup_name", max_lines=1)
        save = gr.Button("Save the current state", variant="primary", elem_id="extension_backup_save")
    result = gr.HTML(elem_id="extension_backup_result")
    refresh.click(lambda: gr.update(choices=handlers.states()), outputs=[states], **QUIET)
    save.click(handlers.save_state, inputs=[name], outputs=[states, result], **SLOW)
    restore.click(handlers.restore, inputs=[states], outputs=[result], **SLOW)
