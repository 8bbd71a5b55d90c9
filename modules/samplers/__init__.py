"""Samplers and schedules by the names users know, and a sampler at work on a request. The formulas are in backend/sampling.

Reading order: `entries`, `registry` (which samplers there are, aliases, hidden ones), `schedules`, `noise` (from seeds), `kdiffusion` (noise levels,
settings, progress, interruption of one run), `cfg_denoiser` (what is asked at every step), `lanes` (a loop per picture where a network is
cut over slots), `common`.

Example: "DPM++ 2M Karras" is found by `registry.find_sampler_config` as DPM++ 2M with the schedule Karras;
`kdiffusion.KDiffusionSampler.sample` makes the sigmas, and its formula calls `cfg_denoiser` once per step. A new sampler is a row in
`registry` and a function in backend/sampling.
"""
