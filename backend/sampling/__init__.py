"""From noise to latents: schedules, samplers and guidance. Samplers know no networks, pages or options.

Reading order: `sampler_types` (what a sampler is given and reports), `samplers_one_step`, `samplers_multistep`, `samplers_dpm` and `samplers` (all
of them), `registry` (their names), `schedules` (noise levels), `flow_form` (samplers on flow models); `noise`, `philox` and `brownian` (random
numbers from seeds); `condition`, `branches` and `sampling_function` (conditions to one denoised batch, with Forge's hooks).

Example: "DPM++ 2M Karras", 20 steps: `registry` finds the sampler, `schedules` gives 21 noise levels, `noise` the start from the seed, and the
sampler calls `sampling_function` 20 times, which runs prompt and negative prompt as two branches and guides with their difference.
"""
