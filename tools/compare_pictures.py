"""The same pictures from two checkouts on one slot, pixel by pixel: `python -m tools.compare_pictures BEFORE AFTER` prints a Markdown table.

Each checkout serves its HTTP API, the one thing that both share, with the same narrow random checkpoints of SD 1.x, SD 2.x, SDXL and their
v-prediction and inpainting variants. Every sampler of BEFORE makes a picture with each checkpoint; Euler also makes img2img and inpainting pictures.
"""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.checkpoints import write_checkpoint
from tools.campaign.full_server import FullServer, ServerProcess, full_server

CHECKPOINTS: Mapping[str, Mapping[str, Any]] = {
    "sd15": {"family": "sd15"},
    "sd15 inpainting": {"family": "sd15", "inpaint": True},
    "sd21 v": {"family": "sd21_v"},
    "sdxl": {"family": "sdxl"},
    "sdxl v": {"family": "sdxl", "prediction": "v_prediction"},
}
SIDE_PX, NUM_STEPS = 64, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A request to one route with one checkpoint."""

    checkpoint: str
    kind: str
    route: str
    body: Mapping[str, Any]


def list_jobs(samplers: Sequence[str]) -> Iterator[Job]:
    """All jobs, checkpoint by checkpoint, because switching takes longer than a picture."""
    random = np.random.default_rng(0)
    picture = _encode(random.integers(0, 256, (SIDE_PX, SIDE_PX, 3)))
    mask = _encode(np.repeat(np.indices((SIDE_PX, SIDE_PX))[1][:, :, None] < SIDE_PX // 2, 3, axis=2) * 255)
    for checkpoint in CHECKPOINTS:
        common = {
            "prompt": "a (red:1.2) circle",
            "negative_prompt": "blue",
            "seed": 3,
            "steps": NUM_STEPS,
            "width": SIDE_PX,
            "height": SIDE_PX,
            "cfg_scale": 5,
            "override_settings": {"sd_model_checkpoint": _file_name(checkpoint)},
            "override_settings_restore_afterwards": False,
        }
        for sampler in samplers:
            yield Job(checkpoint=checkpoint, kind=sampler, route="/sdapi/v1/txt2img", body={**common, "sampler_name": sampler})
        given = {**common, "sampler_name": "Euler", "init_images": [picture], "denoising_strength": 0.7}
        yield Job(checkpoint=checkpoint, kind="img2img", route="/sdapi/v1/img2img", body=given)
        yield Job(checkpoint=checkpoint, kind="inpainting", route="/sdapi/v1/img2img", body={**given, "mask": mask, "mask_blur": 4})


def compare(before: FullServer, after: FullServer) -> Iterator[str]:
    """Table rows: per checkpoint the pictures that are equal, and each one that is not with its largest difference of 255."""
    samplers = [sampler["name"] for sampler in before.get("/sdapi/v1/samplers")]
    yield "| checkpoint | equal pictures | different |"
    yield "|---|--:|---|"
    differences: dict[str, dict[str, int]] = {name: {} for name in CHECKPOINTS}
    for job in list_jobs(samplers):
        one, other = (_picture(server.post(job.route, dict(job.body))) for server in (before, after))
        differences[job.checkpoint][job.kind] = int(np.abs(one - other).max()) if one.shape == other.shape else 255
    for checkpoint, found in differences.items():
        different = {kind: worst for kind, worst in found.items() if worst}
        listed = ", ".join(f"{kind}: {worst}" for kind, worst in different.items()) or "none"
        yield f"| {checkpoint} | {len(found) - len(different)} of {len(found)} | {listed} |"


def _file_name(checkpoint: str) -> str:
    return f"{checkpoint.replace(' ', '-')}.safetensors"


def _encode(pixels: Any) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "png")
    return base64.b64encode(stream.getvalue()).decode()


def _picture(answer: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).convert("RGB"), dtype=np.int16)


def _start_in(root: Path, arguments: Sequence[str], log_file: Path) -> ServerProcess:
    with log_file.open("ab") as log:
        return subprocess.Popen([sys.executable, str(root / "launch.py"), *arguments], cwd=root, stdout=log, stderr=log, env={**os.environ})


def main(words: Sequence[str]) -> None:
    if len(words) != 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        for checkpoint, facts in CHECKPOINTS.items():
            write_checkpoint(folder / "checkpoints" / _file_name(checkpoint), **facts)
        servers = []
        for number, word in enumerate(words):
            data_dir = folder / f"data{number}"
            data_dir.mkdir()
            flags = ("--nowebui", "--all-in-fp32", "--ckpt-dir", str(folder / "checkpoints"))
            start = partial(_start_in, Path(word).resolve())
            servers.append(stack.enter_context(full_server(data_dir, folder / f"{number}.log", flags, start=start)))
        for line in compare(*servers):
            print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
