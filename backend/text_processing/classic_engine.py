"""Turns prompts into conditions with a CLIP text encoder: chunks, emphasis, clip skip, textual inversion, pooled output.

Shapes: B prompts, L tokens (77 per chunk), C channels of the encoder, P of its projection. The text encoder is transformers' `CLIPTextModel` or
`CLIPTextModelWithProjection`. Must not know prompt schedules, model families or options: everything that varies is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from backend.text_processing.chunks import ChunkBuilder, ChunkLayout, PromptChunk, PromptChunkFix, PromptTooLongError
from backend.text_processing.clip_tokenizer import tokenize_plain
from backend.text_processing.embedding import Embedding
from backend.text_processing.emphasis import DEFAULT_EMPHASIS, apply_emphasis, resolve_emphasis_name
from backend.text_processing.parsing import Span, parse_prompt_attention
from backend.text_processing.textual_inversion import EmbeddingDatabase

COMMA_PADDING_BACKTRACK = 20
MAX_CHUNKS = 1000
"""Of a prompt. A BREAK takes six characters and adds a chunk, of which each is encoded and read in every step."""


class ClassicTextProcessingEngine:
    """A callable from prompts to conditions, always float32.

    The encoders of one model share `embeddings`, so that either all or none of them know an embedding. Without it the engine makes its own database
    from `embedding_dir`. Not thread-safe.
    """

    def __init__(
        self,
        text_encoder: nn.Module,
        tokenizer: Any,
        chunk_length: int = 75,
        embedding_dir: str | Path | Sequence[str | Path] | None = None,
        embedding_key: str = "clip_l",
        embedding_expected_shape: int = 768,
        emphasis_name: str = DEFAULT_EMPHASIS,
        text_projection: bool = False,
        minimal_clip_skip: int = 1,
        clip_skip: int = 1,
        return_pooled: bool = False,
        final_layer_norm: bool = True,
        *,
        pad_token_id: int | None = None,
        comma_padding_backtrack: int = COMMA_PADDING_BACKTRACK,
        embeddings: EmbeddingDatabase | None = None,
    ) -> None:
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.chunk_length = chunk_length
        self.embedding_key = embedding_key
        self.text_projection = text_projection
        self.minimal_clip_skip = minimal_clip_skip
        self.clip_skip = clip_skip
        self.return_pooled = return_pooled
        self.final_layer_norm = final_layer_norm
        self.comma_padding_backtrack = comma_padding_backtrack
        self.emphasis_name = resolve_emphasis_name(emphasis_name)
        self.id_start = int(tokenizer.bos_token_id)
        self.id_end = int(tokenizer.eos_token_id)
        self.id_pad = int(tokenizer.pad_token_id) if pad_token_id is None else pad_token_id
        self.comma_token = tokenizer.get_vocab().get(",</w>")
        self.embeddings = embeddings or _own_database(tokenizer, embedding_dir, {embedding_key: embedding_expected_shape})
        self._used_embeddings: dict[str, Embedding] = {}
        self._used_weights = False

    # what a caller sets

    def set_emphasis(self, name: str) -> None:
        """Set the emphasis mode for later prompts. An unknown name is logged and means "Original"."""
        self.emphasis_name = resolve_emphasis_name(name)

    def set_clip_skip(self, clip_skip: int) -> None:
        """Set which layer to read: 1 for the last, 2 for the one before it. Limited to the family's minimum and the number of layers."""
        self.clip_skip = max(1, clip_skip)

    def take_generation_params(self) -> dict[str, str]:
        """Infotext entries for the prompts encoded since the last call: "TI hashes", "TI", and "Emphasis" if it is not the default."""
        used = list(self._used_embeddings.values())
        params = _infotext_of(used, self.emphasis_name if self._used_weights else DEFAULT_EMPHASIS)
        self._used_embeddings, self._used_weights = {}, False
        return params

    # prompts to chunks

    def __call__(self, texts: Sequence[str]) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The condition z_BLC of each prompt, all padded to the chunk count of the longest; with `return_pooled` (z_BLC, pooled_BP).

        The pooled vector is read at the end token of a prompt's first chunk.

        Raises: PromptTooLongError.
        """
        chunks_of_prompt, _ = self.process_texts(texts)
        self._note_what_was_used(chunks_of_prompt)
        num_chunks = max((len(chunks) for chunks in chunks_of_prompt), default=1)
        if num_chunks > MAX_CHUNKS:
            raise PromptTooLongError(
                f"prompt: it has {num_chunks} parts of {self.chunk_length} tokens, but the limit is {MAX_CHUNKS}. Shorten it, or remove some BREAKs."
            )
        padding = self.empty_chunk()
        columns = [[chunks[index] if index < len(chunks) else padding for chunks in chunks_of_prompt] for index in range(num_chunks)]
        encoded = [self.process_chunks(column) for column in columns]
        z_BLC = torch.cat([z for z, _ in encoded], dim=1)
        return (z_BLC, encoded[0][1]) if self.return_pooled else z_BLC

    def process_texts(self, texts: Sequence[str]) -> tuple[list[list[PromptChunk]], int]:
        """(chunks of each prompt, highest token count of any prompt)."""
        lines = {text: self.tokenize_line(text) for text in texts}
        return [lines[text][0] for text in texts], max((count for _, count in lines.values()), default=0)

    def tokenize_line(self, line: str) -> tuple[list[PromptChunk], int]:
        """(chunks, token count) of one prompt without schedules."""
        spans = parse_prompt_attention(line, self.emphasis_name)
        builder = ChunkBuilder(self._layout())
        for span, tokens in zip(spans, self.tokenize([span.text for span in spans])):
            if span.is_break:
                builder.next_chunk()
            else:
                self._add_span(builder, span, tokens)
        return builder.finish()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text of any length, without start and end tokens."""
        return tokenize_plain(self.tokenizer, texts)

    def empty_chunk(self) -> PromptChunk:
        return self._layout().empty_chunk()

    def get_target_prompt_token_count(self, token_count: int) -> int:
        """How many tokens fit in the number of chunks that `token_count` needs."""
        return math.ceil(max(token_count, 1) / self.chunk_length) * self.chunk_length

    def get_prompt_lengths(self, text: str) -> tuple[int, int]:
        """(tokens used, tokens that fit) for a prompt without schedules, as the counter next to the prompt box shows them."""
        _, token_count = self.process_texts([text])
        return token_count, self.get_target_prompt_token_count(token_count)

    def _layout(self) -> ChunkLayout:
        return ChunkLayout(
            chunk_length=self.chunk_length,
            start_token=self.id_start,
            end_token=self.id_end,
            comma_token=self.comma_token,
            comma_backtrack=self.comma_padding_backtrack,
        )

    def _add_span(self, builder: ChunkBuilder, span: Span, tokens: Sequence[int]) -> None:
        position = 0
        while position < len(tokens):
            embedding, num_tokens = self.embeddings.find_embedding_at_position(tokens, position)
            if embedding is None:
                builder.add_token(tokens[position], span.weight)
                position += 1
            else:
                builder.add_embedding(tokens[position], embedding, span.weight)
                position += num_tokens

    def _note_what_was_used(self, chunks_of_prompt: Sequence[Sequence[PromptChunk]]) -> None:
        for chunk in (chunk for chunks in chunks_of_prompt for chunk in chunks):
            self._used_embeddings.update({fix.embedding.name: fix.embedding for fix in chunk.fixes})
            self._used_weights |= any(weight != 1.0 for weight in chunk.multipliers)

    # chunks to vectors

    def process_chunks(self, chunks: Sequence[PromptChunk]) -> tuple[torch.Tensor, torch.Tensor]:
        """(z_BLC, pooled_BP) for one complete chunk per prompt, L = 77, with emphasis applied."""
        with _injected(self._token_embedding(), [chunk.fixes for chunk in chunks], self.embedding_key):
            z_BLC, pooled_BP = self.encode_with_transformers(torch.tensor([self._pad(chunk.tokens) for chunk in chunks]))
        weights_BL = torch.tensor([chunk.multipliers for chunk in chunks], dtype=z_BLC.dtype, device=z_BLC.device)
        return apply_emphasis(self.emphasis_name, z_BLC, weights_BL), pooled_BP

    def encode_with_transformers(self, tokens_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(z_BLC, pooled_BP) for token rows that begin with the start token and contain an end token.

        z is the output of the layer chosen by clip skip, through the final layer norm if the family uses it. The pooled vector always comes from
        the last layer at the first end token, projected if `text_projection` is set.
        """
        clip = self._clip()
        tokens_BL = tokens_BL.to(self._token_embedding().weight.device)
        with torch.no_grad():
            outputs = clip(input_ids=tokens_BL, output_hidden_states=True)
            z_BLC = outputs.hidden_states[-self._layers_from_end(len(outputs.hidden_states) - 1)]
            z_BLC = clip.final_layer_norm(z_BLC) if self.final_layer_norm else z_BLC
            end_B = (tokens_BL == self.id_end).int().argmax(dim=-1)
            pooled_BP = outputs.last_hidden_state[torch.arange(len(tokens_BL), device=tokens_BL.device), end_B]
            pooled_BP = cast(Any, self.text_encoder).text_projection(pooled_BP) if self.text_projection else pooled_BP
        return z_BLC.float(), pooled_BP.float()

    def _clip(self) -> Any:
        return getattr(self.text_encoder, "text_model", self.text_encoder)

    def _token_embedding(self) -> nn.Embedding:
        embedding: nn.Embedding = self._clip().embeddings.token_embedding
        return embedding

    def _layers_from_end(self, num_layers: int) -> int:
        return min(max(self.clip_skip, self.minimal_clip_skip), num_layers)

    def _pad(self, tokens: Sequence[int]) -> list[int]:
        """The tokens, with everything after the first end token replaced by the padding token."""
        num_kept = list(tokens).index(self.id_end) + 1
        return [*tokens[:num_kept], *[self.id_pad] * (len(tokens) - num_kept)] if self.id_pad != self.id_end else list(tokens)


@contextmanager
def _injected(token_embedding: nn.Embedding, fixes_of_row: Sequence[Sequence[PromptChunkFix]], key: str) -> Iterator[None]:
    """Inside this context textual-inversion vectors replace the token embeddings at their positions. Afterwards the layer is unchanged."""
    if not any(fixes_of_row):
        yield
        return

    def replace(_module: nn.Module, _inputs: Any, output_BLC: torch.Tensor) -> torch.Tensor:
        output_BLC = output_BLC.clone()
        for row_LC, fixes in zip(output_BLC, fixes_of_row):
            for fix in fixes:
                _place_vectors(row_LC, fix, key)
        return output_BLC

    handle = token_embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _place_vectors(row_LC: torch.Tensor, fix: PromptChunkFix, key: str) -> None:
    first = fix.offset + 1  # after the start token
    num_vectors = min(fix.embedding.vectors, len(row_LC) - 1 - first)
    row_LC[first : first + num_vectors] = fix.embedding.vectors_for(key)[:num_vectors].to(row_LC)


def _own_database(tokenizer: Any, folders: str | Path | Sequence[str | Path] | None, widths: Mapping[str, int]) -> EmbeddingDatabase:
    database = EmbeddingDatabase(tokenizer, widths)
    for folder in [folders] if isinstance(folders, (str, Path)) else folders or ():
        database.add_embedding_dir(folder)
    database.load_textual_inversion_embeddings()
    return database


def _infotext_of(used: Sequence[Embedding], emphasis_name: str) -> dict[str, str]:
    params: dict[str, str] = {}
    if used:
        params["TI hashes"] = ", ".join(f"{_plain(embedding.name)}: {embedding.shorthash}" for embedding in used)
        params["TI"] = ", ".join(_plain(embedding.name) for embedding in used)
    if emphasis_name != DEFAULT_EMPHASIS:
        params["Emphasis"] = emphasis_name
    return params


def _plain(name: str) -> str:
    return name.replace(":", "").replace(",", "")
