"""Samplers and schedules by the names users know, and running a sampler for a request. The formulas are in backend/sampling.

Reading order: `entries`, `registry` (the samplers, their aliases, hidden ones), `schedules`, `noise` (from seeds), `kdiffusion` (noise levels,
settings, progress and interruption of one run), `cfg_denoiser` (the denoiser call at each step), `lanes` (one loop per picture when a network is
split over slots), `common`.

Example: `registry.find_sampler_config` resolves "DPM++ 2M Karras" to DPM++ 2M with the schedule Karras;
`kdiffusion.KDiffusionSampler.sample` computes the sigmas, and the formula calls `cfg_denoiser` once per step. A new sampler needs a row in
`registry` and a function in backend/sampling.
"""
