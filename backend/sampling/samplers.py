"""All samplers in one place. Each is `f(denoise, x, sigmas, *, settings, noise, on_step=None) -> x`; see sampler_types.py."""

from __future__ import annotations

from backend.sampling.sampler_types import BrownianNoise, Denoise, NoiseSource, OnStep, SamplerSettings, StepInfo
from backend.sampling.samplers_dpm import (
    sample_dpm_adaptive,
    sample_dpm_fast,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2m_sde_heun,
    sample_dpmpp_2s_ancestral,
    sample_dpmpp_3m_sde,
    sample_dpmpp_sde,
)
from backend.sampling.samplers_multistep import sample_deis, sample_ipndm, sample_ipndm_v, sample_lms, sample_plms, sample_unipc
from backend.sampling.samplers_one_step import (
    sample_ddim,
    sample_ddim_cfgpp,
    sample_ddpm,
    sample_dpm_2,
    sample_dpm_2_ancestral,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_heunpp2,
    sample_lcm,
    sample_restart,
)

__all__ = [
    "BrownianNoise",
    "Denoise",
    "NoiseSource",
    "OnStep",
    "SamplerSettings",
    "StepInfo",
    "sample_ddim",
    "sample_ddim_cfgpp",
    "sample_ddpm",
    "sample_deis",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_adaptive",
    "sample_dpm_fast",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2m_sde_heun",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_heunpp2",
    "sample_ipndm",
    "sample_ipndm_v",
    "sample_lcm",
    "sample_lms",
    "sample_plms",
    "sample_restart",
    "sample_unipc",
]
