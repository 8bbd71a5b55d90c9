"""Time and peak memory of loading a full-width SDXL checkpoint (6.9 GB in fp16) on a CPU. Needs 7 GB of disk and 16 GB of memory."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from benchmarks._checkpoint_files import measure_in_child, sdxl_networks, write_random
from tools.measure import Bench, Variant


def _make_variants() -> Mapping[str, Variant]:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "sdxl.safetensors"
    with torch.device("meta"):
        networks = sdxl_networks()
    write_random(path, "sdxl", networks)
    return {
        "raw read": partial(measure_in_child, path, "raw"),
        "load_file + copy": partial(measure_in_child, path, "safetensors"),
        "loader, stored fp16": partial(measure_in_child, path, "fp16"),
    }


BENCH = Bench(
    question="What does loading a full-width SDXL file cost beyond reading it into new memory, and is it ever held twice? Each call is a fresh "
    "process, timed without its imports, with the file in the page cache if it fits. RSS is counted from after the imports; 'file pages' are clean "
    "pages of a map, which the system can take back. Asked for, as stored: at most 1.3 times the CPU seconds of the raw read, 0.8 of its rate, peak "
    "1.05 times the file.",
    make_variants=_make_variants,
    baseline="raw read",
    time_metric="load s",
    num_rounds=3,
    num_warmups=0,
    packages=("torch", "diffusers", "transformers", "safetensors"),
)
