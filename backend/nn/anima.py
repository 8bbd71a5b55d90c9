"""Anima's network: diffusers' Cosmos transformer and the text conditioner in front of it, which lies in the same file.

It is run by its program (backend/families/anima/program.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import AnimaTextConditioner, CosmosTransformer3DModel
from diffusers.configuration_utils import register_to_config

LATENT_CHANNELS = 16
ROPE_SCALE = (1.0, 4.0, 4.0)
"""Anima's positions of rows and columns reach four times as far as those that Cosmos was trained with."""


class AnimaTransformer(CosmosTransformer3DModel):  # type: ignore[misc]  # the library's class is untyped
    """`text_conditioner` has the weights that files call llm_adapter."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 128,
        num_layers: int = 28,
        mlp_ratio: float = 4.0,
        text_embed_dim: int = 1024,
        adaln_lora_dim: int = 256,
        source_dim: int = 1024,
        conditioner_width: int = 1024,
        conditioner_mlp_ratio: float = 4.0,
        conditioner_layers: int = 6,
        conditioner_heads: int = 16,
        vocab_length: int = 32128,
        in_channels: int = LATENT_CHANNELS,
        out_channels: int = LATENT_CHANNELS,
        rope_scale: Sequence[float] = ROPE_SCALE,
        extra_pos_embed_type: str | None = None,
    ) -> None:
        super().__init__(
            in_channels=in_channels, out_channels=out_channels, num_attention_heads=num_attention_heads, attention_head_dim=attention_head_dim,
            num_layers=num_layers, mlp_ratio=mlp_ratio, text_embed_dim=text_embed_dim, adaln_lora_dim=adaln_lora_dim, rope_scale=rope_scale,
            extra_pos_embed_type=extra_pos_embed_type,
        )  # fmt: skip
        self.text_conditioner = AnimaTextConditioner(
            source_dim=source_dim, target_dim=text_embed_dim, model_dim=conditioner_width, num_layers=conditioner_layers,
            num_attention_heads=conditioner_heads, mlp_ratio=conditioner_mlp_ratio, target_vocab_size=vocab_length,
        )  # fmt: skip
        del self.text_conditioner.rotary_emb  # a table, which the program computes
