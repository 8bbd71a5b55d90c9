"""Buttons that send a picture and its parameters to a tab, for extensions. modules/infotext/parameters.py re-exports them.

A page registers each tab's controls (`add_paste_fields`), extensions register or bind buttons, and `connect_paste_params_buttons` joins them.
gradio is imported only where a button is connected: parsing an infotext does not need it.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from modules.infotext.reading import parse_generation_parameters
from modules.jobs.context import installed_context
from modules.pictures.metadata import read_info_from_image

_SWITCH_JS = {
    "txt2img": "switch_to_txt2img",
    "img2img": "switch_to_img2img",
    "sketch": "switch_to_sketch",
    "inpaint": "switch_to_inpaint",
    "inpaint_sketch": "switch_to_inpaint_sketch",
    "extras": "switch_to_extras",
}
_SEED_KEYS = ("Seed", "Variation seed", "Variation seed strength")


class PasteField(tuple):
    """(control, target): `target` is an infotext key or a function of the parsed infotext; `api` is the request field it also fills."""

    api: str | None
    component: Any
    label: str | None
    function: Callable[[Mapping[str, Any]], Any] | None

    def __new__(cls, component: Any, target: str | Callable[[Mapping[str, Any]], Any], *, api: str | None = None) -> PasteField:
        return super().__new__(cls, (component, target))

    def __init__(self, component: Any, target: str | Callable[[Mapping[str, Any]], Any], *, api: str | None = None) -> None:
        super().__init__()
        self.api = api
        self.component = component
        self.label = target if isinstance(target, str) else None
        self.function = target if callable(target) else None


@dataclass
class ParamBinding:
    """A button that sends to tab `tabname`: the parameters from a text box or a picture, and the picture itself."""

    paste_button: Any
    tabname: str
    source_text_component: Any = None
    source_image_component: Any = None
    source_tabname: str | None = None
    override_settings_component: Any = None
    paste_field_names: Sequence[str] = ()


paste_fields: dict[str, dict[str, Any]] = {}
registered_param_bindings: list[ParamBinding] = []


def reset() -> None:
    """Forget what the previous page registered; called before a page is built."""
    paste_fields.clear()
    registered_param_bindings.clear()


def add_paste_fields(tabname: str, init_img: Any, fields: Sequence[Any] | None, override_settings_component: Any = None) -> None:
    """Register which controls of the tab take which infotext keys, and which control takes a picture."""
    normal = None if fields is None else [field if isinstance(field, PasteField) else PasteField(*field) for field in fields]
    paste_fields[tabname] = {"init_img": init_img, "fields": normal, "override_settings_component": override_settings_component}


def create_buttons(tabs_list: Sequence[str]) -> dict[str, Any]:
    """One "Send to ..." button per tab, by tab name."""
    import gradio as gr  # heavy; see the module's docstring

    return {tab: gr.Button(f"Send to {tab}", elem_id=f"{tab}_tab") for tab in tabs_list}


def register_paste_params_button(binding: ParamBinding) -> None:
    registered_param_bindings.append(binding)


def bind_buttons(buttons: Mapping[str, Any], send_image: Any, send_generate_info: Any) -> None:
    """Make each button of `create_buttons` send the picture in `send_image` and the parameters from a text box, or from a tab by name."""
    for tabname, button in buttons.items():
        text = None if isinstance(send_generate_info, str) else send_generate_info
        source = send_generate_info if isinstance(send_generate_info, str) else None
        register_paste_params_button(
            ParamBinding(paste_button=button, tabname=tabname, source_text_component=text, source_image_component=send_image, source_tabname=source)
        )


def connect_paste_params_buttons() -> None:
    """Connect registered buttons to registered tabs. A button for a tab that the page lacks does nothing."""
    for binding in registered_param_bindings:
        target = paste_fields.get(binding.tabname)
        if target is not None:
            _connect_image(binding, target)
            _connect_fields(binding, target)
            binding.paste_button.click(fn=None, js=_SWITCH_JS.get(binding.tabname, f"switch_to_{binding.tabname}"))


def _connect_image(binding: ParamBinding, target: Mapping[str, Any]) -> None:
    if binding.source_image_component is None or target["init_img"] is None:
        return
    import gradio as gr  # heavy; see the module's docstring

    controls = {field.label: field.component for field in target["fields"] or []}
    sizes = [controls[key] for key in ("Size-1", "Size-2") if key in controls]
    from_gallery = isinstance(binding.source_image_component, gr.Gallery)

    def send(image: Any) -> Any:
        picture, width, height = send_image_and_dimensions(image)
        return [picture, width, height] if len(sizes) == 2 else picture

    binding.paste_button.click(
        fn=send,
        js="extract_image_from_gallery" if from_gallery else None,
        inputs=[binding.source_image_component],
        outputs=[target["init_img"], *sizes] if len(sizes) == 2 else [target["init_img"]],
        show_progress="hidden",
        api_visibility="private",
    )


def _connect_fields(binding: ParamBinding, target: Mapping[str, Any]) -> None:
    fields = target["fields"]
    if not fields:
        return
    if binding.source_text_component is not None:
        connect_paste(binding.paste_button, fields, binding.source_text_component)
    elif binding.source_tabname is not None:
        source = {field.label: field.component for field in (paste_fields.get(binding.source_tabname) or {}).get("fields") or []}
        copied = [field for field in fields if field.label in source and field.label in ("Prompt", "Negative prompt", "Steps", *_SEED_KEYS)]
        if copied:
            binding.paste_button.click(
                fn=lambda *values: list(values) if len(values) > 1 else values[0],
                inputs=[source[field.label] for field in copied],
                outputs=[field.component for field in copied],
                show_progress="hidden",
                api_visibility="private",
            )


def connect_paste(button: Any, fields: Sequence[Any], input_comp: Any) -> None:
    """Make `button` fill the controls of `fields` from the infotext in `input_comp`."""
    components = [field[0] for field in fields]
    button.click(
        fn=lambda text: field_updates(fields, text),
        inputs=[input_comp],
        outputs=components,
        show_progress="hidden",
        api_visibility="private",
    )


def field_updates(fields: Sequence[Any], text: str) -> list[Any]:
    """One gradio update per field; fields without a usable value in the infotext stay unchanged."""
    import gradio as gr  # heavy; see the module's docstring

    params = parse_generation_parameters(text or "")
    updates: list[Any] = []
    for component, target in fields:
        value = target(params) if callable(target) else params.get(target)
        if isinstance(value, dict) and value.get("__type__") == "update":
            updates.append(value)
            continue
        fitting = None if value is None else _fitting(component, value)
        updates.append(gr.skip() if fitting is None else gr.update(value=fitting))
    return updates


def _fitting(component: Any, value: Any) -> Any:
    """`value` converted to the control's type; None if that fails."""
    import gradio as gr  # heavy; see the module's docstring

    if isinstance(component, gr.Checkbox):
        return value if isinstance(value, bool) else str(value).strip().lower() in ("true", "1")
    if not isinstance(component, (gr.Slider, gr.Number)) or not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() else number


# Pictures


def image_from_url_text(filedata: Any) -> Image.Image | None:
    """The picture meant by a control's value: a picture, a gallery (its first picture), a (picture, caption) pair, a file value or a data URL.

    Reads files only from folders that the page serves. Returns None if there is no picture.
    """
    if filedata is None or isinstance(filedata, Image.Image):
        return filedata
    if isinstance(filedata, (list, tuple)):
        return image_from_url_text(filedata[0]) if filedata else None
    if isinstance(filedata, dict):
        return image_from_url_text(filedata.get("image") or filedata.get("path") or filedata.get("name"))
    if isinstance(filedata, str):
        return _image_from_text(filedata)
    return None


def _image_from_text(text: str) -> Image.Image | None:
    if not text.startswith("data:image/"):
        return _image_from_file(Path(text.rsplit("?", 1)[0]))
    try:
        data = base64.b64decode(text.split(",", 1)[1], validate=True)
        return _loaded(io.BytesIO(data))
    except (IndexError, binascii.Error):
        return None


def _image_from_file(path: Path) -> Image.Image | None:
    served = any(path.resolve().is_relative_to(folder) for folder in _served_folders())
    return _loaded(path) if served and path.is_file() else None


def _served_folders() -> list[Path]:
    from gradio.utils import get_upload_folder  # heavy; see the module's docstring

    application = installed_context()
    own = [] if application is None else [application.config.outputs_dir]
    return [Path(str(folder)).resolve() for folder in (get_upload_folder(), *own)]


def _loaded(source: Any) -> Image.Image | None:
    try:
        image = Image.open(source)
        image.load()
    except (OSError, ValueError, SyntaxError):
        return None
    return image


def send_image_and_dimensions(x: Any) -> tuple[Image.Image | None, Any, Any]:
    """(picture, width, height) for a tab that takes a picture; the size is included only if the settings say so."""
    import gradio as gr  # heavy; see the module's docstring

    image = image_from_url_text(x)
    application = installed_context()
    wants_size = application is None or application.options.send_size
    if image is None or not wants_size:
        return image, gr.skip(), gr.skip()
    return image, image.width, image.height


def infotext_of_image(image: Image.Image) -> str:
    """The infotext of a picture, "" if it has none."""
    return read_info_from_image(image)[0] or ""
