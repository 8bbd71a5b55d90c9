"""The networks of a pass: the loaded weights, plus the networks named in prompts, with tiling on or off.

Takes the request (`p`) and modifies the networks of `p.sd_model`. Must not know sampling or pictures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from backend.args import dynamic_args
from modules.processing.tiling import apply_tiling
from modules.prompts import extra_networks

if TYPE_CHECKING:
    from torch import Tensor

    from modules.processing.request import StableDiffusionProcessing


def activate_networks(p: StableDiffusionProcessing, network_data: dict[str, Any]) -> None:
    """Reset the model to its loaded state and apply the networks named in prompts; every pass starts from the result."""
    engine = p.sd_model
    engine.forge_objects = engine.forge_objects_original.shallow_copy()
    engine.forge_objects.vae.auto_fp32 = bool(p.options.auto_vae_precision)
    for note in engine.storage_notes:
        p.comment(note)
    if not p.do_not_reload_embeddings:
        engine.embeddings.load_textual_inversion_embeddings()
    if not p.disable_extra_networks:
        p.has_active_networks = True
        extra_networks.activate(p, network_data)
    engine.forge_objects_after_applying_lora = engine.forge_objects.shallow_copy()
    unet = engine.forge_objects.unet
    dynamic_args.update(emphasis_name=str(p.options.emphasis), online_lora=unet.has_online_lora())
    dynamic_args["forge_unet_storage_dtype"] = getattr(unet.model, "storage_dtype", None)


def deactivate_networks(p: StableDiffusionProcessing) -> None:
    """At the end of a job, however it ends: notify extra networks once, if any were activated."""
    if p.has_active_networks:
        p.has_active_networks = False
        extra_networks.deactivate(p, getattr(p, "extra_network_data", None) or {})


def prepare_networks(p: StableDiffusionProcessing) -> None:
    """Before every pass: restore the networks as extra networks left them, set tiling and token merging. Patches of an earlier pass are removed."""
    engine = p.sd_model
    engine.forge_objects = engine.forge_objects_after_applying_lora.shallow_copy()
    apply_tiling(engine, bool(p.tiling))
    apply_token_merging(engine, p.get_token_merging_ratio(for_hr=p.is_hr_pass))


def apply_token_merging(sd_model: Any, token_merging_ratio: float) -> None:
    """Let the next pass merge that share (0..1) of the tokens of the UNet's outer self-attentions."""
    from backend.misc.tomesd import TomePatcher  # imports torch

    if token_merging_ratio > 0:
        sd_model.forge_objects.unet = TomePatcher().patch(sd_model.forge_objects.unet, min(float(token_merging_ratio), 1.0))


def run_sampling_hook(p: StableDiffusionProcessing, x_BCHW: Tensor, noise_BCHW: Tensor, c: Any, uc: Any) -> Tensor:
    """Let scripts patch the networks; returns the noise, theirs if they left one in modified_noise."""
    p.run_hook("process_before_every_sampling", x=x_BCHW, noise=noise_BCHW, c=c, uc=uc)
    modified, p.modified_noise = p.modified_noise, None
    return noise_BCHW if modified is None else modified
