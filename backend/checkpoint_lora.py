"""What changes weights on their way from file to file; LoRA: which stored tensor is changed by what, for the denoiser and the text encoders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from backend.checkpoint_file import TensorFile
from backend.checkpoint_prediction import EPSILON, PredictionSpec
from backend.families.family import Family, FoundDenoiser
from backend.families.registry import identify
from backend.modules.k_model import KModel
from backend.patcher.clip import CLIP, JointTextEncoder
from backend.patcher.lora_files import LoraError, match_lora, read_lora_file
from backend.patcher.unet import UnetPatcher
from backend.patcher.weight_patches import Step, merge_recipe
from backend.state_dict import LoadPlan, TensorSource, plan_denoiser

_NETWORK = "diffusion_model."


@dataclass(frozen=True, slots=True)
class _Change:
    """What one parameter changes in a stored tensor."""

    source: TensorSource
    shape: torch.Size
    steps: tuple[Step, ...]

    def merge(self, value: Tensor) -> Tensor:
        """The stored tensor (fp32, may be overwritten) with the parameter's rows changed."""
        if self.source.transposed:
            return merge_recipe(value.T.contiguous().reshape(self.shape), self.steps).T.contiguous()
        rows = self.source.rows
        if self.source.third is not None:
            rows = (self.source.third * self.shape[0], (self.source.third + 1) * self.shape[0], 3 * self.shape[0], False)
        if rows is None:
            return merge_recipe(value.reshape(self.shape), self.steps).reshape(value.shape)
        first, end, _, is_swapped = rows
        part = value[first:end]
        part = torch.cat([*reversed(part.chunk(2))]) if is_swapped else part.clone()
        merged = merge_recipe(part.reshape(self.shape), self.steps).reshape(part.shape)
        value[first:end] = torch.cat([*reversed(merged.chunk(2))]) if is_swapped else merged
        return value


class WeightChange(Protocol):
    """Changes some tensors of some files."""

    def changes(self, file: TensorFile, key: str) -> bool:
        """Whether the tensor `key` of `file` is changed."""

    def merge(self, file: TensorFile, key: str, value: Tensor) -> Tensor:
        """The tensor (fp32, may be overwritten) with the change."""


@dataclass(frozen=True, slots=True)
class InTurn:
    """One change after the other."""

    parts: tuple[WeightChange, ...]

    def changes(self, file: TensorFile, key: str) -> bool:
        return any(part.changes(file, key) for part in self.parts)

    def merge(self, file: TensorFile, key: str, value: Tensor) -> Tensor:
        for part in self.parts:
            value = part.merge(file, key, value) if part.changes(file, key) else value
        return value


@dataclass(frozen=True, slots=True)
class Merger:
    """The changes by file and stored name."""

    by_key: Mapping[tuple[Path, str], Sequence[_Change]] = field(default_factory=dict)

    def changes(self, file: TensorFile, key: str) -> bool:
        return (file.path, key) in self.by_key

    def merge(self, file: TensorFile, key: str, value: Tensor) -> Tensor:
        """The weight (fp32, may be overwritten) with all changes."""
        for change in self.by_key.get((file.path, key), ()):
            value = change.merge(value)
        return value


NO_CHANGES = Merger()


@dataclass(frozen=True, slots=True)
class _Network:
    """A network without weights: the names of its patches' weights start with `prefix`, and `plan` says where in `file` they are stored."""

    module: nn.Module
    prefix: str
    file: TensorFile
    plan: LoadPlan


def merge_loras(files: Sequence[TensorFile], loras: Iterable[tuple[Path, float]]) -> Merger:
    """The changes of the denoiser in the first file that has one, and of the text encoders that its family takes from any of the files.

    Raises: CheckpointError, LoraError.
    """
    main, family, found = _find_denoiser(files)
    unet, texts = _empty_patcher(family, found), list(_find_texts(files, family, found))
    clip = CLIP(no_init=True)
    clip.cond_stage_model = JointTextEncoder({network.prefix[:-1]: network.module for network in texts})
    denoiser = unet.model.diffusion_model
    networks = [_Network(denoiser, _NETWORK, main, plan_denoiser(denoiser, main, found.part, unet.model.key_map.places)), *texts]
    steps: dict[str, list[Step]] = {}
    for path, strength in loras:
        patches = match_lora(read_lora_file(path), unet, clip, model_family=family.title)
        for name, patch in {**patches.unet, **patches.clip}.items():
            steps.setdefault(name, []).append(Step(strength, patch))
    by_key: dict[tuple[Path, str], list[_Change]] = {}
    for network in networks:
        shapes = {name: parameter.shape for name, parameter in network.module.named_parameters()}
        for name, source in network.plan.sources.items():
            if recipe := steps.get(network.prefix + name):
                by_key.setdefault((network.file.path, source.key), []).append(_Change(source, shapes[name], tuple(recipe)))
    if not by_key:
        raise LoraError(f"None of the LoRA changes a weight of {main.path.name}. Choose one made for {family.title}.")
    return Merger(by_key)


def _find_denoiser(files: Sequence[TensorFile]) -> tuple[TensorFile, Family, FoundDenoiser]:
    for file in files:
        if (identified := identify(file)) is not None:
            return file, *identified
    raise LoraError(f"{files[0].path.name}: has no denoiser that a LoRA could be merged into. Name the checkpoint first.")


def _find_texts(files: Sequence[TensorFile], family: Family, found: FoundDenoiser) -> Iterator[_Network]:
    for encoder in family.text_encoders:
        places = [(file, part) for file in files for part in encoder.find(file) if encoder.takes(file, part, found)]
        for file, part in places[-1:]:
            module = encoder.build(file, part)
            yield _Network(module, f"{encoder.name}.", file, encoder.plan(module, file, part))


def _empty_patcher(family: Family, found: FoundDenoiser) -> UnetPatcher:
    """A patcher of the network without weights, which knows its names and shapes."""
    network = family.build_denoiser(found)
    prediction = PredictionSpec(kind=EPSILON, source="not used")
    model = KModel(
        network, family.make_predictor(prediction), storage_dtype=torch.float32, build_program=family.build_program, key_map=family.key_map(network)
    )
    meta = torch.device("meta")
    return UnetPatcher(model, meta, meta)
