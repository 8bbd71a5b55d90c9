"""Self-attention guidance: away from what the network says when the places it looks at most are blurred. Knows no page.

Source: Hong et al., "Improving Sample Quality of Diffusion Models Using Self-Attention Guidance" (2022), algorithm 1, with the details of diffusers'
StableDiffusionSAGPipeline: a kernel of 9, and the guided branch is the negative prompt's.

Shapes: B rows, P pictures, N heads, L tokens of the middle block, K head width, D = N K, C channels, H W latent rows and columns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backend.attention import attention_function
from backend.sampling.sampling_function import calc_cond_uncond_batch

KERNEL_REACH = 4
"""Places on each side of the blur's kernel."""


def blur(latents_BCHW: Tensor, sigma: float) -> Tensor:
    """Gaussian blur along both axes; the kernel has 9 places, fewer in latents with fewer than 5 rows or columns. Reflects at the edges."""
    for axis in (2, 3):
        reach = min(KERNEL_REACH, latents_BCHW.shape[axis] - 1)
        places = torch.arange(-reach, reach + 1, device=latents_BCHW.device, dtype=torch.float32)
        weights = torch.exp(-0.5 * (places / sigma) ** 2)
        shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
        kernel = (weights / weights.sum()).to(latents_BCHW.dtype).view(shape).repeat(latents_BCHW.shape[1], 1, 1, 1)
        padding = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        latents_BCHW = functional.conv2d(functional.pad(latents_BCHW, padding, mode="reflect"), kernel, groups=latents_BCHW.shape[1])
    return latents_BCHW


def middle_size(latent_height: int, latent_width: int, num_tokens: int) -> tuple[int, int] | None:
    """Rows and columns of the middle block: the latents' halved, rounded up, until they have as many tokens; None if they never do."""
    height, width = latent_height, latent_width
    while height * width > num_tokens:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return (height, width) if height * width == num_tokens else None


class AttentionRecorder:
    """A replacement of the middle block's first self-attention that keeps how much each token is looked at, by picture.

    Rows of one step may run on several slots at once; each picture's rows write under its own number.
    """

    def __init__(self, *, records_uncond: bool) -> None:
        self.looks: dict[int, Tensor] = {}
        self.is_on = True
        self._rows_of_interest = "uncond_indices" if records_uncond else "cond_indices"

    def attend(self, q_BLD: Tensor, k_BLD: Tensor, v_BLD: Tensor, options: dict[str, Any]) -> Tensor:
        """The usual attention."""
        heads = options["n_heads"]
        for row in options[self._rows_of_interest] if self.is_on else ():
            self.looks[options["picture_indices"][row]] = self._looks_at(q_BLD[row], k_BLD[row], heads)
        return attention_function(q_BLD, k_BLD, v_BLD, heads)

    @staticmethod
    def _looks_at(q_LD: Tensor, k_LD: Tensor, heads: int) -> Tensor:
        """Attention that each token (L,) receives: the map's mean over heads, summed over queries."""
        q_NLK, k_NLK = (tensor.float().unflatten(-1, (heads, -1)).transpose(0, 1) for tensor in (q_LD, k_LD))
        scores_NLL = q_NLK @ k_NLK.transpose(-1, -2) / math.sqrt(q_NLK.shape[-1])
        return scores_NLL.softmax(dim=-1).mean(dim=0).sum(dim=0)

    def mask_like(self, latents_PCHW: Tensor, threshold: float) -> Tensor | None:
        """(P, 1, H, W): 1 where more attention than `threshold` goes; None if no picture's middle block has the latents' shape."""
        if len(self.looks) != latents_PCHW.shape[0]:
            return None
        height, width = latents_PCHW.shape[2:]
        looks_PL = torch.stack([self.looks[picture].to(latents_PCHW.device) for picture in range(latents_PCHW.shape[0])])
        size = middle_size(height, width, looks_PL.shape[1])
        if size is None:
            return None
        mask_P1HW = (looks_PL > threshold).to(latents_PCHW.dtype).view(-1, 1, *size)
        return functional.interpolate(mask_P1HW, (height, width))


class SelfAttentionGuidance:
    """A post-CFG function: adds scale * (blurred x0 - what the network makes of it)."""

    def __init__(self, scale: float, blur_sigma: float, threshold: float, *, guides_uncond: bool) -> None:
        self.recorder = AttentionRecorder(records_uncond=guides_uncond)
        self._scale, self._blur_sigma, self._threshold, self._guides_uncond = scale, blur_sigma, threshold, guides_uncond

    def add_to(self, unet: Any) -> None:
        """Set the hooks of a patcher."""
        unet.set_model_attn1_replace(self.recorder.attend, "middle", 0, 0)
        unet.set_model_sampler_post_cfg_function(self, disable_cfg1_optimization=self._guides_uncond)

    def __call__(self, args: dict[str, Any]) -> Tensor:
        branch = "uncond" if self._guides_uncond else "cond"
        x_BCHW, x0_BCHW, result_BCHW = args["input"], args[f"{branch}_denoised"], args["denoised"]
        mask_B1HW = self.recorder.mask_like(x0_BCHW, self._threshold)
        self.recorder.looks.clear()
        if mask_B1HW is None or self._scale == 0.0 or self._blur_sigma == 0.0:
            return result_BCHW
        degraded_BCHW = blur(x0_BCHW, self._blur_sigma) * mask_B1HW + x0_BCHW * (1 - mask_B1HW)
        self.recorder.is_on = False
        try:
            noised_BCHW = degraded_BCHW + (x_BCHW - x0_BCHW)
            made_BCHW, _ = calc_cond_uncond_batch(args["model"], args[branch], None, noised_BCHW, args["sigma"], args["model_options"])
        finally:
            self.recorder.is_on = True
        return result_BCHW + self._scale * (degraded_BCHW - made_BCHW)
