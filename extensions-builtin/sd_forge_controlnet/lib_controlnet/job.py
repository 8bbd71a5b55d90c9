"""Units in a job: parsed from script arguments, prepared once, added to the chain before each pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from backend.patcher.controlnet import ControlNetError, soft_weights, zero_weights
from backend.patcher.latent_controlnet import SOFT_WEIGHT, HintEncoder, even_weights
from lib_controlnet import api, global_state
from lib_controlnet.enums import ControlMode, ControlNetUnionControlType, HiResFixOption
from lib_controlnet.external_code import ControlNetUnit
from lib_controlnet.hints import Hint, make_hints, stack_hints
from modules import shared
from modules.errors import RequestError
from modules.processing.latents import latent_format_of


@dataclass
class ActiveUnit:
    """An enabled unit of a job, with its model and hints: one for all pictures, or one for each.

    `features`: what the model extracted from the hints for the passes."""

    number: int
    unit: ControlNetUnit
    preprocessor: Any
    model: Any
    hints: list[Hint]
    features: Any = None


def read_units(args: Any) -> list[ControlNetUnit]:
    """The units in the script's arguments: objects from the page, the API, or other extensions. Raises RequestError."""
    units = []
    for number, value in enumerate(args):
        if isinstance(value, Mapping):
            units.append(ControlNetUnit.from_dict(value))
        elif hasattr(value, "module") and hasattr(value, "model"):
            unit = ControlNetUnit.from_dict(vars(value))
            units.append(unit)
        elif value is not None:
            raise RequestError(f"ControlNet unit {number} is {value!r}; send an object with the unit's fields.")
    return units


def prepare_unit(p: Any, unit: ControlNetUnit, number: int) -> ActiveUnit:
    """The unit's preprocessor, model and hint. Raises RequestError."""
    preprocessor = global_state.get_preprocessor(unit.module)
    if preprocessor is None:
        raise RequestError(api.unknown_module(unit.module))
    unit.module = preprocessor.name
    needs_model = not preprocessor.do_not_need_model
    if needs_model and unit.model.lower() == "none":
        raise RequestError(f"ControlNet unit {number} is enabled but has no model. Choose one, or disable the unit.")
    model = global_state.load_model(unit.model, keep=int(shared.opts.control_net_model_cache_size)) if needs_model else None
    if model is not None:
        path = global_state.get_controlnet_filename(unit.model)
        unit.model = next((title for title, known in global_state.controlnet_filename_dict.items() if known == path), unit.model)
    if not getattr(model, "needs_control_type", False):
        unit.union_control_type = None
    elif unit.union_control_type is None:
        unit.union_control_type = find_union_type(preprocessor, unit, number)
    return ActiveUnit(number, unit, preprocessor, model, make_hints(p, unit, preprocessor, number))


def find_union_type(preprocessor: Any, unit: ControlNetUnit, number: int) -> ControlNetUnionControlType:
    """The kind of hint that the preprocessor produces. Raises RequestError if unknown."""
    for tag in preprocessor.tags:
        try:
            return ControlNetUnionControlType.read(tag)
        except ValueError:
            continue
    known = ", ".join(repr(one.value) for one in ControlNetUnionControlType)
    raise RequestError(
        f"ControlNet unit {number}: {unit.model} accepts several kinds of hints, and the preprocessor {preprocessor.name!r} does not say which. "
        f"Send union_control_type, or choose a control type: {known}."
    )


def process_hint(p: Any, one: ActiveUnit) -> None:
    """Let the unit's model process its hints before the first pass. Raises RequestError."""
    if one.model is None:
        return
    try:
        one.model.process_after_running_preprocessors(process=p, params=one)
    except ControlNetError as error:
        raise RequestError(str(error)) from error


def add_detected_map(p: Any, one: ActiveUnit) -> None:
    """Append the maps to the job's pictures, unless disabled in the settings."""
    if one.unit.save_detected_map and not shared.opts.control_net_no_detectmap:
        p.extra_result_images += [Image.fromarray(hint.picture) for hint in one.hints]


def acts_in_pass(unit: ControlNetUnit, p: Any) -> bool:
    """Whether a unit is active in this pass of hires fix."""
    if not getattr(p, "enable_hr", False):
        return True
    return unit.hr_option is not (HiResFixOption.LOW_RES_ONLY if p.is_hr_pass else HiResFixOption.HIGH_RES_ONLY)


def patch_pass(p: Any, one: ActiveUnit, x: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Resize hint and weights for the pass, and put the model at the head of the chain."""
    factor = latent_format_of(p.sd_model).factor
    cond, mask = stack_hints(one.hints, int(x.shape[3]) * factor, int(x.shape[2]) * factor)
    kwargs = {**kwargs, "unit": one.unit, "params": one, "cond_original": cond, "mask_original": mask}
    cond, mask = one.preprocessor.process_before_every_sampling(p, cond, mask, *args, **kwargs)
    model = one.model
    if model is None:
        return
    model.strength, model.start_percent, model.end_percent = one.unit.weight, one.unit.guidance_start, one.unit.guidance_end
    model.positive_advanced_weighting, model.negative_advanced_weighting = weights_of(one, p)
    if one.unit.union_control_type is not None:
        model.union_control_type = one.unit.union_control_type.number
    try:
        model.process_before_every_sampling(p, cond, mask, *args, **kwargs)
    except ControlNetError as error:
        raise RequestError(str(error)) from error


def weights_of(one: ActiveUnit, p: Any) -> tuple[Any, Any]:
    """Weights of the positive and negative branch for the unit's control mode."""
    is_transformer = isinstance(getattr(one.model, "model_patcher", None), HintEncoder)
    soft = even_weights(SOFT_WEIGHT) if is_transformer else soft_weights(is_sdxl=bool(getattr(p.sd_model, "is_sdxl", False)))
    if one.preprocessor.use_soft_projection_in_hr_fix and p.is_hr_pass:
        return soft, soft
    if one.unit.control_mode is ControlMode.PROMPT:
        return soft, soft
    return (soft, even_weights(0.0) if is_transformer else zero_weights()) if one.unit.control_mode is ControlMode.CONTROL else (None, None)
