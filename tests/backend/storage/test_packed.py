"""Packed weights: every question of the storage protocol for every format, and what modules do with them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from backend.devices import virtual_gpu
from backend.memory.module_bytes import count_module_bytes, move_module
from backend.nn.empty_network import META, copy_without_weights
from backend.storage import four_bit, fp8
from backend.storage.block_scaled import BlockScaledFormat
from backend.storage.four_bit import FourBitFormat, join_four_bit, quantize_four_bit
from backend.storage.gguf import quantize_gguf
from backend.storage.kinds import describe_storage, has_packed_weights, storage_of
from backend.storage.packed import PackedFormat, PackedFormatError, PackedStorage, PackedTensor, reshape_packed
from backend.storage.running import computing_in, set_types
from backend.storage.scaled import ScaledFormat, pack_scaled, quantize_scaled
from tests.support.fleets import virtual_fleet

CPU = torch.device("cpu")
ROWS, COLUMNS = 6, 64


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def nested_nf4(value: Tensor) -> PackedTensor:
    """Double quantization by hand: absmax as indices into a straight table, in blocks of 2, around an offset."""
    plain = quantize_four_bit(value, "nf4")
    absmax = plain.format.absmax(plain.buffer)  # type: ignore[attr-defined]
    table, offset = torch.linspace(-1, 1, 256), absmax.mean()
    blocks = (absmax - offset).reshape(-1, 2)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    indices = ((blocks / scales + 1) * 127.5).round().to(torch.uint8).flatten()
    buffer = join_four_bit(indices, plain.buffer[absmax.numel() * 4 :], (table, scales.flatten(), offset[None]))
    return PackedTensor(buffer, FourBitFormat(tuple(value.shape), "nf4", 64, 2))


def packed_as(form: PackedFormat, value: Tensor) -> PackedTensor:
    return PackedTensor(form.quantize(value, seed=0), form)


PACK: dict[str, Callable[[Tensor], PackedTensor]] = {
    "fp8 e4m3 scaled": lambda value: quantize_scaled(value, torch.float8_e4m3fn),
    "fp8 e5m2 scaled": lambda value: quantize_scaled(value, torch.float8_e5m2, per_row=True),
    "int8 scaled": lambda value: quantize_scaled(value, torch.int8, per_row=True),
    "NF4": lambda value: quantize_four_bit(value, "nf4"),
    "FP4": lambda value: quantize_four_bit(value, "fp4"),
    "NF4 nested": nested_nf4,
    "int8 scaled and rotated": lambda value: packed_as(ScaledFormat(tuple(value.shape), torch.int8, value.shape[0], 64), value),
    "mxfp8": lambda value: packed_as(BlockScaledFormat(tuple(value.shape), "mxfp8"), value),
    "nvfp4": lambda value: packed_as(BlockScaledFormat(tuple(value.shape), "nvfp4", 1), value),
    "nvfp4, a scale per row": lambda value: packed_as(BlockScaledFormat(tuple(value.shape), "nvfp4", value.shape[0]), value),
    "GGUF Q8_0": lambda value: quantize_gguf(value, "Q8_0"),
    "GGUF Q4_1": lambda value: quantize_gguf(value, "Q4_1"),
}
ERRORS = {
    "fp8 e4m3 scaled": 0.05, "fp8 e5m2 scaled": 0.1, "int8 scaled": 0.02, "NF4": 0.11, "FP4": 0.16, "NF4 nested": 0.12, "GGUF Q8_0": 0.01,
    "GGUF Q4_1": 0.09, "int8 scaled and rotated": 0.02, "mxfp8": 0.05, "nvfp4": 0.13, "nvfp4, a scale per row": 0.13,
}  # fmt: skip


@pytest.mark.parametrize("name", PACK)
def test_every_format_answers_every_question(name: str) -> None:
    value = numbers(ROWS, COLUMNS)
    packed = PACK[name](value)
    weight = storage_of(packed)
    assert type(weight) is PackedStorage and weight.title == name.removesuffix(" nested").partition(",")[0]
    assert (weight.shape, weight.device, weight.stored_bytes) == ((ROWS, COLUMNS), CPU, packed.buffer.nbytes)
    values = weight.dequantize(torch.float32)
    assert torch.linalg.vector_norm(values - value) < ERRORS[name] * torch.linalg.vector_norm(value)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(weight.dequantize(dtype), values.to(dtype))
    assert torch.equal(weight.rows(2, 5).dequantize(torch.float32), values[2:5])
    indices = torch.tensor([4, 0, 4])
    assert torch.equal(weight.look_up(indices, torch.float32), values[indices])
    joined = PackedStorage.concat([weight.rows(0, 2), weight.rows(2, ROWS)])  # type: ignore[list-item]
    assert torch.equal(joined.dequantize(torch.float32), values)
    assert weight.is_same(storage_of(PACK[name](value))) and not weight.is_same(storage_of(PACK[name](value + 0.1)))
    assert not weight.is_same(storage_of(value))
    for moved in (weight.to(CPU, copy=True), weight.to_host()):
        assert moved.is_same(weight) and moved.tensor.buffer.data_ptr() != packed.buffer.data_ptr()  # type: ignore[attr-defined]
    assert weight.run_dtype(torch.float16) == torch.float16 and not weight.computes_in(torch.uint8)
    reshaped = reshape_packed(packed, (ROWS, COLUMNS, 1, 1))
    assert torch.equal(storage_of(reshaped).dequantize(torch.float32), values[:, :, None, None])
    with pytest.raises(PackedFormatError, match="cannot have the shape"):
        reshape_packed(packed, (COLUMNS, ROWS))


@pytest.mark.parametrize("name", [name for name in PACK if name != "NF4 nested"])
def test_requantize_keeps_what_is_exact_and_the_memory_it_writes_to(name: str) -> None:
    weight, other = storage_of(PACK[name](numbers(ROWS, COLUMNS))), storage_of(PACK[name](numbers(ROWS, COLUMNS, seed=1)))
    values = weight.dequantize(torch.float32)
    assert torch.allclose(weight.requantize(values, seed=1).dequantize(torch.float32), values, atol=1e-6)
    address = weight.tensor.buffer.data_ptr()  # type: ignore[attr-defined]
    weight.overwrite(other.dequantize(torch.float32), seed=1)
    assert weight.tensor.buffer.data_ptr() == address  # type: ignore[attr-defined]
    assert torch.allclose(weight.dequantize(torch.float32), other.dequantize(torch.float32), atol=0.02)
    weight.copy_from(other)
    assert weight.is_same(other)


@pytest.mark.parametrize("name", [name for name in PACK if "fp8" in name or "nvfp4" in name])
def test_a_device_without_fp8_looks_the_numbers_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPUs have no such tensors."""
    weight = storage_of(PACK[name](numbers(ROWS, COLUMNS)))
    expected = [weight.dequantize(dtype) for dtype in (torch.float32, torch.float16)]
    monkeypatch.setattr(fp8, "_WITHOUT_FP8", {"cpu"})
    monkeypatch.setattr(torch.Tensor, "view", _view_without_fp8(torch.Tensor.view))
    assert all(torch.equal(weight.dequantize(value.dtype), value) for value in expected)


def _view_without_fp8(view: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def checked(tensor: Tensor, *shape: object) -> Tensor:
        assert "float8" not in str(shape) or tensor.numel() == 256, "only the table itself is made of fp8 numbers"
        return view(tensor, *shape)

    return checked


def test_e4m3_numbers_are_those_of_torchs_cast_on_a_cpu() -> None:
    """All of them but NaN, which files may not have."""
    every = torch.arange(256, dtype=torch.uint8)
    every = every[every & 0x7F != 0x7F]
    assert torch.equal(fp8.read_fp8(every, torch.float8_e4m3fn, torch.float32), every.view(torch.float8_e4m3fn).float())


def test_an_installed_kernel_dequantizes_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' signature: codes, absmax, block, kind, shape, dtype. Weights that it does not take stay ours."""
    calls: list[tuple[object, ...]] = []

    def kernel(codes: Tensor, absmax: Tensor, *rest: object) -> Tensor:
        calls.append((codes.shape, absmax.shape, *rest))
        return torch.zeros(ROWS, COLUMNS)

    monkeypatch.setattr(four_bit, "find_kernel", lambda: kernel)
    weight = storage_of(quantize_four_bit(numbers(ROWS, COLUMNS), "nf4"))
    assert torch.equal(weight.dequantize(torch.float16), torch.zeros(ROWS, COLUMNS))
    assert calls == [((ROWS * COLUMNS // 2,), (ROWS,), 64, "nf4", [ROWS, COLUMNS], torch.float16)]
    assert storage_of(quantize_four_bit(numbers(3, 5), "nf4")).dequantize(torch.float32).any() and len(calls) == 1


def test_double_quantization_is_read_and_never_written() -> None:
    weight = storage_of(nested_nf4(numbers(ROWS, COLUMNS)))
    assert not weight.can_requantize
    with pytest.raises(PackedFormatError, match="quantized twice"):
        weight.requantize(numbers(ROWS, COLUMNS), seed=0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PackedFormatError, match="cannot be cut out"):
        storage_of(quantize_four_bit(numbers(4, 48), "nf4")).rows(1, 2)
    with pytest.raises(PackedFormatError, match="one scale, or one per row"):
        pack_scaled(torch.zeros(4, 4, dtype=torch.int8), torch.ones(3))
    with pytest.raises(PackedFormatError, match="cannot be stacked"):
        PackedStorage.concat([storage_of(quantize_gguf(numbers(1, 32), kind)) for kind in ("Q8_0", "Q4_0")])  # type: ignore[misc]
    with pytest.raises(NotImplementedError, match=r"stored in GGUF Q8_0\. Use storage_of"):
        quantize_gguf(numbers(1, 32), "Q8_0") + 1
    with pytest.raises(PackedFormatError, match="only between equal formats"):
        quantize_gguf(numbers(1, 32), "Q8_0").copy_(numbers(1, 32))


def test_an_odd_number_of_weights_fits_four_bits() -> None:
    value = numbers(3, 5)
    found = storage_of(quantize_four_bit(value, "nf4")).dequantize(torch.float32)
    assert found.shape == (3, 5) and torch.linalg.vector_norm(found - value) < 0.2 * torch.linalg.vector_norm(value)


# modules


def layers() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(COLUMNS, COLUMNS), nn.LayerNorm(COLUMNS), nn.Linear(COLUMNS, ROWS)).requires_grad_(False)
    with torch.no_grad():
        for seed, layer in ((0, module[0]), (2, module[2])):
            layer.bias.copy_(numbers(*layer.bias.shape, seed=seed + 5))
            layer.weight = nn.Parameter(quantize_gguf(numbers(*layer.weight.shape, seed=seed), "Q8_0"), requires_grad=False)
    return module


def plain(module: nn.Sequential) -> nn.Sequential:
    made = nn.Sequential(nn.Linear(COLUMNS, COLUMNS), nn.LayerNorm(COLUMNS), nn.Linear(COLUMNS, ROWS))
    made.load_state_dict({key: storage_of(tensor.cpu()).dequantize(torch.float32) for key, tensor in module.state_dict().items()})
    return made.requires_grad_(False)


def test_a_layer_computes_with_the_dequantized_weight_and_keeps_the_packed_one() -> None:
    module = layers()
    set_types(module, torch.float32, torch.float32)
    stored, x = module[0].weight, numbers(3, COLUMNS)
    assert torch.equal(module(x), plain(module)(x)) and module[0].weight is stored
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    with computing_in(module, torch.float64):
        assert module(x.double()).dtype == torch.float64
    assert module[0].weight is stored and has_packed_weights(module) and describe_storage(module) == "GGUF Q8_0 and float32"
    assert module.to(torch.float16)[0].weight is stored and module[0].bias.dtype == torch.float16
    assert module.to(META)[0].weight.device == META and module[0].weight.buffer.device == META


@pytest.mark.parametrize("columns", [COLUMNS, 48])
def test_a_table_dequantizes_the_rows_that_are_looked_up(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = nn.Embedding(50, columns).requires_grad_(False)
    table.weight = nn.Parameter(quantize_four_bit(numbers(50, columns), "nf4"), requires_grad=False)
    set_types(nn.Sequential(table), torch.float32, torch.float32)
    stored, values = table.weight, storage_of(table.weight).dequantize(torch.float32)
    read: list[int] = []
    dequantize = FourBitFormat.dequantize
    monkeypatch.setattr(FourBitFormat, "dequantize", lambda form, *rest: read.append(form.shape[0]) or dequantize(form, *rest))
    tokens = torch.tensor([[3, 7, 3], [49, 0, 7]])
    assert torch.equal(table(tokens), values[tokens]) and table.weight is stored
    assert read == [4 if columns == COLUMNS else 50], "blocks of 64 cross rows of 48, so that all are read"


def test_bytes_count_as_packed_and_an_empty_copy_counts_the_same() -> None:
    module = layers()
    packed_bytes = (COLUMNS * COLUMNS + ROWS * COLUMNS) // 32 * 34
    assert count_module_bytes(module).total_bytes == packed_bytes + 4 * (3 * COLUMNS + ROWS)
    empty = copy_without_weights(module)
    assert count_module_bytes(empty).total_bytes == count_module_bytes(module).total_bytes
    assert empty[0].weight.device == META and isinstance(empty[0].weight, nn.Parameter)


@pytest.mark.parametrize("inference", [False, True])
def test_a_virtual_gpu_holds_packed_bytes_and_gives_the_same_bits(inference: bool) -> None:
    module = layers()
    set_types(module, torch.float32, torch.float32)
    x = numbers(3, COLUMNS)
    expected = module(x)
    with virtual_fleet(2) as fleet, torch.inference_mode(inference):
        for slot in (0, 1):
            device = fleet.device(slot)
            before = virtual_gpu.get_device(slot).live_bytes
            move_module(module, device)
            assert virtual_gpu.get_device(slot).live_bytes - before == count_module_bytes(module).total_bytes
            assert torch.equal(module(x.to(device)).cpu(), expected)
        move_module(module, CPU)
    assert torch.equal(module(x), expected)
