"""The UNet as a flat list of segments over diffusers' modules, numbered as Forge numbers its blocks.

    input 0..n   conv_in; then per level its resnets (with their transformers) and its downsampler, one segment each
    middle 0     resnet, transformer, resnet
    output 0..n  per level its resnets (with their transformers); the level's upsampler belongs to its last segment
    last 0       norm, activation, conv_out

On one device the fold over the list is bit for bit the library's own `forward`. The program owns no weights: names of parameters
are the network's. It must not know devices, samplers or how a plan places the segments. Shapes as in unet_state.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from torch import Tensor, nn

from backend.nn.piece import Piece
from backend.nn.unet_layers import LayerRange, find_norm_wrapper, run_layers
from backend.nn.unet_state import TransformerOptions, UNetState, concat_skip, copy_control

NamedLayers = tuple[tuple[str, nn.Module], ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """The smallest placeable run of layers. `named_layers` are its modules under their names in the network."""

    kind: str
    number: int
    named_layers: NamedLayers

    @property
    def key(self) -> tuple[str, int]:
        """Forge's name of the block: ("input", 4)."""
        return self.kind, self.number

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        return tuple(layer for _, layer in self.named_layers)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under their names in the whole network."""
        for name, layer in self.named_layers:
            yield from layer.named_parameters(prefix=name)

    def parameter_bytes(self) -> int:
        return sum(parameter.nbytes for _, parameter in self.named_parameters())

    @property
    def num_blocks(self) -> int:
        """Transformer blocks between which the segment may be cut; 0 where it has no transformer, or more than one."""
        transformers = [layer for layer in self.layers if isinstance(layer, Transformer2DModel)]
        return len(transformers[0].transformer_blocks) if len(transformers) == 1 else 0

    def part_layers(self, first_block: int = 0, end_block: int | None = None) -> NamedLayers:
        """The modules with the weights of a part: all before the blocks when it begins at 0, all behind them when it ends at None."""
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
        """Move the state past this segment, or past the part of it from one transformer block to before another."""
        state.options["block"] = self.key
        if first_block == 0:
            self._enter(state)
            self._modify(state, "before")
        self._run_layers(state, LayerRange(first_block, end_block))
        if end_block is None:
            self._leave(state)

    def _enter(self, state: UNetState) -> None:
        """What comes before the block modifiers."""
        return

    def _run_layers(self, state: UNetState, part: LayerRange) -> None:
        state.hidden_BCHW = run_layers(self.layers, state.hidden_BCHW, state, part=part)

    def _leave(self, state: UNetState) -> None:
        self._modify(state, "after")

    def _modify(self, state: UNetState, when: str) -> None:
        for modify in state.options.get("block_modifiers", ()):
            state.hidden_BCHW = modify(state.hidden_BCHW, when, state.options)


class InputSegment(Segment):
    """Runs its layers and pushes the result as a skip."""

    def _leave(self, state: UNetState) -> None:
        state.hidden_BCHW = state.add_control(state.hidden_BCHW, "input")
        self._modify(state, "after")
        for patch in state.patches("input_block_patch"):
            state.hidden_BCHW = patch(state.hidden_BCHW, state.options)
        state.skips.append(state.hidden_BCHW)
        for patch in state.patches("input_block_patch_after_skip"):
            state.hidden_BCHW = patch(state.hidden_BCHW, state.options)


class MiddleSegment(Segment):
    """Runs its layers."""

    def _leave(self, state: UNetState) -> None:
        state.hidden_BCHW = state.add_control(state.hidden_BCHW, "middle")
        self._modify(state, "after")


class OutputSegment(Segment):
    """Pops a skip, joins it to the hidden state and runs its layers. An upsampler meets the size of the next skip."""

    def _enter(self, state: UNetState) -> None:
        skip_BCHW = state.add_control(state.skips.pop(), "output")
        for patch in state.patches("output_block_patch"):
            state.hidden_BCHW, skip_BCHW = patch(state.hidden_BCHW, skip_BCHW, state.options)
        state.hidden_BCHW = concat_skip(state.hidden_BCHW, skip_BCHW)

    def _run_layers(self, state: UNetState, part: LayerRange) -> None:
        state.hidden_BCHW = run_layers(self.layers, state.hidden_BCHW, state, _odd_upsample_size(state), part=part)


class LastSegment(Segment):
    """Norm, activation and the convolution to the output channels."""

    def _run_layers(self, state: UNetState, part: LayerRange) -> None:
        wrapper = find_norm_wrapper(state.options)
        if wrapper is None:
            super()._run_layers(state, part)
            return
        norm, activation, convolution = self.layers
        state.hidden_BCHW = convolution(activation(wrapper(norm, state.hidden_BCHW, state.options)))


def _odd_upsample_size(state: UNetState) -> tuple[int, int] | None:
    """The next skip's size where doubling would miss it (latents whose sides 2^levels does not divide), else None."""
    if not state.skips:
        return None
    height, width = state.skips[-1].shape[-2:]
    hidden_height, hidden_width = (state.hidden_BCHW if state.transformer_input_BCHW is None else state.transformer_input_BCHW).shape[-2:]
    return None if (height, width) in ((2 * hidden_height, 2 * hidden_width), (hidden_height, hidden_width)) else (height, width)


@dataclass(frozen=True, eq=False)
class TimeEmbedding:
    """Timesteps (and SDXL's vector of pooled text and sizes) to the embedding that every resnet reads. Runs before the first segment."""

    named_layers: NamedLayers
    unet: Any

    def __call__(self, timesteps_B: Tensor, y_BV: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`y_BV`: pooled text and embedded sizes side by side, as the checkpoint's label embedding takes them."""
        unet = self.unet
        emb_BE: Tensor = unet.time_embedding(unet.time_proj(timesteps_B).to(dtype))
        if unet.config.addition_embed_type is None:
            return emb_BE
        if y_BV is None:
            raise ValueError("This UNet (SDXL) takes a vector of pooled text and sizes, and none was given; pass it as y, shape (batch, "
                             f"{unet.config.projection_class_embeddings_input_dim}).")  # fmt: skip
        aug_BE: Tensor = unet.add_embedding(y_BV.to(emb_BE.dtype))
        return emb_BE + aug_BE

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.named_layers:
            yield from layer.named_parameters(prefix=name)


@dataclass(frozen=True, eq=False)
class Program:
    """Time embedding and segments of one UNet, in the order they run."""

    embedding: TimeEmbedding
    segments: tuple[Segment, ...]

    def start(
        self,
        x_BCHW: Tensor,
        timesteps_B: Tensor,
        context_BLD: Tensor | None,
        *,
        y_BV: Tensor | None = None,
        control: Mapping[str, Sequence[Tensor | None]] | None = None,
        options: TransformerOptions | None = None,
    ) -> UNetState:
        """A fresh state for one unit. The options are copied (shallow), as segments write where they are into them."""
        own_options: TransformerOptions = dict(options or {})
        own_options["original_shape"] = list(x_BCHW.shape)
        own_options["transformer_index"] = 0
        emb_BE = self.embedding(timesteps_B, y_BV, x_BCHW.dtype)
        return UNetState(x_BCHW, emb_BE, context_BLD, control=copy_control(control), options=own_options)

    def run(self, state: UNetState) -> Tensor:
        """All segments on the device the state is on; returns the network's output."""
        for segment in self.segments:
            segment(state)
        return state.hidden_BCHW

    def run_piece(self, piece: Piece, state: UNetState) -> None:
        """Move the state past one piece; its tensors are on the piece's device."""
        self.segments[piece.segment](state, piece.first_block, piece.end_block)

    def piece_layers(self, piece: Piece) -> NamedLayers:
        """The modules with the weights of a piece, under their names in the network."""
        return self.segments[piece.segment].part_layers(piece.first_block, piece.end_block)

    def finest_parts(self, piece: Piece) -> tuple[Piece, ...]:
        """A piece as its transformer blocks, where it has some; in the order they run."""
        count = max(1, self.segments[piece.segment].num_blocks)
        end = count if piece.end_block is None else piece.end_block
        return tuple(Piece(piece.segment, index, None if index == count - 1 else index + 1) for index in range(piece.first_block, end))

    def finest_pieces(self) -> tuple[Piece, ...]:
        """Every transformer block a piece of its own, where a segment can be cut; in the order they run."""
        return tuple(part for whole in self.whole_pieces() for part in self.finest_parts(whole))

    def whole_pieces(self) -> tuple[Piece, ...]:
        """Every segment a piece."""
        return tuple(Piece(number) for number in range(len(self.segments)))

    def segment(self, kind: str, number: int = 0) -> Segment:
        """The segment of that name. Raises: KeyError."""
        for segment in self.segments:
            if segment.key == (kind, number):
                return segment
        raise KeyError(f"no segment {kind} {number}; there are {', '.join(f'{s.kind} {s.number}' for s in self.segments)}")

    def skip_source(self, output_number: int) -> int:
        """Number of the input segment whose skip the given output segment pops."""
        num_inputs = sum(segment.kind == "input" for segment in self.segments)
        return num_inputs - 1 - output_number


def build_program(unet: UNet2DConditionModel) -> Program:
    """Cut a UNet of the SD1.x, SD2.x or SDXL kind into segments. Raises: ValueError for parts the program does not know."""
    _refuse_unknown_parts(unet)
    embedding_names = ["time_proj", "time_embedding", *(["add_embedding"] if unet.config.addition_embed_type else [])]
    segments = [*_input_segments(unet), _middle_segment(unet), *_output_segments(unet), _last_segment(unet)]
    return Program(TimeEmbedding(_named(unet, embedding_names), unet), tuple(segments))


def _named(unet: nn.Module, names: Sequence[str]) -> NamedLayers:
    return tuple((name, unet.get_submodule(name)) for name in names)


def _input_segments(unet: Any) -> list[Segment]:
    runs: list[list[str]] = [["conv_in"]]
    for level, block in enumerate(unet.down_blocks):
        runs += _resnet_runs(block, f"down_blocks.{level}")
        runs += [[f"down_blocks.{level}.downsamplers.0"]] if block.downsamplers else []
    return [InputSegment("input", number, _named(unet, names)) for number, names in enumerate(runs)]


def _middle_segment(unet: Any) -> Segment:
    block, names = unet.mid_block, ["mid_block.resnets.0"]
    for index in range(len(block.attentions)):
        names += [f"mid_block.attentions.{index}", f"mid_block.resnets.{index + 1}"]
    return MiddleSegment("middle", 0, _named(unet, names))


def _output_segments(unet: Any) -> list[Segment]:
    runs: list[list[str]] = []
    for level, block in enumerate(unet.up_blocks):
        level_runs = _resnet_runs(block, f"up_blocks.{level}")
        level_runs[-1] += [f"up_blocks.{level}.upsamplers.0"] if block.upsamplers else []
        runs += level_runs
    return [OutputSegment("output", number, _named(unet, names)) for number, names in enumerate(runs)]


def _last_segment(unet: Any) -> Segment:
    return LastSegment("last", 0, _named(unet, ["conv_norm_out", "conv_act", "conv_out"]))


def _resnet_runs(block: Any, prefix: str) -> list[list[str]]:
    """Per resnet of a level: its name, and its transformer's where the level has them."""
    has_attention = isinstance(block, (CrossAttnDownBlock2D, CrossAttnUpBlock2D))
    return [
        [f"{prefix}.resnets.{index}", *([f"{prefix}.attentions.{index}"] if has_attention else [])] for index in range(len(block.resnets))
    ]  # fmt: skip


def _refuse_unknown_parts(unet: Any) -> None:
    known = (DownBlock2D, CrossAttnDownBlock2D, UNetMidBlock2DCrossAttn, UNetMidBlock2D, UpBlock2D, CrossAttnUpBlock2D)
    config = unet.config
    unknown = sorted({type(block).__name__ for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks) if not isinstance(block, known)})
    unknown += [name for name in ("encoder_hid_dim_type", "class_embed_type", "time_embedding_act_fn", "num_class_embeds") if config.get(name)]
    unknown += [f"addition_embed_type={config.addition_embed_type}"] if config.addition_embed_type not in (None, "text_time") else []
    unknown += [name for name in ("dual_cross_attention", "center_input_sample") if config.get(name)]
    unknown += ["attention_type=" + config.attention_type] if config.attention_type != "default" else []
    unknown += ["resnet_time_scale_shift=" + config.resnet_time_scale_shift] if config.resnet_time_scale_shift != "default" else []
    unknown += ["resnet_skip_time_act"] if config.resnet_skip_time_act else []
    if unknown:
        raise ValueError(f"This UNet has parts that cannot be cut into segments: {', '.join(unknown)}. UNets of SD1.x, SD2.x and SDXL can.")
