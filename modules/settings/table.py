"""Every built-in setting: key, default, label, component, infotext name. The page and the API read this table; the store is
modules/settings/options.py.

Components are gradio class names, so that importing this file does not need gradio.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.settings.kinds import OptionTable, choice, color, log_file, option, output_folder, slider, source_path, text, text_list
from modules.settings.low_bits import AUTOMATIC, LOW_BITS
from modules.settings.options import options_section
from modules.settings.page_table import controlnet_options, extra_networks_options, interface_sections, preset_sections
from modules.settings.presets import ALL as EVERY_PRESET
from modules.settings.presets import NAMES as PRESET_NAMES

CATEGORIES = (
    ("saving", "Saving images"),
    ("sd", "Stable Diffusion"),
    ("ui", "User Interface"),
    ("system", "System"),
    ("postprocessing", "Postprocessing"),
    ("training", "Training"),
)

OUTPUT_FOLDER_KEYS = (
    "outdir_samples",
    "outdir_txt2img_samples",
    "outdir_img2img_samples",
    "outdir_extras_samples",
    "outdir_grids",
    "outdir_txt2img_grids",
    "outdir_img2img_grids",
    "outdir_save",
    "outdir_init_images",
)

# protected by --hide-ui-dir-config
restricted_opts = frozenset({"samples_filename_pattern", "directories_filename_pattern", "temp_dir", *OUTPUT_FOLDER_KEYS})


def _saving_images() -> OptionTable:
    return {
        "samples_save": option(True, "Save every generated image"),
        "samples_format": choice("png", "File format of images", "png", "jpg", "jpeg", "webp", "avif", component="Dropdown"),
        "samples_filename_pattern": text("", "File name pattern of images"),
        "save_images_add_number": option(True, "Put a running number in front of the file name"),
        "save_images_replace_action": choice("Replace", "When a file of that name exists", "Replace", "Add number suffix"),
        "grid_save": option(True, "Save every generated grid"),
        "grid_format": choice("png", "File format of grids", "png", "jpg", "jpeg", "webp", "avif", component="Dropdown"),
        "grid_extended_filename": option(False, "Put seed and prompt into the file name of grids"),
        "grid_only_if_multiple": option(True, "Do not save grids of one picture"),
        "grid_prevent_empty_spots": option(False, "Choose rows and columns so that a grid has no empty places"),
        "grid_zip_filename_pattern": text("", "File name pattern of archives"),
        "n_rows": slider(-1, "Rows of a grid", -1, 16, 1, strict=True, info="-1 chooses, 0 takes the batch size"),
        "font": source_path("", "Font file for grids with text"),
        "grid_text_active_color": color("#000000", "Text colour in grids"),
        "grid_text_inactive_color": color("#999999", "Colour of inactive text in grids"),
        "grid_background_color": color("#ffffff", "Background colour of grids"),
        "save_images_before_face_restoration": option(False, "Also save the image as it is before face restoration"),
        "save_images_before_highres_fix": option(False, "Also save the image as it is before hires fix"),
        "save_images_before_color_correction": option(False, "Also save the image as it is before colour correction"),
        "save_mask": option(False, "Inpainting: also save the mask"),
        "save_mask_composite": option(False, "Inpainting: also save the masked part alone"),
        "jpeg_quality": slider(80, "Quality of jpeg and avif files", 1, 100, 1, strict=True),
        "webp_lossless": option(False, "Save webp files without loss"),
        "export_for_4chan": option(True, "Also save a jpg copy of large images"),
        "img_downscale_threshold": option(4.0, "A file is large from this many MB", "Number"),
        "target_side_length": option(4000, "A file is large from this many pixels a side", "Number"),
        "img_max_size_mp": option(200, "Largest grid to save, megapixels", "Number"),
        "use_original_name_batch": option(True, "Extras batch: keep the name of the source file"),
        "use_upscaler_name_as_suffix": option(False, "Extras: put the upscaler's name behind the file name"),
        "save_selected_only": option(True, "Save button: save the selected image only"),
        "save_write_log_csv": option(True, "Save button: write log.csv"),
        "save_init_img": option(False, "img2img: also save the initial image"),
        "temp_dir": output_folder("", "Folder of temporary images; empty for the default"),
        "clean_temp_dir_at_start": option(False, "Empty that folder at start"),
        "save_incomplete_images": option(False, "Save images that were interrupted"),
        "notification_audio": option(True, "Play a sound when a job ends"),
        "notification_volume": slider(100, "Volume of that sound", 0, 100, 1),
    }


def _saving_paths(outputs: str, saved: str) -> OptionTable:
    return {
        "outdir_samples": output_folder("", "Folder for images; empty uses the three folders below"),
        "outdir_txt2img_samples": output_folder(f"{outputs}/txt2img-images", "Folder for txt2img images"),
        "outdir_img2img_samples": output_folder(f"{outputs}/img2img-images", "Folder for img2img images"),
        "outdir_extras_samples": output_folder(f"{outputs}/extras-images", "Folder for images of the Extras tab"),
        "outdir_grids": output_folder("", "Folder for grids; empty uses the two folders below"),
        "outdir_txt2img_grids": output_folder(f"{outputs}/txt2img-grids", "Folder for txt2img grids"),
        "outdir_img2img_grids": output_folder(f"{outputs}/img2img-grids", "Folder for img2img grids"),
        "outdir_save": output_folder(saved, "Folder of the Save button"),
        "outdir_init_images": output_folder(f"{outputs}/init-images", "Folder for initial images of img2img"),
    }


def _saving_to_dirs() -> OptionTable:
    return {
        "save_to_dirs": option(True, "Save images in subfolders"),
        "grid_save_to_dirs": option(True, "Save grids in subfolders"),
        "use_save_to_dirs_for_ui": option(False, "Save button: save in subfolders"),
        "directories_filename_pattern": text("[date]", "Name pattern of subfolders"),
        "directories_max_prompt_words": slider(8, "Words of the prompt in [prompt_words]", 1, 20, 1, strict=True),
    }


def _upscaling() -> OptionTable:
    return {
        "ESRGAN_tile": slider(192, "Tile size of ESRGAN upscalers", 0, 512, 16, info="0 works on the whole image"),
        "ESRGAN_tile_overlap": slider(8, "Overlap of those tiles", 0, 48, 1),
        "realesrgan_enabled_models": text_list(["R-ESRGAN 4x+", "R-ESRGAN 4x+ Anime6B"], "Real-ESRGAN models to offer"),
        "dat_enabled_models": text_list(["DAT x2", "DAT x3", "DAT x4"], "DAT models to offer"),
        "DAT_tile": slider(192, "Tile size of DAT upscalers", 0, 512, 16),
        "DAT_tile_overlap": slider(8, "Overlap of those tiles", 0, 48, 1),
        "upscaler_for_img2img": option(None, "Upscaler of img2img", "Dropdown"),
        "set_scale_by_when_changing_upscaler": option(False, "Take the scale from the name of the chosen upscaler"),
    }


def _face_restoration() -> OptionTable:
    return {
        "face_restoration": option(False, "Restore faces", infotext="Face restoration"),
        "face_restoration_model": option("CodeFormer", "Face restoration model", "Radio"),
        "code_former_weight": slider(0.5, "CodeFormer weight", 0, 1, 0.01),
        "face_restoration_unload": option(False, "Unload the face restoration model after use"),
    }


def _system(console_prompts: bool) -> OptionTable:
    return {
        "auto_launch_browser": choice("Local", "Open the browser at start", "Disable", "Local", "Remote"),
        "enable_console_prompts": option(console_prompts, "Show prompts in the console"),
        "show_warnings": option(False, "Show warnings in the console"),
        "show_gradio_deprecation_warnings": option(True, "Show gradio's deprecation warnings in the console"),
        "memmon_poll_rate": slider(8, "Memory readings a second during a job", 0, 40, 1),
        "samples_log_stdout": option(False, "Show generation data in the console"),
        "multiple_tqdm": option(True, "Second console progress bar for the whole job"),
        "enable_upscale_progressbar": option(True, "Console progress bar of tiled upscaling"),
        "print_hypernet_extra": option(False, "Show hypernetwork details in the console"),
        "list_hidden_files": option(True, "Load models from hidden folders too"),
        "disable_mmap_load_safetensors": option(False, "Do not memory-map safetensors files"),
        "hide_ldm_prints": option(True, "Keep libraries from writing to the console"),
        "dump_stacks_on_signal": option(False, "Show all stacks before ending on Ctrl+C"),
    }


def _profiler() -> OptionTable:
    return {
        "profiling_enable": option(False, "Profile generation"),
        "profiling_activities": option(["CPU"], "Activities", "CheckboxGroup", choices=["CPU", "CUDA"]),
        "profiling_record_shapes": option(True, "Record shapes"),
        "profiling_profile_memory": option(True, "Profile memory"),
        "profiling_with_stack": option(True, "Include the Python stack"),
        "profiling_filename": log_file("trace.json", "File name of the profile, in logs/profiler"),
    }


def _api() -> OptionTable:
    return {
        "api_enable_requests": option(True, "Let the API fetch images from http(s) addresses", api=False),
        "api_forbid_local_requests": option(True, "Do not let it fetch from local addresses", api=False),
        "api_useragent": text("", "User agent of those requests", api=False),
    }


def _training() -> OptionTable:
    return {
        "unload_models_when_training": option(False, "Unload VAE and CLIP during training"),
        "pin_memory": option(False, "Pin memory of the data loader"),
        "save_optimizer_state": option(False, "Save the optimizer's state"),
        "save_training_settings_to_txt": option(True, "Save training settings as text"),
        "dataset_filename_word_regex": text("", "Pattern of words in file names"),
        "dataset_filename_join_string": text(" ", "Text that joins them"),
        "training_image_repeats_per_epoch": option(1, "Repeats of an image in an epoch", "Number"),
        "training_write_csv_every": option(500, "Write the loss every so many steps", "Number"),
        "training_xattention_optimizations": option(False, "Use attention optimizations in training"),
        "training_enable_tensorboard": option(False, "Write tensorboard logs"),
        "training_tensorboard_save_images": option(False, "Put images into them"),
        "training_tensorboard_flush_every": option(120, "Seconds between tensorboard writes", "Number"),
    }


def _stable_diffusion() -> OptionTable:
    return {
        "sd_model_checkpoint": option(None, "Stable Diffusion checkpoint", "Dropdown", infotext="Model hash"),
        "sd_checkpoints_limit": slider(1, "Checkpoints loaded at the same time", 1, 10, 1),
        "sd_checkpoints_keep_in_cpu": option(True, "Keep one model on the device only"),
        "sd_checkpoint_cache": slider(0, "Checkpoints kept in RAM", 0, 10, 1),
        "sd_unet": option("Automatic", "SD Unet", "Dropdown"),
        "enable_quantization": option(False, "Round timesteps to the model's own table"),
        "emphasis": choice("Original", "Emphasis mode", "None", "Ignore", "Original", "No norm", infotext="Emphasis"),
        "enable_batch_seeds": option(True, "Same pictures in a batch as alone"),
        "comma_padding_backtrack": slider(20, "How far back to a comma a long prompt is broken, tokens", 0, 74, 1, strict=True),
        "sdxl_clip_l_skip": option(False, "Apply clip skip to SDXL's CLIP-L too"),
        "CLIP_stop_at_last_layers": slider(1, "Clip skip", 1, 12, 1, strict=True, infotext="Clip skip"),
        "upcast_attn": option(False, "Compute attention in 32 bits"),
        "randn_source": choice("GPU", "Where initial noise is made", "GPU", "CPU", "NV", infotext="RNG"),
        "tiling": option(False, "Tiling", infotext="Tiling"),
        "hires_fix_refiner_pass": choice(
            "second pass", "Hires fix: pass of the refiner", "first pass", "second pass", "both passes", infotext="Hires refiner"
        ),
        "enable_prompt_comments": option(True, "Text from # to the end of a line is a comment"),
    }


def _sdxl() -> OptionTable:
    return {
        "sdxl_crop_top": option(0, "Crop top coordinate", "Number"),
        "sdxl_crop_left": option(0, "Crop left coordinate", "Number"),
        "sdxl_refiner_low_aesthetic_score": option(2.5, "Low aesthetic score of the refiner", "Number"),
        "sdxl_refiner_high_aesthetic_score": option(6.0, "High aesthetic score of the refiner", "Number"),
    }


def _vae() -> OptionTable:
    return {
        "sd_vae_checkpoint_cache": slider(0, "VAE files kept in RAM", 0, 10, 1),
        "sd_vae": option("Automatic", "SD VAE", "Dropdown", infotext="VAE"),
        "sd_vae_overrides_per_model_preferences": option(True, "The chosen VAE overrides a model's own preference"),
        "auto_vae_precision_bfloat16": option(False, "Repeat a failed VAE pass in bfloat16"),
        "auto_vae_precision": option(True, "Repeat a failed VAE pass in 32 bits"),
        "sd_vae_encode_method": choice("Full", "VAE for encoding", "Full", "TAESD", infotext="VAE Encoder"),
        "sd_vae_decode_method": choice("Full", "VAE for decoding", "Full", "TAESD", infotext="VAE Decoder"),
    }


def _img2img() -> OptionTable:
    return {
        "inpainting_mask_weight": slider(
            1.0, "Weight of the mask for inpainting models", 0, 1, 0.01, strict=True, infotext="Conditional mask weight"
        ),
        "initial_noise_multiplier": slider(1.0, "Noise multiplier of img2img", 0, 1.5, 0.001, infotext="Noise multiplier"),
        "img2img_extra_noise": slider(0.0, "Extra noise of img2img and hires fix", 0, 1, 0.01, infotext="Extra noise"),
        "img2img_color_correction": option(False, "Match the colours of the initial image"),
        "img2img_fix_steps": option(False, "Do as many steps as asked, whatever the denoising strength"),
        "img2img_background_color": color("#ffffff", "Colour behind transparent parts of the initial image"),
        "img2img_sketch_default_brush_color": color("#ffffff", "Brush colour of sketch"),
        "img2img_inpaint_mask_brush_color": color("#ffffff", "Brush colour of the inpaint mask"),
        "img2img_inpaint_sketch_default_brush_color": color("#ffffff", "Brush colour of inpaint sketch"),
        "img2img_inpaint_mask_high_contrast": option(True, "Show the inpaint mask with high contrast"),
        "img2img_inpaint_mask_scribble_alpha": slider(75, "Opacity of the inpaint mask", 0, 100, 1),
        "return_mask": option(False, "Inpainting: show the mask with the results"),
        "return_mask_composite": option(False, "Inpainting: show the masked part with the results"),
        "img2img_batch_show_results_limit": slider(32, "Results of a folder batch to show", -1, 1000, 1),
        "overlay_inpaint": option(True, "Lay the original over what is not masked"),
        "img2img_autosize": option(False, "Take the size of a loaded image"),
        "img2img_batch_use_original_name": option(False, "Folder batch: keep the name of the source file"),
    }


def _optimizations() -> OptionTable:
    return {
        "cross_attention_optimization": option("Automatic", "Attention optimization", "Dropdown"),
        "s_min_uncond": slider(0.0, "Skip the negative prompt below this sigma", 0, 15, 0.01, infotext="NGMS"),
        "s_min_uncond_all": option(False, "At every step, not every other", infotext="NGMS all steps"),
        "token_merging_ratio": slider(0.0, "Token merging ratio", 0, 0.9, 0.1, strict=True, infotext="Token merging ratio"),
        "token_merging_ratio_img2img": slider(0.0, "Token merging ratio of img2img", 0, 0.9, 0.1, strict=True),
        "token_merging_ratio_hr": slider(0.0, "Token merging ratio of the hires pass", 0, 0.9, 0.1, strict=True, infotext="Token merging ratio hr"),
        "pad_cond_uncond": option(False, "Pad prompt and negative prompt to the same length", infotext="Pad conds"),
        "pad_cond_uncond_v0": option(False, "Pad them in the old way", infotext="Pad conds v0"),
        "persistent_cond_cache": option(True, "Keep encoded prompts for the next job"),
        "batch_cond_uncond": option(True, "Prompt and negative prompt in one batch"),
        "fp8_storage": choice("Disable", "Keep weights in 8 bits", "Disable", "Enable for SDXL", "Enable", infotext="FP8 weight"),
        "cache_fp16_weight": option(False, "Keep 16-bit weights for LoRA", infotext="Cache FP16 weight for LoRA"),
    }


def _compatibility() -> OptionTable:
    return {
        "forge_try_reproduce": choice(
            "None",
            "Try to reproduce other programs' pictures",
            "None",
            "Diffusers",
            "ComfyUI",
            "WebUI 1.5",
            "InvokeAI",
            "EasyDiffusion",
            "DrawThings",
        ),
        "auto_backcompat": option(True, "Follow old versions named in pasted parameters"),
        "use_old_emphasis_implementation": option(False, "Old emphasis"),
        "use_old_karras_scheduler_sigmas": option(False, "Old Karras sigmas (0.1 to 10)"),
        "no_dpmpp_sde_batch_determinism": option(False, "DPM++ SDE: pictures may depend on the batch size"),
        "use_old_hires_fix_width_height": option(False, "Hires fix: width and height name the final size", infotext="Hires fix old size"),
        "hires_fix_use_firstpass_conds": option(False, "Hires fix: use the encoded prompts of the first pass"),
        "use_old_scheduling": option(False, "Old prompt editing timeline", infotext="Old prompt editing timelines"),
        "use_downcasted_alpha_bar": option(False, "Noise table in 16 bits", infotext="Downcast alphas_cumprod"),
        "refiner_switch_by_sample_steps": option(False, "Switch to the refiner by steps, not timesteps", infotext="Refiner switch by sampling steps"),
        "lora_functional": option(False, "LoRA: old method"),
    }


def _interrogate() -> OptionTable:
    return {
        "interrogate_keep_models_in_memory": option(False, "Keep models in memory"),
        "interrogate_return_ranks": option(False, "Show how well a tag fits"),
        "interrogate_clip_num_beams": slider(1, "BLIP: beams", 1, 16, 1),
        "interrogate_clip_min_length": slider(24, "BLIP: shortest description", 1, 128, 1),
        "interrogate_clip_max_length": slider(48, "BLIP: longest description", 1, 256, 1),
        "interrogate_clip_dict_limit": option(1500, "CLIP: lines read of a word file", "Number"),
        "interrogate_clip_skip_categories": text_list([], "CLIP: categories to skip"),
        "interrogate_deepbooru_score_threshold": slider(0.5, "deepbooru: lowest score", 0, 1, 0.01),
        "deepbooru_sort_alpha": option(True, "deepbooru: sort tags by name"),
        "deepbooru_use_spaces": option(True, "deepbooru: spaces in tags"),
        "deepbooru_escape": option(True, "deepbooru: escape brackets"),
        "deepbooru_filter_tags": text("", "deepbooru: tags to leave out"),
    }


def _sampler_parameters() -> OptionTable:
    return {
        "hide_samplers": option([], "Samplers to hide", "CheckboxGroup"),
        "eta_ddim": slider(0.0, "Eta of DDIM", 0, 1, 0.01, infotext="Eta DDIM"),
        "eta_ancestral": slider(1.0, "Eta of ancestral samplers", 0, 1, 0.01, infotext="Eta"),
        "ddim_discretize": choice("uniform", "Timesteps of DDIM in img2img", "uniform", "quad"),
        "s_churn": slider(0.0, "sigma churn", 0, 100, 0.01, infotext="Sigma churn"),
        "s_tmin": slider(0.0, "sigma tmin", 0, 10, 0.01, infotext="Sigma tmin"),
        "s_tmax": slider(0.0, "sigma tmax", 0, 999, 0.01, infotext="Sigma tmax", info="0 is no limit"),
        "s_noise": slider(1.0, "sigma noise", 0, 1.1, 0.001, infotext="Sigma noise"),
        "sigma_min": option(0.0, "sigma min", "Number", infotext="Schedule min sigma", info="0 takes the model's"),
        "sigma_max": option(0.0, "sigma max", "Number", infotext="Schedule max sigma", info="0 takes the model's"),
        "rho": option(0.0, "rho", "Number", infotext="Schedule rho", info="0 takes the schedule's"),
        "eta_noise_seed_delta": option(0, "Eta noise seed delta", "Number", infotext="ENSD"),
        "always_discard_next_to_last_sigma": option(False, "Always leave out the sigma before the last", infotext="Discard penultimate sigma"),
        "sgm_noise_multiplier": option(False, "SGM noise multiplier", infotext="SGM noise multiplier"),
        "uni_pc_variant": choice("bh1", "UniPC variant", "bh1", "bh2", "vary_coeff", infotext="UniPC variant"),
        "uni_pc_skip_type": choice("time_uniform", "UniPC timesteps", "time_uniform", "time_quadratic", "logSNR", infotext="UniPC skip type"),
        "uni_pc_order": slider(3, "UniPC order", 1, 50, 1, strict=True, infotext="UniPC order"),
        "uni_pc_lower_order_final": option(True, "UniPC: lower order at the end", infotext="UniPC lower order final"),
        "sd_noise_schedule": choice("Default", "Noise table", "Default", "Zero Terminal SNR", infotext="Noise Schedule"),
        "skip_early_cond": slider(
            0.0, "Ignore the negative prompt in this share of the first steps", 0, 1, 0.01, strict=True, infotext="Skip Early CFG"
        ),
        "skip_late_cond": slider(
            0.0, "Ignore the negative prompt in this share of the last steps", 0, 1, 0.01, strict=True, infotext="Skip Late CFG"
        ),
        "flow_shift": slider(
            0.0, "Flow models: shift", 0, 20, 0.01, strict=True, infotext="Shift", info="0 takes the model's: 3.16 for Flux.1-dev at any size"
        ),
        "flow_shift_by_size": option(
            False,
            "Flow models: shift by the size of the picture",
            infotext="Shift by size",
            info="as the models' authors do; Forge does not",
        ),
        "flow_schedules_of_forge": option(
            False,
            "Flux.1: noise schedules as Forge computes them",
            infotext="Forge flow schedules",
            info="Normal, SGM Uniform and Beta without the model's shift, to make Forge's pictures again",
        ),
        "beta_dist_alpha": slider(0.6, "Beta schedule: alpha", 0.01, 5, 0.01, strict=True, infotext="Beta schedule alpha"),
        "beta_dist_beta": slider(0.6, "Beta schedule: beta", 0.01, 5, 0.01, strict=True, infotext="Beta schedule beta"),
    }


def _postprocessing() -> OptionTable:
    return {
        "postprocessing_enable_in_main_ui": text_list([], "Postprocessing to offer in txt2img and img2img"),
        "postprocessing_disable_in_extras": text_list([], "Postprocessing to hide in Extras"),
        "postprocessing_operation_order": text_list([], "Order of postprocessing"),
        "upscaling_max_images_in_cache": slider(5, "Upscaled images to remember", 0, 10, 1),
        "postprocessing_existing_caption_action": choice("Ignore", "When a caption exists", "Ignore", "Keep", "Prepend", "Append"),
    }


def _multi_gpu() -> OptionTable:
    info = "auto chooses the plan predicted to be fastest (or the one from --multi-gpu-strategy); only used with --multi-gpu"
    return {
        "multi_gpu_strategy": choice("auto", "How a picture is divided over GPUs", "auto", "replicas", "tiles", "layers", "single", info=info),
        "multi_gpu_tiles": choice(
            "exact",
            "What tiles of one picture use of each other",
            "exact",
            "displaced",
            info="displaced: values of the step before, so that no GPU waits; faster, but another picture. Jobs of few steps stay exact",
        ),
        "multi_gpu_exact_steps": slider(4, "Displaced tiles: exact steps first", 1, 50, 1, strict=True),
        "cuda_graphs": choice(
            "flag",
            "Record launches of a step and replay them (CUDA graphs)",
            "flag",
            "off",
            "auto",
            "on",
            info="flag: as --cuda-graphs says, which is off by default; auto: where launching takes longer than computing; same pictures",
        ),
        "enable_async_gpu": option(True, "Copy between GPUs while they compute", info="off gives the same picture, slower"),
    }


def _hidden() -> OptionTable:
    return {
        "disabled_extensions": option([], "Disabled extensions"),
        "disable_all_extensions": choice("none", "Disable all extensions", "none", "extra", "all"),
        "restore_config_state_file": option("", "Extension state to restore at start"),
        "sd_checkpoint_hash": option("", "SHA256 of the chosen checkpoint"),
    }


def _forge_hidden() -> OptionTable:
    return {
        "forge_unet_storage_dtype": choice(AUTOMATIC, "Diffusion in Low Bits", *LOW_BITS),
        "forge_inference_memory": option(1024, "MB of a card kept free for computing"),
        "forge_async_loading": choice("Queue", "Swap method", "Queue", "Async"),
        "forge_pin_shared_memory": choice("CPU", "Swap location", "CPU", "Shared"),
        "forge_preset": choice("sd", "UI preset", *PRESET_NAMES, EVERY_PRESET),
        "forge_additional_modules": option([], "VAE and text encoder files"),
        **{f"forge_checkpoint_{preset}": option("", f"Checkpoint when the preset {preset} was left") for preset in PRESET_NAMES},
        **{f"forge_additional_modules_{preset}": option([], f"VAE and text encoder files then ({preset})") for preset in PRESET_NAMES},
    }


def _flat(sections: list[tuple[tuple[Any, ...], OptionTable]]) -> OptionTable:
    table: OptionTable = {}
    for section, options in sections:
        table.update(options_section(section, options))
    return table


def build_option_table(flags: Mapping[str, object], *, outputs_dir: Path | str = "outputs", saved_dir: Path | str = "log/images") -> OptionTable:
    """All built-in settings in the order of the settings page. `flags` are the parsed flags by name; the folders are defaults for saving."""
    outputs, saved = Path(outputs_dir).as_posix(), Path(saved_dir).as_posix()
    return _flat(
        [
            (("saving-images", "Saving images/grids", "saving"), _saving_images()),
            (("saving-paths", "Paths for saving", "saving"), _saving_paths(outputs, saved)),
            (("saving-to-dirs", "Saving to a directory", "saving"), _saving_to_dirs()),
            (("upscaling", "Upscaling", "postprocessing"), _upscaling()),
            (("face-restoration", "Face restoration", "postprocessing"), _face_restoration()),
            (("multi_gpu", "Several GPUs", "system"), _multi_gpu()),
            (("system", "System", "system"), _system(bool(flags.get("enable_console_prompts", False)))),
            (("profiler", "Profiler", "system"), _profiler()),
            (("API", "API", "system"), _api()),
            (("training", "Training", "training"), _training()),
            (("sd", "Stable Diffusion", "sd"), _stable_diffusion()),
            (("sdxl", "Stable Diffusion XL", "sd"), _sdxl()),
            (("sd3", "Stable Diffusion 3", "sd"), {"sd3_enable_t5": option(False, "Use the T5 text encoder", infotext="SD3 T5")}),
            (("vae", "VAE", "sd"), _vae()),
            (("img2img", "img2img", "sd"), _img2img()),
            (("optimizations", "Optimizations", "sd"), _optimizations()),
            (("compatibility", "Compatibility", "sd"), _compatibility()),
            (("interrogate", "Interrogate", "training"), _interrogate()),
            (("extra_networks", "Extra Networks", "sd"), extra_networks_options()),
            *interface_sections(),
            (("sampler-params", "Sampler parameters", "sd"), _sampler_parameters()),
            (("postprocessing", "Postprocessing", "postprocessing"), _postprocessing()),
            ((None, "Hidden options"), _hidden()),
            ((None, "Forge Hidden options"), _forge_hidden()),
            *preset_sections(),
            (("control_net", "ControlNet", "sd"), controlnet_options()),
        ]
    )
