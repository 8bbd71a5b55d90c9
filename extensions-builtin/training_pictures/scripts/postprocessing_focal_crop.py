"""Extras: a crop around what is most interesting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr
from picture_crops import crop_around_focus

from modules.scripts_postprocessing import PostprocessedImage, ScriptPostprocessing
from modules.ui_components import InputAccordion


class ScriptPostprocessingFocalCrop(ScriptPostprocessing):
    """To the size of "Scale to"; without one the picture stays as it is."""

    name = "Auto focal point crop"
    order = 4010

    def ui(self) -> Mapping[str, Any]:
        with InputAccordion(False, label="Auto focal point crop", elem_id="extras_focal_crop") as enable:
            gr.HTML("<p class='scale-preview'>Crops to the size of Scale to. Faces are found where the package opencv-python is installed.</p>")
            names = ("face", "entropy", "edges")
            weights = [
                gr.Slider(
                    label=f"Focal point {name} weight", value=value, minimum=0.0, maximum=1.0, step=0.05,
                    elem_id=f"postprocess_focal_crop_{name}_weight",
                )
                for name, value in zip(names, (0.9, 0.15, 0.5))
            ]  # fmt: skip
            debug = gr.Checkbox(label="Create debug image", elem_id="train_process_focal_crop_debug")
        return {"enable": enable, **{name + "_weight": weight for name, weight in zip(names, weights)}, "debug": debug}

    def process(self, pp: PostprocessedImage, **args: Any) -> None:
        target = pp.shared.target_width, pp.shared.target_height
        if not args.get("enable") or not all(target):
            return
        weights = {name: float(args[name + "_weight"] or 0) for name in ("face", "entropy", "edges")}
        pp.image, marked = crop_around_focus(pp.image, (int(target[0] or 0), int(target[1] or 0)), marks=bool(args["debug"]), **weights)
        pp.info["Auto focal point crop"] = f"{pp.image.width}x{pp.image.height}"
        if marked is not None:
            pp.extra_images.append(pp.create_copy(marked, nametags=["focal-crop-debug"], disable_processing=True))
