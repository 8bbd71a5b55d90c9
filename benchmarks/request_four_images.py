"""How much faster do two slots answer a whole request for four images?"""

from __future__ import annotations

from benchmarks._requests import make_request_bench

BENCH = make_request_bench("auto", num_images=4, at_least=1.90, num_rounds=3)
