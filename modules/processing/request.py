"""A request for pictures: fields set by the user, fields set by the running job, and its two steps `init` and `sample` per kind.

Extensions read and write these field names. The other files of modules/processing do the work; this file must not compute pictures.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any

from modules.jobs.context import JobContext, installed_context, required_context
from modules.processing.overrides import a1111_method
from modules.settings.options import Options, OptionsSnapshot
from modules.settings.table import build_option_table

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

log = logging.getLogger(__name__)

CondCache = list[Any]


def snapshot_of_options(context: JobContext | None) -> OptionsSnapshot:
    """The current settings; all defaults if no application is installed."""
    return context.options.snapshot() if context is not None else Options(build_option_table({})).snapshot()


@dataclass(repr=False, eq=False)
class StableDiffusionProcessing:
    """Base of both kinds of requests. The settings are a snapshot from its creation, with `override_settings` on top."""

    if TYPE_CHECKING:  # a constructor argument that becomes a property
        sd_model: Any = None
    else:
        sd_model: InitVar[Any] = None
    outpath_samples: str | None = None
    outpath_grids: str | None = None
    prompt: str | list[str] = ""
    prompt_for_display: str | None = None
    negative_prompt: str | list[str] = ""
    styles: list[str] = None  # type: ignore[assignment]  # a list after __post_init__
    seed: Any = -1
    subseed: Any = -1
    subseed_strength: float = 0
    seed_resize_from_h: int = -1
    seed_resize_from_w: int = -1
    seed_enable_extras: bool = True
    sampler_name: str | None = None
    scheduler: str | None = None
    batch_size: int = 1
    n_iter: int = 1
    steps: int = 50
    cfg_scale: float = 7.0
    distilled_cfg_scale: float = 3.5
    width: int = 512
    height: int = 512
    restore_faces: bool | None = None
    tiling: bool | None = None
    do_not_save_samples: bool = False
    do_not_save_grid: bool = False
    extra_generation_params: dict[str, Any] = None  # type: ignore[assignment]  # a dict after __post_init__
    overlay_images: list[Any] | None = None
    eta: float | None = None
    do_not_reload_embeddings: bool = False
    enable_async_gpu: bool = True
    denoising_strength: float | None = None
    ddim_discretize: str | None = None
    s_min_uncond: float | None = None
    s_churn: float | None = None
    s_tmax: float | None = None
    s_tmin: float | None = None
    s_noise: float | None = None
    override_settings: dict[str, Any] = None  # type: ignore[assignment]  # a dict after __post_init__
    override_settings_restore_afterwards: bool = True
    sampler_index: int | None = None
    refiner_checkpoint: str | None = None
    refiner_switch_at: float | None = None
    token_merging_ratio: float = 0
    token_merging_ratio_hr: float = 0
    disable_extra_networks: bool = False
    firstpass_image: Image.Image | None = None
    comments: dict[str, int] = None  # type: ignore[assignment]  # a dict after __post_init__

    scripts_value: Any = field(default=None, init=False)
    script_args_value: Any = field(default=None, init=False)
    scripts_setup_complete: bool = field(default=False, init=False)

    sampler_noise_scheduler_override: Any = field(default=None, init=False)
    is_using_inpainting_conditioning: bool = field(default=False, init=False)
    inpainting_mask_weight: float = field(default=1.0, init=False)
    uses_ensd: bool = field(default=False, init=False)
    paste_to: Any = field(default=None, init=False)
    is_hr_pass: bool = field(default=False, init=False)
    has_active_networks: bool = field(default=False, init=False)
    c: Any = field(default=None, init=False)
    uc: Any = field(default=None, init=False)
    rng: Any = field(default=None, init=False)
    step_multiplier: int = field(default=1, init=False)
    firstpass_steps: int = field(default=0, init=False)
    color_corrections: list[Any] | None = field(default=None, init=False)
    all_prompts: list[str] = field(default_factory=list, init=False)
    all_negative_prompts: list[str] = field(default_factory=list, init=False)
    all_seeds: list[int] = field(default_factory=list, init=False)
    all_subseeds: list[int] = field(default_factory=list, init=False)
    iteration: int = field(default=0, init=False)
    batch_index: int = field(default=0, init=False)
    main_prompt: str = field(default="", init=False)
    main_negative_prompt: str = field(default="", init=False)
    prompts: list[str] = field(default_factory=list, init=False)
    negative_prompts: list[str] = field(default_factory=list, init=False)
    seeds: list[int] = field(default_factory=list, init=False)
    subseeds: list[int] = field(default_factory=list, init=False)
    extra_network_data: dict[str, Any] = field(default_factory=dict, init=False)
    user: str | None = field(default=None, init=False)
    sd_model_name: str | None = field(default=None, init=False)
    sd_model_hash: str | None = field(default=None, init=False)
    sd_vae_name: str | None = field(default=None, init=False)
    sd_vae_hash: str | None = field(default=None, init=False)
    additional_module_names: list[str] = field(default_factory=list, init=False)
    is_api: bool = field(default=False, init=False)
    selected_script: Any = field(default=None, init=False)
    latents_after_sampling: list[Any] = field(default_factory=list, init=False)
    pixels_after_sampling: list[Any] = field(default_factory=list, init=False)
    extra_result_images: list[Any] = field(default_factory=list, init=False)
    modified_noise: Any = field(default=None, init=False)
    sampler: Any = field(default=None, init=False)
    job_timestamp: str = field(default="", init=False)
    refiner_checkpoint_info: Any = field(default=None, init=False)
    refiner: Any = field(default=None, init=False)
    image_conditioning_source: Any = field(default=None, init=False)
    text_pictures: tuple[Any, ...] = field(default=(), init=False)
    """Pictures that the text encoder is to see, (H, W, 3) uint8 RGB arrays."""

    # conditions cached across jobs; clear_prompt_cache() empties them
    cached_c = [None, None]
    cached_uc = [None, None]
    cached_refiner_c = [None, None]
    cached_refiner_uc = [None, None]

    def __post_init__(self, sd_model: Any) -> None:  # type: ignore[override]  # see the field
        self._engine = sd_model
        self.styles = list(self.styles or [])
        self.extra_generation_params = dict(self.extra_generation_params or {})
        self.override_settings = dict(self.override_settings or {})
        self.comments = {} if self.comments is None else self.comments
        self.cached_c = StableDiffusionProcessing.cached_c
        self.cached_uc = StableDiffusionProcessing.cached_uc
        self.cached_refiner_c = StableDiffusionProcessing.cached_refiner_c
        self.cached_refiner_uc = StableDiffusionProcessing.cached_refiner_uc
        self._context = installed_context()
        self._options_when_made = snapshot_of_options(self._context)
        self._options_in_force: OptionsSnapshot | None = None

    # settings

    @property
    def context(self) -> JobContext:
        """What this job may use of the program. Raises RuntimeError for a request created before there was one."""
        return required_context() if self._context is None else self._context

    @property
    def options(self) -> OptionsSnapshot:
        """The settings of this job. Raises OptionError if override_settings contains an invalid value."""
        if self._options_in_force is not None:
            return self._options_in_force
        return self._options_when_made.with_overrides(self.override_settings)

    def fix_options(self) -> OptionsSnapshot:
        """Freeze the settings: later changes of override_settings have no effect. Raises OptionError."""
        self._options_in_force = None
        self._options_in_force = self.options
        return self._options_in_force

    def change_options(self, overrides: Mapping[str, Any]) -> None:
        """Apply `overrides` on top of the running job's settings. Raises OptionError."""
        self._options_in_force = self.options.with_overrides(overrides)

    def fill_fields_from_opts(self) -> None:
        """Fill empty fields from the settings with the same name."""
        for name in ("s_churn", "s_tmin", "s_noise", "s_min_uncond", "ddim_discretize", "restore_faces", "tiling"):
            if getattr(self, name) is None:
                setattr(self, name, self.options["face_restoration" if name == "restore_faces" else name])
        if self.s_tmax is None:
            self.s_tmax = self.options.s_tmax
        self.job_timestamp = self.job_timestamp or datetime.datetime.now().strftime("%Y%m%d%H%M%S")

    # scripts

    @property
    def scripts(self) -> Any:
        return self.scripts_value

    @scripts.setter
    def scripts(self, value: Any) -> None:
        self.scripts_value = value
        self._set_up_scripts_when_complete()

    @property
    def script_args(self) -> Any:
        return self.script_args_value

    @script_args.setter
    def script_args(self, value: Any) -> None:
        self.script_args_value = value
        self._set_up_scripts_when_complete()

    def _set_up_scripts_when_complete(self) -> None:
        if self.scripts_value and self.script_args_value and not self.scripts_setup_complete:
            self.setup_scripts()

    def setup_scripts(self) -> None:
        self.scripts_setup_complete = True
        self.scripts_value.setup_scrips(self, is_ui=not self.is_api)

    def run_hook(self, name: str, **kwargs: Any) -> None:
        """Call the script host's hook `name`, if there is a host."""
        if self.scripts is not None:
            getattr(self.scripts, name)(self, **kwargs)

    def run_hook_with(self, name: str, argument: Any, **kwargs: Any) -> None:
        """Call a hook that takes one more value after the request."""
        if self.scripts is not None:
            getattr(self.scripts, name)(self, argument, **kwargs)

    # prompts and conditions

    def comment(self, text: str) -> None:
        """A message to the user about this job; shown next to the pictures."""
        if text not in self.comments:
            log.warning("%s", text)
        self.comments[text] = 1

    def clear_prompt_cache(self) -> None:
        for name in ("cached_c", "cached_uc", "cached_refiner_c", "cached_refiner_uc"):
            setattr(self, name, [None, None])
            setattr(StableDiffusionProcessing, name, [None, None])

    @a1111_method
    def setup_prompts(self) -> None:
        from modules.processing.conditions import setup_prompts  # for extensions; our steps call it directly

        setup_prompts(self)

    @a1111_method
    def parse_extra_network_prompts(self) -> None:
        from modules.processing.conditions import parse_extra_network_prompts  # for extensions; our steps call it directly

        parse_extra_network_prompts(self)

    @a1111_method
    def setup_conds(self) -> None:
        from modules.processing.conditions import setup_conditions  # for extensions; our steps call it directly

        setup_conditions(self)

    def get_conds(self) -> tuple[Any, Any]:
        return self.c, self.uc

    # image conditioning of inpainting models

    @a1111_method
    def txt2img_image_conditioning(self, x: Tensor, width: int | None = None, height: int | None = None) -> Tensor:
        from modules.processing.image_conditions import condition_on_nothing  # imports torch

        return condition_on_nothing(self, x, width, height)

    @a1111_method
    def img2img_image_conditioning(
        self, source_image: Tensor | None, latent_image: Tensor, image_mask: Any = None, round_image_mask: bool = True
    ) -> Tensor:
        from modules.processing.image_conditions import condition_on_picture  # imports torch

        return condition_on_picture(self, source_image, latent_image, image_mask, round_image_mask)

    # steps

    def init(self, all_prompts: Sequence[str], all_seeds: Sequence[int], all_subseeds: Sequence[int]) -> None:
        """Prepare what all batches share."""

    def sample(
        self,
        conditioning: Any,
        unconditional_conditioning: Any,
        seeds: Sequence[int],
        subseeds: Sequence[int],
        subseed_strength: float,
        prompts: Sequence[str],
    ) -> Any:
        """The latents (or decoded pixels) of one batch."""
        raise NotImplementedError("a request is txt2img or img2img")

    def save_samples(self) -> bool:
        """Whether pictures of this job are currently saved."""
        state = self.context.state
        complete = not (state.interrupted or state.skipped) or self.options.save_incomplete_images
        return bool(self.options.samples_save and not self.do_not_save_samples and complete)

    def get_token_merging_ratio(self, for_hr: bool = False) -> float:
        return float((self.token_merging_ratio_hr if for_hr else 0) or self.token_merging_ratio or self.options.token_merging_ratio)

    def close(self) -> None:
        """End of the job: release conditions and the sampler."""
        self.sampler = None
        self.image_conditioning_source = None
        self.c = None
        self.uc = None
        if not self.options.persistent_cond_cache:
            self.clear_prompt_cache()


def _engine_of(p: StableDiffusionProcessing) -> Any:
    context = p._context
    return p._engine if p._engine is not None or context is None else context.models.engine


def _set_engine(p: StableDiffusionProcessing, engine: Any) -> None:
    p._engine = engine


# `sd_model` is the engine of this job; before the job runs, the current engine
StableDiffusionProcessing.sd_model = property(_engine_of, _set_engine)


@dataclass(repr=False, eq=False)
class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    """Pictures from a prompt, with hires fix as a second pass."""

    enable_hr: bool = False
    denoising_strength: float | None = 0.75
    firstphase_width: int = 0
    firstphase_height: int = 0
    hr_scale: float = 2.0
    hr_upscaler: str | None = None
    hr_second_pass_steps: int = 0
    hr_resize_x: int = 0
    hr_resize_y: int = 0
    hr_checkpoint_name: str | None = None
    hr_additional_modules: list[str] | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str | list[str] = ""
    hr_negative_prompt: str | list[str] = ""
    hr_cfg: float = 1.0
    hr_distilled_cfg: float = 3.5
    force_task_id: str | None = None

    hr_checkpoint_info: Any = field(default=None, init=False)
    hr_upscale_to_x: int = field(default=0, init=False)
    hr_upscale_to_y: int = field(default=0, init=False)
    truncate_x: int = field(default=0, init=False)
    truncate_y: int = field(default=0, init=False)
    applied_old_hires_behavior_to: tuple[int, int] | None = field(default=None, init=False)
    latent_scale_mode: dict[str, Any] | None = field(default=None, init=False)
    hr_c: Any = field(default=None, init=False)
    hr_uc: Any = field(default=None, init=False)
    all_hr_prompts: list[str] = field(default_factory=list, init=False)
    all_hr_negative_prompts: list[str] = field(default_factory=list, init=False)
    hr_prompts: list[str] = field(default_factory=list, init=False)
    hr_negative_prompts: list[str] = field(default_factory=list, init=False)
    hr_extra_network_data: dict[str, Any] = field(default_factory=dict, init=False)
    txt2img_upscale: bool = field(default=False, init=False)

    cached_hr_c = [None, None]
    cached_hr_uc = [None, None]

    def __post_init__(self, sd_model: Any) -> None:  # type: ignore[override]  # see the field
        super().__post_init__(sd_model)
        self.cached_hr_c = StableDiffusionProcessingTxt2Img.cached_hr_c
        self.cached_hr_uc = StableDiffusionProcessingTxt2Img.cached_hr_uc

    def clear_prompt_cache(self) -> None:
        super().clear_prompt_cache()
        self.cached_hr_c = [None, None]
        self.cached_hr_uc = [None, None]
        StableDiffusionProcessingTxt2Img.cached_hr_c = [None, None]
        StableDiffusionProcessingTxt2Img.cached_hr_uc = [None, None]

    @a1111_method
    def calculate_target_resolution(self) -> None:
        from modules.processing.hires import plan_target_size  # for extensions; our steps call it directly

        plan_target_size(self)

    @a1111_method
    def init(self, all_prompts: Sequence[str], all_seeds: Sequence[int], all_subseeds: Sequence[int]) -> None:
        from modules.processing.txt2img import prepare_txt2img  # imports torch

        prepare_txt2img(self)

    @a1111_method
    def sample(
        self,
        conditioning: Any,
        unconditional_conditioning: Any,
        seeds: Sequence[int],
        subseeds: Sequence[int],
        subseed_strength: float,
        prompts: Sequence[str],
    ) -> Any:
        from modules.processing.txt2img import sample_txt2img  # imports torch

        return sample_txt2img(self, conditioning, unconditional_conditioning)

    @a1111_method
    def sample_hr_pass(
        self,
        samples: Tensor,
        decoded_samples: Tensor | None,
        seeds: Sequence[int],
        subseeds: Sequence[int],
        subseed_strength: float,
        prompts: Sequence[str],
    ) -> Any:
        from modules.processing.hires import sample_hires_pass  # imports torch

        return sample_hires_pass(self, samples, decoded_samples)

    def close(self) -> None:
        super().close()
        self.hr_c = None
        self.hr_uc = None


@dataclass(repr=False, eq=False)
class StableDiffusionProcessingImg2Img(StableDiffusionProcessing):
    """Pictures made from a picture: all of it, or the part under a mask."""

    init_images: list[Any] | None = None
    resize_mode: int = 0
    denoising_strength: float | None = 0.75
    image_cfg_scale: float | None = None
    mask: Any = None
    mask_blur_x: int = 4
    mask_blur_y: int = 4
    mask_blur: int | None = None
    mask_round: bool = True
    inpainting_fill: int = 0
    inpaint_full_res: bool = True
    inpaint_full_res_padding: int = 0
    inpainting_mask_invert: int | bool = 0
    initial_noise_multiplier: float | None = None
    latent_mask: Image.Image | None = None
    force_task_id: str | None = None
    hr_distilled_cfg: float = 3.5

    image_mask: Any = field(default=None, init=False)
    nmask: Any = field(default=None, init=False)
    image_conditioning: Any = field(default=None, init=False)
    init_img_hash: str | None = field(default=None, init=False)
    mask_for_overlay: Any = field(default=None, init=False)
    init_latent: Any = field(default=None, init=False)
    latent_before_noise: Any = field(default=None, init=False)

    def __post_init__(self, sd_model: Any) -> None:  # type: ignore[override]  # see the field
        super().__post_init__(sd_model)
        self.image_mask = self.mask
        self.mask = None

    @a1111_method
    def init(self, all_prompts: Sequence[str], all_seeds: Sequence[int], all_subseeds: Sequence[int]) -> None:
        from modules.processing.img2img import prepare_img2img  # imports torch

        prepare_img2img(self)

    @a1111_method
    def sample(
        self,
        conditioning: Any,
        unconditional_conditioning: Any,
        seeds: Sequence[int],
        subseeds: Sequence[int],
        subseed_strength: float,
        prompts: Sequence[str],
    ) -> Any:
        from modules.processing.img2img import sample_img2img  # imports torch

        return sample_img2img(self, conditioning, unconditional_conditioning)

    def get_token_merging_ratio(self, for_hr: bool = False) -> float:
        options = self.options
        return float(self.token_merging_ratio or options.token_merging_ratio_img2img or options.token_merging_ratio)


def _get_mask_blur(p: StableDiffusionProcessingImg2Img) -> int | None:
    return p.mask_blur_x if p.mask_blur_x == p.mask_blur_y else None


def _set_mask_blur(p: StableDiffusionProcessingImg2Img, value: Any) -> None:
    if isinstance(value, int):
        p.mask_blur_x = p.mask_blur_y = value


# one number for both directions; None if they differ. Setting None changes nothing.
StableDiffusionProcessingImg2Img.mask_blur = property(_get_mask_blur, _set_mask_blur)  # type: ignore[assignment]
