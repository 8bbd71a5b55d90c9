"""HyperTile's settings, under A1111's names; there is no panel. Jobs override them by `override_settings` and by pasted parameters."""

from __future__ import annotations

from typing import Any

import gradio as gr
from tiled_attention import HyperTile

from modules import script_callbacks, scripts, shared
from modules.infotext_utils import infotext_to_setting_name_mapping
from modules.shared import OptionInfo
from modules_forge.unet_patching import has_unet

TITLE = "Hypertile"
SECTION = ("hypertile", "Hypertile")
NAMES = {
    "hypertile_enable_unet": "Hypertile U-Net",
    "hypertile_enable_unet_secondpass": "Hypertile U-Net second pass",
    "hypertile_max_depth_unet": "Hypertile U-Net max depth",
    "hypertile_max_tile_unet": "Hypertile U-Net max tile size",
    "hypertile_swap_size_unet": "Hypertile U-Net swap size",
}


class ScriptHypertile(scripts.Script):
    """Tiles self-attention as the settings say."""

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        options = p.options
        wanted = options.hypertile_enable_unet or (p.is_hr_pass and options.hypertile_enable_unet_secondpass)
        if not wanted or not has_unet(p, TITLE):
            return
        unet = p.sd_model.forge_objects.unet.clone()
        tiling = HyperTile(
            seed=int(p.seeds[0]),
            tile_px=int(options.hypertile_max_tile_unet),
            max_depth=int(options.hypertile_max_depth_unet),
            swap_size=int(options.hypertile_swap_size_unet),
        )
        tiling.add_to(unet)
        p.sd_model.forge_objects.unet = unet
        p.extra_generation_params.update({name: getattr(options, key) for key, name in NAMES.items() if getattr(options, key) is not False})


def add_settings() -> None:
    def slider(value: int, label: str, low: int, high: int, step: int) -> OptionInfo:
        return OptionInfo(value, label, gr.Slider, {"minimum": low, "maximum": high, "step": step})

    settings = {
        "hypertile_enable_unet": OptionInfo(False, "Enable Hypertile U-Net"),
        "hypertile_enable_unet_secondpass": OptionInfo(False, "Enable Hypertile U-Net for hires fix second pass"),
        "hypertile_max_depth_unet": slider(3, "Hypertile U-Net max depth", 0, 3, 1),
        "hypertile_max_tile_unet": slider(256, "Hypertile U-Net max tile size", 0, 512, 16),
        "hypertile_swap_size_unet": slider(3, "Hypertile U-Net swap size", 0, 64, 1),
    }
    for key, info in settings.items():
        info.section = SECTION
        shared.opts.add_option(key, info)


def map_names() -> None:
    """Pasted parameters override the settings."""
    for key, name in NAMES.items():
        if (name, key) not in infotext_to_setting_name_mapping:
            infotext_to_setting_name_mapping.append((name, key))


map_names()
script_callbacks.on_ui_settings(add_settings)
