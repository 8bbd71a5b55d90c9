"""Hires fix: size of the second pass, upscaling, and sampling. Writes to the request (`p`).

Shapes: B pictures, C channels, H W latent rows and columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modules.errors import RequestError, UnknownCheckpointError
from modules.pictures.resizing import resize_to
from modules.pictures.upscaler import find_upscaler
from modules.pictures.upscaler_list import available_upscalers
from modules.processing.compositing import old_hires_fix_first_pass_dimensions
from modules.processing.conditions import finish_prompt, rows_of, setup_hires_conditions
from modules.processing.constants import LATENT_UPSCALE_MODES, opt_f
from modules.processing.image_conditions import condition_on_picture
from modules.processing.latents import (
    DecodedSamples,
    decode_latent_batch,
    encode_pixels,
    latent_format_of,
    pil_to_pixels,
    pixels_to_pil,
    upscale_latent,
)
from modules.processing.model_facts import takes_distilled_guidance
from modules.processing.networks import activate_networks, prepare_networks, run_sampling_hook
from modules.processing.overrides import step_of
from modules.processing.refiner import refining
from modules.processing.result import create_infotext
from modules.processing.saving import save_or_comment
from modules.processing.validation import check_area
from modules.prompts import extra_networks
from modules.samplers import noise as rng
from modules.samplers import registry

if TYPE_CHECKING:
    from modules.processing.request import StableDiffusionProcessingTxt2Img

DEFAULT_LATENT_MODE = "Latent"
SAME_CHOICES = "Use same choices"
BUILT_IN = "Built-in"
NO_CHOICE = (None, "", "Use same checkpoint", "Use same sampler", "Use same scheduler")


def prepare_hires(p: StableDiffusionProcessingTxt2Img) -> None:
    """Set everything about the second pass that is known before the first. Raises RequestError."""
    options = p.options
    p.extra_generation_params["Denoising strength"] = p.denoising_strength
    _choose_upscaler(p)
    if options.use_old_hires_fix_width_height and p.applied_old_hires_behavior_to != (p.width, p.height):
        p.hr_resize_x, p.hr_resize_y = p.width, p.height
        p.hr_upscale_to_x, p.hr_upscale_to_y = p.width, p.height
        p.width, p.height = old_hires_fix_first_pass_dimensions(p.width, p.height)
        p.applied_old_hires_behavior_to = (p.width, p.height)
    if p.firstphase_width and p.firstphase_height:
        p.hr_resize_x, p.hr_resize_y = p.width, p.height
        p.width, p.height = (side // opt_f * opt_f for side in (p.firstphase_width, p.firstphase_height))
        p.firstphase_width = p.firstphase_height = 0
    step_of(p, "calculate_target_resolution", plan_target_size)()
    _choose_checkpoint(p)
    _choose_modules(p)
    _set_prompts(p)
    _note(p)
    state = p.context.state
    if not state.processing_has_refined_job_count and state.job_count == -1:
        state.job_count = p.n_iter * 2
        state.processing_has_refined_job_count = True


def _choose_upscaler(p: StableDiffusionProcessingTxt2Img) -> None:
    name = p.hr_upscaler or DEFAULT_LATENT_MODE
    p.latent_scale_mode = LATENT_UPSCALE_MODES.get(name)
    if p.latent_scale_mode is None and name != "None":
        _upscaler_called(name)
    p.hr_upscaler = name


def _upscaler_called(name: str) -> Any:
    """The upscaler with that name. Raises RequestError if there is none."""
    try:
        return find_upscaler(name, available_upscalers())
    except RequestError as error:
        raise RequestError(f"hr_upscaler: {error} Latent modes are {', '.join(LATENT_UPSCALE_MODES)}.") from error


def plan_target_size(p: StableDiffusionProcessingTxt2Img) -> None:
    """Set the size to which the first pass is upscaled, and how much to crop to get the requested size."""
    x, y = p.hr_resize_x, p.hr_resize_y
    p.truncate_x = p.truncate_y = 0
    if not x and not y:
        p.extra_generation_params["Hires upscale"] = p.hr_scale
        p.hr_upscale_to_x, p.hr_upscale_to_y = int(p.width * p.hr_scale), int(p.height * p.hr_scale)
    else:
        p.extra_generation_params["Hires resize"] = f"{x}x{y}"
        covers_x = y == 0 or (x > 0 and p.width / p.height <= x / y)
        if covers_x:
            p.hr_upscale_to_x, p.hr_upscale_to_y = x, x * p.height // p.width
        else:
            p.hr_upscale_to_x, p.hr_upscale_to_y = y * p.width // p.height, y
        if x and y:
            p.truncate_x = max(p.hr_upscale_to_x - x, 0) // opt_f
            p.truncate_y = max(p.hr_upscale_to_y - y, 0) // opt_f
    p.hr_upscale_to_x, p.hr_upscale_to_y = (max(side // opt_f, 1) * opt_f for side in (p.hr_upscale_to_x, p.hr_upscale_to_y))
    check_area(p.hr_upscale_to_x, p.hr_upscale_to_y)


def _choose_checkpoint(p: StableDiffusionProcessingTxt2Img) -> None:
    if p.hr_checkpoint_name in NO_CHOICE:
        return
    try:
        p.hr_checkpoint_info = p.context.checkpoints.require(p.hr_checkpoint_name)
    except UnknownCheckpointError as error:
        raise UnknownCheckpointError(f"hr_checkpoint_name: {error} Leave it empty to use the same checkpoint.") from error
    p.extra_generation_params["Hires checkpoint"] = p.hr_checkpoint_info.short_title


def _choose_modules(p: StableDiffusionProcessingTxt2Img) -> None:
    """Raises UnknownModuleError, before the first pass has cost anything."""
    if p.hr_additional_modules is None or SAME_CHOICES in p.hr_additional_modules:
        return
    files = p.context.additional_modules.chosen_by({"forge_additional_modules": p.hr_additional_modules})
    names = [path.stem for path in files] or [BUILT_IN]
    p.extra_generation_params.update({f"Hires Module {number}": name for number, name in enumerate(names, start=1)})


def _set_prompts(p: StableDiffusionProcessingTxt2Img) -> None:
    """Prompts of the second pass, one per picture; empty ones are copied from the first pass."""
    p.all_hr_prompts = _prompts_or(p, p.hr_prompt, p.all_prompts, negative=False)
    p.all_hr_negative_prompts = _prompts_or(p, p.hr_negative_prompt, p.all_negative_prompts, negative=True)


def _prompts_or(p: StableDiffusionProcessingTxt2Img, given: str | list[str], first_pass: list[str], *, negative: bool) -> list[str]:
    prompts = list(given) if isinstance(given, list) else [given] * len(first_pass)
    if len(prompts) != len(first_pass):
        raise RequestError(f"{len(prompts)} hires prompts were given for {len(first_pass)} pictures; give one, or one per picture.")
    return [finish_prompt(p, prompt, negative=negative) if prompt else other for prompt, other in zip(prompts, first_pass)]


def _note(p: StableDiffusionProcessingTxt2Img) -> None:
    params = p.extra_generation_params
    if p.hr_second_pass_steps:
        params["Hires steps"] = p.hr_second_pass_steps
    params["Hires upscaler"] = p.hr_upscaler
    if p.hr_sampler_name not in (None, p.sampler_name):
        params["Hires sampler"] = p.hr_sampler_name
    if p.hr_scheduler not in (None, p.scheduler):
        params["Hires schedule type"] = p.hr_scheduler
    if p.hr_cfg != p.cfg_scale:
        params["Hires CFG Scale"] = p.hr_cfg
    if takes_distilled_guidance(p.sd_model) and p.hr_distilled_cfg != p.distilled_cfg_scale:
        params["Hires Distilled CFG Scale"] = p.hr_distilled_cfg
    for key, prompts, first_pass in (
        ("Hires prompt", p.all_hr_prompts, p.all_prompts),
        ("Hires negative prompt", p.all_hr_negative_prompts, p.all_negative_prompts),
    ):
        if prompts != first_pass:
            params[key] = [prompt if prompt != other else None for prompt, other in zip(prompts, first_pass)]


# The second pass


def sample_hires_pass(p: StableDiffusionProcessingTxt2Img, samples_BCHW: Tensor, decoded_BCHW: Tensor | None) -> DecodedSamples | Tensor:
    """Upscale and sample again. Returns the first pass's latents if interrupted. Pixel upscalers use `decoded_BCHW` (-1..1)."""
    state = p.context.state
    state.nextjob()
    if state.interrupted or state.skipped:
        return samples_BCHW
    _save_first_pass(p, samples_BCHW, decoded_BCHW)
    p.is_hr_pass = True
    try:
        _use_model_of_second_pass(p)
        return _second_pass(p, samples_BCHW, decoded_BCHW)
    finally:
        p.is_hr_pass = False


def _second_pass(p: StableDiffusionProcessingTxt2Img, samples_BCHW: Tensor, decoded_BCHW: Tensor | None) -> DecodedSamples | Tensor:
    sampler_name = p.hr_sampler_name or p.sampler_name
    p.sampler = registry.create_sampler(sampler_name, p.sd_model)
    latents_BCHW, pixels_BCHW = _upscaled(p, samples_BCHW, decoded_BCHW)
    condition = step_of(p, "img2img_image_conditioning", condition_on_picture)
    conditioning = condition(None if pixels_BCHW is None else pixels_BCHW * 2 - 1, latents_BCHW)
    p.rng = rng.ImageRNG(
        tuple(latents_BCHW.shape[1:]),
        p.seeds,
        subseeds=p.subseeds,
        subseed_strength=p.subseed_strength,
        seed_resize_from_h=p.seed_resize_from_h,
        seed_resize_from_w=p.seed_resize_from_w,
        source=p.options.randn_source,
        eta_noise_seed_delta=int(p.options.eta_noise_seed_delta),
    )
    noise_BCHW = p.rng.first()
    activate_networks(p, p.hr_extra_network_data)
    setup_hires_conditions(p)
    p.run_hook("before_hr")
    prepare_networks(p)
    noise_BCHW = run_sampling_hook(p, latents_BCHW, noise_BCHW, p.hr_c, p.hr_uc)
    with refining(p):
        samples: Tensor = p.sampler.sample_img2img(
            p, latents_BCHW, noise_BCHW, p.hr_c, p.hr_uc, steps=p.hr_second_pass_steps or p.steps, image_conditioning=conditioning
        )
    p.sampler = None
    return samples


def _upscaled(p: StableDiffusionProcessingTxt2Img, samples_BCHW: Tensor, decoded_BCHW: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(latents of the second pass, its pixels 0..1 if they were made or an inpainting model needs them)."""
    width_px, height_px = p.hr_upscale_to_x, p.hr_upscale_to_y
    if decoded_BCHW is None:
        assert p.latent_scale_mode is not None
        factor = latent_format_of(p.sd_model).factor
        latents_BCHW = _cut(p, upscale_latent(samples_BCHW, width_px, height_px, p.latent_scale_mode, factor=factor), pixel_px=factor)
        pixels_BCHW = _pixels_for_inpainting(p, latents_BCHW)
        return latents_BCHW, pixels_BCHW
    upscaler = None if p.hr_upscaler in (None, "None") else _upscaler_called(p.hr_upscaler)
    pictures = []
    for index, decoded_CHW in enumerate(decoded_BCHW):
        picture = pixels_to_pil(decoded_CHW.add(1).div(2))
        p.batch_index = index
        pictures.append(resize_to(picture, width_px, height_px, upscaler))
    pixels_BCHW = _cut(p, pil_to_pixels(pictures), pixel_px=1)
    return encode_pixels(p.sd_model, pixels_BCHW), pixels_BCHW


def _pixels_for_inpainting(p: StableDiffusionProcessingTxt2Img, latents_BCHW: Tensor) -> Tensor | None:
    """Decode only for an inpainting model; other models do not use the pixels."""
    if not p.sd_model.is_inpaint:
        return None
    return torch.stack(decode_latent_batch(p.sd_model, latents_BCHW, check_for_nans=True)).add(1).div(2).clamp(0, 1)


def _cut(p: StableDiffusionProcessingTxt2Img, x_BCHW: Tensor, *, pixel_px: int) -> Tensor:
    """`x` with the excess cropped, half on each side. `truncate_x` and `truncate_y` count blocks of 8 picture pixels; one pixel of `x` spans
    `pixel_px` picture pixels."""
    left, top = (sides // 2 * opt_f // pixel_px for sides in (p.truncate_x, p.truncate_y))
    width, height = x_BCHW.shape[-1] - p.truncate_x * opt_f // pixel_px, x_BCHW.shape[-2] - p.truncate_y * opt_f // pixel_px
    return x_BCHW[..., top : top + height, left : left + width]


def _save_first_pass(p: StableDiffusionProcessingTxt2Img, samples_BCHW: Tensor, decoded_BCHW: Tensor | None) -> None:
    """Save the pictures of the first pass, if the settings say so."""
    if not (p.save_samples() and p.options.save_images_before_highres_fix):
        return
    decoded = decode_latent_batch(p.sd_model, samples_BCHW) if decoded_BCHW is None else decoded_BCHW
    for index, decoded_CHW in enumerate(decoded):
        picture = pixels_to_pil(decoded_CHW.add(1).div(2))
        place = p.iteration * p.batch_size + index
        info = create_infotext(p, p.all_prompts, p.all_seeds, p.all_subseeds, index=place)
        save_or_comment(
            p,
            picture,
            p.outpath_samples,
            "",
            p.seeds[index],
            p.prompts[index],
            p.options.samples_format,
            info=info,
            suffix="-before-highres-fix",
        )


def _use_model_of_second_pass(p: StableDiffusionProcessingTxt2Img) -> None:
    """Switch to the selected model, or to the requested hires checkpoint or modules; not to the refiner that may have ended the first pass.

    Each batch starts by selecting the model of the first pass again."""
    overrides: dict[str, Any] = {}
    if p.hr_checkpoint_info is not None:
        overrides["sd_model_checkpoint"] = p.hr_checkpoint_info.title
    if p.hr_additional_modules is not None and SAME_CHOICES not in p.hr_additional_modules:
        overrides["forge_additional_modules"] = list(p.hr_additional_modules)
    if overrides or p.refiner_checkpoint_info is not None:
        p.sd_model = p.context.models.ensure_loaded(p.options.with_overrides(overrides))


def prompts_of_batch(p: StableDiffusionProcessingTxt2Img) -> None:
    """Set the second pass's prompts for the current batch."""
    p.hr_prompts = rows_of(p.all_hr_prompts, p.iteration, p.batch_size)
    p.hr_negative_prompts = rows_of(p.all_hr_negative_prompts, p.iteration, p.batch_size)
    p.hr_prompts, p.hr_extra_network_data = extra_networks.parse_prompts(p.hr_prompts)
