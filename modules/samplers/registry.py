"""The list of samplers: lookup by name or alias, hidden ones, creating one for a request. Extensions add to it with add_sampler().

Formulas and properties of the built-in ones are in backend/sampling/registry.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from backend.sampling.registry import SAMPLERS, SamplerSpec
from modules.errors import UnknownSamplerError
from modules.jobs.context import installed_context
from modules.nearest_names import say_nearest
from modules.samplers import schedules as sd_schedulers
from modules.samplers.entries import SamplerData, entry_of
from modules.samplers.schedules import Scheduler

if TYPE_CHECKING:
    from collections.abc import Mapping


def _construct(model: Any, spec: SamplerSpec) -> Any:
    from modules.samplers.kdiffusion import KDiffusionSampler  # imports the networks, which the page's list does not need

    return KDiffusionSampler(spec, model)


def built_in_samplers() -> list[SamplerData]:
    return [entry_of(spec, functools.partial(_construct, spec=spec)) for spec in SAMPLERS]


all_samplers: list[SamplerData] = built_in_samplers()
all_samplers_map: dict[str, SamplerData] = {sampler.name: sampler for sampler in all_samplers}
_SPECS = {spec.name: spec for spec in SAMPLERS}


def add_sampler(sampler: SamplerData) -> None:
    """Add an entry, replacing one with the same name."""
    if sampler.name in all_samplers_map:
        all_samplers[:] = [sampler if known.name == sampler.name else known for known in all_samplers]
    else:
        all_samplers.append(sampler)
    all_samplers_map[sampler.name] = sampler


def set_samplers() -> None:
    """Kept for extensions: does nothing, because the lists are computed when read."""


def _hidden_names() -> set[str]:
    app = installed_context()
    return set(app.options.hide_samplers) if app is not None else set()


def visible_samplers() -> list[SamplerData]:
    hidden = _hidden_names()
    return [sampler for sampler in all_samplers if sampler.name not in hidden]


def visible_sampler_names() -> list[str]:
    return [sampler.name for sampler in visible_samplers()]


def find_sampler_config(name: str | None) -> SamplerData | None:
    """The entry with that name or alias, ignoring case; the first entry for None; None for an unknown name."""
    if name in (None, ""):
        return all_samplers[0]
    wanted = str(name).lower()
    return all_samplers_map.get(str(name)) or next(
        (sampler for sampler in all_samplers if wanted in (known.lower() for known in (sampler.name, *sampler.aliases))), None
    )


def create_sampler(name: str | None, model: Any) -> Any:
    """A sampler for one pass. Raises UnknownSamplerError."""
    config = find_sampler_config(name)
    if config is None:
        raise UnknownSamplerError(unknown_sampler_message(str(name)))
    sampler = config.constructor(model)
    sampler.config = config
    return sampler


def needs_uncond(name: str | None) -> bool:
    """Whether the sampler uses the negative prompt's prediction at any CFG scale."""
    config = find_sampler_config(name)
    return config is not None and config.name in _SPECS and _SPECS[config.name].needs_uncond


def unknown_sampler_message(name: str) -> str:
    return f"sampler {name[:200]!r} is unknown; {say_nearest(name, [sampler.name for sampler in all_samplers])}."


def get_sampler_and_scheduler(sampler_name: str | None, scheduler_name: str | None, *, convert_automatic: bool = True) -> tuple[str, str]:
    """(sampler, schedule label) by their proper names. A schedule after the sampler's name ("Euler a Karras") is split off.

    `convert_automatic`: report a sampler's own schedule as Automatic. Raises UnknownSamplerError."""
    scheduler = sd_schedulers.find_scheduler(scheduler_name)
    config = find_sampler_config(sampler_name)
    if config is None:
        bare_name, named = _split_scheduler(str(sampler_name))
        config = find_sampler_config(bare_name) if named is not None else None
        scheduler = named or scheduler
    if config is None:
        raise UnknownSamplerError(unknown_sampler_message(str(sampler_name)))
    if convert_automatic and config.options.get("scheduler") == scheduler.name:
        scheduler = sd_schedulers.schedulers[0]
    return config.name, scheduler.label


def _split_scheduler(name: str) -> tuple[str, Scheduler | None]:
    """("Euler a", Karras) for "Euler a Karras"; (name, None) if the name does not end in a schedule."""
    endings: Iterable[tuple[str, Scheduler]] = (
        (text, scheduler) for scheduler in sd_schedulers.schedulers for text in (scheduler.label, scheduler.name, *(scheduler.aliases or ()))
    )
    for text, scheduler in sorted(endings, key=lambda ending: -len(ending[0])):
        if name.lower().endswith(f" {text.lower()}"):
            return name[: -len(text) - 1], scheduler
    return name, None


# From infotext pairs


def get_sampler_from_infotext(d: Mapping[str, Any]) -> str:
    return get_sampler_and_scheduler(d.get("Sampler"), d.get("Schedule type"))[0]


def get_scheduler_from_infotext(d: Mapping[str, Any]) -> str:
    return get_sampler_and_scheduler(d.get("Sampler"), d.get("Schedule type"))[1]


def get_hr_sampler_and_scheduler(d: Mapping[str, Any]) -> tuple[str, str]:
    """Sampler and schedule of the second pass; "Use same sampler" and "Use same scheduler" if they equal the first pass's."""
    hr_sampler, hr_scheduler = d.get("Hires sampler", "Use same sampler"), d.get("Hires schedule type", "Use same scheduler")
    sampler = d.get("Sampler") if hr_sampler == "Use same sampler" else hr_sampler
    scheduler = d.get("Schedule type") if hr_scheduler == "Use same scheduler" else hr_scheduler
    sampler, scheduler = get_sampler_and_scheduler(sampler, scheduler)
    return ("Use same sampler" if sampler == d.get("Sampler") else sampler), (
        "Use same scheduler" if scheduler == d.get("Schedule type") else scheduler
    )


def get_hr_sampler_from_infotext(d: Mapping[str, Any]) -> str:
    return get_hr_sampler_and_scheduler(d)[0]


def get_hr_scheduler_from_infotext(d: Mapping[str, Any]) -> str:
    return get_hr_sampler_and_scheduler(d)[1]


def fix_p_invalid_sampler_and_scheduler(p: Any) -> None:
    """Replace the request's names with their proper form. Raises UnknownSamplerError."""
    p.sampler_name, p.scheduler = get_sampler_and_scheduler(p.sampler_name, p.scheduler)


def __getattr__(name: str) -> Any:
    """`samplers`, `samplers_for_img2img` (visible ones), `samplers_map` (any name -> name) and `samplers_hidden`."""
    if name in ("samplers", "samplers_for_img2img"):
        return visible_samplers()
    if name == "samplers_hidden":
        return _hidden_names()
    if name == "samplers_map":
        return {text.lower(): sampler.name for sampler in all_samplers for text in (sampler.name, *sampler.aliases)}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
