from __future__ import annotations

import io
import pickle
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from backend.checkpoint_file import CheckpointError, open_tensor_file
from backend.pickle_scan import DamagedPickleError, scan_pickle

STORE = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(4, dtype=torch.float16)}


def read(path: Path) -> dict[str, torch.Tensor]:
    with open_tensor_file(path) as file:
        return {key: file.read(key) for key in file.infos}


@pytest.fixture
def lightning() -> Iterator[Any]:
    """A class with a PyTorch Lightning name, as in its checkpoints from 2022."""
    names = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    modules = [types.ModuleType(name) for name in names]
    checkpoint = type("ModelCheckpoint", (), {"__module__": names[-1]})
    modules[-1].ModelCheckpoint = checkpoint  # type: ignore[attr-defined]
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(zip(names, modules, strict=True))
    yield checkpoint
    for name, module in before.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_trainers_checkpoint_is_read_in_either_format(tmp_path: Path, lightning: Any, is_zip: bool) -> None:
    callback = lightning()
    callback.best = 3
    path = tmp_path / "model.ckpt"
    content = {"state_dict": STORE, "callbacks": {lightning: {"best": callback}}, "epoch": 7}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    found = read(path)
    assert found.keys() == STORE.keys()
    assert all(torch.equal(found[key], STORE[key]) and found[key].dtype == STORE[key].dtype for key in STORE)


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_is_refused_in_either_format(tmp_path: Path, is_zip: bool) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return (print, ("never",))

    torch.save({"a": Runs()}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match="contains more than tensors"):
        read(tmp_path / "a.ckpt")


def rewrite(path: Path, change: Any, **write: Any) -> Path:
    """Rewrite a zip with changed entries."""
    with zipfile.ZipFile(path) as source:
        entries = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w", **write) as target:
        for name, content in entries.items():
            changed = change(name, content)
            target.writestr(name, changed[0] if isinstance(changed, tuple) else changed, *(changed[1:] if isinstance(changed, tuple) else ()))
    return path


@pytest.mark.parametrize("entry", ["data.pkl", "version"])
def test_a_small_file_that_unpacks_to_much_is_refused_unread(tmp_path: Path, entry: str) -> None:
    torch.save(STORE, tmp_path / "a.ckpt")
    bomb = b"\x80\x02" + b"0" * (40 * 2**20)
    path = rewrite(tmp_path / "a.ckpt", lambda name, content: (bomb, zipfile.ZIP_DEFLATED) if name.endswith(entry) else content)
    assert path.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=f"{entry} in it unpacks to 42 MB"):
        read(path)


def test_an_archive_packed_again_with_compression_is_called_that(tmp_path: Path) -> None:
    torch.save(STORE, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="repacked with compression"):
        read(rewrite(tmp_path / "a.ckpt", lambda _, content: content, compression=zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize(
    "content", [b"\x80\x02t.", b"\x80\x02}s.", b"\x80\x02h\x05.", b"\x80\x02(]", b"\x80\x02.", b"\x80\x02\xff.", b"\x80\x02R.", b""]
)
def test_a_pickle_out_of_balance_is_damaged(tmp_path: Path, content: bytes) -> None:
    torch.save(STORE, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        read(rewrite(tmp_path / "a.ckpt", lambda name, old: content if name.endswith("data.pkl") else old))
    with pytest.raises(DamagedPickleError):
        scan_pickle(io.BytesIO(content))


def test_depth_that_would_end_the_process_is_refused() -> None:
    nested = b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"Ns."
    with pytest.raises(DamagedPickleError, match="nested deeper"):
        scan_pickle(io.BytesIO(nested))


def test_tables_that_contain_each_other_are_refused(tmp_path: Path) -> None:
    table: dict[str, Any] = {"weight": torch.ones(2)}
    table["again"] = table
    torch.save(table, tmp_path / "loop.pt")
    with pytest.raises(CheckpointError, match="contain each other"):
        read(tmp_path / "loop.pt")
    tower: dict[str, Any] = {"weight": torch.ones(2)}
    for _ in range(40):
        tower = {"left": tower, "right": tower}
    torch.save(tower, tmp_path / "tower.pt")
    with pytest.raises(CheckpointError, match="contain each other"):
        read(tmp_path / "tower.pt")


def test_a_few_bytes_called_a_large_table_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1).expand(10**9)}, tmp_path / "wide.pt")
    with pytest.raises(CheckpointError, match="would take 4,000 MB"):
        read(tmp_path / "wide.pt")


def test_tensors_that_share_their_bytes_are_read(tmp_path: Path) -> None:
    shared = torch.arange(10.0)
    torch.save({"one": shared, "two": shared, "part": shared[2:5]}, tmp_path / "tied.pt")
    assert torch.equal(read(tmp_path / "tied.pt")["part"], shared[2:5])


def test_a_plain_pickle_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(CheckpointError):
        read(tmp_path / "plain.pt")
