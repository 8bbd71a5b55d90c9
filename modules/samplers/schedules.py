"""Schedules by the names users know, plus those added by extensions. The formulas are in backend/sampling/schedules.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from backend.sampling.schedules import SCHEDULES, ScheduleSettings, compute_sigmas
from modules.errors import UnknownSamplerError
from modules.nearest_names import say_nearest


@dataclasses.dataclass
class Scheduler:
    """`function` takes n, sigma_min, sigma_max, device, and rho and inner_model if needed; it returns n + 1 noise levels."""

    name: str
    label: str
    function: Any
    default_rho: float = -1
    need_inner_model: bool = False
    aliases: list[str] | None = None

    def answers_to(self, text: str) -> bool:
        return text.lower() in (name.lower() for name in (self.name, self.label, *(self.aliases or ())))


def _callable_as_extensions_call_it(name: str) -> Callable[..., torch.Tensor]:
    def function(n: int, sigma_min: float, sigma_max: float, device: Any = "cpu", rho: float | None = None, inner_model: Any = None) -> torch.Tensor:
        settings = ScheduleSettings(sigma_min=float(sigma_min), sigma_max=float(sigma_max), rho=rho)
        return compute_sigmas(name, n, _predictor_of(inner_model), settings).to(device)

    return function


def _predictor_of(inner_model: Any) -> Any:
    """The noise table of the model passed by an extension; Stable Diffusion's if none is passed."""
    for candidate in (inner_model, getattr(inner_model, "predictor", None)):
        if hasattr(candidate, "sigmas") and hasattr(candidate, "timestep"):
            return candidate
    from backend.modules.k_prediction import Prediction  # only for a direct call without a model

    return Prediction()


schedulers: list[Scheduler] = [
    Scheduler(spec.name, spec.label, _callable_as_extensions_call_it(spec.name), spec.default_rho, spec.need_inner_model, list(spec.aliases) or None)
    for spec in SCHEDULES
]
BUILT_IN_NAMES = frozenset(spec.name for spec in SCHEDULES)


def find_scheduler(text: str | None) -> Scheduler:
    """The schedule with that name, label or alias; None means Automatic. Raises UnknownSamplerError."""
    if text in (None, ""):
        return schedulers[0]
    for scheduler in schedulers:
        if scheduler.answers_to(str(text)):
            return scheduler
    near = say_nearest(text, [scheduler.label for scheduler in schedulers])
    raise UnknownSamplerError(f"schedule {str(text)[:200]!r} is unknown; {near}.")


def __getattr__(name: str) -> Any:
    """`schedulers_map`: every name and label -> schedule, including those of extensions."""
    if name == "schedulers_map":
        return {**{scheduler.name: scheduler for scheduler in schedulers}, **{scheduler.label: scheduler for scheduler in schedulers}}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
