"""Runs jobs one at a time and reports on them.

Reading order: `queue` (the queue and its one worker), `state` (counters and interrupt flags of the running job), `states` (the same when
several jobs run on other machines), `progress` and `bar` (completed share, time left), `live_preview`, `txt2img` and `img2img` (handlers with
the argument order extensions use), `observer` and `profile_*` (--profile), `gpu_report`, `meter` (what /metrics counts), `current` (the job's id,
for logs). The rest: `context`.

Example: a click on Generate puts a call of `process_images` into the `JobQueue` as task "task(abc)". The page polls /internal/progress with
that name, which `progress` answers from `state` and the queue. Interrupt sets a flag that the sampler reads at its next step.
"""
