"""Reference pictures for self-attention: before each step the network runs on the noised reference alone, and the keys and values of its
self-attentions are then added to the picture's own during the step.

Uses only the patch surface: a replacement of attn1 and a conditioning modifier. Must not know the page, ControlNet units or preprocessors.

Shapes: B rows, I pictures, C channels, H W latent rows and columns, L tokens of the picture, M of the reference, D width of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

from backend.attention import attention_function
from backend.patcher.unet import UnetPatcher
from backend.sampling.branches import COND, UNCOND
from backend.sampling.sampling_function import calc_cond_uncond_batch

_WRITING = "reference_writes"
_LEFT_OUT = ("control", "area", "mask", "mask_strength", "strength")
"""Parts of a condition that do not apply to the reference: other control networks, and the area it is restricted to."""

Place = tuple[Any, ...]
"""(kind of block, block number, transformer block)."""


@dataclass(eq=False)
class Reference:
    """A reference picture as latents (1, C, H, W). `fidelity` excludes it from the negative branch; it is active between two noise levels."""

    latent_BCHW: Tensor
    noise_BCHW: Tensor
    weight: float = 1.0
    fidelity: float = 0.5
    sigma_range: tuple[float, float] = (0.0, math.inf)
    bank: dict[Place, dict[int, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """Keys and values (I, M, D) by place and branch, for the current step."""

    def acts_at(self, sigma: float) -> bool:
        return self.weight != 0.0 and self.sigma_range[0] <= sigma <= self.sigma_range[1]


class ReferenceAttention:
    """The replacement of attn1. It has a `to`, like hooks that hold tensors, which keeps the UNet on one slot: that of the latents."""

    def __init__(self, references: Sequence[Reference]) -> None:
        self.references = tuple(references)

    def to(self, device: torch.device) -> ReferenceAttention:
        """Returns itself: its contents are rewritten in each step, where the network is."""
        return self

    def clear(self) -> None:
        """Release what the last step stored."""
        for reference in self.references:
            reference.bank.clear()

    def __call__(self, q_BLD: Tensor, k_BLD: Tensor, v_BLD: Tensor, extra: dict[str, Any]) -> Tensor:
        place, heads = (*extra["block"], extra["block_index"]), extra["n_heads"]
        plain_BLD = attention_function(q_BLD, k_BLD, v_BLD, heads)
        writing: Reference | None = extra.get(_WRITING)
        if writing is not None:
            _record(writing, place, k_BLD, v_BLD, extra)
            return plain_BLD
        result_BLD = plain_BLD
        for reference in self.references:
            if place in reference.bank:
                both_BLD = _attend_both(reference.bank[place], (q_BLD, k_BLD, v_BLD), heads, extra)
                if reference.fidelity > 0.0:
                    rows = extra["uncond_indices"]
                    both_BLD[rows] = torch.lerp(both_BLD[rows], plain_BLD[rows], reference.fidelity)
                result_BLD = both_BLD if result_BLD is plain_BLD and reference.weight == 1.0 else (
                    result_BLD + reference.weight * (both_BLD - plain_BLD)
                )  # fmt: skip
        return result_BLD


def _record(reference: Reference, place: Place, k_BMD: Tensor, v_BMD: Tensor, extra: dict[str, Any]) -> None:
    written = reference.bank.setdefault(place, {})
    for kind, rows in ((COND, extra["cond_indices"]), (UNCOND, extra["uncond_indices"])):
        if rows:
            written[kind] = k_BMD[rows], v_BMD[rows]


def _attend_both(
    written: dict[int, tuple[Tensor, Tensor]], own: tuple[Tensor, Tensor, Tensor], heads: int, extra: dict[str, Any]
) -> Tensor:  # fmt: skip
    """Attention over the picture's own tokens plus the reference's, for the same branch and picture."""
    q_BLD, k_BLD, v_BLD = own
    kinds = [UNCOND if row in set(extra["uncond_indices"]) else COND for row in range(q_BLD.shape[0])]
    found = [written.get(kind, written[next(iter(written))]) for kind in kinds]
    keys_BMD, values_BMD = (torch.stack([pair[part][row % pair[part].shape[0]] for row, pair in enumerate(found)]) for part in (0, 1))
    return attention_function(q_BLD, torch.cat([k_BLD, keys_BMD], dim=1), torch.cat([v_BLD, values_BMD], dim=1), heads)


# the run over the reference


def write_references(
    model: Any, x: Tensor, timestep: Tensor, uncond: Any, cond: Any, cond_scale: float, model_options: dict[str, Any], seed: Any
) -> tuple[Any, ...]:
    """A conditioning modifier: stores the references' keys and values for this step, and returns its arguments unchanged."""
    hook = find_reference_attention(model_options)
    sigma = float(timestep[0])
    for reference in () if hook is None else hook.references:
        reference.bank.clear()
        if reference.acts_at(sigma):
            _write(
                reference,
                model,
                x,
                timestep,
                _whole(uncond) if _runs_uncond(uncond, cond_scale, model_options) else None,
                _whole(cond),
                model_options,
            )
    return model, x, timestep, uncond, cond, cond_scale, model_options, seed


def _write(reference: Reference, model: Any, x_BCHW: Tensor, sigma_B: Tensor, uncond: Any, cond: Any, options: dict[str, Any]) -> None:
    latent, noise = (one.to(x_BCHW).expand(x_BCHW.shape[0], -1, -1, -1) for one in (reference.latent_BCHW, reference.noise_BCHW))
    noised_BCHW = model.predictor.noise_scaling(sigma_B, noise, latent)
    told = {**options, "transformer_options": {**options.get("transformer_options", {}), _WRITING: reference}}
    calc_cond_uncond_batch(model, cond, uncond, noised_BCHW, sigma_B, told)


def _whole(conditions: Any) -> list[dict[str, Any]]:
    """The first condition that covers the whole picture."""
    return [{name: value for name, value in conditions[0].items() if name not in _LEFT_OUT}]


def _runs_uncond(uncond: Any, cond_scale: float, options: dict[str, Any]) -> bool:
    return bool(uncond) and (not math.isclose(cond_scale, 1.0) or options.get("disable_cfg1_optimization", False))


# adding it to a model


def find_reference_attention(model_options: dict[str, Any]) -> ReferenceAttention | None:
    """The reference hook in these options."""
    replacements = model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn1", {})
    return next((hook for hook in replacements.values() if isinstance(hook, ReferenceAttention)), None)


def add_reference(unet: UnetPatcher, reference: Reference) -> UnetPatcher:
    """A clone that also attends to `reference` in every self-attention. Reserves memory for what a step stores."""
    patched = unet.clone()
    before = find_reference_attention(patched.model_options)
    hook = ReferenceAttention([*(before.references if before else ()), reference])
    for segment in patched.model.program.segments:
        if any(isinstance(layer, Transformer2DModel) for layer in segment.layers):
            patched.set_model_attn1_replace(hook, *segment.key)
    patched.add_conditioning_modifier(write_references, ensure_uniqueness=True)
    patched.add_extra_preserved_memory_during_sampling(_bank_bytes(patched, reference.latent_BCHW.shape[-2] * reference.latent_BCHW.shape[-1]))
    return patched


def _bank_bytes(unet: UnetPatcher, positions: int) -> int:
    """Bytes of one picture's keys and values in both branches. A width shared by several levels is counted for the finest."""
    network = unet.model
    widths: list[int] = list(network.diffusion_model.config.block_out_channels)
    layers = [layer for segment in network.program.segments for layer in segment.layers if isinstance(layer, Transformer2DModel)]
    numbers = 0
    for layer in layers:
        width = int(layer.config["num_attention_heads"] * layer.config["attention_head_dim"])
        numbers += 4 * len(layer.get_submodule("transformer_blocks")) * width * positions // 4 ** widths.index(width)
    return numbers * network.computation_dtype.itemsize
