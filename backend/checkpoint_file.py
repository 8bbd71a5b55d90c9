"""Opens files of tensors lazily: names, shapes and dtypes at once, each tensor when it is requested.

Does not know what the tensors are for. Each tensor of a `.safetensors` file is read straight to its target dtype and device, so that a load never
has a second copy of the file in memory. A file's first bytes, not its name, determine its kind.
Weights in low bits are packed tensors: GGUF's as they are, others joined from the several tensors they are stored in (`quantized_file`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from backend import checkpoint_pickle
from backend.file_bytes import FileBytes
from backend.foreign_json import MAX_BYTES, ForeignJsonError, open_file, parse_json
from backend.gguf_file import MAGIC as GGUF_MAGIC
from backend.gguf_file import GgufFile
from backend.quantized_file import as_whole_weights
from backend.tensor_file import REPEAT_DOWNLOAD, TensorInfo, reading, say_mb
from backend.tensor_file import CheckpointError as CheckpointError
from backend.tensor_file import TensorFile as TensorFile

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_DIMS, _MAX_SIDE = 16, 2**48
_FOREIGN_MAGIC = {
    b"version https://git-lfs": "a Git LFS pointer, not the model itself. Fetch the real file (git lfs pull, or download it from the model's page)",
    b"7z\xbc\xaf": "a 7z archive. Unpack it and put the model file from it into the folder",
    b"Rar!": "a RAR archive. Unpack it and put the model file from it into the folder",
    b"\x1f\x8b": "a gzip archive. Unpack it and put the model file from it into the folder",
    b"\x89PNG": "a PNG picture, not a model. Open it in the PNG Info tab",
    b"\xff\xd8\xff": "a JPEG picture, not a model",
    b"\x89HDF": "a Keras/HDF5 file. Use the .safetensors version of this model",
    b"%PDF": "a PDF document, not a model",
}


@contextlib.contextmanager
def open_tensor_file(path: Path) -> Iterator[TensorFile]:
    """Open a model file of any supported kind.

    Raises: CheckpointError if it is missing, unreadable, truncated, empty, not a file of tensors, or could run code.
    """
    file = _open(path)
    try:
        yield file
    finally:
        file.close()


def read_metadata(path: Path) -> dict[str, str]:
    """The free-text metadata of a `.safetensors` file; empty for other kinds. Reads only the header.

    Raises: CheckpointError as `open_tensor_file` does for a damaged header.
    """
    with reading(path), open_file(path) as stream:
        head = stream.read(9)
        if not _looks_like_safetensors(head):
            return {}
        header, _ = _read_header(path, stream, head, path.stat().st_size)
    return _metadata_of(header)


def _open(path: Path) -> TensorFile:
    with reading(path):
        if path.is_dir():
            raise CheckpointError(
                f"{path.name}: this is a folder. Choose one model file (.safetensors or .ckpt); "
                "a folder in diffusers' layout can be saved as a single file first."
            )
        with open_file(path) as stream:
            head = stream.read(64)
    if head.startswith(GGUF_MAGIC):
        return GgufFile(path)
    if _looks_like_safetensors(head):
        return as_whole_weights(SafetensorsFile(path))
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return as_whole_weights(PickleFile(path))
    raise CheckpointError(f"{path.name}: {_describe_foreign(head)}.")


def _looks_like_safetensors(head: bytes) -> bool:
    return len(head) >= 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_BYTES


def _describe_foreign(head: bytes) -> str:
    if not head:
        return f"is empty (0 bytes); the download did not finish. {REPEAT_DOWNLOAD.rstrip('.')}"
    for magic, what in _FOREIGN_MAGIC.items():
        if head.startswith(magic):
            return f"is {what}"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] in (b"<", b"{") or all(32 <= byte < 127 or byte in b"\t\r\n" for byte in text):
        return "is a text or web page, not a model; a download that failed or required a login leaves such a file. Download it again in the browser"
    return f"is neither a .safetensors file nor a PyTorch .ckpt/.pt file; it may be damaged. {REPEAT_DOWNLOAD.rstrip('.')}"


# --- safetensors --------------------------------------------------------------------------------------------------------------------


class SafetensorsFile:
    """A `.safetensors` file: tensors are read only when requested, and nothing stays in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path), open_file(path) as stream:
            file_bytes = path.stat().st_size
            header, self._data_start = _read_header(path, stream, stream.read(9), file_bytes)
            self._bytes = FileBytes(stream)
        self.metadata: Mapping[str, str] = _metadata_of(header)
        self.infos: Mapping[str, TensorInfo] = {key: _info_of(path, key, entry) for key, entry in header.items() if key != "__metadata__"}
        self._starts = {key: header[key]["data_offsets"][0] for key in self.infos}
        self._check_extent(file_bytes, header)

    def _check_extent(self, file_bytes: int, header: Mapping[str, Any]) -> None:
        for key, info in self.infos.items():
            start, end = header[key]["data_offsets"]
            if end - start != info.stored_bytes:
                raise CheckpointError(
                    f"{self.path.name}: the size of {key[:200]} in the file does not match its shape; the file is damaged. {REPEAT_DOWNLOAD}"
                )
        promised = self._data_start + max((header[key]["data_offsets"][1] for key in self.infos), default=0)
        if promised > file_bytes:
            raise CheckpointError(
                f"{self.path.name}: is cut short: it has {say_mb(file_bytes)}, but its header says {say_mb(promised)}. {REPEAT_DOWNLOAD}"
            )

    def read(self, key: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", rows: tuple[int, int] | None = None) -> Tensor:
        info, start, shape = self.infos[key], self._data_start + self._starts[key], self.infos[key].shape
        if rows is not None:
            start += rows[0] * (info.stored_bytes // shape[0])
            shape = (rows[1] - rows[0], *shape[1:])
        with reading(self.path):
            return self._bytes.read(start, shape, info.dtype, dtype=dtype, device=device)

    def read_stored(self, key: str, *, device: torch.device | str = "cpu", rows: tuple[int, int] | None = None) -> Tensor:
        return self.read(key, device=device, rows=rows)

    def close(self) -> None:
        self._bytes.close()


def _read_header(path: Path, stream: BinaryIO, head: bytes, file_bytes: int) -> tuple[dict[str, Any], int]:
    header_bytes = int.from_bytes(head[:8], "little")
    if header_bytes + 8 > file_bytes:
        raise CheckpointError(f"{path.name}: is cut short inside its header (it has {say_mb(file_bytes)}). {REPEAT_DOWNLOAD}")
    try:
        header = parse_json(head[8:] + stream.read(header_bytes - 1))
    except ForeignJsonError as error:
        raise CheckpointError(f"{path.name}: its header cannot be read ({error}); the file is damaged. {REPEAT_DOWNLOAD}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: its header is not a table of tensors; the file is damaged. {REPEAT_DOWNLOAD}")
    return header, 8 + header_bytes


def _metadata_of(header: Mapping[str, Any]) -> dict[str, str]:
    metadata = header.get("__metadata__") or {}
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}


def _info_of(path: Path, key: str, entry: Any) -> TensorInfo:
    try:
        dtype_name, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path.name}: the header's entry for {key[:200]} is damaged. {REPEAT_DOWNLOAD}") from error
    numbers = (*shape, start, end)
    if (
        not isinstance(dtype_name, str)
        or len(shape) > _MAX_DIMS
        or any(type(number) is not int or not 0 <= number <= _MAX_SIDE for number in numbers)
    ):
        raise CheckpointError(f"{path.name}: the header's entry for {key[:200]} is damaged. {REPEAT_DOWNLOAD}")
    if dtype_name not in _DTYPES:
        raise CheckpointError(
            f"{path.name}: {key[:200]} is stored as {dtype_name[:20]}, which is not supported. Use an fp32, fp16, bf16 or fp8 version of this model."
        )
    return TensorInfo(shape, _DTYPES[dtype_name])


# --- pickles ------------------------------------------------------------------------------------------------------------------------


class PickleFile:
    """A `.ckpt`/`.pt` file read with PyTorch's restricted unpickler. Tensors of a zip archive stay on disk until requested."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self._tensors = _load_pickle(path)
        self.infos: Mapping[str, TensorInfo] = {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in self._tensors.items()}

    def read(self, key: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", rows: tuple[int, int] | None = None) -> Tensor:
        stored = self._tensors[key].detach()
        return (stored if rows is None else stored[rows[0] : rows[1]]).to(device=device, dtype=dtype or stored.dtype, copy=True)

    def read_stored(self, key: str, *, device: torch.device | str = "cpu", rows: tuple[int, int] | None = None) -> Tensor:
        return self.read(key, device=device, rows=rows)

    def close(self) -> None:
        self._tensors = {}


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        return checkpoint_pickle.load_tensors(path)
    except checkpoint_pickle.UnsafePickleError as error:
        raise CheckpointError(f"{path.name}: {error}.") from error
    except checkpoint_pickle.DamagedPickleError as error:
        raise CheckpointError(
            f"{path.name}: cannot be read as a PyTorch file; it is damaged or cut short (it has {say_mb(path.stat().st_size)}; {error}). "
            f"{REPEAT_DOWNLOAD}"
        ) from error
