"""Files of networks for the file fuzz: real names and shapes, one to some of them odd, with as many zeros as the shapes ask for.

Only the header is written; the tensors are a hole at the file's end, which takes no space. Readers are those of checkpoints, of VAE and text encoder
files, and of everything that the ControlNet panels take. Heavy packages are imported where a reader of the fuzz needs them.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backend.checkpoint_file import CheckpointError

_SIDES = (0, 1, 2, 3, 7, 8, 64, 65, 1 << 20, 10**9, 2**62)
_NUMBERS = ("999999999", "1\u00b23", "-1", "", "0")
_MAX_NUMBERS = 1 << 24
"""Larger tensors get a side of 0."""


def _header(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    return dict(json.loads(content[8 : 8 + length]))


def _head(shapes: dict[str, list[int]]) -> bytes:
    """A safetensors header for these shapes in half precision."""
    header, position = {}, 0
    for name, shape in shapes.items():
        stored = shape if math.prod(shape) <= _MAX_NUMBERS else [*shape[:-1], 0]
        end = position + 2 * math.prod(stored)
        header[name] = {"dtype": "F16", "shape": stored, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def head_of(path: Path) -> bytes:
    """The header of a file of tensors, in half precision."""
    from backend.checkpoint_file import open_tensor_file

    with open_tensor_file(path) as file:
        return _head({name: list(info.shape) for name, info in file.infos.items()})


def stretch(path: Path) -> None:
    """Make a file that is only a header as long as it says. A header that cannot be read stays alone."""
    content = path.read_bytes()
    try:
        ends = [int(info["data_offsets"][1]) for name, info in _header(content).items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return
    length = max(ends, default=0)
    if 0 < length <= 1 << 36:
        os.truncate(path, 8 + int.from_bytes(content[:8], "little") + length)


def change_networks(content: bytes, chance: random.Random) -> bytes:
    """Drop, rename and reshape one to 40 tensors. The file stays a good safetensors file."""
    shapes = {name: list(info["shape"]) for name, info in _header(content).items()}
    for name in chance.sample(list(shapes), min(len(shapes), chance.choice((1, 1, 2, 5, 40)))):
        shape = shapes.pop(name)
        kind = chance.randrange(6)
        if kind == 1:
            shapes[name] = shape[: chance.randrange(len(shape) + 1)]
        elif kind == 2:
            place = chance.randrange(len(shape) + 1)
            shapes[name] = [*shape[:place], chance.choice(_SIDES), *shape[place:]]
        elif kind == 3:
            shapes[name] = [chance.choice(_SIDES) if chance.random() < 0.5 else side for side in shape]
        elif kind == 4:
            shapes[re.sub(r"\d+", lambda found: chance.choice((found[0], *_NUMBERS)), name)] = shape
        elif kind == 5 and shapes:
            shapes[chance.choice(list(shapes))] = shape
    return _head(shapes)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where the good files are, until the process ends."""
    return tempfile.TemporaryDirectory(prefix="network-files-")


@cache
def _flux() -> tuple[Path, tuple[Path, ...]]:
    """A transformer, and its VAE and text encoders."""
    from tests.support.flux_checkpoints import write_flux

    files = write_flux(Path(_folder().name) / "alone")
    return files.checkpoint, files.modules


@cache
def checkpoint_seeds() -> list[bytes]:
    """Narrow members of the families with all their parts, in both layouts."""
    from tests.support.checkpoints import write_checkpoint
    from tests.support.flux_checkpoints import write_flux

    folder = Path(_folder().name)
    paths = [write_checkpoint(folder / f"{family}.safetensors", family, layout=layout).path for family, layout in _CHECKPOINTS]
    return [head_of(path) for path in (*paths, write_flux(folder / "flux", "all-in-one").checkpoint)]


_CHECKPOINTS = (("sd15", "ldm"), ("sd20", "ldm"), ("sdxl", "diffusers"), ("tiny-sd", "diffusers"))


@cache
def module_seeds() -> list[bytes]:
    """A VAE, CLIP-L and T5 as they lie in models/VAE and models/text_encoder."""
    return [head_of(path) for path in _flux()[1]]


@cache
def control_seeds() -> list[bytes]:
    """What the ControlNet panels take: a ControlNet, a union, a T2I-Adapter, a Control-LoRA, IP-Adapters and their image encoder."""
    from tests.support.checkpoints import write_checkpoint
    from tests.support.controlnets import build_adapter, build_controlnet, build_union, write_adapter, write_control_lora, write_controlnet
    from tests.support.ip_adapters import adapter_tables, build_tower, write_adapter_file, write_tower

    folder = Path(_folder().name) / "control"
    models, sdxl = (write_checkpoint(folder / f"{family}.safetensors", family) for family in ("sd15", "sdxl"))
    paths = [write_controlnet(folder / f"{layout}.safetensors", build_controlnet(models), layout=layout) for layout in ("ldm", "diffusers")]
    paths.append(write_controlnet(folder / "union.safetensors", build_union(sdxl), layout="diffusers"))
    paths += [write_adapter(folder / f"{kind}.safetensors", build_adapter(models, kind), layout="ldm") for kind in ("full_adapter", "light_adapter")]
    write_control_lora(folder / "lora.safetensors", models)
    kinds = ("plain", "plus", "full")
    paths += [write_adapter_file(folder / f"ip-{kind}.safetensors", adapter_tables(models, kind)) for kind in kinds]
    return [head_of(path) for path in (*paths, folder / "lora.safetensors", write_tower(folder / "tower.safetensors", build_tower()))]


def read_checkpoint(path: Path) -> None:
    """What a load checks before it reads weights, and what the page asks of a checkpoint."""
    from backend.loader import check_files
    from backend.parallel.planning.preview import preview_plan

    check_files(path)
    preview_plan(path)


def read_module(path: Path) -> None:
    """As VAE / Text Encoder of a checkpoint that has the others."""
    from backend.loader import check_files

    checkpoint, modules = _flux()
    check_files(checkpoint, [*modules, path])


def read_control(path: Path) -> None:
    """As the model of a ControlNet panel: with all its weights."""
    for error in _refusals(path):
        raise error


def _refusals(path: Path) -> Iterator[CheckpointError]:
    """Why no reader takes the file; nothing if one does."""
    from backend.checkpoint_file import CheckpointError, open_tensor_file
    from backend.clip_vision import load_clip_vision
    from backend.controlnet_loader import load_controlnet
    from backend.ip_adapter import read_ip_adapter

    def read_adapter(name: Path) -> None:
        with open_tensor_file(name) as file:
            read_ip_adapter(file)

    found = []
    for read in (load_controlnet, load_clip_vision, read_adapter):
        try:
            read(path)
            return
        except CheckpointError as error:
            found.append(error)
    yield found[0]
