"""Regional prompts: each line of the prompt in a region of its own."""

from __future__ import annotations

from typing import Any

import gradio as gr
from region_masks import WHOLE, Region, RegionalConditions, divide_evenly, read_regions

from modules import scripts
from modules.errors import RequestError
from modules.infotext_utils import PasteField
from modules.ui_components import InputAccordion

TITLE = "Regional Prompts"
KEYS = tuple(f"regional_{name}" for name in ("enabled", "mode", "separator", "direction", "background", "background_weight", "mapping"))
BASIC, ADVANCED = "Basic", "Advanced"
BACKGROUNDS = ("None", "First Line", "Last Line")
MAX_REGIONS = 16


class RegionalPrompts(scripts.Script):
    """Basic: equal parts side by side. Advanced: one region for each line of the mapping. A background line applies everywhere."""

    sorting_priority = 19

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        with InputAccordion(False, label=TITLE, elem_id=self.elem_id("enabled")) as enabled:
            with gr.Row():
                mode = gr.Radio(label="Region Assignment", choices=[BASIC, ADVANCED], value=BASIC, elem_id=self.elem_id("mode"))
                separator = gr.Textbox(label="Couple Separator", value="", placeholder="Empty: a new line", elem_id=self.elem_id("separator"))
            with gr.Row():
                direction = gr.Radio(
                    label="Tile Direction", choices=["Horizontal", "Vertical"], value="Horizontal", elem_id=self.elem_id("direction")
                )
                background = gr.Radio(label="Global Effect", choices=list(BACKGROUNDS), value=BACKGROUNDS[0], elem_id=self.elem_id("background"))
                weight = gr.Slider(
                    label="Global Effect Weight", minimum=0.1, maximum=1.5, step=0.1, value=0.5, elem_id=self.elem_id("background_weight")
                )
            mapping = gr.Textbox(
                label="Mapping",
                lines=3,
                value="0:0.5, 0:1, 1.0\n0.5:1, 0:1, 1.0",
                info="left:right, top:bottom, weight",
                elem_id=self.elem_id("mapping"),
            )
        controls = [enabled, mode, separator, direction, background, weight, mapping]
        self.infotext_fields = [PasteField(enabled, lambda params: params.get(KEYS[0], False), api=KEYS[0])]
        self.infotext_fields += [PasteField(control, key, api=key) for control, key in zip(controls[1:], KEYS[1:])]
        self.paste_field_names = list(KEYS)
        return controls

    def before_process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """Join each prompt's lines to a composed prompt. Raises RequestError."""
        enabled, mode, separator, direction, background, weight, mapping = scripts.checked_values(self, args)
        p.regions = None
        if not enabled:
            return
        mark = str(separator or "").replace("\\n", "\n") or "\n"
        lines = [[line.strip() for line in prompt.split(mark) if line.strip()] for prompt in p.prompts]
        counts = {len(parts) for parts in lines}
        if any(" AND " in part for parts in lines for part in parts):
            raise RequestError(f"{TITLE}: AND composes prompts over the whole picture. Write each region's prompt without it.")
        if len(counts) != 1:
            raise RequestError(f"{TITLE}: the prompts of a batch have {', '.join(map(str, sorted(counts)))} lines; all must have as many.")
        p.regions = read_layout(counts.pop(), mode, direction, background, weight, str(mapping or ""))
        p.prompts[:] = [" AND ".join(parts) for parts in lines]
        if getattr(p, "hr_prompts", None):
            p.hr_prompts[:] = [" AND ".join(line.strip() for line in prompt.split(mark) if line.strip()) for prompt in p.hr_prompts]
        p.extra_generation_params.update(zip(KEYS, (True, mode, mark, direction, background, weight, mapping)))

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(p, "regions", None):
            unet = p.sd_model.forge_objects.unet.clone()
            unet.add_conditioning_modifier(RegionalConditions(p.regions))
            p.sd_model.forge_objects.unet = unet


def read_layout(num_lines: int, mode: str, direction: str, background: str, weight: float, mapping: str) -> list[Region]:
    """A region for each line of the prompt. Raises RequestError."""
    num_regions = num_lines - (background != BACKGROUNDS[0])
    if not 1 <= num_regions <= MAX_REGIONS or num_lines < 2:
        raise RequestError(f"{TITLE}: the prompt has {num_lines} lines; write 2 to {MAX_REGIONS}, one for each region and one for the background.")
    try:
        regions = read_regions(mapping) if mode == ADVANCED else divide_evenly(num_regions, across=direction == "Horizontal")
    except ValueError as error:
        raise RequestError(f"{TITLE}: mapping {error}.") from error
    if len(regions) != num_regions:
        raise RequestError(f"{TITLE}: the mapping has {len(regions)} regions and the prompt {num_regions} lines for them. Write as many of each.")
    whole = Region(WHOLE.left, WHOLE.right, WHOLE.top, WHOLE.bottom, weight)
    return {"None": regions, "First Line": [whole, *regions], "Last Line": [*regions, whole]}[background]
