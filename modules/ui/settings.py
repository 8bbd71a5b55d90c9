"""The Settings tab, built from the table of options: one inner tab per section, Apply, search, and a page of actions.

Must not know any particular setting, unless its choices are known only while the server runs.
"""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component

from modules.errors import OptionError, RequestError
from modules.settings.options import OptionInfo
from modules.settings.presets import NAMES as PRESET_NAMES
from modules.ui.components import DropdownMulti, FormRow, ToolButton
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
    "sd_vae": "vaes",
}


@dataclass(frozen=True, kw_only=True)
class SettingsTab:
    """`components` are the settings' controls by key."""

    apply: gr.Button
    result: gr.HTML
    components: Mapping[str, Component]


def sections_of(labels: Mapping[str, OptionInfo]) -> dict[tuple[str, str], dict[str, OptionInfo]]:
    """The options that have a page, by (section id, title), in table order. One section id may have two titles."""
    sections: dict[tuple[str, str], dict[str, OptionInfo]] = {}
    for key, info in labels.items():
        if info.section and info.section[0] is not None and key not in OWNED_BY_QUICK_SETTINGS:
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


def create_settings_tab(app: Application, choices: Mapping[str, list[str]], settings_json: gr.Textbox, item: gr.Tab) -> SettingsTab:
    """Build the tab inside the current gradio context. `choices`: the available samplers, schedulers, themes and vaes.

    `settings_json`, a hidden box outside the tabs, gives the page's scripts all values; `item` is the main tab around this one."""
    options = app.options
    components: dict[str, Component] = {}
    with gr.Row(elem_id="settings_top"):
        apply = gr.Button("Apply settings", variant="primary", elem_id="settings_submit")
        restart = gr.Button("Reload UI", elem_id="settings_restart_gradio", visible=app.restartable)
        search = gr.Textbox(placeholder="Search settings", show_label=False, container=False, elem_id="settings_search", label="Search settings")
    result = gr.HTML(elem_id="settings_result")
    hits = gr.HTML(elem_id="settings_search_result")
    with gr.Tabs(elem_id="settings", overflow_behavior="wrap"):
        for tab_id, title, infos in settings_pages(options.data_labels):
            with gr.Tab(title, elem_id=tab_id), gr.Column(elem_id=f"column_{tab_id}", elem_classes=["settings-section"]):
                for key, info in infos.items():
                    component = create_setting(key, info, getattr(options, key, info.default), choices)
                    if not info.do_not_save:
                        components[key] = component
        unload = _create_actions()
    handlers = SettingsHandlers(app, list(components))
    controls = list(components.values())
    apply.click(handlers.apply, inputs=controls, outputs=[settings_json, result], show_progress="hidden", api_visibility="private")
    restart.click(app.state.request_restart, js="restart_reload", show_progress="hidden", queue=False, api_visibility="private")
    unload.click(handlers.unload_models, outputs=[result], show_progress="minimal", api_visibility="private")
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    search.change(handlers.search, inputs=[search], outputs=[hits], trigger_mode="always_last", **quiet)
    item.select(handlers.refresh, inputs=[settings_json], outputs=[*controls, settings_json], **quiet)
    return SettingsTab(apply=apply, result=result, components=components)


def _create_actions() -> gr.Button:
    with gr.Tab("Actions", elem_id="settings_tab_actions"), gr.Column(elem_id="column_settings_actions", elem_classes=["settings-section"]):
        return gr.Button("Unload all models", elem_id="sett_unload_sd_model")
