"""ControlNets for SD3 and SD3.5 as callables that return residuals: diffusers' SD3ControlNetModel with the arguments of the other ControlNets.

Two kinds. InstantX's have joint blocks and read the text, but zeros instead of pooled text, and latents that are not centered; alimama's, for
inpainting, also read a mask. Stability's, for SD3.5 large, have blocks without text and take the embedding of the latents from the denoiser.

Shapes: B rows, C channels, H W latent rows and columns, L tokens of the picture, T text tokens, D token width, h w rows and columns of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import SD3ControlNetModel
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor, nn

from backend.families.sd3.identify import LATENT_CHANNELS, PATCH
from backend.families.sd3.latent import LATENT
from backend.families.sd3.layers import JointAttentionProcessor, pad_to_cells, run_joint_block, run_single_block
from backend.nn.controlnet import repeat_rows
from backend.nn.mmditx import make_table_a_parameter
from backend.nn.transformer_controlnet import TransformerControlNetwork, as_picture

_USUAL_BLOCKS = 12
_SHARED_WITH_TRANSFORMER = ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "caption_projection_dim",
                            "pooled_projection_dim", "pos_embed_max_size", "qk_norm")  # fmt: skip


def build_library_network(config: Mapping[str, Any], max_cells: int = 0) -> SD3ControlNetModel:
    """The library's network. `max_cells`: one that borrows the embedding of latents knows so many positions per side."""
    model = SD3ControlNetModel(**config)
    if max_cells:
        model.pos_embed = PatchEmbed(
            height=2 * PATCH, width=2 * PATCH, patch_size=PATCH, in_channels=LATENT_CHANNELS, embed_dim=model.inner_dim, pos_embed_max_size=max_cells
        )
    if model.pos_embed is not None:
        make_table_a_parameter(model.pos_embed)
    return model


def borrow_embedding(model: SD3ControlNetModel, max_cells: int, find: Callable[[str], Tensor]) -> None:
    """Give a network without one the embedding of the latents and their positions, whose tensors `find` returns."""
    with torch.device("meta"):
        model.pos_embed = build_library_network({**plain_config(model), "num_layers": 0}, max_cells).pos_embed
    for name, _ in list(model.pos_embed.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.pos_embed.get_submodule(owner), leaf, nn.Parameter(find(name), requires_grad=False))


def plain_config(model: SD3ControlNetModel) -> dict[str, Any]:
    """The arguments that the library's network was built with."""
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


class Sd3ControlNetwork(TransformerControlNetwork):
    """A ControlNet around diffusers' module."""

    def __init__(self, model: SD3ControlNetModel) -> None:
        super().__init__(model)
        self.model.set_attn_processor(JointAttentionProcessor())

    @property
    def reads_text(self) -> bool:
        return self.model.context_embedder is not None

    @property
    def hole_value(self) -> float | None:
        return 0.0 if self.config.extra_conditioning_channels else None

    @property
    def latent_offset(self) -> float:
        """InstantX's networks read latents from which no shift was taken."""
        assert isinstance(LATENT.shift, float) and isinstance(LATENT.scale, float)
        return LATENT.shift * LATENT.scale if self.reads_text and self.hole_value is None else 0.0

    @property
    def residual_width(self) -> int:
        return int(self.model.inner_dim * len(self.model.controlnet_blocks))

    @property
    def max_cells(self) -> int:
        """How many positions a borrowed embedding knows per side; 0 for an embedding of its own or none."""
        borrows = not self.config.use_pos_embed and self.model.pos_embed is not None
        return int(self.model.pos_embed.pos_embed_max_size) if borrows else 0

    def make_empty(self) -> Sd3ControlNetwork:
        """A new network of the same kind with the same names and types, whose weights are yet to be filled."""
        model = build_library_network(plain_config(self.model), self.max_cells)
        nn.Module.to(model, self.dtype)  # diffusers' own `to` warns about every change of type
        return type(self)(model).requires_grad_(False).train(self.training)

    def embed_hint(self, hint: Tensor) -> Tensor:
        """Tokens (B, L, D) of a hint: latents (B, 16, H, W) and, for inpainting, the given part (B, 1, H, W) behind them."""
        embedded: Tensor = self.model.pos_embed_input(pad_to_cells(hint))
        return embedded

    def forward(
        self,
        x: Tensor,
        hint: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        hint_embedding: Tensor | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Residuals (B, D, h, w) of the blocks in order.

        `x` (B, 16, H, W), `timesteps` (B,) 0..1000, `context` (B, T, D), `y` (B, V). The hint, or its embedding, may have fewer rows than `x` if
        their number divides that of `x`.
        """
        if context is None or y is None:
            raise ValueError("A ControlNet for SD 3 needs text features and pooled text, which this model does not give. Use it with SD 3.x.")
        embedding_BLD = self.embed_hint(hint) if hint_embedding is None else hint_embedding
        padded_BCHW = pad_to_cells(x)
        image_BLD = self.model.pos_embed(padded_BCHW).contiguous() + repeat_rows(embedding_BLD, x.shape[0])
        pooled_BV = torch.zeros_like(y) if self.reads_text else y
        modulation_BD = self.model.time_text_embed(timesteps.float(), pooled_BV)
        text_BTD = self.model.context_embedder(context) if self.reads_text else None
        if x.dtype == torch.float16:  # the streams of trained networks overflow fp16
            image_BLD, text_BTD = image_BLD.float(), None if text_BTD is None else text_BTD.float()
        rows, columns = (side // PATCH for side in padded_BCHW.shape[2:])
        return [as_picture(one_BLD, rows, columns) for one_BLD in self._run_blocks(image_BLD, text_BTD, modulation_BD)]

    def _run_blocks(self, image_BLD: Tensor, text_BTD: Tensor | None, modulation_BD: Tensor) -> list[Tensor]:
        found = []
        for block, out in zip(self.model.transformer_blocks, self.model.controlnet_blocks, strict=True):
            if text_BTD is None:
                image_BLD = run_single_block(block, image_BLD, modulation_BD)
            else:
                image_BLD, text_BTD = run_joint_block(block, image_BLD, text_BTD, modulation_BD)
            found.append(out(image_BLD.to(modulation_BD.dtype)))
        return found


class CountedControlNetwork(Sd3ControlNetwork):
    """A ControlNet whose costs are counted: like the others, its hint comes as pixels, but only their number matters."""

    def embed_hint(self, hint: Tensor) -> Tensor:
        return super().embed_hint(hint.new_empty(hint.shape[0], LATENT_CHANNELS, hint.shape[2] // LATENT.factor, hint.shape[3] // LATENT.factor))


def build_for_counting(sd3: Any) -> CountedControlNetwork:
    """A ControlNet of the usual size for a transformer, on the meta device: InstantX's, with half as many blocks as SD3 medium."""
    config = {name: sd3.config[name] for name in _SHARED_WITH_TRANSFORMER}
    with torch.device("meta"):
        return CountedControlNetwork(build_library_network({**config, "num_layers": min(_USUAL_BLOCKS, sd3.config.num_layers)}))
