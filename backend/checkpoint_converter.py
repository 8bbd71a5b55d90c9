"""Converts model files: other types, parts taken out or put together, LoRA merged in. Tensors go from file to file one at a time.

    convert_checkpoint(Conversion(sources=(Path("flux.safetensors"),), target=Path("flux-Q8_0.gguf"), to="q8_0"))

A file gets its name when all of it has been written. Knows no command line.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from backend.checkpoint_file import TensorFile, open_tensor_file
from backend.checkpoint_layout import Part
from backend.checkpoint_prediction import EPSILON, PredictionSpec
from backend.families.family import Component, Family, FoundDenoiser
from backend.families.registry import all_families, identify
from backend.key_layout import UNET_PREFIX
from backend.modules.k_model import KModel
from backend.patcher.lora_files import LoraError, match_lora, read_lora_file
from backend.patcher.unet import UnetPatcher
from backend.patcher.weight_patches import Step, merge_recipe
from backend.state_dict import TensorSource, plan_denoiser
from backend.storage.choices import FORMATS, format_for
from backend.storage.four_bit import TABLES, FourBitFormat
from backend.storage.gguf import GgufFormat
from backend.storage.packed import PackedFormat
from backend.storage.scaled import ScaledFormat
from backend.tensor_writer import Written, write_gguf, write_safetensors
from backend.unfinished_files import creating

PLAIN_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
KEEP = "keep"
PARTS = ("all", "denoiser", "vae", "text")
_PARTS_IN_ONE = ("denoiser", "text")
"""What is quantized in a whole file: a VAE is small, and suffers."""
_GGUF_SUFFIX = ".gguf"
_FP8_MARK = Written("scaled_fp8", (2,), torch.float8_e4m3fn)
"""By which other programs recognize a file with scaled fp8."""
_LEAST_NUMBERS = 4096
"""Smaller matrices stay in half precision."""


class ConversionError(ValueError):
    """The conversion is not possible; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """`sources`: one file, or several whose denoiser, VAE and text encoders are put together. `to`: a key of PLAIN_TYPES, a format with a quantizer
    (`storage.choices.FORMATS`), or KEEP. `part`: one of PARTS; its prefix is taken off. `loras`: files with strengths, merged into the denoiser.
    """

    sources: tuple[Path, ...]
    target: Path
    to: str = KEEP
    part: str = "all"
    loras: tuple[tuple[Path, float], ...] = ()

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConversionError("No file was given. Name one to convert, or several to put together.")
        if self.part not in PARTS:
            raise ConversionError(f"--part {self.part!r} is unknown. Use one of {', '.join(PARTS)}.")
        if self.to not in conversion_types():
            raise ConversionError(f"--to {self.to!r} is unknown, or has no quantizer. Use one of {', '.join(conversion_types())}.")
        if self.to != KEEP and (_is_gguf(self.to) != (self.target.suffix.lower() == _GGUF_SUFFIX)):
            wanted = _GGUF_SUFFIX if _is_gguf(self.to) else ".safetensors"
            raise ConversionError(f"{self.target.name}: {self.to} is written to a {wanted} file. Name the target so.")
        if self.to == KEEP and self.target.suffix.lower() != ".safetensors":
            raise ConversionError(f"{self.target.name}: without --to, the target is a .safetensors file. Name it so.")


def conversion_types() -> tuple[str, ...]:
    """The values of `to`."""
    return (KEEP, *PLAIN_TYPES, *(name for name, make in FORMATS.items() if make((256, 256)).can_quantize))


def _is_gguf(name: str) -> bool:
    return name in FORMATS and isinstance(FORMATS[name]((256, 256)), GgufFormat)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A tensor of a source: its name in the target, and the part it belongs to ("" for none)."""

    name: str
    key: str
    file: TensorFile
    part: str


Report = Callable[[int, int], None]
"""(bytes written, bytes in all)."""


def convert_checkpoint(job: Conversion, report: Report = lambda done, total: None) -> int:
    """Write the target; returns its bytes of tensors. Raises: ConversionError, CheckpointError, LoraError, FileExistsError, OSError."""
    if job.target.exists():
        raise ConversionError(f"{job.target} exists already. Name another target, or delete it first.")
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensor_file(path)) for path in job.sources]
        entries = list(_entries(files, job))
        if not entries:
            raise ConversionError(f"{', '.join(file.path.name for file in files)}: has no {job.part} part to take out.")
        outputs = {entry.name: _Output(entry, job.to) for entry in entries}
        merger = _merge_loras(files[0], job.loras) if job.loras else None
        return _write(job, outputs, files[0], merger, report)


def _write(job: Conversion, outputs: Mapping[str, _Output], main: TensorFile, merger: _Merger | None, report: Report) -> int:
    tensors = [(written, output) for output in outputs.values() for written in output.announced()]
    owner = {written.name: output for written, output in tensors}
    announced = [written for written, _ in tensors]
    if job.to == "fp8_scaled":
        announced.append(_FP8_MARK)
    total, done = sum(written.num_bytes for written in announced), 0
    _check_room(job.target, total)

    def numbers_of(written: Written) -> Tensor:
        nonlocal done
        is_mark = written is _FP8_MARK
        numbers = torch.zeros(2, dtype=torch.float8_e4m3fn) if is_mark else owner[written.name].numbers(written.name, merger)
        done += written.num_bytes
        report(done, total)
        return numbers

    job.target.parent.mkdir(parents=True, exist_ok=True)
    with creating(job.target) as unfinished:
        if job.target.suffix.lower() == _GGUF_SUFFIX:
            write_gguf(unfinished, announced, numbers_of, _architecture(main))
        else:
            write_safetensors(unfinished, announced, numbers_of, {key: value for key, value in main.metadata.items() if key.startswith("modelspec.")})
    return total


def _check_room(target: Path, need_bytes: int) -> None:
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < need_bytes:
        raise ConversionError(f"{target.name} needs {need_bytes / 1e9:.2f} GB, but {folder} has {free_bytes / 1e9:.2f} GB free. Make room first.")


def _architecture(file: TensorFile) -> str:
    identified = identify(file)
    return identified[0].name if identified is not None else "t5encoder" if any("SelfAttention" in key for key in file.infos) else "unknown"


# parts


def _entries(files: Sequence[TensorFile], job: Conversion) -> Iterator[_Entry]:
    """The tensors to write, in the order of the sources. Raises: CheckpointError, ConversionError."""
    placed: set[str] = set()
    for file in files:
        parts = dict(_find_parts(file, files))
        for key in file.infos:
            found = _part_of(key, parts)
            name, part = (key, "") if found is None else (key.removeprefix(parts[found].prefix), found.partition(" ")[0])
            if job.part not in ("all", part):
                continue
            if len(files) > 1 and job.part == "all":
                if found is None:
                    continue
                name = _prefix_in_one(found) + name
            elif job.part == "all" and job.target.suffix.lower() != _GGUF_SUFFIX:
                name = key
            if name in placed:
                raise ConversionError(f"{file.path.name}: {key} would be in the target twice. Take the part out of one of the files first.")
            placed.add(name)
            yield _Entry(name=name, key=key, file=file, part=part)


def _find_parts(file: TensorFile, files: Sequence[TensorFile]) -> Iterator[tuple[str, Part]]:
    """("denoiser", "vae", "text clip_l" ...) with their places in the file."""
    identified = identify(file)
    if identified is not None:
        yield "denoiser", identified[1].part
    family = next((found[0] for one in files if (found := identify(one)) is not None), None)
    for component in (family.vae, *family.text_encoders) if family is not None else _components_of_any():
        for part in component.find(file)[:1]:
            yield ("vae" if component.name == "vae" else f"text {component.name}"), part


def _components_of_any() -> Iterator[Component]:
    for family in all_families():
        yield from (family.vae, *family.text_encoders)


def _part_of(key: str, parts: Mapping[str, Part]) -> str | None:
    """The part with the longest prefix of the key."""
    fitting = [name for name, part in parts.items() if key.startswith(part.prefix)]
    return max(fitting, key=lambda name: len(parts[name].prefix), default=None)


def _prefix_in_one(part: str) -> str:
    """Where a whole file has the part."""
    kind, _, name = part.partition(" ")
    return {"denoiser": UNET_PREFIX, "vae": "vae."}.get(kind, f"text_encoders.{name}.transformer.")


# one tensor


class _Output:
    """How one tensor of a source is written: as one tensor, or as numbers with their scales."""

    def __init__(self, entry: _Entry, to: str) -> None:
        self._entry = entry
        self._info = entry.file.infos[entry.key]
        self._format = self._packed_format(to) if to in FORMATS else None
        self._dtype = self._plain_dtype(to)
        self._made: dict[str, Tensor] = {}
        if to == KEEP and self._info.packed is not None:
            raise ConversionError(
                f"{entry.file.path.name}: {entry.key} is stored in {self._info.packed.title}, which cannot be copied as it is. Choose one with --to."
            )

    def _packed_format(self, to: str) -> PackedFormat | None:
        shape = self._info.shape
        is_weight = self._entry.key.endswith(".weight") and math.prod(shape) >= _LEAST_NUMBERS and "embed" not in self._entry.key
        is_quantized = self._entry.part in _PARTS_IN_ONE or not self._entry.part
        return format_for(to, shape) if is_weight and is_quantized and "shared" not in self._entry.key else None

    def _plain_dtype(self, to: str) -> torch.dtype:
        """The type of a tensor that stays plain: whole numbers as they are, small tensors never in eight bits, those of GGUF files in fp32."""
        stored, is_small, is_packed = self._info.dtype, len(self._info.shape) < 2, self._info.packed is not None
        if not is_packed and (to == KEEP or not stored.is_floating_point):
            return stored
        if to in PLAIN_TYPES:
            return torch.float16 if to == "fp8" and (is_small or self._entry.part == "vae") else PLAIN_TYPES[to]
        if _is_gguf(to) and is_small:
            return torch.float32
        return stored if not is_packed and stored.itemsize == 2 else torch.float16

    def announced(self) -> list[Written]:
        """The tensors, from shapes alone."""
        name, shape = self._entry.name, tuple(self._info.shape)
        if isinstance(self._format, GgufFormat):
            return [Written(name, shape, torch.uint8, self._format.block_type.number, self._format.num_bytes)]
        if self._format is None:
            return [Written(name, shape, self._dtype)]
        parts = _parts_of(name, self._format, torch.empty(self._format.num_bytes, dtype=torch.uint8, device="meta"))
        return [Written(key, tuple(part.shape), part.dtype) for key, part in parts.items()]

    def numbers(self, name: str, merger: _Merger | None) -> Tensor:
        """One of the announced tensors. They are asked for in their order, so that the weight is read once."""
        if name not in self._made:
            value = self._entry.file.read(self._entry.key, dtype=torch.float32 if self._format is not None or merger is not None else self._dtype)
            if merger is not None and value.is_floating_point():
                value = merger.merge(self._entry.file, self._entry.key, value)
            self._made = self._stored(value)
        return self._made.pop(name)

    def _stored(self, value: Tensor) -> dict[str, Tensor]:
        if self._format is None:
            return {self._entry.name: value.to(self._dtype)}
        buffer = self._format.quantize(value, seed=0)
        return {self._entry.name: buffer} if isinstance(self._format, GgufFormat) else _parts_of(self._entry.name, self._format, buffer)


def _parts_of(name: str, form: PackedFormat, buffer: Tensor) -> dict[str, Tensor]:
    """The tensors that a safetensors file has for a packed weight, as `quantized_file` reads them."""
    layer = name.removesuffix(".weight")
    if isinstance(form, ScaledFormat):
        scales, numbers = form.parts(buffer)
        scale_name = "scale_weight" if form.num_scales == 1 else "weight_scale"
        return {name: numbers.reshape(form.shape), f"{layer}.{scale_name}": scales.reshape(()) if form.num_scales == 1 else scales}
    assert isinstance(form, FourBitFormat)
    absmax, codes = form.parts(buffer)
    state = {"quant_type": form.kind, "blocksize": form.block, "dtype": "bfloat16", "shape": list(form.shape)}
    return {
        name: codes.reshape(-1, 1),
        f"{name}.absmax": absmax,
        f"{name}.quant_map": torch.tensor(TABLES[form.kind], device=buffer.device),
        f"{name}.quant_state.bitsandbytes__{form.kind}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device=buffer.device),
    }


# LoRA


@dataclass(frozen=True, kw_only=True, slots=True)
class _Merger:
    """The changes of a file's weights: for each stored name, which parameter has which of its rows, and that parameter's steps."""

    file: TensorFile
    by_key: Mapping[str, Sequence[tuple[TensorSource, torch.Size, tuple[Step, ...]]]] = field(default_factory=dict)

    def merge(self, file: TensorFile, key: str, value: Tensor) -> Tensor:
        """The weight (fp32) with all changes."""
        if file is not self.file:
            return value
        for source, shape, steps in self.by_key.get(key, ()):
            if source.rows is None:
                value = merge_recipe(value.reshape(shape), steps).reshape(value.shape)
                continue
            first, end, _, is_swapped = source.rows
            part = value[first:end]
            part = torch.cat([*reversed(part.chunk(2))]) if is_swapped else part.clone()
            merged = merge_recipe(part.reshape(shape), steps).reshape(part.shape)
            value[first:end] = torch.cat([*reversed(merged.chunk(2))]) if is_swapped else merged
        return value


def _merge_loras(file: TensorFile, loras: Iterable[tuple[Path, float]]) -> _Merger:
    """Raises: CheckpointError, LoraError, ConversionError."""
    identified = identify(file)
    if identified is None:
        raise ConversionError(f"{file.path.name}: has no denoiser that a LoRA could be merged into. Name the checkpoint first.")
    family, found = identified
    unet = _empty_patcher(family, found)
    plan = plan_denoiser(unet.model.diffusion_model, file, found.part, unet.model.key_map.places)
    for path, strength in loras:
        patches = match_lora(read_lora_file(path), unet, None, model_family=family.title)
        unet.add_patches(filename=str(path), patches=dict(patches.unet), strength_patch=strength)
    by_key: dict[str, list[tuple[TensorSource, torch.Size, tuple[Step, ...]]]] = {}
    shapes = {name: parameter.shape for name, parameter in unet.model.named_parameters()}
    steps: dict[str, list[Step]] = {}
    for changes in unet.lora_patches.values():
        for name, more in changes.items():
            steps.setdefault(name, []).extend(more)
    for name, recipe in steps.items():
        source = plan.sources.get(name.removeprefix("diffusion_model."))
        if source is not None:
            by_key.setdefault(source.key, []).append((source, shapes[name], tuple(recipe)))
    if not by_key:
        raise LoraError(f"None of the LoRA changes a weight of {file.path.name}. Choose one made for {family.title}.")
    return _Merger(file=file, by_key=by_key)


def _empty_patcher(family: Family, found: FoundDenoiser) -> UnetPatcher:
    """A patcher of the network without weights, which knows its names and shapes."""
    network = family.build_denoiser(found)
    prediction = PredictionSpec(kind=EPSILON, source="not used")
    model = KModel(
        network, family.make_predictor(prediction), storage_dtype=torch.float32, build_program=family.build_program, key_map=family.key_map(network)
    )
    meta = torch.device("meta")
    return UnetPatcher(model, meta, meta)
