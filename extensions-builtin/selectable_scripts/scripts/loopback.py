"""Repeated img2img: each picture is the input of the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr
from script_jobs import Part, copy_request, part_of, put_grid_in_front, together

from modules import images, scripts
from modules.errors import RequestError
from modules.processing import Processed, StableDiffusionProcessingImg2Img, fix_seed, process_images

CURVES: Mapping[str, Callable[[float], float]] = {
    "Aggressive": lambda progress: math.sin(progress * math.pi / 2),
    "Linear": lambda progress: progress,
    "Lazy": lambda progress: 1 - math.cos(progress * math.pi / 2),
}


def strength_of(loop: int, num_loops: int, first: float, last: float, curve: str) -> float:
    """Denoising strength of loop number `loop` (from 0): from `first` to `last` along the curve."""
    if num_loops == 1:
        return first
    return round(first + (last - first) * CURVES[curve](loop / (num_loops - 1)), 6)


class Script(scripts.Script):
    def title(self) -> str:
        return "Loopback"

    def show(self, is_img2img: bool) -> Any:
        return is_img2img

    def ui(self, is_img2img: bool) -> list[Any]:
        with gr.Row():
            loops = gr.Slider(minimum=1, maximum=32, step=1, label="Loops", value=4, elem_id=self.elem_id("loops"))
            last = gr.Slider(
                minimum=0, maximum=1, step=0.01, label="Final denoising strength", value=0.5, elem_id=self.elem_id("final_denoising_strength")
            )
        curve = gr.Dropdown(label="Denoising strength curve", choices=list(CURVES), value="Linear", elem_id=self.elem_id("denoising_curve"))
        interrogation = gr.Dropdown(
            label="Append interrogated prompt at each iteration", choices=["None"], value="None", elem_id=self.elem_id("append_interrogation")
        )
        return [loops, last, curve, interrogation]

    def run(  # type: ignore[override]  # the host hands in the values of `ui`
        self, p: StableDiffusionProcessingImg2Img, loops: float, final_denoising_strength: float, denoising_curve: str, append_interrogation: str
    ) -> Processed:
        """Raises RequestError for values outside the choices."""
        interrogation = append_interrogation or "None"
        num_loops, last_strength, curve, _ = scripts.checked_values(self, (loops, final_denoising_strength, denoising_curve, interrogation))
        fix_seed(p)
        first_strength, state = float(p.denoising_strength or 0), p.context.state
        num_rounds = p.n_iter
        state.job_count = num_rounds * num_loops
        seed = int(p.seed)
        done: list[Part] = []
        for _ in range(num_rounds):
            starts = list(p.init_images)
            for loop in range(num_loops):
                if state.interrupted or state.stopping_generation:
                    break
                one = copy_request(p)
                one.n_iter, one.batch_size, one.do_not_save_grid, one.seed = 1, 1, True, seed
                one.init_images = starts
                one.denoising_strength = strength_of(loop, num_loops, first_strength, last_strength, curve)
                if loop:
                    one.inpainting_fill = 1  # the picture itself; anything else would undo the loop before
                done.append(part_of(process_images(one)))
                starts, seed = [picture for picture, _ in done[-1].pictures], done[-1].seeds[0] + 1
        if not done:
            raise RequestError("Loopback: the job was interrupted before its first picture.")
        result = together(p, done)
        if p.options.return_grid and len(result.images) > 1 and images.check_grid_size(result.images):
            put_grid_in_front(p, result, images.image_grid(result.images, rows=num_rounds), save=bool(p.options.grid_save))
        return result
