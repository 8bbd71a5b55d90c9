"""Captions as token ids, and the labels that the text encoder is pretrained on."""

from __future__ import annotations

import random
from functools import cache

import torch

from backend.text_processing.clip_tokenizer import BOS_TOKEN_ID, EOS_TOKEN_ID, VOCAB_LENGTH, build_clip_tokenizer
from tools.demo_model.scenes import BACKGROUNDS, CELLS, COLOURS, PREFIXES, RELATIONS, SHAPES, SIZES, Scene

CONTEXT_LENGTH = 77
GRAMMAR_WORDS = " ".join(
    [
        *COLOURS,
        *BACKGROUNDS,
        *SHAPES,
        *SIZES,
        *RELATIONS,
        *PREFIXES,
        *(phrase for phrases in CELLS.values() for phrase in phrases),
        "a an and to the on background",
    ]
).split()


@cache
def word_ids(word: str) -> tuple[int, ...]:
    """CLIP tokenizes word by word, so a caption's ids are the concatenated ids of its words."""
    return tuple(_tokenizer()(word, add_special_tokens=False).input_ids)


@cache
def _tokenizer():
    return build_clip_tokenizer()


@cache
def known_ids() -> tuple[int, ...]:
    """Every token used by the grammar. All other embedding rows stay zero, so unknown words have no meaning."""
    ids = {BOS_TOKEN_ID, EOS_TOKEN_ID}
    for word in GRAMMAR_WORDS:
        ids.update(word_ids(word))
    return tuple(sorted(ids))


def known_rows_mask() -> torch.Tensor:
    """(49408, 1) float: 1 for trainable rows of the token embedding."""
    mask = torch.zeros(VOCAB_LENGTH, 1)
    mask[list(known_ids())] = 1
    return mask


def encode_caption(caption: str, rng: random.Random, *, length: int = CONTEXT_LENGTH, unknown_word_share: float = 0.1) -> list[int]:
    """Token ids with BOS, EOS and EOS padding. Sometimes mixes in a few unknown words, so that prompts may contain them."""
    words = caption.split()
    ids = [token for word in words for token in word_ids(word)]
    if rng.random() < unknown_word_share:
        known = set(known_ids())
        for _ in range(rng.randint(1, 4)):
            token = rng.randrange(256, VOCAB_LENGTH - 2)
            if token not in known:
                ids.insert(rng.choice((0, len(ids), rng.randint(0, len(ids)))), token)
    ids = [BOS_TOKEN_ID, *ids[: length - 2], EOS_TOKEN_ID]
    return ids + [EOS_TOKEN_ID] * (length - len(ids))


def label_scene(scene: Scene, caption: str) -> list[int]:
    """What the caption states: background, then color, shape, size and cell of each thing; the last class of each means "not stated"."""
    labels = [list(BACKGROUNDS).index(scene.background) if "background" in caption else len(BACKGROUNDS)]
    for index in range(2):
        if index >= len(scene.things):
            labels += [len(COLOURS), len(SHAPES), len(SIZES), len(CELLS)]
            continue
        thing = scene.things[index]
        said_place = any(phrase in caption for phrase in CELLS[thing.cell]) if scene.relation is None else scene.relation in caption
        said_extent = f"{thing.extent} {thing.colour} {thing.shape}" in caption
        labels += [
            list(COLOURS).index(thing.colour),
            SHAPES.index(thing.shape),
            list(SIZES).index(thing.extent) if said_extent else len(SIZES),
            list(CELLS).index(thing.cell) if said_place else len(CELLS),
        ]
    return labels


LABEL_CLASSES = (len(BACKGROUNDS) + 1, *(2 * (len(COLOURS) + 1, len(SHAPES) + 1, len(SIZES) + 1, len(CELLS) + 1)))
