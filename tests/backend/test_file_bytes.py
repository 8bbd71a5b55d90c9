"""Reads of tensors against numpy's view of the same bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from backend import file_bytes
from backend.file_bytes import FileBytes
from tests.support.fleets import virtual_fleet

NUMBERS = np.random.default_rng(0).standard_normal(5000).astype(np.float16)
START = 13
"""Not aligned, as in files of old writers."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "numbers"
    path.write_bytes(b"x" * START + NUMBERS.tobytes())
    return path


@pytest.fixture(params=[10**9, 1000, 2], ids=["one block", "several blocks", "a number a block"])
def stored(request: pytest.FixtureRequest, path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileBytes]:
    monkeypatch.setattr(file_bytes, "BLOCK_BYTES", request.param)
    with path.open("rb") as stream:
        opened = FileBytes(stream)
    yield opened
    opened.close()
    opened.close()


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32, torch.bfloat16])
def test_numbers_arrive_as_asked(stored: FileBytes, dtype: torch.dtype | None) -> None:
    tensor = stored.read(START, (50, 100), torch.float16, dtype=dtype)
    assert torch.equal(tensor, torch.from_numpy(NUMBERS).view(50, 100).to(dtype or torch.float16))
    part = stored.read(START + 200, (3,), torch.float16, dtype=dtype)
    assert torch.equal(part, torch.from_numpy(NUMBERS[100:103]).to(dtype or torch.float16))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
def test_odd_shapes(stored: FileBytes, shape: tuple[int, ...]) -> None:
    for dtype in (torch.float16, torch.float32):
        tensor = stored.read(START, shape, torch.float16, dtype=dtype)
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        assert torch.equal(tensor.flatten(), torch.from_numpy(NUMBERS[: tensor.numel()]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_numbers_arrive_on_another_device(stored: FileBytes, dtype: torch.dtype) -> None:
    with virtual_fleet(1):
        tensor = stored.read(START, (100,), torch.float16, dtype=dtype, device="vgpu:0")
        assert tensor.device.type == "vgpu"
        assert torch.equal(tensor.cpu(), torch.from_numpy(NUMBERS[:100]).to(dtype))


def test_every_stored_type_can_be_read(path: Path) -> None:
    with path.open("rb") as stream:
        stored = FileBytes(stream)
    for dtype in (torch.uint8, torch.int8, torch.bool, torch.int64, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16):
        tensor = stored.read(0, (8,), dtype)
        assert tensor.view(torch.uint8).numpy().tobytes() == path.read_bytes()[: 8 * dtype.itemsize]
    stored.close()


def test_bytes_end_with_the_file(stored: FileBytes) -> None:
    assert stored.bytes_at(0, START) == b"x" * START
    assert stored.bytes_at(stored.length - 2, stored.length + 100) == NUMBERS[-1:].tobytes()
    assert stored.bytes_at(stored.length + 5, stored.length + 9) == b""


def test_a_file_that_shrinks_is_an_error_and_not_the_end(stored: FileBytes, path: Path) -> None:
    os.truncate(path, START + 100)
    for dtype in (torch.float16, torch.float32):
        with pytest.raises(OSError, match="cut short since it was opened"):
            stored.read(START, (5000,), torch.float16, dtype=dtype)


def test_reads_without_preadv(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    monkeypatch.delattr(os, "preadv")
    with path.open("rb") as stream:
        stored = FileBytes(stream)
    assert torch.equal(stored.read(START, (5000,), torch.float16), torch.from_numpy(NUMBERS))
    stored.close()
