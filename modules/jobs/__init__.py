"""One job after another, and what is told about them.

Reading order: `queue` (the line and its one worker), `state` (counters and interrupt flags of the job that runs), `progress` and `bar` (how
far, how long still), `live_preview`, `txt2img` and `img2img` (handlers in the argument order that extensions call), `observer` and
`profile_*` (--profile), `gpu_report`. Beside them: `context`.

Example: a click on Generate puts a call of `process_images` into the `JobQueue` as task "task(abc)"; the page asks /internal/progress for
that name, which `progress` answers from `state` and the queue; Interrupt sets a flag that the sampler reads at its next step.
"""
