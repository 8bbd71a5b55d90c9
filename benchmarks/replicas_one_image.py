"""Two slots with a branch each: how much faster is the UNet phase of one image?"""

from __future__ import annotations

from benchmarks._multi_slot import make_job_bench

BENCH = make_job_bench("replicas", num_images=1, num_steps=3, at_least=1.90, side_px=512)
