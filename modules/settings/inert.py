"""Settings kept for old files and requests that have no effect here, and what happens instead. Logged once when one is changed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

log = logging.getLogger(__name__)

# Settings that nothing reads yet: what happens until then -> their keys. `tests/contract/test_settings.py` tells when an entry can go.
NOT_READ: Mapping[str, str] = {
    "there is no captioning": """
        interrogate_keep_models_in_memory interrogate_return_ranks interrogate_clip_num_beams interrogate_clip_min_length
        interrogate_clip_max_length interrogate_clip_dict_limit interrogate_clip_skip_categories interrogate_deepbooru_score_threshold
        deepbooru_sort_alpha deepbooru_use_spaces deepbooru_escape deepbooru_filter_tags
    """,
    "there is no training": """
        unload_models_when_training save_optimizer_state save_training_settings_to_txt dataset_filename_word_regex dataset_filename_join_string
        training_image_repeats_per_epoch training_write_csv_every training_xattention_optimizations training_enable_tensorboard
        training_tensorboard_save_images training_tensorboard_flush_every
    """,
    "preprocessor models are read from the folder of --controlnet-preprocessor-models-dir": "control_net_modules_path",
    "detected maps are shown with the pictures and saved with the Save button": "control_net_detectedmap_dir control_net_detectmap_autosaving",
    "other extensions can always change ControlNet's units": "control_net_allow_script_control",
    "ControlNet's units take one picture each": "controlnet_show_batch_images_in_ui controlnet_increment_seed_during_batch",
    "ControlNet's panel has no editors and no thumbnails": """
        controlnet_disable_openpose_edit controlnet_disable_photopea_edit controlnet_photopea_warning controlnet_input_thumbnail
    """,
    "pasted parameters always fill in ControlNet's units": "control_net_sync_field_args",
    "there is no face restoration": "save_images_before_face_restoration code_former_weight face_restoration_unload",
    "the page has one layout": """
        open_dir_button_choice compact_prompt_box samplers_in_dropdown
        dimensions_and_batch_together txt2img_settings_accordion img2img_settings_accordion
    """,
    "presets set sizes, scales, sampler and schedule": "xl_GPU_MB flux_GPU_MB",
    "the console shows one line per job and load; see --loglevel": """
        enable_console_prompts show_warnings show_gradio_deprecation_warnings memmon_poll_rate samples_log_stdout multiple_tqdm
        enable_upscale_progressbar print_hypernet_extra hide_ldm_prints dump_stacks_on_signal textual_inversion_print_at_load
    """,
    "temporary pictures are in the system's temporary folder and are deleted at exit": "temp_dir clean_temp_dir_at_start",
    "zip files are named by date and tab": "grid_zip_filename_pattern",
    "files of Extras are named after their source": "use_upscaler_name_as_suffix",
    "the Save button saves into one folder": "use_save_to_dirs_for_ui",
    "every file in models/RealESRGAN is offered": "realesrgan_enabled_models",
    "every file in models/DAT is offered": "dat_enabled_models",
    "all upscaler files share the tile size of ESRGAN": "DAT_tile",
    "all upscaler files share the tile overlap of ESRGAN": "DAT_tile_overlap",
    "the scale stays unchanged": "set_scale_by_when_changing_upscaler",
    "hidden folders are searched like others": "list_hidden_files",
    "checkpoints are mapped from disk": "disable_mmap_load_safetensors",
    "models share each device as memory allows": "sd_checkpoints_keep_in_cpu",
    "the chosen VAE is always used": "sd_vae_overrides_per_model_preferences",
    "hashes of embeddings are always written": "textual_inversion_add_hashes_to_infotext",
    "themes come with gradio": "gradio_themes_cache",
    "the page is built once, at start": "enable_reloading_ui_scripts",
    "VAE files are written by name, as Module 1": "add_vae_hash_to_info",
    "Full previews are made whenever they are selected": "live_preview_allow_lowvram_full",
    "previews show the picture in progress": "live_preview_content",
    "postprocessing is in the Extras tab only": "postprocessing_enable_in_main_ui",
    "saved states are restored on the Extensions tab": "restore_config_state_file",
    "checkpoints are found by name": "sd_checkpoint_hash",
}

BY_DESIGN: Mapping[str, str] = {
    "upcast_attn": "start with --force-upcast-attention",
    "cross_attention_optimization": "choose attention at startup with --attention-pytorch, --attention-split, --attention-quad or --xformers",
    "fp8_storage": "use the setting forge_unet_storage_dtype or --unet-in-fp8-e4m3fn",
    "cache_fp16_weight": "there is no second copy of weights for LoRA",
    "pad_cond_uncond": "prompts are always padded to equal length",
    "pad_cond_uncond_v0": "prompts are always padded to equal length",
    "batch_cond_uncond": "prompt and negative prompt share a batch whenever memory allows",
    "enable_batch_seeds": "pictures never depend on their batch",
    "no_dpmpp_sde_batch_determinism": "pictures never depend on their batch",
    "sdxl_clip_l_skip": "clip skip applies to both text encoders of SDXL",
    "sd_unet": "the checkpoint's UNet is always used",
    "sd_hypernetwork": "hypernetworks are not available",
    "use_old_emphasis_implementation": "use the setting emphasis",
    "sd_vae_encode_method": "the full VAE encodes pictures",
    "sd_vae_decode_method": "the full VAE decodes pictures",
    "lora_functional": "there is only one method",
    "lora_bundled_ti_to_infotext": "embeddings inside LoRA files are not used",
    "lora_not_found_warning_console": "the console always warns",
    "lora_not_found_gradio_warning": "the warning is shown next to the pictures",
    "sd_vae_checkpoint_cache": "one VAE is loaded at a time",
    "forge_try_reproduce": "use the settings randn_source and sd_noise_schedule, and the schedule type",
    "forge_async_loading": "start with --cuda-stream",
    "forge_pin_shared_memory": "start with --pin-shared-memory",
    "auto_vae_precision_bfloat16": "a failed VAE pass is retried in 32 bits",
    "ddim_discretize": "the chosen schedule type is used",
}

WHAT_IS_TRUE: Mapping[str, str] = {**BY_DESIGN, **{key: truth for truth, keys in NOT_READ.items() for key in keys.split()}}

_said: set[str] = set()


def find_inert(options: Mapping[str, Any], defaults: Mapping[str, Any], keys: Collection[str] | None = None) -> list[str]:
    """A sentence for each setting (of `keys`, if given) that differs from its default but has no effect."""
    return [
        f"{key}: {options[key]!r} has no effect; {truth}."
        for key, truth in WHAT_IS_TRUE.items()
        if (keys is None or key in keys) and options[key] != defaults.get(key)
    ]


def warn_once(sentences: Collection[str]) -> None:
    """Log the sentences that were not logged before."""
    for sentence in sentences:
        if sentence not in _said:
            _said.add(sentence)
            log.warning("%s", sentence)
