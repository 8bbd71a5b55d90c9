"""The request field `infotext`: parameters as text, for fields that the body does not set itself.

If the text names something that does not exist here (checkpoint, VAE, upscaler, sampler), the current choice stays and a comment says so,
because the text may come from elsewhere. Fields set in the body itself are validated as always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from modules.api import models
from modules.api.settings import check_settings, find_checkpoint
from modules.errors import RequestError
from modules.infotext import parameters
from modules.infotext.fields import FIELDS_BY_TAB
from modules.pictures.upscaler import find_upscaler
from modules.pictures.upscaler_list import available_upscalers
from modules.scripts import callbacks

if TYPE_CHECKING:
    from modules.application import Application

RequestT = TypeVar("RequestT", bound=models.GenerationRequest)

_SAME_AS_BEFORE = {"Use same sampler", "Use same scheduler", "Use same checkpoint"}
_NO_CHECKPOINT = ("None", "none")
_FALLEN_WITH = {"refiner_checkpoint": ("enable_refiner", "refiner_switch_at")}
"""Fields that are meaningless without another field."""


def apply_infotext(app: Application, tab: str, body: RequestT) -> tuple[RequestT, list[str]]:
    """(the body with unset fields filled from its `infotext`, comments); other infotext keys become override_settings.

    Raises RequestError for an infotext with values that a request cannot have.
    """
    if not body.infotext:
        return body, []
    params = parameters.parse_generation_parameters(body.infotext, [])
    callbacks.infotext_pasted_callback(body.infotext, params)
    explicit = body.model_dump(include=body.model_fields_set)
    read = {field.field: value for field in FIELDS_BY_TAB[tab] if (value := _field_value(field.read(params))) is not None}
    known = {name: value for name, value in read.items() if name in type(body).model_fields and name not in explicit}
    if "sampler_index" in body.model_fields_set:
        known.pop("sampler_name", None)
    comments = _leave_out_unknown(app, known)
    asked = body.override_settings or {}
    overrides = _known_overrides(app, params, asked, comments)
    merged = {**known, **explicit, "override_settings": {**overrides, **asked}}
    try:
        return type(body)(**merged), comments
    except ValidationError as error:
        entries = "; ".join(f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors())
        raise RequestError(f"infotext: {entries}.") from None


def _field_value(value: Any) -> Any:
    return None if value in ("", *_SAME_AS_BEFORE) else value


def _leave_out_unknown(app: Application, fields: dict[str, Any]) -> list[str]:
    """Remove fields that name something unknown; returns a comment for each."""
    from modules.samplers import registry, schedules  # imports torch; server startup does not wait for it

    def find_any_upscaler(name: str) -> None:
        from modules.processing import LATENT_UPSCALE_MODES  # imports torch

        if name not in LATENT_UPSCALE_MODES:
            find_upscaler(name, available_upscalers())

    checks: dict[str, Callable[[str], object]] = {
        "refiner_checkpoint": lambda name: name in _NO_CHECKPOINT or find_checkpoint(app, name),
        "hr_checkpoint_name": lambda name: find_checkpoint(app, name),
        "hr_upscaler": find_any_upscaler,
        "sampler_name": lambda name: registry.get_sampler_and_scheduler(name, None),
        "hr_sampler_name": lambda name: registry.get_sampler_and_scheduler(name, None),
        "scheduler": schedules.find_scheduler,
        "hr_scheduler": schedules.find_scheduler,
    }
    comments = _leave_out_unknown_modules(app, fields)
    for name in [name for name in checks if name in fields]:
        try:
            checks[name](str(fields[name]))
        except RequestError as error:
            comments.append(f"infotext: {name} {str(fields[name])!r} was ignored: {error}")
            for gone in (name, *_FALLEN_WITH.get(name, ())):
                fields.pop(gone, None)
    return comments


def _leave_out_unknown_modules(app: Application, fields: dict[str, Any]) -> list[str]:
    try:
        app.additional_modules.chosen_by({"forge_additional_modules": fields.get("hr_additional_modules") or []})
    except RequestError as error:
        return [f"infotext: hr_additional_modules {fields.pop('hr_additional_modules')!r} was left out: {error}"]
    return []


def _known_overrides(app: Application, params: Mapping[str, Any], asked: Iterable[str], comments: list[str]) -> dict[str, Any]:
    """The infotext's settings that differ and are available, except those the client sets itself."""
    found: dict[str, Any] = {}
    for key, setting, value in parameters.get_override_settings(params):
        if setting in asked:
            continue
        try:
            checked = check_settings(app, {setting: value})
            app.additional_modules.chosen_by(checked)
        except RequestError as error:
            comments.append(f"infotext: {key} {str(value)!r} was ignored: {error}")
            continue
        found[setting] = value
    if "sd_model_checkpoint" not in asked and (missing := _missing_checkpoint(app, params)):
        comments.append(f"infotext: checkpoint {missing!r} does not exist here; the selected one is used.")
    if "forge_additional_modules" not in asked and (gone := parameters.missing_modules(params, app)):
        comments.append(f"infotext: modules {', '.join(gone)} do not exist here and were ignored.")
    return found


def _missing_checkpoint(app: Application, params: Mapping[str, Any]) -> str | None:
    """The infotext's name for its checkpoint, if no file here matches."""
    names = [str(params[key]) for key in ("Model", "Model hash") if params.get(key)]
    return names[0] if names and not any(app.checkpoints.find(name) for name in names) else None
