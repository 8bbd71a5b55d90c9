"""Runs one layer of the UNet: the library's own forward where nothing is hooked, the same arithmetic step by step where a hook wants in.

The layers are diffusers' modules and are always called as modules, so that weight streaming and layer-wise casting see them.
Must not know segments, devices or samplers. Shapes as in unet_state.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from backend.attention import attention_function
from backend.nn.unet_state import TransformerOptions, UNetState

NormWrapper = Callable[[nn.Module, Tensor, TransformerOptions], Tensor]

_BLOCK_PATCHES = ("attn1_patch", "attn2_patch", "attn1_output_patch", "attn2_output_patch", "middle_patch")


def run_layers(layers: Sequence[nn.Module], hidden_BCHW: Tensor, state: UNetState, upsample_size: tuple[int, int] | None = None) -> Tensor:
    """The layers of one segment in order, with `block_inner_modifiers` around each."""
    modifiers = state.options.get("block_inner_modifiers", ())
    for index, layer in enumerate(layers):
        for modify in modifiers:
            hidden_BCHW = modify(hidden_BCHW, "before", layer, index, layers, state.options)
        hidden_BCHW = _run_layer(layer, hidden_BCHW, state, upsample_size)
        for modify in modifiers:
            hidden_BCHW = modify(hidden_BCHW, "after", layer, index, layers, state.options)
    return hidden_BCHW


def find_norm_wrapper(options: TransformerOptions) -> NormWrapper | None:
    """The hook around GroupNorms. Extensions in the field set it under either spelling."""
    wrapper: NormWrapper | None = options.get("group_norm_wrapper") or options.get("groupnorm_wrapper")
    return wrapper


def _run_layer(layer: nn.Module, hidden_BCHW: Tensor, state: UNetState, upsample_size: tuple[int, int] | None) -> Tensor:
    if isinstance(layer, ResnetBlock2D):
        return _run_resnet(layer, hidden_BCHW, state)
    if isinstance(layer, Transformer2DModel):
        return _run_spatial_transformer(layer, hidden_BCHW, state)
    result: Tensor = layer(hidden_BCHW, upsample_size) if isinstance(layer, Upsample2D) else layer(hidden_BCHW)
    return result


def _run_resnet(layer: Any, hidden_BCHW: Tensor, state: UNetState) -> Tensor:
    wrapper = find_norm_wrapper(state.options)
    if wrapper is None:
        result: Tensor = layer(hidden_BCHW, state.emb_BE)
        return result
    inner_BCHW = layer.conv1(layer.nonlinearity(wrapper(layer.norm1, hidden_BCHW, state.options)))
    inner_BCHW = inner_BCHW + layer.time_emb_proj(layer.nonlinearity(state.emb_BE))[:, :, None, None]
    inner_BCHW = layer.conv2(layer.nonlinearity(wrapper(layer.norm2, inner_BCHW, state.options)))
    shortcut_BCHW: Tensor = hidden_BCHW if layer.conv_shortcut is None else layer.conv_shortcut(hidden_BCHW)
    output_BCHW: Tensor = (shortcut_BCHW + inner_BCHW) / layer.output_scale_factor
    return output_BCHW


def _run_spatial_transformer(layer: Any, hidden_BCHW: Tensor, state: UNetState) -> Tensor:
    if has_block_hooks(state.options):
        result_BCHW = _run_hooked_transformer(layer, hidden_BCHW, state)
    else:
        result_BCHW = layer(hidden_BCHW, encoder_hidden_states=state.context_BLD, return_dict=False)[0]
    state.options["transformer_index"] = state.options.get("transformer_index", 0) + 1
    return result_BCHW


def has_block_hooks(options: TransformerOptions) -> bool:
    """Whether a hook acts inside a transformer block."""
    patches, replacements = options.get("patches") or {}, options.get("patches_replace") or {}
    return any(patches.get(name) for name in _BLOCK_PATCHES) or any(replacements.get(name) for name in ("attn1", "attn2"))


def _run_hooked_transformer(layer: Any, hidden_BCHW: Tensor, state: UNetState) -> Tensor:
    """Transformer2DModel's arithmetic for continuous inputs, block by block."""
    batch, _, height, width = hidden_BCHW.shape
    tokens_BLD, inner_dim = layer._operate_on_continuous_inputs(hidden_BCHW)
    for index, block in enumerate(layer.transformer_blocks):
        state.options["block_index"] = index
        tokens_BLD = _run_hooked_block(block, tokens_BLD, state)
    output_BCHW: Tensor = layer._get_output_for_continuous_inputs(
        hidden_states=tokens_BLD, residual=hidden_BCHW, batch_size=batch, height=height, width=width, inner_dim=inner_dim
    )
    return output_BCHW


def _run_hooked_block(block: BasicTransformerBlock, tokens_BLD: Tensor, state: UNetState) -> Tensor:
    """One transformer block with Forge's hooks before, instead of and after each attention."""
    extra = {key: value for key, value in state.options.items() if key not in ("patches", "patches_replace")}
    extra["n_heads"], extra["dim_head"] = block.num_attention_heads, block.attention_head_dim
    self_context_BLD = state.context_BLD if block.only_cross_attention else None
    tokens_BLD = _attend(block.attn1, "attn1", block.norm1(tokens_BLD), self_context_BLD, state, extra) + tokens_BLD
    for patch in state.patches("middle_patch"):
        tokens_BLD = patch(tokens_BLD, extra)
    if block.attn2 is not None:
        tokens_BLD = _attend(block.attn2, "attn2", block.norm2(tokens_BLD), state.context_BLD, state, extra) + tokens_BLD
    result_BLD: Tensor = block.ff(block.norm3(tokens_BLD)) + tokens_BLD
    return result_BLD


def _attend(attention: Attention, name: str, normed_BLD: Tensor, context_BLD: Tensor | None, state: UNetState, extra: dict[str, Any]) -> Tensor:
    """One attention: `{name}_patch`, then the replacement for this block or the usual attention, then `{name}_output_patch`."""
    value_BLD = context_BLD
    for patch in state.patches(f"{name}_patch"):
        if context_BLD is None:
            context_BLD = value_BLD = normed_BLD
        normed_BLD, context_BLD, value_BLD = patch(normed_BLD, context_BLD, value_BLD, extra)
    context_BLD = normed_BLD if context_BLD is None else context_BLD
    value_BLD = context_BLD if value_BLD is None else value_BLD
    query_BLD, key_BLD, value_BLD = attention.to_q(normed_BLD), attention.to_k(context_BLD), attention.to_v(value_BLD)
    replace = _find_replacement(name, state.options)
    if replace is not None:
        mixed_BLD = replace(query_BLD, key_BLD, value_BLD, extra)
    else:
        mixed_BLD = attention_function(query_BLD, key_BLD, value_BLD, attention.heads)
    output_BLD: Tensor = attention.to_out[1](attention.to_out[0](mixed_BLD))
    for patch in state.patches(f"{name}_output_patch"):
        output_BLD = patch(output_BLD, extra)
    return output_BLD


def _find_replacement(name: str, options: TransformerOptions) -> Callable[..., Tensor] | None:
    """The replacement for (block, number, transformer block), else for (block, number)."""
    replacements = options.get("patches_replace", {}).get(name)
    if not replacements:
        return None
    block = options["block"]
    found: Callable[..., Tensor] | None = replacements.get((*block, options["block_index"])) or replacements.get(tuple(block))
    return found
