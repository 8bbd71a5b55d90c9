"""The link for a ControlNet of SD3 or SD3.5, whose residuals are added after joint blocks. Must not know prompts, files or pages.

Shapes: B rows, C channels, H W latent rows and columns, D token width, h w rows and columns of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from diffusers import SD3ControlNetModel
from torch import Tensor

from backend.families.sd3.controlnet import Sd3ControlNetwork, borrow_embedding
from backend.nn.deferred_control import Residuals
from backend.nn.transformer_controlnet import spread_evenly
from backend.patcher.controlnet import ControlBase, ControlNetError
from backend.patcher.latent_controlnet import OUTPUT, LatentControlNet, borrow_tensors

if TYPE_CHECKING:
    from backend.modules.k_model import KModel

_WIDTHS = (("pooled text", "pooled_projection_dim"), ("heads", "attention_head_dim"), ("heads in number", "num_attention_heads"))
_TEXT_WIDTHS = (("text features", "joint_attention_dim"), ("norms of queries and keys", "qk_norm"))


class Sd3ControlNet(LatentControlNet):
    """`is_canny`: Stability's network for edges, which was trained with levels of 0.5 to 128 where the VAE expects -1 to 1."""

    control_model: Sd3ControlNetwork
    is_canny = False
    _num_blocks = 0

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset((OUTPUT,))

    def copy_to(self, other: ControlBase) -> None:
        """Copy this link's settings to another link of the same network."""
        super().copy_to(other)
        if isinstance(other, Sd3ControlNet):
            other.is_canny = self.is_canny

    def check_fits(self, model: KModel) -> None:
        """Raises: ControlNetError for a denoiser of another family or width."""
        theirs = sd3_config_of(model, self.name)
        self.check_same(theirs, (*_WIDTHS, *(_TEXT_WIDTHS if self.control_model.reads_text else ())))

    def pre_run(self, model: KModel, percent_to_timestep_function: Callable[[float], float]) -> None:
        """Before the first step: also note how many blocks the denoiser has. Raises: ControlNetError."""
        super().pre_run(model, percent_to_timestep_function)
        self._num_blocks = model.diffusion_model.config.num_layers

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return super()._encode_pixels((pixels * 127.5 + 1.5) / 2.0 if self.is_canny else pixels)

    def place(self, residuals: Sequence[Tensor]) -> Residuals:
        """The network's own residuals, each once: they are weighed before they are spread."""
        return {OUTPUT: list(residuals)}

    def spread(self, own: Residuals) -> Residuals:
        """An entry for every block of the denoiser."""
        return {OUTPUT: spread_evenly(own.get(OUTPUT, []), self._num_blocks)}


def sd3_config_of(model: KModel, name: str) -> Any:
    """The denoiser's configuration. Raises: ControlNetError for another family."""
    theirs: Any = getattr(model.diffusion_model, "config", {})
    if "caption_projection_dim" not in theirs or "pos_embed_max_size" not in theirs:
        raise ControlNetError(f"{name} is a ControlNet for SD 3, but the checkpoint in use is not. Choose one of the checkpoint's family.")
    return theirs


def complete_sd3(network: SD3ControlNetModel, name: str, *, is_canny: bool) -> Callable[[KModel], Sd3ControlNet]:
    """Function that gives Stability's network the denoiser's embedding of latents."""

    def complete(model: KModel) -> Sd3ControlNet:
        theirs = sd3_config_of(model, name)
        if theirs.num_attention_heads * theirs.attention_head_dim != network.inner_dim:
            raise ControlNetError(
                f"{name} does not fit the checkpoint in use: its tokens are {network.inner_dim} wide, the checkpoint's "
                f"{theirs.num_attention_heads * theirs.attention_head_dim}. It was made for SD3.5 large; choose such a checkpoint."
            )
        borrow_embedding(network, int(theirs.pos_embed_max_size), borrow_tensors(model, "pos_embed.", next(network.parameters()).dtype))
        link = Sd3ControlNet(Sd3ControlNetwork(network))  # type: ignore[arg-type]  # another network with the same calls
        link.name, link.is_canny = name, is_canny
        return link

    return complete
