"""Objects passed to script hooks after the request; hooks change their fields in place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=False)
class MaskBlendArgs:
    """on_mask_blend: inpainting restores the original where it is not masked, at each step and once at the end."""

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
    """post_sample: latents before decoding."""

    samples: Any


@dataclass
class PostprocessImageArgs:
    """postprocess_image and postprocess_image_after_composite: one PIL picture."""

    image: Any
    index: int = 0


@dataclass
class PostProcessMaskOverlayArgs:
    """postprocess_maskoverlay: the overlay for the result."""

    index: int
    mask_for_overlay: Any
    overlay_image: Any


@dataclass
class PostprocessBatchListArgs:
    """postprocess_batch_list: the pictures of a batch, CHW 0..1; the list may grow or shrink."""

    images: list[Any] = field(default_factory=list)


@dataclass
class OnComponent:
    """on_before_component and on_after_component of a script: the requested control."""

    component: Any


# Objects passed by script_callbacks


@dataclass
class ImageSaveParams:
    """before_image_saved, image_saved: `p` is the request or None; `pnginfo` contains the infotext under "parameters"."""

    image: Any
    p: Any
    filename: str
    pnginfo: dict[str, Any]


@dataclass
class ExtraNoiseParams:
    """extra_noise: `noise`, the latents `x` it was added to, and the result `xi`."""

    noise: Any
    x: Any
    xi: Any


@dataclass
class CFGDenoiserParams:
    """cfg_denoiser: inputs of the upcoming network call; all may be changed.

    `text_cond` and `text_uncond` are rows as the network takes them: a tensor (B, L, D), or for SDXL a dict of tensors.
    """

    x: Any
    image_cond: Any
    sigma: Any
    sampling_step: int
    total_sampling_steps: int
    text_cond: Any
    text_uncond: Any
    denoiser: Any = None


@dataclass
class CFGDenoisedParams:
    """cfg_denoised: what the network answered, a row for each picture's prompt and then for its negative prompt; change `x` to change the picture."""

    x: Any
    sampling_step: int
    total_sampling_steps: int
    inner_model: Any = None


@dataclass
class AfterCFGCallbackParams:
    """cfg_after_cfg: the result after guidance; change `x` to change the picture."""

    x: Any
    sampling_step: int
    total_sampling_steps: int


@dataclass
class UiTrainTabParams:
    """Kept for extensions that import it; there is no Train tab."""

    txt2img_preview_params: Any


@dataclass
class ImageGridLoopParams:
    """image_grid: the pictures and the grid's columns and rows."""

    imgs: Any
    cols: int
    rows: int


@dataclass
class BeforeTokenCounterParams:
    """before_token_counter: the text about to be counted."""

    prompt: str
    steps: int
    styles: list[str]
    is_positive: bool = True
