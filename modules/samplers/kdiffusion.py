"""Runs a sampler for a request: noise levels, settings, progress, interruption.

The formulas are in backend/sampling; guidance is in samplers/cfg_denoiser.py. Class and method names are those that extensions use.

Shapes: B pictures, C channels, H W latent rows and columns, T noise levels.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backend import memory_management, profiler
from backend.modules.k_prediction import rescale_zero_terminal_snr_sigmas
from backend.parallel.running.executor import Cancelled
from backend.parallel.running.session import SamplingRequest, SamplingSession
from backend.sampling.flow_form import to_sigma
from backend.sampling.registry import SAMPLERS, SamplerSpec, find_sampler
from backend.sampling.sampler_types import OnStep, SamplerSettings, StepInfo
from backend.sampling.sampling_function import sampling_cleanup, sampling_prepare
from backend.sampling.schedules import OLD_KARRAS_RANGE, ScheduleSettings, discard_next_to_last_sigma
from modules.errors import RequestError
from modules.jobs.live_preview import PreviewMaker, preview_thread
from modules.processing.model_facts import always_shifts_by_size, shift_of_size, shifts_its_table_alone_in_forge
from modules.samplers import schedules as sd_schedulers
from modules.samplers.cfg_denoiser import CFGDenoiser
from modules.samplers.common import InterruptedException, setup_img2img_steps
from modules.samplers.entries import entry_of
from modules.samplers.lanes import may_use_lanes, run_in_lanes
from modules.scripts import callbacks as script_callbacks
from modules.scripts.hook_arguments import ExtraNoiseParams

log = logging.getLogger(__name__)

__all__ = ["CFGDenoiser", "CFGDenoiserKDiffusion", "KDiffusionSampler", "samplers_data_k_diffusion"]

CFGDenoiserKDiffusion = CFGDenoiser

_TABLE_BUFFERS = ("sigmas", "log_sigmas", "alphas_cumprod")
LEAST_DISPLACED_STEPS = 8
"""With fewer steps left after the exact ones, tiles do not use values of the step before: steps differ too much from each other."""
_GUIDANCE_INFOTEXT = (("NGMS", "s_min_uncond"), ("Skip Early CFG", "skip_early_cond"), ("Skip Late CFG", "skip_late_cond"))
_ETA_INFOTEXT = {"eta_ancestral": "Eta", "eta_ddim": "Eta DDIM"}
_CHURN_INFOTEXT = {"s_churn": ("Sigma churn", 0.0), "s_tmin": ("Sigma tmin", 0.0), "s_tmax": ("Sigma tmax", 0.0), "s_noise": ("Sigma noise", 1.0)}


class KDiffusionSampler:
    """One sampler for one pass of a request. `model_wrap_cfg` is the denoiser with guidance that it calls."""

    def __init__(self, funcname: str | SamplerSpec | Callable[..., Any], sd_model: Any, options: dict[str, Any] | None = None) -> None:
        self.spec = funcname if isinstance(funcname, SamplerSpec) else _spec_of(funcname)
        self.funcname = self.spec.name
        self.func = self.spec.function
        self.options = dict(self.spec.options if options is None else options)
        self.sd_model = sd_model
        self.config: Any = None  # the entry of the sampler list
        self.p: Any = None
        self.eta: float | None = None
        self.model_wrap_cfg = CFGDenoiser(self)
        self.model_wrap = self.model_wrap_cfg
        self.sampler_extra_args: dict[str, Any] = {}
        self.last_latent: Tensor | None = None
        self.stop_at: int | None = None
        self._preview: PreviewMaker | None = None
        self._session: SamplingSession | None = None

    @property
    def unet(self) -> Any:
        return self.sd_model.forge_objects.unet

    @property
    def predictor(self) -> Any:
        return self.unet.model.predictor

    @property
    def _function(self) -> Callable[..., Any]:
        """`func`, adapted to the model's parameterization."""
        return self.spec.function_for(self.predictor) if self.func is self.spec.function else self.func

    @property
    def _default_schedule(self) -> str:
        family = getattr(self.sd_model, "family_facts", None)
        return "automatic" if family is None else str(family.default_schedule)

    # Noise levels

    def get_sigmas(self, p: Any, steps: int) -> Tensor:
        """Noise levels (steps + 1,), descending, ending in 0, from the request's schedule and settings."""
        if p.sampler_noise_scheduler_override is not None:
            override: Tensor = p.sampler_noise_scheduler_override(steps)
            return override
        name = (getattr(p, "hr_scheduler", None) if p.is_hr_pass else None) or p.scheduler
        scheduler = sd_schedulers.find_scheduler(name)
        if scheduler.name not in sd_schedulers.BUILT_IN_NAMES:
            return self._sigmas_of_extension(scheduler, p, steps)
        resolved = self.spec.with_unipc_skip_type(str(p.options.uni_pc_skip_type)).resolve_schedule(scheduler.name, default=self._default_schedule)
        settings = self._schedule_settings(p, resolved)
        discards = bool(p.options.always_discard_next_to_last_sigma)
        make = partial(self.spec.compute_sigmas, resolved, steps, self.predictor, settings, always_discard=discards)
        try:
            return self._with_recovery(make, "making the noise schedule")
        except ValueError as error:
            raise RequestError(f"{error}") from error

    def _schedule_settings(self, p: Any, schedule: str) -> ScheduleSettings:
        options, params = p.options, p.extra_generation_params
        low, high, rho = (float(options[name]) or None for name in ("sigma_min", "sigma_max", "rho"))
        if options.use_old_karras_scheduler_sigmas and schedule == "karras":
            low, high = OLD_KARRAS_RANGE
        noted = {"Schedule min sigma": low, "Schedule max sigma": high, "Schedule rho": rho}
        params.update({key: value for key, value in noted.items() if value is not None})
        if options.always_discard_next_to_last_sigma and not self.options.get("discard_next_to_last_sigma"):
            params["Discard penultimate sigma"] = True
        if schedule == "beta":
            params["Beta schedule alpha"], params["Beta schedule beta"] = options.beta_dist_alpha, options.beta_dist_beta
        return ScheduleSettings(
            sigma_min=low,
            sigma_max=high,
            rho=rho,
            beta_alpha=float(options.beta_dist_alpha),
            beta_beta=float(options.beta_dist_beta),
            is_sdxl=bool(self.sd_model.is_sdxl),
            unshifted=self._is_as_forge(p),
        )

    def _is_as_forge(self, p: Any) -> bool:
        """Whether schedules leave out the model's shift where Forge forgets it."""
        if not (p.options.flow_schedules_of_forge and shifts_its_table_alone_in_forge(self.sd_model)):
            return False
        p.extra_generation_params["Forge flow schedules"] = True
        return True

    def _sigmas_of_extension(self, scheduler: sd_schedulers.Scheduler, p: Any, steps: int) -> Tensor:
        discards = bool(self.options.get("discard_next_to_last_sigma") or p.options.always_discard_next_to_last_sigma)
        kwargs: dict[str, Any] = {"sigma_min": float(self.predictor.sigma_min), "sigma_max": float(self.predictor.sigma_max)}
        if scheduler.default_rho != -1:
            kwargs["rho"] = scheduler.default_rho
        if scheduler.need_inner_model:
            kwargs["inner_model"] = self.unet.model
        make = partial(scheduler.function, n=steps + int(discards), **kwargs, device="cpu")
        sigmas_T: Tensor = self._with_recovery(make, "making the noise schedule")
        return (discard_next_to_last_sigma(sigmas_T) if discards else sigmas_T).float().cpu()

    def _with_recovery(self, run: Callable[[], Tensor], what: str) -> Tensor:
        """Compute a small tensor, evicting other models from the device if needed. Raises: OutOfMemory."""
        return memory_management.run_with_recovery(run, what=what, device=self.unet.load_device)

    # Settings

    def initialize(self, p: Any) -> SamplerSettings:
        """Read the request; values that differ from defaults go into its infotext."""
        self.p = p
        denoiser = self.model_wrap_cfg
        denoiser.p = p
        denoiser.mask, denoiser.nmask = getattr(p, "mask", None), getattr(p, "nmask", None)
        denoiser.step = 0
        denoiser.image_cfg_scale = getattr(p, "image_cfg_scale", None)
        options = p.options
        for key, name in _GUIDANCE_INFOTEXT:
            value = p.s_min_uncond if name == "s_min_uncond" else options[name]
            if value:
                p.extra_generation_params[key] = value
        if options.s_min_uncond_all and p.s_min_uncond:
            p.extra_generation_params["NGMS all steps"] = True
        return self._sampler_settings(p)

    def _sampler_settings(self, p: Any) -> SamplerSettings:
        options, spec = p.options, self.spec
        self.eta = None
        if spec.eta_option is not None:
            self.eta = float(options[spec.eta_option] if p.eta is None else p.eta)
            if self.eta != spec.eta_default:
                p.extra_generation_params[_ETA_INFOTEXT.get(spec.eta_option, "Eta")] = self.eta
        churn = {name: float(getattr(p, name)) for name in _CHURN_INFOTEXT}
        for name in spec.extra_params:
            key, default = _CHURN_INFOTEXT[name]
            if churn[name] != default:
                p.extra_generation_params[key] = churn[name]
        return SamplerSettings(
            eta=self.eta,
            s_churn=churn["s_churn"],
            s_tmin=churn["s_tmin"],
            s_tmax=churn["s_tmax"] or math.inf,
            s_noise=churn["s_noise"],
            is_flow=self.predictor.is_flow,
            **self._unipc_settings(p),
        )

    def _unipc_settings(self, p: Any) -> dict[str, Any]:
        options = p.options
        variant = options.uni_pc_variant
        if self.spec.name == "UniPC":
            noted = {
                "UniPC variant": (variant, "bh1"),
                "UniPC order": (options.uni_pc_order, 3),
                "UniPC lower order final": (options.uni_pc_lower_order_final, True),
                "UniPC skip type": (options.uni_pc_skip_type, "time_uniform"),
            }
            p.extra_generation_params.update({key: value for key, (value, default) in noted.items() if value != default})
        if variant not in ("bh1", "bh2"):
            p.comment(f"uni_pc_variant: {variant} is not available; bh1 is used.")
            variant = "bh1"
        return {
            "uni_pc_variant": variant,
            "uni_pc_order": int(options.uni_pc_order),
            "uni_pc_lower_order_final": bool(options.uni_pc_lower_order_final),
        }

    # Sampling

    def sample(
        self,
        p: Any,
        x: Tensor,
        conditioning: Any,
        unconditional_conditioning: Any,
        steps: int | None = None,
        image_conditioning: Tensor | None = None,
    ) -> Tensor:
        """From unit noise `x` to latents."""
        num_steps = steps or p.steps
        with self._network_ready(p, x, num_steps, num_steps):
            sigmas_T = self.get_sigmas(p, num_steps)
            if p.options.sgm_noise_multiplier:
                p.extra_generation_params["SGM noise multiplier"] = True
            start_BCHW = self._with_recovery(partial(self._start_from_noise, p, x, sigmas_T), "making the noise")
            self._set_brownian_range(p, sigmas_T)
            return self._run(p, start_BCHW, sigmas_T, conditioning, unconditional_conditioning, image_conditioning, init_latent=None)

    def sample_img2img(
        self,
        p: Any,
        x: Tensor,
        noise: Tensor,
        conditioning: Any,
        unconditional_conditioning: Any,
        steps: int | None = None,
        image_conditioning: Tensor | None = None,
    ) -> Tensor:
        """From latents `x`, with `noise` added at the level of the denoising strength, to latents."""
        num_steps, from_end = setup_img2img_steps(p, steps)
        with self._network_ready(p, x, num_steps, from_end + 1):
            sigmas_T = self.get_sigmas(p, num_steps)
            part_T = sigmas_T[max(len(sigmas_T) - 2 - from_end, 0) :]
            x_BCHW = self._with_recovery(lambda: x.to(self.unet.load_device), "moving the latents")
            start_BCHW = self._with_recovery(partial(self._start_from_latents, p, x_BCHW, noise, part_T), "making the noise")
            self._set_brownian_range(p, sigmas_T)
            return self._run(p, start_BCHW, part_T, conditioning, unconditional_conditioning, image_conditioning, init_latent=x_BCHW)

    def _start_from_noise(self, p: Any, noise_BCHW: Tensor, sigmas_T: Tensor) -> Tensor:
        noise_BCHW = noise_BCHW.to(self.unet.load_device)
        nothing_BCHW, max_denoise = torch.zeros_like(noise_BCHW), bool(p.options.sgm_noise_multiplier)
        return self.predictor.noise_scaling(sigmas_T[:1].to(noise_BCHW), noise_BCHW, nothing_BCHW, max_denoise=max_denoise)

    def _start_from_latents(self, p: Any, x_BCHW: Tensor, noise_BCHW: Tensor, sigmas_T: Tensor) -> Tensor:
        noise_BCHW = noise_BCHW.to(x_BCHW.device)
        start_BCHW = self.predictor.noise_scaling(sigmas_T[:1].to(noise_BCHW), noise_BCHW, x_BCHW, max_denoise=False)
        extra_noise = float(p.options.img2img_extra_noise)
        if extra_noise > 0:
            p.extra_generation_params["Extra noise"] = extra_noise
            start_BCHW = _with_extra_noise(start_BCHW, noise_BCHW * extra_noise)
        return start_BCHW

    @contextmanager
    def _network_ready(self, p: Any, x: Tensor, num_steps: int, num_run: int) -> Iterator[None]:
        """The UNet on its device with the noise table chosen in the settings, for the last `num_run` of so many steps; undone afterwards."""
        if self.spec.needs_uncond:
            unet = self.unet.clone()
            unet.model_options["disable_cfg1_optimization"] = True
            self.sd_model.forge_objects.unet = unet
        with _noise_table(self.predictor, p, self._wanted_shift(p, x, num_steps)):
            try:
                self._session = sampling_prepare(self.unet, x=x, request=self._request(p, x.shape[0], num_run))
                yield
                if self._session is not None and self._session.was_displaced:
                    p.extra_generation_params["Tiles"] = f"displaced after {p.options.multi_gpu_exact_steps} steps"
            finally:
                self._session = None
                sampling_cleanup(self.unet)

    def _wanted_shift(self, p: Any, x_BCHW: Tensor, num_steps: int) -> float | None:
        """The shift of a flow model's noise levels by settings or size; None where it is the model's own. What the settings ask for is noted."""
        if not self.predictor.is_flow:
            return None
        if p.options.flow_shift:
            p.extra_generation_params["Shift"] = float(p.options.flow_shift)
            return float(p.options.flow_shift)
        is_usual = always_shifts_by_size(self.sd_model)
        if not (is_usual or p.options.flow_shift_by_size):
            return None
        shift = shift_of_size(self.sd_model, x_BCHW.shape[-2], x_BCHW.shape[-1], num_steps)
        if shift is not None and not is_usual:
            p.extra_generation_params["Shift by size"] = True
        return shift

    def _request(self, p: Any, num_pictures: int, num_steps: int) -> SamplingRequest:
        """What the planner needs to know about the pass."""
        state = p.context.state
        return SamplingRequest(
            images=num_pictures,
            branches=self._num_branches(p),
            steps=num_steps,
            calls_per_step=2 if self.options.get("second_order") else 1,
            displaced_after=_displaced_after(p, num_steps),
            strategy=self._setting_or_flag(p, "multi_gpu_strategy", "auto"),
            asynchronous=bool(p.enable_async_gpu and p.options.enable_async_gpu),
            may_use_lanes=may_use_lanes(self, p, num_pictures),
            graphs=self._setting_or_flag(p, "cuda_graphs", "flag"),
            is_cancelled=lambda: bool(state.interrupted or state.skipped),
        )

    def _setting_or_flag(self, p: Any, name: str, open_value: str) -> Any:
        """The choice from the setting or, if that leaves it open, from the flag of the same name."""
        chosen = str(p.options[name])
        return getattr(p.context.config.backend, name) if chosen == open_value else chosen

    def _num_branches(self, p: Any) -> int:
        """Conditions per picture and step: the parts of its prompt, plus the negative prompt if it is used."""
        cond, uncond = (p.hr_c, p.hr_uc) if p.is_hr_pass else (p.c, p.uc)
        parts = max((len(parts) for parts in getattr(cond, "batch", ())), default=1)
        return parts + (1 if uncond is not None else 0)

    def _set_brownian_range(self, p: Any, sigmas_T: Tensor) -> None:
        """The Brownian paths span the whole schedule, whichever part is sampled."""
        if self.options.get("brownian_noise"):
            levels_T = to_sigma(sigmas_T) if self.predictor.is_flow else sigmas_T  # SDE samplers of flow models use these levels
            p.rng.brownian_range = (float(levels_T[levels_T > 0].min()), float(levels_T.max()))

    def _run(self, p: Any, start_BCHW: Tensor, sigmas_T: Tensor, c: Any, uc: Any, image_cond: Tensor | None, init_latent: Tensor | None) -> Tensor:
        settings = self.initialize(p)
        denoiser = self.model_wrap_cfg
        denoiser.init_latent = init_latent
        num_steps = len(sigmas_T) - 1
        denoiser.steps = num_steps
        denoiser.total_steps = num_steps * (2 if self.options.get("second_order") else 1)
        self.last_latent = start_BCHW if init_latent is None else init_latent
        cfg_scale = getattr(p, "hr_cfg", p.cfg_scale) if p.is_hr_pass else p.cfg_scale
        self.sampler_extra_args = {
            "cond": c,
            "image_cond": image_cond,
            "uncond": uc,
            "cond_scale": float(cfg_scale) * self.spec.cfg_multiplier,
            "s_min_uncond": float(p.s_min_uncond or 0),
        }
        samples_BCHW = self.launch_sampling(num_steps, lambda: self._walk(start_BCHW, sigmas_T, settings))
        samples_BCHW = self.predictor.inverse_noise_scaling(sigmas_T[-1:].to(samples_BCHW), samples_BCHW)
        return samples_BCHW.float().cpu()

    def _walk(self, start_BCHW: Tensor, sigmas_T: Tensor, settings: SamplerSettings) -> Tensor:
        """Run the formula over all noise levels, for the batch or for each of its pictures."""
        if self._session is None or self._session.plan.lanes < 2:
            return self._formula(self.model_wrap_cfg, start_BCHW, self.p.rng, self._after_step, sigmas_T, settings)
        return run_in_lanes(self, start_BCHW, partial(self._formula, sigmas_T=sigmas_T, settings=settings), self._after_step)

    def _formula(
        self, denoiser: CFGDenoiser, x_BCHW: Tensor, noise: Any, on_step: OnStep, sigmas_T: Tensor, settings: SamplerSettings
    ) -> Tensor:  # fmt: skip
        samples_BCHW: Tensor = self._function(denoiser, x_BCHW, sigmas_T, settings=settings, noise=noise, on_step=on_step)
        return samples_BCHW

    def launch_sampling(self, steps: int, func: Callable[[], Tensor]) -> Tensor:
        """func()'s latents; the last ones seen if the job was interrupted or the batch skipped."""
        state = self.p.context.state
        self.model_wrap_cfg.steps = steps
        state.sampling_steps, state.sampling_step = steps, 0
        self._preview = PreviewMaker(self.sd_model, self.p.options)
        state.preview_maker = self._preview
        bar, recorder, began_s = self.p.context.job_bar, profiler.recorder(), time.perf_counter()
        bar.begin_pass(steps, passes_left=state.job_count - state.job_no)
        recorder.begin_steps()
        try:
            return func()
        except (InterruptedException, Cancelled):
            assert self.last_latent is not None
            recorder.note_step()
            return self.last_latent
        finally:
            recorder.end_steps()
            profiler.meter().sampling_s += time.perf_counter() - began_s

    def _after_step(self, info: StepInfo) -> None:
        """Called by the formula once per step, on the job's thread."""
        self.callback_state({"x": info.x, "i": info.index, "sigma": info.sigma, "sigma_hat": info.sigma, "denoised": info.denoised})

    def callback_state(self, d: dict[str, Any]) -> None:
        """Step `i` was made: latents `x` (B, C, H, W) at noise level `sigma` went in, `denoised` came out. Extensions replace this function."""
        index, context = int(d["i"]), self.p.context
        state = context.state
        if self.stop_at is not None and index > self.stop_at:
            raise InterruptedException
        self.last_latent = d["denoised"]
        state.current_latent = d["denoised"]
        state.sampling_step = index + 1
        context.job_bar.note_step()
        profiler.meter().num_steps += 1
        profiler.recorder().note_step()
        if self._preview is not None and self._preview.due(index + 1):
            preview_thread.show(state, self._preview)


def _displaced_after(p: Any, num_steps: int) -> int | None:
    """After how many steps tiles may use what was sent in the step before, if the settings ask for that; None for jobs of few steps."""
    if p.options.multi_gpu_tiles != "displaced":
        return None
    exact_steps = int(p.options.multi_gpu_exact_steps)
    if num_steps < exact_steps + LEAST_DISPLACED_STEPS:
        p.comment(
            f"Displaced tiles: of {num_steps} steps {exact_steps} are exact and fewer than {LEAST_DISPLACED_STEPS} are left, which differ too much "
            "from each other. Tiles are exact."
        )
        return None
    return exact_steps


def _spec_of(function: str | Callable[..., Any]) -> SamplerSpec:
    """The sampler named by an extension: by name, alias, k-diffusion's "sample_..." name, or as a function in this program's style."""
    if callable(function):
        return SamplerSpec(name=getattr(function, "__name__", "sampler"), function=function, aliases=())
    name = function.removeprefix("sample_")
    for candidate in (function, f"k_{name}", name, f"k_{name}".replace("ancestral", "a")):
        try:
            return find_sampler(candidate)
        except ValueError:
            continue
    return find_sampler(function)


def _with_extra_noise(x_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """`x` with extra noise beyond the schedule, after listeners may have changed it."""
    added = ExtraNoiseParams(noise_BCHW, x_BCHW, x_BCHW + noise_BCHW)
    script_callbacks.extra_noise_callback(added)
    result: Tensor = added.xi
    return result


@contextmanager
def _noise_table(predictor: Any, p: Any, shift: float | None) -> Iterator[None]:
    """The model's table of noise levels as the settings want it, for the length of a pass. `shift`: of a flow model, None for its own."""
    if predictor.is_flow:  # its times follow from no table of alphas
        with _shifted(predictor, shift):
            yield
        return
    options, quantized = p.options, predictor.quantize_timesteps
    buffers = {name: getattr(predictor, name) for name in _TABLE_BUFFERS}
    if options.use_downcasted_alpha_bar:
        p.extra_generation_params["Downcast alphas_cumprod"] = True
        alphas_bar = predictor.alphas_cumprod.half().double()
        predictor.set_sigmas(((1 - alphas_bar) / alphas_bar) ** 0.5)
    if options.sd_noise_schedule == "Zero Terminal SNR":
        p.extra_generation_params["Noise Schedule"] = options.sd_noise_schedule
        predictor.set_sigmas(rescale_zero_terminal_snr_sigmas(predictor.sigmas.double()))
    predictor.quantize_timesteps = bool(options.enable_quantization) or quantized
    try:
        yield
    finally:
        for name, buffer in buffers.items():  # the network may have moved to its device in the meantime
            setattr(predictor, name, buffer.to(getattr(predictor, name).device))
        predictor.quantize_timesteps = quantized


@contextmanager
def _shifted(predictor: Any, shift: float | None) -> Iterator[None]:
    own = predictor.shift
    _set_shift(predictor, own if shift is None else shift)
    try:
        yield
    finally:
        _set_shift(predictor, own)


def _set_shift(predictor: Any, shift: float) -> None:
    if shift != predictor.shift:
        device = predictor.sigmas.device
        predictor.set_shift(shift)
        predictor.sigmas = predictor.sigmas.to(device)


def samplers_data_k_diffusion() -> list[Any]:
    """The built-in entries of the sampler list, under the name that extensions know."""
    return [entry_of(spec, partial(KDiffusionSampler, spec)) for spec in SAMPLERS]
