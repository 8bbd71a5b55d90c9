from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from backend.text_processing.clip_tokenizer import build_clip_tokenizer, tokenize_plain
from backend.text_processing.embedding import EmbeddingError
from backend.text_processing.embedding_creation import clean_name, first_vectors, write_embedding
from backend.text_processing.embedding_files import read_embedding


def engine(key: str, width: int) -> Any:
    table = nn.Embedding(49408, width)
    encoder = SimpleNamespace(get_input_embeddings=lambda: table)
    return SimpleNamespace(embedding_key=key, tokenizer=build_clip_tokenizer(), chunk_length=75, id_end=49407, text_encoder=encoder)


def words(made: Any, text: str) -> torch.Tensor:
    ids = torch.tensor(tokenize_plain(made.tokenizer, [text])[0])
    return made.text_encoder.get_input_embeddings()(ids).detach()


def test_vectors_are_those_of_the_words_spread_out() -> None:
    made = engine("clip_l", 8)
    red, cat = words(made, "red cat")
    tables = first_vectors([made], 4, "red cat")
    assert torch.equal(tables["clip_l"], torch.stack([red, red, cat, cat]))
    assert torch.equal(first_vectors([made], 1, "red cat")["clip_l"], red[None])
    assert torch.equal(first_vectors([made], 2, "*")["clip_l"], words(made, "*").expand(2, -1))
    assert not first_vectors([made], 3, "")["clip_l"].any()


def test_a_file_of_one_encoder_is_read_back(tmp_path: Path) -> None:
    tables = first_vectors([engine("clip_l", 8)], 2, "cat")
    path = write_embedding(tmp_path / "new", "a cat", tables, overwrite=False, sd_checkpoint="0123", sd_checkpoint_name="model")
    found = read_embedding(path)
    assert path.name == "a cat.pt" and found is not None
    assert (found.name, found.vectors, found.step, found.sd_checkpoint, found.sd_checkpoint_name) == ("a cat", 2, 0, "0123", "model")
    assert torch.equal(next(iter(found.vectors_by_encoder.values())), tables["clip_l"])
    assert [file.name for file in path.parent.iterdir()] == ["a cat.pt"]


def test_a_pair_of_encoders_is_read_back(tmp_path: Path) -> None:
    tables = first_vectors([engine("clip_l", 8), engine("clip_g", 12)], 2, "cat")
    path = write_embedding(tmp_path, "pair", tables, overwrite=False, sd_checkpoint=None, sd_checkpoint_name=None)
    found = read_embedding(path)
    assert path.suffix == ".safetensors" and found is not None
    assert found.widths == {"clip_l": 8, "clip_g": 12}


def test_nothing_is_overwritten_without_permission(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"sd_checkpoint": None, "sd_checkpoint_name": None}
    write_embedding(tmp_path, "a", {"clip_l": torch.zeros(1, 8)}, overwrite=False, **facts)
    with pytest.raises(EmbeddingError, match="already"):
        write_embedding(tmp_path, "a", {"clip_l": torch.ones(1, 8)}, overwrite=False, **facts)
    write_embedding(tmp_path, "a", {"clip_l": torch.ones(2, 8)}, overwrite=True, **facts)
    found = read_embedding(tmp_path / "a.pt")
    assert found is not None and found.vectors == 2


def test_of_two_writers_of_the_same_name_one_gets_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second file is created between the first writer's check and its last step."""
    facts: dict[str, Any] = {"sd_checkpoint": None, "sd_checkpoint_name": None}
    save = torch.save

    def save_late(content: Any, path: Path) -> None:
        save(content, path)
        (tmp_path / "a.pt").write_bytes(b"the other's")

    monkeypatch.setattr(torch, "save", save_late)
    with pytest.raises(EmbeddingError, match="already"):
        write_embedding(tmp_path, "a", {"clip_l": torch.zeros(1, 8)}, overwrite=False, **facts)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.pt", b"the other's")]


@pytest.mark.parametrize(("name", "kept"), [("my cat", "my cat"), ("../../x", "....x"), ("a/b\\c:d", "abcd"), ("Ünï-1_2.3", "Ünï-1_2.3")])
def test_names_stay_in_the_folder(name: str, kept: str) -> None:
    assert clean_name(name) == kept


@pytest.mark.parametrize("name", ["", "..", "///", " - "])
def test_names_of_nothing(name: str) -> None:
    with pytest.raises(EmbeddingError, match="cannot name"):
        clean_name(name)
