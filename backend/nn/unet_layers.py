"""Runs one layer of the UNet: with the library's own forward, or with the same arithmetic step by step if a hook is set inside it.

The layers are diffusers' modules and are always called as modules, so that weight streaming and layer-wise casting work.
Must not know segments, devices or samplers. Shapes as in unet_state.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from backend.attention import attention_function
from backend.nn.layer_names import name_of, running
from backend.nn.program import LAYER_VIEWS, TransformerOptions
from backend.nn.unet_state import UNetState

NormWrapper = Callable[[nn.Module, Tensor, TransformerOptions], Tensor]

_BLOCK_PATCHES = ("attn1_patch", "attn2_patch", "attn1_output_patch", "attn2_output_patch", "middle_patch")


@dataclass(frozen=True, slots=True)
class LayerRange:
    """A part of a segment's layers: transformer blocks [`first_block`, `end_block`). The whole segment is 0 to None."""

    first_block: int = 0
    end_block: int | None = None

    @property
    def is_whole(self) -> bool:
        return self.first_block == 0 and self.end_block is None


WHOLE = LayerRange()


def run_layers(
    layers: Sequence[nn.Module],
    hidden_BCHW: Tensor,
    state: UNetState,
    upsample_size: tuple[int, int] | None = None,
    part: LayerRange = WHOLE,
) -> Tensor:
    """Run the layers of one segment, or of `part` of it, in order, with `block_inner_modifiers` around each.

    A part that ends inside a transformer returns its tokens (B, L, D) and leaves the transformer's input in the state.
    """
    modifiers = state.options.get("block_inner_modifiers", ())
    first, end = _layers_of_part(layers, part)
    for index in range(first, end):
        layer = layers[index]
        is_cut = not part.is_whole and isinstance(layer, Transformer2DModel)
        for modify in modifiers if not (is_cut and part.first_block > 0) else ():
            hidden_BCHW = modify(hidden_BCHW, "before", layer, index, layers, state.options)
        hidden_BCHW = _run_transformer_part(layer, hidden_BCHW, state, part) if is_cut else _run_layer(layer, hidden_BCHW, state, upsample_size)
        for modify in modifiers if not (is_cut and part.end_block is not None) else ():
            hidden_BCHW = modify(hidden_BCHW, "after", layer, index, layers, state.options)
    return hidden_BCHW


def _layers_of_part(layers: Sequence[nn.Module], part: LayerRange) -> tuple[int, int]:
    """Position of a part's first layer, and the position after its last."""
    if part.is_whole:
        return 0, len(layers)
    at = next(index for index, layer in enumerate(layers) if isinstance(layer, Transformer2DModel))
    return at if part.first_block > 0 else 0, at + 1 if part.end_block is not None else len(layers)


def find_norm_wrapper(options: TransformerOptions) -> NormWrapper | None:
    """The hook around GroupNorms. Existing extensions use either spelling."""
    wrapper: NormWrapper | None = options.get("group_norm_wrapper") or options.get("groupnorm_wrapper")
    return wrapper


def _run_layer(layer: nn.Module, hidden_BCHW: Tensor, state: UNetState, upsample_size: tuple[int, int] | None) -> Tensor:
    view = _find_view(layer, state.options)
    if view is not None:
        return _run_replaced(view, layer, hidden_BCHW, state, upsample_size)
    if isinstance(layer, ResnetBlock2D):
        return _run_resnet(layer, hidden_BCHW, state)
    if isinstance(layer, Transformer2DModel):
        return _run_spatial_transformer(layer, hidden_BCHW, state)
    result: Tensor = layer(hidden_BCHW, upsample_size) if isinstance(layer, Upsample2D) else layer(hidden_BCHW)
    return result


def _find_view(layer: nn.Module, options: TransformerOptions) -> Any:
    """The layer's view if its `forward` was replaced; else None."""
    views = options.get(LAYER_VIEWS)
    return views.get(name_of(layer)) if views else None


def _run_replaced(view: Any, layer: nn.Module, hidden_BCHW: Tensor, state: UNetState, upsample_size: tuple[int, int] | None) -> Tensor:
    """Call a replaced forward with what Forge passes to such a layer."""
    with running(layer):
        if isinstance(layer, ResnetBlock2D):
            result: Tensor = view.forward(hidden_BCHW, state.emb_BE, state.options)
        elif isinstance(layer, Transformer2DModel):
            result = view.forward(hidden_BCHW, context=state.context_BLD, transformer_options=state.options)
            state.options["transformer_index"] = state.options.get("transformer_index", 0) + 1
        elif isinstance(layer, Upsample2D):
            result = view.forward(hidden_BCHW, output_shape=upsample_size, transformer_options=state.options)
        else:
            result = view.forward(hidden_BCHW)
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
        result_BCHW = run_transformer(layer, hidden_BCHW, state)
    else:
        result_BCHW = layer(hidden_BCHW, encoder_hidden_states=state.context_BLD, return_dict=False)[0]
    state.options["transformer_index"] = state.options.get("transformer_index", 0) + 1
    return result_BCHW


def has_block_hooks(options: TransformerOptions) -> bool:
    """Whether a hook is set inside a transformer block."""
    patches, replacements = options.get("patches") or {}, options.get("patches_replace") or {}
    hooked = any(patches.get(name) for name in _BLOCK_PATCHES) or any(replacements.get(name) for name in ("attn1", "attn2"))
    return hooked or bool(options.get(LAYER_VIEWS))


def run_transformer(layer: Any, hidden_BCHW: Tensor, state: UNetState) -> Tensor:
    """Transformer2DModel's arithmetic for continuous inputs, block by block."""
    return _run_blocks(layer, hidden_BCHW, state, WHOLE)


def _run_transformer_part(layer: Any, hidden: Tensor, state: UNetState, part: LayerRange) -> Tensor:
    """Part of a transformer. Takes BCHW if it has the first block, else tokens; returns BCHW if it has the last block, else tokens."""
    result = _run_blocks(layer, hidden, state, part)
    if part.end_block is None:
        state.options["transformer_index"] = state.options.get("transformer_index", 0) + 1
    return result


def _run_blocks(layer: Any, hidden: Tensor, state: UNetState, part: LayerRange) -> Tensor:
    tokens_BLD = hidden
    if part.first_block == 0:
        state.transformer_input_BCHW = hidden
        tokens_BLD, _ = layer._operate_on_continuous_inputs(hidden)
    hooked = has_block_hooks(state.options)
    end = len(layer.transformer_blocks) if part.end_block is None else part.end_block
    for index in range(part.first_block, end):
        block = layer.transformer_blocks[index]
        if hooked:
            state.options["block_index"] = index
            tokens_BLD = _run_hooked_block(block, tokens_BLD, state)
        else:
            tokens_BLD = block(tokens_BLD, encoder_hidden_states=state.context_BLD)
    return tokens_BLD if part.end_block is not None else _leave_transformer(layer, tokens_BLD, state)


def _leave_transformer(layer: Any, tokens_BLD: Tensor, state: UNetState) -> Tensor:
    residual_BCHW = state.transformer_input_BCHW
    assert residual_BCHW is not None
    state.transformer_input_BCHW = None
    batch, _, height, width = residual_BCHW.shape
    output_BCHW: Tensor = layer._get_output_for_continuous_inputs(
        hidden_states=tokens_BLD, residual=residual_BCHW, batch_size=batch, height=height, width=width, inner_dim=tokens_BLD.shape[-1]
    )
    return output_BCHW


def _run_hooked_block(block: BasicTransformerBlock, tokens_BLD: Tensor, state: UNetState) -> Tensor:
    """One transformer block, or what replaces its `forward`."""
    view = _find_view(block, state.options)
    if view is not None:
        with running(block):
            replaced_BLD: Tensor = view.forward(tokens_BLD, context=state.context_BLD, transformer_options=state.options)
        return replaced_BLD
    if "forward" in block.__dict__:
        own_BLD: Tensor = block(tokens_BLD, encoder_hidden_states=state.context_BLD)
        return own_BLD
    return run_block(block, tokens_BLD, state)


def run_block(block: BasicTransformerBlock, tokens_BLD: Tensor, state: UNetState) -> Tensor:
    """One transformer block with Forge's hooks before, instead of and after each attention."""
    extra = {key: value for key, value in state.options.items() if key not in ("patches", "patches_replace")}
    extra["n_heads"], extra["dim_head"] = block.num_attention_heads, block.attention_head_dim
    self_context_BLD = state.context_BLD if block.only_cross_attention else None
    tokens_BLD = attend(block.attn1, "attn1", block.norm1(tokens_BLD), self_context_BLD, state, extra) + tokens_BLD
    for patch in state.patches("middle_patch"):
        tokens_BLD = patch(tokens_BLD, extra)
    if block.attn2 is not None:
        tokens_BLD = attend(block.attn2, "attn2", block.norm2(tokens_BLD), state.context_BLD, state, extra) + tokens_BLD
    result_BLD: Tensor = block.ff(block.norm3(tokens_BLD)) + tokens_BLD
    return result_BLD


def attend(attention: Attention, name: str, normed_BLD: Tensor, context_BLD: Tensor | None, state: UNetState, extra: dict[str, Any]) -> Tensor:
    """One attention: `{name}_patch`, then the replacement for this block or the usual attention, then `{name}_output_patch`."""
    value_BLD = context_BLD
    for patch in state.patches(f"{name}_patch"):
        if context_BLD is None:
            context_BLD = value_BLD = normed_BLD
        normed_BLD, context_BLD, value_BLD = patch(normed_BLD, context_BLD, value_BLD, extra)
    output_BLD = _attend_plainly(attention, name, normed_BLD, context_BLD, value_BLD, state.options, extra)
    for patch in state.patches(f"{name}_output_patch"):
        output_BLD = patch(output_BLD, extra)
    return output_BLD


def _attend_plainly(
    attention: Attention, name: str, normed_BLD: Tensor, context_BLD: Tensor | None, value_BLD: Tensor | None, options: TransformerOptions,
    extra: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The replacement for this block, else what replaces the layer's `forward`, else the usual attention; with the output projection."""
    replace, view = _find_replacement(name, options), _find_view(attention, options)
    if replace is None and view is not None:
        with running(attention):
            replaced_BLD: Tensor = view.forward(normed_BLD, context=context_BLD, value=value_BLD, transformer_options=extra)
        return replaced_BLD
    if replace is None and "forward" in attention.__dict__:
        own_BLD: Tensor = attention(normed_BLD, encoder_hidden_states=context_BLD)
        return own_BLD
    context_BLD = normed_BLD if context_BLD is None else context_BLD
    value_BLD = context_BLD if value_BLD is None else value_BLD
    query_BLD, key_BLD, value_BLD = attention.to_q(normed_BLD), attention.to_k(context_BLD), attention.to_v(value_BLD)
    if replace is not None:
        mixed_BLD = replace(query_BLD, key_BLD, value_BLD, extra)
    else:
        mixed_BLD = attention_function(query_BLD, key_BLD, value_BLD, attention.heads)
    output_BLD: Tensor = attention.to_out[1](attention.to_out[0](mixed_BLD))
    return output_BLD


def _find_replacement(name: str, options: TransformerOptions) -> Callable[..., Tensor] | None:
    """The replacement for (block, number, transformer block), else for (block, number)."""
    replacements = options.get("patches_replace", {}).get(name)
    if not replacements:
        return None
    block = options["block"]
    found: Callable[..., Tensor] | None = replacements.get((*block, options["block_index"])) or replacements.get(tuple(block))
    return found
