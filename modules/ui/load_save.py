"""Start values of the page's fields, which the user chooses on the Defaults page: kept in ui-config.json under "tab/label/property".

    {"txt2img/Sampling steps/value": 30, "txt2img/Width/maximum": 4096}

Properties are value, and minimum, maximum and step of sliders. An entry that does not fit its field is logged and ignored.
"""

from __future__ import annotations

import html
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import BlockContext
from gradio.components import Component

from backend.foreign_json import read_json_file
from modules.settings.options import write_text_atomically
from modules.ui.paste import value_for

log = logging.getLogger(__name__)

FIELDS = (gr.Checkbox, gr.CheckboxGroup, gr.Dropdown, gr.Number, gr.Radio, gr.Slider, gr.Textbox)
LIMITS = ("minimum", "maximum", "step")
MAX_TEXT = 20_000


def read_ui_config(file: Path) -> dict[str, Any]:
    """The entries of ui-config.json; none for a file that is missing or damaged, which is logged."""
    try:
        found = read_json_file(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.error("%s cannot be read (%s); the page starts with its own values.", file, error)
        return {}
    if not isinstance(found, dict):
        log.error("%s is not a list of entries in braces; the page starts with its own values.", file)
        return {}
    return found


class StartValues:
    """The fields of the page that have start values of their own, by "tab/label"."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.fields: dict[str, Component] = {}
        self._own: dict[str, Any] = {}

    def add_tab(self, name: str, tab: BlockContext) -> None:
        """Take in the fields of a tab, and give them the values of the file. Of fields with the same label the first counts."""
        config = read_ui_config(self.file)
        for component in fields_of(tab):
            key = f"{name}/{component.label}"
            if key not in self.fields:
                self.fields[key] = component
                self._own[key] = component.value
                _set(component, key, config)

    def changes(self, values: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """(start value, value) of each field whose value on the page is another one."""
        return {
            key: (component.value, values[key])
            for key, component in self.fields.items()
            if key in values and is_storable(values[key]) and not _same(component.value, values[key])
        }

    def save(self, values: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Write the changes into the file, next to its other entries; returns them. Raises: OSError."""
        changes = self.changes(values)
        if changes:
            entries = {**read_ui_config(self.file), **{f"{key}/value": new for key, (_, new) in changes.items()}}
            write_text_atomically(self.file, json.dumps(entries, indent=4, ensure_ascii=False))
        return changes

    def forget(self) -> int:
        """Take all start values out of the file; returns how many there were. Raises: OSError."""
        entries = read_ui_config(self.file)
        kept = {key: value for key, value in entries.items() if not key.endswith("/value")}
        if len(kept) != len(entries):
            write_text_atomically(self.file, json.dumps(kept, indent=4, ensure_ascii=False))
        return len(entries) - len(kept)


def fields_of(block: BlockContext) -> Iterator[Component]:
    """The labelled fields inside `block` that people set."""
    for child in block.children:
        if isinstance(child, BlockContext):
            yield from fields_of(child)
        elif (
            isinstance(child, FIELDS) and getattr(child, "label", None) and child.visible is True and getattr(child, "interactive", None) is not False
        ):
            yield child


def is_storable(value: Any) -> bool:
    """Whether it is a number, a short text, or a list of them."""
    if isinstance(value, list):
        return len(value) < 200 and all(is_storable(one) and not isinstance(one, list) for one in value)
    return isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) < MAX_TEXT)


def _same(one: Any, other: Any) -> bool:
    """Equal, where an empty field may be None or ""."""
    return one == other or (one in (None, "", []) and other in (None, "", []))


def _set(component: Component, key: str, config: Mapping[str, Any]) -> None:
    for name in LIMITS:
        limit = config.get(f"{key}/{name}")
        if limit is None or not isinstance(component, gr.Slider):
            continue
        if isinstance(limit, (int, float)) and not isinstance(limit, bool) and math.isfinite(limit) and (name != "step" or limit > 0):
            setattr(component, name, limit)
        else:
            log.warning("ui-config.json: %s/%s is %.80r, which is no number; it is ignored.", key, name, limit)
    if isinstance(component, gr.Slider) and not component.minimum < component.maximum:
        log.warning("ui-config.json: %s has a minimum that is not below its maximum; both are ignored.", key)
        component.minimum, component.maximum = component._constructor_args[0].get("minimum", 0), component._constructor_args[0].get("maximum", 100)
    value = config.get(f"{key}/value")
    if value is None:
        return
    fitting = _fitting(component, value) if is_storable(value) else None
    if fitting is None:
        log.warning("ui-config.json: %s/value is %.80r, which the field does not take; it is ignored.", key, value)
    else:
        component.value = fitting


def _fitting(component: Component, value: Any) -> Any:
    """`value` for the field; None if it does not take it."""
    if isinstance(component, gr.Radio):
        choices = [choice for _, choice in component.choices]
        position = choices.index(value) if value in choices else -1
        return None if position < 0 else value
    if isinstance(component, gr.CheckboxGroup):
        choices = [choice for _, choice in component.choices]
        return value if isinstance(value, list) and all(one in choices for one in value) else None
    if isinstance(component, (gr.Slider, gr.Number)) and isinstance(value, bool):
        return None
    return value_for(component, value)


def changes_html(changes: Mapping[str, tuple[Any, Any]], said: str = "") -> str:
    """A table of changes."""
    if not changes:
        return f"<p>{html.escape(said or 'No field of the page differs from its start value.')}</p>"
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(str(old)[:200])}</td><td>{html.escape(str(new)[:200])}</td></tr>"
        for key, (old, new) in changes.items()
    )
    head = "<tr><th>Field</th><th>Start value</th><th>Now</th></tr>"
    return f"{f'<p>{html.escape(said)}</p>' if said else ''}<table class='ui-defaults'><thead>{head}</thead><tbody>{rows}</tbody></table>"


def create_defaults_page(start_values: StartValues, *, is_frozen: bool) -> None:
    """The Defaults page of the settings: shows what differs from the start values, and makes it the new start values."""
    with gr.Tab("Defaults", elem_id="settings_tab_defaults"), gr.Column(elem_classes=["settings-section"]):
        gr.HTML("<p>The values that the fields of txt2img, img2img and Extras have now can become those that the page starts with.</p>")
        with gr.Row():
            view = gr.Button("View changes", elem_id="ui_defaults_view")
            apply = gr.Button("Apply", variant="primary", elem_id="ui_defaults_apply")
            forget = gr.Button("Back to the program's own", elem_id="ui_defaults_forget")
        shown = gr.HTML(elem_id="ui_defaults_review")
    keys, components = list(start_values.fields), list(start_values.fields.values())

    def view_changes(*values: Any) -> str:
        return changes_html(start_values.changes(dict(zip(keys, values))))

    def apply_changes(*values: Any) -> str:
        if is_frozen:
            return changes_html({}, "The settings are frozen (--freeze-settings); nothing was written.")
        try:
            changes = start_values.save(dict(zip(keys, values)))
        except OSError as error:
            return changes_html({}, f"Nothing was written: {error}")
        return changes_html(changes, f"Written to {start_values.file.name}; they count after Reload UI." if changes else "")

    def forget_all() -> str:
        try:
            return changes_html({}, f"{start_values.forget()} start values were taken out of {start_values.file.name}; it counts after Reload UI.")
        except OSError as error:
            return changes_html({}, f"Nothing was written: {error}")

    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    view.click(view_changes, inputs=components, outputs=[shown], **quiet)
    apply.click(apply_changes, inputs=components, outputs=[shown], **quiet)
    forget.click(forget_all, outputs=[shown], **quiet)
