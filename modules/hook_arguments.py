"""What script hooks are handed besides the request; they change its fields in place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=False)
class MaskBlendArgs:
    """on_mask_blend: inpainting lays the original over what is not masked, at each step and once at the end."""

    current_latent: Any
    nmask: Any
    init_latent: Any
    mask: Any
    blended_latent: Any
    denoiser: Any = None
    sigma: Any = None

    @property
    def is_final_blend(self) -> bool:
        return self.denoiser is None


@dataclass
class PostSampleArgs:
    """post_sample: latents before they are decoded."""

    samples: Any


@dataclass
class PostprocessImageArgs:
    """postprocess_image and postprocess_image_after_composite: one PIL picture."""

    image: Any
    index: int = 0


@dataclass
class PostProcessMaskOverlayArgs:
    """postprocess_maskoverlay: what will be laid over the result."""

    index: int
    mask_for_overlay: Any
    overlay_image: Any


@dataclass
class PostprocessBatchListArgs:
    """postprocess_batch_list: the pictures of a batch, CHW 0..1; the list may grow or shrink."""

    images: list[Any] = field(default_factory=list)
