"""Forge's names of Flux.1's network and of its functions, over diffusers' modules. `double_blocks` and `single_blocks` are the very blocks that run.

The network is run by its program (backend/families/flux/program.py), block by block: a replaced `forward` or `inner_forward` of the whole is not
asked; a block is replaced by `patches_replace["dit"]`.

Shapes: B rows, L tokens, N heads, K width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from backend.attention import attention_function

DoubleStreamBlock = FluxTransformerBlock
SingleStreamBlock = FluxSingleTransformerBlock


class OriginalBlockNames:
    """The original names of what Flux.1 and its relatives share, over diffusers' names."""

    @property
    def double_blocks(self: Any) -> nn.ModuleList:
        return self.transformer_blocks  # type: ignore[no-any-return]

    @property
    def single_blocks(self: Any) -> nn.ModuleList:
        return self.single_transformer_blocks  # type: ignore[no-any-return]

    @property
    def img_in(self: Any) -> nn.Module:
        return self.x_embedder  # type: ignore[no-any-return]

    @property
    def txt_in(self: Any) -> nn.Module:
        return self.context_embedder  # type: ignore[no-any-return]

    @property
    def pe_embedder(self: Any) -> nn.Module:
        return self.pos_embed  # type: ignore[no-any-return]


class IntegratedFluxTransformer2DModel(OriginalBlockNames, FluxTransformer2DModel):  # type: ignore[misc]  # the library's class is untyped
    """diffusers' FluxTransformer2DModel with the original names of its parts."""

    @property
    def time_in(self) -> nn.Module:
        return self.time_text_embed.timestep_embedder  # type: ignore[no-any-return]

    @property
    def vector_in(self) -> nn.Module:
        return self.time_text_embed.text_embedder  # type: ignore[no-any-return]

    @property
    def guidance_in(self) -> nn.Module:
        """Of a network without guidance an Identity, as Forge has it."""
        return self.time_text_embed.guidance_embedder if self.config.guidance_embeds else nn.Identity()

    def inner_forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """The flow of tokens `img` (B, L, 64); ids are (L, 3) or (B, L, 3), times 0..1."""
        ids = [one[0] if one.ndim == 3 else one for one in (img_ids, txt_ids)]
        guidance = guidance if self.config.guidance_embeds else None
        flow: Tensor = self(img, txt, y, timesteps, ids[0], ids[1], guidance, return_dict=False)[0]
        return flow


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000, time_factor: float = 1000.0) -> Tensor:
    """Cosines, then sines of `time_factor` times t, (B, dim), fp32."""
    features: Tensor = get_timestep_embedding(time_factor * t, dim, flip_sin_to_cos=True, downscale_freq_shift=0, max_period=int(max_period))
    return features


def apply_rope(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, N, L, K) turned by rotations (.., L, K / 2, 2, 2), pair by pair."""
    return _rotate(xq, freqs_cis), _rotate(xk, freqs_cis)


def _rotate(x_BNLK: Tensor, rotations: Tensor) -> Tensor:
    pairs = x_BNLK.float().reshape(*x_BNLK.shape[:-1], -1, 1, 2)
    return (rotations * pairs).sum(dim=-1).reshape(x_BNLK.shape).to(x_BNLK.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    """The chosen attention over rotated queries and keys (B, N, L, K); (B, L, N * K)."""
    query, key = apply_rope(q, k, pe)
    return attention_function(query, key, v, q.shape[1], skip_reshape=True)


def rope(pos: Tensor, dim: int, theta: float) -> Tensor:
    """Rotations (.., L, dim / 2, 2, 2) by positions (.., L). Su et al. 2021, "RoFormer", eq. 15."""
    omega = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=pos.device) / dim)
    angle = pos.double()[..., None] * omega
    rotations = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1)
    return rotations.unflatten(-1, (2, 2)).float()  # type: ignore[no-untyped-call,no-any-return]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"backend.nn.flux has no {name}; Flux's network is run by backend/families/flux/program.py, block by block")
