"""Attention implementations over (batch, tokens, heads * width) tensors under Forge's names, and the choice among them.

Hooks and networks call `attention_function`; `configure_attention` chooses once, from BackendConfig, what it runs.
Must not know UNets, samplers or prompts.

Shapes: B batch, L query tokens, M key tokens, N heads, K head width, D = N * K, C channels, H W rows and columns.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from backend.args import BackendConfig

logger = logging.getLogger(__name__)

SPLIT_SCORE_BYTES = 512 * 2**20
"""Bytes of scores that `attention_split` keeps in memory at once."""
SUB_QUAD_QUERY_CHUNK = 512
SUB_QUAD_KEY_CHUNK = 4096


class AttentionFunction(Protocol):
    """`skip_reshape`: q, k, v are already (B, N, L, K)."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
    ) -> Tensor: ...


def _split_heads(x_BLD: Tensor, heads: int) -> Tensor:
    batch, tokens, width = x_BLD.shape
    return x_BLD.view(batch, tokens, heads, width // heads).transpose(1, 2)


def _join_heads(x_BNLK: Tensor) -> Tensor:
    batch, heads, tokens, width = x_BNLK.shape
    return x_BNLK.transpose(1, 2).reshape(batch, tokens, heads * width)


def _prepare(q: Tensor, k: Tensor, v: Tensor, heads: int, skip_reshape: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (q, k, v) if skip_reshape else (_split_heads(q, heads), _split_heads(k, heads), _split_heads(v, heads))


def _fit_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask that broadcasts to (B, N, L, M): bool (True = attend), or numbers added to the scores."""
    if mask is None:
        return None
    while mask.ndim < 4:
        mask = mask.unsqueeze(0) if mask.ndim == 2 else mask.unsqueeze(1)
    return mask if mask.dtype == torch.bool else mask.to(dtype)


def attention_pytorch(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, attn_precision: torch.dtype | None = None, skip_reshape: bool = False
) -> Tensor:
    """Torch's scaled dot product attention."""
    q_BNLK, k_BNMK, v_BNMK = _prepare(q, k, v, heads, skip_reshape)
    return _join_heads(functional.scaled_dot_product_attention(q_BNLK, k_BNMK, v_BNMK, attn_mask=_fit_mask(mask, q.dtype)))


def attention_basic(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, attn_precision: torch.dtype | None = None, skip_reshape: bool = False
) -> Tensor:
    """All scores at once, with softmax in `attn_precision` (None: the inputs' dtype)."""
    q_BNLK, k_BNMK, v_BNMK = _prepare(q, k, v, heads, skip_reshape)
    return _join_heads(_attend_rows(q_BNLK, k_BNMK, v_BNMK, _fit_mask(mask, q.dtype), attn_precision))


def attention_split(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, attn_precision: torch.dtype | None = None, skip_reshape: bool = False
) -> Tensor:
    """Exact attention over ranges of query rows, so that the scores in memory at once stay below SPLIT_SCORE_BYTES."""
    q_BNLK, k_BNMK, v_BNMK = _prepare(q, k, v, heads, skip_reshape)
    batch, num_heads, num_queries, _ = q_BNLK.shape
    row_bytes = batch * num_heads * k_BNMK.shape[2] * (attn_precision or q.dtype).itemsize
    rows = max(1, SPLIT_SCORE_BYTES // max(1, row_bytes))
    mask = _fit_mask(mask, q.dtype)
    parts = []
    for start in range(0, num_queries, rows):
        part_mask = mask[:, :, start : start + rows] if mask is not None and mask.shape[2] > 1 else mask
        parts.append(_attend_rows(q_BNLK[:, :, start : start + rows], k_BNMK, v_BNMK, part_mask, attn_precision))
    return _join_heads(torch.cat(parts, dim=2))


def attention_sub_quad(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, attn_precision: torch.dtype | None = None, skip_reshape: bool = False
) -> Tensor:
    """Attention with less than quadratic memory: chunks of queries against chunks of keys, with a running softmax.

    Source: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory" (2021), section 3.
    """
    q_BNLK, k_BNMK, v_BNMK = _prepare(q, k, v, heads, skip_reshape)
    mask = _fit_mask(mask, q.dtype)
    parts = []
    for start in range(0, q_BNLK.shape[2], SUB_QUAD_QUERY_CHUNK):
        stop = start + SUB_QUAD_QUERY_CHUNK
        part_mask = mask[:, :, start:stop] if mask is not None and mask.shape[2] > 1 else mask
        parts.append(_attend_key_chunks(q_BNLK[:, :, start:stop], k_BNMK, v_BNMK, part_mask, attn_precision))
    return _join_heads(torch.cat(parts, dim=2))


def attention_xformers(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, attn_precision: torch.dtype | None = None, skip_reshape: bool = False
) -> Tensor:
    """The memory-efficient attention of xformers, which takes (B, L, N, K)."""
    from xformers import ops  # optional package

    q_BNLK, k_BNMK, v_BNMK = _prepare(q, k, v, heads, skip_reshape)
    bias = _fit_mask(mask, q.dtype)
    if bias is not None:
        bias = bias.expand(q_BNLK.shape[0], q_BNLK.shape[1], q_BNLK.shape[2], k_BNMK.shape[2])
    mixed_BLNK: Tensor = ops.memory_efficient_attention(q_BNLK.transpose(1, 2), k_BNMK.transpose(1, 2), v_BNMK.transpose(1, 2), attn_bias=bias)
    return mixed_BLNK.flatten(2)


def _attend_rows(q_BNLK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor, mask: Tensor | None, precision: torch.dtype | None) -> Tensor:
    scores_BNLM = _scores(q_BNLK, k_BNMK, mask, precision)
    return scores_BNLM.softmax(dim=-1).to(v_BNMK.dtype) @ v_BNMK


def _scores(q_BNLK: Tensor, k_BNMK: Tensor, mask: Tensor | None, precision: torch.dtype | None) -> Tensor:
    scale = 1.0 / math.sqrt(q_BNLK.shape[-1])
    if precision is not None:
        q_BNLK, k_BNMK = q_BNLK.to(precision), k_BNMK.to(precision)
    scores_BNLM = (q_BNLK * scale) @ k_BNMK.transpose(-1, -2)
    if mask is None:
        return scores_BNLM
    return scores_BNLM.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores_BNLM + mask


def _attend_key_chunks(q_BNLK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor, mask: Tensor | None, precision: torch.dtype | None) -> Tensor:
    maximum = total = mixed = None
    for start in range(0, k_BNMK.shape[2], SUB_QUAD_KEY_CHUNK):
        stop = start + SUB_QUAD_KEY_CHUNK
        part_mask = mask[..., start:stop] if mask is not None else None
        scores = _scores(q_BNLK, k_BNMK[:, :, start:stop], part_mask, precision)
        new_maximum = scores.amax(dim=-1, keepdim=True)
        if maximum is not None:
            new_maximum = torch.maximum(maximum, new_maximum)
        weights = (scores - new_maximum).exp()
        part_total, part_mixed = weights.sum(dim=-1, keepdim=True), weights.to(v_BNMK.dtype) @ v_BNMK[:, :, start:stop]
        if maximum is None or total is None or mixed is None:
            maximum, total, mixed = new_maximum, part_total, part_mixed
        else:
            shrink = (maximum - new_maximum).exp()
            maximum, total, mixed = new_maximum, total * shrink + part_total, mixed * shrink.to(mixed.dtype) + part_mixed
    assert mixed is not None and total is not None
    output: Tensor = mixed / total.to(mixed.dtype)
    return output


# single head over pictures, for a VAE's middle block


def _attend_picture(q_BCHW: Tensor, k_BCHW: Tensor, v_BCHW: Tensor, attend: AttentionFunction) -> Tensor:
    q_BLC, k_BLC, v_BLC = (x.flatten(2).transpose(1, 2).contiguous() for x in (q_BCHW, k_BCHW, v_BCHW))
    return attend(q_BLC, k_BLC, v_BLC, 1).transpose(1, 2).reshape(q_BCHW.shape)


def pytorch_attention_single_head_spatial(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head over the (B, C, H, W) positions with torch's attention."""
    return _attend_picture(q, k, v, attention_pytorch)


def normal_attention_single_head_spatial(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head over the (B, C, H, W) positions, all scores at once."""
    return _attend_picture(q, k, v, attention_basic)


def slice_attention_single_head_spatial(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head over the (B, C, H, W) positions, in ranges of rows."""
    return _attend_picture(q, k, v, attention_split)


def xformers_attention_single_head_spatial(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head over the (B, C, H, W) positions with xformers."""
    return _attend_picture(q, k, v, attention_xformers)


# the choice

_FUNCTIONS: dict[str, tuple[AttentionFunction, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "pytorch": (attention_pytorch, pytorch_attention_single_head_spatial),
    "split": (attention_split, slice_attention_single_head_spatial),
    "quad": (attention_sub_quad, slice_attention_single_head_spatial),
    "xformers": (attention_xformers, xformers_attention_single_head_spatial),
}


class _Choice:
    """The current choice. One shared object, so that a later choice reaches every importer of `attention_function`."""

    name: str = "pytorch"
    precision: torch.dtype | None = None
    upcast_disabled: bool = False


_choice = _Choice()


def attention_function(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, attn_precision: torch.dtype | None = None, skip_reshape: bool = False
) -> Tensor:
    """The chosen attention."""
    return _FUNCTIONS[_choice.name][0](q, k, v, heads, mask, attn_precision or _choice.precision, skip_reshape)


def attention_function_single_head_spatial(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The chosen attention for pictures."""
    return _FUNCTIONS[_choice.name][1](q, k, v)


def get_attn_precision(attn_precision: torch.dtype | None = torch.float32) -> torch.dtype | None:
    """The dtype to compute scores in (None: the inputs'). Set by --force-upcast-attention and --disable-attention-upcast."""
    return None if _choice.upcast_disabled else _choice.precision or attn_precision


def configure_attention(config: BackendConfig) -> str:
    """Choose the attention requested by the flags, and return its name. If it cannot run here, warn once and use torch's."""
    wanted = "pytorch" if config.attention == "auto" else config.attention
    if wanted not in _FUNCTIONS:
        raise ValueError(f"Attention {config.attention!r} is unknown. Use one of auto, {', '.join(_FUNCTIONS)}.")
    if wanted == "xformers" and not _xformers_works():
        logger.warning("xformers does not work here (not installed, built for another torch, or no CUDA); torch's attention is used instead.")
        wanted = "pytorch"
    _choice.name = wanted
    _choice.precision = torch.float32 if config.force_upcast_attention else None
    _choice.upcast_disabled = config.disable_attention_upcast
    return wanted


def _xformers_works() -> bool:
    try:
        from xformers import ops
    except (ImportError, OSError):  # not installed, or kernels built for another torch
        return False
    return hasattr(ops, "memory_efficient_attention") and torch.cuda.is_available()


class AttentionProcessorForge:
    """Makes a diffusers attention layer run the chosen attention."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: object
    ) -> Tensor:
        residual, shape = hidden_states, hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context_BLD = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mixed_BLD = attention_function(attn.to_q(hidden_states), attn.to_k(context_BLD), attn.to_v(context_BLD), attn.heads, attention_mask)
        output: Tensor = attn.to_out[1](attn.to_out[0](mixed_BLD))
        if len(shape) == 4:
            output = output.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            output = output + residual
        scaled: Tensor = output / attn.rescale_output_factor
        return scaled


def install_attention(network: nn.Module) -> None:
    """Make a diffusers network use the chosen attention. Torch's needs no change: the library uses it by default."""
    set_processor: Callable[[object], None] | None = getattr(network, "set_attn_processor", None)
    if set_processor is not None and (_choice.name != "pytorch" or _choice.precision is not None):
        set_processor(AttentionProcessorForge())
