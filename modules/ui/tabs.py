"""The page: assembles the tabs and connects what reaches from one to another.

A tab is a function that returns its parts. Add a new tab here.
Must not know how a picture is made or how HTTP is served: webui.py serves the result of `create_ui` with `ui_page.page_settings`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import gradio as gr

from modules.infotext import parameters as infotext_utils
from modules.infotext.fields import FIELDS_BY_TAB
from modules.jobs.queue import wrap_gradio_call, wrap_gradio_gpu_call
from modules.launch.version import program_version
from modules.ui import choices as ui_choices
from modules.ui import page as ui_page
from modules.ui import requests as ui_requests
from modules.ui import scripts as ui_scripts
from modules.ui import symbols as ui_symbols
from modules.ui.checkpoint_merger import create_checkpoint_merger_tab
from modules.ui.checkpoint_tools import create_checkpoint_tools_tab
from modules.ui.common import OutputPanel, create_output_panel, create_refresh_button
from modules.ui.extensions import create_extensions_tab
from modules.ui.extra_networks_tabs import register_default_pages
from modules.ui.extras import ExtrasTab, build_extras, carry_out, connect_gallery_to_extras, connect_picture_to_extras, create_extras_tab
from modules.ui.generation import GenerateHandler, JobControl
from modules.ui.guard import GuardedBlocks
from modules.ui.history import HistoryTab, connect_history, create_history_tab, create_queue_tab
from modules.ui.img2img import Img2imgTab, create_img2img_tab
from modules.ui.load_save import StartValues
from modules.ui.part_order import arrange_tabs
from modules.ui.paste import TOLD, Paster, connect_dropped_picture, connect_gallery_button, connect_paste_button, connect_text_button
from modules.ui.pnginfo import PngInfoTab, create_pnginfo_tab
from modules.ui.quicksettings import (
    QuickSettings,
    QuickSettingsHandlers,
    checkpoint_dropdown,
    clip_skip_is_shown,
    create_quicksettings,
    distilled_is_shown,
    family_defaults,
    fit_variant,
    is_other_variant,
    low_bits_are_shown,
    modules_dropdown,
    native_size,
    preset_defaults,
    selected_facts,
    start_preset,
)
from modules.ui.saving import PictureSaver, connect_saving
from modules.ui.sections import SIDE_STEP_PX, Defaults, shown_or_hidden
from modules.ui.settings import connect_quick_settings, create_quick_settings_row, create_settings_tab
from modules.ui.shown_text import plaintext_to_html
from modules.ui.styles import connect_styles
from modules.ui.tokens import TokenCounter, connect_token_counters
from modules.ui.txt2img import Txt2imgTab, create_txt2img_tab

if TYPE_CHECKING:
    from modules.application import Application

__all__ = [
    "OutputPanel",
    "create_output_panel",
    "create_refresh_button",
    "create_ui",
    "gr_show",
    "plaintext_to_html",
    "versions_html",
    "wrap_gradio_call",
    "wrap_gradio_gpu_call",
]


def __getattr__(name: str) -> Any:
    """The tool button symbols that extensions import from here."""
    if name.endswith("_symbol") and hasattr(ui_symbols, name):
        return getattr(ui_symbols, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


log = logging.getLogger(__name__)

GenerationTab = Txt2imgTab | Img2imgTab
CACHE_CLEANING_S = (3600, 86400)
"""How often to check uploaded and copied pictures, and the age in seconds at which they are deleted."""
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}


def create_ui(app: Application) -> gr.Blocks:
    """The whole page for `app`. Only builds components; loads no model."""
    choices, setting_choices = ui_choices.generation_choices(app), ui_choices.setting_choices(app)
    styles = ui_choices.style_names(app)
    infotext_utils.reset()
    register_default_pages(app)
    gr.set_static_paths([str(app.config.outputs_dir)])  # served in place, not copied first
    blocks = GuardedBlocks(analytics_enabled=False, title=ui_page.TITLE, fill_width=True, delete_cache=CACHE_CLEANING_S)
    with ui_scripts.page_build(), blocks as demo:
        quicksettings = create_quicksettings(app)
        settings_json = gr.Textbox(value=app.options.dumpjson(), visible="hidden", elem_id="settings_json", label="settings")
        more_settings = create_quick_settings_row(app, setting_choices)
        with gr.Tabs(elem_id="tabs") as main_tabs:
            with gr.Tab("Txt2img", id="txt2img", elem_id="tab_txt2img") as txt2img_item, ui_scripts.tab_scripts(app, "txt2img") as scripts:
                txt2img = create_txt2img_tab(app, choices, start_defaults(app, "txt2img"), styles, scripts)
            with gr.Tab("Img2img", id="img2img", elem_id="tab_img2img") as img2img_item, ui_scripts.tab_scripts(app, "img2img") as scripts:
                img2img = create_img2img_tab(app, choices, start_defaults(app, "img2img"), styles, scripts)
            with gr.Tab("Extras", id="extras", elem_id="tab_extras") as extras_item:
                extras = create_extras_tab(app, ui_scripts.postprocessing_runner())
            with gr.Tab("PNG Info", id="pnginfo", elem_id="tab_pnginfo"):
                pnginfo = create_pnginfo_tab()
            with gr.Tab("Checkpoint Merger", id="modelmerger", elem_id="tab_modelmerger") as merger_item:
                create_checkpoint_merger_tab(app, merger_item)
            with gr.Tab("Checkpoint tools", id="checkpoint_tools", elem_id="tab_checkpoint_tools") as tools_item:
                create_checkpoint_tools_tab(app, tools_item)
            start_values = StartValues(app.config.ui_config_file)
            for name, tab in (("txt2img", txt2img_item), ("img2img", img2img_item), ("extras", extras_item)):
                start_values.add_tab(name, tab)
            with gr.Tab("History", id="history", elem_id="tab_history"):
                history = create_history_tab()
            with gr.Tab("Queue", id="queue", elem_id="tab_queue"):
                create_queue_tab()
            ui_scripts.create_extension_tabs()
            with gr.Tab("Settings", id="settings", elem_id="tab_settings") as settings_item:
                create_settings_tab(app, setting_choices, settings_json, settings_item, start_values=start_values)
            with gr.Tab("Extensions", id="extensions", elem_id="tab_extensions") as extensions_item:
                create_extensions_tab(app, extensions_item)
        arrange_tabs(main_tabs, order=app.options.ui_tab_order, hidden=app.options.hidden_tabs)
        gr.HTML(footer_html(), elem_id="footer")
        gr.HTML(ui_page.notification_html(app.config), elem_id="audio_notification", visible="hidden")
        _connect_generation(app, txt2img, _handler(app, "txt2img", txt2img, ui_requests.build_txt2img))
        _connect_generation(app, img2img, _handler(app, "img2img", img2img, ui_requests.build_img2img))
        _connect_upscale(txt2img, _handler(app, "txt2img", txt2img, ui_requests.build_upscale))
        _connect_extras(app, extras)
        _connect_sending(app, txt2img, img2img, extras, pnginfo, history)
        _connect_quicksettings(app, quicksettings, txt2img, img2img)
        connect_quick_settings(app, more_settings, settings_json)
        _connect_loading(demo, app, quicksettings, settings_json, (txt2img, img2img))
        _register_paste_fields(txt2img, img2img)
    return demo


def start_defaults(app: Application, tab: str) -> Defaults:
    """Start values of a tab: the preset's, with the size that the selected checkpoint declares."""
    options = app.options
    preset = start_preset(app)
    facts = selected_facts(app)
    defaults = fit_variant(preset_defaults(options, preset, tab), facts) or Defaults(
        sampler=options.sd_t2i_sampler, scheduler=options.sd_t2i_scheduler
    )
    defaults = dataclasses.replace(defaults, shows_distilled=distilled_is_shown(preset, facts))
    return ui_choices.existing(defaults, native_size(app))


def gr_show(visible: bool = True) -> dict[str, Any]:
    """An update that shows or hides a control; for extensions."""
    return gr.update(visible=visible)


def versions_html() -> str:
    """The versions in the footer; for extensions."""
    return footer_html()


def footer_html() -> str:
    """Versions, for bug reports."""
    facts = (f"version: {program_version()}", f"python: {platform.python_version()}", f"gradio: {gr.__version__}")
    return f"<h1 class='only-read-aloud'>{ui_page.TITLE}</h1><div class='versions'>{'<span class=sep>•</span>'.join(facts)}</div>"


def _handler(app: Application, name: str, tab: GenerationTab, build: Callable[[Application, Mapping[str, Any]], Any]) -> GenerateHandler:
    return GenerateHandler(app, name, tuple(tab.inputs), lambda values: build(app, values), ui_requests.carry_out)


def _connect_upscale(tab: Txt2imgTab, handler: GenerateHandler) -> None:
    """The button under the gallery that repeats the selected picture with hires fix."""
    output = tab.output
    index = gr.Number(value=0, visible="hidden", elem_id="txt2img_upscale_index")
    event = output.buttons["upscale"].click(
        handler.upscale,
        js="submit_txt2img_upscale",
        inputs=[tab.task_id, index, output.gallery, output.generation_info, *tab.inputs.values()],
        outputs=[output.gallery, output.generation_info, output.infotext, output.html_log],
        show_progress="hidden",
        concurrency_limit=None,
        api_visibility="private",
    )
    event.then(fn=None, js="() => { taskAnswered('txt2img'); }", show_progress="hidden")


def _connect_generation(app: Application, tab: GenerationTab, handler: GenerateHandler) -> None:
    name = handler.tab
    output = tab.output
    outputs = [output.gallery, output.generation_info, output.infotext, output.html_log]
    event = tab.toprow.submit.click(
        handler.generate,
        js="submit" if name == "txt2img" else f"submit_{name}",
        inputs=[tab.task_id, *tab.inputs.values()],
        outputs=outputs,
        show_progress="hidden",
        concurrency_limit=None,
        api_visibility="private",
    )
    event.then(fn=None, js=f"() => {{ taskAnswered('{name}'); }}", show_progress="hidden")
    restored = tab.toprow.restore_progress.click(
        handler.restore,
        js=f"() => restoreProgress('{name}')",
        inputs=[tab.task_id],
        outputs=outputs,
        show_progress="hidden",
        concurrency_limit=None,
        api_visibility="private",
    )
    restored.then(fn=None, js=f"() => {{ taskAnswered('{name}'); }}", show_progress="hidden")
    queued = [tab.task_id, *tab.inputs.values()]
    tab.toprow.enqueue.click(  # "multiple": a click while the one before is being answered is another job
        handler.enqueue, js="enqueueTask", inputs=queued, outputs=[output.html_log], trigger_mode="multiple", **QUIET
    )
    control = JobControl(app)
    tab.toprow.interrupt.click(control.interrupt, js=f"() => interruptPressed('{name}')", inputs=[tab.task_id], **QUIET)
    own_task = {"js": f"() => taskOf('{name}')", "inputs": [tab.task_id], **QUIET}
    tab.toprow.interrupting.click(control.interrupt_now, **own_task)
    tab.toprow.skip.click(control.skip, **own_task)
    tab.toprow.clear_prompt.click(fn=None, js="() => ''", outputs=[tab.toprow.prompt], show_progress="hidden")
    connect_token_counters(TokenCounter(app), tab.toprow, tab.sampler.steps)
    connect_styles(app, tab.toprow)
    connect_saving(PictureSaver(app, name), output)


def _connect_extras(app: Application, tab: ExtrasTab) -> None:
    handler = GenerateHandler(app, "extras", tuple(tab.inputs), lambda values: build_extras(app, tab.runner, values), carry_out)
    output = tab.output
    event = tab.buttons["submit"].click(
        handler.generate,
        js="submit_extras",
        inputs=[tab.task_id, *tab.inputs.values()],
        outputs=[output.gallery, output.generation_info, output.infotext, output.html_log],
        show_progress="hidden",
        concurrency_limit=None,
        api_visibility="private",
    )
    event.then(fn=None, js="() => { taskAnswered('extras'); }", show_progress="hidden")
    control = JobControl(app)
    tab.buttons["interrupt"].click(control.interrupt, js="() => interruptPressed('extras')", inputs=[tab.task_id], **QUIET)
    tab.buttons["interrupting"].click(control.interrupt_now, **QUIET)
    tab.buttons["skip"].click(control.skip, **QUIET)
    connect_saving(PictureSaver(app, "extras"), output)


def _connect_sending(app: Application, txt2img: Txt2imgTab, img2img: Img2imgTab, extras: ExtrasTab, pnginfo: PngInfoTab, history: HistoryTab) -> None:
    to_txt2img, to_img2img = Paster(app, txt2img.paste_target), Paster(app, img2img.paste_target)
    connect_paste_button(to_txt2img, txt2img.toprow.paste, txt2img.toprow.prompt)
    connect_paste_button(to_img2img, img2img.toprow.paste, img2img.toprow.prompt)
    connect_dropped_picture(to_txt2img, txt2img.toprow.prompt_image)
    connect_dropped_picture(to_img2img, img2img.toprow.prompt_image)
    pictures = img2img.pictures
    for output in (txt2img.output, img2img.output, extras.output):
        if "extras" in output.buttons:
            connect_gallery_to_extras(app, output.buttons["extras"], extras, output.gallery)
        connect_gallery_button(
            output.buttons["img2img"], to_img2img, pictures.init_image, output.gallery, output.generation_info, "switch_to_img2img"
        )
        connect_gallery_button(
            output.buttons["inpaint"], to_img2img, pictures.inpaint_editor, output.gallery, output.generation_info, "switch_to_inpaint"
        )
    takers: dict[str, Any] = {"img2img": pictures.init_image, "inpaint": pictures.inpaint_editor, "extras": extras.image}
    connect_history(app, history, to_txt2img, to_img2img, takers)
    connect_picture_to_extras(pnginfo.to_extras, extras, pnginfo.image)
    connect_text_button(pnginfo.to_txt2img, to_txt2img, pnginfo.text, "switch_to_txt2img")
    connect_text_button(pnginfo.to_img2img, to_img2img, pnginfo.text, "switch_to_img2img", image=pictures.init_image, source=pnginfo.image)
    connect_text_button(pnginfo.to_inpaint, to_img2img, pnginfo.text, "switch_to_inpaint", image=pictures.inpaint_editor, source=pnginfo.image)


def _size_controls(*tabs: GenerationTab) -> list[gr.Slider]:
    return [slider for tab in tabs for slider in (_size_of(tab).width, _size_of(tab).height)]


def _size_of(tab: GenerationTab) -> Any:
    return tab.size if isinstance(tab, Txt2imgTab) else tab.resize.size


def _size_updates(app: Application) -> list[Any]:
    """Width and height of both tabs: the steps that the checkpoint's family takes, and its size when it declares one."""
    size, facts = native_size(app), selected_facts(app)
    step = SIDE_STEP_PX if facts is None else facts.multiple_px
    return [gr.update(step=step) if side is None else gr.update(step=step, value=side) for side in (size or (None, None)) * 2]


def _distilled_controls(txt2img: Txt2imgTab, img2img: Img2imgTab) -> list[gr.Slider]:
    return [txt2img.cfg.distilled, txt2img.hires.distilled_cfg, img2img.cfg.distilled]


def _preset_controls(txt2img: Txt2imgTab, img2img: Img2imgTab) -> list[Any]:
    """What a preset sets, but for sizes and distilled scales."""
    return [txt2img.cfg.scale, txt2img.sampler.sampler, txt2img.sampler.scheduler, txt2img.hires.cfg,
            img2img.cfg.scale, img2img.sampler.sampler, img2img.sampler.scheduler, txt2img.sampler.steps, img2img.sampler.steps]  # fmt: skip


def _controls_of(txt2img: Txt2imgTab, img2img: Img2imgTab) -> list[Any]:
    return [*_size_controls(txt2img, img2img), *_distilled_controls(txt2img, img2img), *_preset_controls(txt2img, img2img)]


def _control_updates(app: Application, txt2img: Defaults | None, img2img: Defaults | None) -> list[Any]:
    """What the tabs' controls show after the checkpoint or the preset was chosen, for `_controls_of`. No defaults: values stay."""
    facts, preset = selected_facts(app), app.options.forge_preset
    step = SIDE_STEP_PX if facts is None else facts.multiple_px
    visible = shown_or_hidden(distilled_is_shown(preset, facts))
    if txt2img is None or img2img is None:
        return [*_size_updates(app), *[gr.update(visible=visible)] * 3, *[gr.skip()] * 9]
    first, second = (ui_choices.existing(defaults, native_size(app)) for defaults in (txt2img, img2img))
    sides = (first.width_px, first.height_px, second.width_px, second.height_px)
    scales = (first.distilled_cfg_scale, first.hires_distilled_cfg_scale, second.distilled_cfg_scale)
    others = (first.cfg_scale, first.sampler, first.scheduler, first.hires_cfg_scale, second.cfg_scale, second.sampler, second.scheduler)
    return [
        *[gr.update(value=side, step=step) for side in sides],
        *[gr.update(value=scale, visible=visible) for scale in scales],
        *[gr.update(value=value) for value in others],
        *[gr.skip() if steps is None else gr.update(value=steps) for steps in (first.steps, second.steps)],
    ]


def _preset_updates(app: Application, preset: str, before: str) -> list[Any]:
    """After `preset` took the place of `before`."""
    facts = selected_facts(app)
    return _control_updates(app, *(fit_variant(preset_defaults(app.options, preset, tab, before), facts) for tab in ("txt2img", "img2img")))


def _checkpoint_updates(app: Application) -> list[Any]:
    """After a checkpoint was chosen whose family the preset stays with; a family that no preset is for brings its own values."""
    facts = selected_facts(app)
    own = None if facts is None or facts.defaults.preset or app.options.forge_preset == "all" else family_defaults(facts)
    return _control_updates(app, own, own)


def _connect_quicksettings(app: Application, quicksettings: QuickSettings, txt2img: Txt2imgTab, img2img: Img2imgTab) -> None:
    handlers = QuickSettingsHandlers(app)
    sizes, controls = _size_controls(txt2img, img2img), _controls_of(txt2img, img2img)
    lists = [quicksettings.checkpoint, quicksettings.modules, quicksettings.notice, quicksettings.watch]

    def choose_checkpoint(title: str | None) -> list[Any]:
        """Updates for checkpoint, preset, modules, low bits, clip skip and the tabs' controls."""
        before, preset_before, facts_before = app.options.sd_model_checkpoint, handlers.preset, selected_facts(app)
        update = handlers.choose_checkpoint(title)
        if app.options.sd_model_checkpoint == before:
            return [update, *[gr.skip()] * 4, *_control_updates(app, None, None)]
        preset = handlers.follow_checkpoint(before)
        if preset is None and is_other_variant(preset_before, facts_before, selected_facts(app)):
            return [update, *[gr.skip()] * 4, *_preset_updates(app, preset_before, preset_before)]
        if preset is None:
            return [update, *[gr.skip()] * 4, *_checkpoint_updates(app)]
        shown = [gr.update(visible=low_bits_are_shown(preset)), gr.update(visible=clip_skip_is_shown(preset))]
        return [update, gr.update(value=preset), gr.update(**modules_dropdown(app)), *shown, *_preset_updates(app, preset, preset_before)]

    def choose_card(name: str) -> list[Any]:
        info = app.checkpoints.find(name)
        chosen = choose_checkpoint(None if info is None else info.title)
        return [gr.update(**checkpoint_dropdown(app)), *chosen[1:]]

    def choose_preset(preset: str) -> list[Any]:
        before = handlers.preset
        return [*handlers.choose_preset(preset), *_preset_updates(app, preset, before)]

    def look_again() -> list[Any]:
        return [*handlers.look_again(), *_size_updates(app)]

    row = [quicksettings.checkpoint, quicksettings.preset, quicksettings.modules, quicksettings.low_bits, quicksettings.clip_skip]
    chosen = quicksettings.checkpoint.input(choose_checkpoint, inputs=[quicksettings.checkpoint], outputs=[*row, *controls], **TOLD)
    card = gr.Textbox(visible="hidden", elem_id="selected_checkpoint_name", label="Checkpoint")
    change = gr.Button(visible="hidden", elem_id="change_checkpoint")
    by_card = change.click(choose_card, js="() => [desiredCheckpointName]", inputs=[card], outputs=[*row, *controls], **QUIET)
    quicksettings.modules.input(handlers.choose_modules, inputs=[quicksettings.modules], outputs=[quicksettings.modules], **TOLD)
    quicksettings.low_bits.input(handlers.choose_low_bits, inputs=[quicksettings.low_bits], **QUIET)
    quicksettings.clip_skip.change(handlers.choose_clip_skip, inputs=[quicksettings.clip_skip], trigger_mode="always_last", **QUIET)
    quicksettings.refresh.click(look_again, outputs=[*lists, *sizes], **QUIET)
    quicksettings.watch.tick(look_again, outputs=[*lists, *sizes], **QUIET)
    by_preset = quicksettings.preset.input(
        choose_preset,
        inputs=[quicksettings.preset],
        outputs=[quicksettings.checkpoint, quicksettings.modules, quicksettings.low_bits, quicksettings.clip_skip, *controls],
        **QUIET,
    )
    for event in (chosen, by_card, by_preset):  # another family counts tokens with another vocabulary
        event.then(fn=None, js="recountTokens", show_progress="hidden")


def _connect_loading(
    demo: gr.Blocks, app: Application, quicksettings: QuickSettings, settings_json: gr.Textbox, tabs: tuple[Txt2imgTab, Img2imgTab]
) -> None:
    """What a page that is loaded (again) shows is what counts now, not what counted when the server started.

    The answer may come late. A number that somebody typed or pasted before it came stays."""
    handlers = QuickSettingsHandlers(app)
    numbers = [quicksettings.clip_skip, *_size_controls(*tabs)]
    first_values = gr.Textbox(visible="hidden", elem_id="first_values", label="First values")

    def load(*_: Any) -> list[Any]:
        app.checkpoints.refresh()
        sides, facts = native_size(app) or (None, None), selected_facts(app)
        first = json.dumps([app.options.CLIP_stop_at_last_layers, *sides, *sides])
        step = gr.skip() if facts is None or facts.multiple_px == SIDE_STEP_PX else gr.update(step=facts.multiple_px)
        shown = gr.update(visible=shown_or_hidden(distilled_is_shown(app.options.forge_preset, facts)))
        return [*handlers.current(), app.options.dumpjson(), first, *[step] * 4, *[shown] * 3]

    row = [quicksettings.checkpoint, quicksettings.modules, quicksettings.notice, quicksettings.watch]
    shaped = [*_size_controls(*tabs), *_distilled_controls(*tabs)]
    loaded = demo.load(load, js="rememberShownValues", inputs=numbers, outputs=[*row, settings_json, first_values, *shaped], **QUIET)
    loaded.then(fn=None, js="firstValuesOfUntouched", inputs=[first_values, *numbers], outputs=numbers, show_progress="hidden")
    loaded.then(fn=None, js="recountTokens", show_progress="hidden")


def _register_paste_fields(txt2img: Txt2imgTab, img2img: Img2imgTab) -> None:
    """Tell extensions' buttons which controls take which parameters, and connect the registered ones."""
    images: Mapping[str, Any] = {"txt2img": None, "img2img": img2img.pictures.init_image, "inpaint": img2img.pictures.inpaint_editor}
    for name, image in images.items():
        tab: GenerationTab = txt2img if name == "txt2img" else img2img
        controls = tab.paste_target.controls
        fields = [
            infotext_utils.PasteField(controls[field.field], field.key, api=field.field)
            for field in FIELDS_BY_TAB["txt2img" if name == "txt2img" else "img2img"]
            if field.field in controls
        ]
        fields += tab.paste_target.script_fields
        infotext_utils.add_paste_fields(name, image, fields, tab.override_settings)
    infotext_utils.connect_paste_params_buttons()
