"""The UNet as a flat list of segments over diffusers' modules, numbered as Forge numbers its blocks.

    input 0..n   conv_in; then per level its resnets (with their transformers) and its downsampler, one segment each
    middle 0     resnet, transformer, resnet
    output 0..n  per level its resnets (with their transformers); the level's upsampler belongs to its last segment
    last 0       norm, activation, conv_out

Data flow: every segment reads and produces "hidden". Input segment i also produces "skip i", which output segment n - i reads and removes from the
state. Time embedding and text are constants.

On one device, running the list gives the same bits as the library's own `forward`. The program owns no weights; parameter names are the
network's. Must not know devices, samplers or how a plan places the segments. Shapes as in unet_state.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from backend.nn.controlnet import build_for_counting
from backend.nn.program import HOOK_OPTIONS, Addition, Exchange, NamedLayers, Program, Segment, TransformerOptions
from backend.nn.tiles import Swaps, Tile, TileTraffic
from backend.nn.unet import attach_views
from backend.nn.unet_layers import LayerRange, find_norm_wrapper, run_layers
from backend.nn.unet_state import CONTEXT, EMBEDDING, HIDDEN, TRANSFORMER_INPUT, UNetState, concat_skip, skip_name
from backend.nn.unet_tiles import count_traffic, find_untileable, run_last_on_tile, run_layers_on_tile

PEAK_NUMBERS = {True: 26, False: 16}
"""Live numbers at the peak of a forward pass, per latent position and channel of the outer level: with transformers on that level (SD1.x, SD2.x)
and without (SDXL and its refiner). Counted with fused attention; the same for every size and batch (benchmarks/memory_estimates.md)."""
SAFETY = 2.0
"""Factor on top of what tensors take, for kernels' scratch memory and allocator rounding."""


@dataclass(frozen=True, eq=False, kw_only=True)
class UNetSegment(Segment):
    """Resnets, transformers and samplers, with Forge's hooks around them."""

    @cached_property
    def plain_way(self) -> tuple[str | None, str | None, str | None, tuple[nn.Module, ...]]:
        """(skip to join, skip to keep, skip that an upsampler meets, modules in the order they run), as `UNetProgram.run_segments` needs them."""
        return None, None, None, self.layers

    @property
    def num_blocks(self) -> int:
        """Number of transformer blocks between which the segment may be cut; 0 if it has no transformer, or more than one."""
        transformers = [layer for layer in self.layers if isinstance(layer, Transformer2DModel)]
        return len(transformers[0].transformer_blocks) if len(transformers) == 1 else 0

    def part_layers(self, first_block: int = 0, end_block: int | None = None) -> NamedLayers:
        """The modules with a part's weights. Includes those before the blocks if it begins at 0, and those after them if it ends at None."""
        if first_block == 0 and end_block is None:
            return self.named_layers
        at = next(index for index, layer in enumerate(self.layers) if isinstance(layer, Transformer2DModel))
        name, transformer = self.named_layers[at]
        blocks = list(transformer.get_submodule("transformer_blocks").children())
        end = len(blocks) if end_block is None else end_block
        inner = [f"transformer_blocks.{index}" for index in range(first_block, end)]
        inner = [*(("norm", "proj_in") if first_block == 0 else ()), *inner, *(("proj_out",) if end_block is None else ())]
        own = tuple((f"{name}.{child}", transformer.get_submodule(child)) for child in inner)
        return (*(self.named_layers[:at] if first_block == 0 else ()), *own, *(self.named_layers[at + 1 :] if end_block is None else ()))

    def __call__(self, state: UNetState, first_block: int = 0, end_block: int | None = None) -> None:
        state.options["block"] = self.key
        if first_block == 0:
            self.add_residuals(state, at_end=False)
            self._enter(state)
            self._modify(state, "before")
        self._run_layers(state, LayerRange(first_block, end_block))
        if end_block is None:
            self.add_residuals(state, at_end=True)
            self._modify(state, "after")
            self._leave(state)

    def _enter(self, state: UNetState) -> None:
        """Runs before the block modifiers."""
        return

    def _run_layers(self, state: UNetState, part: LayerRange) -> None:
        state.hidden_BCHW = run_layers(self.layers, state.hidden_BCHW, state, part=part)

    def _leave(self, state: UNetState) -> None:
        """Runs after the block modifiers."""
        return

    def run_tile(self, state: UNetState, tile: Tile) -> Swaps[None]:
        """As `__call__`, for a plan without hooks around and between layers."""
        state.options["block"] = self.key
        self.add_residuals(state, at_end=False)
        self._enter(state)
        yield from self._run_layers_on_tile(state, tile)
        self.add_residuals(state, at_end=True)
        self._leave(state)

    def _run_layers_on_tile(self, state: UNetState, tile: Tile) -> Swaps[None]:
        state.hidden_BCHW = yield from run_layers_on_tile(self.layers, state.hidden_BCHW, state, tile)

    def _modify(self, state: UNetState, when: str) -> None:
        for modify in state.options.get("block_modifiers", ()):
            state.hidden_BCHW = modify(state.hidden_BCHW, when, state.options)


@dataclass(frozen=True, eq=False, kw_only=True)
class InputSegment(UNetSegment):
    """Runs its layers and also keeps the result as a skip."""

    skip: str

    @cached_property
    def plain_way(self) -> tuple[str | None, str | None, str | None, tuple[nn.Module, ...]]:
        return None, self.skip, None, self.layers

    def _leave(self, state: UNetState) -> None:
        for patch in state.patches("input_block_patch"):
            state.hidden_BCHW = patch(state.hidden_BCHW, state.options)
        skip_BCHW = state.tensors[self.skip] = state.hidden_BCHW
        state.skip_sizes[self.skip] = (skip_BCHW.shape[-2], skip_BCHW.shape[-1])
        for patch in state.patches("input_block_patch_after_skip"):
            state.hidden_BCHW = patch(state.hidden_BCHW, state.options)


@dataclass(frozen=True, eq=False, kw_only=True)
class OutputSegment(UNetSegment):
    """Joins a skip to the hidden state and runs its layers. An upsampler matches the size of the next skip."""

    skip: str
    next_skip: str | None

    @cached_property
    def plain_way(self) -> tuple[str | None, str | None, str | None, tuple[nn.Module, ...]]:
        return self.skip, None, self.next_skip, self.layers

    def _enter(self, state: UNetState) -> None:
        skip_BCHW = state.tensors.pop(self.skip)
        for patch in state.patches("output_block_patch"):
            state.hidden_BCHW, skip_BCHW = patch(state.hidden_BCHW, skip_BCHW, state.options)
        state.hidden_BCHW = concat_skip(state.hidden_BCHW, skip_BCHW)

    def _run_layers(self, state: UNetState, part: LayerRange) -> None:
        state.hidden_BCHW = run_layers(self.layers, state.hidden_BCHW, state, self._odd_upsample_size(state), part=part)

    def _run_layers_on_tile(self, state: UNetState, tile: Tile) -> Swaps[None]:
        width = None if self.next_skip is None else state.skip_sizes[self.next_skip][1]
        state.hidden_BCHW = yield from run_layers_on_tile(self.layers, state.hidden_BCHW, state, tile, width)

    def _odd_upsample_size(self, state: UNetState) -> tuple[int, int] | None:
        """The next skip's size if doubling would miss it (latents whose sides are not multiples of 2^levels, down to 1x1), else None.

        Only an upsampler uses it; segments without one keep their size."""
        if self.next_skip is None:
            return None
        height, width = state.skip_sizes[self.next_skip]
        outer_BCHW = state.hidden_BCHW if state.transformer_input_BCHW is None else state.transformer_input_BCHW
        hidden_height, hidden_width = outer_BCHW.shape[-2:]
        return None if (height, width) == (2 * hidden_height, 2 * hidden_width) else (height, width)


@dataclass(frozen=True, eq=False, kw_only=True)
class LastSegment(UNetSegment):
    """Norm, activation and the convolution to the output channels."""

    def _run_layers(self, state: UNetState, part: LayerRange) -> None:
        wrapper = find_norm_wrapper(state.options)
        if wrapper is None:
            super()._run_layers(state, part)
            return
        norm, activation, convolution = self.layers
        state.hidden_BCHW = convolution(activation(wrapper(norm, state.hidden_BCHW, state.options)))

    def _run_layers_on_tile(self, state: UNetState, tile: Tile) -> Swaps[None]:
        state.hidden_BCHW = yield from run_last_on_tile(self.layers, state.hidden_BCHW, tile)


@dataclass(frozen=True, eq=False)
class TimeEmbedding:
    """Turns timesteps (and SDXL's vector of pooled text and sizes) into the embedding that every resnet reads. Runs before the first segment."""

    named_layers: NamedLayers
    unet: Any

    def __call__(self, timesteps_B: Tensor, y_BV: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`y_BV`: pooled text and embedded sizes concatenated, as the checkpoint's label embedding takes them."""
        (_, time_proj), (_, time_embedding), *added = self.named_layers
        emb_BE: Tensor = time_embedding(time_proj(timesteps_B).to(dtype))
        if not added:
            return emb_BE
        if y_BV is None:
            raise ValueError("This UNet (SDXL) needs a vector of pooled text and sizes, and got none. Pass it as y, with shape (batch, "
                             f"{self.unet.config.projection_class_embeddings_input_dim}).")  # fmt: skip
        aug_BE: Tensor = added[0][1](y_BV.to(emb_BE.dtype))
        return emb_BE + aug_BE

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.named_layers:
            yield from layer.named_parameters(prefix=name)


@dataclass(frozen=True, eq=False, kw_only=True)
class UNetProgram(Program):
    """A UNet's program. Rows: "x" scaled latents, "timesteps", "context" (text), and "y" (SDXL's vector) if the network takes one."""

    embedding: TimeEmbedding

    def start(
        self, rows: Mapping[str, Tensor], *, residuals: Mapping[Addition, Tensor] | None = None, options: TransformerOptions | None = None
    ) -> UNetState:
        x_BCHW = rows["x"]
        own_options: TransformerOptions = dict(options or {})
        own_options["original_shape"] = list(x_BCHW.shape)
        own_options["transformer_index"] = 0
        tensors = {HIDDEN: x_BCHW, EMBEDDING: self.embedding(rows["timesteps"], rows.get("y"), x_BCHW.dtype)}
        if "context" in rows:
            tensors[CONTEXT] = rows["context"]
        return UNetState(tensors, dict(residuals or {}), own_options)

    def example_rows(self, *, latent_height: int, latent_width: int, context_length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        config = self.embedding.unet.config
        widths = config.cross_attention_dim
        rows = {
            "x": torch.empty(1, config.in_channels, latent_height, latent_width, device="meta", dtype=dtype),
            "timesteps": torch.empty(1, device="meta"),
            "context": torch.empty(1, context_length, widths if isinstance(widths, int) else max(widths), device="meta", dtype=dtype),
        }
        if config.addition_embed_type is not None:
            rows["y"] = torch.empty(1, config.projection_class_embeddings_input_dim, device="meta", dtype=dtype)
        return rows

    def facts_of_launches(self, state: UNetState) -> Hashable | None:
        return None if state.residuals or any(map(state.options.get, HOOK_OPTIONS)) else tuple(state.skip_sizes.items())

    def run_segments(self, segments: Sequence[Segment], state: UNetState) -> None:
        """Segment by segment if there are hooks or residuals; otherwise only the layers, with the same arithmetic."""
        if state.residuals or any(map(state.options.get, HOOK_OPTIONS)):
            super().run_segments(segments, state)
            return
        tensors, sizes = state.tensors, state.skip_sizes
        hidden_BCHW, emb_BE, context_BLD = tensors.pop(HIDDEN), tensors[EMBEDDING], tensors.get(CONTEXT)
        for segment in cast("Sequence[UNetSegment]", segments):
            joined, kept, next_skip, layers = segment.plain_way
            if joined is not None:
                hidden_BCHW = torch.cat([hidden_BCHW, tensors.pop(joined)], dim=1)
            for layer in layers:
                if isinstance(layer, ResnetBlock2D):
                    hidden_BCHW = layer(hidden_BCHW, emb_BE)
                elif isinstance(layer, Transformer2DModel):
                    hidden_BCHW = layer(hidden_BCHW, encoder_hidden_states=context_BLD, return_dict=False)[0]
                elif isinstance(layer, Upsample2D):
                    size = None if next_skip is None else sizes[next_skip]
                    doubled = (2 * hidden_BCHW.shape[-2], 2 * hidden_BCHW.shape[-1])
                    hidden_BCHW = layer(hidden_BCHW, None if size == doubled else size)
                else:
                    hidden_BCHW = layer(hidden_BCHW)
            if kept is not None:
                tensors[kept] = hidden_BCHW
                sizes[kept] = (hidden_BCHW.shape[-2], hidden_BCHW.shape[-1])
        tensors[HIDDEN] = hidden_BCHW

    def build_control_network(self) -> nn.Module:
        return build_for_counting(self.embedding.unet)

    def working_bytes(self, shape: Sequence[int], itemsize: int) -> float:
        config = self.embedding.unet.config
        numbers: int = PEAK_NUMBERS["CrossAttn" in config.down_block_types[0]] * config.block_out_channels[0]
        return SAFETY * numbers * shape[0] * shape[2] * shape[3] * itemsize

    def why_no_tiles(self) -> str | None:
        return find_untileable(pair for segment in self.segments for pair in segment.named_layers)

    def tile_traffic(self, rows: Mapping[str, Tensor]) -> TileTraffic:
        height, width = rows["x"].shape[-2:]
        return count_traffic([layer for segment in self.segments for layer in segment.layers], height, width)

    def start_tile(self, rows: Mapping[str, Tensor], tile: Tile, *, options: TransformerOptions | None = None) -> UNetState:
        """The state's "hidden" has one row more above and below than the tile, for the first convolution: the neighbor's, or zeros at the edge."""
        state = self.start(rows, options=options)
        start, end = tile.span
        rows_BCHW = state.hidden_BCHW[:, :, max(0, start - 1) : end + 1]
        state.hidden_BCHW = functional.pad(rows_BCHW, (0, 0, int(tile.is_first), int(tile.is_last)))
        return state

    def skip_source(self, output_number: int) -> int:
        """The number of the input segment whose skip this output segment reads."""
        num_inputs = sum(isinstance(segment, InputSegment) for segment in self.segments)
        return num_inputs - 1 - output_number


def build_program(unet: UNet2DConditionModel) -> UNetProgram:
    """Cut a UNet of the SD1.x, SD2.x or SDXL kind into segments. Raises: ValueError for unknown parts."""
    _refuse_unknown_parts(unet)
    has_vector = bool(unet.config.addition_embed_type)
    embedding_names = ["time_proj", "time_embedding", *(["add_embedding"] if has_vector else [])]
    inputs = _input_segments(unet)
    segments = [*inputs, *_middle_segments(unet), *_output_segments(unet, len(inputs)), _last_segment(unet)]
    attach_views(unet, segments)
    return UNetProgram(
        embedding=TimeEmbedding(_named(unet, embedding_names), unet),
        segments=tuple(segments),
        reads=("x", "timesteps", "context", *(("y",) if has_vector else ())),
        inputs=(HIDDEN,),
        constants=(EMBEDDING, CONTEXT),
        output=HIDDEN,
        control_kinds=("middle", "output"),
    )


def _named(unet: nn.Module, names: Sequence[str]) -> NamedLayers:
    return tuple((name, unet.get_submodule(name)) for name in names)


_INNER = (HIDDEN, TRANSFORMER_INPUT)


def _input_segments(unet: Any) -> list[UNetSegment]:
    runs: list[list[str]] = [["conv_in"]]
    for level, block in enumerate(unet.down_blocks):
        runs += _resnet_runs(block, f"down_blocks.{level}")
        runs += [[f"down_blocks.{level}.downsamplers.0"]] if block.downsamplers else []
    return [
        InputSegment(
            kind="input", number=number, named_layers=layers, consumes=(HIDDEN,), produces=(HIDDEN, skip_name(number)),
            adds=(Addition("input", number, HIDDEN),), exchanges=_find_exchanges(layers), inner=_INNER, skip=skip_name(number),
        )
        for number, layers in enumerate(_named(unet, names) for names in runs)
    ]  # fmt: skip


def _middle_segments(unet: Any) -> list[UNetSegment]:
    """One; none in distilled UNets (small-sd, tiny-sd)."""
    if unet.mid_block is None:
        return []
    block, names = unet.mid_block, ["mid_block.resnets.0"]
    for index in range(len(block.attentions)):
        names += [f"mid_block.attentions.{index}", f"mid_block.resnets.{index + 1}"]
    layers = _named(unet, names)
    return [UNetSegment(
        kind="middle", number=0, named_layers=layers, consumes=(HIDDEN,), produces=(HIDDEN,), adds=(Addition("middle", 0, HIDDEN),),
        exchanges=_find_exchanges(layers), inner=_INNER,
    )]  # fmt: skip


def _output_segments(unet: Any, num_inputs: int) -> list[UNetSegment]:
    runs: list[list[str]] = []
    for level, block in enumerate(unet.up_blocks):
        level_runs = _resnet_runs(block, f"up_blocks.{level}")
        level_runs[-1] += [f"up_blocks.{level}.upsamplers.0"] if block.upsamplers else []
        runs += level_runs
    segments: list[UNetSegment] = []
    for number, names in enumerate(runs):
        layers, source = _named(unet, names), num_inputs - 1 - number
        skip = skip_name(source)
        segments.append(OutputSegment(
            kind="output", number=number, named_layers=layers, consumes=(HIDDEN, skip), produces=(HIDDEN,),
            adds=(Addition("output", number, skip, at_end=False),), exchanges=_find_exchanges(layers), inner=_INNER, skip=skip,
            next_skip=skip_name(source - 1) if source > 0 else None,
        ))  # fmt: skip
    return segments


def _last_segment(unet: Any) -> UNetSegment:
    layers = _named(unet, ["conv_norm_out", "conv_act", "conv_out"])
    return LastSegment(
        kind="last", number=0, named_layers=layers, consumes=(HIDDEN,), produces=(HIDDEN,), exchanges=_find_exchanges(layers)
    )  # fmt: skip


def _find_exchanges(named_layers: NamedLayers) -> tuple[Exchange, ...]:
    """Rows that convolutions read beyond their tile, sums of group norms, keys and values of self-attention. Cross-attention needs no exchange:
    every slot has all of the text."""
    found: list[Exchange] = []
    for name, layer in named_layers:
        for child_name, child in layer.named_modules(prefix=name):
            if isinstance(child, nn.Conv2d) and child.kernel_size[0] > 1:
                found.append(Exchange("halo rows", child_name, halo_rows=child.kernel_size[0] // 2))
            elif isinstance(child, nn.GroupNorm):
                found.append(Exchange("norm sums", child_name))
            elif isinstance(child, BasicTransformerBlock) and not child.only_cross_attention:
                found.append(Exchange("keys and values", f"{child_name}.attn1"))
    return tuple(found)


def _resnet_runs(block: Any, prefix: str) -> list[list[str]]:
    """For each resnet of a level: its name, and its transformer's if the level has transformers."""
    has_attention = isinstance(block, (CrossAttnDownBlock2D, CrossAttnUpBlock2D))
    return [
        [f"{prefix}.resnets.{index}", *([f"{prefix}.attentions.{index}"] if has_attention else [])] for index in range(len(block.resnets))
    ]  # fmt: skip


def _refuse_unknown_parts(unet: Any) -> None:
    known = (DownBlock2D, CrossAttnDownBlock2D, UNetMidBlock2DCrossAttn, UNetMidBlock2D, UpBlock2D, CrossAttnUpBlock2D)
    config = unet.config
    middle = [] if unet.mid_block is None else [unet.mid_block]
    unknown = sorted({type(block).__name__ for block in (*unet.down_blocks, *middle, *unet.up_blocks) if not isinstance(block, known)})
    unknown += [name for name in ("encoder_hid_dim_type", "class_embed_type", "time_embedding_act_fn", "num_class_embeds") if config.get(name)]
    unknown += [f"addition_embed_type={config.addition_embed_type}"] if config.addition_embed_type not in (None, "text_time") else []
    unknown += [name for name in ("dual_cross_attention", "center_input_sample") if config.get(name)]
    unknown += ["attention_type=" + config.attention_type] if config.attention_type != "default" else []
    unknown += ["resnet_time_scale_shift=" + config.resnet_time_scale_shift] if config.resnet_time_scale_shift != "default" else []
    unknown += ["resnet_skip_time_act"] if config.resnet_skip_time_act else []
    if unknown:
        raise ValueError(f"This UNet has parts that cannot be cut into segments: {', '.join(unknown)}. Use a UNet of SD1.x, SD2.x or SDXL.")
