"""The latent modifier's panel. It replaces the guidance formula."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import gradio as gr
import torch
from latent_changes import LatentModifier, latent_scale_of
from torch import Tensor

from modules import scripts
from modules.infotext_utils import PasteField

TITLE = "LatentModifier Integrated"
NAMES = tuple(field.name for field in fields(LatentModifier))
KEYS = ("latent_modifier_enabled", *(f"latent_modifier_{name}" for name in NAMES))
SLIDERS = {
    "sharpness_multiplier": (-100.0, 100.0, 0.1),
    "tonemap_multiplier": (0.0, 100.0, 0.01),
    "tonemap_percentile": (0.0, 100.0, 0.005),
    "contrast_multiplier": (-100.0, 100.0, 0.1),
    "combat_cfg_drift": (-10.0, 10.0, 0.01),
    "rescale_cfg_phi": (-10.0, 10.0, 0.01),
    "extra_noise_multiplier": (0.0, 100.0, 0.1),
    "extra_noise_lowpass": (0, 1000, 1),
    "divisive_norm_size": (1, 255, 1),
    "divisive_norm_multiplier": (0.0, 1.0, 0.01),
    "spectral_mod_percentile": (0.0, 50.0, 0.01),
    "spectral_mod_multiplier": (-15.0, 15.0, 0.01),
}
"""Field -> (minimum, maximum, step)."""
RADIOS = {
    "sharpness_method": ("anisotropic", "joint-anisotropic", "gaussian", "cas"),
    "tonemap_method": ("reinhard", "reinhard_perchannel", "arctan", "quantile", "gated", "cfg-mimic", "spatial-norm"),
    "combat_method": ("subtract", "subtract_channels", "subtract_median", "sharpen"),
    "extra_noise_type": ("gaussian", "uniform", "perlin", "pink", "green", "pyramid"),
    "extra_noise_method": ("add", "add_scaled", "speckle", "cads", "cads_rescaled", "cads_speckle", "cads_speckle_rescaled"),
    "spectral_mod_mode": ("hard_clamp", "soft_clamp"),
    "affect_uncond": ("None", "Sharpness"),
    "dyn_cfg_augmentation": ("None", "dyncfg-halfcosine", "dyncfg-halfcosine-mimic"),
}


class LatentModifierForForge(scripts.Script):
    """Controls in the order of LatentModifier's fields."""

    sorting_priority = 15

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        start = LatentModifier()
        with gr.Accordion(open=False, label=TITLE, elem_id=self.elem_id("accordion")):
            controls: list[Any] = [gr.Checkbox(label="Enabled", value=False, elem_id=self.elem_id("enabled"))]
            for name in NAMES:
                label, value = name.replace("_", " ").title(), getattr(start, name)
                if name in SLIDERS:
                    low, high, step = SLIDERS[name]
                    controls.append(gr.Slider(label=label, minimum=low, maximum=high, step=step, value=value, elem_id=self.elem_id(name)))
                else:
                    controls.append(gr.Radio(label=label, choices=list(RADIOS[name]), value=value, elem_id=self.elem_id(name)))
        self.infotext_fields = [PasteField(controls[0], lambda params: params.get(KEYS[0], False), api=KEYS[0])]
        self.infotext_fields += [PasteField(control, key, api=key) for control, key in zip(controls[1:], KEYS[1:])]
        self.paste_field_names = list(KEYS)
        return controls

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        values = scripts.checked_values(self, args)
        if not values[0]:
            return
        modifier, latent_scale = LatentModifier(**dict(zip(NAMES, values[1:]))), latent_scale_of(p.sd_model)
        generators = [torch.Generator().manual_seed(int(seed)) for seed in p.seeds]

        def guide(args: dict[str, Any]) -> Tensor:
            x_BCHW: Tensor = args["input"]
            if args["cond_scale"] == 1.0:
                return args["cond"]
            timestep = args["model"].predictor.timestep(args["sigma"])
            return x_BCHW - modifier.guide(
                x_BCHW, args["cond_denoised"], args["uncond_denoised"], args["sigma"], timestep, args["cond_scale"], generators, latent_scale
            )

        unet = p.sd_model.forge_objects.unet.clone()
        unet.set_model_sampler_cfg_function(guide)
        p.sd_model.forge_objects.unet = unet
        p.extra_generation_params.update(zip(KEYS, values))
