"""Krea 2 as a list of segments over diffusers' Krea2Transformer2DModel, with the block names that hooks use.

    start       text features of several layers are fused to one per token; tokens of 2x2 latents behind it: "tokens"; the constants "modulation" (one
                vector for all blocks) and "time" (for the last layer), "rope cosines", "rope sines", and "text mask" if rows' texts have different
                lengths
    layer 0..   consumes and produces "tokens": grouped attention with a gate, then a gated MLP, each between a norm and a modulation
    last 0      "flow": the picture's tokens, normalized, projected and put back into latents

Places: text (0, 0, 0), picture (0, row, column). Norms have a scale around zero, 1 + weight, and are fp32. In fp16 the stream is fp32. In fp32 the
library's `forward` gives the same up to rounding.

Shapes: B rows, C latent channels, H W latent rows and columns, L tokens, T text tokens, N layers of the text encoder, D token width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from backend.attention import attention_function
from backend.families.krea2.identify import CELL
from backend.nn.block_segment import BlockSegment
from backend.nn.flux_layers import pack, picture_ids, unpack
from backend.nn.padded_text import TEXT_LENGTHS, attention_mask, trim_text
from backend.nn.program import Addition, NamedLayers, Program, ProgramState, TransformerOptions
from backend.nn.stream_layers import Rope, gated, rotate, rotations
from backend.nn.stream_tiles import StreamPlace, gather_heads, join_spans, share_out, share_rows
from backend.nn.tiles import Swaps, Tile, TileTraffic

TOKENS, MODULATION, TIME, COSINES, SINES, MASK, FLOW = "tokens", "modulation", "time", "rope cosines", "rope sines", "text mask", "flow"
LAYER, LAST = "layer", "last"
EXAMPLE_TEXT_TOKENS = 256
PEAK_NUMBERS = 14
"""Numbers in memory at a pass's peak, per token and unit of width; a test keeps the estimate above what is counted on the meta device."""
SAFETY = 1.5
_SIZES = "krea2_sizes"
"""Key of the latents' rows and columns, and of the number of text tokens, in the state's options, which travel with the state."""
_PLACE = "krea2_place"
"""Key of where a tile's tokens are, in the options of its state."""


def norm_around_one(norm: Any, stream_BLD: Tensor) -> Tensor:
    """Root mean square norm times 1 + weight, in the stream's dtype. Zhang and Sennrich 2019, eq. 4."""
    normed: Tensor = functional.rms_norm(stream_BLD.float(), (norm.dim,), weight=norm.weight.float() + 1.0, eps=norm.eps)
    return normed.to(stream_BLD.dtype)


def attend(attn: Any, tokens_BLD: Tensor, rope: Rope | None, mask: Tensor | None) -> Tensor:
    """Self-attention with fewer heads of keys and values, which are repeated, and a gate for every number it gives."""
    query_BLNK, key_BLMK = (_heads_of(attn, layer, tokens_BLD, norm, rope) for layer, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k)))
    return _join_heads(attn, tokens_BLD, query_BLNK, key_BLMK, _heads_of(attn, attn.to_v, tokens_BLD), mask)


def attend_on_tile(attn: Any, tokens_BLD: Tensor, place: StreamPlace) -> Swaps[Tensor]:
    """`attend` for a tile's own queries."""
    own = (_heads_of(attn, attn.to_k, tokens_BLD, attn.norm_k, place.rope), _heads_of(attn, attn.to_v, tokens_BLD))
    awaited = place.tile.peers.post(dict.fromkeys(place.tile.others, own))
    query_BLNK = _heads_of(attn, attn.to_q, tokens_BLD, attn.norm_q, place.rope)
    received = yield awaited
    key_BTMK, value_BTMK = gather_heads(own, received, place)
    del own, received
    return _join_heads(attn, tokens_BLD, query_BLNK, key_BTMK, value_BTMK, place.mask)


def _heads_of(attn: Any, layer: nn.Module, tokens_BLD: Tensor, norm: Any = None, rope: Rope | None = None) -> Tensor:
    """Queries, keys or values, (B, L, heads, K), normalized and rotated where the network does."""
    heads_BLNK: Tensor = layer(tokens_BLD).unflatten(-1, (-1, attn.head_dim))
    heads_BLNK = heads_BLNK if norm is None else norm_around_one(norm, heads_BLNK)
    return heads_BLNK if rope is None else rotate(heads_BLNK, rope)


def _join_heads(attn: Any, tokens_BLD: Tensor, query_BLNK: Tensor, key_BTMK: Tensor, value_BTMK: Tensor, mask: Tensor | None) -> Tensor:
    """The attention of the tokens' queries to T keys, gated by the tokens, projected to (B, L, D)."""
    repeats = attn.num_heads // key_BTMK.shape[2]
    if repeats > 1:
        key_BTMK, value_BTMK = key_BTMK.repeat_interleave(repeats, dim=2), value_BTMK.repeat_interleave(repeats, dim=2)
    query, key, value = (heads.transpose(1, 2) for heads in (query_BLNK, key_BTMK, value_BTMK))
    mixed_BLD = attention_function(query, key, value, attn.num_heads, mask, skip_reshape=True)
    return attn.to_out[0](mixed_BLD * torch.sigmoid(attn.to_gate(tokens_BLD)))  # type: ignore[no-any-return]


def run_block(block: Any, tokens_BLD: Tensor, modulation_B1M: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
    """The tokens after a block. The modulation, six vectors in one, has the network's dtype, the tokens may have another."""
    vectors = _vectors_of(block, modulation_B1M, tokens_BLD.dtype)
    mixed_BLD = attend(block.attn, _norm_in(block.norm1, tokens_BLD, vectors[0], vectors[1], modulation_B1M.dtype), rope, mask)
    return _finish_block(block, tokens_BLD, mixed_BLD, vectors, modulation_B1M.dtype)


def run_block_on_tile(block: Any, tokens_BLD: Tensor, modulation_B1M: Tensor, place: StreamPlace) -> Swaps[Tensor]:
    """`run_block` for a tile's tokens."""
    vectors = _vectors_of(block, modulation_B1M, tokens_BLD.dtype)
    mixed_BLD = yield from attend_on_tile(block.attn, _norm_in(block.norm1, tokens_BLD, vectors[0], vectors[1], modulation_B1M.dtype), place)
    return _finish_block(block, tokens_BLD, mixed_BLD, vectors, modulation_B1M.dtype)


def _vectors_of(block: Any, modulation_B1M: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
    """Scale, shift and gate of attention, and of the MLP, (B, 1, D) each in the stream's dtype."""
    table_6D: Tensor = block.scale_shift_table.to(dtype)
    return torch.unbind(modulation_B1M.view(*modulation_B1M.shape[:-1], 6, -1).to(dtype) + table_6D, dim=-2)


def _norm_in(norm: Any, tokens_BLD: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention or the MLP reads, in the network's dtype."""
    return ((1.0 + scale) * norm_around_one(norm, tokens_BLD) + shift).to(dtype)


def _finish_block(block: Any, tokens_BLD: Tensor, mixed_BLD: Tensor, vectors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The tokens with what attention gave, and then with what the MLP makes of them."""
    _, _, gate, mlp_scale, mlp_shift, mlp_gate = vectors
    tokens_BLD, ff = tokens_BLD + gate * mixed_BLD.to(tokens_BLD.dtype), block.ff
    inner_BLD = gated(ff.up, ff.gate, ff.down, _norm_in(block.norm2, tokens_BLD, mlp_scale, mlp_shift, dtype))
    return tokens_BLD + mlp_gate * inner_BLD.to(tokens_BLD.dtype)


def fuse_text(fusion: Any, context_BTND: Tensor, mask: Tensor | None) -> Tensor:
    """One feature per token (B, T, D): blocks over the layers of each token, their weighted sum, blocks over the tokens."""
    num_rows, num_tokens, num_layers, width = context_BTND.shape
    dtype = context_BTND.dtype
    layers_BND = _stream(context_BTND.reshape(num_rows * num_tokens, num_layers, width))
    for block in fusion.layerwise_blocks:
        layers_BND = _run_text_block(block, layers_BND, dtype, None)
    by_layer = layers_BND.reshape(num_rows, num_tokens, num_layers, width).transpose(2, 3)
    text_BTD = _stream(fusion.projector(by_layer.to(dtype)).squeeze(-1))
    for block in fusion.refiner_blocks:
        text_BTD = _run_text_block(block, text_BTD, dtype, mask)
    return text_BTD


def _run_text_block(block: Any, stream_BLD: Tensor, dtype: torch.dtype, mask: Tensor | None) -> Tensor:
    stream_BLD = stream_BLD + attend(block.attn, norm_around_one(block.norm1, stream_BLD).to(dtype), None, mask).to(stream_BLD.dtype)
    inner_BLD = gated(block.ff.up, block.ff.gate, block.ff.down, norm_around_one(block.norm2, stream_BLD).to(dtype))
    return stream_BLD + inner_BLD.to(stream_BLD.dtype)


def _stream(tensor: Tensor) -> Tensor:
    """In a dtype that holds a trained residual stream."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerSegment(BlockSegment):
    """A block. A hook takes and returns "img", text and picture."""

    def _run(self, state: ProgramState) -> None:
        rope = state.tensors[COSINES], state.tensors[SINES]
        args = {"img": state.tensors[TOKENS], "vec": state.tensors[MODULATION], "pe": rope}

        def forward(args: Mapping[str, Any]) -> Mapping[str, Tensor]:
            return {"img": run_block(self.layers[0], args["img"], args["vec"], args["pe"], state.tensors.get(MASK))}

        state.tensors[TOKENS] = self.run_or_replace(state, args, forward)["img"]

    def run_tile(self, state: ProgramState, tile: Tile) -> Swaps[None]:
        state.options["block"] = self.key
        tokens_BLD = yield from run_block_on_tile(self.layers[0], state.tensors[TOKENS], state.tensors[MODULATION], state.options[_PLACE])
        state.tensors[TOKENS] = tokens_BLD


@dataclass(frozen=True, eq=False, kw_only=True)
class LastSegment(BlockSegment):
    """Turns the picture's tokens back into latents."""

    network: Any

    def _run(self, state: ProgramState) -> None:
        height, width, num_text = state.options[_SIZES]
        tokens_BLD, time_B1D, layer = state.tensors.pop(TOKENS)[:, num_text:], state.tensors[TIME], self.network.final_layer
        scale, shift = (time_B1D.to(tokens_BLD.dtype) + layer.scale_shift_table.to(tokens_BLD.dtype)).chunk(2, dim=1)
        flow_BLD = layer.linear(((1.0 + scale) * norm_around_one(layer.norm, tokens_BLD) + shift).to(time_B1D.dtype))
        state.tensors[FLOW] = unpack(flow_BLD, height, width)

    def run_tile(self, state: ProgramState, tile: Tile) -> Swaps[None]:
        """Nothing crosses: the sizes in the state are the tile's."""
        self._run(state)
        yield from ()


@dataclass(frozen=True, eq=False)
class Krea2Embedding:
    """The layers before the blocks."""

    network: Any

    @property
    def named_layers(self) -> NamedLayers:
        return tuple((name, self.network.get_submodule(name)) for name in ("img_in", "time_embed", "time_mod_proj", "text_fusion", "txt_in"))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.named_layers:
            yield from layer.named_parameters(prefix=name)

    def read_text(self, context_BTM: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens (B, T, D) of the features of all layers side by side."""
        network = self.network
        text_BTD = fuse_text(network.text_fusion, context_BTM.view(*context_BTM.shape[:2], network.config.num_text_layers, -1), mask)
        normed_BTD = norm_around_one(network.txt_in.norm, text_BTD).to(context_BTM.dtype)
        return network.txt_in.linear_2(functional.gelu(network.txt_in.linear_1(normed_BTD), approximate="tanh"))  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False, kw_only=True)
class Krea2Program(Program):
    """Rows: "x" latents (B, 16, H, W); "timesteps" times 0..1; "context" Qwen3-VL's features of several layers side by side; "text_lengths" (B,) how
    many tokens count."""

    embedding: Krea2Embedding

    def start(
        self, rows: Mapping[str, Tensor], *, residuals: Mapping[Addition, Tensor] | None = None, options: TransformerOptions | None = None
    ) -> ProgramState:
        network, x_BCHW = self.embedding.network, rows["x"]
        num_rows, height, width = x_BCHW.shape[0], x_BCHW.shape[2], x_BCHW.shape[3]
        context_BTM, counts_BT = trim_text(rows["context"], rows.get(TEXT_LENGTHS))
        text_BTD = self.embedding.read_text(context_BTM, None if counts_BT is None else counts_BT[:, None, None]).expand(num_rows, -1, -1)
        image_BLD = network.img_in(pack(x_BCHW))
        time_B1D = network.time_embed(rows["timesteps"].float(), dtype=x_BCHW.dtype)
        places_L3 = picture_ids(-(-height // CELL), -(-width // CELL)).to(x_BCHW.device)
        places_L3 = torch.cat([places_L3.new_zeros(text_BTD.shape[1], 3), places_L3])
        cosines, sines = rotations(places_L3[None], network.config.axes_dims_rope, network.config.rope_theta)
        modulation_B1M = network.time_mod_proj(functional.gelu(time_B1D, approximate="tanh"))
        tokens_BLD = _stream(torch.cat([text_BTD, image_BLD], dim=1))
        tensors = {TOKENS: tokens_BLD, MODULATION: modulation_B1M, TIME: time_B1D, COSINES: cosines, SINES: sines}
        mask = attention_mask(counts_BT, image_BLD.shape[1])
        if mask is not None:
            tensors[MASK] = mask
        return ProgramState(tensors, dict(residuals or {}), {**(options or {}), _SIZES: (height, width, text_BTD.shape[1])})

    def why_no_tiles(self) -> str | None:
        return None

    def tile_traffic(self, rows: Mapping[str, Tensor]) -> TileTraffic:
        """Rows of tokens are cut; every block needs the keys and values, of few heads, of all text and picture tokens."""
        (height, width), config = rows["x"].shape[-2:], self.embedding.network.config
        num_rows = -(-height // CELL)
        num_tokens = rows["context"].shape[1] + num_rows * -(-width // CELL)
        return TileTraffic(
            length=num_rows, unit=1, num_exchanges=config.num_layers, halo_numbers=0, sum_numbers=0,
            shared_numbers=2 * config.num_layers * num_tokens * config.num_key_value_heads * config.attention_head_dim,
        )  # fmt: skip

    def start_tile(self, rows: Mapping[str, Tensor], tile: Tile, *, options: TransformerOptions | None = None) -> ProgramState:
        """Every tile reads the whole text, which costs less than exchanges, and goes on with its share of it."""
        state, (start, end) = self.start(rows, options=options), tile.span
        (height, width, num_text), tensors = state.options[_SIZES], state.tensors
        text, image = share_out(tile.cut, num_text), share_rows(tile.cut, -(-width // CELL))
        spans = join_spans(text, image)
        tensors[TOKENS] = spans.take(tensors[TOKENS], tile.rank)
        own_text = text[tile.rank].stop - text[tile.rank].start
        place = StreamPlace.of(tile, spans, (tensors[COSINES], tensors[SINES]), tensors.get(MASK))
        state.options |= {_SIZES: (min(CELL * end, height) - CELL * start, width, own_text), _PLACE: place}
        return state

    def example_rows(self, *, latent_height: int, latent_width: int, context_length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        config = self.embedding.network.config
        text_width = config.num_text_layers * config.text_hidden_dim
        return {
            "x": torch.empty(1, config.in_channels // CELL**2, latent_height, latent_width, device="meta", dtype=dtype),
            "timesteps": torch.empty(1, device="meta"),
            "context": torch.empty(1, max(context_length, EXAMPLE_TEXT_TOKENS), text_width, device="meta", dtype=dtype),
        }

    def working_bytes(self, shape: Sequence[int], itemsize: int) -> float:
        num_tokens = EXAMPLE_TEXT_TOKENS + -(-shape[2] // CELL) * -(-shape[3] // CELL)
        return SAFETY * PEAK_NUMBERS * shape[0] * num_tokens * self.embedding.network.hidden_size * itemsize  # type: ignore[no-any-return]


def build_krea2_program(network: Any) -> Krea2Program:
    """Cut a Krea2Transformer2DModel into its blocks."""
    layers = [
        LayerSegment(
            kind=LAYER, number=number, named_layers=((f"transformer_blocks.{number}", block),), consumes=(TOKENS,), produces=(TOKENS,)
        )
        for number, block in enumerate(network.transformer_blocks)
    ]  # fmt: skip
    last = LastSegment(
        kind=LAST, number=0, named_layers=(("final_layer", network.final_layer),), consumes=(TOKENS,), produces=(FLOW,), network=network
    )  # fmt: skip
    return Krea2Program(
        embedding=Krea2Embedding(network),
        segments=(*layers, last),
        reads=("x", "timesteps", "context", TEXT_LENGTHS),
        inputs=(TOKENS,),
        constants=(MODULATION, TIME, COSINES, SINES, MASK),
        output=FLOW,
    )
