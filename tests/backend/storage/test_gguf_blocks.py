"""GGUF's types, block by block. Reference: the `gguf` package's numpy code, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from backend.storage.gguf import GgufFormat, quantize_gguf
from backend.storage.gguf_blocks import BLOCK_TYPES, dequantize_blocks
from backend.storage.packed import PackedFormatError, PackedTensor

NUM_BLOCKS = 24
WRITTEN = [name for name, kind in BLOCK_TYPES.items() if kind.write is not None]


def random_blocks(name: str) -> torch.Tensor:
    """Any bytes are valid blocks; scales that are no numbers are among them."""
    return torch.randint(256, (NUM_BLOCKS, BLOCK_TYPES[name].num_bytes), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def reference(blocks: torch.Tensor, name: str) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name]))


def test_the_table_is_the_packages_own() -> None:
    readable = {kind.name for kind in gguf.quants._type_traits if kind.name != "BF16"}
    assert set(BLOCK_TYPES) == readable
    for name, kind in BLOCK_TYPES.items():
        number = gguf.GGMLQuantizationType[name]
        assert (number.value, gguf.GGML_QUANT_SIZES[number]) == (kind.number, (kind.weights, kind.num_bytes))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_values_are_the_packages_bit_for_bit(name: str) -> None:
    blocks = random_blocks(name)
    expected = reference(blocks, name)
    np.testing.assert_array_equal(dequantize_blocks(BLOCK_TYPES[name], blocks, torch.float32).numpy(), expected.numpy())
    for dtype in (torch.float16, torch.bfloat16):  # rounded once
        found = dequantize_blocks(BLOCK_TYPES[name], blocks, dtype)
        np.testing.assert_array_equal(found.float().numpy(), expected.to(dtype).float().numpy())


@pytest.mark.parametrize("name", WRITTEN)
def test_written_blocks_are_the_packages_bit_for_bit(name: str) -> None:
    value = torch.randn(6, 64, generator=torch.Generator().manual_seed(2)) * 0.02
    value[0], value[1, :32], value[2, 0] = 0, 0.5, -3.0
    packed = quantize_gguf(value, name)
    expected = gguf.quants.quantize(value.numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(packed.buffer, torch.from_numpy(expected).flatten())


def test_a_type_without_a_quantizer_and_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PackedFormatError, match=r"cannot be converted to GGUF Q4_K"):
        quantize_gguf(torch.zeros(2, 256), "Q4_K")
    with pytest.raises(PackedFormatError, match=r"blocks have 32 numbers"):
        quantize_gguf(torch.zeros(3, 33), "Q8_0")
    with pytest.raises(PackedFormatError, match=r"takes 34 bytes, but \(33,\)"):
        PackedTensor(torch.zeros(33, dtype=torch.uint8), GgufFormat((1, 32), "Q8_0"))
