"""Validates a request before anything is computed: ranges, names, settings. Computes no pictures.

Every mistake is a RequestError that says what was asked, what is allowed, and what to do.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

from modules.errors import RequestError, UnknownCheckpointError
from modules.processing.constants import opt_f
from modules.samplers import registry
from modules.settings.inert import find_inert, warn_once

if TYPE_CHECKING:
    from backend.families.latent_format import LatentFormat
    from modules.jobs.context import JobContext
    from modules.processing.request import StableDiffusionProcessing

MAX_SIDE_PX = 16384
MAX_PIXELS = 8192 * 8192
MAX_STEPS = 10_000
MAX_BATCH_SIZE = 512
MAX_BATCH_COUNT = 10_000
MAX_SEED = 2**64 - 1
SEED_RANGE = 4294967294
DEFAULT_REFINER_SWITCH = 0.8
"""The page's default; for requests that name a refiner but no switch point."""

_SAME_AS_FIRST = (None, "", "Use same sampler", "Use same scheduler")
_COUNT_LIMITS = {"steps": (1, MAX_STEPS), "batch_size": (1, MAX_BATCH_SIZE), "n_iter": (1, MAX_BATCH_COUNT)}
_SIDES = ("width", "height")
_NUMBER_LIMITS: dict[str, tuple[float, float]] = {
    "cfg_scale": (-1000, 1000),
    "denoising_strength": (0, 1),
    "subseed_strength": (0, 1),
    "eta": (0, 100),
    "s_churn": (0, math.inf),
    "s_tmin": (0, math.inf),
    "s_tmax": (0, math.inf),
    "s_noise": (0, 100),
    "s_min_uncond": (0, math.inf),
    "initial_noise_multiplier": (0, 100),
    "image_cfg_scale": (-1000, 1000),
    "hr_cfg": (-1000, 1000),
    "hr_scale": (0.01, 64),
    "refiner_switch_at": (0, 1),
}
_INT_LIMITS: dict[str, tuple[int, int]] = {
    "seed_resize_from_w": (-1, MAX_SIDE_PX),
    "seed_resize_from_h": (-1, MAX_SIDE_PX),
    "hr_second_pass_steps": (0, MAX_STEPS),
    "hr_resize_x": (0, MAX_SIDE_PX),
    "hr_resize_y": (0, MAX_SIDE_PX),
    "firstphase_width": (0, MAX_SIDE_PX),
    "firstphase_height": (0, MAX_SIDE_PX),
    "mask_blur_x": (0, 1024),
    "mask_blur_y": (0, 1024),
    "inpaint_full_res_padding": (0, MAX_SIDE_PX),
    "inpainting_fill": (0, 3),
    "resize_mode": (0, 3),
}


def validate_request(p: StableDiffusionProcessing, app: JobContext) -> None:
    """Check and complete the request, then freeze its settings. Raises RequestError."""
    _drop_unknown_checkpoint(p, app)
    p.fix_options()
    p.fill_fields_from_opts()
    _check_numbers(p)
    _check_size(p)
    _resolve_sampler(p)
    _choose_refiner(p, app)
    _name_what_is_missing(p)
    _name_inert_settings(p, app)


def _drop_unknown_checkpoint(p: StableDiffusionProcessing, app: JobContext) -> None:
    """Ignore an override with an unknown checkpoint (pasted infotexts contain such); the selected one stays."""
    wanted = p.override_settings.get("sd_model_checkpoint")
    if wanted is None:
        return
    app.checkpoints.refresh()
    if app.checkpoints.find(str(wanted)) is None:
        del p.override_settings["sd_model_checkpoint"]
        p.comment(f"override_settings: checkpoint {wanted!r} is not in {app.checkpoints.roots[0]}; the selected one is used.")


def _check_numbers(p: StableDiffusionProcessing) -> None:
    for name, (low, high) in {**_COUNT_LIMITS, **_INT_LIMITS}.items():
        if (value := getattr(p, name, None)) is not None:
            setattr(p, name, _whole(name, value, low, high))
    for name, limits in _NUMBER_LIMITS.items():
        if (value := getattr(p, name, None)) is not None:
            setattr(p, name, _number(name, value, *limits))


def _check_size(p: StableDiffusionProcessing) -> None:
    for name in _SIDES:
        side = _whole(name, getattr(p, name), opt_f, MAX_SIDE_PX)
        if side % opt_f:
            p.comment(f"{name} {side} is not a multiple of {opt_f}; {side // opt_f * opt_f} is used.")
        setattr(p, name, side // opt_f * opt_f)
    check_area(p.width, p.height)


def fit_size_to_model(p: StableDiffusionProcessing, latent: LatentFormat) -> None:
    """Round the sizes of both passes to whole cells of the model's latents, once the model is loaded and they are known."""
    for name in (*_SIDES, "hr_upscale_to_x", "hr_upscale_to_y"):
        side = getattr(p, name, 0)
        if side and side % latent.multiple_px:
            fitted = max(side // latent.multiple_px, 1) * latent.multiple_px
            p.comment(f"{name} {side} is not a multiple of {latent.multiple_px}, which this model requires; {fitted} is used.")
            setattr(p, name, fitted)


def check_area(width_px: int, height_px: int) -> None:
    """Raises RequestError for a picture above the program's size limit."""
    if max(width_px, height_px) > MAX_SIDE_PX or width_px * height_px > MAX_PIXELS:
        raise RequestError(
            f"A picture of {width_px}x{height_px} was requested; the limit is {MAX_SIDE_PX} pixels per side and {MAX_PIXELS // 10**6} megapixels."
        )


def _whole(name: str, value: Any, low: int, high: int) -> int:
    number = _number(name, value, low, high)
    if number != int(number):
        raise RequestError(f"{name}: {value} is not a whole number.")
    return int(number)


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise RequestError(f"{name}: expected a number, got {type(value).__name__}.")
    try:
        number = float(value)
    except ValueError:
        raise RequestError(f"{name}: expected a number, got {value[:80]!r}.") from None  # type: ignore[index]  # only text fails
    except OverflowError:  # a whole number of more than 308 digits
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high:
        raise RequestError(f"{name}: {str(value)[:80]} is outside {low}..{high}.")
    return value if isinstance(value, (int, float)) else number


def _resolve_sampler(p: StableDiffusionProcessing) -> None:
    """Replace sampler and schedule with their proper names. Raises UnknownSamplerError."""
    sampler, scheduler = registry.get_sampler_and_scheduler(p.sampler_name, p.scheduler, convert_automatic=False)
    _resolve_hires_sampler(p, sampler, scheduler)
    p.sampler_name, p.scheduler = registry.get_sampler_and_scheduler(sampler, scheduler)
    p.uses_ensd = bool(registry.all_samplers_map[p.sampler_name].options.get("uses_ensd"))


def _resolve_hires_sampler(p: Any, sampler: str, scheduler: str) -> None:
    """Sampler and schedule of the second pass; None for both if they equal the first pass's."""
    if not hasattr(p, "hr_sampler_name"):
        return
    own = {name: None if getattr(p, name) in _SAME_AS_FIRST else getattr(p, name) for name in ("hr_sampler_name", "hr_scheduler")}
    if not any(own.values()):
        p.hr_sampler_name = p.hr_scheduler = None
        return
    p.hr_sampler_name, p.hr_scheduler = registry.get_sampler_and_scheduler(own["hr_sampler_name"] or sampler, own["hr_scheduler"] or scheduler)


def _choose_refiner(p: StableDiffusionProcessing, app: JobContext) -> None:
    """Raises UnknownCheckpointError if the refiner does not exist."""
    p.refiner_checkpoint_info = None
    if p.refiner_checkpoint in (None, "", "None", "none"):
        return
    if p.refiner_switch_at is None:
        p.refiner_switch_at = DEFAULT_REFINER_SWITCH
    if p.refiner_switch_at >= 1:
        return
    app.checkpoints.refresh()
    p.refiner_checkpoint_info = app.checkpoints.find(p.refiner_checkpoint)
    if p.refiner_checkpoint_info is None:
        raise UnknownCheckpointError(
            f"refiner_checkpoint: there is no checkpoint {p.refiner_checkpoint!r} in {app.checkpoints.roots[0]}; leave it empty for no refiner."
        )


def _name_what_is_missing(p: StableDiffusionProcessing) -> None:
    """Requests for missing features run without them, and say so."""
    if p.restore_faces:
        p.restore_faces = False
        p.comment("restore_faces: face restoration is not available; faces stay unchanged.")


def _name_inert_settings(p: StableDiffusionProcessing, app: JobContext) -> None:
    """Report settings without effect: those of the request next to its pictures, the others once in the log."""
    defaults = {key: info.default for key, info in app.options.data_labels.items()}
    for sentence in find_inert(p.options, defaults, p.override_settings.keys()):
        p.comment(f"override_settings: {sentence}")
    warn_once(find_inert(p.options, defaults))


# Seeds


def get_fixed_seed(seed: Any) -> int:
    """The seed as a number; -1, None and "" give a random one. Raises RequestError for anything that is not a seed."""
    if seed in (None, ""):
        seed = -1
    try:
        number = int(seed, 0) if isinstance(seed, str) else int(seed)
    except (ValueError, TypeError, OverflowError):
        raise RequestError(f"seed: {str(seed)[:80]!r} is not a whole number; -1 asks for a random one.") from None
    if number > MAX_SEED:
        raise RequestError(f"seed: {number} is larger than {MAX_SEED}.")
    return random.randrange(SEED_RANGE) if number < 0 else number


def fix_seed(p: StableDiffusionProcessing) -> None:
    """Replace random seeds with numbers."""
    p.seed = get_fixed_seed(p.seed) if not isinstance(p.seed, list) else p.seed
    p.subseed = get_fixed_seed(p.subseed) if not isinstance(p.subseed, list) else p.subseed


def set_all_seeds(p: StableDiffusionProcessing) -> None:
    """One seed and one variation seed per picture. With a variation strength, all share the seed and only the variation seed counts up."""
    count = len(p.all_prompts)
    if isinstance(p.seed, list):
        p.all_seeds = [get_fixed_seed(seed) for seed in p.seed]
    else:
        p.all_seeds = [(int(p.seed) + (place if p.subseed_strength == 0 else 0)) & MAX_SEED for place in range(count)]
    if isinstance(p.subseed, list):
        p.all_subseeds = [get_fixed_seed(seed) for seed in p.subseed]
    else:
        p.all_subseeds = [(int(p.subseed) + place) & MAX_SEED for place in range(count)]
    for name, seeds in (("seed", p.all_seeds), ("subseed", p.all_subseeds)):
        if len(seeds) < count:
            raise RequestError(f"{name}: {len(seeds)} seeds were given for {count} pictures.")
