"""The axes of the X/Y/Z plot: what can be varied, how text is parsed into values, and how a value is put into a request.

Extensions add theirs to `axis_options` of scripts/xyz_grid.py, which imports these names.
"""

from __future__ import annotations

import csv
import io
import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from script_jobs import MAX_PROMPT_CHARS

from modules import sd_models, sd_samplers, sd_schedulers, sd_vae, shared
from modules.errors import RequestError

Apply = Callable[[Any, Any, Sequence[Any]], None]
"""(request, value, all values of the axis): puts the value into the request."""

MAX_VALUES = 1000
MAX_PERMUTED = 6
_NUMBER = r"[+-]?\d+(?:\.\d*)?|[+-]?\.\d+"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*-\s*({_NUMBER})(?:\s*\(\s*({_NUMBER})\s*\))?\s*")
_COUNTED_RANGE = re.compile(rf"\s*({_NUMBER})\s*-\s*({_NUMBER})\s*\[\s*(\d+)\s*\]\s*")
_SIZE = re.compile(r"\s*(\d{1,5})\s*[x:]\s*(\d{1,5})\s*")


def str_permutations(text: str) -> str:
    """Type of an axis that tries every order of its values."""
    return text


def apply_field(field: str) -> Apply:
    """Sets a field of the request."""

    def apply(p: Any, value: Any, values: Sequence[Any]) -> None:
        setattr(p, field, value)

    return apply


def apply_override(field: str, boolean: bool = False) -> Apply:
    """Overrides a setting for the request. `boolean`: the value is the text "True" or "False"."""

    def apply(p: Any, value: Any, values: Sequence[Any]) -> None:
        p.override_settings[field] = str(value).lower() == "true" if boolean else value

    return apply


def apply_prompt(p: Any, value: str, values: Sequence[str]) -> None:
    """Replaces the axis's first value with `value` in both prompts."""
    wanted = str(values[0])
    if wanted not in p.prompt and wanted not in p.negative_prompt:
        raise RequestError(f"X/Y/Z plot: Prompt S/R did not find {wanted[:100]!r} in a prompt. The axis replaces its first value there.")
    p.prompt, p.negative_prompt = (_replaced(text, wanted, value) for text in (p.prompt, p.negative_prompt))


def _replaced(text: str, wanted: str, value: str) -> str:
    """Raises RequestError if the text would become too long: its length may be the product of both."""
    length = len(text) + text.count(wanted) * (len(value) - len(wanted))
    if length > max(MAX_PROMPT_CHARS, len(text)):
        raise RequestError(f"X/Y/Z plot: Prompt S/R would make a prompt of {length} characters. Use at most {MAX_PROMPT_CHARS}.")
    return text.replace(wanted, value)


def apply_order(p: Any, value: Sequence[str], values: Sequence[Any]) -> None:
    """Reorders the tokens of `value` within the prompt to the order they have in `value`."""
    places = sorted((p.prompt.find(token), token) for token in value)
    missing = [token for place, token in places if place < 0]
    if missing:
        raise RequestError(f"X/Y/Z plot: Prompt order did not find {missing[0][:100]!r} in the prompt.")
    rest, prompt = p.prompt, ""
    for (_, old), new in zip(places, value):
        before, _, rest = rest.partition(old)
        prompt += before + new
    p.prompt = prompt + rest


def apply_size(p: Any, value: str, values: Sequence[str]) -> None:
    """Width and height from "512x768"."""
    match = _SIZE.fullmatch(value)
    if match is None:
        raise RequestError(f"X/Y/Z plot: {value[:100]!r} is not a size. Write it like 512x768.")
    p.width, p.height = int(match[1]), int(match[2])


def apply_styles(p: Any, value: str, values: Sequence[str]) -> None:
    p.styles = [*p.styles, *(name for name in value.split(",") if name)]


def apply_checkpoint(p: Any, value: str, values: Sequence[str]) -> None:
    p.override_settings["sd_model_checkpoint"] = sd_models.get_closet_checkpoint_match(value).title


def apply_vae(p: Any, value: str, values: Sequence[str]) -> None:
    p.override_settings["sd_vae"] = value


def do_nothing(p: Any, value: Any, values: Sequence[Any]) -> None:
    """The axis "Nothing"."""


def format_value(p: Any, option: AxisOption, value: Any) -> str:
    """The value as a label."""
    return str(round(value, 8) if isinstance(value, float) else value)


def format_value_add_label(p: Any, option: AxisOption, value: Any) -> str:
    """The axis and the value as a label."""
    return f"{option.label}: {format_value(p, option, value)}"


def format_value_join_list(p: Any, option: AxisOption, value: Sequence[str]) -> str:
    return ", ".join(value)


def format_nothing(p: Any, option: AxisOption, value: Any) -> str:
    return ""


def format_remove_path(p: Any, option: AxisOption, value: str) -> str:
    """The name of a file without its folder."""
    return re.split(r"[\\/]", value)[-1]


def _refuse_unknown(label: str, known: Sequence[str], values: Sequence[Any]) -> None:
    by_name = {name.lower() for name in known}
    unknown = [str(value) for value in values if str(value).lower() not in by_name]
    if unknown:
        raise RequestError(f"X/Y/Z plot: {label}: {unknown[0][:100]!r} is unknown. Choose from {', '.join(known)}.")


def confirm_samplers(p: Any, values: Sequence[Any]) -> None:
    """Raises RequestError for an unknown sampler."""
    _refuse_unknown("samplers", sampler_names(), [sd_samplers.samplers_map.get(str(value).lower(), value) for value in values])


def confirm_checkpoints(p: Any, values: Sequence[Any]) -> None:
    """Raises RequestError for an unknown checkpoint."""
    for value in values:
        if sd_models.get_closet_checkpoint_match(str(value)) is None:
            raise RequestError(f"X/Y/Z plot: there is no checkpoint {str(value)[:100]!r}; there are {', '.join(sd_models.checkpoint_tiles())}.")


def _confirm_choices(label: str, choices: Callable[[], Sequence[str]]) -> Callable[[Any, Sequence[Any]], None]:
    return lambda p, values: _refuse_unknown(label, choices(), values)


def sampler_names() -> list[str]:
    return [sampler.name for sampler in sd_samplers.all_samplers]


def schedule_names() -> list[str]:
    return [schedule.label for schedule in sd_schedulers.schedulers]


def upscaler_names() -> list[str]:
    return [*shared.latent_upscale_modes, *(upscaler.name for upscaler in shared.sd_upscalers)]


def vae_names() -> list[str]:
    return ["Automatic", "None", *sd_vae.vae_dict]


def style_names() -> list[str]:
    return list(shared.prompt_styles.styles)


def boolean_choice(reverse: bool = False) -> Callable[[], list[str]]:
    """ "True" and "False", for a setting that is on or off."""
    return lambda: ["False", "True"] if reverse else ["True", "False"]


@dataclass(slots=True)
class AxisOption:
    """One thing that can be varied. `type` parses a value; axes with a higher `cost` change less often; `choices` are the values offered."""

    label: str
    type: Callable[[str], Any]
    apply: Apply
    format_value: Callable[[Any, Any, Any], str] = format_value_add_label
    confirm: Callable[[Any, Sequence[Any]], None] | None = None
    cost: float = 0.0
    choices: Callable[[], Sequence[str]] | None = None
    prepare: Callable[[Sequence[str]], Sequence[Any]] | None = None
    is_img2img: bool | None = None


class AxisOptionImg2Img(AxisOption):
    """An axis that only img2img has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_img2img = True


class AxisOptionTxt2Img(AxisOption):
    """An axis that only txt2img has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_img2img = False


def build_axis_options() -> list[AxisOption]:
    """Everything this program can vary, in the order shown on the page."""
    samplers = {"format_value": format_value, "confirm": confirm_samplers, "choices": sampler_names}
    return [
        AxisOption("Nothing", str, do_nothing, format_value=format_nothing),
        AxisOption("Seed", int, apply_field("seed")),
        AxisOption("Var. seed", int, apply_field("subseed")),
        AxisOption("Var. strength", float, apply_field("subseed_strength")),
        AxisOption("Steps", int, apply_field("steps")),
        AxisOptionTxt2Img("Hires steps", int, apply_field("hr_second_pass_steps")),
        AxisOption("CFG Scale", float, apply_field("cfg_scale")),
        AxisOption("Distilled CFG Scale", float, apply_field("distilled_cfg_scale")),
        AxisOption("Prompt S/R", str, apply_prompt, format_value=format_value),
        AxisOption("Prompt order", str_permutations, apply_order, format_value=format_value_join_list),
        AxisOption("Sampler", str, apply_field("sampler_name"), **samplers),
        AxisOptionTxt2Img("Hires sampler", str, apply_field("hr_sampler_name"), **samplers),
        AxisOption("Checkpoint name", str, apply_checkpoint, format_remove_path, confirm_checkpoints, cost=1.0, choices=sd_models.checkpoint_tiles),
        AxisOption("Negative Guidance minimum sigma", float, apply_field("s_min_uncond")),
        AxisOption("Sigma Churn", float, apply_field("s_churn")),
        AxisOption("Sigma min", float, apply_field("s_tmin")),
        AxisOption("Sigma max", float, apply_field("s_tmax")),
        AxisOption("Sigma noise", float, apply_field("s_noise")),
        AxisOption(
            "Schedule type", str, apply_field("scheduler"), confirm=_confirm_choices("schedule types", schedule_names), choices=schedule_names
        ),
        AxisOption("Schedule min sigma", float, apply_override("sigma_min")),
        AxisOption("Schedule max sigma", float, apply_override("sigma_max")),
        AxisOption("Schedule rho", float, apply_override("rho")),
        AxisOption("Eta", float, apply_field("eta")),
        AxisOption("Clip skip", int, apply_override("CLIP_stop_at_last_layers")),
        AxisOption("Denoising", float, apply_field("denoising_strength")),
        AxisOptionTxt2Img(
            "Hires upscaler", str, apply_field("hr_upscaler"), confirm=_confirm_choices("upscalers", upscaler_names), choices=upscaler_names
        ),
        AxisOption("VAE", str, apply_vae, format_remove_path, cost=0.7, choices=vae_names),
        AxisOption("Styles", str, apply_styles, choices=style_names),
        AxisOption("UniPC Order", int, apply_override("uni_pc_order"), cost=0.5),
        AxisOption("Token merging ratio", float, apply_override("token_merging_ratio")),
        AxisOption("Token merging ratio high-res", float, apply_override("token_merging_ratio_hr")),
        AxisOption(
            "Always discard next-to-last sigma",
            str,
            apply_override("always_discard_next_to_last_sigma", boolean=True),
            choices=boolean_choice(reverse=True),
        ),
        AxisOption("SGM noise multiplier", str, apply_override("sgm_noise_multiplier", boolean=True), choices=boolean_choice(reverse=True)),
        AxisOption(
            "Refiner checkpoint", str, apply_field("refiner_checkpoint"), format_remove_path, confirm_checkpoints, 1.0, sd_models.checkpoint_tiles
        ),
        AxisOption("Refiner switch at", float, apply_field("refiner_switch_at")),
        AxisOption("Size", str, apply_size),
    ]


# Values from a text


def split_values(text: str) -> list[str]:
    """Splits a list at its commas, except inside quotation marks."""
    rows = csv.reader(io.StringIO(" ".join(text.splitlines())), skipinitialspace=True, strict=False)
    try:
        return [part.strip() for part in itertools.chain.from_iterable(rows) if part.strip()]
    except csv.Error as error:
        raise RequestError(f"X/Y/Z plot: values that begin with {text[:60]!r} cannot be read: {error}.") from error


def read_values(option: AxisOption, text: str, chosen: Sequence[str], *, csv_mode: bool) -> list[Any]:
    """The values of an axis: parsed from `text`, or `chosen` from its choices unless `csv_mode`. Raises RequestError.

    Numbers may be given as ranges: `1-5`, `1-10 (+3)`, `0-1 [5]` (five of them, ends included)."""
    if option.label == "Nothing":
        return [0]
    parts = list(chosen) if option.choices is not None and not csv_mode else split_values(text)
    if option.prepare is not None:
        parts = list(option.prepare(parts))
    _check_count(option, len(parts))
    values: list[Any] = parts
    if option.type in (int, float):
        values = [number for part in parts for number in _numbers(option, str(part))]
    elif option.type is str_permutations:
        if len(parts) > MAX_PERMUTED:
            raise RequestError(f"X/Y/Z plot: {option.label} has {len(parts)} parts. Use at most {MAX_PERMUTED}: every order is made.")
        values = list(itertools.permutations(parts))
    else:
        values = [option.type(part) for part in parts]
    _check_count(option, len(values))
    return values


def _numbers(option: AxisOption, part: str) -> list[Any]:
    make = option.type
    try:
        if match := _COUNTED_RANGE.fullmatch(part):
            first, last, count = float(match[1]), float(match[2]), int(match[3])
            _check_count(option, count)
            return [make(first + (last - first) * place / max(count - 1, 1)) for place in range(count)]
        if match := _RANGE.fullmatch(part):
            first, last = float(match[1]), float(match[2])
            step = float(match[3]) if match[3] else (1.0 if make is int or last >= first else -1.0)
            step = step if (last - first) * step >= 0 else -step
            count = int((last - first) / step + 1e-9) + 1 if step else 0
            _check_count(option, count)
            return [make(round(first + step * place, 10)) for place in range(count)]
        return [make(part)]
    except (ValueError, OverflowError) as error:  # int() of infinity overflows
        raise RequestError(f"X/Y/Z plot: {option.label}: {part[:100]!r} is neither a number nor a range like 1-5, 1-10 (+3) or 0-1 [5].") from error


def _check_count(option: AxisOption, count: int) -> None:
    if not 1 <= count <= MAX_VALUES:
        raise RequestError(f"X/Y/Z plot: {option.label} has {count} values. Give it 1 to {MAX_VALUES}, or choose Nothing.")


def fix_seeds(option: AxisOption, values: Sequence[Any]) -> list[Any]:
    """Replaces -1 on an axis of seeds with random numbers, once for all cells."""
    if option.label not in ("Seed", "Var. seed"):
        return list(values)
    return [random.randrange(2**32) if value in (None, "", -1) else value for value in values]
