"""Two slots with a copy each: how much faster is the UNet phase of four images?"""

from __future__ import annotations

from benchmarks._multi_slot import make_job_bench

BENCH = make_job_bench("replicas", num_images=4, num_steps=4, at_least=1.93)
