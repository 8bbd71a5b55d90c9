"""Converts model files: other types, parts taken out or put together, LoRA merged in. Tensors go from file to file one at a time.

    convert_checkpoint(Conversion(sources=(Path("flux.safetensors"),), target=Path("flux-Q8_0.gguf"), to="q8_0"))

A file gets its name when all of it has been written. Knows no command line.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from backend.checkpoint_file import TensorFile, open_tensor_file
from backend.checkpoint_layout import Part
from backend.checkpoint_lora import NO_CHANGES, InTurn, WeightChange, merge_loras
from backend.checkpoint_output import GGUF_SUFFIX, KEEP, PLAIN_TYPES, ConversionError, Entry, Output, is_gguf_type
from backend.families.family import Component
from backend.families.registry import all_families, identify
from backend.key_layout import UNET_PREFIX
from backend.storage.choices import FORMATS
from backend.tensor_writer import Written, write_gguf, write_safetensors
from backend.unfinished_files import creating

__all__ = ["KEEP", "PARTS", "Conversion", "ConversionError", "conversion_types", "convert_checkpoint"]
PARTS = ("all", "denoiser", "vae", "text")
_FP8_MARK = "scaled_fp8"
"""By which other programs recognize a file whose fp8 weights have a `scale_weight`; its type is theirs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """`sources`: one file, or several whose denoiser, VAE and text encoders are put together. `to`: a key of PLAIN_TYPES, a format with a quantizer
    (`storage.choices.FORMATS`), or KEEP. `part`: one of PARTS; its prefix is taken off. `loras`: files with strengths, merged into the denoiser and
    the text encoders. `vae`: a file whose VAE takes the place of the source's. `leave_out`: patterns (`model_ema.*`) of names that are not written.
    `metadata`: texts for the header of a .safetensors target, in addition to the source's modelspec.
    """

    sources: tuple[Path, ...]
    target: Path
    to: str = KEEP
    part: str = "all"
    loras: tuple[tuple[Path, float], ...] = ()
    vae: Path | None = None
    leave_out: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConversionError("No file was given. Name one to convert, or several to put together.")
        if self.part not in PARTS:
            raise ConversionError(f"--part {self.part!r} is unknown. Use one of {', '.join(PARTS)}.")
        if self.to not in conversion_types():
            raise ConversionError(f"--to {self.to!r} is unknown, or has no quantizer. Use one of {', '.join(conversion_types())}.")
        if self.to != KEEP and is_gguf_type(self.to) != self.is_gguf:
            wanted = GGUF_SUFFIX if is_gguf_type(self.to) else ".safetensors"
            raise ConversionError(f"{self.target.name}: {self.to} is written to a {wanted} file. Name the target so.")
        if self.target.suffix.lower() not in (GGUF_SUFFIX, ".safetensors"):
            raise ConversionError(f"{self.target.name}: the target is a .safetensors or a {GGUF_SUFFIX} file. Name it so.")

    @property
    def is_gguf(self) -> bool:
        return self.target.suffix.lower() == GGUF_SUFFIX


def conversion_types() -> tuple[str, ...]:
    """The values of `to`."""
    return (KEEP, *PLAIN_TYPES, *(name for name, make in FORMATS.items() if make((256, 256)).can_quantize))


Report = Callable[[int, int], None]
"""(bytes written, bytes in all)."""


def convert_checkpoint(job: Conversion, report: Report = lambda done, total: None, change: WeightChange = NO_CHANGES) -> int:
    """Write the target; returns its bytes of tensors. `change` comes before the LoRA of the job.

    Raises: ConversionError, CheckpointError, LoraError, FileExistsError, OSError."""
    if job.target.exists():
        raise ConversionError(f"{job.target} exists already. Name another target, or delete it first.")
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensor_file(path)) for path in job.sources]
        entries = list(_entries(files, job))
        if job.vae is not None:
            entries = _with_vae(entries, files[0], stack.enter_context(open_tensor_file(job.vae)))
        entries = [entry for entry in entries if not any(fnmatchcase(entry.key, pattern) for pattern in job.leave_out)]
        if not entries:
            raise ConversionError(f"{', '.join(file.path.name for file in files)}: has no {job.part} part to take out.")
        changes = InTurn((change, merge_loras(files, job.loras))) if job.loras else change
        outputs = {entry.name: Output(entry, job.to, changes, to_gguf=job.is_gguf) for entry in entries}
        return _write(job, outputs, files[0], report)


def _write(job: Conversion, outputs: Mapping[str, Output], main: TensorFile, report: Report) -> int:
    tensors = [(written, output) for output in outputs.values() for written in output.announced()]
    owner = {written.name: output for written, output in tensors}
    announced = [written for written, _ in tensors]
    layers = {written.name.removesuffix(".scale_weight") for written in announced if written.name.endswith(".scale_weight")}
    dtypes = [written.dtype for written in announced if written.name.removesuffix(".weight") in layers]
    announced += [Written(_FP8_MARK, (2,), dtypes[0])] if dtypes else []
    total, done = sum(written.num_bytes for written in announced), 0
    _check_room(job.target, total)

    def numbers_of(written: Written) -> Tensor:
        nonlocal done
        numbers = torch.zeros(2).to(written.dtype) if written.name == _FP8_MARK else owner[written.name].numbers(written.name)
        done += written.num_bytes
        report(done, total)
        return numbers

    job.target.parent.mkdir(parents=True, exist_ok=True)
    with creating(job.target) as unfinished:
        if job.is_gguf:
            write_gguf(unfinished, announced, numbers_of, _architecture(main))
        else:
            kept = {key: value for key, value in main.metadata.items() if key.startswith("modelspec.")}
            write_safetensors(unfinished, announced, numbers_of, {**kept, **job.metadata})
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


def _entries(files: Sequence[TensorFile], job: Conversion) -> Iterator[Entry]:
    """The tensors to write, in the order of the sources. Raises: CheckpointError, ConversionError."""
    placed: set[str] = set()
    for file in files:
        parts = dict(_find_parts(file, files))
        for key in file.infos:
            found = _part_of(key, parts)
            part = "" if found is None else found.partition(" ")[0]
            if job.part not in ("all", part) or (len(files) > 1 and job.part == "all" and found is None):
                continue
            name = _name_in_target(key, found, parts, job, is_alone=len(files) == 1)
            if name in placed:
                raise ConversionError(f"{file.path.name}: {key} would be in the target twice. Take the part out of one of the files first.")
            placed.add(name)
            yield Entry(name=name, key=key, file=file, part=part)


def _name_in_target(key: str, found: str | None, parts: Mapping[str, Part], job: Conversion, *, is_alone: bool) -> str:
    """Without the part's prefix if the part is taken out, or is all that a GGUF file has; else as one file has several parts."""
    if found is None:
        return key
    bare = key.removeprefix(parts[found].prefix)
    if job.part != "all":
        return bare
    if not is_alone:
        return _prefix_in_one(found) + bare
    return bare if job.is_gguf and len(parts) == 1 else key


def _with_vae(entries: Sequence[Entry], main: TensorFile, vae: TensorFile) -> list[Entry]:
    """The entries with the VAE of another file. Raises: ConversionError."""
    place = dict(_find_parts(main, [main])).get("vae")
    found = dict(_find_parts(vae, [main])).get("vae") or dict(_find_parts(vae, [vae])).get("vae")
    if place is None or found is None:
        raise ConversionError(f"{(main if place is None else vae).path.name}: has no VAE. Choose a checkpoint with one, and a file of a VAE.")
    keys = [key for key in vae.infos if key.startswith(found.prefix)]
    baked = [Entry(name=place.prefix + key.removeprefix(found.prefix), key=key, file=vae, part="vae") for key in keys]
    return [*(entry for entry in entries if entry.part != "vae"), *baked]


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
