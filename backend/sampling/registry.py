"""The samplers by the names users know, and what a caller must know to run each. Must not know networks, pages or options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from torch import Tensor

from backend.modules.k_prediction import AbstractPrediction
from backend.sampling import samplers
from backend.sampling.flow_form import in_noise_variables
from backend.sampling.sampler_types import Denoise, NoiseSource, OnStep, SamplerSettings
from backend.sampling.schedules import ScheduleSettings, compute_sigmas, discard_next_to_last_sigma, find_schedule

UNIPC_SKIP_SCHEDULES = {"time_uniform": "sgm_uniform", "time_quadratic": "quadratic_timesteps", "logSNR": "exponential"}
"""Schedules for UniPC's skip types; Lu et al. 2022 (DPM-Solver), section 4.3."""
FlowForm = Literal["own", "noise", "none"]
_CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")


class SamplerFunction(Protocol):
    """Samples from `x_BCHW` at the first noise level down through the levels (T,)."""

    def __call__(
        self, denoise: Denoise, x_BCHW: Tensor, sigmas_T: Tensor, *, settings: SamplerSettings, noise: NoiseSource, on_step: OnStep | None = None
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerSpec:
    """A sampler by name.

    `options` are those in Forge's API: scheduler (what Automatic means), second_order (two network calls per step), brownian_noise, uses_ensd,
    discard_next_to_last_sigma, solver_type. `automatic_schedule`: what Automatic means if the options do not say. `eta_option` is the setting for
    its eta, if it has one, and `eta_default` that setting's default. `extra_params`: the s_ settings it reads. `needs_uncond`: it reads the
    denoiser's unconditional x0, so the unconditional pass must run even at CFG 1. `cfg_multiplier` scales the CFG value. `flow_form`: how it samples
    a flow model: with its "own" formulas, in the variables of "noise" (flow_form.py), or not at all ("none").
    """

    name: str
    function: SamplerFunction
    aliases: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    automatic_schedule: str = "automatic"
    eta_option: str | None = None
    eta_default: float = 0.0
    extra_params: tuple[str, ...] = ()
    needs_uncond: bool = False
    cfg_multiplier: float = 1.0
    flow_form: FlowForm = "own"

    def function_for(self, predictor: AbstractPrediction) -> SamplerFunction:
        """The function that samples a model with this prediction. Raises: ValueError if there is none."""
        if not predictor.is_flow or self.flow_form == "own":
            return self.function
        if self.flow_form == "none":
            usable = ", ".join(spec.name for spec in SAMPLERS if spec.flow_form != "none")
            raise ValueError(
                f"Sampler {self.name!r} was requested for a flow model, but it places its steps by noise levels that flow models do not have. "
                f"Use one of {usable}."
            )
        return in_noise_variables(self.function)

    @property
    def is_second_order(self) -> bool:
        return bool(self.options.get("second_order"))

    def resolve_schedule(self, name: str | None, *, default: str = "automatic") -> str:
        """The schedule's name for the user's choice. Automatic means this sampler's schedule, else the model's `default`. Raises: ValueError."""
        chosen = find_schedule(name or "automatic").name
        if chosen == "automatic":
            chosen = str(self.options.get("scheduler", self.automatic_schedule))
        return default if chosen == "automatic" else chosen

    def with_unipc_skip_type(self, skip_type: str) -> SamplerSpec:
        """This sampler with the setting uni_pc_skip_type, which only changes what Automatic means for UniPC. Raises: ValueError."""
        if skip_type not in UNIPC_SKIP_SCHEDULES:
            raise ValueError(f"uni_pc_skip_type {skip_type!r} is unknown. Use one of {', '.join(UNIPC_SKIP_SCHEDULES)}.")
        return replace(self, automatic_schedule=UNIPC_SKIP_SCHEDULES[skip_type]) if self.name == "UniPC" else self

    def compute_sigmas(
        self,
        schedule: str | None,
        num_steps: int,
        predictor: AbstractPrediction,
        settings: ScheduleSettings | None = None,
        *,
        always_discard: bool = False,
    ) -> Tensor:
        """Noise levels (num_steps + 1,) for this sampler, without the next-to-last one if the sampler (or `always_discard`) requires that.

        Raises: ValueError for a sampler or a schedule that does not work with the model's prediction.
        """
        self.function_for(predictor)
        discards = always_discard or bool(self.options.get("discard_next_to_last_sigma"))
        sigmas_T = compute_sigmas(self.resolve_schedule(schedule), num_steps + int(discards), predictor, settings)
        return discard_next_to_last_sigma(sigmas_T) if discards else sigmas_T


def find_sampler(name: str) -> SamplerSpec:
    """The sampler with that name or alias, ignoring case. Raises: ValueError."""
    for spec in SAMPLERS:
        if name.lower() in (spec.name.lower(), *spec.aliases):
            return spec
    raise ValueError(f"Sampler {name!r} is unknown. Use one of {', '.join(spec.name for spec in SAMPLERS)}.")


def _spec(name: str, function: SamplerFunction, *aliases: str, options: Mapping[str, Any] | None = None, **fields: Any) -> SamplerSpec:
    return SamplerSpec(name=name, function=function, aliases=aliases, options=options or {}, **fields)


def _ancestral(**fields: Any) -> dict[str, Any]:
    return {"eta_option": "eta_ancestral", "eta_default": 1.0, "extra_params": ("s_noise",), **fields}


SAMPLERS: tuple[SamplerSpec, ...] = (
    _spec("DPM++ 2M", samplers.sample_dpmpp_2m, "k_dpmpp_2m", options={"scheduler": "karras"}),
    _spec(
        "DPM++ SDE", samplers.sample_dpmpp_sde, "k_dpmpp_sde",
        options={"scheduler": "karras", "second_order": True, "brownian_noise": True}, **_ancestral(), flow_form="noise",
    ),
    _spec(
        "DPM++ 2M SDE", samplers.sample_dpmpp_2m_sde, "k_dpmpp_2m_sde",
        options={"scheduler": "exponential", "brownian_noise": True}, **_ancestral(), flow_form="noise",
    ),
    _spec(
        "DPM++ 2M SDE Heun", samplers.sample_dpmpp_2m_sde_heun, "k_dpmpp_2m_sde_heun",
        options={"scheduler": "exponential", "brownian_noise": True, "solver_type": "heun"}, **_ancestral(), flow_form="noise",
    ),
    _spec(
        "DPM++ 2S a", samplers.sample_dpmpp_2s_ancestral, "k_dpmpp_2s_a",
        options={"scheduler": "karras", "uses_ensd": True, "second_order": True}, **_ancestral(),
    ),
    _spec(
        "DPM++ 3M SDE", samplers.sample_dpmpp_3m_sde, "k_dpmpp_3m_sde",
        options={"scheduler": "exponential", "discard_next_to_last_sigma": True, "brownian_noise": True}, **_ancestral(), flow_form="noise",
    ),
    _spec("Euler a", samplers.sample_euler_ancestral, "k_euler_a", "k_euler_ancestral", options={"uses_ensd": True}, **_ancestral()),
    _spec("Euler", samplers.sample_euler, "k_euler", extra_params=_CHURN),
    _spec("LMS", samplers.sample_lms, "k_lms"),
    _spec("Heun", samplers.sample_heun, "k_heun", options={"second_order": True}, extra_params=_CHURN),
    _spec(
        "DPM2", samplers.sample_dpm_2, "k_dpm_2",
        options={"scheduler": "karras", "discard_next_to_last_sigma": True, "second_order": True}, extra_params=_CHURN,
    ),
    _spec(
        "DPM2 a", samplers.sample_dpm_2_ancestral, "k_dpm_2_a",
        options={"scheduler": "karras", "discard_next_to_last_sigma": True, "uses_ensd": True, "second_order": True}, **_ancestral(),
    ),
    _spec("DPM fast", samplers.sample_dpm_fast, "k_dpm_fast", options={"uses_ensd": True}, **_ancestral(), flow_form="none"),
    _spec("DPM adaptive", samplers.sample_dpm_adaptive, "k_dpm_ad", options={"uses_ensd": True}, **_ancestral(extra_params=()), flow_form="none"),
    _spec(
        "Restart", samplers.sample_restart, "restart",
        options={"scheduler": "karras", "second_order": True}, extra_params=("s_noise",), flow_form="none",
    ),
    _spec("HeunPP2", samplers.sample_heunpp2, "heunpp2", extra_params=_CHURN),
    _spec("IPNDM", samplers.sample_ipndm, "ipndm"),
    _spec("IPNDM_V", samplers.sample_ipndm_v, "ipndm_v"),
    _spec("DEIS", samplers.sample_deis, "deis"),
    _spec("DDIM", samplers.sample_ddim, "ddim", automatic_schedule="ddim", eta_option="eta_ddim", flow_form="noise"),
    _spec(
        "DDIM CFG++", samplers.sample_ddim_cfgpp, "ddim_cfgpp",
        automatic_schedule="ddim", eta_option="eta_ddim", needs_uncond=True, cfg_multiplier=1 / 12.5, flow_form="noise",
    ),
    _spec("PLMS", samplers.sample_plms, "plms", automatic_schedule="ddim"),
    _spec("UniPC", samplers.sample_unipc, "unipc", automatic_schedule="sgm_uniform"),
    _spec("LCM", samplers.sample_lcm, "k_lcm", flow_form="noise"),
    _spec("DDPM", samplers.sample_ddpm, "ddpm", flow_form="noise"),
)  # fmt: skip
