"""The link for a ControlNet of Z-Image, whose residuals are added to all tokens after every n-th layer. Must not know prompts, files or pages.

Shapes: B rows, C channels, H W latent rows and columns, D token width, h w rows and columns of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from diffusers import ZImageControlNetModel
from torch import Tensor

from backend.families.zimage.controlnet import ZImageControlNetwork, borrow_front, control_places
from backend.nn.deferred_control import Residuals
from backend.nn.padded_text import TEXT_LENGTHS
from backend.patcher.controlnet import ControlNetError
from backend.patcher.latent_controlnet import INPUT, OUTPUT, LatentControlNet, borrow_tensors

if TYPE_CHECKING:
    from backend.modules.k_model import KModel

PICTURE, REST = INPUT, OUTPUT
"""Lists of residuals: of the picture's tokens, and of the tokens behind them."""
_WIDTHS = (("tokens", "dim"), ("heads in number", "n_heads"))


class ZImageControlNet(LatentControlNet):
    """A Union that needs no kind: it sees from the hint what it is."""

    control_model: ZImageControlNetwork
    _num_layers = 0

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset((PICTURE, REST))

    def is_spatial(self, kind: str) -> bool:
        """Only the picture's tokens have places, so a mask does not apply to the others."""
        return kind == PICTURE

    def check_fits(self, model: KModel) -> None:
        """Raises: ControlNetError for a denoiser of another family or width, or with fewer layers."""
        theirs = zimage_config_of(model, self.name)
        self.check_same(theirs, _WIDTHS)
        if self.control_model.num_residuals > theirs.n_layers:
            raise ControlNetError(
                f"{self.name} does not fit the checkpoint in use: it has residuals for {self.control_model.num_residuals} layers, and the checkpoint "
                f"has {theirs.n_layers}. Choose a ControlNet that was made for this model."
            )

    def pre_run(self, model: KModel, percent_to_timestep_function: Callable[[float], float]) -> None:
        """Before the first step: also note how many layers the denoiser has. Raises: ControlNetError."""
        super().pre_run(model, percent_to_timestep_function)
        self._num_layers = model.diffusion_model.config.n_layers

    def pass_options(self) -> dict[str, Any]:
        """What is added within the network has the same strength."""
        return {"strength": self.strength}

    def prepare_pass(self, x_BCHW: Tensor, sigma_B: Tensor, cond: dict[str, Any], batched_number: int) -> tuple[dict[str, Tensor | None], Tensor]:
        """The network's arguments, with the number of text tokens that count, and the hint."""
        arguments, hint = super().prepare_pass(x_BCHW, sigma_B, cond, batched_number)
        return {**arguments, TEXT_LENGTHS: cond.get(TEXT_LENGTHS)}, hint

    def place(self, residuals: Sequence[Tensor]) -> Residuals:
        """The network's own residuals, each once: they are weighed before they are spread."""
        count = self.control_model.num_residuals
        return {PICTURE: list(residuals[:count]), REST: list(residuals[count:])}

    def spread(self, own: Residuals) -> Residuals:
        """An entry for every layer of the denoiser; most have none."""
        places = control_places(self.control_model.num_residuals, self._num_layers)
        spread: Residuals = {}
        for kind, residuals in own.items():
            spread[kind] = [None] * self._num_layers
            for place, residual in zip(places, residuals, strict=True):
                spread[kind][place] = residual
        return spread


def zimage_config_of(model: KModel, name: str) -> Any:
    """The denoiser's configuration. Raises: ControlNetError for another family."""
    theirs: Any = getattr(model.diffusion_model, "config", {})
    if "n_refiner_layers" not in theirs or "cap_feat_dim" not in theirs:
        raise ControlNetError(f"{name} is a ControlNet for Z-Image, but the checkpoint in use is not. Choose one of the checkpoint's family.")
    return theirs


def complete_zimage(network: ZImageControlNetModel, name: str) -> Callable[[KModel], ZImageControlNet]:
    """Function that gives the network the denoiser's embedders and refiners."""

    def complete(model: KModel) -> ZImageControlNet:
        theirs = zimage_config_of(model, name)
        front = borrow_front(theirs, borrow_tensors(model, "", next(network.parameters()).dtype))
        link = ZImageControlNet(ZImageControlNetwork(network, front))  # type: ignore[arg-type]  # another network with the same calls
        link.name = name
        return link

    return complete
