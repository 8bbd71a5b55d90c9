"""Extras: mirrored copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr
from PIL import ImageOps

from modules.scripts_postprocessing import PostprocessedImage, ScriptPostprocessing
from modules.ui_components import InputAccordion

FLIPS = {
    "Horizontal": ImageOps.mirror,
    "Vertical": ImageOps.flip,
    "Both": lambda image: ImageOps.flip(ImageOps.mirror(image)),
}


class ScriptPostprocessingCreateFlippedCopies(ScriptPostprocessing):
    """Beside the picture itself."""

    name = "Create flipped copies"
    order = 4030

    def ui(self) -> Mapping[str, Any]:
        with InputAccordion(False, label="Create flipped copies", elem_id="extras_flipped_copies") as enable:
            option = gr.CheckboxGroup(
                value=["Horizontal"], choices=list(FLIPS), show_label=False, label="Directions", elem_id="postprocess_flip_directions"
            )
        return {"enable": enable, "option": option}

    def process(self, pp: PostprocessedImage, **args: Any) -> None:
        if args.get("enable"):
            pp.extra_images += [pp.create_copy(flip(pp.image)) for name, flip in FLIPS.items() if name in (args["option"] or ())]
