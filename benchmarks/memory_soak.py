"""Does memory leak? 200 jobs that switch among three checkpoints, two sizes and LoRAs, on two virtual GPUs too small for everything at once."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from backend import memory_management
from backend.args import BackendConfig
from backend.devices import virtual_gpu
from backend.devices.probing import probe_devices
from tests.support.extensions import loaded_builtin
from tests.support.loras import write_lora
from tests.support.narrow_application import narrow_application, run, txt2img
from tools.measure import Bench, Metrics, Variant

NUM_JOBS = 200
FAMILIES = ("sd15", "sd20", "sdxl")
SIZES_PX = ((64, 64), (96, 64))
PROMPTS = ("a red cat", "a red cat <lora:{family}:0.7>", "a red cat <lora:{family}:0.3>")
MIB = 2**20


def _rss_mib() -> float:
    return float(psutil.Process().memory_info().rss) / MIB


def soak() -> Metrics:
    """Repeat a fixed sequence of jobs; after each job, the live bytes of both devices are compared with those of the previous round."""
    config = BackendConfig(virtual_gpus_bytes=(64 * MIB, 48 * MIB), multi_gpu=True)
    memory_management.configure(config, probe_devices(config))
    places = list(itertools.product(FAMILIES, SIZES_PX, PROMPTS))
    levels: dict[int, tuple[int, ...]] = {}
    rss_mib: list[float] = []
    num_changed = 0
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    with narrow_application(folder, *FAMILIES) as (app, models), loaded_builtin(app, "sd_forge_lora"):
        for family in FAMILIES:
            write_lora(folder / "models" / "Lora" / f"{family}.safetensors", models[family], te=family == "sd15")
        for index in range(NUM_JOBS):
            family, (width_px, height_px), prompt = places[index % len(places)]
            override, words = {"sd_model_checkpoint": f"{family}.safetensors"}, prompt.format(family=family)
            done = run(txt2img(prompt=words, override_settings=override, width=width_px, height=height_px, steps=1, seed=index))
            if done.comments:
                raise AssertionError(f"job {index} ({family}, {words}): {done.comments}")
            level = tuple(virtual_gpu.get_device(device).live_bytes for device in virtual_gpu.installed_devices())
            num_changed += levels.get(index % len(places), level) != level and index >= 2 * len(places)
            levels[index % len(places)] = level
            rss_mib.append(_rss_mib())
    memory_management.unload_all_models()
    left_bytes = sum(virtual_gpu.get_device(device).live_bytes for device in virtual_gpu.installed_devices())
    return {
        "levels that changed": num_changed,
        "bytes left at the end": left_bytes,
        **{f"RSS after {count} MiB": rss_mib[count - 1] for count in (20, 50, 100, 150, 200)},
    }


def _make_variants() -> Mapping[str, Variant]:
    torch.set_num_threads(1)
    return {f"{NUM_JOBS} jobs": soak}


BENCH = Bench(
    question=f"Do bytes stay? {NUM_JOBS} jobs through the application, switching among SD1.x, SD2.x and SDXL layouts (narrow), two sizes, "
    "and no LoRA or one at two strengths, on virtual GPUs of 64 and 48 MiB. A level is the live bytes of both devices after a job, compared "
    "with the same place of the round before.",
    make_variants=_make_variants,
    baseline=f"{NUM_JOBS} jobs",
    num_rounds=1,
    num_warmups=0,
    packages=("torch", "diffusers", "transformers"),
)
