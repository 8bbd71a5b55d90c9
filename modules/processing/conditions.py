"""Turns a request's prompts into the conditions of a batch: styles, comments, extra networks, encoding, and the cache of the last encoding.

Must not know sampling or pictures. Functions take the request (`p`) and set its fields.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from backend.text_processing.chunks import PromptTooLongError
from backend.text_processing.composition import split_composition, strip_comments
from backend.text_processing.picture_chat_engine import NoVisionError
from modules.errors import RequestError
from modules.processing.model_facts import reads_pictures, reads_size, takes_distilled_guidance
from modules.prompts import extra_networks
from modules.prompts import schedules as prompt_parser
from modules.prompts.schedules import SdConditioning
from modules.samplers.registry import find_sampler_config, needs_uncond

if TYPE_CHECKING:
    from modules.processing.request import StableDiffusionProcessing, StableDiffusionProcessingTxt2Img

# settings that affect prompt encoding
_ENCODING_OPTIONS = (
    *("CLIP_stop_at_last_layers", "sdxl_clip_l_skip", "emphasis", "comma_padding_backtrack", "sdxl_crop_left", "sdxl_crop_top"),
    *("sdxl_refiner_low_aesthetic_score", "sdxl_refiner_high_aesthetic_score", "sd3_enable_t5"),
)
_SETTINGS_OF_ENGINES = (
    *("sdxl_crop_top", "sdxl_crop_left", "sdxl_refiner_low_aesthetic_score", "sdxl_refiner_high_aesthetic_score", "sd3_enable_t5"),
)
"""Attributes of engines whose families read them."""

log = logging.getLogger(__name__)
_told_of_t5: weakref.WeakSet[Any] = weakref.WeakSet()

MAX_PARTS = 128
"""Maximum number of parts joined by AND; each part is one row per picture in every step."""


def setup_prompts(p: StableDiffusionProcessing) -> None:
    """Set all_prompts and all_negative_prompts, one per picture of the job. Raises RequestError."""
    count = p.batch_size * p.n_iter
    if isinstance(p.prompt, list):
        p.all_prompts = list(p.prompt)
    elif isinstance(p.negative_prompt, list):
        p.all_prompts = [p.prompt] * len(p.negative_prompt)
    else:
        p.all_prompts = [p.prompt] * count
    p.all_negative_prompts = list(p.negative_prompt) if isinstance(p.negative_prompt, list) else [p.negative_prompt] * len(p.all_prompts)
    if not p.all_prompts or len(p.all_prompts) != len(p.all_negative_prompts):
        raise RequestError(
            f"{len(p.all_prompts)} prompts and {len(p.all_negative_prompts)} negative prompts were given; give one negative prompt per prompt."
        )
    p.all_prompts = [finish_prompt(p, prompt) for prompt in p.all_prompts]
    p.all_negative_prompts = [finish_prompt(p, prompt, negative=True) for prompt in p.all_negative_prompts]
    p.main_prompt, p.main_negative_prompt = p.all_prompts[0], p.all_negative_prompts[0]


def keep_networks_apart(p: StableDiffusionProcessing) -> None:
    """Make the batches of a job smaller until the prompts of each name the same extra networks with the same strengths: a batch has one set of them.

    Not for several initial pictures, which are one batch; the first prompt's networks are used for it.
    """
    if p.batch_size < 2 or len(set(p.all_prompts)) < 2 or len(getattr(p, "init_images", None) or ()) > 1:
        return
    networks = [extra_networks.parse_prompt(text)[1] for text in p.all_prompts]
    sizes = [size for size in range(p.batch_size, 0, -1) if p.batch_size % size == 0]
    size = next(size for size in sizes if all(one == networks[place - place % size] for place, one in enumerate(networks)))
    if size < p.batch_size:
        p.comment(f"The prompts name different extra networks, so pictures are made {size} at a time, not {p.batch_size}.")
        p.n_iter, p.batch_size = p.n_iter * (p.batch_size // size), size


def finish_prompt(p: StableDiffusionProcessing, prompt: str, *, negative: bool = False) -> str:
    """The prompt to encode: with the chosen styles, without comments."""
    whole = str(prompt).encode("utf-8", "replace").decode("utf-8")  # a page or script may send half of a surrogate pair, which has no token
    text = _with_styles(p, whole, negative)
    text = strip_comments(text) if p.options.enable_prompt_comments else text
    if not negative:
        _check_parts(text)
    return text


def _check_parts(prompt: str) -> None:
    """Raises RequestError if a prompt joins more parts with AND than allowed: each part is one row in every step."""
    num_parts = len(split_composition(prompt))
    if num_parts > MAX_PARTS:
        raise RequestError(f"prompt: {num_parts} parts are joined by AND; the limit is {MAX_PARTS}. Use fewer parts.")


def _with_styles(p: StableDiffusionProcessing, prompt: str, negative: bool) -> str:
    if not p.styles:
        return prompt
    styles = p.context.styles
    apply = styles.apply_negative_styles_to_prompt if negative else styles.apply_styles_to_prompt
    return apply(prompt, p.styles)


def parse_extra_network_prompts(p: StableDiffusionProcessing) -> None:
    """Move `<kind:name:...>` from the batch's prompts to extra_network_data."""
    p.prompts, p.extra_network_data = extra_networks.parse_prompts(p.prompts)


def apply_prompt_options(p: StableDiffusionProcessing) -> None:
    """Pass the job's settings to the engine's text encoding."""
    engine, options = p.sd_model, p.options
    engine.set_clip_skip(int(options.CLIP_stop_at_last_layers))
    engine.set_emphasis(options.emphasis)
    for text_engine in engine.text_engines:
        text_engine.comma_padding_backtrack = int(options.comma_padding_backtrack)
    for name in _SETTINGS_OF_ENGINES:
        if hasattr(engine, name):
            setattr(engine, name, options[name])
    if getattr(engine, "text_processing_engine_t5", None) is not None and hasattr(engine, "sd3_enable_t5"):
        _note_t5(p, bool(options.sd3_enable_t5))


def _note_t5(p: StableDiffusionProcessing, is_read: bool) -> None:
    """SD3's T5 is read if the setting says so, as in Forge."""
    if is_read:
        p.extra_generation_params["SD3 T5"] = True
    elif p.sd_model not in _told_of_t5:
        _told_of_t5.add(p.sd_model)
        log.info("SD3's T5 is loaded but not read. Turn on the setting 'Use the T5 text encoder' (sd3_enable_t5), or leave its file out.")


def setup_conditions(p: StableDiffusionProcessing) -> None:
    """Set `c` and `uc` of the batch. At CFG scale 1 the negative prompt is not encoded, because it does not affect the picture."""
    apply_prompt_options(p)
    facts = _facts(p, p.width, p.height, p.distilled_cfg_scale)
    prompts = SdConditioning(p.prompts, **facts)
    negative_prompts = SdConditioning(p.negative_prompts, **facts, is_negative_prompt=True)
    p.firstpass_steps = num_denoiser_calls(p.sampler_name, p.steps)
    p.step_multiplier = max(p.firstpass_steps // max(p.steps, 1), 1)
    p.c = _cached(p, prompt_parser.get_multicond_learned_conditioning, prompts, p.firstpass_steps, p.cached_c, p.extra_network_data)
    p.uc = None
    if p.cfg_scale != 1 or needs_uncond(p.sampler_name) or _is_weighted(p.c):
        p.uc = _cached(p, prompt_parser.get_learned_conditioning, negative_prompts, p.firstpass_steps, p.cached_uc, p.extra_network_data)


def setup_hires_conditions(p: StableDiffusionProcessingTxt2Img) -> None:
    """Set `hr_c` and `hr_uc` for the second pass of the batch."""
    if p.options.hires_fix_use_firstpass_conds:
        p.hr_c, p.hr_uc = p.c, p.uc
        return
    apply_prompt_options(p)
    facts = _facts(p, p.hr_upscale_to_x, p.hr_upscale_to_y, p.hr_distilled_cfg)
    prompts = SdConditioning(p.hr_prompts, **facts)
    negative_prompts = SdConditioning(p.hr_negative_prompts, **facts, is_negative_prompt=True)
    steps = num_denoiser_calls(p.hr_sampler_name or p.sampler_name, p.hr_second_pass_steps or p.steps)
    make_c, make_uc = prompt_parser.get_multicond_learned_conditioning, prompt_parser.get_learned_conditioning
    p.hr_c = _cached(p, make_c, prompts, p.firstpass_steps, p.cached_hr_c, p.hr_extra_network_data, hires_steps=steps)
    p.hr_uc = None
    if p.hr_cfg != 1 or needs_uncond(p.hr_sampler_name or p.sampler_name) or _is_weighted(p.hr_c):
        p.hr_uc = _cached(p, make_uc, negative_prompts, p.firstpass_steps, p.cached_hr_uc, p.hr_extra_network_data, hires_steps=steps)


def refiner_conditions(p: StableDiffusionProcessing) -> tuple[Any, Any]:
    """(conditions, negative conditions or None) of the current pass, for `p.sd_model` after the refiner replaced the first model mid-pass.

    They are cached separately from the first model's, so that the next batch finds both."""
    apply_prompt_options(p)
    hires: Any = p if p.is_hr_pass else None
    sampler_name = (hires and hires.hr_sampler_name) or p.sampler_name
    prompts, negative_prompts, data, hires_steps = _prompts_of_pass(p, sampler_name)
    make_c, make_uc = prompt_parser.get_multicond_learned_conditioning, prompt_parser.get_learned_conditioning
    c = _cached(p, make_c, prompts, p.firstpass_steps, p.cached_refiner_c, data, hires_steps)
    if (hires.hr_cfg if hires else p.cfg_scale) == 1 and not needs_uncond(sampler_name) and not _is_weighted(c):
        return c, None
    return c, _cached(p, make_uc, negative_prompts, p.firstpass_steps, p.cached_refiner_uc, data, hires_steps)


def _prompts_of_pass(p: Any, sampler_name: str | None) -> tuple[SdConditioning, SdConditioning, Any, int | None]:
    """(prompts, negative prompts, their extra networks, steps of the second pass) of the current pass."""
    if p.is_hr_pass and not p.options.hires_fix_use_firstpass_conds:
        texts, negative_texts, data = p.hr_prompts, p.hr_negative_prompts, p.hr_extra_network_data
        facts = _facts(p, p.hr_upscale_to_x, p.hr_upscale_to_y, p.hr_distilled_cfg)
        hires_steps: int | None = num_denoiser_calls(sampler_name, p.hr_second_pass_steps or p.steps)
    else:
        texts, negative_texts, data, hires_steps = p.prompts, p.negative_prompts, p.extra_network_data, None
        facts = _facts(p, p.width, p.height, p.distilled_cfg_scale)
    return SdConditioning(texts, **facts), SdConditioning(negative_texts, **facts, is_negative_prompt=True), data, hires_steps


def _facts(p: StableDiffusionProcessing, width_px: int, height_px: int, distilled_cfg_scale: float) -> dict[str, Any]:
    """What conditions may depend on beside the prompts, as SdConditioning takes it."""
    pictures = p.text_pictures if reads_pictures(p.sd_model) else ()
    return {"width": width_px, "height": height_px, "distilled_cfg_scale": distilled_cfg_scale, "pictures": pictures}


def _is_weighted(conditions: prompt_parser.MulticondLearnedConditioning) -> bool:
    """Whether AND weights do not sum to 1, so that the negative prompt matters even at CFG scale 1."""
    return any(abs(sum(part.weight for part in parts) - 1) > 1e-6 for parts in conditions.batch)


def num_denoiser_calls(sampler_name: str | None, steps: int) -> int:
    """Number of denoiser calls, which prompt schedules count: a second-order sampler calls the model twice per step."""
    config = find_sampler_config(sampler_name)
    return config.total_steps(steps) if config is not None else steps


def _cached(
    p: StableDiffusionProcessing,
    encode: Callable[..., Any],
    prompts: SdConditioning,
    steps: int,
    cache: list[Any],
    network_data: Any,
    hires_steps: int | None = None,
) -> Any:
    """The conditions of `prompts`, from `cache` ([key, conditions]) when nothing they depend on has changed.

    Only the distilled guidance of kept conditions is computed again: a slider must not bring a 9.5 GB text encoder back.
    """
    key = _cache_key(p, prompts, steps, hires_steps, network_data)
    if cache[0] is None or cache[0] != key:
        try:
            conditions = encode(p.sd_model, prompts, steps, hires_steps, p.options.use_old_scheduling)
        except (PromptTooLongError, NoVisionError) as error:
            raise RequestError(str(error)) from error
        cache[:] = [key, conditions, _take_text_params(p.sd_model)]
    _merge_text_params(p.extra_generation_params, cache[2] if len(cache) > 2 else {})
    if takes_distilled_guidance(p.sd_model) and prompts.distilled_cfg_scale is not None:
        return prompt_parser.with_guidance(cache[1], float(prompts.distilled_cfg_scale))
    return cache[1]


def _cache_key(p: StableDiffusionProcessing, prompts: SdConditioning, steps: int, hires_steps: int | None, network_data: Any) -> tuple[Any, ...]:
    engine = p.sd_model
    return (
        tuple(prompts),
        bool(prompts.is_negative_prompt),
        (prompts.width, prompts.height) if reads_size(engine) else None,
        tuple((picture.shape, hashlib.sha256(picture.tobytes()).digest()) for picture in prompts.pictures),
        (steps, hires_steps) if any("[" in prompt for prompt in prompts) else None,
        getattr(engine, "load_number", id(engine)),
        str(engine.current_lora_hash),
        engine.embeddings.fingerprint,
        p.options.use_old_scheduling,
        tuple(p.options[name] for name in _ENCODING_OPTIONS),
        _network_key(network_data),
    )


def _network_key(network_data: Any) -> tuple[Any, ...]:
    if not network_data:
        return ()
    return tuple((kind, tuple(tuple(params.items) for params in items)) for kind, items in sorted(network_data.items()))


def _take_text_params(engine: Any) -> dict[str, str]:
    """What the text engines report for the infotext about the prompts just encoded (embeddings, emphasis mode)."""
    params: dict[str, str] = {}
    for text_engine in engine.text_engines:
        _merge_text_params(params, text_engine.take_generation_params())
    return params


def _merge_text_params(params: dict[str, Any], more: dict[str, str]) -> None:
    """Merge lists ("TI", "TI hashes") without duplicates; for other keys the last value wins."""
    for key, value in more.items():
        if key.startswith("TI"):
            old = str(params.get(key, ""))
            params[key] = ", ".join(dict.fromkeys(part for part in (*old.split(", "), *value.split(", ")) if part))
        else:
            params[key] = value


def rows_of(values: Sequence[Any], iteration: int, batch_size: int) -> list[Any]:
    """The slice of `values` for batch `iteration`."""
    return list(values[iteration * batch_size : (iteration + 1) * batch_size])
