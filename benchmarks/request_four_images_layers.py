"""How much faster do two slots answer a whole request for four images by layers?"""

from __future__ import annotations

from benchmarks._requests import make_request_bench

BENCH = make_request_bench("layers", num_images=4, at_least=1.80, num_rounds=3)
