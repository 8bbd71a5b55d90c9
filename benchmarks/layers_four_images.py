"""One network cut over two slots: how much faster is the UNet phase of four images?"""

from __future__ import annotations

from benchmarks._multi_slot import make_job_bench

BENCH = make_job_bench("layers", num_images=4, num_steps=8, at_least=1.85)
