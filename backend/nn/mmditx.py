"""Forge's name of SD3's network over diffusers' SD3Transformer2DModel. It is run by its program (backend/families/sd3/program.py)."""

from __future__ import annotations

from typing import Any

from diffusers import SD3Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn

JointBlock = JointTransformerBlock


def make_table_a_parameter(embedding: Any) -> None:
    """Turn the positions of the library's embedding of latents, which files contain, from a buffer into a parameter."""
    table: Tensor = embedding.pos_embed
    del embedding.pos_embed
    embedding.pos_embed = nn.Parameter(table, requires_grad=False)


class MMDiTX(SD3Transformer2DModel):  # type: ignore[misc]  # the library's class is untyped
    """diffusers' network with the original names of its parts. Its table of positions, which files contain, is a parameter instead of a buffer."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
    ) -> None:
        super().__init__(
            sample_size=sample_size, patch_size=patch_size, in_channels=in_channels, num_layers=num_layers, attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads, joint_attention_dim=joint_attention_dim, caption_projection_dim=caption_projection_dim,
            pooled_projection_dim=pooled_projection_dim, out_channels=out_channels, pos_embed_max_size=pos_embed_max_size,
            dual_attention_layers=dual_attention_layers, qk_norm=qk_norm,
        )  # fmt: skip
        make_table_a_parameter(self.pos_embed)

    @property
    def joint_blocks(self) -> nn.ModuleList:
        return self.transformer_blocks  # type: ignore[no-any-return]

    @property
    def x_embedder(self) -> nn.Module:
        return self.pos_embed  # type: ignore[no-any-return]

    @property
    def t_embedder(self) -> nn.Module:
        return self.time_text_embed.timestep_embedder  # type: ignore[no-any-return]

    @property
    def y_embedder(self) -> nn.Module:
        return self.time_text_embed.text_embedder  # type: ignore[no-any-return]
