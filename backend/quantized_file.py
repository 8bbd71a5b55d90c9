"""Weights that a file stores as several tensors (numbers, scales, descriptions), seen as one packed tensor each.

    double_blocks.0.img_mod.lin.weight         fp8, or int8     what is seen: the same name, with a packed format
    double_blocks.0.img_mod.lin.scale_weight   fp32             (older spelling; with a tensor `scaled_fp8` that marks the file)
    double_blocks.0.img_mod.lin.weight_scale   fp32             (present spelling; with `comfy_quant`, a JSON text, or an entry of the metadata)
    double_blocks.0.img_mod.lin.weight_scale_2 fp32             (nvfp4: the scale of the scales of blocks, which are in weight_scale; mxfp8 has none)
    double_blocks.0.img_mod.lin.SCB            fp32             (bitsandbytes, int8)
    double_blocks.0.img_mod.lin.weight.quant_state.bitsandbytes__nf4, .absmax, .quant_map, .nested_absmax, .nested_quant_map

Which tensors belong together follows from their names; their shapes and the JSON are checked before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Protocol

import torch
from torch import Tensor

from backend.foreign_json import ForeignJsonError, parse_json
from backend.key_layout import UNET_PREFIX
from backend.storage.block_scaled import KINDS as BLOCK_SCALED_KINDS
from backend.storage.block_scaled import BlockScaledFormat, join_block_scaled, ordered_scale_shape, unorder_scales
from backend.storage.choices import ROTATED_GROUP
from backend.storage.four_bit import TABLES, FourBitFormat, join_four_bit
from backend.storage.kinds import storage_of
from backend.storage.packed import PackedFormat, PackedFormatError, PackedTensor, can_cut
from backend.storage.rotation import is_group
from backend.storage.scaled import SCALED_DTYPES, ScaledFormat, join_scaled
from backend.tensor_file import CheckpointError, TensorFile, TensorInfo

_SCALE_ENDS = (".scale_weight", ".weight_scale")
_INT8_END, _INT8_RANGE = ".SCB", 127.0
_QUANT_ENDS = (".comfy_quant",)
_STATE_MARK = ".quant_state.bitsandbytes__"
_STATE_PARTS = (".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map")
_HELPERS = (*_SCALE_ENDS, *_QUANT_ENDS, ".scale_input", ".input_scale", ".weight_scale_2", _INT8_END, ".weight_format")
_MARKER = "scaled_fp8"
_METADATA_KEY = "_quantization_metadata"
_COMFY_DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8_tensorwise": torch.int8}
_MUST_HAVE_SCALES = ("int8_tensorwise", *BLOCK_SCALED_KINDS)
_SVDQUANT_ENDS = (".qweight", ".wscales", ".wtscale", ".smooth_factor")
_MAX_JSON_BYTES = 65536
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Lengths of blocks that bitsandbytes writes."""
_OTHER_VERSION = "Use an fp8, GGUF, bf16 or fp16 version of this model."


def as_whole_weights(file: TensorFile) -> TensorFile:
    """The file with each quantized weight as one packed tensor; the file itself if it has none. On an error the file is closed.

    Raises: CheckpointError for parts that do not fit together, and for formats that are not read.
    """
    try:
        weights = _find_weights(file)
    except BaseException:
        file.close()
        raise
    return QuantizedFile(file, weights) if weights else file


class _Weight(Protocol):
    """A quantized weight."""

    @property
    def key(self) -> str: ...

    @property
    def format(self) -> PackedFormat: ...

    def read(self, file: TensorFile, rows: tuple[int, int] | None) -> PackedTensor:
        """The weight, or rows of it, on the host. Raises: CheckpointError for scales that are no numbers; PackedFormatError."""
        ...


class QuantizedFile:
    """An open file whose quantized weights are packed tensors."""

    def __init__(self, file: TensorFile, weights: Mapping[str, _Weight]) -> None:
        self.path, self.metadata = file.path, file.metadata
        self._file, self._weights = file, weights
        plain = {key: info for key, info in file.infos.items() if not _is_helper(key)}
        packed = {key: TensorInfo(weight.format.shape, torch.uint8, weight.format) for key, weight in weights.items()}
        self.infos: Mapping[str, TensorInfo] = {**plain, **packed}

    def read(self, key: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", rows: tuple[int, int] | None = None) -> Tensor:
        if key not in self._weights:
            return self._file.read(key, dtype=dtype, device=device, rows=rows)
        cut = None if rows is None or can_cut(self._weights[key].format, *rows) else rows
        value = storage_of(self._read_packed(key, device, rows if cut is None else None)).dequantize(dtype or torch.float32)
        return value if cut is None else value[cut[0] : cut[1]].clone()

    def read_stored(self, key: str, *, device: torch.device | str = "cpu", rows: tuple[int, int] | None = None) -> Tensor:
        return self._read_packed(key, device, rows) if key in self._weights else self._file.read_stored(key, device=device, rows=rows)

    def _read_packed(self, key: str, device: torch.device | str, rows: tuple[int, int] | None) -> PackedTensor:
        packed = self._weights[key].read(self._file, rows)
        return PackedTensor(packed.buffer.to(device), packed.format)

    def close(self) -> None:
        self._file.close()


def _is_helper(key: str) -> bool:
    return key.endswith(_HELPERS) or key.rpartition(".")[2] == _MARKER or any(part in key for part in (_STATE_MARK, *_STATE_PARTS))


def _find_weights(file: TensorFile) -> dict[str, _Weight]:
    _refuse_svdquant(file)
    described = _read_descriptions(file)
    weights: dict[str, _Weight] = {}
    for key in file.infos:
        if key.endswith(_SCALE_ENDS):
            made = _block_scaled_weight if _kind_of(described, key) in BLOCK_SCALED_KINDS else _scaled_weight
            weight = made(file, key, described)
            weights[weight.key] = weight
        elif key.endswith(_INT8_END):
            weight = _scaled_weight(file, key, {}, divisor=_INT8_RANGE)
            weights[weight.key] = weight
        elif _STATE_MARK in key:
            weights[key[: key.index(_STATE_MARK)]] = _four_bit_weight(file, key)
    _refuse_missing_scales(file, described, weights)
    return weights


def _kind_of(described: Mapping[str, Mapping[str, Any]], scale: str) -> str:
    return str(described.get(scale.rpartition(".")[0], {}).get("format"))


def _refuse_missing_scales(file: TensorFile, described: Mapping[str, Mapping[str, Any]], weights: Mapping[str, _Weight]) -> None:
    for layer, description in described.items():
        if description.get("format") in _MUST_HAVE_SCALES and f"{layer}.weight" in file.infos and f"{layer}.weight" not in weights:
            raise CheckpointError(
                f"{file.path.name}: {layer[:200]} is stored as {description['format']} but has no {layer[:200]}.weight_scale. "
                "The file is incomplete: download it again."
            )


def _refuse_svdquant(file: TensorFile) -> None:
    found = next((key for key in file.infos if key.endswith(_SVDQUANT_ENDS)), None)
    if found is not None:
        raise CheckpointError(
            f"{file.path.name}: is quantized for nunchaku (SVDQuant; it has {found[:200]}), whose layers run only in nunchaku's own kernels. "
            f"{_OTHER_VERSION}"
        )


# scaled fp8 and int8


def _read_descriptions(file: TensorFile) -> dict[str, Mapping[str, Any]]:
    """Layer name -> what the file says about its format. Raises: CheckpointError for formats that are not read here."""
    described = dict(_layers_in_metadata(file))
    for key in file.infos:
        if key.endswith(_QUANT_ENDS):
            described[key.rpartition(".")[0]] = _read_json(file, key)
    for layer, description in described.items():
        _refuse_unread(file, layer, description)
    return described


def _layers_in_metadata(file: TensorFile) -> Mapping[str, Mapping[str, Any]]:
    text = file.metadata.get(_METADATA_KEY)
    if text is None:
        return {}
    try:
        found = parse_json(text)
    except ForeignJsonError as error:
        raise CheckpointError(f"{file.path.name}: {_METADATA_KEY} in its metadata cannot be read ({error}). {_OTHER_VERSION}") from error
    layers = found.get("layers") if isinstance(found, dict) else None
    return {_full_name(file, str(name)): one for name, one in layers.items() if isinstance(one, dict)} if isinstance(layers, dict) else {}


def _full_name(file: TensorFile, layer: str) -> str:
    """The layer's name in the file: metadata may leave the denoiser's prefix out."""
    return layer if f"{layer}.weight" in file.infos or f"{UNET_PREFIX}{layer}.weight" not in file.infos else UNET_PREFIX + layer


def _read_json(file: TensorFile, key: str) -> Mapping[str, Any]:
    """A JSON object stored as bytes. Raises: CheckpointError."""
    info = file.infos[key]
    if info.dtype != torch.uint8 or prod(info.shape) > _MAX_JSON_BYTES:
        raise CheckpointError(f"{file.path.name}: {key[:200]} is no description of a format; the file is damaged. {_OTHER_VERSION}")
    try:
        found = parse_json(bytes(file.read(key).flatten().tolist()))
    except ForeignJsonError as error:
        raise CheckpointError(f"{file.path.name}: {key[:200]} cannot be read ({error}); the file is damaged. {_OTHER_VERSION}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file.path.name}: {key[:200]} is no description of a format; the file is damaged. {_OTHER_VERSION}")
    return found


def _refuse_unread(file: TensorFile, layer: str, description: Mapping[str, Any]) -> None:
    name = str(description.get("format"))[:40]
    if name in BLOCK_SCALED_KINDS or (name in _COMFY_DTYPES and (name == "int8_tensorwise" or not description.get("convrot"))):
        return
    rotated = " with rotation (convrot)" if description.get("convrot") else ""
    known = ", ".join((*_COMFY_DTYPES, *BLOCK_SCALED_KINDS))
    raise CheckpointError(
        f"{file.path.name}: {layer[:200]} is stored as {name}{rotated}, which cannot be read; of the formats that comfy_quant names, {known} can. "
        f"{_OTHER_VERSION}"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scaled:
    """fp8 or int8 numbers with fp32 scales."""

    key: str
    scale: str
    format: ScaledFormat
    divisor: float

    def read(self, file: TensorFile, rows: tuple[int, int] | None) -> PackedTensor:
        scales = file.read(self.scale, dtype=torch.float32).reshape(-1) / self.divisor
        if not bool(torch.isfinite(scales).all()):
            raise CheckpointError(f"{file.path.name}: {self.scale[:200]} is not a number; the file is damaged. Download it again.")
        form = self.format if rows is None else self.format.cut(*rows)
        if rows is not None and self.format.num_scales > 1:
            scales = scales[rows[0] : rows[1]]
        numbers = file.read(self.key, rows=rows)
        if _has_e4m3_nan(numbers):
            raise CheckpointError(f"{file.path.name}: {self.key[:200]} has values that are not numbers; the file is damaged. Download it again.")
        return PackedTensor(join_scaled(scales, numbers), form)


def _has_e4m3_nan(numbers: Tensor) -> bool:
    return numbers.dtype == torch.float8_e4m3fn and bool((numbers.view(torch.uint8) & 0x7F == 0x7F).any())


def _scaled_weight(file: TensorFile, scale: str, described: Mapping[str, Mapping[str, Any]], divisor: float = 1.0) -> _Scaled:
    layer = scale.rpartition(".")[0]
    key = f"{layer}.weight"
    if key not in file.infos:
        raise CheckpointError(f"{file.path.name}: has {scale[:200]} but no {key[:200]}. The file is incomplete: download it again.")
    info, scales = file.infos[key], file.infos[scale]
    said = _COMFY_DTYPES.get(str(described[layer].get("format"))) if layer in described else info.dtype
    if info.dtype not in SCALED_DTYPES or said != info.dtype:
        raise CheckpointError(
            f"{file.path.name}: {key[:200]} has a scale ({scale[:200]}) but is stored as {str(info.dtype).removeprefix('torch.')}"
            f"{'' if said == info.dtype else f', not {said}'}. {_OTHER_VERSION}"
        )
    num_rows, num_scales = info.shape[0] if info.shape else 1, prod(scales.shape)
    if num_scales not in (1, num_rows) or not scales.dtype.is_floating_point:
        raise CheckpointError(
            f"{file.path.name}: {scale[:200]} has the shape {scales.shape}, but {key[:200]} of shape {info.shape} needs one scale, or one per row. "
            f"{_OTHER_VERSION}"
        )
    group = _rotated_group(file, layer, described.get(layer, {}))
    try:
        form = ScaledFormat(info.shape, info.dtype, num_scales, group)
    except PackedFormatError as error:
        raise CheckpointError(f"{file.path.name}: {key[:200]}: {error} {_OTHER_VERSION}") from error
    return _Scaled(key=key, scale=scale, format=form, divisor=divisor)


def _rotated_group(file: TensorFile, layer: str, description: Mapping[str, Any]) -> int:
    """How many numbers of a row the file rotates together; 0 if it does not."""
    if not description.get("convrot"):
        return 0
    group = description.get("convrot_groupsize", ROTATED_GROUP)
    if type(group) is not int or not is_group(group):
        raise CheckpointError(
            f"{file.path.name}: {layer[:200]} says that groups of {str(group)[:20]} numbers are rotated; it is a power of 4 up to 4096. "
            f"The file is damaged. {_OTHER_VERSION}"
        )
    return group


# mxfp8 and nvfp4


@dataclass(frozen=True, kw_only=True, slots=True)
class _BlockScaled:
    """Small numbers with a scale per block."""

    key: str
    format: BlockScaledFormat

    def read(self, file: TensorFile, rows: tuple[int, int] | None) -> PackedTensor:
        ordered = file.read(f"{self.key}_scale").view(torch.uint8)
        blocks = unorder_scales(ordered, self.format.shape[0], self.format.blocks_per_row)
        scales = file.read(f"{self.key}_scale_2", dtype=torch.float32).reshape(-1, 1) if self.format.num_scales else torch.empty(0, 1)
        not_a_number = blocks == 0xFF if self.format.kind == "mxfp8" else blocks & 0x7F == 0x7F
        if bool(not_a_number.any()) or not bool(torch.isfinite(scales).all()):
            raise CheckpointError(f"{file.path.name}: the scales of {self.key[:200]} are not numbers; the file is damaged. Download it again.")
        form = self.format if rows is None else self.format.cut(*rows)
        numbers = file.read(self.key, rows=rows)
        if _has_e4m3_nan(numbers):
            raise CheckpointError(f"{file.path.name}: {self.key[:200]} has values that are not numbers; the file is damaged. Download it again.")
        return PackedTensor(join_block_scaled(scales, blocks if rows is None else blocks[rows[0] : rows[1]], numbers), form)


def _block_scaled_weight(file: TensorFile, scale: str, described: Mapping[str, Mapping[str, Any]]) -> _BlockScaled:
    layer, kind = scale.rpartition(".")[0], _kind_of(described, scale)
    key, facts = f"{layer}.weight", BLOCK_SCALED_KINDS[kind]
    info = file.infos.get(key)
    wanted = torch.float8_e4m3fn if facts.per_byte == 1 else torch.uint8
    if info is None or info.dtype != wanted or len(info.shape) != 2 or not all(info.shape) or info.shape[1] * facts.per_byte % facts.block:
        raise _misfit(file, key, kind, f"a matrix of {str(wanted).removeprefix('torch.')} whose rows are divided into blocks of {facts.block}")
    num_rows, num_blocks = info.shape[0], info.shape[1] * facts.per_byte // facts.block
    scale_info, ordered = file.infos[scale], ordered_scale_shape(num_rows, num_blocks)
    if scale_info.dtype.itemsize != 1 or prod(scale_info.shape) != prod(ordered) or not scale.endswith("weight_scale"):
        raise _misfit(file, f"{key}_scale", kind, f"{ordered[0]}x{ordered[1]} scales of one byte")
    second = file.infos.get(f"{key}_scale_2")
    if kind == "nvfp4" and (second is None or prod(second.shape) != 1 or not second.dtype.is_floating_point):
        raise _misfit(file, f"{key}_scale_2", kind, "one number")
    shape = (num_rows, info.shape[1] * facts.per_byte)
    return _BlockScaled(key=key, format=BlockScaledFormat(shape, kind, 1 if kind == "nvfp4" else 0))


def _misfit(file: TensorFile, key: str, kind: str, wanted: str) -> CheckpointError:
    info = file.infos.get(key)
    found = "is missing" if info is None else f"has the shape {info.shape} and the type {str(info.dtype).removeprefix('torch.')}"
    return CheckpointError(f"{file.path.name}: {key[:200]} {found}; {kind} needs {wanted} there. The file is damaged; use another one.")


# bitsandbytes' four bits


@dataclass(frozen=True, kw_only=True, slots=True)
class _FourBit:
    """NF4 or FP4. `offset`: added to the absmax of double quantization."""

    key: str
    format: FourBitFormat
    offset: float

    def read(self, file: TensorFile, rows: tuple[int, int] | None) -> PackedTensor:
        codes = file.read(self.key).flatten().view(torch.uint8)
        absmax = file.read(f"{self.key}.absmax").flatten()
        nested: tuple[Tensor, ...] = ()
        if self.format.nested_block:
            table, scales = (file.read(f"{self.key}.nested_{name}", dtype=torch.float32).flatten() for name in ("quant_map", "absmax"))
            nested = (table, scales, torch.tensor([self.offset]))
        for numbers in nested or (absmax,):
            if not bool(torch.isfinite(numbers).all()):
                raise CheckpointError(f"{file.path.name}: the scales of {self.key[:200]} are not numbers; the file is damaged. Download it again.")
        self._check_table(file)
        buffer = join_four_bit(absmax, codes, nested)
        return PackedTensor(buffer, self.format) if rows is None else PackedTensor(self.format.rows(buffer, *rows), self.format.cut(*rows))

    def _check_table(self, file: TensorFile) -> None:
        name = f"{self.key}.quant_map"
        if name in file.infos:
            table = file.read(name, dtype=torch.float32).flatten()
            if table.numel() != 16 or not torch.allclose(table, torch.tensor(TABLES[self.format.kind]), atol=1e-4):
                raise CheckpointError(f"{file.path.name}: {name[:200]} is not the table of {self.format.title}. {_OTHER_VERSION}")


def _four_bit_weight(file: TensorFile, state_key: str) -> _FourBit:
    key, _, kind = state_key.partition(_STATE_MARK)
    state = _read_json(file, state_key)
    problem = _explain_state(file, key, kind, state)
    if problem is not None:
        raise CheckpointError(f"{file.path.name}: {key[:200]}, stored by bitsandbytes: {problem}. The file is damaged; use another one.")
    nested_block = int(state.get("nested_blocksize") or 0)
    form = FourBitFormat(tuple(state["shape"]), kind, state["blocksize"], nested_block)
    return _FourBit(key=key, format=form, offset=float(state.get("nested_offset") or 0.0))


def _explain_state(file: TensorFile, key: str, kind: str, state: Mapping[str, Any]) -> str | None:
    """What is wrong with a weight's description and tensors; None if they fit together."""
    if kind not in TABLES:
        return f"its kind {kind[:20]!r} is unknown"
    shape, block, nested_block = state.get("shape"), state.get("blocksize"), state.get("nested_blocksize")
    if not isinstance(shape, list) or not 0 < len(shape) <= 4 or not all(type(side) is int and side > 0 for side in shape):
        return f"its shape is {str(shape)[:80]}"
    if (
        type(block) is not int
        or block not in _BLOCKS
        or (nested_block is not None and (type(nested_block) is not int or nested_block not in _BLOCKS))
    ):
        return f"its block sizes are {str(block)[:20]} and {str(nested_block)[:20]}"
    if nested_block is not None and not _is_finite_number(state.get("nested_offset")):
        return f"its offset is {str(state.get('nested_offset'))[:20]}"
    count = prod(shape)
    num_blocks = ceil(count / block)
    wanted = {key: (ceil(count / 2), 1), f"{key}.absmax": (num_blocks, 4 if nested_block is None else 1)}
    if nested_block is not None:
        wanted |= {f"{key}.nested_absmax": (ceil(num_blocks / nested_block), 4), f"{key}.nested_quant_map": (256, 4)}
    for name, (length, num_bytes) in wanted.items():
        info = file.infos.get(name)
        if info is None or prod(info.shape) != length or info.dtype.itemsize != num_bytes:
            return (
                f"{name[:200]} is {'missing' if info is None else f'{info.shape} of {info.dtype}'}, {length} numbers of {num_bytes} bytes are needed"
            )
    return None


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
