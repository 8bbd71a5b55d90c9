"""ControlNets as callables that return residuals: diffusers' modules with the original networks' arguments.

The library's own `forward` takes SDXL's pooled text and sizes separately and embeds the hint again in every step. Here they are one vector, as in
the checkpoints, and an embedded hint may be passed in. Must not know samplers, conditions, devices or files.

Shapes: B rows, C channels, H W latent rows and columns, E width of the time embedding, L tokens, D width of a token, V width of SDXL's vector.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional

from backend.attention import install_attention
from backend.nn.tiles import Swaps, Tile, TileTraffic
from backend.nn.unet_state import CONTEXT, EMBEDDING, UNetState
from backend.nn.unet_tiles import count_traffic, find_untileable, run_layers_on_tile

HINT_STEP_PX = 8
"""Pixels of a hint per latent row or column."""

_SHARED_WITH_UNET = ("in_channels", "down_block_types", "block_out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim",
                     "transformer_layers_per_block", "use_linear_projection", "addition_embed_type", "addition_time_embed_dim",
                     "projection_class_embeddings_input_dim", "num_attention_heads", "norm_num_groups", "mid_block_type")  # fmt: skip


class ControlNetwork(nn.Module):
    """A ControlNet (Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models") around diffusers' module."""

    def __init__(self, model: ControlNetModel) -> None:
        super().__init__()
        self.model: Any = model
        install_attention(model)

    @property
    def config(self) -> Any:
        """The library's configuration of the network."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which weights are stored and computed."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    def make_empty(self) -> ControlNetwork:
        """A new network of the same kind with the same names and types, whose weights are yet to be filled. Without gradients, in the same mode."""
        model = type(self.model).from_config(self.config)
        nn.Module.to(model, self.dtype)  # diffusers' own `to` warns about every change of type
        other = type(self)(model)
        return other.requires_grad_(False).train(self.training)

    def embed_hint(self, hint: Tensor) -> Tensor:
        """Embed a hint (B, 3, 8 H, 8 W) in 0..1 to the latents' size and the first level's width. The result is the same in every step."""
        embedded: Tensor = self.model.controlnet_cond_embedding(hint)
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
        """Residuals of the skips, outermost first, then that of the middle.

        `x` (B, C, H, W) scaled latents, `timesteps` (B,), `context` (B, L, D), `y` (B, V). The hint, or its embedding, may have fewer rows than
        `x` if their number divides that of `x`; they are then repeated.
        """
        embedding = self.embed_hint(hint) if hint_embedding is None else hint_embedding
        emb_BE = self._embed_time(x, timesteps, y)
        hidden_BCHW = self._join_hint(self.model.conv_in(x), repeat_rows(embedding, x.shape[0]))
        return self._run_blocks(hidden_BCHW, emb_BE, context)

    def _embed_time(self, x_BCHW: Tensor, timesteps_B: Tensor, y_BV: Tensor | None) -> Tensor:
        emb_BE: Tensor = self.model.time_embedding(self.model.time_proj(timesteps_B).to(x_BCHW.dtype))
        if self.config.addition_embed_type is None:
            return emb_BE
        if y_BV is None:
            raise ValueError("This ControlNet is for SDXL: it needs a vector of pooled text and sizes, which this model does not have.")
        aug_BE: Tensor = self.model.add_embedding(y_BV.to(emb_BE.dtype))
        return emb_BE + aug_BE

    def _join_hint(self, hidden_BCHW: Tensor, embedding_BCHW: Tensor) -> Tensor:
        return hidden_BCHW + embedding_BCHW

    def _run_blocks(self, hidden_BCHW: Tensor, emb_BE: Tensor, context_BLD: Tensor | None) -> list[Tensor]:
        states = [hidden_BCHW]
        for block in self.model.down_blocks:
            hidden_BCHW, new = block(hidden_BCHW, emb_BE, **_context_of(block, context_BLD))
            states += new
        middle = self.model.mid_block
        hidden_BCHW = middle(hidden_BCHW, emb_BE, **_context_of(middle, context_BLD))
        residuals = [convolution(state) for state, convolution in zip(states, self.model.controlnet_down_blocks, strict=True)]
        return [*residuals, self.model.controlnet_mid_block(hidden_BCHW)]

    # tiles of one row on several slots

    def why_no_tiles(self) -> str | None:
        """Why the network's rows cannot be cut into tiles; None if they can."""
        return find_untileable((f"layer {number}", layer) for number, layer in enumerate(self._layers_in_order()))

    def tile_traffic(self, height: int, width: int) -> TileTraffic:
        """What tiles of one row of latents exchange in a pass."""
        return count_traffic(self._layers_in_order(), height, width)

    @property
    def residual_levels(self) -> list[int]:
        """How often the latents have been halved where each residual is made, in the order of `forward`."""
        levels, level = [0], 0
        for block in self.model.down_blocks:
            levels += [level] * len(block.resnets)
            level += bool(block.downsamplers)
            levels += [level] if block.downsamplers else []
        return [*levels, level]

    def run_tile(
        self, tile: Tile, x: Tensor, timesteps: Tensor, context: Tensor | None, y: Tensor | None, hint_embedding: Tensor
    ) -> Swaps[list[Tensor]]:
        """The tile's rows of what `forward` returns, for a network with tiles (`why_no_tiles`). All arguments are whole; the tile is at the outermost
        level before and after."""
        start, end = tile.span
        tensors = {EMBEDDING: self._embed_time(x, timesteps, y), **({} if context is None else {CONTEXT: context})}
        state = UNetState(tensors)
        rows_BCHW = functional.pad(x[:, :, max(0, start - 1) : end + 1], (0, 0, int(tile.is_first), int(tile.is_last)))
        hidden_BCHW = yield from run_layers_on_tile([self.model.conv_in], rows_BCHW, state, tile)
        hidden_BCHW = self._join_hint(hidden_BCHW, repeat_rows(hint_embedding, x.shape[0])[:, :, start:end])
        states = [hidden_BCHW]
        for layers in self._runs_of_layers():
            hidden_BCHW = yield from run_layers_on_tile(layers, hidden_BCHW, state, tile)
            states.append(hidden_BCHW)
        tile.level = 0
        outputs = [*self.model.controlnet_down_blocks, self.model.controlnet_mid_block]
        return [convolution(one) for one, convolution in zip(states, outputs, strict=True)]

    def _runs_of_layers(self) -> list[list[nn.Module]]:
        """Layers between two residuals, in order; the last run is the middle."""
        runs: list[list[nn.Module]] = []
        for block in self.model.down_blocks:
            attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
            runs += [[resnet] if attention is None else [resnet, attention] for resnet, attention in zip(block.resnets, attentions)]
            runs += [[down] for down in block.downsamplers or ()]
        middle = self.model.mid_block
        pairs = [layer for pair in zip(middle.attentions, middle.resnets[1:]) for layer in pair if layer is not None]
        return [*runs, [middle.resnets[0], *pairs]]

    def _layers_in_order(self) -> list[nn.Module]:
        return [self.model.conv_in, *(layer for run in self._runs_of_layers() for layer in run)]


def controlnet_config(unet: Any) -> dict[str, Any]:
    """Arguments for a ControlNetModel that matches a UNet: a copy of its encoder half, and one convolution per residual."""
    return {name: unet.config[name] for name in _SHARED_WITH_UNET}


def build_for_counting(unet: Any) -> ControlNetwork:
    """A ControlNet that matches a UNet, on the meta device and with the library's own attention, which runs there."""
    with torch.device("meta"):
        network = ControlNetwork(ControlNetModel(**controlnet_config(unet)))
    network.model.set_attn_processor(AttnProcessor2_0())
    return network


def _context_of(block: Any, context_BLD: Tensor | None) -> dict[str, Tensor | None]:
    return {"encoder_hidden_states": context_BLD} if getattr(block, "has_cross_attention", False) else {}


def repeat_rows(rows: Tensor, count: int) -> Tensor:
    """All rows repeated until there are `count`."""
    return rows if rows.shape[0] in (1, count) else rows.repeat(count // rows.shape[0], *[1] * (rows.ndim - 1))
