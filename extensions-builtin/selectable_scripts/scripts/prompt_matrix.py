"""A picture for every combination of the prompt's optional parts, which `|` separates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from PIL import Image
from script_jobs import megapixels_of_grid, put_grid_in_front

from modules import images, scripts
from modules.errors import RequestError
from modules.processing import Processed, StableDiffusionProcessing, fix_seed, process_images

MAX_OPTIONAL_PARTS = 10
DELIMITERS = {"comma": ", ", "space": " "}


def combine(parts: list[str], *, put_at_start: bool, delimiter: str) -> list[str]:
    """The fixed part `parts[0]` with every subset of the others. Bit i of a subset's number includes optional part i."""
    optional = [part.strip().strip(",") for part in parts[1:]]
    prompts = []
    for number in range(2 ** len(optional)):
        chosen = [part for place, part in enumerate(optional) if number >> place & 1]
        prompts.append(delimiter.join([*chosen, parts[0]] if put_at_start else [parts[0], *chosen]))
    return prompts


class Script(scripts.Script):
    def title(self) -> str:
        return "Prompt matrix"

    def ui(self, is_img2img: bool) -> list[Any]:
        gr.HTML("<p>Parts of the prompt behind | are optional: a picture is made for every combination of them.</p>")
        with gr.Row():
            put_at_start = gr.Checkbox(label="Put variable parts at start of prompt", value=False, elem_id=self.elem_id("put_at_start"))
            different_seeds = gr.Checkbox(label="Use different seed for each picture", value=False, elem_id=self.elem_id("different_seeds"))
        with gr.Row():
            kinds = ["positive", "negative"]
            prompt_type = gr.Radio(kinds, label="Select prompt", elem_id=self.elem_id("prompt_type"), value="positive")
            delimiter = gr.Radio(list(DELIMITERS), label="Select joining char", elem_id=self.elem_id("variations_delimiter"), value="comma")
            margin = gr.Slider(label="Grid margins (px)", minimum=0, maximum=500, value=0, step=2, elem_id=self.elem_id("margin_size"))
        return [put_at_start, different_seeds, prompt_type, delimiter, margin]

    def run(  # type: ignore[override]  # the host hands in the values of `ui`
        self, p: StableDiffusionProcessing, put_at_start: bool, different_seeds: bool, prompt_type: str, variations_delimiter: str, margin_size: float
    ) -> Processed:
        """Raises RequestError for an unknown choice and for too many parts."""
        given = (put_at_start, different_seeds, prompt_type, variations_delimiter, margin_size)
        *_, variations_delimiter, margin_px = scripts.checked_values(self, given)
        fix_seed(p)
        whole = p.prompt if prompt_type == "positive" else p.negative_prompt
        text = whole[0] if isinstance(whole, list) else whole
        parts = text.split("|")
        if len(parts) - 1 > MAX_OPTIONAL_PARTS:
            raise RequestError(
                f"Prompt matrix: the prompt has {len(parts) - 1} optional parts. Use at most {MAX_OPTIONAL_PARTS}: each doubles the pictures."
            )
        prompts = combine(parts, put_at_start=put_at_start, delimiter=DELIMITERS[variations_delimiter])
        first_seed = int(p.seed)
        p.n_iter = -(-len(prompts) // p.batch_size)
        p.do_not_save_grid = True
        p.prompt_for_display = text if prompt_type == "positive" else p.prompt_for_display
        if prompt_type == "positive":
            p.prompt = prompts
        else:
            p.negative_prompt = prompts
            p.prompt = [p.prompt if isinstance(p.prompt, str) else p.prompt[0]] * len(prompts)
        p.seed = [first_seed + (place if different_seeds else 0) for place in range(len(prompts))]
        result = process_images(p)
        pictures = result.images[result.index_of_first_image :]
        if len(pictures) == len(prompts) and _has_room(p, pictures, margin_px):
            grid = images.image_grid(pictures, p.batch_size, rows=1 << (len(parts) - 1) // 2)
            grid = images.draw_prompt_matrix(grid, pictures[0].width, pictures[0].height, parts, margin_px)
            put_grid_in_front(p, result, grid, save=bool(p.options.grid_save))
        return result


def _has_room(p: StableDiffusionProcessing, pictures: Sequence[Image.Image], margin_px: int) -> bool:
    """Whether the grid stays within the settings' limit."""
    width, height = max(picture.width for picture in pictures), max(picture.height for picture in pictures)
    return megapixels_of_grid(len(pictures), width, height, margin_px) <= float(p.options.img_max_size_mp)
