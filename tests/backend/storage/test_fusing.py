"""Compiled dequantization. Reference: the eager reader, whose values are the `gguf` package's. Not run on a card here: the CPU's compiler is used."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from backend.storage import fusing
from backend.storage.fusing import configure_fusing, dequantize_fused
from backend.storage.gguf_blocks import BLOCK_TYPES, dequantize_blocks


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fusing, "_KINDS_OF_DEVICES", frozenset({"cpu"}))
    configure_fusing(True)
    forget = fusing._compiled.cache_clear
    yield
    configure_fusing(False)
    forget()


def blocks(kind: str, count: int) -> Tensor:
    found = torch.randint(256, (count, BLOCK_TYPES[kind].num_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found[:, :4] = torch.full((1, 2), 0.01, dtype=torch.float16).view(torch.uint8)
    return found


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K"])
def test_compiled_values_are_the_eager_ones_for_any_shape(kind: str) -> None:
    for count in (3, 64, 1000):
        found = dequantize_fused(BLOCK_TYPES[kind], blocks(kind, count), torch.float32)
        torch.testing.assert_close(found, dequantize_blocks(BLOCK_TYPES[kind], blocks(kind, count), torch.float32), rtol=1e-6, atol=1e-6)
    assert fusing._Choice.is_on


def test_what_cannot_be_compiled_is_read_step_by_step(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(kind: object, out_dtype: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(fusing, "_compiled", fail)
    for _ in range(2):
        found = dequantize_fused(BLOCK_TYPES["Q8_0"], blocks("Q8_0", 3), torch.float16)
        assert torch.equal(found, dequantize_blocks(BLOCK_TYPES["Q8_0"], blocks("Q8_0", 3), torch.float16))
    assert caplog.text.count("cannot be compiled here (no compiler)") == 1


def test_a_shortage_of_memory_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(kind: object, out_dtype: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(fusing, "_compiled", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        dequantize_fused(BLOCK_TYPES["Q8_0"], blocks("Q8_0", 3), torch.float16)
    assert fusing._Choice.is_on
