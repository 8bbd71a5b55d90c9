"""Whole requests over HTTP, on one and two CPU slots of one core each: from the client's body to the decoded answer."""

from __future__ import annotations

import base64
import dataclasses
import io
import time
from collections.abc import Mapping
from functools import partial

import httpx
import numpy as np
from PIL import Image

from backend import profiler
from benchmarks._multi_slot import TOLERANCE, TWO_SLOTS, make_application, use_slots
from modules.api.api import create_api
from modules.application import Application
from modules.http_edge.server import WebServer, create_fastapi_app
from tools.measure import Bench, Metrics, Variant

BASE_WIDTH, SIDE_PX, NUM_STEPS = 128, 256, 8
UNET_PHASE, OUTSIDE = "UNet phase s", "outside sampling s"


class RequestClient:
    """A server with a checkpoint of SD1.5's layout, and a client of it."""

    def __init__(self, *, base_width: int = BASE_WIDTH) -> None:
        self.app: Application = make_application(base_width=base_width)
        self.app.config = dataclasses.replace(self.app.config, api=True, port=0)
        use_slots(TWO_SLOTS)
        server = WebServer(self.app.config)
        fastapi_app = create_fastapi_app(self.app.config)
        create_api(self.app, fastapi_app)
        server.start(fastapi_app)
        self._client = httpx.Client(base_url=server.address, timeout=300)

    def ask(self, strategy: str, *, num_images: int, num_steps: int, side_px: int = SIDE_PX, cfg: float = 7.0) -> tuple[Metrics, list[np.ndarray]]:
        """The times of a request in seconds, and its pictures."""
        self.app.options.set("multi_gpu_strategy", strategy)
        body = {
            "prompt": "a red cat", "negative_prompt": "a dog", "seed": 1, "steps": num_steps, "width": side_px, "height": side_px,
            "sampler_name": "Euler", "cfg_scale": cfg, "batch_size": num_images, "do_not_save_grid": True,
        }  # fmt: skip
        began_s = time.perf_counter()
        answer = self._client.post("/sdapi/v1/txt2img", json=body).raise_for_status().json()
        pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(int) for text in answer["images"]]
        whole_s, sampling_s = time.perf_counter() - began_s, profiler.meter().sampling_s
        return {UNET_PHASE: sampling_s, OUTSIDE: whole_s - sampling_s}, pictures


def make_request_bench(strategy: str, *, num_images: int, at_least: float, num_rounds: int) -> Bench:
    """Two slots against one. First, their pictures are compared."""

    def make_variants() -> Mapping[str, Variant]:
        client = RequestClient()

        def ask(chosen: str) -> Metrics:
            return client.ask(chosen, num_images=num_images, num_steps=NUM_STEPS)[0]

        alone, shared = (client.ask(chosen, num_images=num_images, num_steps=4)[1] for chosen in ("single", strategy))
        worst = max(int(np.abs(one - other).max()) for one, other in zip(alone, shared))
        if worst > TOLERANCE:
            raise AssertionError(f"the pictures of one slot and of two differ by {worst} of 255; {TOLERANCE} are rounding.")
        return {"one slot": partial(ask, "single"), "two slots": partial(ask, strategy)}

    images = "1 image" if num_images == 1 else f"{num_images} images"
    return Bench(
        question=(
            f"How much faster do two CPU slots of one core each answer a request for {images} with CFG than one, strategy {strategy}? The whole "
            f"request over HTTP: {NUM_STEPS} Euler steps, {SIDE_PX} pixels, fp32, SD1.5's layout {BASE_WIDTH} channels wide. Asked for: "
            f"{at_least:.2f}x, and 1.90x in the UNet phase."
        ),
        make_variants=make_variants,
        baseline="one slot",
        num_rounds=num_rounds,
        num_warmups=0,
        work_per_call=num_images,
        work_unit="images",
        packages=("torch", "diffusers", "transformers"),
    )
