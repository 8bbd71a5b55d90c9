"""Forge's way: the UNet is cloned and gets hooks in process_before_every_sampling. Numbers of its own, and a tensor for each device it meets."""

import gradio as gr
import torch

from modules import scripts
from modules.infotext_utils import PasteField
from modules.ui_components import InputAccordion

UNIT = "skip_shaper"


def window(h, cache):
    key = (h.shape[-2:], h.device)
    if key not in cache:
        rows = torch.hann_window(h.shape[-2], periodic=False, device=h.device)
        columns = torch.hann_window(h.shape[-1], periodic=False, device=h.device)
        cache[key] = (rows[:, None] * columns[None, :])[None, None]
    return cache[key].to(h.dtype)


def patch_unet_with_shaper(unet_patcher, backbone, skip, sharpness):
    channels = unet_patcher.model.diffusion_model.config["model_channels"]
    cache = {}

    def output_block_patch(h, hsp, transformer_options):
        if h.shape[1] == channels * 2:
            mean = h.mean(1).unsqueeze(1)
            h = torch.cat([h[:, : h.shape[1] // 2] * (1 + (backbone - 1) * torch.sigmoid(mean)), h[:, h.shape[1] // 2 :]], dim=1)
            hsp = hsp * (1 - window(hsp, cache) * (1 - skip))
        return h, hsp

    def attn2_patch(n, context_attn2, value_attn2, extra_options):
        if extra_options["block"][0] == "middle":
            value_attn2 = value_attn2.clone()
            rows = n.shape[0] // len(extra_options["cond_or_uncond"])
            for i, kind in enumerate(extra_options["cond_or_uncond"]):
                if kind == 0:
                    value_attn2[i * rows : (i + 1) * rows] *= 1.1
        return n, context_attn2, value_attn2

    def post_cfg_function(args):
        denoised, x = args["denoised"], args["input"]
        sigma = args["sigma"].view(-1, 1, 1, 1)
        blurred = torch.nn.functional.avg_pool2d(denoised, 3, stride=1, padding=1, count_include_pad=False)
        return denoised + (denoised - blurred) * sharpness * torch.tanh(sigma.to(x))

    unet = unet_patcher.clone()
    unet.set_model_output_block_patch(output_block_patch)
    unet.set_model_attn2_patch(attn2_patch)
    unet.set_model_sampler_post_cfg_function(post_cfg_function)
    return unet


class SkipShaperForForge(scripts.Script):
    sorting_priority = 12

    def title(self):
        return "Skip Shaper Integrated"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, *args, **kwargs):
        with InputAccordion(False, label=self.title()) as enabled:
            backbone = gr.Slider(label="Backbone", minimum=0, maximum=2, step=0.01, value=1.3)
            skip = gr.Slider(label="Skip", minimum=0, maximum=4, step=0.01, value=0.7)
            sharpness = gr.Slider(label="Sharpness", minimum=0.0, maximum=1.0, step=0.01, value=0.3)
        self.infotext_fields = [
            PasteField(enabled, "shaper_enabled", api="shaper_enabled"),
            PasteField(backbone, "shaper_backbone", api="shaper_backbone"),
        ]
        return enabled, backbone, skip, sharpness

    def process_before_every_sampling(self, p, *script_args, **kwargs):
        enabled, backbone, skip, sharpness = script_args
        xyz = getattr(p, f"_{UNIT}_xyz", {})
        enabled = xyz.get("enabled", enabled)
        if not enabled:
            return
        p.sd_model.forge_objects.unet = patch_unet_with_shaper(p.sd_model.forge_objects.unet, backbone, skip, sharpness)
        p.extra_generation_params.update({"shaper_enabled": enabled, "shaper_backbone": backbone})
