"""Is a virtual GPU slower than the plain CPU when there is little arithmetic? Networks with the tests' width, 64 pixels."""

from __future__ import annotations

from functools import partial

from benchmarks._virtual_gpu import make_variants
from tools.measure import Bench

BENCH = Bench(
    question="What does a virtual GPU cost over the plain CPU in the worst case, where arithmetic is little and calls are many? One guided UNet step "
    "(2 samples) and one VAE decode, SD1.x layout, UNet of 32 to 128 channels, 64x64 pixels, fp32, one thread.",
    make_variants=partial(make_variants, width=32, side=8),
    baseline="CPU",
    num_rounds=15,
    packages=("torch", "diffusers"),
)
