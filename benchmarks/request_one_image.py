"""How much faster do two slots answer a whole request for one image with CFG?"""

from __future__ import annotations

from benchmarks._requests import make_request_bench

BENCH = make_request_bench("auto", num_images=1, at_least=1.85, num_rounds=5)
