"""How much faster is one large picture decoded by two slots?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from backend.parallel.vae.split import DecoderShard, SplitDecoder
from tools.measure import Bench, Metrics, Variant

SIDE = 40
CPU = torch.device("cpu")


@torch.no_grad()
def _whole(vae: Any, latents_BCHW: Tensor) -> Tensor:
    picture_BCHW: Tensor = vae.decode(latents_BCHW, return_dict=False)[0]
    return picture_BCHW


def _compare(decode: Callable[[Tensor], Tensor], latents_BCHW: Tensor, expected_BCHW: Tensor) -> Metrics:
    began_s = time.process_time()
    picture_BCHW = decode(latents_BCHW)
    cpu_s = time.process_time() - began_s
    return {"CPU s": cpu_s, "largest difference / std": float((picture_BCHW - expected_BCHW).abs().max() / expected_BCHW.std())}


def make_variants(side: int = SIDE) -> Mapping[str, Variant]:
    """The decoder of SD 1.x and SDXL with its published width, random weights, fp32; each slot is a thread with one torch thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    vae.eval().requires_grad_(False)
    latents_BCHW = torch.randn(1, 4, side, side)
    workers = [ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) for _ in range(2)]
    shards = [DecoderShard(network=vae, device=CPU, run=worker.submit) for worker in workers]
    split = SplitDecoder(shards)
    alone = SplitDecoder([shards[0], DecoderShard(network=vae, device=CPU, run=workers[0].submit)])
    expected_BCHW = _whole(vae, latents_BCHW)
    ways = {"whole, one core": partial(_whole, vae), "two strips, one core": alone.decode, "split, two cores": split.decode}
    return {name: partial(_compare, way, latents_BCHW, expected_BCHW) for name, way in ways.items()}


BENCH = Bench(
    question=(
        f"How much faster is one large picture decoded by two slots? Published width, {8 * SIDE}x{8 * SIDE} pixels, fp32; slots are CPU "
        "cores, one torch thread each. 'Whole' is diffusers' own decode; 'two strips, one core' is the split's code with one worker for both, so "
        "the second core's part of the gain can be told from that of fewer copies."
    ),
    make_variants=make_variants,
    baseline="whole, one core",
    num_rounds=3,
    work_per_call=1,
    work_unit="pictures",
    packages=("torch", "diffusers"),
)
