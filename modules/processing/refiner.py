"""The refiner: another checkpoint that takes over denoising partway through a pass.

The model is swapped between two denoiser calls, behind the sampler: latents, noise levels and formula stay the same. A multistep sampler
remembers denoised pictures, which mean the same to both models, so its history stays valid.
With the setting refiner_switch_by_sample_steps the switch point is a fraction of the sampler's calls; without it, a fraction of the model's
timesteps, counted like diffusers' `denoising_end` and `denoising_start`.

Shapes: B pictures, C channels, H W latent rows and columns.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backend.sampling.sampling_function import sampling_cleanup
from modules.errors import RequestError
from modules.jobs.live_preview import PreviewMaker
from modules.processing.conditions import refiner_conditions
from modules.processing.image_conditions import condition_on_nothing, condition_on_picture
from modules.processing.latents import latent_format_of
from modules.processing.networks import activate_networks, prepare_networks
from modules.processing.overrides import step_of

if TYPE_CHECKING:
    from modules.processing.request import StableDiffusionProcessing
    from modules.samplers.cfg_denoiser import CFGDenoiser

log = logging.getLogger(__name__)

FIRST_PASS, SECOND_PASS, BOTH_PASSES = "first pass", "second pass", "both passes"


@contextmanager
def refining(p: StableDiffusionProcessing) -> Iterator[None]:
    """One pass, within which `p` may switch to its refiner. If it did, `p.sd_model` is the refiner afterwards."""
    if not _takes_part(p):
        yield
        return
    with ExitStack() as held:
        p.refiner = Refiner(p, held)
        try:
            yield
        finally:
            p.refiner = None


def _takes_part(p: StableDiffusionProcessing) -> bool:
    info = p.refiner_checkpoint_info
    if info is None or p.sd_model.filename == info.filename:
        return False
    if not getattr(p, "enable_hr", False):
        return True
    wanted = p.options.hires_fix_refiner_pass
    return bool(wanted == BOTH_PASSES or (wanted == SECOND_PASS) == p.is_hr_pass)


def note_refiner(p: StableDiffusionProcessing) -> None:
    """Record the refiner in the infotext, unless it is the loaded model anyway."""
    info = p.refiner_checkpoint_info
    if info is None or p.sd_model.filename == info.filename:
        return
    info.calculate_shorthash()  # from here on its title contains the hash
    p.extra_generation_params["Refiner"] = info.short_title
    p.extra_generation_params["Refiner switch at"] = p.refiner_switch_at
    if p.options.refiner_switch_by_sample_steps:
        p.extra_generation_params["Refiner switch by sampling steps"] = True
    if getattr(p, "enable_hr", False) and p.options.hires_fix_refiner_pass != SECOND_PASS:
        p.extra_generation_params["Hires refiner"] = p.options.hires_fix_refiner_pass


class Refiner:
    """Waits during one pass of `p` for the switch point. `held` contains what to release after the pass."""

    def __init__(self, p: StableDiffusionProcessing, held: ExitStack) -> None:
        self.p = p
        self._held = held
        self._is_in_use = False

    def switch_when_due(self, denoiser: CFGDenoiser, x_BCHW: Tensor, sigma_B: Tensor | None) -> bool:
        """Swap the models if this call is the switch point. Raises RequestError if the refiner cannot continue with these latents."""
        if self._is_in_use or completed_share(denoiser, sigma_B) < (self.p.refiner_switch_at or 0):
            return False
        self._is_in_use = True
        self._switch(denoiser, x_BCHW)
        return True

    def _switch(self, denoiser: CFGDenoiser, x_BCHW: Tensor) -> None:
        p, sampler = self.p, denoiser.sampler
        assert p.refiner_checkpoint_info is not None
        first = p.sd_model
        sampling_cleanup(sampler.unet)
        options = p.options.with_overrides({"sd_model_checkpoint": p.refiner_checkpoint_info.title})
        p.sd_model = p.context.models.ensure_loaded(options)
        _check_latents(first, p)
        log.info("Refiner: %s takes over at call %d of %d.", p.refiner_checkpoint_info.short_title, denoiser.step + 1, denoiser.total_steps)
        activate_networks(p, p.hr_extra_network_data if p.is_hr_pass else p.extra_network_data)  # type: ignore[attr-defined]  # txt2img has them
        prepare_networks(p)
        cond, uncond = refiner_conditions(p)
        sampler.sampler_extra_args |= {"cond": cond, "uncond": uncond, "image_cond": _image_conditioning(p, x_BCHW)}
        self._hand_over(sampler, x_BCHW)

    def _hand_over(self, sampler: Any, x_BCHW: Tensor) -> None:
        """Point the sampler at the new model; what it needs on its device stays until the pass ends."""
        p = self.p
        sampler.sd_model = p.sd_model
        sampler._preview = p.context.state.preview_maker = PreviewMaker(p.sd_model, p.options)
        num_steps = sampler.model_wrap_cfg.steps
        self._held.enter_context(sampler._network_ready(p, x_BCHW, num_steps, max(1, num_steps - p.context.state.sampling_step)))


def completed_share(denoiser: CFGDenoiser, sigma_B: Tensor | None) -> float:
    """Completed fraction, 0..1: of the model's training timesteps, or of the sampler's calls."""
    if sigma_B is None or denoiser.p.options.refiner_switch_by_sample_steps:
        return denoiser.step / max(denoiser.total_steps, 1)
    table = denoiser.sampler.predictor.sigmas
    level = float(sigma_B.max()) if denoiser.level is None else denoiser.level
    timestep = int((_on_host(table) - level).abs().argmin())
    return (len(table) - 1 - timestep) / len(table)


@lru_cache(maxsize=2)
def _on_host(table: Tensor) -> Tensor:
    """A model's table of noise levels, read from its device once."""
    return table.detach().cpu()


def _check_latents(first: Any, p: StableDiffusionProcessing) -> None:
    if latent_format_of(first) != latent_format_of(p.sd_model):
        assert p.refiner_checkpoint_info is not None
        raise RequestError(
            f"refiner_checkpoint: {p.refiner_checkpoint_info.name} belongs to family {p.sd_model.family}, but the picture was started with family "
            f"{first.family}, whose latents differ. Choose a refiner of the same family (SDXL and its refiner count as one)."
        )


def _image_conditioning(p: StableDiffusionProcessing, x_BCHW: Tensor) -> Tensor:
    """What an inpainting model takes in addition to latents, made by the current model."""
    source = p.image_conditioning_source
    if source is None or source[0] is None:  # latents that never were pixels: everything is repainted
        factor = latent_format_of(p.sd_model).factor
        condition = step_of(p, "txt2img_image_conditioning", condition_on_nothing)
        return condition(x_BCHW, x_BCHW.shape[-1] * factor, x_BCHW.shape[-2] * factor)
    with torch.no_grad():
        return step_of(p, "img2img_image_conditioning", condition_on_picture)(*source)
