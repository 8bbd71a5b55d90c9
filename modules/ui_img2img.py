"""The img2img tab: its inner tabs for the picture and the mask, its controls and how they hang together. Generate is connected in modules/ui.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from modules.ui_common import OutputPanel, create_output_panel
from modules.ui_components import FormRow, ResizeHandleRow, ToolButton
from modules.ui_paste import PasteTarget
from modules.ui_sections import (
    HIDDEN_PART,
    SIDE_STEP_PX,
    BatchSection,
    CfgSection,
    Choices,
    Defaults,
    SamplerSection,
    SeedSection,
    SizeSection,
    create_batch_section,
    create_cfg_section,
    create_override_settings,
    create_sampler_section,
    create_seed_section,
    create_size_section,
    slider,
)
from modules.ui_toprow import Toprow, create_toprow

if TYPE_CHECKING:
    from modules.application import Application

TAB = "img2img"
RESIZE_MODES = ("Just resize", "Crop and resize", "Resize and fill", "Just resize (latent upscale)")
PICTURE_HEIGHT_PX = 420


@dataclass(frozen=True, kw_only=True)
class PictureSection:
    """Where the picture comes from. `mode` holds the number of the inner tab that is shown."""

    mode: gr.Number
    init_image: gr.Image
    inpaint_editor: gr.ImageEditor
    inpaint_upload_image: gr.Image
    inpaint_upload_mask: gr.Image


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
    """The parts of the tab. `inputs` are the handler's, by name, in their order (the task id comes before them)."""

    toprow: Toprow
    pictures: PictureSection
    inpaint: InpaintSection
    sampler: SamplerSection
    resize: ResizeSection
    batch: BatchSection
    cfg: CfgSection
    denoising_strength: gr.Slider
    seed: SeedSection
    override_settings: gr.Dropdown
    output: OutputPanel
    task_id: gr.Textbox
    inputs: Mapping[str, Component]
    paste_target: PasteTarget


def create_img2img_tab(app: Application, choices: Choices, defaults: Defaults, style_names: Sequence[str]) -> Img2imgTab:
    """Build the tab inside the current gradio context."""
    toprow = create_toprow(TAB, style_names)
    with ResizeHandleRow(elem_classes=["generation-columns"]):
        with gr.Column(elem_id=f"{TAB}_settings", elem_classes=["settings-column"]):
            pictures, inpaint_tabs = _create_pictures()
            inpaint = _create_inpaint(inpaint_tabs, pictures)
            resize_mode = gr.Radio(label="Resize mode", choices=list(RESIZE_MODES), value=RESIZE_MODES[0], type="index", elem_id="resize_mode")
            sampler = create_sampler_section(TAB, choices, defaults)
            with gr.Row(elem_id=f"{TAB}_dimensions", elem_classes=["size-and-batch"]):
                resize = _create_resize(defaults, pictures, resize_mode)
                batch = create_batch_section(TAB)
            cfg = create_cfg_section(TAB, defaults)
            denoising = slider(minimum=0.0, maximum=1.0, step=0.01, label="Denoising strength", value=0.75, elem_id="img2img_denoising_strength")
            seed_slot = gr.Column(elem_id=f"{TAB}_seed_column", elem_classes=["tight-column"])
            override_settings = create_override_settings(TAB)
        output = create_output_panel(TAB, show_folder_button=not app.config.hide_ui_dir_config, gallery_height=app.options.gallery_height)
    task_id = gr.Textbox(visible="hidden", elem_id=f"{TAB}_task_id", label="Task")
    with seed_slot:
        seed = create_seed_section(TAB, output.generation_info)
    inputs = {
        **_main_inputs(toprow, sampler, resize, batch, cfg, denoising, override_settings),
        **_picture_inputs(pictures, inpaint),
        **seed.inputs(),
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
        override_settings=override_settings,
        output=output,
        task_id=task_id,
        inputs=inputs,
        paste_target=_paste_target(inputs, override_settings),
    )


def _create_pictures() -> tuple[PictureSection, tuple[gr.Tab, gr.Tab, gr.Tab]]:
    picture: dict[str, Any] = {
        "type": "pil",
        "image_mode": "RGBA",
        "format": "png",
        "sources": ["upload", "clipboard"],
        "show_label": False,
        "height": PICTURE_HEIGHT_PX,
    }
    mode = gr.Number(value=0, precision=0, visible="hidden", elem_id="img2img_selected_tab")
    with gr.Tabs(elem_id="mode_img2img"):
        with gr.Tab("img2img", elem_id="img2img_img2img_tab") as plain_tab:
            init_image = gr.Image(label="Image for img2img", elem_id="img2img_image", **picture)
        with gr.Tab("Inpaint", elem_id="img2img_inpaint_tab") as inpaint_tab:
            editor = gr.ImageEditor(
                label="Image for inpainting with mask",
                show_label=False,
                elem_id="img2maskimg",
                type="pil",
                image_mode="RGBA",
                format="png",
                sources=["upload", "clipboard"],
                transforms=(),
                layers=False,
                height=PICTURE_HEIGHT_PX + 80,
                brush=gr.Brush(colors=["#ffffff", "#000000"], default_color="#ffffff", color_mode="fixed"),
                canvas_size=(512, 512),
                buttons=["fullscreen"],
            )
        with gr.Tab("Inpaint upload", elem_id="img2img_inpaint_upload_tab") as upload_tab, gr.Row():
            upload_image = gr.Image(label="Image", elem_id="img_inpaint_base", **{**picture, "show_label": True, "height": PICTURE_HEIGHT_PX - 80})
            upload_mask = gr.Image(label="Mask", elem_id="img_inpaint_mask", **{**picture, "show_label": True, "height": PICTURE_HEIGHT_PX - 80})
    section = PictureSection(
        mode=mode, init_image=init_image, inpaint_editor=editor, inpaint_upload_image=upload_image, inpaint_upload_mask=upload_mask
    )
    return section, (plain_tab, inpaint_tab, upload_tab)


def _create_inpaint(tabs: tuple[gr.Tab, gr.Tab, gr.Tab], pictures: PictureSection) -> InpaintSection:
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
    for number, tab in zip((0, 2, 4), tabs):
        shown = "false" if number == 0 else "true"
        tab.select(
            fn=None, js=f"() => {{ showPart('inpaint_controls', {shown}); return {number}; }}", outputs=[pictures.mode], show_progress="hidden"
        )
    return InpaintSection(mask_blur=mask_blur, mask_mode=mask_mode, fill=fill, full_res=full_res, padding=padding)


def _create_resize(defaults: Defaults, pictures: PictureSection, mode: gr.Radio) -> ResizeSection:
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
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
    detect.click(size_updates, inputs=_picture_sources(pictures), outputs=[size.width, size.height], **quiet)
    for event in (scale_by.change, by_tab.select):
        event(_scale_text, inputs=[scale_by, *_picture_sources(pictures)], outputs=[preview], trigger_mode="always_last", **quiet)
    return ResizeSection(mode=mode, scale_tab=scale_tab, size=size, scale_by=scale_by)


def _picture_sources(pictures: PictureSection) -> list[Component]:
    return [pictures.mode, pictures.init_image, pictures.inpaint_editor, pictures.inpaint_upload_image]


def shown_picture(mode: float, init_image: Image.Image | None, editor: Mapping[str, Any] | None, upload: Image.Image | None) -> Image.Image | None:
    """The picture of the inner tab that is shown; None when it is empty."""
    if int(mode) == 0:
        return init_image
    return (editor.get("background") if editor else None) if int(mode) == 2 else upload


def size_updates(mode: float, init_image: Image.Image | None, editor: Mapping[str, Any] | None, upload: Image.Image | None) -> list[Any]:
    """Width and height of the picture that is shown, rounded to what the sliders take; no change without one."""
    picture = shown_picture(mode, init_image, editor, upload)
    if picture is None:
        return [gr.skip(), gr.skip()]
    return [gr.update(value=max(64, min(2048, round(side / SIDE_STEP_PX) * SIDE_STEP_PX))) for side in picture.size]


def _scale_text(scale: float, *sources: Any) -> str:
    picture = shown_picture(*sources)
    if picture is None:
        return "The size follows from the picture."
    width, height = (max(8, int(side * scale) // 8 * 8) for side in picture.size)
    return f"resize: from <b>{picture.width}x{picture.height}</b> to <b>{width}x{height}</b>"


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
        "mode": pictures.mode,
        "init_image": pictures.init_image,
        "inpaint_editor": pictures.inpaint_editor,
        "inpaint_upload_image": pictures.inpaint_upload_image,
        "inpaint_upload_mask": pictures.inpaint_upload_mask,
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


def _paste_target(inputs: Mapping[str, Component], override_settings: gr.Dropdown) -> PasteTarget:
    seeds = ("seed", "subseed", "subseed_strength", "seed_resize_from_w", "seed_resize_from_h")
    names = (*PASTED, "mask_blur", "inpaint_full_res_padding", *seeds)
    return PasteTarget(
        tab=TAB, controls={name: inputs[name] for name in names}, override_settings=override_settings, extra_seeds=inputs["seed_enable_extras"]
    )
