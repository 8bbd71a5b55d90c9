"""ControlNets for Flux.1 as callables that return residuals: diffusers' FluxControlNetModel with the arguments of the other ControlNets.

Three kinds. InstantX and Shakker read the latents of the hint; a Union is also told its kind. alimama's, for inpainting, read a mask too. XLabs reads
the hint's pixels and has two blocks, whose residuals repeat along the network. Must not know samplers, devices or files.

Shapes: B rows, C channels, H W latent rows and columns, L tokens of the picture, T text tokens, D token width, h w rows and columns of tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import FluxControlNetModel
from torch import Tensor, nn

from backend.nn.controlnet import repeat_rows
from backend.nn.flux_layers import CELL, FluxAttentionProcessor, embed_modulation, pack, picture_ids, run_double_block, run_single_block
from backend.nn.transformer_controlnet import TransformerControlNetwork, as_picture

UNION_KINDS = ("Canny", "Tile", "Depth", "Blur", "Pose", "Gray", "Low quality")
"""What the numbers mean in the published Unions."""
_USUAL_DOUBLES, _USUAL_SINGLES = 5, 10
_SHARED_WITH_TRANSFORMER = ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "pooled_projection_dim",
                            "guidance_embeds", "axes_dims_rope")  # fmt: skip


def build_library_network(config: Mapping[str, Any], hint_inputs: int) -> FluxControlNetModel:
    """The library's network, which reads so many numbers per token of the hint: 64 of latents, and 4 of a mask for inpainting."""
    model = without_warning(lambda: FluxControlNetModel.from_config(config))
    if hint_inputs != model.config.in_channels:
        model.controlnet_x_embedder = nn.Linear(hint_inputs, model.inner_dim)
    return model


def without_warning(make: Callable[[], FluxControlNetModel]) -> FluxControlNetModel:
    """The network that `make` builds. The library's class imports one of its layers from where it used to be, and warns of itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return make()


class FluxControlNetwork(TransformerControlNetwork):
    """A ControlNet around diffusers' module. One for inpainting has a wider `controlnet_x_embedder`, which also reads the mask."""

    def __init__(self, model: FluxControlNetModel) -> None:
        super().__init__(model)
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block.attn.set_processor(FluxAttentionProcessor())

    @property
    def reads_pixels(self) -> bool:
        return self.model.input_hint_block is not None

    @property
    def hole_value(self) -> float | None:
        return 0.0 if self.model.controlnet_x_embedder.in_features > self.config.in_channels else None

    @property
    def num_types(self) -> int:
        return int(self.config.num_mode or 0)

    @property
    def num_doubles(self) -> int:
        return len(self.model.controlnet_blocks)

    @property
    def residual_width(self) -> int:
        return int(self.model.inner_dim * (self.num_doubles + len(self.model.controlnet_single_blocks)))

    def make_empty(self) -> FluxControlNetwork:
        """A new network of the same kind with the same names and types, whose weights are yet to be filled."""
        model = build_library_network(self.config, self.model.controlnet_x_embedder.in_features)
        nn.Module.to(model, self.dtype)  # diffusers' own `to` warns about every change of type
        return type(self)(model).requires_grad_(False).train(self.training)

    def embed_hint(self, hint: Tensor) -> Tensor:
        """Tokens (B, L, D) of a hint, the same in every step.

        Latents (B, 16, H, W) and, for inpainting, the given part (B, 1, H, W) behind them; or pixels (B, 3, 8 H, 8 W) in 0..1.
        """
        if self.reads_pixels:
            hint = self.model.input_hint_block(hint * 2 - 1)
        embedded: Tensor = self.model.controlnet_x_embedder(pack(hint))
        return embedded

    def forward(
        self,
        x: Tensor,
        hint: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
        hint_embedding: Tensor | None = None,
        control_type: int = 0,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Residuals (B, D, h, w): those of the double blocks in order, then those of the single blocks.

        `x` (B, 16, H, W), `timesteps` (B,) 0..1, `context` (B, T, D), `y` (B, V), `guidance` (B,). The hint, or its embedding, may have fewer rows
        than `x` if their number divides that of `x`. `control_type`: the kind's number, for a Union.
        """
        if context is None or y is None:
            raise ValueError("A ControlNet for Flux needs text features and pooled text, which this model does not give. Use it with Flux.1.")
        embedding_BLD = self.embed_hint(hint) if hint_embedding is None else hint_embedding
        modulation_BD = embed_modulation(self.model, timesteps, guidance, y)
        image_BLD = self.model.x_embedder(pack(x)) + repeat_rows(embedding_BLD, x.shape[0])
        text_BTD = self._embed_text(context, control_type)
        if x.dtype == torch.float16:  # the streams of trained networks overflow fp16
            image_BLD, text_BTD = image_BLD.float(), text_BTD.float()
        rows, columns = (-(-side // CELL) for side in x.shape[2:])
        places_L3 = picture_ids(rows, columns).to(image_BLD.device, torch.float32)
        rope = self.model.pos_embed(torch.cat([places_L3.new_zeros(text_BTD.shape[1], 3), places_L3]))
        found = self._run_blocks(image_BLD, text_BTD, modulation_BD, rope)
        return [as_picture(one_BLD, rows, columns) for one_BLD in found]

    def _embed_text(self, context_BTD: Tensor, control_type: int) -> Tensor:
        text_BTD: Tensor = self.model.context_embedder(context_BTD)
        if not self.num_types:
            return text_BTD
        kind_11 = torch.full((1, 1), control_type, device=text_BTD.device)
        kind_11D = self.model.controlnet_mode_embedder(kind_11)
        return torch.cat([kind_11D.expand(text_BTD.shape[0], -1, -1).to(text_BTD), text_BTD], dim=1)

    def _run_blocks(self, image_BLD: Tensor, text_BTD: Tensor, modulation_BD: Tensor, rope: tuple[Tensor, Tensor]) -> list[Tensor]:
        dtype, num_text = modulation_BD.dtype, text_BTD.shape[1]
        found = []
        for block, out in zip(self.model.transformer_blocks, self.model.controlnet_blocks, strict=True):
            image_BLD, text_BTD = run_double_block(block, image_BLD, text_BTD, modulation_BD, rope)
            found.append(out(image_BLD.to(dtype)))
        tokens_BLD = torch.cat([text_BTD, image_BLD], dim=1)
        for block, out in zip(self.model.single_transformer_blocks, self.model.controlnet_single_blocks, strict=True):
            tokens_BLD = run_single_block(block, tokens_BLD, modulation_BD, rope)
            found.append(out(tokens_BLD[:, num_text:].to(dtype)))
        return found


def usual_residuals(num_doubles: int, num_singles: int) -> int:
    """How many residuals a ControlNet of the usual size makes for a transformer with so many blocks."""
    return min(_USUAL_DOUBLES, num_doubles) + min(_USUAL_SINGLES, num_singles)


class CountedControlNetwork(FluxControlNetwork):
    """A ControlNet whose costs are counted: like the others, its hint comes as pixels, but only their number matters."""

    def embed_hint(self, hint: Tensor) -> Tensor:
        latents = hint.new_empty(hint.shape[0], self.config.in_channels // CELL**2, hint.shape[2] // 8, hint.shape[3] // 8)
        return super().embed_hint(latents)


def build_for_counting(flux: Any) -> CountedControlNetwork:
    """A ControlNet of the usual size for a transformer, on the meta device: with as many blocks as InstantX's have."""
    config = {name: flux.config[name] for name in _SHARED_WITH_TRANSFORMER}
    depth = {"num_layers": min(_USUAL_DOUBLES, flux.config.num_layers), "num_single_layers": min(_USUAL_SINGLES, flux.config.num_single_layers)}
    with torch.device("meta"):
        return CountedControlNetwork(without_warning(lambda: FluxControlNetModel(**config, **depth)))


def spread_residuals(residuals: list[Tensor | None], num_blocks: int, *, repeats: bool) -> list[Tensor | None]:
    """One entry per block of the denoiser. `repeats`: 0 1 0 1 ..; otherwise in runs: 0 0 .. 1 1 .. (diffusers' two rules)."""
    if not residuals:
        return []
    run = -(-num_blocks // len(residuals))
    return [residuals[block % len(residuals) if repeats else block // run] for block in range(num_blocks)]
