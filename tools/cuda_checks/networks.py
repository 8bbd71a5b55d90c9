"""Randomly initialized networks for the checks: full-size SD1.5 and SDXL or narrow ones, as modules, checkpoints and diffusers pipelines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel

from backend.families.registry import find_family
from backend.modules.k_model import KModel
from backend.modules.k_prediction import Prediction
from backend.patcher.unet import UnetPatcher
from backend.text_processing.clip_tokenizer import build_clip_tokenizer
from benchmarks._checkpoint_files import _text, _vae, sdxl_networks
from modules.application import Application
from modules.processing import StableDiffusionProcessingTxt2Img
from tests.support.applications import installed_application
from tests.support.checkpoints import build_models
from tests.support.controlnets import build_controlnet
from tools.cuda_checks.machine import Machine

FAMILIES = ("sd15", "sdxl")
SCHEDULE = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "steps_offset": 1, "timestep_spacing": "linspace", "use_karras_sigmas": True,
}  # fmt: skip
Networks = tuple[UNet2DConditionModel, Any, list[nn.Module]]


def build_networks(machine: Machine, family: str) -> Networks:
    """UNet, VAE and text encoders on the device in half precision, with the libraries' initial weights, in eval mode."""
    if machine.tiny:
        models = build_models(Path("none"), family)
        networks: Networks = (models.unet, models.vae, list(models.text_encoders))
    else:
        with torch.device(machine.device):
            networks = sdxl_networks() if family == "sdxl" else _sd15_networks()
    unet, vae, texts = networks
    for module in (unet, vae, *texts):
        nn.Module.to(module, machine.device, machine.dtype).eval().requires_grad_(False)
    return networks


def _sd15_networks() -> Networks:
    """SD1.5 at its published size."""
    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    return unet, _vae((128, 256, 512, 512)), [_text(CLIPTextModel, 768, 12, "quick_gelu", 768)]


def build_patcher(machine: Machine, family: str, dtype: torch.dtype | None = None) -> UnetPatcher:
    """Only the UNet, with the device as its home, in `dtype`."""
    unet = build_networks(machine, family)[0]
    nn.Module.to(unet, dtype or machine.dtype)
    return UnetPatcher(KModel(unet, Prediction()), machine.device, torch.device("cpu"), machine.device)


def build_control_network(machine: Machine, family: str, seed: int = 1) -> Any:
    """A ControlNet of the family's size with nonzero residuals."""
    if machine.tiny:
        network = build_controlnet(build_models(Path("none"), family), seed=seed)
        return nn.Module.to(network, machine.device, machine.dtype)
    with torch.device("meta"):
        unet = (sdxl_networks() if family == "sdxl" else _sd15_networks())[0]
    with torch.device(machine.device):
        network: Any = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    for convolution in (*network.controlnet_down_blocks, network.controlnet_mid_block, network.controlnet_cond_embedding.conv_out):
        nn.init.normal_(convolution.weight, std=0.01)
    return nn.Module.to(network, machine.dtype).eval().requires_grad_(False)


def checkpoint_path(machine: Machine, family: str) -> Path:
    return machine.shared_dir / "models" / "Stable-diffusion" / f"{family}.safetensors"


def write_checkpoint(machine: Machine, family: str) -> Path:
    """Write the family's checkpoint in the original layout, unless it exists."""
    path = checkpoint_path(machine, family)
    if not path.exists():
        torch.manual_seed(FAMILIES.index(family))
        joined = find_family(family).join_checkpoint(*build_networks(machine, family))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file({key: tensor.cpu().contiguous() for key, tensor in joined.items()}, part, metadata={"format": "pt"})
        part.rename(path)
    return path


@contextlib.contextmanager
def application(machine: Machine, *families: str, data_dir: Path | None = None, **config: Any) -> Iterator[Application]:
    """The product with these checkpoints, without a page and without saving pictures."""
    for family in families:
        write_checkpoint(machine, family)
    with installed_application(data_dir or machine.shared_dir, **config) as app:
        app.options.live_previews_enable = False
        app.options.samples_save = app.options.grid_save = False
        if families:
            app.options.set("sd_model_checkpoint", f"{families[0]}.safetensors")
        yield app


def side_px(machine: Machine, family: str) -> int:
    """The side of a picture: the family's training size, or 64."""
    return int(machine.pick(1024 if family == "sdxl" else 512, 64))


def txt2img(machine: Machine, family: str, **fields: Any) -> StableDiffusionProcessingTxt2Img:
    side = side_px(machine, family)
    defaults: dict[str, Any] = {
        "prompt": "a red cat on a green hill", "negative_prompt": "a dog", "seed": 1, "steps": 10, "width": side, "height": side,
        "sampler_name": "Euler", "scheduler": "Karras", "cfg_scale": 7.0, "do_not_save_grid": True, "do_not_save_samples": True,
    }  # fmt: skip
    return StableDiffusionProcessingTxt2Img(**{**defaults, **fields})


def copy_module(module: Any, like: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A new module like `like` with its own copy of the weights of `module`."""
    nn.Module.to(like, device, dtype)
    like.load_state_dict({key: tensor.to(device, dtype) for key, tensor in module.state_dict().items()}, strict=False)
    return like.eval().requires_grad_(False)


def build_pipeline(machine: Machine, family: str, engine: Any) -> Any:
    """diffusers' pipeline with copies of the engine's weights, entirely on the device, with the VAE in half precision too."""
    unet, vae, texts = build_networks(machine, family)
    ours = engine.forge_objects
    copy_module(ours.unet.model.diffusion_model, unet, machine.device, machine.dtype)
    copy_module(ours.vae.first_stage_model, vae, machine.device, machine.dtype)
    for text, ours_text in zip(texts, ours.clip.cond_stage_model.values()):
        copy_module(ours_text, text, machine.device, machine.dtype)
    vae.register_to_config(force_upcast=False, scaling_factor=engine.latent_scale)
    scheduler = EulerDiscreteScheduler.from_config(SCHEDULE)
    if family == "sdxl":
        pipeline: Any = StableDiffusionXLPipeline(
            vae=vae, text_encoder=texts[0], text_encoder_2=texts[1], tokenizer=build_clip_tokenizer(), unet=unet, scheduler=scheduler,
            tokenizer_2=build_clip_tokenizer(pad_token_id=0), add_watermarker=False, force_zeros_for_empty_prompt=False,
        )  # fmt: skip
    else:
        pipeline = StableDiffusionPipeline(
            vae=vae, text_encoder=texts[0], tokenizer=build_clip_tokenizer(), unet=unet, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
