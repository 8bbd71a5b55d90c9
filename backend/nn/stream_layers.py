"""What transformers with one stream share: rotations by three-part positions, gated MLPs, and a residual stream with a dtype of its own.

Trained streams overflow fp16, and so do the products inside the MLPs. If the network computes in fp16, streams, modulations and gated products are
therefore fp32, and only the inputs of matrices and attention are fp16.

Shapes: B rows, L tokens, D token width, N heads, M heads of keys and values, K head width, T keys, F inner width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from backend.attention import attention_function

Rope = tuple[Tensor, Tensor]
"""Cosines and sines (B or 1, L, K / 2), fp32."""


def rotations(places_BL3: Tensor, widths: Sequence[int], theta: float) -> Rope:
    """Cosines and sines of the places' angles, axis by axis. Su et al. 2021, "RoFormer", eq. 15."""
    angles = []
    for axis, width in enumerate(widths):
        omega = theta ** -(torch.arange(0, width, 2, dtype=torch.float64, device=places_BL3.device) / width)
        angles.append((places_BL3[..., axis, None].double() * omega).float())
    joined = torch.cat(angles, dim=-1)
    return joined.cos(), joined.sin()


def rotate(x_BLNK: Tensor, rope: Rope) -> Tensor:
    """Neighboring numbers turned as pairs, computed in fp32, in the input's dtype."""
    cosines, sines = (part.unsqueeze(2) for part in rope)
    pairs = x_BLNK.float().reshape(*x_BLNK.shape[:-1], -1, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = torch.stack([real * cosines - imaginary * sines, real * sines + imaginary * cosines], dim=-1)
    return turned.flatten(-2).to(x_BLNK.dtype)


def attend(attn: Any, tokens_BLD: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
    """Self-attention with normalized heads and rotations; fewer heads of keys and values are repeated."""
    query, key, value = (heads_of(attn, layer, tokens_BLD) for layer in (attn.to_q, attn.to_k, attn.to_v))
    return join_heads(attn, rotate(attn.norm_q(query), rope), rotate(attn.norm_k(key), rope), value, mask)


def heads_of(attn: Any, layer: nn.Module, tokens_BLD: Tensor) -> Tensor:
    """Queries, keys or values, (B, L, heads, K)."""
    return layer(tokens_BLD).unflatten(-1, (-1, attn.inner_dim // attn.heads))  # type: ignore[no-any-return]


def join_heads(attn: Any, query_BLNK: Tensor, key_BTMK: Tensor, value_BTMK: Tensor, mask: Tensor | None) -> Tensor:
    """The attention of rotated queries to T keys, projected to (B, L, D). `mask`: which keys count, (B, 1, 1, T)."""
    repeats = attn.heads // key_BTMK.shape[2]
    if repeats > 1:
        key_BTMK, value_BTMK = key_BTMK.repeat_interleave(repeats, dim=2), value_BTMK.repeat_interleave(repeats, dim=2)
    query, key, value = (heads.transpose(1, 2) for heads in (query_BLNK, key_BTMK, value_BTMK))
    return attn.to_out[0](attention_function(query, key, value, attn.heads, mask, skip_reshape=True))  # type: ignore[no-any-return]


def gated(up: nn.Module, gate: nn.Module, down: nn.Module, x_BLD: Tensor, activation: Callable[[Tensor], Tensor] = functional.silu) -> Tensor:
    """down(activation(gate(x)) * up(x)), in fp16 with the product scaled per token by a power of two. Shazeer 2020, "GLU Variants", eq. 6."""
    return project_product(down, activation(gate(x_BLD)), up(x_BLD))


def project_product(down: nn.Module, gate_BLF: Tensor, up_BLF: Tensor, before_BLD: Tensor | None = None) -> Tensor:
    """down(gate * up), or down of `before` and gate * up side by side, in fp16 scaled per token by a power of two, with an fp32 result."""
    is_half = gate_BLF.dtype is torch.float16
    product = gate_BLF.float() * up_BLF.float() if is_half else gate_BLF * up_BLF
    joined = product if before_BLD is None else torch.cat([before_BLD.to(product.dtype), product], dim=-1)
    if not is_half:
        return down(joined)  # type: ignore[no-any-return]
    scale_BL1 = torch.exp2(torch.ceil(torch.log2(joined.abs().amax(dim=-1, keepdim=True).clamp(min=1.0))))
    return down((joined / scale_BL1).half()).float() * scale_BL1  # type: ignore[no-any-return]


def rms_norm(norm: Any, stream_BLD: Tensor) -> Tensor:
    """The library's RMSNorm of a stream, in the stream's dtype, where the library would go on in its weight's. Zhang and Sennrich 2019, eq. 4."""
    if stream_BLD.dtype == norm.weight.dtype:
        return norm(stream_BLD)  # type: ignore[no-any-return]
    variance = stream_BLD.float().pow(2).mean(dim=-1, keepdim=True)
    return stream_BLD * torch.rsqrt(variance + norm.eps) * norm.weight.to(stream_BLD.dtype)  # type: ignore[no-any-return]


def normed(norm: nn.Module, stream_BLD: Tensor, dtype: torch.dtype) -> Tensor:
    """The norm of a stream, in the network's dtype."""
    return norm(stream_BLD).to(dtype)  # type: ignore[no-any-return]


def half_rope(length: int, head_width: int, theta: float, dtype: torch.dtype, device: torch.device) -> Rope:
    """Cosines and sines (1, L, K) of places 0..L-1, each angle twice, as transformers' decoders take them. Su et al. 2021, "RoFormer", eq. 34."""
    omega = half_frequencies(head_width, theta, device)
    return half_tables(torch.arange(length, dtype=torch.float32, device=device)[None, :, None] * omega, dtype)


def half_frequencies(head_width: int, theta: float, device: torch.device) -> Tensor:
    """Angles per place, (K / 2,) fp32."""
    return 1.0 / (theta ** (torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width))


def half_tables(angles: Tensor, dtype: torch.dtype) -> Rope:
    """Cosines and sines (..., K) of angles (..., K / 2), each twice."""
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
