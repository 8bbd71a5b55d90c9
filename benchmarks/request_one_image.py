"""How much faster is a whole request for one image on two slots?"""

from __future__ import annotations

from benchmarks._multi_slot import make_job_bench

BENCH = make_job_bench("auto", num_images=1, num_steps=20, whole_request=True, at_least=1.80, num_rounds=2, side_px=512)
