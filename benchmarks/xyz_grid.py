"""How much faster do two slots make a 3x3 grid of X/Y/Z plot?"""

from __future__ import annotations

import atexit
import base64
import io
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks._multi_slot import TOLERANCE
from tests.support.checkpoints import write_checkpoint
from tools.campaign.full_server import FullServer, start_server
from tools.measure import Bench, Metrics, Variant

WIDTH, SIDE_PX, NUM_STEPS = 64, 384, 4
SEED, STEPS, PROMPT = "Seed", "Steps", "Prompt S/R"


def _axis_number(server: FullServer, label: str) -> int:
    """The number of an axis in the script's first list, as the API's clients find it."""
    scripts = server.get("/sdapi/v1/script-info")
    plot = next(script for script in scripts if script["name"] == "x/y/z plot" and not script["is_img2img"])
    return int(plot["args"][0]["choices"].index(label))


def _make_grid(server: FullServer, strategy: str, x: tuple[int, str], y: tuple[int, str]) -> np.ndarray:
    """Pixels of the grid."""
    arguments: list[Any] = [x[0], x[1], [], y[0], y[1], [], 0, "", [], False, False, False, False, False, False, False, 0, False]
    answer = server.txt2img(
        prompt="a red cat", negative_prompt="a dog", seed=1, steps=NUM_STEPS, width=SIDE_PX, height=SIDE_PX, cfg_scale=7, script_name="x/y/z plot",
        script_args=arguments, override_settings={"multi_gpu_strategy": strategy},
    )  # fmt: skip
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).convert("RGB")).astype(int)


def _make_variants() -> Mapping[str, Variant]:
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    write_checkpoint(folder / "models" / "Stable-diffusion" / "narrow.safetensors", "sd15", width=WIDTH)
    flags = ("--nowebui", "--multi-gpu", "--device-id", "cpu,cpu", "--cpu-threads-per-slot", "1")
    server = start_server(folder, folder / "server.log", flags)
    atexit.register(server.end)
    seeds, prompts = (_axis_number(server, SEED), "1,2,3"), (_axis_number(server, PROMPT), "red,blue,green")
    steps = (_axis_number(server, STEPS), f"{NUM_STEPS - 1},{NUM_STEPS},{NUM_STEPS + 1}")
    variants: dict[str, Variant] = {}
    for name, x, y in (("seeds x prompts", seeds, prompts), ("seeds x steps", seeds, steps)):
        alone, shared = (_make_grid(server, strategy, x, y) for strategy in ("single", "auto"))
        worst = int(np.abs(alone - shared).max())
        if worst > TOLERANCE:
            raise AssertionError(f"{name}: the grids of one slot and of two differ by {worst} of 255; {TOLERANCE} are rounding.")
        for slots, strategy in (("one slot", "single"), ("two slots", "auto")):
            variants[f"{name}, {slots}"] = partial(_run, server, strategy, x, y)
    return variants


def _run(server: FullServer, strategy: str, x: tuple[int, str], y: tuple[int, str]) -> Metrics:
    _make_grid(server, strategy, x, y)
    return {}


BENCH = Bench(
    question=(
        f"How much faster do two CPU slots of one core each make a 3x3 grid of X/Y/Z plot than one? The whole request over HTTP to the program in a "
        f"process of its own: CFG, {NUM_STEPS} Euler steps, {SIDE_PX} pixels, a narrow SD1.x network, fp32. Neighbors that differ in seed or prompt "
        "share a job; with steps on an axis, those of a row do. Asked for: 1.80x."
    ),
    make_variants=_make_variants,
    baseline="seeds x prompts, one slot",
    num_rounds=3,
    num_warmups=0,
    work_per_call=9,
    work_unit="pictures",
    packages=("torch", "diffusers", "transformers"),
)
