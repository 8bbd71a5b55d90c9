"""Extras: pictures that are too long, as several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr
from picture_crops import split_picture

from modules.scripts_postprocessing import PostprocessedImage, ScriptPostprocessing
from modules.ui_components import InputAccordion

MOST_OVERLAP = 0.9


class ScriptPostprocessingSplitOversized(ScriptPostprocessing):
    """Of the size of "Scale to"; without one the picture stays as it is."""

    name = "Split oversized images"
    order = 4000

    def ui(self) -> Mapping[str, Any]:
        with InputAccordion(False, label="Split oversized images", elem_id="extras_split_oversized") as enable, gr.Row():
            threshold = gr.Slider(
                label="Split image threshold", value=0.5, minimum=0.0, maximum=1.0, step=0.05, elem_id="postprocess_split_threshold"
            )
            overlap = gr.Slider(
                label="Split image overlap ratio", value=0.2, minimum=0.0, maximum=MOST_OVERLAP, step=0.05, elem_id="postprocess_overlap_ratio"
            )
        return {"enable": enable, "split_threshold": threshold, "overlap_ratio": overlap}

    def process(self, pp: PostprocessedImage, **args: Any) -> None:
        target = pp.shared.target_width, pp.shared.target_height
        if not args.get("enable") or not all(target):
            return
        overlap = min(max(0.0, float(args["overlap_ratio"])), MOST_OVERLAP)
        parts = split_picture(pp.image, (int(target[0] or 0), int(target[1] or 0)), threshold=float(args["split_threshold"]), overlap=overlap)
        pp.image = parts[0]
        pp.extra_images += [pp.create_copy(part) for part in parts[1:]]
        if len(parts) > 1:
            pp.info["Split oversized images"] = len(parts)
