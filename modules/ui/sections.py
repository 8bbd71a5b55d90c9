"""The groups of controls in a generation tab: sampler, size, batch, CFG, seed, hires fix. A function builds a group and returns its parts.

Labels, ranges and ids are the ones users and extensions know. Must not know the application: choices and start values are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from modules.ui.common import create_refresh_button
from modules.ui.components import DropdownMulti, FormRow, InputAccordion, ToolButton
from modules.ui.shown_text import read_generation_info

MIN_SIDE_PX = 64
MAX_SIDE_PX = 2048
SIDE_STEP_PX = 8
USUAL_STEPS = 20
USE_SAME = "Use same checkpoint"
USE_SAME_CHOICES = "Use same choices"
BUILT_IN = "Built-in"
HIDDEN_PART = "hidden-part"
"""Class of a container that exists but is hidden until the page's showPart() removes the class. (gradio can hide only single controls this way.)"""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The dropdown choices of a generation tab."""

    samplers: Sequence[str]
    schedulers: Sequence[str]
    upscalers: Sequence[str] = ()
    checkpoints: Sequence[str] = ()
    modules: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Values of a generation tab. `steps`: None leaves what the slider shows."""

    width_px: int = 512
    height_px: int = 512
    cfg_scale: float = 7.0
    hires_cfg_scale: float = 7.0
    distilled_cfg_scale: float = 3.5
    hires_distilled_cfg_scale: float = 3.5
    shows_distilled: bool = False
    sampler: str = "Euler a"
    scheduler: str = "Automatic"
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class SamplerSection:
    sampler: gr.Dropdown
    scheduler: gr.Dropdown
    steps: gr.Slider


@dataclass(frozen=True, kw_only=True)
class SizeSection:
    """`tools` is the column next to the sliders; a tab may add buttons to it."""

    width: gr.Slider
    height: gr.Slider
    swap: gr.Button
    tools: gr.Column


@dataclass(frozen=True, kw_only=True)
class BatchSection:
    count: gr.Slider
    size: gr.Slider


@dataclass(frozen=True, kw_only=True)
class CfgSection:
    distilled: gr.Slider
    scale: gr.Slider


@dataclass(frozen=True, kw_only=True)
class SeedSection:
    seed: gr.Number
    random: gr.Button
    reuse: gr.Button
    extra: gr.Checkbox
    subseed: gr.Number
    random_subseed: gr.Button
    reuse_subseed: gr.Button
    subseed_strength: gr.Slider
    resize_from_w: gr.Slider
    resize_from_h: gr.Slider

    def inputs(self) -> dict[str, Component]:
        """The controls by request field, in the order they are sent to the server."""
        return {
            "seed": self.seed,
            "seed_enable_extras": self.extra,
            "subseed": self.subseed,
            "subseed_strength": self.subseed_strength,
            "seed_resize_from_w": self.resize_from_w,
            "seed_resize_from_h": self.resize_from_h,
        }


@dataclass(frozen=True, kw_only=True)
class HiresSection:
    enable: InputAccordion
    final_size: gr.HTML
    upscaler: gr.Dropdown
    steps: gr.Slider
    denoising_strength: gr.Slider
    scale: gr.Slider
    resize_x: gr.Slider
    resize_y: gr.Slider
    distilled_cfg: gr.Slider
    cfg: gr.Slider
    checkpoint: gr.Dropdown
    modules: gr.Dropdown
    sampler: gr.Dropdown
    scheduler: gr.Dropdown
    prompt: gr.Textbox
    negative_prompt: gr.Textbox


@dataclass(frozen=True, kw_only=True)
class RefinerSection:
    enable: InputAccordion
    checkpoint: gr.Dropdown
    switch_at: gr.Slider

    def inputs(self) -> dict[str, Component]:
        """The controls by their names on the server."""
        return {"enable_refiner": self.enable, "refiner_checkpoint": self.checkpoint, "refiner_switch_at": self.switch_at}


def slider(**kwargs: Any) -> gr.Slider:
    """A slider with a number field, without gradio's reset button."""
    return gr.Slider(buttons=[], **kwargs)


def side_slider(label: str, value: int, elem_id: str, *, minimum: int = MIN_SIDE_PX) -> gr.Slider:
    """A slider for one side length of a picture."""
    return slider(minimum=minimum, maximum=MAX_SIDE_PX, step=SIDE_STEP_PX, label=label, value=value, precision=0, elem_id=elem_id)


def cfg_slider(label: str, value: float, elem_id: str) -> gr.Slider:
    return slider(minimum=1.0, maximum=30.0, step=0.1, label=label, value=value, elem_id=elem_id)


def distilled_cfg_slider(label: str, value: float, elem_id: str, *, shown: bool) -> gr.Slider:
    """Guidance of distilled models (Flux.1-dev)."""
    return slider(minimum=0.0, maximum=30.0, step=0.1, label=label, value=value, elem_id=elem_id, visible=shown_or_hidden(shown))


def shown_or_hidden(shown: bool) -> Any:
    """A control's `visible`: a hidden one stays on the page and keeps its value."""
    return True if shown else "hidden"


def create_sampler_section(tab: str, choices: Choices, defaults: Defaults) -> SamplerSection:
    with FormRow(elem_id=f"sampler_selection_{tab}"):
        sampler = gr.Dropdown(
            label="Sampling method", choices=list(choices.samplers), value=defaults.sampler, elem_id=f"{tab}_sampling", min_width=120
        )
        scheduler = gr.Dropdown(
            label="Schedule type", choices=list(choices.schedulers), value=defaults.scheduler, elem_id=f"{tab}_scheduler", min_width=120
        )
        steps = slider(
            minimum=1,
            maximum=150,
            step=1,
            precision=0,
            label="Sampling steps",
            value=defaults.steps or USUAL_STEPS,
            elem_id=f"{tab}_steps",
            min_width=160,
        )
    return SamplerSection(sampler=sampler, scheduler=scheduler, steps=steps)


def create_size_section(tab: str, defaults: Defaults) -> SizeSection:
    with FormRow(elem_id=f"{tab}_size_row", elem_classes=["size-row"]):
        with gr.Column(elem_id=f"{tab}_column_size", scale=4, elem_classes=["tight-column"]):
            width = side_slider("Width", defaults.width_px, f"{tab}_width")
            height = side_slider("Height", defaults.height_px, f"{tab}_height")
        with gr.Column(elem_id=f"{tab}_dimensions_row", scale=0, min_width=40, elem_classes=["dimensions-tools"]) as tools:
            swap = ToolButton(icon_name="swap", elem_id=f"{tab}_res_switch_btn")
    swap.click(fn=None, js="(width, height) => [height, width]", inputs=[width, height], outputs=[width, height], show_progress="hidden")
    return SizeSection(width=width, height=height, swap=swap, tools=tools)


def create_batch_section(tab: str) -> BatchSection:
    with gr.Column(elem_id=f"{tab}_column_batch", elem_classes=["tight-column"], min_width=160):
        count = slider(minimum=1, maximum=100, step=1, precision=0, label="Batch count", value=1, elem_id=f"{tab}_batch_count")
        size = slider(minimum=1, maximum=8, step=1, precision=0, label="Batch size", value=1, elem_id=f"{tab}_batch_size")
    return BatchSection(count=count, size=size)


def create_cfg_section(tab: str, defaults: Defaults) -> CfgSection:
    """CFG Scale. At 1 the negative prompt has no effect, and its box shows that."""
    with FormRow(elem_id=f"{tab}_cfg_row"):
        distilled = distilled_cfg_slider(
            "Distilled CFG Scale", defaults.distilled_cfg_scale, f"{tab}_distilled_cfg_scale", shown=defaults.shows_distilled
        )
        scale = cfg_slider("CFG Scale", defaults.cfg_scale, f"{tab}_cfg_scale")
    scale.change(fn=None, js=f"(scale) => {{ markNegativePromptUnused('{tab}', scale <= 1); }}", inputs=[scale], show_progress="hidden")
    return CfgSection(distilled=distilled, scale=scale)


def create_seed_section(tab: str, generation_info: gr.Textbox) -> SeedSection:
    with FormRow(elem_id=f"{tab}_seed_row", elem_classes=["seed-row"]):
        seed = gr.Number(label="Seed", value=-1, precision=0, elem_id=f"{tab}_seed", min_width=120)
        random_seed = ToolButton(icon_name="dice", elem_id=f"{tab}_random_seed")
        reuse_seed = ToolButton(icon_name="reuse", elem_id=f"{tab}_reuse_seed")
        extra = gr.Checkbox(label="Extra", value=False, elem_id=f"{tab}_subseed_show", container=False, scale=0, min_width=80)
    with gr.Column(elem_id=f"{tab}_seed_extras", elem_classes=["seed-extras", HIDDEN_PART]):
        with FormRow(elem_id=f"{tab}_subseed_row", elem_classes=["seed-row"]):
            subseed = gr.Number(label="Variation seed", value=-1, precision=0, elem_id=f"{tab}_subseed", min_width=120)
            random_subseed = ToolButton(icon_name="dice", elem_id=f"{tab}_random_subseed")
            reuse_subseed = ToolButton(icon_name="reuse", elem_id=f"{tab}_reuse_subseed")
            strength = slider(minimum=0.0, maximum=1.0, step=0.01, label="Variation strength", value=0.0, elem_id=f"{tab}_subseed_strength")
        with FormRow(elem_id=f"{tab}_seed_resize_from_row"):
            resize_from_w = side_slider("Resize seed from width", 0, f"{tab}_seed_resize_from_w", minimum=0)
            resize_from_h = side_slider("Resize seed from height", 0, f"{tab}_seed_resize_from_h", minimum=0)
    section = SeedSection(
        seed=seed,
        random=random_seed,
        reuse=reuse_seed,
        extra=extra,
        subseed=subseed,
        random_subseed=random_subseed,
        reuse_subseed=reuse_subseed,
        subseed_strength=strength,
        resize_from_w=resize_from_w,
        resize_from_h=resize_from_h,
    )
    _connect_seed_section(tab, section, generation_info)
    return section


def _connect_seed_section(tab: str, section: SeedSection, generation_info: gr.Textbox) -> None:
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    section.random.click(fn=None, js=f"() => setRandomSeed('{tab}_seed')", show_progress="hidden")
    section.random_subseed.click(fn=None, js=f"() => setRandomSeed('{tab}_subseed')", show_progress="hidden")
    section.extra.change(fn=None, js=f"(shown) => {{ showPart('{tab}_seed_extras', shown); }}", inputs=[section.extra], show_progress="hidden")
    index = gr.Number(value=0, visible="hidden", elem_id=f"{tab}_reuse_index")
    for button, target, key in ((section.reuse, section.seed, "all_seeds"), (section.reuse_subseed, section.subseed, "all_subseeds")):
        button.click(
            _seed_reader(key),
            js="(info, index) => [info, selected_gallery_index()]",
            inputs=[generation_info, index],
            outputs=[target],
            **quiet,
        )


def _seed_reader(key: str) -> Any:
    def read_seed(generation_info: str, picture_index: float) -> Any:
        return seed_of(generation_info, key, int(picture_index))

    return read_seed


def seed_of(generation_info: str, key: str, picture_index: int) -> int:
    """The seed (key "all_seeds") or variation seed ("all_subseeds") of a gallery picture; -1 if there is none."""
    info = read_generation_info(generation_info)
    seeds = info.get(key)
    if not isinstance(seeds, list) or not seeds:
        return -1
    index = picture_index - int(info.get("index_of_first_image", 0) or 0)
    return int(seeds[index] if 0 <= index < len(seeds) else seeds[0])


def hires_size(width_px: int, height_px: int, scale: float, resize_x_px: int, resize_y_px: int) -> tuple[int, int]:
    """Width and height after hires fix, computed like the second pass does: both sides 0 = scale; one side 0 = keep the ratio."""
    if resize_x_px == 0 and resize_y_px == 0:
        return int(width_px * scale), int(height_px * scale)
    if resize_y_px == 0:
        return resize_x_px, resize_x_px * height_px // width_px
    if resize_x_px == 0:
        return resize_y_px * width_px // height_px, resize_y_px
    return resize_x_px, resize_y_px


def hires_size_html(enabled: bool, width_px: float, height_px: float, scale: float, resize_x_px: float, resize_y_px: float) -> str:
    """The text in the accordion's header; empty if hires fix is off."""
    if not enabled:
        return ""
    width, height = hires_size(int(width_px), int(height_px), float(scale), int(resize_x_px), int(resize_y_px))
    return f"from <b>{int(width_px)}x{int(height_px)}</b> to <b>{width}x{height}</b>"


def create_hires_section(
    choices: Choices, defaults: Defaults, size: SizeSection, *, show_sampler: bool = False, show_prompts: bool = False
) -> HiresSection:
    """The "Hires. fix" accordion of txt2img."""
    with InputAccordion(False, label="Hires. fix", elem_id="txt2img_hr") as enable:
        with enable.extra():
            final_size = gr.HTML(value="", elem_id="txtimg_hr_finalres", min_height=0)
        parts = {
            **_hires_main_rows(choices),
            **_hires_cfg_row(defaults),
            **_hires_sampler_rows(choices, show_sampler),
            **_hires_prompt_row(show_prompts),
        }
    section = HiresSection(enable=enable, final_size=final_size, **parts)
    sources: list[Any] = [enable, size.width, size.height, section.scale, section.resize_x, section.resize_y]
    for source in sources:
        source.change(
            hires_size_html,
            inputs=sources,
            outputs=[final_size],
            show_progress="hidden",
            queue=False,
            trigger_mode="always_last",
            api_visibility="private",
        )
    return section


def _hires_main_rows(choices: Choices) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    upscalers = list(choices.upscalers)
    with FormRow(elem_id="txt2img_hires_fix_row1"):
        parts["upscaler"] = gr.Dropdown(label="Upscaler", elem_id="txt2img_hr_upscaler", choices=upscalers, value=upscalers[0] if upscalers else None)
        parts["steps"] = slider(minimum=0, maximum=150, step=1, precision=0, label="Hires steps", value=0, elem_id="txt2img_hires_steps")
        parts["denoising_strength"] = slider(
            minimum=0.0, maximum=1.0, step=0.01, label="Denoising strength", value=0.7, elem_id="txt2img_denoising_strength"
        )
    with FormRow(elem_id="txt2img_hires_fix_row2"):
        parts["scale"] = slider(minimum=1.0, maximum=4.0, step=0.05, label="Upscale by", value=2.0, elem_id="txt2img_hr_scale")
        parts["resize_x"] = side_slider("Resize width to", 0, "txt2img_hr_resize_x", minimum=0)
        parts["resize_y"] = side_slider("Resize height to", 0, "txt2img_hr_resize_y", minimum=0)
    return parts


def _hires_cfg_row(defaults: Defaults) -> dict[str, Any]:
    with FormRow(elem_id="txt2img_hires_fix_row_cfg"):
        return {
            "distilled_cfg": distilled_cfg_slider(
                "Hires Distilled CFG Scale", defaults.hires_distilled_cfg_scale, "txt2img_hr_distilled_cfg", shown=defaults.shows_distilled
            ),
            "cfg": cfg_slider("Hires CFG Scale", defaults.hires_cfg_scale, "txt2img_hr_cfg"),
        }


def _hires_sampler_rows(choices: Choices, shown: bool) -> dict[str, Any]:
    classes = [] if shown else [HIDDEN_PART]
    parts: dict[str, Any] = {}
    with FormRow(elem_id="txt2img_hires_fix_row3", elem_classes=classes):
        parts["checkpoint"] = gr.Dropdown(
            label="Hires Checkpoint", elem_id="hr_checkpoint", choices=[USE_SAME, *choices.checkpoints], value=USE_SAME, allow_custom_value=True
        )
        parts["modules"] = DropdownMulti(
            label="Hires VAE / Text Encoder",
            elem_id="hr_vae_te",
            choices=[USE_SAME_CHOICES, BUILT_IN, *choices.modules],
            value=[USE_SAME_CHOICES],
            allow_custom_value=True,
        )
    with FormRow(elem_id="txt2img_hires_fix_row3b", elem_classes=classes):
        parts["sampler"] = gr.Dropdown(
            label="Hires sampling method", elem_id="hr_sampler", choices=["Use same sampler", *choices.samplers], value="Use same sampler"
        )
        parts["scheduler"] = gr.Dropdown(
            label="Hires schedule type", elem_id="hr_scheduler", choices=["Use same scheduler", *choices.schedulers], value="Use same scheduler"
        )
    return parts


def _hires_prompt_row(shown: bool) -> dict[str, Any]:
    with FormRow(elem_id="txt2img_hires_fix_row4", elem_classes=[] if shown else [HIDDEN_PART]):
        return {
            "prompt": gr.Textbox(label="Hires prompt", elem_id="hires_prompt", lines=3, placeholder="Empty: the prompt of the first pass"),
            "negative_prompt": gr.Textbox(
                label="Hires negative prompt", elem_id="hires_neg_prompt", lines=3, placeholder="Empty: the negative prompt of the first pass"
            ),
        }


def create_refiner_section(tab: str, choices: Choices, look_again: Callable[[], Sequence[str]]) -> RefinerSection:
    """The "Refiner" accordion: another checkpoint for the last steps. `look_again` returns the checkpoints there are now."""
    with InputAccordion(False, label="Refiner", elem_id=f"{tab}_enable") as enable, FormRow():
        checkpoint = gr.Dropdown(
            label="Checkpoint", elem_id=f"{tab}_checkpoint", choices=list(choices.checkpoints), value=None, allow_custom_value=True, min_width=160
        )
        create_refresh_button(checkpoint, lambda: None, lambda: {"choices": list(look_again())}, f"{tab}_checkpoint_refresh")
        switch_at = slider(minimum=0.01, maximum=1.0, step=0.01, label="Switch at", value=0.8, elem_id=f"{tab}_switch_at", min_width=160)
    return RefinerSection(enable=enable, checkpoint=checkpoint, switch_at=switch_at)


def create_override_settings(tab: str) -> gr.Dropdown:
    """Settings that differ for this job only, as `Name: value` texts from pasted parameters. Visible when there are any."""
    with FormRow(elem_id=f"{tab}_override_settings_row"):
        return DropdownMulti(
            label="Override settings", choices=[], value=[], allow_custom_value=True, visible="hidden", elem_id=f"{tab}_override_settings"
        )
