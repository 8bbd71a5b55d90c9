"""The link for a ControlNet of Flux.1, whose residuals are added after double and single blocks. Must not know prompts, files or pages.

Shapes: B rows, C channels, H W latent rows and columns, D token width, h w rows and columns of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backend.nn.controlnet_union import UNION_TYPES
from backend.nn.deferred_control import Residuals
from backend.nn.flux_controlnet import UNION_KINDS, FluxControlNetwork, spread_residuals
from backend.nn.flux_layers import CELL
from backend.patcher.controlnet import NUM_SOFT_WEIGHTS, SOFT_STEP, ControlBase, ControlNet, ControlNetError, crop_and_resize

if TYPE_CHECKING:
    from backend.modules.k_model import KModel

DOUBLE, SINGLE = "input", "output"
"""Lists of residuals: after the double and after the single blocks, as in ComfyUI."""
LATENT_PX = 8
SOFT_WEIGHT = sum(SOFT_STEP**distance for distance in range(1, NUM_SOFT_WEIGHTS + 1)) / NUM_SOFT_WEIGHTS
"""The mean of the weights that a UNet's residuals get in the modes that favor one side."""
_MOST_BLOCKS = 64
_KINDS_OF_TYPES = {"OpenPose": "Pose", "Depth": "Depth", "Soft Edge": "Canny", "Hard Edge": "Canny", "Tile": "Tile"}
"""A Union's kind for each control type of the panel. It knows no normal maps, segments and holes."""
_WIDTHS = (("text features", "joint_attention_dim"), ("pooled text", "pooled_projection_dim"), ("heads", "attention_head_dim"))
Encode = Callable[[Tensor], Tensor]
"""Pictures (I, 3, 8 H, 8 W) in 0..1 to latents (I, C, H, W) as the denoiser sees them."""


def even_weights(value: float) -> dict[str, list[float]]:
    """One weight for all residuals: no block of a transformer is nearer to the picture than another."""
    return {DOUBLE: [value] * _MOST_BLOCKS, SINGLE: [value] * _MOST_BLOCKS}


class FluxControlNet(ControlNet):
    """`encode_hint` is the model's VAE, which a hint must pass unless the network reads pixels. `control_type` is a Union's kind (UNION_KINDS)."""

    control_model: FluxControlNetwork  # type: ignore[assignment]  # another network with the same calls
    control_type = 0
    encode_hint: Encode | None = None
    _num_blocks = (0, 0)

    @property
    def num_types(self) -> int:
        return self.control_model.num_types

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset((DOUBLE, SINGLE))

    def copy_to(self, other: ControlBase) -> None:
        """Copy this link's settings to another link of the same network."""
        super().copy_to(other)
        if isinstance(other, FluxControlNet):
            other.control_type, other.encode_hint = self.control_type, self.encode_hint

    def with_encoder(self, encode_hint: Encode) -> FluxControlNet:
        """A copy whose hints pass this encoder."""
        link = self.copy()
        assert isinstance(link, FluxControlNet)
        link.encode_hint = encode_hint
        return link

    def of_type(self, control_type: int) -> FluxControlNet:
        """A copy for hints of this control type (a number of UNION_TYPES). Raises: ControlNetError if the network does not support it."""
        title = UNION_TYPES[control_type] if 0 <= control_type < len(UNION_TYPES) else str(control_type)
        kind = _KINDS_OF_TYPES.get(title)
        if kind is None or UNION_KINDS.index(kind) >= self.num_types:
            known = [one for one, kind in _KINDS_OF_TYPES.items() if UNION_KINDS.index(kind) < self.num_types]
            raise ControlNetError(f"{self.name} does not support {title} hints. Use one of {', '.join(known)}.")
        link = self.copy()
        assert isinstance(link, FluxControlNet)
        link.control_type = UNION_KINDS.index(kind)
        return link

    def set_cond_hint(self, cond_hint: Tensor, strength: float = 1.0, timestep_percent_range: tuple[float, float] = (0.0, 1.0)) -> FluxControlNet:
        """Also encode the hint, before the denoiser needs the memory. Raises: ControlNetError without a VAE, for a network that reads latents."""
        super().set_cond_hint(cond_hint, strength, timestep_percent_range)
        self._forget_embedding()
        height, width = (side // LATENT_PX for side in cond_hint.shape[-2:])
        if height and width:
            self.cond_hint = self._encode(crop_and_resize(cond_hint, LATENT_PX * height, LATENT_PX * width))
        return self

    def _encode(self, hint: Tensor) -> Tensor:
        if hint.shape[1] == 1:
            hint = hint.expand(-1, 3, -1, -1)
        if self.control_model.reads_pixels:
            return hint
        if self.encode_hint is None:
            raise ControlNetError(f"{self.name} reads the latents of its hint, but no VAE was given. Set encode_hint to the model's encoder.")
        return self.encode_hint(hint)

    def check_fits(self, model: KModel) -> None:
        """Raises: ControlNetError for a denoiser of another family or width."""
        own, theirs = self.control_model.config, getattr(model.diffusion_model, "config", {})
        if "num_single_layers" not in theirs or "joint_attention_dim" not in theirs:
            raise ControlNetError(f"{self.name} is a ControlNet for Flux.1, but the checkpoint in use is not. Choose one of the checkpoint's family.")
        for what, name in (*_WIDTHS, ("heads in number", "num_attention_heads")):
            if own[name] != theirs.get(name):
                raise ControlNetError(
                    f"{self.name} does not fit the checkpoint in use: its {what} are {own[name]}, the checkpoint's {theirs.get(name)}. Choose a "
                    "ControlNet that was made for this model."
                )

    def pre_run(self, model: KModel, percent_to_timestep_function: Callable[[float], float]) -> None:
        """Before the first step: also note how many blocks the denoiser has. Raises: ControlNetError."""
        super().pre_run(model, percent_to_timestep_function)
        config = model.diffusion_model.config
        self._num_blocks = config.num_layers, config.num_single_layers

    def pass_options(self) -> dict[str, Any]:
        """The number of the hint's kind."""
        return {"control_type": self.control_type}

    def prepare_pass(self, x_BCHW: Tensor, sigma_B: Tensor, cond: dict[str, Any], batched_number: int) -> tuple[dict[str, Tensor | None], Tensor]:
        """The network's arguments, with the distilled guidance if it takes one, and the hint."""
        arguments, hint = super().prepare_pass(x_BCHW, sigma_B, cond, batched_number)
        return {**arguments, "guidance": cond.get("guidance") if self.control_model.config.guidance_embeds else None}, hint

    def _fit_hint(self, x_BCHW: Tensor, batched_number: int, dtype: torch.dtype, channels: int = 3, step_px: int = LATENT_PX) -> Tensor:
        """The hint's latents, or its pixels, at the latents' size; encoded again if it was set at another size."""
        factor = LATENT_PX if self.control_model.reads_pixels else 1
        height, width = x_BCHW.shape[-2:]
        if self.cond_hint is None or self.cond_hint.shape[-2:] != (factor * height, factor * width):
            if self.cond_hint_original is None:
                raise ControlNetError(f"{self.name} was added to a run without a hint. Call set_cond_hint first.")
            self.cond_hint = self._encode(crop_and_resize(self.cond_hint_original, LATENT_PX * height, LATENT_PX * width))
            self._forget_embedding()
        pictures = x_BCHW.shape[0] // batched_number
        if self.cond_hint.shape[0] not in (1, pictures):
            raise ControlNetError(
                f"{self.name} got {self.cond_hint.shape[0]} hints for a batch of {pictures} pictures. Give one hint, or one per picture."
            )
        self.cond_hint = self.cond_hint.to(self.device, dtype)
        return self.cond_hint

    def place(self, residuals: Sequence[Tensor]) -> Residuals:
        """The network's own residuals by list, each once: they are weighed before they are spread."""
        num_doubles = self.control_model.num_doubles
        return {DOUBLE: list(residuals[:num_doubles]), SINGLE: list(residuals[num_doubles:])}

    def spread(self, own: Residuals) -> Residuals:
        """An entry for every block of the denoiser."""
        repeats = self.control_model.reads_pixels
        return {
            kind: spread_residuals(own.get(kind, []), count, repeats=repeats) for kind, count in zip((DOUBLE, SINGLE), self._num_blocks, strict=True)
        }

    def inference_memory_requirements(self, dtype: torch.dtype | None) -> int:
        """Bytes for the residuals of a positive and a negative row per hint. Its pass alternates with the denoiser's."""
        hint, config, own = self.cond_hint_original, self.control_model.config, 0
        if hint is not None:
            tokens = hint.shape[-1] * hint.shape[-2] // (LATENT_PX * CELL) ** 2
            numbers = tokens * config.num_attention_heads * config.attention_head_dim * (config.num_layers + config.num_single_layers)
            own = 2 * hint.shape[0] * numbers * self.control_model.dtype.itemsize
        before = self.previous_controlnet
        return own + (0 if before is None else before.inference_memory_requirements(dtype))
