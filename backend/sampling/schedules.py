"""Schedules: the noise levels for a sampler, as functions of the number of steps and the model's table.

Every schedule returns n descending levels followed by 0. Must not know samplers, networks or devices; everything is on the host.

Shapes: T = n + 1 noise levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backend.modules.k_prediction import AbstractPrediction

OLD_KARRAS_RANGE = (0.1, 10.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleSettings:
    """What a user may set. `sigma_min`, `sigma_max`, `rho`: None means the model's or the schedule's own value. `is_sdxl` picks the table of
    schedules that were fitted to a model family. `unshifted`: of a flow model, formulas that count in times leave out its shift, as Forge's
    do for Flux.1 (only what is picked from the model's table is shifted there)."""

    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None
    beta_alpha: float = 0.6
    beta_beta: float = 0.6
    is_sdxl: bool = False
    unshifted: bool = False

    def __post_init__(self) -> None:
        for name in ("sigma_min", "sigma_max", "rho", "beta_alpha", "beta_beta"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"The schedule setting {name} is {value}; it must be a finite number above 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleInputs:
    """The inputs of a schedule's formula: `sigma_min` and `sigma_max` with the user's overrides, the model's table, the settings."""

    num_steps: int
    sigma_min: float
    sigma_max: float
    rho: float
    predictor: AbstractPrediction
    settings: ScheduleSettings

    @property
    def table(self) -> Tensor:
        """The model's noise levels, ascending, on the host."""
        return self.predictor.sigmas.cpu()

    @property
    def counts_unshifted(self) -> bool:
        """Whether times are spaced without the model's shift."""
        return self.predictor.is_flow and self.settings.unshifted

    @property
    def is_model_range(self) -> bool:
        return self.settings.sigma_min is None and self.settings.sigma_max is None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleSpec:
    """A schedule by name. `default_rho` is -1 if the formula has none. `need_inner_model`: it reads the model's table.
    `is_fitted_to_diffusion`: its levels are a table for Stable Diffusion."""

    name: str
    label: str
    function: Callable[[ScheduleInputs], Tensor]
    default_rho: float = -1.0
    need_inner_model: bool = False
    is_fitted_to_diffusion: bool = False
    aliases: tuple[str, ...] = ()


def compute_sigmas(name: str, num_steps: int, predictor: AbstractPrediction, settings: ScheduleSettings | None = None) -> Tensor:
    """Noise levels (num_steps + 1,), fp32 on the host, descending, ending with 0. `name` is a name, label or alias.

    Raises: ValueError for an unknown schedule, fewer than one step, or a range with sigma_min above sigma_max.
    """
    settings, spec = settings or ScheduleSettings(), find_schedule(name)
    if num_steps < 1:
        raise ValueError(f"{num_steps} sampling steps were requested; there must be at least 1.")
    inputs = ScheduleInputs(
        num_steps=num_steps,
        sigma_min=settings.sigma_min or float(predictor.sigma_min),
        sigma_max=settings.sigma_max or float(predictor.sigma_max),
        rho=settings.rho or spec.default_rho,
        predictor=predictor,
        settings=settings,
    )
    if predictor.is_flow:
        _check_flow(spec, inputs)
    if inputs.sigma_min >= inputs.sigma_max:
        raise ValueError(f"A schedule from sigma {inputs.sigma_max} down to {inputs.sigma_min} was requested; sigma_max must be above sigma_min.")
    return spec.function(inputs).float()


def _check_flow(spec: ScheduleSpec, inputs: ScheduleInputs) -> None:
    if spec.is_fitted_to_diffusion:
        usable = ", ".join(other.label for other in SCHEDULES if not other.is_fitted_to_diffusion)
        raise ValueError(f"Schedule {spec.label!r} was requested for a flow model, but its levels are Stable Diffusion's. Use one of {usable}.")
    if inputs.sigma_max > 1:
        raise ValueError(f"A schedule from sigma {inputs.sigma_max} was requested; noise levels of a flow model must be between 0 and 1.")


def find_schedule(name: str) -> ScheduleSpec:
    """The schedule with that name, label or alias. Raises: ValueError."""
    for spec in (*SCHEDULES, *_UNLISTED):
        if name in (spec.name, spec.label, *spec.aliases):
            return spec
    raise ValueError(f"Schedule {name!r} is unknown. Use one of {', '.join(spec.label for spec in SCHEDULES)}.")


def discard_next_to_last_sigma(sigmas_T: Tensor) -> Tensor:
    """A schedule without its last level above 0 (for samplers that would spend two calls on it)."""
    return torch.cat([sigmas_T[:-2], sigmas_T[-1:]])


# formulas


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Karras et al. 2022, eq. 5."""
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _end_with_zero((high + ramp * (low - high)) ** rho)


def _uniform(inputs: ScheduleInputs) -> Tensor:
    """Evenly spaced timesteps over the model's whole range, including first and last (Nichol and Dhariwal 2021, "Improved DDPM", section 4)."""
    return _at_timesteps(inputs, torch.linspace(len(inputs.table) - 1, 0, inputs.num_steps))


def _karras(inputs: ScheduleInputs) -> Tensor:
    return karras_sigmas(inputs.num_steps, inputs.sigma_min, inputs.sigma_max, inputs.rho)


def _exponential(inputs: ScheduleInputs) -> Tensor:
    """Evenly spaced in log sigma (Song et al. 2021, appendix C, the variance-exploding schedule)."""
    return _end_with_zero(torch.linspace(math.log(inputs.sigma_max), math.log(inputs.sigma_min), inputs.num_steps, dtype=torch.float64).exp())


def _polyexponential(inputs: ScheduleInputs) -> Tensor:
    """A power of an even ramp in log sigma; rho 1 is exponential."""
    ramp = torch.linspace(1, 0, inputs.num_steps, dtype=torch.float64) ** inputs.rho
    low, high = math.log(inputs.sigma_min), math.log(inputs.sigma_max)
    return _end_with_zero((ramp * (high - low) + low).exp())


def _sgm_uniform(inputs: ScheduleInputs) -> Tensor:
    """Evenly spaced timesteps without the last one (the spacing in Stability's sgm code, "trailing" in Lin et al. 2023, table 2)."""
    if inputs.counts_unshifted:
        return _end_with_zero(torch.linspace(inputs.sigma_max, inputs.sigma_min, inputs.num_steps + 1, dtype=torch.float64)[:-1])
    start, end = _timestep_range(inputs)
    return _at_timesteps(inputs, torch.linspace(start, end, inputs.num_steps + 1)[:-1])


def _quadratic_timesteps(inputs: ScheduleInputs) -> Tensor:
    """Timesteps with evenly spaced square roots, without the last one. Song et al. 2020 (DDIM), appendix D.2, "quadratic"."""
    start, end = (timestep + 1 for timestep in _timestep_range(inputs))
    return _at_timesteps(inputs, torch.linspace(math.sqrt(start), math.sqrt(end), inputs.num_steps + 1)[:-1] ** 2 - 1)


def _normal(inputs: ScheduleInputs) -> Tensor:
    """Evenly spaced timesteps between those of sigma_max and sigma_min."""
    if inputs.counts_unshifted:
        return _end_with_zero(torch.linspace(inputs.sigma_max, inputs.sigma_min, inputs.num_steps, dtype=torch.float64))
    start, end = _timestep_range(inputs)
    return _at_timesteps(inputs, torch.linspace(start, end, inputs.num_steps))


def _kl_optimal(inputs: ScheduleInputs) -> Tensor:
    """Evenly spaced in atan(sigma). Sabour et al. 2024, "Align Your Steps", section 3.1 (optimal for Gaussian data), ending at 0."""
    ramp = torch.arange(inputs.num_steps, dtype=torch.float64) / inputs.num_steps
    return _end_with_zero((ramp * math.atan(inputs.sigma_min) + (1 - ramp) * math.atan(inputs.sigma_max)).tan())


def _simple(inputs: ScheduleInputs) -> Tensor:
    """Every (N/n)-th entry of the model's table, from its end."""
    table, stride = inputs.table, len(inputs.table) / inputs.num_steps
    picked = table[[len(table) - 1 - int(step * stride) for step in range(inputs.num_steps)]]
    return _end_with_zero(_fit_range(inputs, picked))


def _ddim(inputs: ScheduleInputs) -> Tensor:
    """Timesteps 1, 1 + c, 1 + 2c, ... with c = N // n. Song et al. 2020 (DDIM), appendix D.2; "leading" in Lin et al. 2023, table 2."""
    table, stride = inputs.table, max(len(inputs.table) // inputs.num_steps, 1)
    timesteps = [min(1 + step * stride, len(table) - 1) for step in reversed(range(inputs.num_steps))]
    return _end_with_zero(_fit_range(inputs, table[timesteps]))


def _beta(inputs: ScheduleInputs) -> Tensor:
    """Quantiles of a beta distribution. Lee et al. 2024, "Beta Sampling is All You Need".

    For a flow model over its shifted times, without the last one, which is as good as 0; else over sigma, as Forge and A1111 have it.
    """
    from scipy import stats  # heavy, and only this schedule needs it

    over_times = inputs.predictor.is_flow and not inputs.settings.unshifted
    ramp = 1 - torch.linspace(0, 1, inputs.num_steps + int(over_times), dtype=torch.float64)[: inputs.num_steps].numpy()
    quantiles = torch.from_numpy(stats.beta.ppf(ramp, inputs.settings.beta_alpha, inputs.settings.beta_beta))
    if over_times:
        start, end = _timestep_range(inputs)
        return _at_timesteps(inputs, end + quantiles * (start - end))
    return _end_with_zero(inputs.sigma_min + quantiles * (inputs.sigma_max - inputs.sigma_min))


def _turbo(inputs: ScheduleInputs) -> Tensor:
    """Integer timesteps N, N - N/n, ... for which SDXL Turbo was distilled (Sauer et al. 2023, "Adversarial Diffusion Distillation", section 3)."""
    table = inputs.table
    timesteps = (torch.arange(inputs.num_steps, 0, -1, dtype=torch.float64) * (len(table) / inputs.num_steps) - 1).round().long()
    return _end_with_zero(_fit_range(inputs, table[timesteps.clamp(0, len(table) - 1)]))


def _fitted(sd1: Sequence[float], sdxl: Sequence[float]) -> Callable[[ScheduleInputs], Tensor]:
    """A schedule from a table fitted to SD1.5 or SDXL, interpolated over log sigma for other numbers of steps."""

    def compute(inputs: ScheduleInputs) -> Tensor:
        levels = torch.tensor(sdxl if inputs.settings.is_sdxl else sd1, dtype=torch.float64)
        return _end_with_zero(_fit_range(inputs, _interpolate_log(levels, inputs.num_steps)))

    return compute


# Sabour et al. 2024, "Align Your Steps: Optimizing Sampling Schedules in Diffusion Models": the ten-step tables on the project's page.
_AYS_SD1 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
_AYS_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
# Chen et al. 2024, "On the Trajectory Regularity of ODE-based Diffusion Sampling" (GITS): the ten-step tables in use for these families.
_GITS_SD1 = (14.615, 4.617, 2.507, 1.236, 0.702, 0.402, 0.240, 0.156, 0.104, 0.094, 0.029)
_GITS_SDXL = (14.615, 4.734, 2.567, 1.529, 0.987, 0.652, 0.418, 0.268, 0.179, 0.127, 0.029)
# The same authors' 32-level tables in common use.
_AYS_32_SD1 = (
    14.615, 11.23951352, 8.64363081, 6.64729424, 5.57250862, 4.71648546, 3.99196065, 3.5195609, 3.13490466, 2.79228788, 2.48773628,
    2.21663865, 1.97508351, 1.7793172, 1.61475335, 1.46540953, 1.314849, 1.16642497, 1.03475547, 0.91573744, 0.80748169, 0.71202361,
    0.621739, 0.53065202, 0.4529096, 0.37491455, 0.27461819, 0.2011529, 0.14105873, 0.06682881, 0.03166121, 0.015,
)  # fmt: skip
_AYS_32_SDXL = (
    14.615, 11.1491618, 8.50522127, 6.48827151, 5.43707402, 4.60398619, 3.89854704, 3.27407457, 2.74396527, 2.29968659, 1.95448514,
    1.67108715, 1.42878152, 1.23181009, 1.06789649, 0.92579443, 0.80290886, 0.69660121, 0.60436903, 0.52852552, 0.46773344, 0.41393379,
    0.36258186, 0.31008517, 0.26518925, 0.22326461, 0.17653877, 0.13959192, 0.10587381, 0.05519369, 0.02877334, 0.015,
)  # fmt: skip


def _interpolate_log(levels: Tensor, num_steps: int) -> Tensor:
    """`num_steps` levels along the table, linear in log sigma, keeping both ends."""
    position = torch.linspace(0, len(levels) - 1, num_steps, dtype=torch.float64)
    low = position.floor().long().clamp(max=len(levels) - 2)
    weight, logs = position - low, levels.log()
    return (logs[low] * (1 - weight) + logs[low + 1] * weight).exp()


def _end_with_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _timestep_range(inputs: ScheduleInputs) -> tuple[float, float]:
    timesteps = inputs.predictor.position(torch.tensor([inputs.sigma_max, inputs.sigma_min], device=inputs.predictor.sigmas.device))
    return float(timesteps[0]), float(timesteps[1])


def _at_timesteps(inputs: ScheduleInputs, timesteps: Tensor) -> Tensor:
    return _end_with_zero(inputs.predictor.sigma(timesteps.to(inputs.predictor.sigmas.device)).cpu())


def _fit_range(inputs: ScheduleInputs, sigmas: Tensor) -> Tensor:
    """Levels from a table, stretched to the user's range if one is set."""
    if inputs.is_model_range or len(sigmas) < 2:
        return sigmas
    share = (sigmas - sigmas[-1]) / (sigmas[0] - sigmas[-1])
    return inputs.sigma_min + share * (inputs.sigma_max - inputs.sigma_min)


SCHEDULES: tuple[ScheduleSpec, ...] = (
    ScheduleSpec(name="automatic", label="Automatic", function=_uniform, need_inner_model=True),
    ScheduleSpec(name="uniform", label="Uniform", function=_uniform, need_inner_model=True),
    ScheduleSpec(name="karras", label="Karras", function=_karras, default_rho=7.0),
    ScheduleSpec(name="exponential", label="Exponential", function=_exponential),
    ScheduleSpec(name="polyexponential", label="Polyexponential", function=_polyexponential, default_rho=1.0),
    ScheduleSpec(name="sgm_uniform", label="SGM Uniform", function=_sgm_uniform, need_inner_model=True, aliases=("SGMUniform",)),
    ScheduleSpec(name="kl_optimal", label="KL Optimal", function=_kl_optimal),
    ScheduleSpec(name="align_your_steps", label="Align Your Steps", function=_fitted(_AYS_SD1, _AYS_SDXL), is_fitted_to_diffusion=True),
    ScheduleSpec(name="simple", label="Simple", function=_simple, need_inner_model=True),
    ScheduleSpec(name="normal", label="Normal", function=_normal, need_inner_model=True),
    ScheduleSpec(name="ddim", label="DDIM", function=_ddim, need_inner_model=True),
    ScheduleSpec(name="beta", label="Beta", function=_beta, need_inner_model=True),
    ScheduleSpec(name="turbo", label="Turbo", function=_turbo, need_inner_model=True),
    ScheduleSpec(name="align_your_steps_GITS", label="Align Your Steps GITS", function=_fitted(_GITS_SD1, _GITS_SDXL), is_fitted_to_diffusion=True),
    ScheduleSpec(name="align_your_steps_11", label="Align Your Steps 11", function=_fitted(_AYS_SD1, _AYS_SDXL), is_fitted_to_diffusion=True),
    ScheduleSpec(name="align_your_steps_32", label="Align Your Steps 32", function=_fitted(_AYS_32_SD1, _AYS_32_SDXL), is_fitted_to_diffusion=True),
)

_UNLISTED = (ScheduleSpec(name="quadratic_timesteps", label="Quadratic timesteps", function=_quadratic_timesteps, need_inner_model=True),)
"""Schedules that are only chosen through a sampler's own setting."""
