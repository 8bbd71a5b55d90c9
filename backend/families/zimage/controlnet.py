"""ControlNet Unions for Z-Image as callables that return residuals: diffusers' ZImageControlNetModel with layers that it takes from the denoiser.

The ControlNet has no embedders and no refiners of its own; it uses the denoiser's, whose picture tokens it may change on the way (2.0 and 2.1). Its
residuals are for all tokens: picture, padding and text.

Shapes: B rows, C channels, H W latent rows and columns, L tokens of the picture and its padding, T text tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import ZImageControlNetModel
from torch import Tensor, nn

from backend.families.one_stream import COSINES, IMAGE, MASK, MODULATION, SINES, TEXT
from backend.families.zimage.identify import CELL, LATENT_CHANNELS
from backend.families.zimage.layers import PATCH, ZImageEmbedding, pack, pad_tokens, run_block, start_tensors
from backend.nn.controlnet import repeat_rows
from backend.nn.padded_text import TEXT_LENGTHS
from backend.nn.stream_layers import Rope
from backend.nn.transformer_controlnet import TransformerControlNetwork, as_picture
from backend.nn.zimage import ZImageTransformer
from backend.state_dict import build_empty

INPAINT_CHANNELS = 2 * LATENT_CHANNELS + 1
"""Of a hint: the latents of a map, which part of the picture is given, and the latents of the picture to inpaint."""
_USUAL_LAYERS, _USUAL_DENOISER = 6, 30
_SHARED_WITH_TRANSFORMER = ("dim", "n_refiner_layers", "n_heads", "n_kv_heads", "norm_eps")
_FRONT_FIELDS = (*_SHARED_WITH_TRANSFORMER, "in_channels", "cap_feat_dim", "rope_theta", "t_scale", "axes_dims")


def build_front(config: Mapping[str, Any]) -> ZImageTransformer:
    """The denoiser's embedders and refiners, without its layers."""
    front: ZImageTransformer = ZImageTransformer(n_layers=0, **{name: config[name] for name in _FRONT_FIELDS})
    del front.all_final_layer
    return front


def borrow_front(config: Mapping[str, Any], find: Callable[[str], Tensor]) -> ZImageTransformer:
    """A denoiser's embedders and refiners with their tensors, which `find` returns."""
    front = build_empty(lambda: build_front(config))
    for name, _ in list(front.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(front.get_submodule(owner), leaf, nn.Parameter(find(name), requires_grad=False))
    return front


class ZImageControlNetwork(TransformerControlNetwork):
    """`front` is a copy of the denoiser's embedders and refiners."""

    def __init__(self, model: ZImageControlNetModel, front: ZImageTransformer) -> None:
        super().__init__(model)
        self.front = front

    @property
    def hole_value(self) -> float | None:
        return 0.5 if self._fills_holes else None

    @property
    def needs_hole(self) -> bool:
        return False

    @property
    def _fills_holes(self) -> bool:
        return bool(self.config.control_in_dim == INPAINT_CHANNELS)

    def join_hint(self, latents: Tensor, given_B1HW: Tensor | None) -> Tensor:
        """A map or, with `given_B1HW`, a picture to inpaint; what is not there is zero."""
        if not self._fills_holes:
            return latents
        nothing = torch.zeros_like(latents)
        parts = [latents, nothing[:, :1], nothing] if given_B1HW is None else [nothing, given_B1HW, latents]
        return torch.cat(parts, dim=1)

    @property
    def num_residuals(self) -> int:
        """For each of so many layers of the denoiser."""
        return len(self.model.control_layers)

    @property
    def residual_width(self) -> int:
        return int(self.config.dim) * self.num_residuals

    def make_empty(self) -> ZImageControlNetwork:
        """A new network of the same kind with the same names and types, whose weights are yet to be filled."""
        model = ZImageControlNetModel(**{name: value for name, value in self.config.items() if not name.startswith("_")})
        made = type(self)(model, build_front(self.front.config))
        nn.Module.to(made, self.dtype)
        return made.requires_grad_(False).train(self.training)

    def embed_hint(self, hint: Tensor) -> Tensor:
        """Tokens (B, L, D) of a hint (B, 16 or 33, H, W), with padding."""
        return pad_tokens(self.model.control_all_x_embedder[PATCH](pack(hint)), self.front.pads.picture)

    def forward(
        self,
        x: Tensor,
        hint: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        text_lengths: Tensor | None = None,
        hint_embedding: Tensor | None = None,
        strength: float = 1.0,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Residuals of the picture (B, D, h, w) layer by layer, then those of the tokens behind it (B, D, padding + T, 1).

        `x` (B, 16, H, W), `timesteps` (B,) 0..1, `context` (B, T, D), `text_lengths` (B,) how many text tokens count. The hint, or its embedding,
        may have fewer rows than `x` if their number divides that of `x`. `strength` is that of what is added within the network.
        """
        if context is None:
            raise ValueError("A ControlNet for Z-Image needs text features, which this model does not give. Use it with Z-Image.")
        rows = {"x": x, "timesteps": timesteps, "context": context}
        rows |= {} if text_lengths is None else {TEXT_LENGTHS: text_lengths}
        tensors = start_tensors(ZImageEmbedding(self.front), rows)
        control_BLD = repeat_rows(self.embed_hint(hint) if hint_embedding is None else hint_embedding, x.shape[0]).to(tensors[IMAGE])
        found = self._run(tensors, control_BLD.expand(x.shape[0], -1, -1), strength)
        height, width = (-(-side // CELL) for side in x.shape[2:])
        picture = [as_picture(one[:, : height * width], height, width) for one in found]
        return [*picture, *(as_picture(one[:, height * width :], one.shape[1] - height * width, 1) for one in found)]

    def _run(self, tensors: Mapping[str, Tensor], control_BLD: Tensor, strength: float) -> list[Tensor]:
        image_BLD, text_BTD, modulation_BD, mask = tensors[IMAGE], tensors[TEXT], tensors[MODULATION], tensors.get(MASK)
        rope, num_picture = (tensors[COSINES], tensors[SINES]), image_BLD.shape[1]
        picture_rope, text_rope = ((rope[0][:, part], rope[1][:, part]) for part in (slice(0, num_picture), slice(num_picture, None)))
        hints, control_BLD = self._refine_control(control_BLD, image_BLD, modulation_BD, picture_rope)
        for number, block in enumerate(self.front.noise_refiner):
            image_BLD = run_block(block, image_BLD, modulation_BD, picture_rope, None)
            image_BLD = image_BLD + hints[number].to(image_BLD) * strength if number in hints else image_BLD
        for block in self.front.context_refiner:
            text_BTD = run_block(block, text_BTD, modulation_BD, text_rope, None if mask is None else mask[..., num_picture:])
        tokens_BLD, control_BLD = (torch.cat([one_BLD, text_BTD], dim=1) for one_BLD in (image_BLD, control_BLD))
        return _run_control(self.model.control_layers, control_BLD, tokens_BLD, modulation_BD, rope, mask)[0]

    def _refine_control(self, control_BLD: Tensor, image_BLD: Tensor, modulation_BD: Tensor, rope: Rope) -> tuple[Mapping[int, Tensor], Tensor]:
        """(what is added after the denoiser's refiners by their number, the control stream before its layers)."""
        kind = self.config.add_control_noise_refiner
        if kind is None:
            for block in self.model.control_noise_refiner:
                control_BLD = run_block(block, control_BLD, modulation_BD, rope, None)
            return {}, control_BLD
        layers = self.model.control_layers if kind == "control_layers" else self.model.control_noise_refiner
        found, control_BLD = _run_control(layers, control_BLD, image_BLD, modulation_BD, rope, None)
        return dict(zip(self.config.control_refiner_layers_places, found)), control_BLD


def _run_control(
    layers: Sequence[Any], control_BLD: Tensor, tokens_BLD: Tensor, modulation_BD: Tensor, rope: Rope, mask: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """(what each layer adds, the control stream after them). The first layer joins the stream to the denoiser's tokens."""
    found = []
    for number, layer in enumerate(layers):
        if number == 0:
            control_BLD = layer.before_proj(control_BLD.to(modulation_BD.dtype)).to(tokens_BLD.dtype) + tokens_BLD
        control_BLD = run_block(layer, control_BLD, modulation_BD, rope, mask)
        found.append(layer.after_proj(control_BLD.to(modulation_BD.dtype)))
    return found, control_BLD


class CountedControlNetwork(ZImageControlNetwork):
    """A ControlNet whose costs are counted: like the others, its hint comes as pixels, but only their number matters."""

    def embed_hint(self, hint: Tensor) -> Tensor:
        return super().embed_hint(hint.new_empty(hint.shape[0], self.config.control_in_dim, hint.shape[2] // 8, hint.shape[3] // 8))


def build_for_counting(zimage: Any) -> CountedControlNetwork:
    """A ControlNet of the usual size for a transformer, on the meta device: the first Union's, with a fifth of its layers."""
    count = max(1, len(zimage.layers) * _USUAL_LAYERS // _USUAL_DENOISER)
    config = {name: zimage.config[name] for name in _SHARED_WITH_TRANSFORMER}
    places = control_places(count, len(zimage.layers))
    with torch.device("meta"):
        model = ZImageControlNetModel(control_layers_places=places, control_in_dim=LATENT_CHANNELS, **config)
        return CountedControlNetwork(model, build_front(zimage.config))


def control_places(num_residuals: int, num_layers: int) -> list[int]:
    """Which of the denoiser's layers have residuals: every n-th from the first. 6 of 30: 0, 5 .. 25."""
    return [number * (num_layers // num_residuals) for number in range(num_residuals)]
