"""The link for a ControlNet of a transformer: its hint passes the model's VAE, and its residuals are pictures of tokens.

Must not know families, prompts, files or pages.

Shapes: B rows, I pictures, C channels, H W latent rows and columns, D token width, h w rows and columns of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from backend import memory_management
from backend.nn.transformer_controlnet import TransformerControlNetwork
from backend.patcher.controlnet import NUM_SOFT_WEIGHTS, SOFT_STEP, ControlBase, ControlNet, ControlNetError, crop_and_resize
from backend.patcher.weight_patches import unpatched_tensors
from backend.storage.kinds import storage_of

if TYPE_CHECKING:
    from backend.modules.k_model import KModel

INPUT, OUTPUT = "input", "output"
"""Lists of residuals, as in ComfyUI."""
LATENT_PX, CELL = 8, 2
SOFT_WEIGHT = sum(SOFT_STEP**distance for distance in range(1, NUM_SOFT_WEIGHTS + 1)) / NUM_SOFT_WEIGHTS
"""The mean of the weights that a UNet's residuals get in the modes that favor one side."""
_MOST_BLOCKS = 64
Encode = Callable[[Tensor], Tensor]
"""Pictures (I, 3, 8 H, 8 W) in 0..1 to latents (I, C, H, W) as the denoiser sees them."""


def even_weights(value: float) -> dict[str, list[float]]:
    """One weight for all residuals: no block of a transformer is nearer to the picture than another."""
    return {INPUT: [value] * _MOST_BLOCKS, OUTPUT: [value] * _MOST_BLOCKS}


class HintEncoder(ControlBase):
    """A link whose hints pass an encoder, `encode_hint`: the model's VAE."""

    encode_hint: Encode | None = None

    def copy_to(self, other: ControlBase) -> None:
        """Copy this link's settings to another link of the same network."""
        super().copy_to(other)
        if isinstance(other, HintEncoder):
            other.encode_hint = self.encode_hint

    def with_encoder(self, encode_hint: Encode) -> HintEncoder:
        """A copy whose hints pass this encoder."""
        link = self.copy()
        assert isinstance(link, HintEncoder)
        link.encode_hint = encode_hint
        return link


class LatentControlNet(HintEncoder, ControlNet):
    """A ControlNet whose hint is encoded before the denoiser needs the memory, unless its network reads pixels.

    A hint for inpainting is below 0 where the picture is to be filled.
    """

    control_model: TransformerControlNetwork  # type: ignore[assignment]  # another network with the same calls

    @property
    def num_types(self) -> int:
        return self.control_model.num_types

    def set_cond_hint(self, cond_hint: Tensor, strength: float = 1.0, timestep_percent_range: tuple[float, float] = (0.0, 1.0)) -> LatentControlNet:
        """Also encode the hint, before the denoiser needs the memory. Raises: ControlNetError without a VAE, for a network that reads latents."""
        super().set_cond_hint(cond_hint, strength, timestep_percent_range)
        self._forget_embedding()
        height, width = (side // LATENT_PX for side in cond_hint.shape[-2:])
        if height and width:
            self.cond_hint = self._encode(crop_and_resize(cond_hint, LATENT_PX * height, LATENT_PX * width))
        return self

    def _encode(self, hint: Tensor) -> Tensor:
        """What the network reads, of a hint in 0..1."""
        network = self.control_model
        hint = hint.expand(-1, 3, -1, -1) if hint.shape[1] == 1 else hint
        if network.reads_pixels:
            return hint
        if self.encode_hint is None:
            raise ControlNetError(f"{self.name} reads the latents of its hint, but no VAE was given. Set encode_hint to the model's encoder.")
        hole_B1HW = (hint < 0).any(dim=1, keepdim=True)
        has_hole = bool(hole_B1HW.any())
        if network.needs_hole and not has_hole:
            raise ControlNetError(
                f"{self.name} is for inpainting, but its hint has no part to fill. Choose the preprocessor inpaint_only or "
                "inpaint_global_harmonious, and paint a mask."
            )
        if not has_hole or network.hole_value is None:
            return network.join_hint(self._encode_pixels(hint.clamp(min=0.0)), None)
        latents = self._encode_pixels(torch.where(hole_B1HW, network.hole_value, hint))
        given_B1HW = 1.0 - interpolate(hole_B1HW.float(), size=latents.shape[-2:], mode="nearest")
        return network.join_hint(latents, given_B1HW.to(latents))

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        assert self.encode_hint is not None
        return self.encode_hint(pixels) + self.control_model.latent_offset

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

    def check_same(self, theirs: Mapping[str, Any], widths: tuple[tuple[str, str], ...]) -> None:
        """Raises: ControlNetError if one of these (what it is, its name in both configurations) differs from the denoiser's."""
        for what, name in widths:
            if (own := self.control_model.config[name]) != theirs.get(name):
                raise ControlNetError(
                    f"{self.name} does not fit the checkpoint in use: its {what} are {own}, the checkpoint's {theirs.get(name)}. Choose a "
                    "ControlNet that was made for this model."
                )

    def inference_memory_requirements(self, dtype: torch.dtype | None) -> int:
        """Bytes for the residuals of a positive and a negative row per hint. Its pass alternates with the denoiser's."""
        hint, own = self.cond_hint_original, 0
        if hint is not None:
            tokens = hint.shape[-1] * hint.shape[-2] // (LATENT_PX * CELL) ** 2
            own = 2 * hint.shape[0] * tokens * self.control_model.residual_width * self.control_model.dtype.itemsize
        before = self.previous_controlnet
        return own + (0 if before is None else before.inference_memory_requirements(dtype))


class BorrowingControlNet(HintEncoder):
    """A ControlNet that lacks layers, which it takes from the checkpoint it is used with, without that one's LoRAs.

    `complete(denoiser)` makes the whole link. The one made last is kept as long as its checkpoint exists; copies share it.
    Raises: ControlNetError for a denoiser that does not have the layers.
    """

    def __init__(self, complete: Callable[[KModel], LatentControlNet], device: torch.device | None = None) -> None:
        super().__init__(device)
        self._complete = complete
        self._made: WeakKeyDictionary[KModel, LatentControlNet] = WeakKeyDictionary()

    def copy(self) -> BorrowingControlNet:
        """The same file with the same settings, in no chain."""
        other = type(self)(self._complete, self.device)
        other._made = self._made
        self.copy_to(other)
        return other

    def copy_for(self, model: KModel) -> LatentControlNet:
        """A ControlNet completed with layers of this denoiser."""
        found = self._made.get(model)
        if found is None:
            for old in self._made.values():  # the next network has the same module, which must be on the host
                memory_management.unload_model_clones(old.control_model_wrapped)
                old.control_model_wrapped.forge_unpatch_model(torch.device("cpu"))
            self._made.clear()
            found = self._made[model] = self._complete(model)
        link = found.copy()
        assert isinstance(link, LatentControlNet)
        self.copy_to(link)
        return link


def borrow_tensors(model: KModel, start: str, dtype: torch.dtype) -> Callable[[str], Tensor]:
    """Function from a name below `start` to a host copy of the denoiser's tensor, without its LoRAs. Raises: ControlNetError if there is none."""
    base = unpatched_tensors(model)

    def find(name: str) -> Tensor:
        tensor = base.get(f"diffusion_model.{start}{name}")
        if tensor is None:
            raise ControlNetError(f"A ControlNet needs {start}{name} of the checkpoint in use, which does not have it. Choose another checkpoint.")
        return storage_of(tensor).dequantize(dtype).to("cpu", dtype, copy=True)

    return find
