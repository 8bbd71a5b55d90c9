"""A whole request for one picture of SD1.5 at full width, in tiles on two slots and decoded by both."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks._multi_slot import TWO_SLOTS, install_application, run_job, use_slots
from modules.application import Application
from tools.measure import Bench, Metrics, Variant

STEPS, SIDE_PX, WARM_UP_PX = 2, 512, 128
MOST_DIFFERENT = 1
"""Of 255: tiles and strips sum in another order."""


def _networks() -> dict[str, Any]:
    """Random networks of the published sizes, by their names in a file of diffusers' layout."""
    torch.manual_seed(0)
    text_config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768, bos_token_id=49406,
        eos_token_id=49407, pad_token_id=49407,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return {"unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8), "vae": vae,
            "text_encoder": CLIPTextModel(text_config)}  # fmt: skip


def _make_application() -> Application:
    """An application with the checkpoint in a temporary folder (4.4 GB), which exists until the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    path = folder / "models" / "Stable-diffusion" / "full_width.safetensors"
    path.parent.mkdir(parents=True)
    tensors = {f"{prefix}.{name}": tensor for prefix, network in _networks().items() for name, tensor in network.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return install_application(folder)


def make_variants() -> Mapping[str, Variant]:
    app = _make_application()
    use_slots(TWO_SLOTS)

    def job(strategy: str, side_px: int) -> tuple[Metrics, list[np.ndarray]]:
        return run_job(app, strategy, num_images=1, num_steps=STEPS, side_px=side_px, cfg=1.0)

    (one,), (other,) = (job(strategy, WARM_UP_PX)[1] for strategy in ("single", "tiles"))  # loads the networks
    worst = int(np.abs(one - other).max())
    if worst > MOST_DIFFERENT:
        raise AssertionError(f"the pictures of one slot and of two differ by {worst} of 255; {MOST_DIFFERENT} is rounding.")
    return {"one slot": lambda: job("single", SIDE_PX)[0], "two slots": lambda: job("tiles", SIDE_PX)[0]}


BENCH = Bench(
    question=(
        f"How much faster do two CPU slots of one core each make a picture than one, from the request to the picture? SD1.5 at full width, "
        f"{SIDE_PX}x{SIDE_PX}, {STEPS} Euler steps without CFG, the decoder included, fp32, random weights. Asked for: 1.70x."
    ),
    make_variants=make_variants,
    baseline="one slot",
    num_rounds=2,
    num_warmups=0,
    work_per_call=1,
    work_unit="pictures",
    packages=("torch", "diffusers", "transformers"),
)
