"""The link for a ControlNet of Flux.1, whose residuals are added after double and single blocks. Must not know prompts, files or pages.

Shapes: B rows, C channels, H W latent rows and columns, D token width, h w rows and columns of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from backend.nn.controlnet_union import UNION_TYPES
from backend.nn.deferred_control import Residuals
from backend.nn.flux_controlnet import UNION_KINDS, FluxControlNetwork, spread_residuals
from backend.patcher.controlnet import ControlBase, ControlNetError
from backend.patcher.latent_controlnet import INPUT, OUTPUT, LatentControlNet

if TYPE_CHECKING:
    from backend.modules.k_model import KModel

DOUBLE, SINGLE = INPUT, OUTPUT
"""Lists of residuals: after the double and after the single blocks."""
_KINDS_OF_TYPES = {"OpenPose": "Pose", "Depth": "Depth", "Soft Edge": "Canny", "Hard Edge": "Canny", "Tile": "Tile"}
"""A Union's kind for each control type of the panel. It knows no normal maps, segments and holes."""
_WIDTHS = (("text features", "joint_attention_dim"), ("pooled text", "pooled_projection_dim"), ("heads", "attention_head_dim"),
           ("heads in number", "num_attention_heads"))  # fmt: skip


class FluxControlNet(LatentControlNet):
    """`control_type` is a Union's kind (UNION_KINDS)."""

    control_model: FluxControlNetwork
    control_type = 0
    _num_blocks = (0, 0)

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset((DOUBLE, SINGLE))

    def copy_to(self, other: ControlBase) -> None:
        """Copy this link's settings to another link of the same network."""
        super().copy_to(other)
        if isinstance(other, FluxControlNet):
            other.control_type = self.control_type

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

    def check_fits(self, model: KModel) -> None:
        """Raises: ControlNetError for a denoiser of another family or width."""
        theirs = getattr(model.diffusion_model, "config", {})
        if "num_single_layers" not in theirs or "joint_attention_dim" not in theirs:
            raise ControlNetError(f"{self.name} is a ControlNet for Flux.1, but the checkpoint in use is not. Choose one of the checkpoint's family.")
        self.check_same(theirs, _WIDTHS)

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
