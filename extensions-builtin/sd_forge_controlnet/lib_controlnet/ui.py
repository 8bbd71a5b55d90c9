"""The controls of a tab's units."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lib_controlnet import global_state
from lib_controlnet.enums import ControlMode, ControlNetUnionControlType, HiResFixOption, ResizeMode
from lib_controlnet.external_code import ControlNetUnit
from lib_controlnet.hints import as_array
from lib_controlnet.infotext import pasted
from modules.infotext_utils import PasteField
from modules.ui_components import FormRow, ToolButton
from modules_forge.utils import HWC3

_QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
_FIELDS = (
    "enabled", "image", "mask_image", "module", "model", "weight", "guidance_start", "guidance_end", "processor_res", "threshold_a", "threshold_b",
    "pixel_perfect", "control_mode", "resize_mode", "hr_option", "union_control_type",
)  # fmt: skip


class UnitControls:
    """One unit: its controls, and the state that combines their values into the script's argument."""

    def __init__(self, tab: str, number: int, *, is_img2img: bool) -> None:
        self.tab, self.number, self.is_img2img = tab, number, is_img2img
        self.prefix = f"{tab}_controlnet_ControlNet-{number}_"
        self.state = gr.State(ControlNetUnit(enabled=False))

    def build(self) -> None:
        """Create the controls in the current gradio context."""
        modules, models, _, _ = global_state.select_control_type("All")
        with gr.Accordion(f"ControlNet Unit {self.number}", open=False, elem_id=self.prefix + "accordion"):
            with gr.Row():
                self.image = self._picture("Image", "input_image")
                with gr.Group(visible=False) as self.preview_group:
                    self.generated = self._picture("Preprocessor Preview", "generated_image", interactive=False)
                with gr.Group(visible=False) as self.mask_group:
                    self.mask = self._picture("Effective Region Mask", "mask_image")
            with FormRow():
                self.enabled = self._check("Enable", "controlnet_enable_checkbox")
                self.pixel_perfect = self._check("Pixel Perfect", "controlnet_pixel_perfect_checkbox")
                self.show_preview = self._check("Allow Preview", "controlnet_preprocessor_preview_checkbox")
                self.show_mask = self._check("Use Mask", "controlnet_mask_upload_checkbox")
            self.type_filter = gr.Radio(
                global_state.get_all_preprocessor_tags(), value="All", label="Control Type", elem_id=f"{self.prefix}controlnet_type_filter_radio"
            )
            with FormRow():
                self.module = gr.Dropdown(
                    modules,
                    value=global_state.NONE,
                    label="Preprocessor",
                    elem_id=f"{self.prefix}controlnet_preprocessor_dropdown",
                    allow_custom_value=True,  # an event with the last choice may be on its way while another type's list arrives
                )
                self.run = ToolButton(value="💥", elem_id=f"{self.prefix}controlnet_trigger_preprocessor", tooltip="Run preprocessor")
                self.model = gr.Dropdown(
                    models, value=global_state.NONE, label="Model", elem_id=f"{self.prefix}controlnet_model_dropdown", allow_custom_value=True
                )
                self.refresh = ToolButton(value="🔄", elem_id=f"{self.prefix}controlnet_refresh_models", tooltip="Refresh models")
            with FormRow():
                self.weight = self._slider("Control Weight", "controlnet_control_weight_slider", 1.0, 0.0, 2.0, 0.05)
                self.start = self._slider("Starting Control Step", "controlnet_start_control_step_slider", 0.0, 0.0, 1.0, 0.01)
                self.end = self._slider("Ending Control Step", "controlnet_ending_control_step_slider", 1.0, 0.0, 1.0, 0.01)
            self.resolution = self._slider("Resolution", "controlnet_preprocessor_resolution_slider", 512, 64, 2048, 8, visible=False)
            self.threshold_a = self._slider("Threshold A", "controlnet_threshold_A_slider", -1, -1, 256, 0.01, visible=False)
            self.threshold_b = self._slider("Threshold B", "controlnet_threshold_B_slider", -1, -1, 256, 0.01, visible=False)
            self.control_mode = self._radio("Control Mode", "controlnet_control_mode_radio", ControlMode)
            self.resize_mode = self._radio("Resize Mode", "controlnet_resize_mode_radio", ResizeMode, value=ResizeMode.INNER_FIT.value)
            self.hr_option = self._radio("Hires-Fix Option", "controlnet_hr_option_radio", HiResFixOption, visible=not self.is_img2img)
        self._connect()

    def _picture(self, label: str, name: str, *, interactive: bool = True) -> Any:
        return gr.Image(label=label, type="pil", image_mode=None, elem_id=f"{self.prefix}{name}", interactive=interactive, height=242)

    def _check(self, label: str, name: str) -> Any:
        return gr.Checkbox(label=label, value=False, elem_id=self.prefix + name)

    def _slider(self, label: str, name: str, value: float, low: float, high: float, step: float, *, visible: bool = True) -> Any:
        return gr.Slider(label=label, value=value, minimum=low, maximum=high, step=step, elem_id=self.prefix + name, visible=visible)

    def _radio(self, label: str, name: str, choices: Any, *, value: str | None = None, visible: bool = True) -> Any:
        texts = [one.value for one in choices]
        return gr.Radio(texts, value=value or texts[0], label=label, elem_id=self.prefix + name, visible=visible)

    @property
    def inputs(self) -> list[Any]:
        """The controls that define the unit, in the order of _FIELDS."""
        return [
            self.enabled, self.image, self.mask, self.module, self.model, self.weight, self.start, self.end, self.resolution, self.threshold_a,
            self.threshold_b, self.pixel_perfect, self.control_mode, self.resize_mode, self.hr_option, self.type_filter,
        ]  # fmt: skip

    def paste_fields(self) -> list[PasteField]:
        """The fields filled by pasted parameters."""
        default = ControlNetUnit()
        skipped = ("image", "mask_image", "union_control_type")
        fields = []
        for name, control in zip(_FIELDS, self.inputs):
            if name not in skipped:
                value = getattr(default, name)
                fields.append(PasteField(control, pasted(self.number, name, getattr(value, "value", value))))
        return fields

    def _connect(self) -> None:
        self.show_mask.change(lambda shown: gr.update(visible=shown), [self.show_mask], [self.mask_group], **_QUIET)
        self.show_preview.change(lambda shown: gr.update(visible=shown), [self.show_preview], [self.preview_group], **_QUIET)
        self.type_filter.change(_show_type, [self.type_filter], [self.module, self.model], **_QUIET)
        self.refresh.click(_refresh, [self.type_filter, self.model], [self.model], **_QUIET)
        self.module.change(_show_sliders, [self.module, self.pixel_perfect], [self.resolution, self.threshold_a, self.threshold_b], **_QUIET)
        self.pixel_perfect.change(_show_resolution, [self.module, self.pixel_perfect], [self.resolution], **_QUIET)
        preview = [self.image, self.module, self.resolution, self.threshold_a, self.threshold_b]
        self.run.click(_preview, preview, [self.generated, self.preview_group, self.show_preview], show_progress="minimal", api_visibility="private")
        # the last change counts, also one that comes while the answer to another is awaited
        gr.on([control.change for control in self.inputs], make_unit, self.inputs, [self.state], trigger_mode="always_last", **_QUIET)


def make_unit(*values: Any) -> ControlNetUnit:
    """The unit for the controls' values."""
    named = dict(zip(_FIELDS, values))
    unit = ControlNetUnit(**{name: value for name, value in named.items() if value is not None})
    unit.enabled = bool(named["enabled"])
    unit.union_control_type = _known_union_type(named.get("union_control_type"))
    return unit


def _known_union_type(control_type: Any) -> ControlNetUnionControlType | None:
    """The hint kind for a Union model if the chosen control type is one; otherwise the preprocessor determines it."""
    try:
        return ControlNetUnionControlType.read(control_type)
    except ValueError:
        return None


def _show_type(control_type: str) -> tuple[Any, Any]:
    modules, models, module, model = global_state.select_control_type(control_type)
    return gr.update(choices=modules, value=module), gr.update(choices=models, value=model)


def _refresh(control_type: str, current: str) -> Any:
    global_state.update_controlnet_filenames()
    models = global_state.get_filtered_controlnet_names(control_type)
    return gr.update(choices=models, value=current if current in models else global_state.NONE)


def _show_sliders(module: str, pixel_perfect: bool) -> tuple[Any, Any, Any]:
    preprocessor = global_state.get_preprocessor(module)
    if preprocessor is None:
        return gr.update(visible=False), gr.update(visible=False), gr.update(visible=False)
    sliders = [dict(one.gradio_update_kwargs) for one in (preprocessor.slider_resolution, preprocessor.slider_1, preprocessor.slider_2)]
    sliders[0]["visible"] = bool(sliders[0]["visible"]) and not pixel_perfect
    for slider in sliders[1:]:
        if not slider["visible"]:
            slider.update(minimum=-1, maximum=256, value=-1)
    resolution, first, second = (gr.update(**slider) for slider in sliders)
    return resolution, first, second


def _show_resolution(module: str, pixel_perfect: bool) -> Any:
    return _show_sliders(module, pixel_perfect)[0]


def _preview(image: Any, module: str, resolution: float, first: float, second: float) -> tuple[Any, Any, Any]:
    preprocessor = global_state.get_preprocessor(module)
    if image is None or preprocessor is None:
        raise gr.Error("Choose an image and a preprocessor first.")
    sliders = [None if value is None or value < 0 else value for value in (first, second)]
    picture = as_array(image)
    assert picture is not None
    found = preprocessor(HWC3(picture), resolution=int(resolution), slider_1=sliders[0], slider_2=sliders[1])
    return found, gr.update(visible=True), gr.update(value=True)
