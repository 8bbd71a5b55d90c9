"""Anima as a list of segments over its text conditioner and diffusers' Cosmos transformer, with the block names that hooks use.

    start       "tokens" of 2x2 latents; the constants "text" (from Qwen3's features and T5's tokens), "time" and "modulation" (of the time), "rope
                cosines", "rope sines"
    layer 0..   consumes and produces "tokens": self-attention, attention to the text, MLP, each between a modulated norm and a gate
    last 0      "flow": the tokens, normalized, projected and put back into latents

The text never enters the stream of tokens. It has 512 tokens at least, zeros behind a shorter one, which the network reads, as in training. In fp16
the stream is fp32. In fp32 the library's `forward` gives the same up to rounding.

Shapes: B rows, C latent channels, H W latent rows and columns, L tokens, S tokens of Qwen3, T tokens of T5, D token width, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from backend.attention import attention_function
from backend.families.anima.identify import CELL
from backend.families.sd3.program import unpatch
from backend.nn.anima import ROPE_SCALE
from backend.nn.block_segment import BlockSegment
from backend.nn.flux_layers import pack
from backend.nn.padded_text import TEXT_LENGTHS, pad_text
from backend.nn.program import Addition, NamedLayers, Program, ProgramState, TransformerOptions
from backend.nn.second_text import SECOND_IDS, SECOND_LENGTHS, SECOND_WEIGHTS
from backend.nn.stream_layers import Rope, half_rope, half_tables
from backend.nn.stream_tiles import StreamPlace, gather_heads, share_rows, spans_of
from backend.nn.tiles import Swaps, Tile, TileTraffic

TOKENS, TEXT, TIME, MODULATION, COSINES, SINES, FLOW = "tokens", "text", "time", "modulation", "rope cosines", "rope sines", "flow"
LAYER, LAST = "layer", "last"
THETA, TEXT_THETA = 10_000.0, 10_000.0
LEAST_TEXT_TOKENS, EXAMPLE_TEXT_TOKENS = 512, 128
"""Of T5 and of Qwen3."""
PEAK_NUMBERS = 12
"""Numbers in memory at a pass's peak, per token and unit of width; a test keeps the estimate above what is counted on the meta device."""
SAFETY = 1.5
_SIZES = "anima_sizes"
"""Key of the latents' rows and columns in the state's options, which travel with the state."""
_PLACE = "anima_place"
"""Key of where a tile's tokens are, in the options of its state."""


def picture_rope(rows: int, columns: int, head_width: int, device: torch.device) -> Rope:
    """Cosines and sines (L, K), fp32: a third of a head's angles for the column, a third for the row, the rest for the frame, which is the first.

    The base of an axis is scaled by s^(d / (d - 2)), so that its slowest angle turns s times slower. bloc97 2023, "NTK-Aware Scaled RoPE".
    """
    side = head_width // 6 * 2
    frame = head_width - 2 * side
    angles = [torch.zeros(rows * columns, frame // 2, device=device)]
    places_of_axis = torch.arange(rows, device=device).repeat_interleave(columns), torch.arange(columns, device=device).repeat(rows)
    for places, scale in zip(places_of_axis, ROPE_SCALE[1:]):
        base = THETA * scale ** (side / (side - 2))
        omega = 1.0 / base ** (torch.arange(0, side, 2, dtype=torch.float32, device=device) / side)
        angles.append(places.reshape(-1, 1).float() * omega)
    return half_tables(torch.cat(angles, dim=-1), torch.float32)


def turn(heads_BNLK: Tensor, rope: Rope) -> Tensor:
    """The first half of a head's numbers turned with the second, computed in fp32. Su et al. 2021, "RoFormer", eq. 34."""
    first, second = heads_BNLK.float().chunk(2, dim=-1)
    return (heads_BNLK.float() * rope[0] + torch.cat([-second, first], dim=-1) * rope[1]).to(heads_BNLK.dtype)


def attend(attn: Any, tokens_BLD: Tensor, context_BTD: Tensor, rope: Rope | None) -> Tensor:
    """Attention of the tokens to a context, with normalized heads."""
    query_BNLK = _heads_of(attn, attn.to_q, tokens_BLD, attn.norm_q, rope)
    key_BNTK = _heads_of(attn, attn.to_k, context_BTD, attn.norm_k, rope)
    return _join_heads(attn, query_BNLK, key_BNTK, _heads_of(attn, attn.to_v, context_BTD))


def attend_on_tile(attn: Any, tokens_BLD: Tensor, place: StreamPlace) -> Swaps[Tensor]:
    """`attend` of a tile's tokens to those of all tiles."""
    heads = _heads_of(attn, attn.to_k, tokens_BLD, attn.norm_k, place.rope), _heads_of(attn, attn.to_v, tokens_BLD)
    own = heads[0].transpose(1, 2), heads[1].transpose(1, 2)
    awaited = place.tile.peers.post(dict.fromkeys(place.tile.others, own))
    query_BNLK = _heads_of(attn, attn.to_q, tokens_BLD, attn.norm_q, place.rope)
    received = yield awaited
    key_BTNK, value_BTNK = gather_heads(own, received, place)
    del heads, own, received
    return _join_heads(attn, query_BNLK, key_BTNK.transpose(1, 2), value_BTNK.transpose(1, 2))


def _heads_of(attn: Any, layer: nn.Module, tokens_BLD: Tensor, norm: Any = None, rope: Rope | None = None) -> Tensor:
    """Queries, keys or values, (B, heads, L, K), normalized and turned where the network does."""
    heads_BNLK: Tensor = layer(tokens_BLD).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    heads_BNLK = heads_BNLK if norm is None else norm(heads_BNLK)
    return heads_BNLK if rope is None else turn(heads_BNLK, rope)


def _join_heads(attn: Any, query_BNLK: Tensor, key_BNTK: Tensor, value_BNTK: Tensor) -> Tensor:
    return attn.to_out[0](attention_function(query_BNLK, key_BNTK, value_BNTK, attn.heads, None, skip_reshape=True))  # type: ignore[no-any-return]


def run_block(block: Any, tokens_BLD: Tensor, text_BTD: Tensor, time_BD: Tensor, modulation_BM: Tensor, rope: Rope) -> Tensor:
    """The tokens after a block. The text has the network's dtype, the tokens may have another."""
    normed_BLD, gate = _modulated(block.norm1, tokens_BLD, time_BD, modulation_BM, text_BTD.dtype)
    tokens_BLD = tokens_BLD + gate * attend(block.attn1, normed_BLD, normed_BLD, rope).to(tokens_BLD.dtype)
    return _finish_block(block, tokens_BLD, text_BTD, time_BD, modulation_BM)


def run_block_on_tile(block: Any, tokens_BLD: Tensor, text_BTD: Tensor, time_BD: Tensor, modulation_BM: Tensor, place: StreamPlace) -> Swaps[Tensor]:
    """`run_block` for a tile's tokens; each tile has the whole text."""
    normed_BLD, gate = _modulated(block.norm1, tokens_BLD, time_BD, modulation_BM, text_BTD.dtype)
    mixed_BLD = yield from attend_on_tile(block.attn1, normed_BLD, place)
    return _finish_block(block, tokens_BLD + gate * mixed_BLD.to(tokens_BLD.dtype), text_BTD, time_BD, modulation_BM)


def _finish_block(block: Any, tokens_BLD: Tensor, text_BTD: Tensor, time_BD: Tensor, modulation_BM: Tensor) -> Tensor:
    """The tokens, which have read each other, after they have read the text, and after the MLP."""
    dtype = text_BTD.dtype
    normed_BLD, gate = _modulated(block.norm2, tokens_BLD, time_BD, modulation_BM, dtype)
    tokens_BLD = tokens_BLD + gate * attend(block.attn2, normed_BLD, text_BTD, None).to(tokens_BLD.dtype)
    normed_BLD, gate = _modulated(block.norm3, tokens_BLD, time_BD, modulation_BM, dtype)
    return tokens_BLD + gate * block.ff(normed_BLD).to(tokens_BLD.dtype)  # type: ignore[no-any-return]


def _modulated(norm: Any, stream_BLD: Tensor, time_BD: Tensor, modulation_BM: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(the stream, normalized and modulated, in the network's dtype; the gate)."""
    numbers_BM = norm.linear_2(norm.linear_1(functional.silu(time_BD))) + modulation_BM
    shift, scale, gate = numbers_BM.unsqueeze(1).to(stream_BLD.dtype).chunk(3, dim=-1)
    return (norm.norm(stream_BLD) * (1.0 + scale) + shift).to(dtype), gate


def read_text(conditioner: Any, rows: Mapping[str, Tensor]) -> Tensor:
    """What the transformer attends to, (B, T, D): T5's tokens, embedded here, that have read Qwen3's features, and zeros behind them.

    A token's weight, from the prompt's emphasis, multiplies what it became.
    """
    source_BSD, ids_BT = rows["context"], rows[SECOND_IDS]
    num_rows, dtype = max(source_BSD.shape[0], ids_BT.shape[0]), source_BSD.dtype
    source_mask = _mask(rows.get(TEXT_LENGTHS), source_BSD.shape[1], source_BSD.device)
    own_BT = _mask(rows.get(SECOND_LENGTHS), ids_BT.shape[1], ids_BT.device)
    hidden_BTD = conditioner.in_proj(conditioner.embed(ids_BT).to(dtype))
    head_width = hidden_BTD.shape[-1] // conditioner.config.num_attention_heads
    ropes = [half_rope(length, head_width, TEXT_THETA, dtype, ids_BT.device) for length in (ids_BT.shape[1], source_BSD.shape[1])]
    own_mask = None if own_BT is None else own_BT[:, None, None]
    read_mask = None if source_mask is None else source_mask[:, None, None]
    for block in conditioner.blocks:
        normed_BTD = block.norm_self_attn(hidden_BTD)
        hidden_BTD = hidden_BTD + _read(block.self_attn, normed_BTD, normed_BTD, own_mask, (ropes[0], ropes[0]))
        hidden_BTD = hidden_BTD + _read(block.cross_attn, block.norm_cross_attn(hidden_BTD), source_BSD, read_mask, (ropes[0], ropes[1]))
        hidden_BTD = hidden_BTD + block.mlp(block.norm_mlp(hidden_BTD))
    text_BTD = conditioner.norm(conditioner.out_proj(hidden_BTD))
    for factors_BT in (own_BT, rows.get(SECOND_WEIGHTS)):
        if factors_BT is not None:
            text_BTD = text_BTD * factors_BT.to(text_BTD)[..., None]
    return pad_text(text_BTD, max(LEAST_TEXT_TOKENS, text_BTD.shape[1])).expand(num_rows, -1, -1)


def _read(attn: Any, tokens_BTD: Tensor, source_BSD: Tensor, mask: Tensor | None, ropes: tuple[Rope, Rope]) -> Tensor:
    """The conditioner's attention: both sides have places."""
    query, key, value = (
        layer(part).unflatten(-1, (attn.num_attention_heads, -1)).transpose(1, 2)
        for layer, part in ((attn.q_proj, tokens_BTD), (attn.k_proj, source_BSD), (attn.v_proj, source_BSD))
    )
    query, key = turn(attn.q_norm(query), ropes[0]), turn(attn.k_norm(key), ropes[1])
    return attn.o_proj(attention_function(query, key, value, attn.num_attention_heads, mask, skip_reshape=True))  # type: ignore[no-any-return]


def _mask(lengths_B: Tensor | None, length: int, device: torch.device) -> Tensor | None:
    """Which tokens count, (B, length); None if that is not said."""
    return None if lengths_B is None else torch.arange(length, device=device) < lengths_B.to(device)[:, None]


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerSegment(BlockSegment):
    """A block. A hook takes and returns "img"."""

    def _run(self, state: ProgramState) -> None:
        tensors = state.tensors
        args = {"img": tensors[TOKENS], "txt": tensors[TEXT], "vec": tensors[TIME], "pe": (tensors[COSINES], tensors[SINES])}

        def forward(args: Mapping[str, Any]) -> Mapping[str, Tensor]:
            return {"img": run_block(self.layers[0], args["img"], args["txt"], args["vec"], tensors[MODULATION], args["pe"])}

        tensors[TOKENS] = self.run_or_replace(state, args, forward)["img"]

    def run_tile(self, state: ProgramState, tile: Tile) -> Swaps[None]:
        state.options["block"], tensors = self.key, state.tensors
        tensors[TOKENS] = yield from run_block_on_tile(
            self.layers[0], tensors[TOKENS], tensors[TEXT], tensors[TIME], tensors[MODULATION], state.options[_PLACE]
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class LastSegment(BlockSegment):
    """Turns the tokens back into latents."""

    network: Any

    def _run(self, state: ProgramState) -> None:
        tokens_BLD, time_BD, norm = state.tensors.pop(TOKENS), state.tensors[TIME], self.network.norm_out
        numbers_BM = norm.linear_2(norm.linear_1(functional.silu(time_BD))) + state.tensors[MODULATION][:, : 2 * norm.embedding_dim]
        shift, scale = numbers_BM.unsqueeze(1).to(tokens_BLD.dtype).chunk(2, dim=-1)
        flow_BLD = self.network.proj_out((norm.norm(tokens_BLD) * (1.0 + scale) + shift).to(time_BD.dtype))
        state.tensors[FLOW] = unpatch(flow_BLD, *state.options[_SIZES])

    def run_tile(self, state: ProgramState, tile: Tile) -> Swaps[None]:
        """Nothing crosses: the sizes in the state are the tile's."""
        self._run(state)
        yield from ()


@dataclass(frozen=True, eq=False)
class AnimaEmbedding:
    """The layers before the blocks, the text conditioner among them."""

    network: Any

    @property
    def named_layers(self) -> NamedLayers:
        return tuple((name, self.network.get_submodule(name)) for name in ("patch_embed", "time_embed", "text_conditioner"))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.named_layers:
            yield from layer.named_parameters(prefix=name)

    def embed_time(self, times_B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(normalized sinusoids (B, D), what is added to every block's modulation (B, 3 D)) of times 0..1."""
        embed = self.network.time_embed
        sinusoids_BD = embed.time_proj(times_B.float()).to(dtype)
        return embed.norm(sinusoids_BD), embed.t_embedder(sinusoids_BD)


@dataclass(frozen=True, eq=False, kw_only=True)
class AnimaProgram(Program):
    """Rows: "x" latents (B, 16, H, W); "timesteps" times 0..1; "context" Qwen3's features with "text_lengths"; T5's "second_ids" (B, T) with
    "second_lengths" and "second_weights"."""

    embedding: AnimaEmbedding

    def start(
        self, rows: Mapping[str, Tensor], *, residuals: Mapping[Addition, Tensor] | None = None, options: TransformerOptions | None = None
    ) -> ProgramState:
        network, x_BCHW = self.embedding.network, rows["x"]
        if SECOND_IDS not in rows:
            raise ValueError("Anima needs the prompt as T5's tokens too, but none were given. Pass them as second_ids, shape (batch, tokens).")
        height, width = x_BCHW.shape[2:]
        with_padding_channel = functional.pad(x_BCHW, (0, 0, 0, 0, 0, 1))
        tokens_BLD = network.patch_embed.proj(pack(with_padding_channel))
        text_BTD = read_text(network.text_conditioner, rows).expand(x_BCHW.shape[0], -1, -1)
        time_BD, modulation_BM = self.embedding.embed_time(rows["timesteps"], x_BCHW.dtype)
        cosines, sines = picture_rope(-(-height // CELL), -(-width // CELL), network.config.attention_head_dim, x_BCHW.device)
        tensors = {
            TOKENS: tokens_BLD.float() if x_BCHW.dtype == torch.float16 else tokens_BLD, TEXT: text_BTD, TIME: time_BD, MODULATION: modulation_BM,
            COSINES: cosines, SINES: sines,
        }  # fmt: skip
        return ProgramState(tensors, dict(residuals or {}), {**(options or {}), _SIZES: (height, width)})

    def why_no_tiles(self) -> str | None:
        return None

    def tile_traffic(self, rows: Mapping[str, Tensor]) -> TileTraffic:
        """Rows of tokens are cut; every block needs the keys and values of all of them."""
        (height, width), config = rows["x"].shape[-2:], self.embedding.network.config
        num_rows, columns = -(-height // CELL), -(-width // CELL)
        return TileTraffic(
            length=num_rows, unit=1, num_exchanges=config.num_layers, halo_numbers=0, sum_numbers=0,
            shared_numbers=2 * config.num_layers * num_rows * columns * config.num_attention_heads * config.attention_head_dim,
        )  # fmt: skip

    def start_tile(self, rows: Mapping[str, Tensor], tile: Tile, *, options: TransformerOptions | None = None) -> ProgramState:
        state, (start, end) = self.start(rows, options=options), tile.span
        (height, width), tensors = state.options[_SIZES], state.tensors
        spans = spans_of(share_rows(tile.cut, -(-width // CELL)))
        tensors[TOKENS] = spans.take(tensors[TOKENS], tile.rank)
        (own,) = spans.by_rank[tile.rank]
        place = StreamPlace(tile, spans, (tensors[COSINES][own], tensors[SINES][own]))
        state.options |= {_SIZES: (min(CELL * end, height) - CELL * start, width), _PLACE: place}
        return state

    def example_rows(self, *, latent_height: int, latent_width: int, context_length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        config = self.embedding.network.config
        return {
            "x": torch.empty(1, config.in_channels, latent_height, latent_width, device="meta", dtype=dtype),
            "timesteps": torch.empty(1, device="meta"),
            "context": torch.empty(1, max(context_length, EXAMPLE_TEXT_TOKENS), config.source_dim, device="meta", dtype=dtype),
            SECOND_IDS: torch.empty(1, LEAST_TEXT_TOKENS, device="meta", dtype=torch.int64),
        }

    def working_bytes(self, shape: Sequence[int], itemsize: int) -> float:
        config = self.embedding.network.config
        num_tokens = EXAMPLE_TEXT_TOKENS + -(-shape[2] // CELL) * -(-shape[3] // CELL)
        return SAFETY * PEAK_NUMBERS * shape[0] * num_tokens * config.num_attention_heads * config.attention_head_dim * itemsize  # type: ignore[no-any-return]


def build_anima_program(network: Any) -> AnimaProgram:
    """Cut an AnimaTransformer into its blocks."""
    layers = [
        LayerSegment(
            kind=LAYER, number=number, named_layers=((f"transformer_blocks.{number}", block),), consumes=(TOKENS,), produces=(TOKENS,)
        )
        for number, block in enumerate(network.transformer_blocks)
    ]  # fmt: skip
    ends = tuple((name, network.get_submodule(name)) for name in ("norm_out", "proj_out"))
    last = LastSegment(kind=LAST, number=0, named_layers=ends, consumes=(TOKENS,), produces=(FLOW,), network=network)
    return AnimaProgram(
        embedding=AnimaEmbedding(network),
        segments=(*layers, last),
        reads=("x", "timesteps", "context", TEXT_LENGTHS, SECOND_IDS, SECOND_LENGTHS, SECOND_WEIGHTS),
        inputs=(TOKENS,),
        constants=(TEXT, TIME, MODULATION, COSINES, SINES),
        output=FLOW,
    )
