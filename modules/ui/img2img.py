"""The img2img tab: its inner tabs for picture and mask, its controls and the events between them. modules/ui/tabs.py connects Generate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component

from modules.ui import choices as ui_choices
from modules.ui.common import OutputPanel, create_output_panel
from modules.ui.components import FormRow, ResizeHandleRow, ToolButton
from modules.ui.extra_networks_tabs import create_card_tabs
from modules.ui.gpus import create_gpu_panel
from modules.ui.img2img_pictures import PictureSection, connect_mask_controls, create_pictures, scale_text, size_updates
from modules.ui.part_order import PartOrder
from modules.ui.paste import PasteTarget
from modules.ui.scripts import TabScripts, no_scripts
from modules.ui.sections import (
    HIDDEN_PART,
    BatchSection,
    CfgSection,
    Choices,
    Defaults,
    RefinerSection,
    SamplerSection,
    SeedSection,
    SizeSection,
    create_batch_section,
    create_cfg_section,
    create_override_settings,
    create_refiner_section,
    create_sampler_section,
    create_seed_section,
    create_size_section,
    slider,
)
from modules.ui.toprow import Toprow, create_toprow

if TYPE_CHECKING:
    from modules.application import Application

TAB = "img2img"
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
RESIZE_MODES = ("Just resize", "Crop and resize", "Resize and fill", "Just resize (latent upscale)")


@dataclass(frozen=True, kw_only=True)
class InpaintSection:
    mask_blur: gr.Slider
    mask_mode: gr.Radio
    fill: gr.Radio
    full_res: gr.Radio
    padding: gr.Slider


@dataclass(frozen=True, kw_only=True)
class ResizeSection:
    """`scale_tab` is 0 while "Resize to" is shown and 1 while "Resize by" is."""

    mode: gr.Radio
    scale_tab: gr.Number
    size: SizeSection
    scale_by: gr.Slider


@dataclass(frozen=True, kw_only=True)
class Img2imgTab:
    """The parts of the tab. `inputs` are the handler's inputs by name, in order (the task id comes before them)."""

    toprow: Toprow
    pictures: PictureSection
    inpaint: InpaintSection
    sampler: SamplerSection
    resize: ResizeSection
    batch: BatchSection
    cfg: CfgSection
    denoising_strength: gr.Slider
    seed: SeedSection
    refiner: RefinerSection
    override_settings: gr.Dropdown
    output: OutputPanel
    task_id: gr.Textbox
    inputs: Mapping[str, Component]
    paste_target: PasteTarget


def create_img2img_tab(
    app: Application, choices: Choices, defaults: Defaults, style_names: Sequence[str], scripts: TabScripts | None = None
) -> Img2imgTab:
    """Build the tab inside the current gradio context."""
    toprow = create_toprow(TAB, style_names)
    scripts = scripts or no_scripts(TAB)
    scripts.section("prompt")
    with gr.Tabs(elem_id=f"{TAB}_extra_tabs", elem_classes=["extra-networks"]):
        with gr.Tab("Generation", id=f"{TAB}_generation", elem_id=f"{TAB}_generation_tab"), ResizeHandleRow(elem_classes=["generation-columns"]):
            with gr.Column(elem_id=f"{TAB}_settings", elem_classes=["settings-column"]) as column:
                order = PartOrder(column)
                with order.part("image"):
                    pictures = create_pictures(app)
                    scripts.section("image")
                with order.part("inpaint"):
                    inpaint = _create_inpaint()
                    scripts.section("inpaint")
                    connect_mask_controls(pictures)
                    resize_mode = gr.Radio(
                        label="Resize mode", choices=list(RESIZE_MODES), value=RESIZE_MODES[0], type="index", elem_id="resize_mode"
                    )
                with order.part("sampler"):
                    sampler = create_sampler_section(TAB, choices, defaults)
                    scripts.section("sampler")
                with order.part("dimensions"):
                    with gr.Row(elem_id=f"{TAB}_dimensions", elem_classes=["size-and-batch"]):
                        resize = _create_resize(app, defaults, pictures, resize_mode)
                        batch = create_batch_section(TAB)
                    for section in ("dimensions", "batch"):
                        scripts.section(section)
                with order.part("cfg"):
                    cfg = create_cfg_section(TAB, defaults)
                    scripts.section("cfg")
                with order.part("denoising"):
                    denoising = slider(
                        minimum=0.0, maximum=1.0, step=0.01, label="Denoising strength", value=0.75, elem_id="img2img_denoising_strength"
                    )
                    scripts.section("denoising")
                with order.part("accordions"), gr.Column(elem_id=f"{TAB}_accordions", elem_classes=["accordions"]):
                    refiner = create_refiner_section(TAB, choices, lambda: ui_choices.checkpoint_titles(app))
                    scripts.section("accordions")
                with order.part("seed"):
                    seed_slot = gr.Column(elem_id=f"{TAB}_seed_column", elem_classes=["tight-column"])
                with order.part("override_settings"):
                    override_settings = create_override_settings(TAB)
                    scripts.section("override_settings")
                with order.part("scripts"):
                    script_slot = gr.Column(elem_classes=["tight-column"])
                with order.part("gpus"):
                    create_gpu_panel(app, TAB)
            order.arrange(app.options.ui_reorder_list)
            output = create_output_panel(TAB, show_folder_button=not app.config.hide_ui_dir_config, gallery_height=app.options.gallery_height)
        create_card_tabs(TAB, output.gallery)
    task_id = gr.Textbox(visible="hidden", elem_id=f"{TAB}_task_id", label="Task")
    with seed_slot:
        seed = create_seed_section(TAB, output.generation_info)
        scripts.section("seed")
    with script_slot:
        scripts.rest()
    inputs = {
        **_main_inputs(toprow, sampler, resize, batch, cfg, denoising, override_settings),
        **_picture_inputs(pictures, inpaint),
        **refiner.inputs(),
        **seed.inputs(),
        **scripts.inputs(),
    }
    return Img2imgTab(
        toprow=toprow,
        pictures=pictures,
        inpaint=inpaint,
        sampler=sampler,
        resize=resize,
        batch=batch,
        cfg=cfg,
        denoising_strength=denoising,
        seed=seed,
        refiner=refiner,
        override_settings=override_settings,
        output=output,
        task_id=task_id,
        inputs=inputs,
        paste_target=_paste_target(inputs, override_settings, scripts),
    )


def _create_inpaint() -> InpaintSection:
    with gr.Column(elem_id="inpaint_controls", elem_classes=["inpaint-controls", HIDDEN_PART]):
        with FormRow():
            mask_blur = slider(label="Mask blur", minimum=0, maximum=64, step=1, precision=0, value=4, elem_id="img2img_mask_blur")
            padding = slider(
                label="Only masked padding, pixels", minimum=0, maximum=256, step=4, precision=0, value=32, elem_id="img2img_inpaint_full_res_padding"
            )
        with FormRow():
            mask_mode = gr.Radio(
                label="Mask mode", choices=["Inpaint masked", "Inpaint not masked"], value="Inpaint masked", type="index", elem_id="img2img_mask_mode"
            )
            full_res = gr.Radio(
                label="Inpaint area",
                choices=["Whole picture", "Only masked"],
                value="Whole picture",
                type="index",
                elem_id="img2img_inpaint_full_res",
            )
        fill = gr.Radio(
            label="Masked content",
            choices=["fill", "original", "latent noise", "latent nothing"],
            value="original",
            type="index",
            elem_id="img2img_inpainting_fill",
        )
    return InpaintSection(mask_blur=mask_blur, mask_mode=mask_mode, fill=fill, full_res=full_res, padding=padding)


def _create_resize(app: Application, defaults: Defaults, pictures: PictureSection, mode: gr.Radio) -> ResizeSection:
    quiet = QUIET
    with gr.Column(elem_id="img2img_column_resize", scale=4, elem_classes=["tight-column"]):
        scale_tab = gr.Number(value=0, precision=0, visible="hidden", elem_id="img2img_selected_scale_tab")
        with gr.Tabs(elem_id="img2img_tabs_resize"):
            with gr.Tab("Resize to", elem_id="img2img_tab_resize_to") as to_tab:
                size = create_size_section(TAB, defaults)
                with size.tools:
                    detect = ToolButton(icon_name="ruler", elem_id="img2img_detect_image_size_btn")
            with gr.Tab("Resize by", elem_id="img2img_tab_resize_by") as by_tab:
                scale_by = slider(minimum=0.05, maximum=4.0, step=0.01, label="Scale", value=1.0, elem_id="img2img_scale")
                preview = gr.HTML("", elem_id="img2img_scale_resolution_preview", elem_classes=["scale-preview"])
    to_tab.select(lambda: 0, outputs=[scale_tab], **quiet)
    by_tab.select(lambda: 1, outputs=[scale_tab], **quiet)
    detect.click(size_updates, inputs=pictures.sources(), outputs=[size.width, size.height], **quiet)
    _connect_autosize(app, pictures, size)
    for event in (scale_by.change, by_tab.select):
        event(scale_text, inputs=[scale_by, *pictures.sources()], outputs=[preview], trigger_mode="always_last", **quiet)
    return ResizeSection(mode=mode, scale_tab=scale_tab, size=size, scale_by=scale_by)


def _connect_autosize(app: Application, pictures: PictureSection, size: SizeSection) -> None:
    """Set the size from a loaded picture, if the settings say so."""

    def on_load(*sources: Any) -> list[Any]:
        return size_updates(*sources) if app.options.img2img_autosize else [gr.skip(), gr.skip()]

    for picture in (pictures.init_image, pictures.sketch, pictures.inpaint_editor, pictures.inpaint_sketch, pictures.inpaint_upload_image):
        picture.upload(on_load, inputs=pictures.sources(), outputs=[size.width, size.height], **QUIET)


def _main_inputs(
    toprow: Toprow,
    sampler: SamplerSection,
    resize: ResizeSection,
    batch: BatchSection,
    cfg: CfgSection,
    denoising: gr.Slider,
    override_settings: gr.Dropdown,
) -> dict[str, Component]:
    return {
        "prompt": toprow.prompt,
        "negative_prompt": toprow.negative_prompt,
        "styles": toprow.styles,
        "n_iter": batch.count,
        "batch_size": batch.size,
        "cfg_scale": cfg.scale,
        "distilled_cfg_scale": cfg.distilled,
        "denoising_strength": denoising,
        "selected_scale_tab": resize.scale_tab,
        "height": resize.size.height,
        "width": resize.size.width,
        "scale_by": resize.scale_by,
        "resize_mode": resize.mode,
        "override_settings": override_settings,
        "steps": sampler.steps,
        "sampler_name": sampler.sampler,
        "scheduler": sampler.scheduler,
    }


def _picture_inputs(pictures: PictureSection, inpaint: InpaintSection) -> dict[str, Component]:
    return {
        **pictures.inputs(),
        "mask_blur": inpaint.mask_blur,
        "inpainting_mask_invert": inpaint.mask_mode,
        "inpainting_fill": inpaint.fill,
        "inpaint_full_res": inpaint.full_res,
        "inpaint_full_res_padding": inpaint.padding,
    }


PASTED = (
    "prompt",
    "negative_prompt",
    "styles",
    "steps",
    "sampler_name",
    "scheduler",
    "cfg_scale",
    "distilled_cfg_scale",
    "width",
    "height",
    "denoising_strength",
)


def _paste_target(inputs: Mapping[str, Component], override_settings: gr.Dropdown, scripts: TabScripts) -> PasteTarget:
    seeds = ("seed", "subseed", "subseed_strength", "seed_resize_from_w", "seed_resize_from_h")
    refiner = ("enable_refiner", "refiner_checkpoint", "refiner_switch_at")
    names = (*PASTED, "mask_blur", "inpaint_full_res_padding", *refiner, *seeds)
    return PasteTarget(
        tab=TAB,
        controls={name: inputs[name] for name in names},
        override_settings=override_settings,
        extra_seeds=inputs["seed_enable_extras"],
        script_fields=tuple(scripts.runner.infotext_fields),
        script_keys=frozenset(scripts.runner.paste_field_names),
    )
