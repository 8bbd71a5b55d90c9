"""The settings of the page, extra networks, presets and ControlNet: second half of the table in settings/table.py."""

from __future__ import annotations

from typing import Any

from modules.settings.kinds import OptionTable, choice, option, output_folder, slider, source_path, text, text_list
from modules.settings.presets import PRESETS, Preset


def extra_networks_options() -> OptionTable:
    return {
        "extra_networks_show_hidden_directories": option(True, "Show hidden folders"),
        "extra_networks_dir_button_function": option(False, "A folder button finds that folder only"),
        "extra_networks_hidden_models": choice("When searched", "Show models of hidden folders", "Always", "When searched", "Never"),
        "extra_networks_default_multiplier": slider(1.0, "Multiplier of an added network", 0.0, 2.0, 0.01),
        "extra_networks_card_width": slider(0, "Card width, pixels", 0, 4000, 1, info="0 is the default"),
        "extra_networks_card_height": slider(0, "Card height, pixels", 0, 4000, 1, info="0 is the default"),
        "extra_networks_card_text_scale": slider(1.0, "Scale of the text on cards", 0.0, 2.0, 0.01),
        "extra_networks_card_show_desc": option(True, "Show descriptions on cards"),
        "extra_networks_card_description_is_html": option(False, "Descriptions are HTML"),
        "extra_networks_card_order_field": choice("Path", "Order of cards", "Path", "Name", "Date Created", "Date Modified"),
        "extra_networks_card_order": choice("Ascending", "Direction of that order", "Ascending", "Descending"),
        "extra_networks_tree_view_style": choice("Dirs", "Folder view", "Dirs", "Tree"),
        "extra_networks_tree_view_default_enabled": option(True, "Show the folder view"),
        "extra_networks_tree_view_default_width": slider(180, "Width of the folder view, pixels", 0, 4000, 1),
        "extra_networks_add_text_separator": text(" ", "Text in front of an added network"),
        "ui_extra_networks_tab_reorder": text("", "Order of extra network tabs"),
        "textual_inversion_print_at_load": option(False, "List embeddings in the console when they are loaded"),
        "textual_inversion_add_hashes_to_infotext": option(True, "Add hashes of embeddings to the parameters"),
        "sd_hypernetwork": option("None", "Hypernetwork to add to prompts", "Dropdown"),
        "lora_bundled_ti_to_infotext": option(True, "Add embeddings bundled with a LoRA to the parameters"),
        "lora_not_found_warning_console": option(False, "Warn in the console when a LoRA is not found"),
        "lora_not_found_gradio_warning": option(False, "Warn on the page when a LoRA is not found"),
    }


def _prompt_editing() -> OptionTable:
    return {
        "keyedit_precision_attention": slider(0.1, "Ctrl+up/down: step of (attention:1.1)", 0.01, 0.2, 0.001),
        "keyedit_precision_extra": slider(0.05, "Ctrl+up/down: step of <extra networks:0.9>", 0.01, 0.2, 0.001),
        "keyedit_delimiters": text(".,\\/!?%^*;:{}=`~() ", "Ctrl+up/down: characters between words"),
        "keyedit_delimiters_whitespace": option(
            ["Tab", "Carriage Return", "Line Feed"],
            "Ctrl+up/down: white space between words",
            "CheckboxGroup",
            choices=["Tab", "Carriage Return", "Line Feed"],
        ),
        "keyedit_move": option(True, "Alt+left/right moves parts of the prompt"),
        "disable_token_counters": option(False, "No token counters"),
        "include_styles_into_token_counters": option(True, "Count the tokens of chosen styles"),
    }


def _gallery() -> OptionTable:
    return {
        "return_grid": option(True, "Show the grid in the gallery"),
        "do_not_show_images": option(False, "Show no images in the gallery"),
        "js_modal_lightbox": option(True, "Full page viewer"),
        "js_modal_lightbox_initially_zoomed": option(True, "Full page viewer: zoomed at first"),
        "js_modal_lightbox_gamepad": option(False, "Full page viewer: gamepad"),
        "js_modal_lightbox_gamepad_repeat": option(250, "Full page viewer: repeat time of the gamepad, ms", "Number"),
        "sd_webui_modal_lightbox_icon_opacity": slider(1.0, "Full page viewer: opacity of icons", 0, 1, 0.01),
        "sd_webui_modal_lightbox_toolbar_opacity": slider(0.9, "Full page viewer: opacity of the toolbar", 0, 1, 0.01),
        "gallery_height": text("", "Height of the gallery, as CSS"),
        "open_dir_button_choice": choice(
            "Subdirectory", "Folder that the folder button opens", "Output Root", "Subdirectory", "Subdirectory (even temp dir)"
        ),
        "hires_button_gallery_insert": option(False, "Upscale button: put the result next to the image"),
    }


def _alternatives() -> OptionTable:
    return {
        "compact_prompt_box": option(False, "Compact prompt box"),
        "samplers_in_dropdown": option(True, "Samplers in a dropdown"),
        "dimensions_and_batch_together": option(True, "Size and batch in one row"),
        "sd_checkpoint_dropdown_use_short": option(False, "Checkpoint dropdown: names without folders"),
        "hires_fix_show_sampler": option(False, "Hires fix: show checkpoint and sampler"),
        "hires_fix_show_prompts": option(False, "Hires fix: show prompts"),
        "txt2img_settings_accordion": option(False, "txt2img settings in an accordion"),
        "img2img_settings_accordion": option(False, "img2img settings in an accordion"),
        "interrupt_after_current": option(True, "Interrupt: let the current image finish first"),
        "forge_canvas_plain": option(False, "Canvas with a plain background"),
        "forge_canvas_toolbar_always": option(False, "Canvas toolbar always visible"),
    }


def _interface() -> OptionTable:
    return {
        "localization": option("None", "Language", "Dropdown"),
        "quick_setting_list": text_list([], "Settings to show above the tabs"),
        "ui_tab_order": text_list([], "Order of tabs"),
        "hidden_tabs": text_list([], "Tabs to hide"),
        "tabs_without_quick_settings_bar": text_list(["Spaces"], "Tabs without the settings row"),
        "ui_reorder_list": text_list([], "Order of the parts of txt2img and img2img"),
        "gradio_theme": option("Default", "Theme", "Dropdown"),
        "gradio_themes_cache": option(True, "Keep themes on disk"),
        "show_progress_in_title": option(True, "Show progress in the window title"),
        "history_for_everyone": option(
            False, "Show the history to everyone who can open the page", api=False, info="matters only where others can and there is no password"
        ),
        "keep_values_in_browser": option(True, "Keep prompts and numbers of this browser tab when the page is loaded again"),
        "send_seed": option(True, "Send the seed along with an image"),
        "send_size": option(True, "Send the size along with an image"),
        "enable_reloading_ui_scripts": option(False, "Reload scripts of the page with it"),
    }


def _infotext() -> OptionTable:
    return {
        "enable_pnginfo": option(True, "Write the parameters into image files"),
        "stealth_pnginfo_option": choice("Alpha", "Hide the parameters in the pixels", "Alpha", "RGB", "None"),
        "save_txt": option(False, "Write the parameters into a text file next to the image"),
        "add_model_name_to_info": option(True, "Include the model's name"),
        "add_model_hash_to_info": option(True, "Include the model's hash"),
        "add_vae_name_to_info": option(True, "Include the VAE's name"),
        "add_vae_hash_to_info": option(True, "Include the VAE's hash"),
        "add_user_name_to_info": option(False, "Include the user's name"),
        "add_version_to_infotext": option(True, "Include the program's version"),
        "disable_weights_auto_swap": option(True, "Pasting parameters does not change the checkpoint"),
        "infotext_skip_pasting": text_list([], "Fields not to paste"),
        "infotext_styles": choice("Apply if any", "Styles found in pasted prompts", "Ignore", "Apply", "Discard", "Apply if any"),
    }


def _live_previews() -> OptionTable:
    return {
        "show_progressbar": option(True, "Show the progress bar"),
        "live_previews_enable": option(True, "Show live previews"),
        "live_previews_image_format": choice("png", "File format of previews", "png", "jpeg", "webp"),
        "show_progress_grid": option(True, "Show all images of a batch as a grid"),
        "show_progress_every_n_steps": slider(10, "Steps between previews", -1, 32, 1, info="-1 shows finished images only"),
        "show_progress_type": choice(
            "Approx NN",
            "How previews are made",
            "Full",
            "Approx NN",
            "Approx cheap",
            "TAESD",
            info="Full decodes with the VAE; the three others are one and the same here: colors fitted to the VAE",
        ),
        "live_preview_allow_lowvram_full": option(False, "Allow Full previews with --lowvram"),
        "live_preview_content": choice("Prompt", "What previews show", "Combined", "Prompt", "Negative prompt"),
        "live_preview_refresh_period": option(1000, "Time between previews, ms", "Number"),
        "live_preview_fast_interrupt": option(False, "Return the preview when interrupted"),
        "js_live_preview_in_modal_lightbox": option(False, "Show previews in the full page viewer"),
        "prevent_screen_sleep_during_generation": option(True, "Keep the screen on during a job"),
    }


def _settings_in_ui() -> OptionTable:
    return {
        "extra_options_txt2img": text_list([], "Settings to show in txt2img"),
        "extra_options_img2img": text_list([], "Settings to show in img2img"),
        "extra_options_cols": slider(1, "Columns of those settings", 1, 20, 1),
        "extra_options_accordion": option(False, "Those settings in an accordion"),
    }


def interface_sections() -> list[tuple[tuple[Any, ...], OptionTable]]:
    return [
        (("ui_prompt_editing", "Prompt editing", "ui"), _prompt_editing()),
        (("ui_gallery", "Gallery", "ui"), _gallery()),
        (("ui_alternatives", "UI alternatives", "ui"), _alternatives()),
        (("ui", "User interface", "ui"), _interface()),
        (("infotext", "Infotext", "ui"), _infotext()),
        (("ui", "Live previews", "ui"), _live_previews()),
        (("settings_in_ui", "Settings in UI", "ui"), _settings_in_ui()),
    ]


def _preset(preset: Preset) -> OptionTable:
    prefix = preset.name
    table: OptionTable = {
        f"{prefix}_t2i_width": slider(preset.width_px, "txt2img width", 64, 2048, 8),
        f"{prefix}_t2i_height": slider(preset.height_px, "txt2img height", 64, 2048, 8),
        f"{prefix}_t2i_cfg": slider(preset.cfg, "txt2img CFG", 1, 30, 0.1),
        f"{prefix}_t2i_hr_cfg": slider(preset.cfg, "txt2img hires CFG", 1, 30, 0.1),
        f"{prefix}_i2i_width": slider(preset.side_px, "img2img width", 64, 2048, 8),
        f"{prefix}_i2i_height": slider(preset.side_px, "img2img height", 64, 2048, 8),
        f"{prefix}_i2i_cfg": slider(preset.cfg, "img2img CFG", 1, 30, 0.1),
    }
    for tab, title in (("t2i", "txt2img"), ("i2i", "img2img")):
        table[f"{prefix}_{tab}_sampler"] = option(preset.sampler, f"{title} sampler", "Dropdown")
        table[f"{prefix}_{tab}_scheduler"] = option(preset.scheduler, f"{title} schedule", "Dropdown")
        if preset.steps is not None:
            table[f"{prefix}_{tab}_step"] = slider(preset.steps, f"{title} steps", 1, 150, 1)
    if preset.has_gpu_weights:
        table[f"{prefix}_GPU_MB"] = option(None, "GPU Weights (MB)", "Number")
    if preset.distilled is not None:
        for key in ("t2i_d_cfg", "t2i_hr_d_cfg", "i2i_d_cfg"):
            table[f"{prefix}_{key}"] = slider(preset.distilled, "Distilled CFG", 0, 30, 0.1)
    return table


def preset_sections() -> list[tuple[tuple[Any, ...], OptionTable]]:
    """The values set by the presets. `*_GPU_MB` without a value means the whole GPU minus 1024 MB."""
    return [((f"ui_{preset.name}", f"UI defaults '{preset.name}'", "ui"), _preset(preset)) for preset in PRESETS]


def controlnet_options() -> OptionTable:
    return {
        "control_net_detectedmap_dir": output_folder("detected_maps", "Folder of detected maps"),
        "control_net_models_path": source_path("", "One more folder of ControlNet models"),
        "control_net_modules_path": source_path("", "Folder of preprocessor models"),
        "control_net_unit_count": slider(3, "Units", 1, 10, 1),
        "control_net_model_cache_size": slider(5, "Models kept in memory", 1, 10, 1),
        "control_net_no_detectmap": option(False, "Do not add detected maps to the results"),
        "control_net_detectmap_autosaving": option(False, "Save detected maps"),
        "control_net_allow_script_control": option(False, "Let other scripts control this extension"),
        "control_net_sync_field_args": option(True, "Read ControlNet parameters from pasted text"),
        "controlnet_show_batch_images_in_ui": option(False, "Show the images of a batch on the page"),
        "controlnet_increment_seed_during_batch": option(False, "Raise the seed after each image of a batch"),
        "controlnet_disable_openpose_edit": option(False, "No openpose editor"),
        "controlnet_disable_photopea_edit": option(False, "No Photopea editor"),
        "controlnet_photopea_warning": option(True, "Ask before Photopea is opened"),
        "controlnet_input_thumbnail": option(True, "Show the input image on the unit's header"),
    }
