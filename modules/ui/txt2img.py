"""The txt2img tab: its controls and the events between them. modules/ui/tabs.py connects Generate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gradio as gr
from gradio.components import Component

from modules.ui import choices as ui_choices
from modules.ui.common import OutputPanel, create_output_panel
from modules.ui.components import ResizeHandleRow
from modules.ui.extra_networks_tabs import create_card_tabs
from modules.ui.gpus import create_gpu_panel
from modules.ui.part_order import PartOrder
from modules.ui.paste import PasteTarget
from modules.ui.scripts import TabScripts, no_scripts
from modules.ui.sections import (
    BatchSection,
    CfgSection,
    Choices,
    Defaults,
    HiresSection,
    RefinerSection,
    SamplerSection,
    SeedSection,
    SizeSection,
    create_batch_section,
    create_cfg_section,
    create_hires_section,
    create_override_settings,
    create_refiner_section,
    create_sampler_section,
    create_seed_section,
    create_size_section,
)
from modules.ui.toprow import Toprow, create_toprow

if TYPE_CHECKING:
    from modules.application import Application

TAB = "txt2img"


@dataclass(frozen=True, kw_only=True)
class Txt2imgTab:
    """The parts of the tab. `inputs` are the handler's inputs by name, in the order extensions rely on (the task id comes before them)."""

    toprow: Toprow
    sampler: SamplerSection
    size: SizeSection
    batch: BatchSection
    cfg: CfgSection
    seed: SeedSection
    hires: HiresSection
    refiner: RefinerSection
    override_settings: gr.Dropdown
    output: OutputPanel
    task_id: gr.Textbox
    inputs: Mapping[str, Component]
    paste_target: PasteTarget


def create_txt2img_tab(
    app: Application, choices: Choices, defaults: Defaults, style_names: Sequence[str], scripts: TabScripts | None = None
) -> Txt2imgTab:
    """Build the tab inside the current gradio context."""
    options = app.options
    toprow = create_toprow(TAB, style_names)
    scripts = scripts or no_scripts(TAB)
    scripts.section("prompt")
    with gr.Tabs(elem_id=f"{TAB}_extra_tabs", elem_classes=["extra-networks"]):
        with gr.Tab("Generation", id=f"{TAB}_generation", elem_id=f"{TAB}_generation_tab"), ResizeHandleRow(elem_classes=["generation-columns"]):
            with gr.Column(elem_id=f"{TAB}_settings", elem_classes=["settings-column"]) as column:
                order = PartOrder(column)
                with order.part("sampler"):
                    sampler = create_sampler_section(TAB, choices, defaults)
                    scripts.section("sampler")
                with order.part("accordions"):
                    hires_slot = gr.Column(elem_id=f"{TAB}_accordions", elem_classes=["accordions"])
                with order.part("dimensions"):
                    with gr.Row(elem_id=f"{TAB}_dimensions", elem_classes=["size-and-batch"]):
                        size = create_size_section(TAB, defaults)
                        batch = create_batch_section(TAB)
                    for section in ("dimensions", "batch"):
                        scripts.section(section)
                with order.part("cfg"):
                    cfg = create_cfg_section(TAB, defaults)
                    scripts.section("cfg")
                with order.part("seed"):
                    seed_slot = gr.Column(elem_id=f"{TAB}_seed_column", elem_classes=["tight-column"])
                with order.part("override_settings"):
                    override_settings = create_override_settings(TAB)
                    scripts.section("override_settings")
                with order.part("scripts"):
                    script_slot = gr.Column(elem_classes=["tight-column"])
                with order.part("gpus"):
                    create_gpu_panel(app, TAB)
            order.arrange(options.ui_reorder_list)
            output = create_output_panel(TAB, show_folder_button=not app.config.hide_ui_dir_config, gallery_height=options.gallery_height)
        create_card_tabs(TAB, output.gallery)
    task_id = gr.Textbox(visible="hidden", elem_id=f"{TAB}_task_id", label="Task")
    with hires_slot:
        hires = create_hires_section(
            choices, defaults, size, show_sampler=options.hires_fix_show_sampler, show_prompts=options.hires_fix_show_prompts
        )
        refiner = create_refiner_section(TAB, choices, lambda: ui_choices.checkpoint_titles(app))
        scripts.section("accordions")
    with seed_slot:
        seed = create_seed_section(TAB, output.generation_info)
        scripts.section("seed")
    with script_slot:
        scripts.rest()
    inputs = {**_inputs(toprow, sampler, size, batch, cfg, seed, hires, refiner, override_settings), **scripts.inputs()}
    return Txt2imgTab(
        toprow=toprow,
        sampler=sampler,
        size=size,
        batch=batch,
        cfg=cfg,
        seed=seed,
        hires=hires,
        refiner=refiner,
        override_settings=override_settings,
        output=output,
        task_id=task_id,
        inputs=inputs,
        paste_target=_paste_target(inputs, override_settings, scripts),
    )


def _inputs(
    toprow: Toprow,
    sampler: SamplerSection,
    size: SizeSection,
    batch: BatchSection,
    cfg: CfgSection,
    seed: SeedSection,
    hires: HiresSection,
    refiner: RefinerSection,
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
        "height": size.height,
        "width": size.width,
        "enable_hr": hires.enable,
        "denoising_strength": hires.denoising_strength,
        "hr_scale": hires.scale,
        "hr_upscaler": hires.upscaler,
        "hr_second_pass_steps": hires.steps,
        "hr_resize_x": hires.resize_x,
        "hr_resize_y": hires.resize_y,
        "hr_checkpoint_name": hires.checkpoint,
        "hr_additional_modules": hires.modules,
        "hr_sampler_name": hires.sampler,
        "hr_scheduler": hires.scheduler,
        "hr_prompt": hires.prompt,
        "hr_negative_prompt": hires.negative_prompt,
        "hr_cfg": hires.cfg,
        "hr_distilled_cfg": hires.distilled_cfg,
        "override_settings": override_settings,
        "steps": sampler.steps,
        "sampler_name": sampler.sampler,
        "scheduler": sampler.scheduler,
        **refiner.inputs(),
        **seed.inputs(),
    }


def _paste_target(inputs: Mapping[str, Component], override_settings: gr.Dropdown, scripts: TabScripts) -> PasteTarget:
    not_pasted = ("override_settings", "n_iter", "batch_size", "seed_enable_extras")
    controls = {name: control for name, control in inputs.items() if name not in not_pasted and name not in scripts.inputs()}
    return PasteTarget(
        tab=TAB,
        controls=controls,
        override_settings=override_settings,
        extra_seeds=inputs["seed_enable_extras"],
        script_fields=tuple(scripts.runner.infotext_fields),
        script_keys=frozenset(scripts.runner.paste_field_names),
    )
