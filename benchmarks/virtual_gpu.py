"""Is a virtual GPU slower than the plain CPU? SD1.x with 0.4 of its width, 256 pixels."""

from __future__ import annotations

from functools import partial

from benchmarks._virtual_gpu import make_variants
from tools.measure import Bench

BENCH = Bench(
    question="What does a virtual GPU cost over the plain CPU? One guided UNet step (2 samples) and one VAE decode, SD1.x layout, UNet of 128 to 512 "
    "channels (0.4 of SD1.5's), 256x256 pixels, fp32, one thread. Both compute with the same kernels; the results are equal bit for bit.",
    make_variants=partial(make_variants, width=128, side=32),
    baseline="CPU",
    num_rounds=7,
    packages=("torch", "diffusers"),
)
