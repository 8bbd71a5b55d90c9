"""The denoiser that a sampler calls at each step: guidance with the step's prompts, masks, skipped guidance, interruption.

backend/sampling/sampling_function.py combines the branches. Names are those that extensions use.

Shapes: B pictures, C channels, H W latent rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backend import memory_management
from backend.sampling.branches import StepMemory
from backend.sampling.sampling_function import denoise_guided
from modules import devices
from modules.processing.model_facts import attends_jointly
from modules.prompts import schedules as prompt_parser
from modules.prompts.schedules import conditions_in_force
from modules.samplers.common import InterruptedException, apply_refiner
from modules.scripts import callbacks as script_callbacks
from modules.scripts.hook_arguments import AfterCFGCallbackParams, CFGDenoisedParams, CFGDenoiserParams, MaskBlendArgs

if TYPE_CHECKING:
    from modules.samplers.kdiffusion import KDiffusionSampler


def is_truncated(step: int, num_steps: int, share: float) -> bool:
    """Whether a step, counted from 0, belongs to the last `share` of all. A share of 0.75 is Lumina2's published truncation at 0.25."""
    return (step + 1) / num_steps > 1 - share + 1e-9


@dataclass(slots=True)
class _Levels:
    """Noise levels as numbers: of the current call, and told for the next one."""

    now: float | None = None
    told: float | None = None


class CFGDenoiser(torch.nn.Module):
    """`denoise(x_BCHW, sigma_B)` for samplers. One instance serves one pass.

    `step` counts calls, `total_steps` is the expected total. `mask` is 1 where the original (`init_latent`) stays, `nmask` where it is
    repainted.
    `last_uncond_BCHW` is the latest output of the negative prompt's branch, for samplers that read it.
    """

    def __init__(self, sampler: KDiffusionSampler) -> None:
        super().__init__()
        self.sampler = sampler
        self.p: Any = None
        self.mask: Tensor | None = None
        self.nmask: Tensor | None = None
        self.init_latent: Tensor | None = None
        self.steps = 0
        self.total_steps = 0
        self.step = 0
        self.image_cfg_scale: float | None = None
        self.last_uncond_BCHW: Tensor | None = None
        self.own_arguments: dict[str, Any] | None = None
        """Conditions of this denoiser if it covers only part of the sampler's batch."""
        self.picture = 0
        self._levels = _Levels()
        self._memory = StepMemory()

    @property
    def inner_model(self) -> Any:
        return self.sampler.sd_model

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        uncond: Any = None,
        cond: Any = None,
        cond_scale: float | None = None,
        s_min_uncond: float = 0.0,
        image_cond: Tensor | None = None,
    ) -> Tensor:
        """x0 (B, C, H, W) at noise levels (B,). Without `cond`, uses the sampler's own conditions. Raises InterruptedException."""
        state, levels = self.p.context.state, self._levels
        if state.interrupted or state.skipped:
            raise InterruptedException
        levels.now, levels.told = levels.told, None
        apply_refiner(self, x, sigma)
        arguments = self.sampler.sampler_extra_args if self.own_arguments is None else self.own_arguments
        cond, uncond = (arguments["cond"], arguments["uncond"]) if cond is None else (cond, uncond)
        scale = float(arguments["cond_scale"] if cond_scale is None else cond_scale)
        s_min_uncond = s_min_uncond or arguments["s_min_uncond"]
        if (s_min_uncond > 0 or any(self._skip_settings[1:])) and self._skips_guidance(sigma, s_min_uncond):
            scale = 1.0
        denoised_BCHW = self._denoise(x, sigma, cond, uncond, scale, arguments["image_cond"] if image_cond is None else image_cond)
        denoised_BCHW = self._tell_guided(self._keep_unmasked(denoised_BCHW, sigma))
        self.__dict__["step"] += 1  # past nn.Module, which looks for parameters in every assignment
        return denoised_BCHW

    @property
    def level(self) -> float | None:
        """The noise level of the current call as the sampler knows it; None if it did not say. Reading it from a tensor waits for the device."""
        return self._levels.now

    def note_level(self, sigma: float) -> None:
        """The sampler's next call is at this noise level, for all pictures."""
        self._levels.told = sigma

    @cached_property
    def _skip_settings(self) -> tuple[bool, float, float]:
        """ "NGMS all steps", "Skip Early CFG" and "Skip Late CFG" of the request's settings, read once."""
        options = self.p.options
        return bool(options.s_min_uncond_all), float(options.skip_early_cond), float(options.skip_late_cond)

    def _skips_guidance(self, sigma: Tensor, s_min_uncond: float) -> bool:
        """Whether this step skips the negative prompt, because of "Negative Guidance minimum sigma", "Skip Early CFG" or "Skip Late CFG"."""
        at_all_steps, early_share, late_share = self._skip_settings
        num_steps = max(self.total_steps, 1)
        if s_min_uncond > 0 and (self.step % 2 == 1 or at_all_steps):
            level = float(sigma[0]) if self.level is None else self.level
            if level < s_min_uncond:
                return True
        if early_share > 0 and self.step / num_steps <= early_share:
            return True
        return is_truncated(self.step, num_steps, late_share)

    def _denoise(self, x: Tensor, sigma: Tensor, cond: Any, uncond: Any, scale: float, image_cond: Tensor | None) -> Tensor:
        is_listened_to = script_callbacks.is_listened_to("cfg_denoiser")
        composition, cond_rows, uncond_rows = self._prompts_of_step(cond, uncond, x.device, fresh=is_listened_to)
        asked = CFGDenoiserParams(x, image_cond, sigma, self.step, self.total_steps, cond_rows, uncond_rows, self)
        if is_listened_to:
            asked.sampling_step, asked.total_sampling_steps = self.p.context.state.sampling_step, self.p.context.state.sampling_steps
            script_callbacks.cfg_denoiser_callback(asked)
        model = self.inner_model
        concat = asked.image_cond if model.is_inpaint else None
        if concat is not None:
            move = partial(concat.to, x)
            concat = move() if is_listened_to else self._memory.find("concat", (concat,), (x.dtype, x.device), move)
        guide = partial(
            denoise_guided,
            self.sampler.unet,
            asked.x,
            asked.sigma,
            text_cond=asked.text_cond,
            text_uncond=asked.text_uncond,
            image_cond=concat,
            cond_scale=scale,
            cond_composition=composition,
            seed=self.p.seeds[self.picture],
            on_branches=self._tell_branches if script_callbacks.is_listened_to("cfg_denoised") else None,
            text_repeats=not attends_jointly(model),
            memory=self._memory,
        )
        denoised_BCHW, _, self.__dict__["last_uncond_BCHW"] = guide()
        devices.test_layers_for_nans(self.sampler.unet.model, denoised_BCHW, guide)
        return denoised_BCHW

    def _prompts_of_step(self, cond: Any, uncond: Any, device: torch.device, *, fresh: bool) -> tuple[Any, Any, Any]:
        """(composition, rows of the prompts, rows of the negative prompts) of this step: the last step's as long as the same parts of the prompts
        apply, and new tensors with `fresh`, because a listener may change them in place."""
        in_force = conditions_in_force(cond, uncond, self.step)
        choose = partial(self._choose_prompts, cond, uncond, device)
        return choose() if fresh else self._memory.find("prompts", (cond, uncond, *in_force), (), choose)

    def _choose_prompts(self, cond: Any, uncond: Any, device: torch.device) -> tuple[Any, Any, Any]:
        """(composition, rows of the prompts, rows of the negative prompts) of this step. New tensors, which a full device may have no room for."""

        def choose() -> tuple[Any, Any, Any]:
            composition, cond_rows = prompt_parser.reconstruct_multicond_batch(cond, self.step)
            return composition, cond_rows, None if uncond is None else prompt_parser.reconstruct_cond_batch(uncond, self.step)

        return memory_management.run_with_recovery(choose, what="choosing the prompts of a step", device=device)

    def _tell_branches(self, cond_BCHW: Tensor, uncond_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The answers for the prompts and then those for the negative prompts, as those who listen leave them."""
        state, num_pictures = self.p.context.state, cond_BCHW.shape[0]
        answered = CFGDenoisedParams(torch.cat([cond_BCHW, uncond_BCHW]), state.sampling_step, state.sampling_steps, self.inner_model)
        script_callbacks.cfg_denoised_callback(answered)
        return answered.x[:num_pictures], answered.x[num_pictures:]

    def _tell_guided(self, denoised_BCHW: Tensor) -> Tensor:
        """The step's result after listeners may have changed it."""
        if not script_callbacks.is_listened_to("cfg_after_cfg"):
            return denoised_BCHW
        guided = AfterCFGCallbackParams(denoised_BCHW, self.p.context.state.sampling_step, self.p.context.state.sampling_steps)
        script_callbacks.cfg_after_cfg_callback(guided)
        result: Tensor = guided.x
        return result

    def _keep_unmasked(self, denoised_BCHW: Tensor, sigma: Tensor) -> Tensor:
        """Restore the original where it is not masked."""
        if self.mask is None or self.nmask is None or self.init_latent is None:
            return denoised_BCHW
        mask, nmask, original = (tensor.to(denoised_BCHW) for tensor in (self.mask, self.nmask, self.init_latent))
        blend = MaskBlendArgs(denoised_BCHW, nmask, original, mask, denoised_BCHW * nmask + original * mask, self, sigma)
        self.p.run_hook_with("on_mask_blend", blend)
        blended: Tensor = blend.blended_latent
        return blended
