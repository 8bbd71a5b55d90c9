"""What all samplers share: the number of img2img steps, interruption, and pictures of latents.

Names are those that extensions import. Must not know the list of samplers.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from modules.jobs import live_preview
from modules.jobs.context import required_context
from modules.pictures.grids import choose_num_rows, lay_grid
from modules.processing.latents import encode_pixels, pixels_to_pil
from modules.samplers.entries import SamplerData

__all__ = [
    "InterruptedException",
    "SamplerData",
    "apply_refiner",
    "approximation_indexes",
    "decode_first_stage",
    "images_tensor_to_samples",
    "is_sampler_using_eta_noise_seed_delta",
    "sample_to_image",
    "samples_to_image_grid",
    "samples_to_images_tensor",
    "setup_img2img_steps",
    "single_sample_to_image",
    "store_latent",
]

# live preview methods by the numbers that extensions use
approximation_indexes = {"Full": 0, "Approx NN": 1, "Approx cheap": 2, "TAESD": 3}


class InterruptedException(BaseException):
    """Ends sampling from inside. A BaseException, so that no `except Exception` around third-party code catches it."""


def setup_img2img_steps(p: Any, steps: int | None = None) -> tuple[int, int]:
    """(steps of the whole schedule, index from its end where sampling starts).

    The denoising strength shortens the schedule, unless the steps were requested explicitly: then the schedule is lengthened so that all are done."""
    strength = min(float(p.denoising_strength or 0), 0.999)
    if (p.options.img2img_fix_steps or steps is not None) and strength > 0:
        requested = steps or p.steps
        return max(int(requested / strength), requested), requested - 1
    total = steps or p.steps
    return total, int(strength * total)


def apply_refiner(cfg_denoiser: Any, x: Tensor, sigma: Tensor | None = None) -> bool:
    """Switch to the refiner if it is due at this denoiser call; returns whether it did. `sigma`: the call's noise levels (B,), if known."""
    refiner = getattr(cfg_denoiser.p, "refiner", None)
    return refiner is not None and bool(refiner.switch_when_due(cfg_denoiser, x, sigma))


def is_sampler_using_eta_noise_seed_delta(p: Any) -> bool:
    """Whether the setting "Eta noise seed delta" affects this request's sampler."""
    return bool(p.uses_ensd)


def _engine(model: Any = None) -> Any:
    return model if model is not None else required_context().models.engine


def decode_first_stage(model: Any, x: Tensor) -> Tensor:
    """Latents to pictures, -1..1 BCHW."""
    pixels: Tensor = model.decode_first_stage(x)
    return pixels


def images_tensor_to_samples(image: Tensor, approximation: int | None = None, model: Any = None) -> Tensor:
    """Pictures BCHW, 0..1, to latents."""
    return encode_pixels(_engine(model), image)


def samples_to_images_tensor(sample: Tensor, approximation: int | None = None, model: Any = None) -> Tensor:
    """Latents BCHW to pictures, -1..1. Approximations other than Full (0) are linear and 8 times smaller."""
    engine = _engine(model)
    if approximation in (None, 0):
        return decode_first_stage(engine, sample)
    return torch.stack([live_preview.approximate_colors(engine, latent_CHW) for latent_CHW in sample]).mul(2).sub(1)


def single_sample_to_image(sample: Tensor, approximation: int | None = None) -> Image.Image:
    """One latent CHW as a picture."""
    return pixels_to_pil(samples_to_images_tensor(sample[None], approximation)[0].add(1).div(2))


def sample_to_image(samples: Tensor, index: int = 0, approximation: int | None = None) -> Image.Image:
    return single_sample_to_image(samples[index], approximation)


def samples_to_image_grid(samples: Tensor, approximation: int | None = None) -> Image.Image:
    """All latents of a batch as one grid."""
    pictures = [single_sample_to_image(sample, approximation) for sample in samples]
    num_rows = choose_num_rows(len(pictures), wanted_rows=-1, batch_size=len(pictures), prevent_empty_spots=False)
    return lay_grid(pictures, num_rows, -(-len(pictures) // num_rows), "#ffffff")


def store_latent(decoded: Tensor) -> None:
    """Show these latents as the job's preview."""
    state = required_context().state
    state.current_latent = decoded
    state.do_set_current_image()
