"""Reads textual-inversion files: `.pt` / `.bin`, `.safetensors`, and pictures that contain an embedding.

Files come from anywhere, so nothing in them is executed: pickles are read only as plain tensors, pictures as JSON, and sizes are limited. Must not
know which model is loaded.
"""

from __future__ import annotations

import base64
import hashlib
import math
import pickle
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from backend.checkpoint_pickle import DamagedPickleError, UnsafePickleError, load_content
from backend.foreign_json import parse_json, read_file
from backend.text_processing.embedding import PLAIN_KEY, Embedding, EmbeddingError

TENSOR_SUFFIXES = frozenset({".pt", ".bin", ".safetensors"})
PICTURE_SUFFIXES = frozenset({".png", ".webp", ".jxl", ".avif"})
ENCODER_KEYS = ("clip_l", "clip_g", "clip_h", "t5xxl")
PNG_TEXT_KEY = "sd-ti-embedding"
MAX_JSON_BYTES = 64 * 2**20
MAX_FILE_BYTES = 512 * 2**20
MAX_PICTURE_PX = 16_000_000
"""A picture with an embedding is small; a larger one is a preview."""
MAX_NAME_LETTERS = 255

_Pixels = npt.NDArray[np.uint8]

# Everything that damaged or hostile files have been observed to raise in the underlying libraries.
_PYTHON_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, EOFError, SyntaxError, ArithmeticError, AssertionError)
_READ_ERRORS = (*_PYTHON_ERRORS, struct.error, pickle.UnpicklingError, SafetensorError, zlib.error, Image.DecompressionBombError, MemoryError)


def read_embedding(path: Path) -> Embedding | None:
    """The embedding in a file, named after the file's stem or, in a picture, by its content. None for a picture without one.

    Raises:
        EmbeddingError: the file cannot be read, or contains something else.
    """
    try:
        content = read_file(path, max_bytes=MAX_FILE_BYTES)
        if len(content) > MAX_FILE_BYTES:
            raise EmbeddingError(f"it is larger than {MAX_FILE_BYTES / 2**20:g} MiB")
        data = _read_picture(path) if path.suffix.lower() in PICTURE_SUFFIXES else _read_tensors(path, content)
        return None if data is None else _to_embedding(path, data, content)
    except EmbeddingError:
        raise
    except _READ_ERRORS as error:
        raise EmbeddingError(f"it cannot be read ({type(error).__name__}: {_first_line(error)})") from error


def _to_embedding(path: Path, data: Mapping[str, Any], content: bytes) -> Embedding:
    is_picture = path.suffix.lower() in PICTURE_SUFFIXES
    tables = _find_tables(data)
    if not is_picture and any(tensor.numel() > len(content) for tensor in tables.values()):
        raise EmbeddingError("its tensors claim more numbers than the file has bytes")
    step = data.get("step")
    return Embedding(
        name=_usable_name(str(data.get("name") or path.stem)) if is_picture else path.stem,
        vectors_by_encoder={key: _as_table(tensor) for key, tensor in tables.items()},
        filename=path,
        hash=hashlib.sha256(content).hexdigest(),
        step=step if isinstance(step, int) else None,
        sd_checkpoint=_text_or_none(data.get("sd_checkpoint")),
        sd_checkpoint_name=_text_or_none(data.get("sd_checkpoint_name")),
    )


def _usable_name(name: str) -> str:
    """A name that can be written in a prompt. Raises: EmbeddingError."""
    if len(name) > MAX_NAME_LETTERS or not name.isprintable():
        raise EmbeddingError(f"it calls itself {name[:40]!a}{'...' if len(name) > 40 else ''} ({len(name):,} letters), which no prompt can name")
    return name


def _find_tables(data: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of any of three layouts: A1111's `string_to_param`, tables by text encoder, or one tensor under any name (diffusers)."""
    if "string_to_param" in data:
        params = dict(data["string_to_param"].items())
        return {PLAIN_KEY: _only_one(params)}
    by_encoder = {key: data[key] for key in ENCODER_KEYS if isinstance(data.get(key), torch.Tensor)}
    if by_encoder:
        return by_encoder
    return {PLAIN_KEY: _only_one({key: value for key, value in data.items() if isinstance(value, torch.Tensor)})}


def _only_one(tensors: Mapping[Any, Any]) -> torch.Tensor:
    if len(tensors) != 1:
        raise EmbeddingError(f"it contains {len(tensors)} tensors; an embedding has one, or one per text encoder")
    tensor = next(iter(tensors.values()))
    if not isinstance(tensor, torch.Tensor):
        raise EmbeddingError(f"it contains a {type(tensor).__name__} where its vectors should be")
    return tensor


def _as_table(tensor: torch.Tensor) -> torch.Tensor:
    """A detached float32 table. A single vector becomes a table with one row."""
    tensor = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    return tensor.unsqueeze(0) if tensor.ndim == 1 else tensor


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no details"])[0][:200]


# tensor files


def _read_tensors(path: Path, content: bytes) -> Mapping[str, Any]:
    if path.suffix.lower() == ".safetensors":
        tensors: dict[str, Any] = load_safetensors(content)
        return tensors
    data = _load_pickle(path)
    if not isinstance(data, Mapping):
        raise EmbeddingError(f"it contains a {type(data).__name__}, not an embedding")
    return data


def _load_pickle(path: Path) -> Any:
    """Read tensors, containers and torch's `ParameterDict` (in files of the first trainers). Anything else is refused, never executed."""
    try:
        return load_content(path, safe=[torch.nn.ParameterDict])
    except UnsafePickleError as error:
        raise EmbeddingError("it is not a plain tensor file, or would run code if opened, and was not opened; use a .safetensors file") from error
    except DamagedPickleError as error:
        raise EmbeddingError(f"it cannot be read: {error}") from error


# pictures


def _read_picture(path: Path) -> Mapping[str, Any] | None:
    if path.stem.lower().endswith(".preview"):
        return None
    with Image.open(path) as image:
        if image.width * image.height > MAX_PICTURE_PX:
            return None
        text = getattr(image, "text", {}).get(PNG_TEXT_KEY)
        content = base64.b64decode(text) if text else read_hidden_bytes(np.asarray(image.convert("RGB")))
    return None if content is None else _parse_json(content)


def _parse_json(content: bytes) -> Mapping[str, Any]:
    data = _with_tensors(parse_json(content, max_bytes=MAX_JSON_BYTES))
    if not isinstance(data, dict):
        raise EmbeddingError(f"the picture contains a {type(data).__name__}, not an embedding")
    return data


def _with_tensors(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "TORCHTENSOR" in value:
        return torch.tensor(value["TORCHTENSOR"], dtype=torch.float32)
    return {key: _with_tensors(one) for key, one in value.items()}


def read_hidden_bytes(pixels_HW3: _Pixels) -> bytes | None:
    """The data that A1111's picture embeddings hide in the low four bits of two blocks, left and right of the picture; None if there is none.

    An all-black column separates each block from the picture. The left block has the low halves of the bytes, the right block the high halves, both
    masked with the stream of `_mask_nibbles`. The bytes are a zlib stream followed by padding.
    """
    nibbles_HW3 = _without_black_border(pixels_HW3) & 0x0F
    black_columns = np.flatnonzero(nibbles_HW3.max(axis=(0, 2), initial=0) == 0)
    if len(black_columns) < 2:
        return None
    low_HW3, high_HW3 = nibbles_HW3[:, : black_columns[0]], nibbles_HW3[:, black_columns[-1] + 1 :]
    if low_HW3.shape != high_HW3.shape or low_HW3.size == 0:
        return None
    mask = _mask_nibbles(low_HW3.size)
    packed = ((high_HW3.reshape(-1) ^ mask) << 4) | (low_HW3.reshape(-1) ^ mask)
    try:
        return _inflate(packed.tobytes())
    except zlib.error:
        return None  # an ordinary picture with black columns


def _without_black_border(pixels_HW3: _Pixels) -> _Pixels:
    """Cut to the box around the pixels that are above zero in all three channels."""
    lit_HW = pixels_HW3.min(axis=2, initial=255) > 0
    rows, columns = np.flatnonzero(lit_HW.any(axis=1)), np.flatnonzero(lit_HW.any(axis=0))
    if len(rows) == 0:
        return pixels_HW3[:0, :0]
    return pixels_HW3[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _mask_nibbles(num_nibbles: int) -> _Pixels:
    """A linear congruential stream (Numerical Recipes' constants, starting at 0): the low half of each value modulo 255.

    Computed by doubling: if s -> a·s + c advances by k values, applying it to the first k values gives the next k.
    """
    states = np.array([1013904223], dtype=np.uint64)
    factor, offset = 1664525, 1013904223
    while len(states) < num_nibbles:
        states = np.concatenate([states, (states * np.uint64(factor) + np.uint64(offset)) & np.uint64(0xFFFFFFFF)])
        factor, offset = (factor * factor) % 2**32, (factor * offset + offset) % 2**32
    nibbles: _Pixels = ((states[:num_nibbles] % np.uint64(255)) & np.uint64(0x0F)).astype(np.uint8)
    return nibbles


def _inflate(content: bytes) -> bytes:
    stream = zlib.decompressobj()
    data = stream.decompress(content, MAX_JSON_BYTES)
    if stream.unconsumed_tail or not stream.eof:
        raise EmbeddingError(f"the data in the picture is truncated or larger than {math.ceil(MAX_JSON_BYTES / 2**20)} MiB")
    return data
