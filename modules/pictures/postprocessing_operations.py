"""The built-in operations: upscaling, and cropping to an automatically chosen size. Each provides its controls and its work.

Must not know files or jobs.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import gradio as gr
from PIL import Image

from modules.jobs.context import installed_context
from modules.pictures.postprocessing import BY_FACTOR, TO_SIZE, ExtrasSettings, check_extras, enlarge, goal_size_px, parameters_of
from modules.pictures.resizing import CROP_AND_RESIZE, resize_by_mode
from modules.pictures.upscaler_list import available_upscalers
from modules.scripts.postprocessing import PostprocessedImage, ScriptPostprocessing, ScriptPostprocessingRunner
from modules.ui.components import FormRow, InputAccordion, ToolButton

SIDE_STEP_PX = 64
CROPS = ("Maximize area", "Minimize error")
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}


def built_in_operations() -> list[ScriptPostprocessing]:
    """In the order they run."""
    return [Upscale(), AutoSizedCrop()]


def build_runner() -> ScriptPostprocessingRunner:
    """All built-in operations."""
    runner = ScriptPostprocessingRunner()
    runner.register(built_in_operations())
    return runner


class Upscale(ScriptPostprocessing):
    """Enlarges with one upscaler, or a blend of two. Caches the last results, as many as the settings say."""

    name = "Upscale"
    order = 1000

    def __init__(self, max_kept: int | None = None) -> None:
        self._kept: OrderedDict[tuple[Any, ...], Image.Image] = OrderedDict()
        self._max_kept = max_kept

    def ui(self) -> Mapping[str, Any]:
        names = [entry.name for entry in available_upscalers()]
        controls: dict[str, Any] = {}
        with InputAccordion(True, label="Upscale", elem_id="extras_upscale") as enabled:
            controls["upscale_enabled"] = enabled
            with FormRow():
                controls["upscaler_1_name"] = gr.Dropdown(label="Upscaler 1", choices=names, value=names[0], elem_id="extras_upscaler_1")
            with FormRow():
                controls["upscaler_2_name"] = gr.Dropdown(label="Upscaler 2", choices=names, value=names[0], elem_id="extras_upscaler_2")
                controls["upscaler_2_visibility"] = _slider("Upscaler 2 visibility", "extras_upscaler_2_visibility", 0, 1, 0.001, 0)
            controls["upscale_mode"] = gr.Number(value=BY_FACTOR, precision=0, visible="hidden", elem_id="extras_upscale_mode")
            with gr.Tabs(elem_id="extras_resize_mode"):
                with gr.Tab("Scale by", elem_id="extras_scale_by_tab") as by_tab, FormRow():
                    controls["upscale_by"] = _slider("Resize", "extras_upscaling_resize", 1, 8, 0.05, 4)
                    controls["max_side_length"] = gr.Number(
                        label="Max side length", value=0, minimum=0, precision=0, elem_id="extras_upscale_max_side_length"
                    )
                with gr.Tab("Scale to", elem_id="extras_scale_to_tab") as to_tab, FormRow():
                    controls["upscale_to_width"] = _slider("Width", "extras_upscaling_resize_w", 64, 8192, 8, 512)
                    controls["upscale_to_height"] = _slider("Height", "extras_upscaling_resize_h", 64, 8192, 8, 512)
                    swap = ToolButton(icon_name="swap", elem_id="extras_upscaling_res_switch_btn")
                    controls["upscale_crop"] = gr.Checkbox(label="Crop to fit", value=True, elem_id="extras_upscaling_crop", min_width=80)
        sides = [controls["upscale_to_width"], controls["upscale_to_height"]]
        swap.click(fn=None, js="(width, height) => [height, width]", inputs=sides, outputs=sides, show_progress="hidden")
        for number, tab in ((BY_FACTOR, by_tab), (TO_SIZE, to_tab)):
            tab.select(fn=None, js=f"() => {number}", outputs=[controls["upscale_mode"]], show_progress="hidden")
        return controls

    def process_firstpass(self, pp: PostprocessedImage, **args: Any) -> None:
        if args.get("upscale_enabled"):
            settings = _settings(pp.image, args)
            pp.shared.target_width, pp.shared.target_height = (
                settings.size_px if settings.mode == TO_SIZE and settings.crop else goal_size_px(pp.image, settings)
            )

    def process(self, pp: PostprocessedImage, **args: Any) -> None:
        if not args.get("upscale_enabled"):
            return
        settings = _settings(pp.image, args)
        upscalers = available_upscalers()
        check_extras(settings, upscalers)
        key = (hashlib.sha256(pp.image.tobytes()).digest(), pp.image.mode, pp.image.size, settings)
        if key in self._kept:
            pp.image = self._kept.pop(key).copy()
        else:
            pp.image = enlarge(pp.image, settings, upscalers)
        self._keep(key, pp.image)
        pp.info.update(parameters_of(settings))

    def image_changed(self) -> None:
        self._kept.clear()

    def _keep(self, key: tuple[Any, ...], image: Image.Image) -> None:
        self._kept[key] = image.copy()
        while len(self._kept) > self._limit():
            self._kept.popitem(last=False)

    def _limit(self) -> int:
        app = installed_context()
        return self._max_kept if self._max_kept is not None else 0 if app is None else int(app.options.upscaling_max_images_in_cache)


def _settings(image: Image.Image, args: Mapping[str, Any]) -> ExtrasSettings:
    """The control values as input for run_extras; a limit for the longer side reduces the factor."""
    factor, limit_px = float(args["upscale_by"]), int(args.get("max_side_length") or 0)
    mode = int(args["upscale_mode"])
    if mode == BY_FACTOR and limit_px > 0 and max(image.size) * factor > limit_px:
        factor = limit_px / max(image.size)
    return ExtrasSettings(
        mode=mode,
        factor=factor,
        size_px=(int(args["upscale_to_width"]), int(args["upscale_to_height"])),
        crop=bool(args["upscale_crop"]),
        first=args["upscaler_1_name"] or "None",
        second=args["upscaler_2_name"] or "None",
        second_visibility=float(args["upscaler_2_visibility"]),
    )


class AutoSizedCrop(ScriptPostprocessing):
    """Crops and scales to the size, in steps of 64 px, that best matches the picture's aspect ratio within limits of side and area."""

    name = "Auto-sized crop"
    order = 4010

    def ui(self) -> Mapping[str, Any]:
        with InputAccordion(False, label="Auto-sized crop", elem_id="extras_autosized_crop") as enabled:
            gr.HTML("<p class='scale-preview'>Each picture is center-cropped to a size chosen within these limits.</p>")
            with FormRow():
                low = _slider("Dimension lower bound", "postprocess_multicrop_mindim", 64, 2048, 8, 384)
                high = _slider("Dimension upper bound", "postprocess_multicrop_maxdim", 64, 2048, 8, 768)
            with FormRow():
                low_area = _slider("Area lower bound", "postprocess_multicrop_minarea", 64 * 64, 2048 * 2048, 1, 64 * 64)
                high_area = _slider("Area upper bound", "postprocess_multicrop_maxarea", 64 * 64, 2048 * 2048, 1, 640 * 640)
            with FormRow():
                objective = gr.Radio(
                    list(CROPS), value=CROPS[0], label="Resizing objective", elem_id="postprocess_multicrop_objective", min_width=160
                )
                threshold = _slider("Error threshold", "postprocess_multicrop_threshold", 0, 1, 0.01, 0.1)
        names = ("enable", "mindim", "maxdim", "minarea", "maxarea", "objective", "threshold")
        return dict(zip(names, (enabled, low, high, low_area, high_area, objective, threshold)))

    def process(self, pp: PostprocessedImage, **args: Any) -> None:
        if not args.get("enable"):
            return
        size_px = best_size_px(
            pp.image.size,
            sides_px=(int(args["mindim"]), int(args["maxdim"])),
            areas_px=(int(args["minarea"]), int(args["maxarea"])),
            largest=args["objective"] == CROPS[0],
            max_error=float(args["threshold"]),
        )
        if size_px is None:
            pp.info["Postprocess auto-sized crop"] = "no size fits"
            return
        pp.image = resize_by_mode(CROP_AND_RESIZE, pp.image, *size_px)
        pp.info["Postprocess auto-sized crop"] = f"{size_px[0]}x{size_px[1]}"


def best_size_px(
    picture_px: tuple[int, int], *, sides_px: tuple[int, int], areas_px: tuple[int, int], largest: bool, max_error: float
) -> tuple[int, int] | None:
    """The size within the limits whose aspect ratio error is at most `max_error`: the largest one, or the one with the smallest error."""

    def error(size_px: tuple[int, int]) -> float:
        ratio = picture_px[0] * size_px[1] / (picture_px[1] * size_px[0])
        return 1 - min(ratio, 1 / ratio)

    def area(size_px: tuple[int, int]) -> int:
        return size_px[0] * size_px[1]

    sides = range(sides_px[0], sides_px[1] + 1, SIDE_STEP_PX)
    sizes = [(w, h) for w in sides for h in sides if areas_px[0] <= w * h <= areas_px[1] and error((w, h)) <= max_error]
    if not sizes:
        return None
    return max(sizes, key=lambda size: (area(size), -error(size)) if largest else (-error(size), area(size)))


def _slider(label: str, elem_id: str, minimum: float, maximum: float, step: float, value: float) -> gr.Slider:
    return gr.Slider(label=label, elem_id=elem_id, minimum=minimum, maximum=maximum, step=step, value=value, buttons=[])
