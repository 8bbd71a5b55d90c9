"""The UNet's layers on one tile of latent rows: the same arithmetic as the library's forward, with what crosses tiles exchanged.

    resnet         two exchanges: each norm's sums together with the boundary rows of the convolution after it
    transformer    one for its norm's sums; one per block for the keys and values of self-attention. Cross-attention and feed-forward are local
    down, up       one for the boundary row

Keys and values are sent first, and queries are computed while they travel; so is a resnet's 1x1 shortcut while sums travel. Hooks of
cross-attention see the tile's tokens; `options["tile_rows"]` says which rows these are. Shapes as in unet_state.py, of the tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from backend.attention import AttentionProcessorForge, attention_function
from backend.nn.tile_layers import (
    convolve_padded,
    double,
    finish_norm,
    finish_norm_padded,
    gather_keys_and_values,
    halve,
    post_norm,
)
from backend.nn.tiles import Swaps, Tile, TileTraffic
from backend.nn.unet_layers import attend
from backend.nn.unet_state import UNetState

TILE_ROWS = "tile_rows"
"""Key in the options of hooks: (first row, end, rows of the whole) of the tile at the current level."""


def run_layers_on_tile(
    layers: Sequence[nn.Module], hidden_BCHW: Tensor, state: UNetState, tile: Tile, upsample_width: int | None = None
) -> Swaps[Tensor]:
    """Run the layers of one segment in order. `upsample_width`: columns after an upsampler if doubling misses them."""
    for layer in layers:
        if isinstance(layer, ResnetBlock2D):
            hidden_BCHW = yield from _run_resnet(layer, hidden_BCHW, state, tile)
        elif isinstance(layer, Transformer2DModel):
            hidden_BCHW = yield from _run_transformer(layer, hidden_BCHW, state, tile)
        elif isinstance(layer, Downsample2D):
            hidden_BCHW = yield from halve(layer.conv, hidden_BCHW, tile)
        elif isinstance(layer, Upsample2D):
            hidden_BCHW = yield from double(layer.conv, hidden_BCHW, tile, upsample_width or 2 * hidden_BCHW.shape[3])
        else:
            hidden_BCHW = convolve_padded(layer, hidden_BCHW)  # the first convolution, which gets its rows with the neighbors'
    return hidden_BCHW


def run_last_on_tile(layers: Sequence[Any], hidden_BCHW: Tensor, tile: Tile) -> Swaps[Tensor]:
    """Norm, activation and the convolution to the output channels."""
    norm, _, convolution = layers
    padded_BCHW = yield from finish_norm_padded(post_norm(norm, hidden_BCHW, tile, with_edges=True), tile)
    return convolve_padded(convolution, padded_BCHW)


def _run_resnet(layer: Any, hidden_BCHW: Tensor, state: UNetState, tile: Tile) -> Swaps[Tensor]:
    posted = post_norm(layer.norm1, hidden_BCHW, tile, with_edges=True)
    shift_BC11 = layer.time_emb_proj(layer.nonlinearity(state.emb_BE))[:, :, None, None]
    shortcut_BCHW = hidden_BCHW if layer.conv_shortcut is None else layer.conv_shortcut(hidden_BCHW)
    padded_BCHW = yield from finish_norm_padded(posted, tile)
    inner_BCHW = convolve_padded(layer.conv1, padded_BCHW) + shift_BC11
    posted = post_norm(layer.norm2, inner_BCHW, tile, with_edges=True)
    padded_BCHW = yield from finish_norm_padded(posted, tile)
    del inner_BCHW, posted
    output_BCHW: Tensor = shortcut_BCHW + convolve_padded(layer.conv2, padded_BCHW)
    return output_BCHW if layer.output_scale_factor == 1 else output_BCHW / layer.output_scale_factor


def _run_transformer(layer: Any, hidden_BCHW: Tensor, state: UNetState, tile: Tile) -> Swaps[Tensor]:
    batch, _, height, width = hidden_BCHW.shape
    normed_BCHW = yield from finish_norm(post_norm(layer.norm, hidden_BCHW, tile, with_edges=False), tile)
    tokens_BLD = _enter(layer, normed_BCHW)
    for index, block in enumerate(layer.transformer_blocks):
        state.options["block_index"] = index
        tokens_BLD = yield from _run_block(block, tokens_BLD, state, tile, width)
    state.options["transformer_index"] = state.options.get("transformer_index", 0) + 1
    output_BCHW: Tensor = layer._get_output_for_continuous_inputs(
        hidden_states=tokens_BLD, residual=hidden_BCHW, batch_size=batch, height=height, width=width, inner_dim=tokens_BLD.shape[-1]
    )
    return output_BCHW


def _enter(layer: Any, normed_BCHW: Tensor) -> Tensor:
    """Tokens (B, L, D) of a normalized picture."""
    if layer.use_linear_projection:
        return layer.proj_in(normed_BCHW.flatten(2).transpose(1, 2))  # type: ignore[no-any-return]
    return layer.proj_in(normed_BCHW).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


def _run_block(block: BasicTransformerBlock, tokens_BLD: Tensor, state: UNetState, tile: Tile, width: int) -> Swaps[Tensor]:
    state.options[TILE_ROWS] = (*tile.span, tile.height)
    extra = {key: value for key, value in state.options.items() if key not in ("patches", "patches_replace")}
    extra["n_heads"], extra["dim_head"] = block.num_attention_heads, block.attention_head_dim
    if block.only_cross_attention:
        tokens_BLD = attend(block.attn1, "attn1", block.norm1(tokens_BLD), state.context_BLD, state, extra) + tokens_BLD
    else:
        mixed_BLD = yield from _attend_to_all(block.attn1, block.norm1(tokens_BLD), tile, width)
        tokens_BLD = mixed_BLD + tokens_BLD
    if block.attn2 is not None:
        tokens_BLD = attend(block.attn2, "attn2", block.norm2(tokens_BLD), state.context_BLD, state, extra) + tokens_BLD
    result_BLD: Tensor = block.ff(block.norm3(tokens_BLD)) + tokens_BLD
    return result_BLD


def _attend_to_all(attention: Attention, normed_BLD: Tensor, tile: Tile, width: int) -> Swaps[Tensor]:
    """The tile's queries against the keys and values of all tiles."""
    own = (attention.to_k(normed_BLD), attention.to_v(normed_BLD))
    awaited = tile.peers.post(dict.fromkeys(tile.others, own))
    query_BLD = attention.to_q(normed_BLD)
    received = yield awaited
    key_BTD, value_BTD = gather_keys_and_values(own, received, tile, tuple(begin * width for begin in tile.begins))
    del received
    output_BLD: Tensor = attention.to_out[1](attention.to_out[0](attention_function(query_BLD, key_BTD, value_BTD, attention.heads)))
    return output_BLD


# what cannot be cut


def find_untileable(named_layers: Iterator[tuple[str, nn.Module]]) -> str | None:
    """The first layer that tiles do not compute exactly, and why; None if there is none."""
    for name, layer in named_layers:
        for child_name, child in layer.named_modules(prefix=name):
            fault = next((what for kind, check in _CHECKS if isinstance(child, kind) and (what := check(child)) is not None), None)
            fault = "has been changed by an extension" if isinstance(child, _RUN_HERE) and _is_changed(child) else fault
            if fault is not None:
                return f"{child_name} {fault}"
        if not isinstance(layer, _KNOWN):
            return f"{name} is a {type(layer).__name__}"
    return None


def _fault_of_conv(conv: Any) -> str | None:
    if conv.kernel_size == (1, 1):
        return None if conv.stride == (1, 1) and conv.padding in ((0, 0), 0) else f"is {conv}"
    if conv.padding_mode != "zeros":
        return f"pads its edges {conv.padding_mode} (tiling)"
    is_plain = conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.dilation == (1, 1) and conv.stride in ((1, 1), (2, 2))
    return None if is_plain else f"is {conv}"


def _fault_of_norm(norm: Any) -> str | None:
    return None if norm.affine else "is a group norm without scales of its own"


def _fault_of_resnet(layer: Any) -> str | None:
    is_plain = type(layer.nonlinearity) is nn.SiLU and layer.time_emb_proj is not None and layer.time_embedding_norm == "default"
    return None if is_plain and layer.upsample is None and layer.downsample is None else "is not a plain resnet"


def _fault_of_sampler(layer: Any) -> str | None:
    is_plain = layer.use_conv and layer.norm is None and not getattr(layer, "use_conv_transpose", False) and getattr(layer, "interpolate", True)
    return None if is_plain and getattr(layer, "padding", 1) == 1 else "changes the size in another way"


def _fault_of_transformer(layer: Any) -> str | None:
    return None if layer.is_input_continuous else "does not take pictures"


def _fault_of_block(block: Any) -> str | None:
    return None if block.norm_type == "layer_norm" and block.pos_embed is None and block._chunk_size is None else "is not a plain transformer block"


def _fault_of_attention(attention: Any) -> str | None:
    if type(attention.processor) not in (AttnProcessor, AttnProcessor2_0, AttentionProcessorForge):
        return f"has the processor {type(attention.processor).__name__}"
    extra = [name for name in ("norm_q", "norm_k", "group_norm", "spatial_norm", "added_kv_proj_dim") if getattr(attention, name, None) is not None]
    return f"has {', '.join(extra)}" if extra else None


def _is_changed(layer: nn.Module) -> bool:
    return "forward" in layer.__dict__ or bool(layer._forward_pre_hooks or layer._forward_hooks)


_RUN_HERE = (ResnetBlock2D, Transformer2DModel, BasicTransformerBlock, Attention, Downsample2D, Upsample2D, nn.GroupNorm)
"""Layers whose own forward is not called."""
_KNOWN = (ResnetBlock2D, Transformer2DModel, Downsample2D, Upsample2D, nn.Conv2d, nn.GroupNorm, nn.SiLU)
_CHECKS: tuple[tuple[type, Callable[[Any], str | None]], ...] = (
    (nn.Conv2d, _fault_of_conv),
    (nn.GroupNorm, _fault_of_norm),
    (ResnetBlock2D, _fault_of_resnet),
    (Downsample2D, _fault_of_sampler),
    (Upsample2D, _fault_of_sampler),
    (Transformer2DModel, _fault_of_transformer),
    (BasicTransformerBlock, _fault_of_block),
    (Attention, _fault_of_attention),
)


# what crosses


def count_traffic(layers: Sequence[nn.Module], height: int, width: int) -> TileTraffic:
    """What tiles of one row of latents (height, width) exchange in these layers, in order."""
    level = deepest = num_exchanges = halo = sums = shared = 0
    for layer in layers:
        columns, rows = _halved(width, level), _halved(height, level)
        if isinstance(layer, ResnetBlock2D):
            num_exchanges += 2
            halo += columns * (layer.in_channels + layer.out_channels)
            sums += 2 * (layer.norm1.num_groups + layer.norm2.num_groups)
        elif isinstance(layer, Transformer2DModel):
            norm: Any = layer.norm
            attending = [block.attn1.inner_dim for block in layer.transformer_blocks if not block.only_cross_attention]
            num_exchanges += 1 + len(attending)
            sums += 2 * norm.num_groups
            shared += 2 * rows * columns * sum(attending)
        elif isinstance(layer, (Downsample2D, Upsample2D)):
            num_exchanges += 1
            halo += columns * layer.channels
            level += 1 if isinstance(layer, Downsample2D) else -1
            deepest = max(deepest, level)
        elif isinstance(layer, nn.GroupNorm):
            num_exchanges += 1
            halo += columns * layer.num_channels
            sums += 2 * layer.num_groups
    return TileTraffic(
        length=height, unit=1 << deepest, num_exchanges=num_exchanges, halo_numbers=halo, sum_numbers=sums, shared_numbers=shared
    )  # fmt: skip


def _halved(length: int, times: int) -> int:
    return -(-length // (1 << times))
