"""Forge's names of Flux.1's network and of its functions, over diffusers' modules. `double_blocks` and `single_blocks` are the very blocks that run.

The network is run by its program (backend/families/flux/program.py), block by block. An extension may put its own function in the place of
`inner_forward`, on the class or on a network (caches do); the program then gives it the whole pass. It may call the blocks as Forge does, wrap their
`forward`, or replace a block through `patches_replace["dit"]`.

Shapes: B rows, L tokens, T text tokens, D token width, N heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.transformer_flux import FluxPosEmbed, FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from backend.attention import attention_function
from backend.nn.flux_layers import run_double_block, run_last_layer, run_single_block


class DoubleStreamBlock(FluxTransformerBlock):  # type: ignore[misc]  # the library's classes are untyped
    """A block with two streams, called as Forge calls it or as the library does."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Forge's: (img=, txt=, vec=, pe=), (B, L, D) and (B, T, D) each and back. The library's: see its class."""
        if "vec" in kwargs:
            given = {**dict(zip(("img", "txt"), args)), **kwargs}
            return run_double_block(self, given["img"], given["txt"], given["vec"], given["pe"])
        return super().forward(*args, **kwargs)  # type: ignore[no-any-return]


class SingleStreamBlock(FluxSingleTransformerBlock):  # type: ignore[misc]
    """A block with one stream, text before picture, called as Forge calls it or as the library does."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Forge's: (x, vec=, pe=), (B, T + L, D) and back. The library's: see its class."""
        if "vec" in kwargs:
            return run_single_block(self, args[0] if args else kwargs["x"], kwargs["vec"], kwargs["pe"])
        return super().forward(*args, **kwargs)


class EmbedND(FluxPosEmbed):  # type: ignore[misc]
    """Rotations of tokens by their positions: cosines and sines (L, K) from ids (L, 3), or (B, L, 3) of which all rows are alike."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        rotations: tuple[Tensor, Tensor] = super().forward(ids[0] if ids.ndim == 3 else ids)
        return rotations


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

    @wraps(FluxTransformer2DModel.__init__)  # type: ignore[misc]  # the signature that configurations are read by
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for block in self.transformer_blocks:
            block.__class__ = DoubleStreamBlock
        for block in self.single_transformer_blocks:
            block.__class__ = SingleStreamBlock
        self.pos_embed.__class__ = EmbedND

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

    def final_layer(self, x: Tensor, vec: Tensor) -> Tensor:
        """The flow of the picture's tokens (B, L, 64)."""
        return run_last_layer(self, x, vec)

    def inner_forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """The flow of tokens `img` (B, L, 64); ids are (L, 3) or (B, L, 3), times 0..1."""
        ids = [one[0] if one.ndim == 3 else one for one in (img_ids, txt_ids)]
        guidance = guidance if self.config.guidance_embeds else None
        flow: Tensor = self(img, txt, y, timesteps, ids[0], ids[1], guidance, return_dict=False)[0]
        return flow


_OWN_INNER_FORWARD = IntegratedFluxTransformer2DModel.inner_forward


def find_replaced_forward(network: nn.Module) -> Callable[..., Tensor] | None:
    """The `inner_forward` that an extension put in the place of ours, bound to this network; None if there is none."""
    found: Callable[..., Tensor] | None = getattr(network, "inner_forward", None)
    return None if found is None or getattr(found, "__func__", found) is _OWN_INNER_FORWARD else found


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
