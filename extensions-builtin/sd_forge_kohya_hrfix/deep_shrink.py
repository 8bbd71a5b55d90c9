"""Kohya's "deep shrink": early steps run the inner blocks on a smaller picture, so that large pictures get one composition. Knows no page.

Source: kohya_ss, "Deep Shrink Hires.fix" (2023): from a block on and above a noise level the hidden state is made smaller; before an output block
whose skip has another size it is made as large as the skip.

Shapes: B rows, C channels, H W rows and columns of the block.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from backend.misc.image_resize import adaptive_resize

METHODS = ("bicubic", "nearest-exact", "bilinear", "area", "bislerp")


def patch_hrfix(unet: Any, block: int, factor: float, sigmas: tuple[float, float], *, after_skip: bool, down: str, up: str) -> Any:
    """A clone of the patcher that shrinks the hidden state by `factor` at input block `block` while sigma is within `sigmas` (high, low)."""
    high, low = sigmas

    def shrink(hidden_BCHW: Tensor, options: dict[str, Any]) -> Tensor:
        if options["block"][1] != block or not low <= float(options["sigmas"][0]) <= high:
            return hidden_BCHW
        return adaptive_resize(hidden_BCHW, round(hidden_BCHW.shape[3] / factor), round(hidden_BCHW.shape[2] / factor), down, "disabled")

    def grow(hidden_BCHW: Tensor, skip_BCHW: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if hidden_BCHW.shape[2:] != skip_BCHW.shape[2:]:
            hidden_BCHW = adaptive_resize(hidden_BCHW, skip_BCHW.shape[3], skip_BCHW.shape[2], up, "disabled")
        return hidden_BCHW, skip_BCHW

    clone = unet.clone()
    (clone.set_model_input_block_patch_after_skip if after_skip else clone.set_model_input_block_patch)(shrink)
    clone.set_model_output_block_patch(grow)
    return clone
