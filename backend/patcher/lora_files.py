"""Reads LoRA files and turns them into weight patches for the loaded networks, completely or not at all.

Knows no prompts and no folders. `lora_keys` has the names, `lora_math` the formulas.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backend.checkpoint_file import CheckpointError, open_tensor_file
from backend.families.key_map import Rows
from backend.foreign_json import ForeignJsonError, parse_json
from backend.patcher.clip import CLIP
from backend.patcher.lora_keys import (
    family_in_metadata,
    family_of_layers,
    model_lora_keys_clip,
    model_lora_keys_unet,
    shared_lora_keys_unet,
    split_key,
)
from backend.patcher.lora_math import DiffPatch, GloraPatch, Ia3Patch, LohaPatch, LokrPatch, LoraPatch, OftPatch, SetPatch, patch_of_rows
from backend.patcher.unet import UnetPatcher
from backend.patcher.weight_patches import WeightPatch
from backend.text_processing.embedding import PLAIN_KEY

logger = logging.getLogger(__name__)

LORA_SUFFIXES = (".safetensors", ".pt", ".ckpt")
_BUNDLED_EMBEDDING = re.compile(r"bundle_emb\.(?P<name>.+)\.(?:string_to_param\.\*|(?P<encoder>clip_l|clip_g|clip_h))")
_SHARE_THAT_MUST_FIT = 0.5
Parts = dict[str, Tensor]


class LoraError(ValueError):
    """A file cannot be used as a LoRA with the loaded model. The message says which, why, and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraFile:
    """A file's content: the parts of each layer's change, by the file's name for the layer. `strange_keys` belong to no layer.

    `embeddings` are bundled textual inversions: by name, the vectors for each text encoder.
    """

    name: str
    layers: Mapping[str, Parts]
    metadata: Mapping[str, str] = field(default_factory=dict)
    strange_keys: Sequence[str] = ()
    embeddings: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def family(self) -> str | None:
        """The model family it was made for, if it can be determined."""
        return family_in_metadata(self.metadata) or family_of_layers({name: _inputs_of(parts) for name, parts in self.layers.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraPatchSet:
    """Patches by weight name for the UNet and the text encoders, and the layers that match neither."""

    unet: Mapping[str, WeightPatch]
    clip: Mapping[str, WeightPatch]
    unmatched: Sequence[str] = ()
    embeddings: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def read_lora_file(path: Path, name: str | None = None) -> LoraFile:
    """Read a `.safetensors`, `.pt` or `.ckpt` file. Raises: LoraError."""
    try:
        with open_tensor_file(path) as file:
            tensors = {key: file.read(key) for key in file.infos}
            return parse_lora(name or path.stem, tensors, dict(file.metadata))
    except CheckpointError as error:
        raise LoraError(str(error)) from error


def parse_lora(name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> LoraFile:
    """The parts of each layer's change. Raises: LoraError if there are none."""
    layers: dict[str, Parts] = {}
    strange: list[str] = []
    embeddings: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        split = split_key(key)
        if bundled := _BUNDLED_EMBEDDING.fullmatch(key):
            embeddings.setdefault(bundled["name"], {})[bundled["encoder"] or PLAIN_KEY] = tensor
        elif split is None:
            strange.append(key)
        else:
            layers.setdefault(split[0], {})[split[1]] = tensor
    plain = [layer for layer, parts in layers.items() if parts.keys() == {"ia3"}]  # a plain weight, as in a checkpoint
    for layer in plain:
        strange.append(f"{layer}.weight")
        del layers[layer]
    if not layers:
        first = ", ".join(list(tensors)[:3])
        raise LoraError(
            f"{name}: this is not a LoRA; none of its {len(tensors)} tensors is part of one (first: {first}). Move it to the folder for its kind."
        )
    _add_peft_alphas(layers, metadata or {})
    return LoraFile(name=name, layers=layers, metadata=metadata or {}, strange_keys=tuple(strange), embeddings=embeddings)


def _add_peft_alphas(layers: Mapping[str, Parts], metadata: Mapping[str, str]) -> None:
    """Set the layers' alphas from diffusers' adapter metadata, {"unet.r": 8, "unet.lora_alpha": 4, "unet.alpha_pattern": {...}, ...}."""
    try:
        facts: Any = parse_json(metadata.get("lora_adapter_metadata", "{}"))
    except ForeignJsonError:
        return
    for layer, parts in layers.items():
        component, _, inner = layer.partition(".")
        alpha = facts.get(f"{component}.lora_alpha") if isinstance(facts, dict) else None
        if alpha is None or "down" not in parts or "alpha" in parts:
            continue
        patterns = facts.get(f"{component}.alpha_pattern")
        patterns = patterns if isinstance(patterns, dict) else {}
        alpha = next((value for pattern, value in patterns.items() if inner == pattern or inner.endswith(f".{pattern}")), alpha)
        if not isinstance(alpha, (int, float)) or not parts["down"].ndim:
            continue
        rank = parts["down"].shape[0]
        parts["alpha"] = torch.tensor(float(alpha) * (rank**0.5 if facts.get(f"{component}.use_rslora") else 1.0))


# matching


def match_lora(file: LoraFile, unet: UnetPatcher, clip: CLIP | None, *, model_family: str = "the loaded model") -> LoraPatchSet:
    """The file's patches for these networks. Layers that match nothing are returned, and logged in one line.

    Raises: LoraError if more than half of the layers match nothing, or if one has the wrong shape. Nothing of the file may be applied then.
    """
    unet_names = model_lora_keys_unet(unet.model)
    clip_names = model_lora_keys_clip(clip.cond_stage_model) if clip is not None else {}
    try:
        unet_patches, unmatched = load_lora(file.layers, unet_names)
        shared_patches, unmatched = _load_shared(unmatched, shared_lora_keys_unet(unet.model))
        unet_patches.update(shared_patches)
        clip_patches, unmatched = load_lora({layer: file.layers[layer] for layer in unmatched}, clip_names)
    except LoraError as error:
        raise LoraError(f"LoRA {file.name}: {error}") from error
    if len(unmatched) > _SHARE_THAT_MUST_FIT * len(file.layers):
        raise LoraError(_explain_foreign(file, model_family, f"{len(unmatched)} of its {len(file.layers)} layers do not exist in it", unmatched))
    models = [(unet.model, unet_patches)] + ([(clip.cond_stage_model, clip_patches)] if clip is not None else [])
    misfits = [misfit for model, patches in models for misfit in _find_misfits(dict(model.named_parameters(remove_duplicate=False)), patches)]
    if misfits:
        raise LoraError(_explain_foreign(file, model_family, f"{len(misfits)} of its {len(file.layers)} layers do not fit", misfits))
    left_over = [*unmatched, *file.strange_keys]
    if left_over:
        logger.warning("LoRA %s: %d layers or keys do not exist in the model and are ignored (%s).", file.name, len(left_over), _first(left_over))
    return LoraPatchSet(unet=unet_patches, clip=clip_patches, unmatched=tuple(left_over), embeddings=file.embeddings)


def load_lora(lora: Mapping[str, Any], to_load: Mapping[str, str]) -> tuple[dict[str, WeightPatch], dict[str, Any]]:
    """(patches by weight name, unmatched layers). `to_load` maps every name a file may use for a layer to the weight's name.

    `lora` is a file's state dict, or layers with their parts.
    """
    is_parsed = all(isinstance(value, Mapping) for value in lora.values())
    layers: Mapping[str, Parts] = lora if is_parsed else parse_lora("LoRA", lora).layers
    patches: dict[str, WeightPatch] = {}
    unmatched: dict[str, Any] = {}
    for layer, parts in layers.items():
        target, built = to_load.get(layer), _built(layer, parts)
        if target is None or not built:
            unmatched[layer] = parts
            continue
        for attribute, patch in built.items():
            patches[f"{target.removesuffix('weight')}{attribute}"] = patch
    return patches, unmatched


def _built(layer: str, parts: Parts) -> dict[str, WeightPatch]:
    try:
        return build_patches(parts)
    except (ValueError, LookupError, ArithmeticError, RuntimeError) as error:  # empty tensors and the like
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in parts.items())
        raise LoraError(f"its layer {layer[:200]} is damaged ({error}; {shapes}). Download the LoRA again, or choose another.") from error


def _load_shared(layers: Mapping[str, Parts], to_load: Mapping[str, Mapping[str, Rows]]) -> tuple[dict[str, WeightPatch], dict[str, Parts]]:
    """Patches for layers that are one in the file and several in the network (q, k and v): each of ours gets its rows."""
    patches: dict[str, WeightPatch] = {}
    unmatched: dict[str, Parts] = {}
    for layer, parts in layers.items():
        targets, built = to_load.get(layer), _built(layer, parts)
        if targets is None or not built:
            unmatched[layer] = parts
            continue
        for target, rows in targets.items():
            patches.update({f"{target.removesuffix('weight')}{attribute}": patch_of_rows(patch, rows) for attribute, patch in built.items()})
    return patches, unmatched


def _find_misfits(parameters: Mapping[str, Tensor], patches: Mapping[str, WeightPatch]) -> list[str]:
    misfits = []
    for name, patch in patches.items():
        if name not in parameters:
            misfits.append(f"{name} does not exist in the model")
        elif (misfit := _explain_misfit(patch, parameters[name].shape)) is not None:
            misfits.append(f"{name} is {tuple(parameters[name].shape)}, {misfit}")
    return misfits


def _explain_misfit(patch: WeightPatch, shape: torch.Size) -> str | None:
    """Why a patch does not fit a shape, if it does not. Also tries to merge on the meta device, since the factors may not fit each other."""
    try:
        misfit = patch.explain_misfit(shape)
        if misfit is None:
            patch.on(torch.device("meta")).merge(torch.empty(shape, device="meta"), 1.0)
        return misfit
    except (ValueError, LookupError, ArithmeticError, RuntimeError) as error:  # tensors of too few dimensions
        return f"the change has parts with invalid shapes ({error})"


def _explain_foreign(file: LoraFile, model_family: str, what: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    family = file.family
    made_for = f" It seems to be made for {family}; choose a checkpoint of that family" if family and not model_family.startswith(family) else ""
    remedy = made_for or " It may be for another model family or damaged; choose another checkpoint"
    return (
        f"LoRA {file.name} does not fit {model_family}: {what} ({_first(names)}).{remedy}, or remove it from the prompt. Nothing of it was applied."
    )


def _first(names: Sequence[str] | Mapping[str, Any]) -> str:
    listed = list(names)
    return "first: " + ", ".join(listed[:3]) if len(listed) > 3 else ", ".join(listed)


# building


def build_patches(parts: Parts) -> dict[str, WeightPatch]:
    """The patches of one layer: for its "weight", its "bias", or both. Empty if parts are missing."""
    patches: dict[str, WeightPatch] = {}
    if "magnitude" in parts:  # PEFT's: always of outputs, (O,) or, for a convolution, (1, O, 1, 1)
        parts = {**parts, "dora_scale": parts["magnitude"].flatten()}
    build = next((build for needed, build in _BUILDERS if needed <= parts.keys()), None)
    if build is not None and "dora_scale" in parts and build not in _BUILDERS_WITH_DORA:
        raise ValueError("it has DoRA magnitudes, which this kind of change does not support")
    if build is not None:
        patches["weight"] = build(parts)
    if "diff_b" in parts:
        patches["bias"] = DiffPatch(diff=parts["diff_b"])
    return patches


def _alpha(parts: Parts) -> float | None:
    return float(parts["alpha"].float().reshape(-1)[0]) if "alpha" in parts else None


def _build_lora(parts: Parts) -> WeightPatch:
    return LoraPatch(up=parts["up"], down=parts["down"], mid=parts.get("mid"), alpha=_alpha(parts), dora_scale=parts.get("dora_scale"))


def _build_loha(parts: Parts) -> WeightPatch:
    factors = {name: parts.get(name) for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2", "dora_scale")}
    return LohaPatch(alpha=_alpha(parts), **factors)  # type: ignore[arg-type]  # the four that must be there are


def _build_lokr(parts: Parts) -> WeightPatch:
    factors = {name: parts.get(f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
    return LokrPatch(alpha=_alpha(parts), dora_scale=parts.get("dora_scale"), **factors)


def _build_glora(parts: Parts) -> WeightPatch:
    return GloraPatch(a1=parts["a1"], a2=parts["a2"], b1=parts["b1"], b2=parts["b2"], alpha=_alpha(parts))


def _build_oft(parts: Parts) -> WeightPatch:
    return OftPatch(blocks=parts["oft_blocks"], constraint=_alpha(parts) or 0.0, rescale=parts.get("rescale"))


def _build_rotation(parts: Parts) -> WeightPatch:
    return OftPatch(blocks=parts["oft_diag"], rescale=parts.get("rescale"), is_rotation=True)


def _build_diff(parts: Parts) -> WeightPatch:
    return DiffPatch(diff=parts["diff"], dora_scale=parts.get("dora_scale"))


def _build_ia3(parts: Parts) -> WeightPatch:
    return Ia3Patch(scale=parts["ia3"], on_input=bool(parts["on_input"].reshape(-1)[0]))


_BUILDERS: tuple[tuple[frozenset[str], Callable[[Parts], WeightPatch]], ...] = (
    (frozenset({"up", "down"}), _build_lora),
    (frozenset({"w1_a", "w1_b", "w2_a", "w2_b"}), _build_loha),
    *((frozenset({f"lokr_{one}", f"lokr_{two}"}), _build_lokr) for one in ("w1", "w1_a") for two in ("w2", "w2_a")),
    (frozenset({"a1", "a2", "b1", "b2"}), _build_glora),
    (frozenset({"oft_blocks"}), _build_oft),
    (frozenset({"oft_diag"}), _build_rotation),
    (frozenset({"ia3", "on_input"}), _build_ia3),
    (frozenset({"diff"}), _build_diff),
    (frozenset({"set"}), lambda parts: SetPatch(value=parts["set"])),
)
_BUILDERS_WITH_DORA = (_build_lora, _build_loha, _build_lokr, _build_diff)


def _inputs_of(parts: Parts) -> int:
    """Number of inputs of the layer that a change was made for; 0 if one part does not tell."""
    factor = parts.get("down", parts.get("diff"))
    return factor.shape[1] if factor is not None and factor.ndim >= 2 else 0
