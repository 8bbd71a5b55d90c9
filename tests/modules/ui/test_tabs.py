from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch
from safetensors.torch import save_file

from modules.application import Application
from modules.infotext import parameters
from modules.ui import tabs as ui
from tests.support.applications import installed_application


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with installed_application(Path(tmp_path_factory.mktemp("data"))) as app:
        folder = app.config.ckpt_dirs[0]
        folder.mkdir(parents=True)
        save_file({"x": torch.zeros(2)}, folder / "small.safetensors", metadata={"modelspec.resolution": "64x72"})
        app.checkpoints.refresh()
        yield app


@pytest.fixture(scope="module")
def page(app: Application) -> gr.Blocks:
    return ui.create_ui(app)


def by_id(page: gr.Blocks, elem_id: str) -> Any:
    found = [block for block in page.blocks.values() if block.elem_id == elem_id]
    assert len(found) == 1, (elem_id, found)
    return found[0]


SHARED_IDS = """
{t}_toprow {t}_prompt_container {t}_prompt_row {t}_neg_prompt_row {t}_prompt {t}_neg_prompt {t}_actions_column {t}_generate_box {t}_generate
{t}_interrupt {t}_skip {t}_interrupting {t}_tools {t}_clear_prompt {t}_style_apply {t}_restore_progress {t}_token_counter {t}_token_button
{t}_styles_edit_button {t}_styles_dialog {t}_styles_edit_select
{t}_edit_style_prompt {t}_edit_style_neg_prompt {t}_edit_style_save {t}_edit_style_delete {t}_edit_style_close {t}_style_copy {t}_style_apply_dialog
{t}_negative_token_counter {t}_negative_token_button {t}_styles_row {t}_styles {t}_sampling {t}_scheduler {t}_steps sampler_selection_{t}
{t}_width {t}_height {t}_res_switch_btn {t}_column_size {t}_dimensions_row {t}_batch_count {t}_batch_size {t}_column_batch {t}_cfg_scale
{t}_distilled_cfg_scale {t}_seed {t}_random_seed {t}_reuse_seed {t}_subseed_show {t}_subseed {t}_random_subseed {t}_reuse_subseed
{t}_subseed_strength {t}_seed_resize_from_w {t}_seed_resize_from_h {t}_seed_row {t}_seed_extras {t}_override_settings
{t}_override_settings_row {t}_results {t}_gallery {t}_gallery_container image_buttons_{t} {t}_open_folder save_{t} save_zip_{t}
{t}_enable {t}_enable-checkbox {t}_checkpoint {t}_checkpoint_refresh {t}_switch_at {t}_accordions
{t}_send_to_extras {t}_send_to_img2img {t}_send_to_inpaint download_files_{t} html_info_{t} html_log_{t}
generation_info_{t} {t}_generation_info_button tab_{t}
"""
TXT2IMG_IDS = """
txt2img_hr txt2img_hr-checkbox txtimg_hr_finalres txt2img_hr_upscaler txt2img_hires_steps txt2img_denoising_strength txt2img_hr_scale
txt2img_hr_resize_x txt2img_hr_resize_y txt2img_hr_distilled_cfg txt2img_hr_cfg hr_checkpoint hr_vae_te hr_sampler hr_scheduler hires_prompt
hires_neg_prompt txt2img_hires_fix_row1 txt2img_hires_fix_row2 txt2img_hires_fix_row3 txt2img_hires_fix_row3b txt2img_hires_fix_row4
txt2img_hires_fix_row_cfg txt2img_upscale
"""
IMG2IMG_IDS = """
mode_img2img img2img_img2img_tab img2img_inpaint_tab img2img_inpaint_upload_tab img2img_image img2maskimg img_inpaint_base img_inpaint_mask
resize_mode img2img_tabs_resize img2img_tab_resize_to img2img_tab_resize_by img2img_scale img2img_scale_resolution_preview
img2img_detect_image_size_btn img2img_denoising_strength inpaint_controls img2img_mask_blur img2img_mask_mode img2img_inpainting_fill
img2img_inpaint_full_res img2img_inpaint_full_res_padding img2img_img2img_sketch_tab img2img_inpaint_sketch_tab img2img_batch_tab img2img_sketch
inpaint_sketch img2img_copy_to_img2img img2img_copy_to_sketch img2img_copy_to_inpaint img2img_copy_to_inpaint_sketch img2img_batch_source
img2img_batch_upload_tab img2img_batch_upload img2img_batch_from_dir_tab img2img_batch_input_dir img2img_batch_output_dir
img2img_batch_inpaint_mask_dir img2img_batch_use_png_info img2img_batch_png_info_dir img2img_batch_png_info_props
"""
EXTRAS_IDS = """
tab_extras extras_single_tab extras_batch_process_tab extras_batch_directory_tab extras_image extras_image_batch extras_batch_input_dir
extras_batch_output_dir extras_show_extras_results extras_upscale extras_upscale-checkbox extras_upscaler_1 extras_upscaler_2
extras_upscaler_2_visibility extras_resize_mode extras_upscaling_resize extras_upscale_max_side_length extras_upscaling_resize_w
extras_upscaling_resize_h extras_upscaling_crop extras_upscaling_res_switch_btn extras_gallery html_info_x_extras html_info_extras html_log_extras
extras_generate extras_generate_box extras_interrupt extras_skip extras_interrupting extras_send_to_img2img extras_send_to_inpaint save_extras
"""
OTHER_IDS = """
extras_tab tabs quicksettings footer forge_ui_preset forge_refresh_checkpoint pnginfo_image pnginfo_generation_info txt2img_tab img2img_tab
inpaint_tab tab_pnginfo tab_settings settings settings_submit settings_result settings_json settings_search settings_restart_gradio
"""


def test_ids_that_extensions_and_scripts_know_are_there_once(page: gr.Blocks) -> None:
    for tab in ("txt2img", "img2img"):
        for elem_id in SHARED_IDS.format(t=tab).split():
            by_id(page, elem_id)
    for elem_id in f"{TXT2IMG_IDS} {IMG2IMG_IDS} {EXTRAS_IDS} {OTHER_IDS}".split():
        by_id(page, elem_id)
    assert len([block for block in page.blocks.values() if block.elem_id == "paste"]) == 2


def test_tabs_are_those_users_know_in_their_order(page: gr.Blocks) -> None:
    assert [item.label for item in by_id(page, "tabs").children] == [
        *("Txt2img", "Img2img", "Extras", "PNG Info", "Checkpoint Merger", "Checkpoint tools", "History", "Queue"),
        *("Settings", "Extensions"),
    ]


def click_of(page: gr.Blocks, elem_id: str) -> Any:
    button = by_id(page, elem_id)
    return next(fn for fn in page.fns.values() if (button._id, "click") in fn.targets)


def test_generate_sends_the_task_id_first_then_the_order_that_extensions_rely_on(page: gr.Blocks) -> None:
    names = [block.elem_id for block in click_of(page, "txt2img_generate").inputs]
    assert names[:13] == [
        "txt2img_task_id",
        "txt2img_prompt",
        "txt2img_neg_prompt",
        "txt2img_styles",
        "txt2img_batch_count",
        "txt2img_batch_size",
        "txt2img_cfg_scale",
        "txt2img_distilled_cfg_scale",
        "txt2img_height",
        "txt2img_width",
        "txt2img_hr-checkbox",
        "txt2img_denoising_strength",
        "txt2img_hr_scale",
    ]
    assert names[25] == "txt2img_override_settings"


def test_many_may_wait_in_line_at_once_and_interrupt_does_not_wait_behind_them(page: gr.Blocks) -> None:
    assert click_of(page, "txt2img_generate").concurrency_limit is None
    assert click_of(page, "txt2img_interrupt").queue is False
    assert click_of(page, "img2img_skip").queue is False


def test_no_event_of_the_page_is_an_api_of_its_own(page: gr.Blocks) -> None:
    assert {fn.api_visibility for fn in page.fns.values() if fn.fn is not None} == {"private"}


def test_size_is_the_one_that_the_checkpoint_declares(page: gr.Blocks) -> None:
    for tab in ("txt2img", "img2img"):
        assert (by_id(page, f"{tab}_width").value, by_id(page, f"{tab}_height").value) == (64, 72)


def test_sizes_of_both_tabs_follow_a_chosen_checkpoint(app: Application, page: gr.Blocks) -> None:
    dropdown = by_id(page, "setting_sd_model_checkpoint")
    function = next(fn for fn in page.fns.values() if (dropdown._id, "input") in fn.targets)
    updates = dict(zip([block.elem_id for block in function.outputs], function.fn("small.safetensors")))
    sides = ["txt2img_width", "txt2img_height", "img2img_width", "img2img_height"]
    assert [(updates[side]["value"], updates[side]["step"]) for side in sides] == [(64, 8), (72, 8), (64, 8), (72, 8)]


def test_preset_sets_its_values_but_not_the_size_that_the_checkpoint_declares(page: gr.Blocks) -> None:
    radio = by_id(page, "forge_ui_preset")
    function = next(fn for fn in page.fns.values() if (radio._id, "input") in fn.targets)
    updates = dict(zip([block.elem_id for block in function.outputs], function.fn("xl")))
    assert updates["txt2img_cfg_scale"]["value"] == 5
    assert updates["txt2img_sampling"]["value"] == "DPM++ 2M SDE"
    assert updates["img2img_scheduler"]["value"] == "Karras"
    assert updates["txt2img_width"]["value"] == 64
    assert updates["txt2img_hr_cfg"]["value"] == 5
    left_alone = dict(zip([block.elem_id for block in function.outputs], function.fn("all")))
    assert {str(left_alone[name]) for name in ("txt2img_cfg_scale", "txt2img_sampling", "img2img_scheduler", "txt2img_hr_cfg")} == {str(gr.skip())}


def test_flux_preset_shows_its_sliders_with_its_values(page: gr.Blocks) -> None:
    radio = by_id(page, "forge_ui_preset")
    function = next(fn for fn in page.fns.values() if (radio._id, "input") in fn.targets)
    sliders = ("txt2img_distilled_cfg_scale", "txt2img_hr_distilled_cfg", "img2img_distilled_cfg_scale")
    flux, sd = (dict(zip([block.elem_id for block in function.outputs], function.fn(preset))) for preset in ("flux", "sd"))
    assert [(flux[name]["value"], flux[name]["visible"]) for name in sliders] == [(3.5, True)] * 3
    assert [sd[name]["visible"] for name in sliders] == ["hidden"] * 3
    assert (flux["txt2img_cfg_scale"]["value"], flux["txt2img_sampling"]["value"], flux["txt2img_scheduler"]["value"]) == (1.0, "Euler", "Simple")


def test_a_newer_family_s_preset_sets_the_steps_of_both_tabs(page: gr.Blocks) -> None:
    radio = by_id(page, "forge_ui_preset")
    function = next(fn for fn in page.fns.values() if (radio._id, "input") in fn.targets)
    zit, sd, xl = (dict(zip([block.elem_id for block in function.outputs], function.fn(preset))) for preset in ("zit", "sd", "xl"))
    assert [zit[f"{tab}_steps"]["value"] for tab in ("txt2img", "img2img")] == [9, 9] and zit["txt2img_cfg_scale"]["value"] == 1
    assert [sd[f"{tab}_steps"]["value"] for tab in ("txt2img", "img2img")] == [20, 20]
    assert str(xl["txt2img_steps"]) == str(gr.skip())


def test_extensions_find_the_controls_to_paste_into(page: gr.Blocks) -> None:
    fields = parameters.paste_fields
    assert set(fields) == {"txt2img", "img2img", "inpaint"}
    assert fields["img2img"]["init_img"].elem_id == "img2img_image"
    assert {"Prompt", "Steps", "Seed", "Size-1"} <= {field.label for field in fields["txt2img"]["fields"]}


def test_footer_says_the_versions(page: gr.Blocks) -> None:
    assert gr.__version__ in by_id(page, "footer").value
