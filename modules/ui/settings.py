"""The Settings tab, built from the table of options: one inner tab per section, Apply, search, and a page of actions.

Must not know any particular setting, unless its choices are known only while the server runs.
"""

from __future__ import annotations

import html
import importlib.metadata
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component

from modules.app_config import SCRIPT_DIR
from modules.errors import OptionError, RequestError
from modules.settings.inert import WHAT_IS_TRUE
from modules.settings.options import OptionInfo
from modules.settings.presets import NAMES as PRESET_NAMES
from modules.ui.components import DropdownMulti, FormRow, ToolButton
from modules.ui.load_save import StartValues, create_defaults_page
from modules.ui.sections import slider
from modules.ui.shown_text import error_html

if TYPE_CHECKING:
    from modules.application import Application

log = logging.getLogger(__name__)

MIN_SEARCH_CHARACTERS = 2
MAX_HITS = 30
OWNED_BY_QUICK_SETTINGS = frozenset(
    {"sd_model_checkpoint", "CLIP_stop_at_last_layers", "forge_additional_modules", "forge_unet_storage_dtype", "forge_preset"}
)
COMPONENTS: dict[str, Callable[..., Any]] = {
    "Checkbox": gr.Checkbox,
    "CheckboxGroup": gr.CheckboxGroup,
    "ColorPicker": gr.ColorPicker,
    "Dropdown": gr.Dropdown,
    "DropdownMulti": DropdownMulti,
    "HTML": gr.HTML,
    "Number": gr.Number,
    "Radio": gr.Radio,
    "Slider": slider,
    "Textbox": gr.Textbox,
}
LIVE_CHOICES: Mapping[str, str] = {
    **{f"{preset}_{tab}_{name}": f"{name}s" for preset in PRESET_NAMES for tab in ("t2i", "i2i") for name in ("sampler", "scheduler")},
    "hide_samplers": "samplers",
    "gradio_theme": "themes",
    "hidden_tabs": "tabs",
    "localization": "localizations",
    "quick_setting_list": "settings",
    "tabs_without_quick_settings_bar": "tabs",
    "ui_reorder_list": "parts",
    "ui_tab_order": "tabs",
    "sd_vae": "vaes",
}


MAX_LICENSE_NAME = 60
SHOW_ALL_HTML = (
    "<button type='button' id='settings_show_all_pages' onclick='showAllSettings(true)'>Show all pages</button>"
    "<button type='button' id='settings_show_one_page' class='hidden-part' onclick='showAllSettings(false)'>Show one page</button>"
)
SYSINFO_HTML = (
    "<p>Facts about this machine for a report of a fault: versions, flags, settings. Passwords are left out; look through it all the same.</p>"
    "<p><a href='internal/sysinfo-download' id='sysinfo_download' download>Download</a> &nbsp; "
    "<a href='internal/sysinfo' target='_blank' rel='noopener'>Show</a> &nbsp; "
    "<a href='#' onclick='showProfile(&quot;./internal/profile-startup&quot;); return false'>How long the start took</a></p>"
)


@dataclass(frozen=True, kw_only=True)
class SettingsTab:
    """`components` are the settings' controls by key."""

    apply: gr.Button
    result: gr.HTML
    components: Mapping[str, Component]


def sections_of(labels: Mapping[str, OptionInfo]) -> dict[tuple[str, str], dict[str, OptionInfo]]:
    """The options that have a page, by (section id, title), in table order. One section id may have two titles.

    An option without effect has none: it is kept for files and requests only (modules/settings/inert.py)."""
    sections: dict[tuple[str, str], dict[str, OptionInfo]] = {}
    for key, info in labels.items():
        if info.section and info.section[0] is not None and key not in OWNED_BY_QUICK_SETTINGS and key not in WHAT_IS_TRUE:
            sections.setdefault((str(info.section[0]), str(info.section[1])), {})[key] = info
    return sections


def settings_pages(labels: Mapping[str, OptionInfo]) -> list[tuple[str, str, dict[str, OptionInfo]]]:
    """(id of the inner tab, title, options) of each page."""
    return [(f"settings_tab_{section}_{number}", title, infos) for number, ((section, title), infos) in enumerate(sections_of(labels).items())]


def default_component(value: Any) -> Callable[..., Any]:
    """The control for a setting that specifies none, chosen by the type of its default."""
    if isinstance(value, bool):
        return gr.Checkbox
    if isinstance(value, (int, float)):
        return gr.Number
    return DropdownMulti if isinstance(value, list) else gr.Textbox


def _component_arguments(info: OptionInfo) -> dict[str, Any]:
    args = info.component_args() if callable(info.component_args) else info.component_args
    return dict(args or {})


def create_setting(key: str, info: OptionInfo, value: Any, choices: Mapping[str, list[str]], *, elem_id: str | None = None) -> Component:
    """The control of one setting, with its comment under it. `elem_id` is its DOM id if it is not the one on the Settings tab."""
    elem_id = elem_id or f"setting_{key}"
    kind = COMPONENTS[info.component] if isinstance(info.component, str) else info.component or default_component(info.default)
    args = _component_arguments(info)
    if kind in (gr.Dropdown, DropdownMulti, gr.Radio, gr.CheckboxGroup) and "choices" not in args:
        args["choices"] = _choices_for(key, value, info.default, choices)
        if kind in (gr.Dropdown, DropdownMulti):
            args.setdefault("allow_custom_value", True)
    if kind is gr.HTML:
        component = gr.HTML(info.default, elem_id=elem_id, **args)
    elif info.refresh is not None:
        with FormRow():
            component = kind(label=info.label, value=value, elem_id=elem_id, **args)
            button = ToolButton(icon_name="refresh", elem_id=elem_id.replace("setting_", "refresh_", 1))
            button.click(_refresher(info), outputs=[component], show_progress="hidden", queue=False, api_visibility="private")
    else:
        component = kind(label=info.label, value=value, elem_id=elem_id, **args)
    if info.comment_before or info.comment_after:
        gr.HTML(f"{info.comment_before} {info.comment_after}", elem_classes=["setting-comment"])
    return component


def create_setting_component(key: str, *, elem_id: str | None = None) -> Component:
    """The control of the setting `key` with its current value, for extensions that show settings elsewhere. Raises KeyError."""
    from modules.application import current_application  # extensions call this without an application
    from modules.ui.choices import setting_choices  # it imports the page's sections

    app = current_application()
    info = app.options.data_labels[key]
    return create_setting(key, info, getattr(app.options, key, info.default), setting_choices(app), elem_id=elem_id)


def get_value_for_setting(key: str) -> Any:
    """A gradio update with the setting's current value."""
    from modules.application import current_application  # extensions call this without an application

    return gr.update(value=getattr(current_application().options, key))


def chosen_quick_settings(app: Application) -> list[str]:
    """The settings that the user wants above the tabs: those named that have a page and are not there anyway."""
    shown = {key for infos in sections_of(app.options.data_labels).values() for key in infos}
    return [key for key in dict.fromkeys(map(str, app.options.quick_setting_list or [])) if key in shown]


def create_quick_settings_row(app: Application, choices: Mapping[str, list[str]]) -> dict[str, Component]:
    """The chosen settings, each of which is saved when it is changed; the caller connects them."""
    keys = chosen_quick_settings(app)
    if not keys:
        return {}
    with gr.Row(elem_id="quicksettings_more"):
        return {key: create_setting(key, app.options.data_labels[key], getattr(app.options, key), choices) for key in keys}


def connect_quick_settings(app: Application, components: Mapping[str, Component], settings_json: gr.Textbox) -> None:
    """Save a changed setting at once. What cannot be saved is said in a toast."""

    def connect(key: str, component: Component) -> None:
        handlers = SettingsHandlers(app, [key])

        def save(value: Any) -> str:
            shown, said = handlers.apply(value)
            if "class='error'" in said:
                gr.Warning(said)
            return shown

        event = (
            component.release if isinstance(component, gr.Slider) else getattr(component, "blur" if isinstance(component, gr.Textbox) else "input")
        )
        event(save, inputs=[component], outputs=[settings_json], show_progress="hidden", api_visibility="private")

    for key, component in components.items():
        if not isinstance(component, gr.HTML):
            connect(key, component)


def _refresher(info: OptionInfo) -> Callable[[], Any]:
    def refresh() -> Any:
        if info.refresh is not None:
            info.refresh()
        return gr.update(**_component_arguments(info))

    return refresh


def _choices_for(key: str, value: Any, default: Any, choices: Mapping[str, list[str]]) -> list[str]:
    live = choices.get(LIVE_CHOICES.get(key, ""), [])
    own = [*(value if isinstance(value, list) else [value]), *(default if isinstance(default, list) else [default])]
    return list(dict.fromkeys([*live, *(str(item) for item in own if item not in (None, ""))]))


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A setting that the search can find."""

    key: str
    label: str
    section: str
    tab_id: str


def _link(hit: Hit) -> str:
    target = html.escape(f"showSetting('{hit.tab_id}', 'setting_{hit.key}')", quote=True)
    return f"<button type='button' onclick=\"{target}\"><b>{html.escape(hit.label)}</b> <span>{html.escape(hit.section)}</span></button>"


class SettingsHandlers:
    """Handlers of Apply and the actions."""

    def __init__(self, app: Application, keys: list[str]) -> None:
        self.app = app
        self.keys = keys
        self._index = [
            Hit(key=key, label=info.label, section=title, tab_id=tab_id)
            for tab_id, title, infos in settings_pages(app.options.data_labels)
            for key, info in infos.items()
            if key in keys
        ]

    def apply(self, *values: Any) -> tuple[str, str]:
        """Save every changed value. Returns all settings as JSON, and a report; an invalid value is named in it and keeps its old value."""
        changed, problems = [], []
        for key, value in zip(self.keys, values):
            try:
                if self._is_change(key, value):
                    self._check(key, value)
                    if self.app.options.set(key, value):
                        changed.append(key)
            except RequestError as error:
                problems.append(str(error))
        try:
            if changed:
                self.app.save_options()
        except (RequestError, OSError) as error:
            problems.append(f"The settings apply until the server stops, but could not be saved: {error}")
        return self.app.options.dumpjson(), _result_html([self.app.options.data_labels[key].label for key in changed], problems)

    def _check(self, key: str, value: Any) -> None:
        """Raises OptionError for a change reserved to users of this machine or users with a password."""
        options, is_trusted = self.app.options, self.app.config.page_is_trusted
        info, cast = options.data_labels[key], options.cast_value(key, value)
        if cast == options.data.get(key):
            return
        if info.restrict_api and not is_trusted:
            raise OptionError(f"setting {key!r} cannot be changed from other computers while the page has no password. Start with --gradio-auth.")
        self.app.folders.check_from_client(key, info, cast, is_trusted=is_trusted)

    def _is_change(self, key: str, value: Any) -> bool:
        """An emptied field arrives as None and changes nothing if the setting has a value."""
        return not (value is None and self.app.options.get_default(key) is not None)

    def refresh(self, shown: str) -> list[Any]:
        """New values for the controls and `settings_json` if any setting differs from the JSON `shown`; else no change."""
        now = self.app.options.dumpjson()
        if now == shown:
            return [gr.skip() for _ in range(len(self.keys) + 1)]
        return [*(gr.update(value=getattr(self.app.options, key)) for key in self.keys), now]

    def search(self, text: str) -> str:
        """Links to the settings whose label or key contains `text`."""
        wanted = text.strip().lower()
        if len(wanted) < MIN_SEARCH_CHARACTERS:
            return ""
        hits = [hit for hit in self._index if wanted in hit.label.lower() or wanted in hit.key.lower()]
        links = "".join(_link(hit) for hit in hits[:MAX_HITS])
        return f"<div class='settings-hits'>{links or 'No setting has a label or name containing that.'}</div>"

    def unload_models(self) -> str:
        """Free every model; the next job loads what it needs."""
        self.app.jobs.run_and_wait(None, "unload models", self.app.models.unload)
        return "<p>All models have been unloaded. The next job loads what it needs.</p>"


def _result_html(changed: list[str], problems: list[str]) -> str:
    done = f"<p>{len(changed)} setting{'' if len(changed) == 1 else 's'} changed{': ' + ', '.join(changed) if changed else ''}.</p>"
    return done + "".join(f"<div class='html-log'>{error_html(problem)}</div>" for problem in problems)


def create_settings_tab(
    app: Application, choices: Mapping[str, list[str]], settings_json: gr.Textbox, item: gr.Tab, *, start_values: StartValues | None = None
) -> SettingsTab:
    """Build the tab inside the current gradio context. `choices`: what is known only while the server runs (`choices.setting_choices`).

    `settings_json`, a hidden box outside the tabs, gives the page's scripts all values; `item` is the main tab around this one. `start_values`: the
    fields of the Defaults page."""
    options = app.options
    components: dict[str, Component] = {}
    shown_above = chosen_quick_settings(app)
    with gr.Row(elem_id="settings_top"):
        apply = gr.Button("Apply settings", variant="primary", elem_id="settings_submit")
        restart = gr.Button("Reload UI", elem_id="settings_restart_gradio", visible=app.restartable)
        gr.HTML(SHOW_ALL_HTML, elem_id="settings_show_all", padding=False)
        search = gr.Textbox(placeholder="Search settings", show_label=False, container=False, elem_id="settings_search", label="Search settings")
    result = gr.HTML(elem_id="settings_result")
    hits = gr.HTML(elem_id="settings_search_result")
    with gr.Tabs(elem_id="settings", overflow_behavior="wrap"):
        for tab_id, title, infos in settings_pages(options.data_labels):
            with gr.Tab(title, elem_id=tab_id), gr.Column(elem_id=f"column_{tab_id}", elem_classes=["settings-section"]):
                for key, info in infos.items():
                    if key in shown_above:
                        continue
                    component = create_setting(key, info, getattr(options, key, info.default), choices)
                    if not info.do_not_save:
                        components[key] = component
        if start_values is not None:
            create_defaults_page(start_values, is_frozen=app.config.freeze_settings)
        with gr.Tab("Sysinfo", elem_id="settings_tab_sysinfo"), gr.Column(elem_classes=["settings-section"]):
            gr.HTML(SYSINFO_HTML)
        unload = _create_actions(app)
        with gr.Tab("Licenses", elem_id="settings_tab_licenses") as licenses_item, gr.Column(elem_classes=["settings-section"]):
            licenses = gr.HTML(elem_id="licenses")
    licenses_item.select(licenses_html, outputs=[licenses], show_progress="hidden", queue=False, api_visibility="private")
    handlers = SettingsHandlers(app, list(components))
    controls = list(components.values())
    apply.click(handlers.apply, inputs=controls, outputs=[settings_json, result], show_progress="hidden", api_visibility="private")
    restart.click(app.state.request_restart, js="restart_reload", show_progress="hidden", queue=False, api_visibility="private")
    unload.click(handlers.unload_models, outputs=[result], show_progress="minimal", api_visibility="private")
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    search.change(handlers.search, inputs=[search], outputs=[hits], trigger_mode="always_last", **quiet)
    item.select(handlers.refresh, inputs=[settings_json], outputs=[*controls, settings_json], **quiet)
    return SettingsTab(apply=apply, result=result, components=components)


def _create_actions(app: Application) -> gr.Button:
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    with gr.Tab("Actions", elem_id="settings_tab_actions"), gr.Column(elem_id="column_settings_actions", elem_classes=["settings-section"]):
        said = gr.HTML(elem_id="settings_action_result")
        gr.Button("Let the browser notify me of finished jobs", elem_id="request_notifications")
        table = gr.Button("Save the page's texts as a file to be translated", elem_id="download_localization")
        table.click(fn=None, js="() => { download_localization(); }", show_progress="hidden")
        hints = gr.Button("List the names of all settings", elem_id="settings_list_names")
        hints.click(fn=None, js="() => { settingsHintsShowQuicksettings(); }", show_progress="hidden")
        hashes = gr.Button("Compute the hashes of all checkpoints", elem_id="calculate_all_checkpoint_hash")
        hashes.click(lambda: _compute_hashes(app), outputs=[said], **quiet)
        return gr.Button("Unload all models", elem_id="sett_unload_sd_model")


def _compute_hashes(app: Application) -> str:
    """Compute hashes that are not known yet, as a job, so that no picture is made meanwhile."""

    def compute() -> int:
        app.checkpoints.refresh()
        return sum(info.calculate_shorthash() is not None for info in list(app.checkpoints))

    return f"<p>{app.jobs.run_and_wait(None, 'hashes', compute)} checkpoints have a hash.</p>"


def licenses_html() -> str:
    """The license of this program and those that the packages of this installation declare."""
    rows = []
    for found in sorted(importlib.metadata.distributions(), key=lambda one: str(one.metadata["Name"]).lower()):
        facts = found.metadata
        declared = next((facts[key] for key in ("License-Expression", "License") if key in facts), "")
        classified = [line.rpartition("::")[2].strip() for line in facts.get_all("Classifier") or [] if line.startswith("License")]
        license_text = declared if declared and len(declared) < MAX_LICENSE_NAME else ", ".join(classified)
        title = f"{facts['Name']} {found.version}"
        rows.append(f"<tr><td>{html.escape(title)}</td><td>{html.escape(license_text or 'see its files')}</td></tr>")
    own = (SCRIPT_DIR / "LICENSE").read_text(encoding="utf-8") if (SCRIPT_DIR / "LICENSE").is_file() else ""
    return f"<h3>This program</h3><pre class='license-text'>{html.escape(own)}</pre><h3>Packages</h3><table>{''.join(rows)}</table>"
