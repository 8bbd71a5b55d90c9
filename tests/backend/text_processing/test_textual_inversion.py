from __future__ import annotations

import base64
import contextlib
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from backend.text_processing import embedding_files
from backend.text_processing.embedding import Embedding, EmbeddingError
from backend.text_processing.embedding_files import read_embedding
from backend.text_processing.textual_inversion import EmbeddingDatabase
from tests.support.text_encoders import tokenizer

VECTORS = torch.arange(12, dtype=torch.float32).view(3, 4) / 7
A1111_EXTRAS = {"name": "other name", "step": 500, "sd_checkpoint": "abc123", "sd_checkpoint_name": "model"}


def a1111_data(vectors: Any) -> dict[str, Any]:
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, **A1111_EXTRAS}


# files


def test_a1111_pt(tmp_path: Path) -> None:
    torch.save(a1111_data(VECTORS), tmp_path / "style.pt")
    embedding = read_embedding(tmp_path / "style.pt")
    assert embedding is not None
    assert torch.equal(embedding.vectors_by_encoder[""], VECTORS)
    assert (embedding.name, embedding.step, embedding.sd_checkpoint, embedding.sd_checkpoint_name) == ("style", 500, "abc123", "model")
    assert (embedding.vectors, embedding.shape, embedding.filename) == (3, 4, tmp_path / "style.pt")
    assert torch.equal(embedding.vec, VECTORS)


def test_first_trainers_pt_with_a_parameter_dict(tmp_path: Path) -> None:
    params = torch.nn.ParameterDict({"*": torch.nn.Parameter(VECTORS)})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": params}, tmp_path / "style.pt")
    embedding = read_embedding(tmp_path / "style.pt")
    assert embedding is not None
    assert torch.equal(embedding.vec, VECTORS)
    assert not embedding.vec.requires_grad


@pytest.mark.parametrize("shape", [(4,), (1, 4)])
def test_diffusers_bin_of_one_vector(tmp_path: Path, shape: tuple[int, ...]) -> None:
    torch.save({"<cat-toy>": VECTORS[0].view(shape).half()}, tmp_path / "toy.bin")
    embedding = read_embedding(tmp_path / "toy.bin")
    assert embedding is not None
    assert (embedding.name, embedding.vectors, embedding.vec.dtype) == ("toy", 1, torch.float32)


def test_safetensors_plain_and_pair(tmp_path: Path) -> None:
    save_file({"emb_params": VECTORS}, tmp_path / "plain.safetensors")
    save_file({"clip_l": VECTORS, "clip_g": VECTORS.repeat(1, 2)}, tmp_path / "pair.SAFETENSORS")
    plain, pair = read_embedding(tmp_path / "plain.safetensors"), read_embedding(tmp_path / "pair.SAFETENSORS")
    assert plain is not None and pair is not None
    assert (plain.widths, pair.widths, pair.shape, pair.vectors) == ({"": 4}, {"clip_l": 4, "clip_g": 8}, 12, 3)
    assert set(pair.vec) == {"clip_l", "clip_g"}


def test_hash_is_the_file_s_sha256(tmp_path: Path) -> None:
    import hashlib

    save_file({"emb_params": VECTORS}, tmp_path / "plain.safetensors")
    embedding = read_embedding(tmp_path / "plain.safetensors")
    assert embedding is not None
    assert embedding.hash == hashlib.sha256((tmp_path / "plain.safetensors").read_bytes()).hexdigest()
    assert embedding.shorthash == embedding.hash[:12]


class _Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/never-made-by-reading-an-embedding"),))


BROKEN: dict[str, tuple[str, Any, str]] = {
    "not a pickle": ("a.pt", b"not a pickle at all", "cannot be read|not a plain tensor file"),
    "empty pickle": ("a.pt", b"", "cannot be read"),
    "broken safetensors": ("a.safetensors", b"\xff" * 40, "cannot be read"),
    "broken picture": ("a.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 30, "cannot be read"),
    "code": ("a.pt", {"string_to_param": {"*": _Bomb()}}, "would run code"),
    "a list": ("a.pt", [1, 2], "contains a list"),
    "no tensor": ("a.pt", {"string_to_param": {"*": 3}}, "contains a int"),
    "two params": ("a.pt", {"string_to_param": {"*": VECTORS, "+": VECTORS}}, "2 tensors"),
    "a checkpoint": ("a.pt", {"layer.weight": VECTORS, "layer.bias": VECTORS}, "2 tensors"),
    "nothing": ("a.pt", {}, "0 tensors"),
    "integers": ("a.pt", {"a": torch.ones(2, 4, dtype=torch.int32)}, "int32 tensor"),
    "three dimensions": ("a.pt", {"a": torch.ones(2, 3, 4)}, "not a table"),
    "no rows": ("a.pt", {"a": torch.ones(0, 4)}, "not a table"),
    "not finite": ("a.pt", {"a": torch.full((2, 4), float("nan"))}, "not finite"),
    "uneven pair": ("a.pt", {"clip_l": torch.ones(1, 4), "clip_g": torch.ones(2, 8)}, "different numbers of vectors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_with_a_reason(tmp_path: Path, case: str) -> None:
    name, content, reason = BROKEN[case]
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(EmbeddingError, match=reason):
        read_embedding(tmp_path / name)
    assert not Path("/tmp/never-made-by-reading-an-embedding").exists()


def test_a_raw_pickle_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(EmbeddingError):
        read_embedding(tmp_path / "a.bin")
    assert not Path("/tmp/never-made-by-reading-an-embedding").exists()


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors", ".png"])
def test_damaged_files_raise_nothing_else(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".safetensors":
        save_file({"clip_l": VECTORS}, whole)
    elif suffix == ".png":
        write_card(whole, as_json(a1111_data(VECTORS)))
    else:
        torch.save(a1111_data(VECTORS), whole, _use_new_zipfile_serialization=suffix == ".pt")
    content, damaged, random = whole.read_bytes(), tmp_path / f"damaged{suffix}", np.random.default_rng(1)
    for _ in range(150):
        spoiled = np.frombuffer(content, np.uint8).copy()[: random.integers(len(content) // 2, len(content) + 1)]
        spoiled[random.integers(0, len(spoiled), 4)] = random.integers(0, 256, 4)
        damaged.write_bytes(spoiled.tobytes())
        with contextlib.suppress(EmbeddingError):
            read_embedding(damaged)


# pictures


def as_json(data: dict[str, Any]) -> bytes:
    def encode(value: Any) -> Any:
        return {"TORCHTENSOR": value.tolist()}

    return json.dumps(data, default=encode).encode()


def write_card(path: Path, content: bytes) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(content).decode())
    Image.new("RGB", (8, 8), "white").save(path, pnginfo=info)


def test_picture_with_a_text_chunk(tmp_path: Path) -> None:
    write_card(tmp_path / "card.png", as_json(a1111_data(VECTORS)))
    embedding = read_embedding(tmp_path / "card.png")
    assert embedding is not None
    assert torch.equal(embedding.vec, VECTORS)
    assert (embedding.name, embedding.step) == ("other name", 500)


def plain_mask(num_nibbles: int) -> list[int]:
    """The textbook form of the generator, one value after the other."""
    state, values = 0, []
    for _ in range(num_nibbles):
        state = (1664525 * state + 1013904223) % 2**32
        values.append((state % 255) & 0x0F)
    return values


def hide(content: bytes, picture: np.ndarray) -> np.ndarray:
    """A picture embedding in A1111's layout: low nibbles | black | picture | black | high nibbles, with decoration in the high bits."""
    height = picture.shape[0]
    row_bytes = height * 3
    packed = np.frombuffer(content + bytes(-len(content) % row_bytes), np.uint8)
    mask = np.array(plain_mask(len(packed)), np.uint8)
    decoration = (np.arange(len(packed)) % 7 * 16 + 16).astype(np.uint8)
    low, high = (((half ^ mask) | decoration).reshape(height, -1, 3) for half in (packed & 0x0F, packed >> 4))
    black = np.zeros((height, 1, 3), np.uint8)
    return np.concatenate([low, black, picture, black, high], axis=1)


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(4).integers(1, 256, (40, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_picture_with_hidden_vectors(tmp_path: Path, picture: np.ndarray, suffix: str) -> None:
    pixels = hide(zlib.compress(as_json(a1111_data(VECTORS)), 9), picture)
    bordered = np.pad(pixels, ((3, 2), (5, 1), (0, 0)))
    Image.fromarray(bordered).save(tmp_path / f"card{suffix}", lossless=True)
    embedding = read_embedding(tmp_path / f"card{suffix}")
    assert embedding is not None
    assert torch.equal(embedding.vec, VECTORS)
    assert embedding.name == "other name"


def test_mask_equals_the_textbook_generator() -> None:
    assert embedding_files._mask_nibbles(1000).tolist() == plain_mask(1000)


def test_ordinary_pictures_are_not_embeddings(tmp_path: Path, picture: np.ndarray) -> None:
    black = np.zeros((40, 2, 3), np.uint8)
    pictures = {
        "plain": picture,
        "black": np.zeros((40, 30, 3), np.uint8),
        "gaps": np.concatenate([picture, black, picture], axis=1),
        "style.preview": picture,
    }
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        assert read_embedding(tmp_path / f"{name}.png") is None


def test_a_picture_s_data_is_bounded(tmp_path: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_files, "MAX_JSON_BYTES", 1000)
    Image.fromarray(hide(zlib.compress(b" " * 100_000), picture)).save(tmp_path / "bomb.png")
    with pytest.raises(EmbeddingError, match="larger than"):
        read_embedding(tmp_path / "bomb.png")


@pytest.mark.parametrize("content", [b"[1, 2]", b'{"a": {"TORCHTENSOR": [[1, 2], [3]]}}', b"{", b'{"a": {"TORCHTENSOR": "x"}}'])
def test_a_picture_with_other_json_is_refused(tmp_path: Path, content: bytes) -> None:
    write_card(tmp_path / "card.png", content)
    with pytest.raises(EmbeddingError):
        read_embedding(tmp_path / "card.png")


# the database


def tables(**widths: int) -> dict[str, torch.Tensor]:
    return {key: torch.ones(2, width) for key, width in widths.items()}


def database(folder: Path, **widths: int) -> EmbeddingDatabase:
    result = EmbeddingDatabase(tokenizer(), widths or {"clip_l": 4})
    result.add_embedding_dir(folder)
    result.load_textual_inversion_embeddings()
    return result


def test_a_missing_folder_is_empty(tmp_path: Path) -> None:
    assert database(tmp_path / "none").word_embeddings == {}


def test_files_for_other_models_are_skipped_with_the_reason(tmp_path: Path) -> None:
    save_file({"emb_params": torch.ones(2, 4)}, tmp_path / "sd1.safetensors")
    save_file({"emb_params": torch.ones(2, 6)}, tmp_path / "sd2.safetensors")
    save_file(tables(clip_l=4, clip_g=8), tmp_path / "xl.safetensors")
    (tmp_path / "broken.pt").write_bytes(b"junk")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no embedding")
    sd1, sdxl = database(tmp_path), database(tmp_path, clip_l=4, clip_g=8)
    assert (set(sd1.word_embeddings), set(sd1.skipped_embeddings)) == ({"sd1"}, {"sd2", "xl"})
    assert set(sd1.skip_reasons) == {"sd2", "xl", "broken"}
    assert sd1.skip_reasons["xl"] == "it was made for another kind of model: it has clip_l 4 + clip_g 8; this model takes clip_l 4"
    assert (set(sdxl.word_embeddings), set(sdxl.skipped_embeddings)) == ({"xl"}, {"sd1", "sd2"})


def test_subfolders_and_linked_folders_are_looked_into(tmp_path: Path) -> None:
    (tmp_path / "all" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    save_file({"a": torch.ones(1, 4)}, tmp_path / "all" / "deep" / "one.safetensors")
    save_file({"a": torch.ones(1, 4)}, tmp_path / "elsewhere" / "two.safetensors")
    (tmp_path / "all" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "all" / "loop").symlink_to(tmp_path / "all")
    assert set(database(tmp_path / "all").word_embeddings) == {"one", "two"}


def test_the_first_folder_s_file_of_a_name_counts(tmp_path: Path) -> None:
    for name, value in (("first", 1.0), ("second", 2.0)):
        (tmp_path / name).mkdir()
        save_file({"a": torch.full((1, 4), value)}, tmp_path / name / "style.safetensors")
    known = EmbeddingDatabase(tokenizer(), {"clip_l": 4})
    known.add_embedding_dir(tmp_path / "first")
    known.add_embedding_dir(str(tmp_path / "second"))
    known.load_textual_inversion_embeddings()
    assert known.word_embeddings["style"].vectors_for("clip_l")[0, 0] == 1.0
    assert "is taken by" in next(iter(known.skip_reasons.values()))


def test_only_changed_files_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(1, 4)}, tmp_path / "one.safetensors")
    known = database(tmp_path)
    read: list[str] = []

    def recording(path: Path) -> Embedding | None:
        read.append(path.name)
        return read_embedding(path)

    monkeypatch.setattr("backend.text_processing.textual_inversion.read_embedding", recording)
    known.load_textual_inversion_embeddings()
    assert read == []
    before = known.fingerprint
    save_file({"a": torch.zeros(1, 4)}, tmp_path / "two.safetensors")
    known.load_textual_inversion_embeddings()
    assert (read, set(known.word_embeddings)) == (["two.safetensors"], {"one", "two"})
    assert known.fingerprint != before
    (tmp_path / "one.safetensors").unlink()
    known.load_textual_inversion_embeddings()
    assert set(known.word_embeddings) == {"two"}
    known.load_textual_inversion_embeddings(force_reload=True)
    assert read == ["two.safetensors"] * 2


def test_a_file_replaced_under_its_name_changes_the_fingerprint(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1, 4)}, tmp_path / "one.safetensors")
    before = database(tmp_path).fingerprint
    assert database(tmp_path).fingerprint == before
    save_file({"a": torch.zeros(1, 4)}, tmp_path / "one.safetensors")
    assert database(tmp_path).fingerprint != before


def test_names_are_found_in_tokens_the_longest_first() -> None:
    known = EmbeddingDatabase(tokenizer(), {"clip_l": 4})
    for name in ("easy", "easy negative", "EasyNegative"):
        known.register_embedding(Embedding(name=name, vectors_by_encoder={"clip_l": torch.ones(1, 4)}))
    ids = known.tokenizer("a easy negative easy", add_special_tokens=False)["input_ids"]
    found = [known.find_embedding_at_position(ids, position) for position in range(len(ids))]
    assert [(embedding.name if embedding else None, length) for embedding, length in found] == [
        (None, 0),
        ("easy negative", 2),
        (None, 0),
        ("easy", 1),
    ]
    ids = known.tokenizer("easynegative", add_special_tokens=False)["input_ids"]
    embedding, length = known.find_embedding_at_position(ids, 0)
    assert embedding is not None and (embedding.name, length) == ("EasyNegative", len(ids))


def test_register_refuses_another_model_s() -> None:
    known = EmbeddingDatabase(tokenizer(), {"clip_l": 4})
    with pytest.raises(EmbeddingError, match="another kind of model"):
        known.register_embedding(Embedding(name="a", vectors_by_encoder={"clip_l": torch.ones(1, 5)}))
