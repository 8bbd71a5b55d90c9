"""GGUF headers: what the package writes is read, and what lies is refused by name without allocating. Reference: the `gguf` package."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import pytest
import torch

from backend.checkpoint_file import CheckpointError, open_tensor_file
from tests.support.low_bits import write_gguf

MAGIC = b"GGUF"


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(
    *, version: int = 3, tensors: int | None = None, entries: int | None = None, kv: tuple[bytes, ...] = (), infos: tuple[bytes, ...] = ()
) -> bytes:
    counts = struct.pack("<QQ", len(infos) if tensors is None else tensors, len(kv) if entries is None else entries)
    return MAGIC + struct.pack("<I", version) + counts + b"".join(kv) + b"".join(infos)


def info(name: str = "a", dims: tuple[int, ...] = (32, 2), kind: int = 8, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def nested(depth: int) -> bytes:
    """A list of a list of a list ..."""
    return text("deep") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, 0)


LIES = {
    "cut in the counts": (MAGIC + b"\3\0\0\0\1", ""),
    "another version": (header(version=7), "GGUF file of version 7"),
    "another byte order": (header(version=0x03000000), "another byte order"),
    "2^60 tensors": (header(tensors=2**60), "promises 1152921504606846976 tensors"),
    "2^60 entries": (header(entries=2**60), "promises 1152921504606846976 entries"),
    "a long name": (header(tensors=1, infos=(struct.pack("<Q", 2**60) + b"a" * 40,)), "is 1152921504606846976 bytes long"),
    "a long text": (header(kv=(text("k") + struct.pack("<IQ", 8, 2**60),)), "cut short inside its header"),
    "a long list": (header(kv=(text("k") + struct.pack("<IIQ", 9, 8, 2**60),)), "a list of 1152921504606846976 values"),
    "a long list of numbers": (header(kv=(text("k") + struct.pack("<IIQ", 9, 4, 2**60),)), "cut short inside its header"),
    "deep lists": (header(kv=(nested(500),)), "in too many lists"),
    "an unknown type of value": (header(kv=(text("k") + struct.pack("<I", 99),)), "a value of type 99"),
    "an unknown type of tensor": (header(infos=(info(kind=77),)), r"type 77 \(unknown\)"),
    "a type out of use": (header(infos=(info(kind=31),)), r"type 31 \(Q4_0_4_4\)"),
    "rows that blocks do not divide": (header(infos=(info(dims=(33, 2)),)), "rows of 33 numbers in Q8_0, whose blocks have 32"),
    "many dims": (header(infos=(info(dims=(1,) * 900),)), "has 900 dimensions"),
    "a huge tensor": (header(infos=(info(dims=(2**60, 2**60)),)), "is cut short: it has"),
    "data past the end": (header(infos=(info(offset=2**62),)), "is cut short: it has"),
    "a name twice": (header(infos=(info(), info())), "1 names of tensors are in its header twice"),
    "an alignment of no power": (header(kv=(text("general.alignment") + struct.pack("<II", 4, 24),), infos=(info(),)), "no power of two"),
    "an original shape that does not fit": (
        header(kv=(text("comfy.gguf.orig_shape.a") + struct.pack("<IIQ2i", 9, 5, 2, 3, 3),), infos=(info(),)),
        "does not fit the shape",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_are_refused_without_allocating(lie: str, tmp_path: Path) -> None:
    content, words = LIES[lie]
    path = tmp_path / "lie.gguf"
    path.write_bytes(content + b"\0" * (64 if words else 0))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=words or "cut short inside its header") as refusal, open_tensor_file(path):
            pass
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert str(refusal.value).startswith("lie.gguf: ")


def test_every_cut_of_a_valid_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "whole.gguf"
    write_gguf(path, {"a": torch.randn(4, 64), "b.bias": torch.randn(7)}, "Q8_0", metadata={"general.name": "one"})
    content = path.read_bytes()
    last = max(tensor.data_offset + tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors)
    for length in range(5, last):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut short|more than the file has room"), open_tensor_file(path):
            pass


def test_values_rows_and_names_are_the_packages(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.gguf", {"a": torch.randn(6, 64), "b": torch.randn(5), "c": torch.randn(2, 3)}
    values = write_gguf(path, tensors, "Q5_0", metadata={"general.name": "one"})
    with open_tensor_file(path) as file:
        assert file.metadata["general.name"] == "one" and file.metadata["general.architecture"] == "flux"
        assert {key: info.shape for key, info in file.infos.items()} == {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        for key, value in values.items():
            assert torch.equal(file.read(key, dtype=torch.float32), value)
        assert torch.equal(file.read("a", rows=(2, 5)), values["a"][2:5])
        assert file.read_stored("a").shape == (6, 64) and file.infos["a"].stored_bytes == 6 * 64 // 32 * 22


def test_a_kernel_stored_as_a_matrix_has_its_own_shape(tmp_path: Path) -> None:
    """SD 1.x and SDXL: blocks cross the kernel's rows, so rows are cut from the values."""
    path, kernel = tmp_path / "a.gguf", torch.randn(4, 4, 3, 4)
    values = write_gguf(path, {"a": kernel.reshape(-1, 64)}, "Q8_0", shapes={"a": (4, 4, 3, 4)})
    with open_tensor_file(path) as file:
        assert file.infos["a"].shape == (4, 4, 3, 4)
        assert torch.equal(file.read("a"), values["a"]) and torch.equal(file.read("a", rows=(1, 3)), values["a"][1:3])
