"""Mixes two or three checkpoints of one family into a new one: weighted sum, or a difference added. Tensors go from file to file one at a time.

    merge_checkpoints(Merge(primary=a, secondary=b, method=WEIGHTED_SUM, multiplier=0.3, target=Path("mix.safetensors"), to="fp16"))

The converter writes the target, so all its types can be chosen, and the target is written whole or not at all. Knows no page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from backend.checkpoint_converter import KEEP, Conversion, ConversionError, Report, convert_checkpoint
from backend.checkpoint_file import TensorFile, open_tensor_file
from backend.families.registry import identify

NO_INTERPOLATION, WEIGHTED_SUM, ADD_DIFFERENCE = METHODS = ("No interpolation", "Weighted sum", "Add difference")
MAX_MULTIPLIER = 2.0
_INPUT_LAYERS = ("input_blocks.0.0.weight", "conv_in.weight", "x_embedder.proj.weight", "img_in.weight")
"""Layers that have more input channels in inpainting models; the channels they share are mixed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """Weighted sum: A (1 - m) + B m. Add difference: A + (B - C) m. No interpolation: A. A is `primary`, m is `multiplier`.

    `to`, `vae` and `leave_out` are those of a Conversion; with `recipe`, the header says what was mixed."""

    primary: Path
    target: Path
    secondary: Path | None = None
    tertiary: Path | None = None
    method: str = WEIGHTED_SUM
    multiplier: float = 0.3
    to: str = KEEP
    vae: Path | None = None
    leave_out: tuple[str, ...] = ()
    recipe: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConversionError(f"Method {self.method!r} is unknown. Use one of {', '.join(METHODS)}.")
        if not math.isfinite(self.multiplier) or not -MAX_MULTIPLIER <= self.multiplier <= MAX_MULTIPLIER:
            raise ConversionError(f"Multiplier {self.multiplier}: use a number from {-MAX_MULTIPLIER} to {MAX_MULTIPLIER}.")
        for wanted, path, name in ((self.num_models > 1, self.secondary, "second"), (self.num_models > 2, self.tertiary, "third")):
            if wanted and path is None:
                raise ConversionError(f"{self.method} needs a {name} model. Choose one.")

    @property
    def num_models(self) -> int:
        return METHODS.index(self.method) + 1

    def models(self) -> list[Path]:
        """The files that take part."""
        return [path for path in (self.primary, self.secondary, self.tertiary)[: self.num_models] if path is not None]

    def metadata(self) -> dict[str, str]:
        """The recipe, for the header."""
        if not self.recipe:
            return {}
        names = dict(zip(("primary_model", "secondary_model", "tertiary_model"), (path.name for path in self.models())))
        recipe = {**names, "method": self.method, "multiplier": self.multiplier, "vae": None if self.vae is None else self.vae.name}
        return {"sd_merge_recipe": json.dumps(recipe)}


def merge_checkpoints(job: Merge, report: Report = lambda done, total: None) -> tuple[int, int]:
    """Write the target; returns (bytes of tensors, number of the first model's tensors that another model does not have, which stay).

    Raises: ConversionError, CheckpointError, FileExistsError, OSError."""
    conversion = Conversion(sources=(job.primary,), target=job.target, to=job.to, vae=job.vae, leave_out=job.leave_out, metadata=job.metadata())
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensor_file(path)) for path in job.models()]
        _check_alike(files)
        blend = _Blend(job, files)
        return convert_checkpoint(conversion, report, blend), len(blend.alone)


def _check_alike(files: Sequence[TensorFile]) -> None:
    """Raises: ConversionError for models that do not belong together."""
    main = files[0]
    families = [found[0] if (found := identify(file)) is not None else None for file in files]
    for file, family in zip(files[1:], families[1:]):
        if family is not families[0]:
            kinds = [one.title if one is not None else "of no known family" for one in (families[0], family)]
            raise ConversionError(f"{main.path.name} is {kinds[0]}, {file.path.name} is {kinds[1]}: only models of one family can be mixed.")
        num_shared = len(main.infos.keys() & file.infos.keys())
        if 2 * num_shared < len(main.infos):
            raise ConversionError(
                f"{file.path.name} has {num_shared} of the {len(main.infos)} tensors of {main.path.name}: they are stored in different layouts. "
                "Convert one of them first."
            )


class _Blend:
    """The formula, as a change of the first file's weights."""

    def __init__(self, job: Merge, files: Sequence[TensorFile]) -> None:
        self._main, self._others = files[0].path, files[1:]
        self._is_sum, self._multiplier = job.method == WEIGHTED_SUM, job.multiplier
        self.alone: set[str] = set()

    def changes(self, file: TensorFile, key: str) -> bool:
        info = file.infos[key]
        return file.path == self._main and bool(self._others) and (info.packed is not None or info.dtype.is_floating_point)

    def merge(self, file: TensorFile, key: str, value: Tensor) -> Tensor:
        others = [self._part(other, key, value) for other in self._others]
        if any(other is None for other in others):
            self.alone.add(key)
            return value
        second, *third = (other for other in others if other is not None)
        channels = slice(None, second.shape[1]) if second.ndim > 1 else slice(None)
        part = value[:, channels] if second.ndim > 1 else value
        mixed = part + (second - part) * self._multiplier if self._is_sum else part + (second - third[0]) * self._multiplier
        if mixed.shape == value.shape:
            return mixed
        value = value.clone()
        value[:, channels] = mixed
        return value

    @staticmethod
    def _part(other: TensorFile, key: str, value: Tensor) -> Tensor | None:
        """The other model's tensor in fp32; None if it has none of that shape (fewer input channels are fine)."""
        info = other.infos.get(key)
        if info is None or not (info.packed is not None or info.dtype.is_floating_point):
            return None
        shape, wanted = tuple(info.shape), tuple(value.shape)
        is_input = key.endswith(_INPUT_LAYERS) and len(shape) > 1
        has_fewer_inputs = is_input and (shape[0], *shape[2:]) == (wanted[0], *wanted[2:]) and shape[1] < wanted[1]
        return other.read(key, dtype=value.dtype) if shape == wanted or has_fewer_inputs else None
