"""Weight patches: changes of a network's weights (LoRA and similar), applied and undone exactly, each weight on its current device.

A `ModelPatcher` lists the changes it wants. The `LoraLoader` of its network applies them, whatever the weights' current state: it keeps the original
of each changed weight on the host, always starts from the original, and restores by copying it back. Must not know file formats, prompts, or where
a network should be.

Streamed layers: the host copy is patched, so fetched weights already are. Layers stored in fp8: the sum is rounded to one of its two neighbors at
random (seeded by the weight's name, so equal everywhere), because rounding to nearest would drop nearly every small change.
In online mode the stored weight does not change, and the change is added each time its layer runs, in the layer's computation dtype: low-rank changes
as a side branch (`side_branch`), others to the dequantized weight. Packed weights get low-rank changes in this way too, and all changes if their
format cannot be written; so nothing is rewritten, and another strength costs nothing.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backend.memory.module_bytes import as_same_kind
from backend.nn.owner import owner_of
from backend.patcher.side_branch import LowRank, SideBranch, can_have_branch
from backend.storage.kinds import storage_of


class WeightPatchError(ValueError):
    """A change that does not fit the weight it names."""


class WeightPatch(ABC):
    """One change of one weight. Equal only to itself."""

    @abstractmethod
    def merge(self, weight: Tensor, strength: float) -> Tensor:
        """The changed weight. `weight` is fp32 and may be overwritten. The patch's tensors are moved to its device."""

    def explain_misfit(self, shape: torch.Size) -> str | None:
        """Why the change does not fit a weight of this shape; None if it fits."""
        return None

    def on(self, device: torch.device) -> WeightPatch:
        """The same change with its tensors on `device`, for repeated use."""
        return self

    def low_rank(self) -> LowRank | None:
        """The change at strength 1 as a product of two narrow matrices, or None if it is no such product."""
        return None


class Step(NamedTuple):
    """One entry of a weight's recipe: the weight times `strength_model`, then changed with `strength_patch`.

    `offset` (dimension, start, length) narrows the change to a part of the weight; `function` is applied to what the change adds.
    """

    strength_patch: float
    patch: WeightPatch
    strength_model: float = 1.0
    offset: tuple[int, int, int] | None = None
    function: Callable[[Tensor], Tensor] | None = None


Recipe = tuple[Step, ...]
LoraIdentifier = tuple[str, float, float, bool]
"""(filename, strength_patch, strength_model, online_mode)"""
LoraPatches = dict[LoraIdentifier, dict[str, list[Step]]]


def merge_recipe(weight: Tensor, recipe: Iterable[Step]) -> Tensor:
    """`weight` (fp32, may be overwritten) after all steps."""
    for step in recipe:
        if step.strength_model != 1.0:
            weight = weight * step.strength_model
        weight = _merge_step(weight, step)
    return weight


def _merge_step(weight: Tensor, step: Step) -> Tensor:
    if step.strength_patch == 0.0:
        return weight
    part = weight if step.offset is None else weight.narrow(*step.offset)
    merged = step.patch.merge(part.clone() if step.function is not None or step.offset is not None else part, step.strength_patch)
    if step.function is not None:
        merged = part + step.function(merged - part)
    if step.offset is None:
        return merged
    part.copy_(merged)
    return weight


class OriginalPool:
    """Originals shared by networks with the same weights, so that the host keeps each only once, for as long as one of them needs it."""

    def __init__(self) -> None:
        self._tensors: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def share(self, name: str, original: Tensor) -> Tensor:
        """The tensor stored under that name if it equals `original` bit for bit; otherwise store and return `original`."""
        with self._lock:
            kept = self._tensors.get(name)
        if kept is not None and storage_of(kept).is_same(storage_of(original)):
            return kept
        with self._lock:
            self._tensors[name] = original
        return original


class LoraLoader:
    """The current changes of one network's weights, and how to apply others. The network's owner keeps it for all patchers.

    `backup` maps names to the originals of merged weights, on the host. They are read-only, and replica modules share them through `pool`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self.pool = OriginalPool()
        self.backup: dict[str, Tensor] = {}
        self.loaded_hash: str = str([])
        self._merged: dict[str, Recipe] = {}
        self._online: dict[str, Recipe] = {}
        self._loaded: tuple[tuple[LoraIdentifier, dict[str, list[Step]]], ...] = ()
        self._compute_device: torch.device | None = None

    @property
    def model(self) -> nn.Module:
        """The network. A weak reference, because the network keeps its loader: an unused network is freed at once."""
        model = self._model()
        if model is None:
            raise RuntimeError("The network whose weights should change has been deleted. Keep its patcher, which keeps the network.")
        return model

    @property
    def online_backup(self) -> list[str]:
        """Names of weights that are changed while their layer runs."""
        return list(self._online)

    def refresh(
        self,
        lora_patches: Mapping[LoraIdentifier, dict[str, list[Step]]],
        offload_device: torch.device | None = None,
        force_refresh: bool = False,
        *,
        compute_device: torch.device | None = None,
    ) -> None:
        """Apply `lora_patches`. Weights whose recipe has not changed are not touched.

        A weight on the host is merged on `compute_device` and copied back. If a merge fails, all weights are restored without any patch.
        Raises: WeightPatchError; torch.OutOfMemoryError.
        """
        wanted = tuple(lora_patches.items())
        if not force_refresh and _are_same(wanted, self._loaded):
            return
        self._compute_device = compute_device
        merged, online = self._keep_packed(*_collect_recipes(wanted))
        try:
            self._refresh_merged(merged, compute_device, force=force_refresh)
            self._refresh_online(online)
        except BaseException:
            self.restore()
            raise
        self._loaded = wanted
        self.loaded_hash = str(list(lora_patches))

    def _keep_packed(self, merged: dict[str, Recipe], online: dict[str, Recipe]) -> tuple[dict[str, Recipe], dict[str, Recipe]]:
        """Recipes, with those of packed weights moved to the online ones if they are low-rank or the format cannot be written."""
        layers = {name: (self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in merged}
        moved = {}
        for name, recipe in merged.items():
            layer, attribute = layers[name]
            storage = storage_of(getattr(layer, attribute))
            if storage.is_packed and (name in online or not storage.can_requantize or find_low_rank(layer, attribute, recipe) is not None):
                moved[name] = recipe
        kept = {name: recipe for name, recipe in merged.items() if name not in moved}
        return kept, {**online, **{name: (*recipe, *online.get(name, ())) for name, recipe in moved.items()}}

    def restore(self) -> None:
        """Restore every weight's original."""
        self._loaded, self.loaded_hash = (), str([])
        self._refresh_online({})
        self._refresh_merged({}, None)

    def originals(self) -> dict[str, Tensor]:
        """Every parameter and saved buffer by name, without patches."""
        return {**self.model.state_dict(), **self.backup}

    # merged into the stored weight

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _refresh_merged(self, recipes: Mapping[str, Recipe], compute_device: torch.device | None, *, force: bool = False) -> None:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name in [name for name in self.backup if name not in recipes]:
            storage_of(parameters[name]).copy_from(storage_of(self.backup[name]))
            self._merged.pop(name, None)
            del self.backup[name]
        for name, recipe in recipes.items():
            if force or self._merged.get(name) != recipe:
                self._merge(name, parameters[name], recipe, compute_device)

    def _merge(self, name: str, parameter: Tensor, recipe: Recipe, compute_device: torch.device | None) -> None:
        original = self.backup.get(name)
        source = parameter.detach() if original is None else original  # equal values, and closer
        if original is None:
            original = self.backup[name] = self.pool.share(name, storage_of(parameter).to_host().tensor)
        device = parameter.device if compute_device is None or parameter.device.type != "cpu" else compute_device
        weight = storage_of(source).to(device).dequantize(torch.float32, copy=source.device == device)
        try:
            merged = merge_recipe(weight, recipe)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise WeightPatchError(f"A weight patch cannot be applied to {name} of shape {tuple(original.shape)}: {error}") from error
        storage_of(parameter).overwrite(merged, seed=zlib.crc32(name.encode()))
        self._merged[name] = recipe

    # added while the layer runs

    def _refresh_online(self, recipes: Mapping[str, Recipe]) -> None:
        if not recipes and not self._online:
            return
        by_layer: dict[str, dict[str, Recipe]] = {}
        for name, recipe in recipes.items():
            layer_name, _, attribute = name.rpartition(".")
            by_layer.setdefault(layer_name, {})[attribute] = recipe
        for layer_name, layer in self.model.named_modules():
            prefix = f"{layer_name}." if layer_name else ""
            if any(f"{prefix}{attribute}" in self._online for attribute in layer._parameters) or layer_name in by_layer:
                _set_online(layer, by_layer.get(layer_name))
        self._online = dict(recipes)

    def copied_for(self, model: nn.Module) -> LoraLoader:
        """The loader for a copy of the network. Patches and originals are shared, because they are read-only."""
        copied = LoraLoader(model)
        copied.pool = self.pool
        copied.backup, copied._merged, copied._online = dict(self.backup), dict(self._merged), dict(self._online)
        copied.loaded_hash, copied._loaded, copied._compute_device = self.loaded_hash, self._loaded, self._compute_device
        return copied


def loader_of(model: nn.Module) -> LoraLoader:
    """The network's loader, made at the first request."""
    return owner_of(model).part(LoraLoader, lambda: LoraLoader(model))


def unpatched_tensors(module: nn.Module) -> Mapping[str, Tensor]:
    """Every parameter and saved buffer of a patcher's network (`patcher.model`, not a part of it) by name, without weight patches.

    Unpatched tensors are the network's own; originals of patched ones are on the host. `copy.load_state_dict` accepts them as they are.
    """
    loader = owner_of(module).find(LoraLoader)
    return module.state_dict() if loader is None else loader.originals()


def _are_same(one: tuple[tuple[LoraIdentifier, Any], ...], other: tuple[tuple[LoraIdentifier, Any], ...]) -> bool:
    return len(one) == len(other) and all(a[0] == b[0] and a[1] is b[1] for a, b in zip(one, other, strict=True))


def _collect_recipes(wanted: Iterable[tuple[LoraIdentifier, dict[str, list[Step]]]]) -> tuple[dict[str, Recipe], dict[str, Recipe]]:
    """(merged, online): name -> its steps in the order of the requests."""
    merged: dict[str, Recipe] = {}
    online: dict[str, Recipe] = {}
    for (_, _, _, is_online), patches in wanted:
        recipes = online if is_online else merged
        for name, steps in patches.items():
            recipes[name] = (*recipes.get(name, ()), *steps)
    return merged, online


# online


def _set_online(layer: nn.Module, recipes: dict[str, Recipe] | None) -> None:
    """Replace the online changes of one layer; None removes them."""
    for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
        for hook_id in [hook_id for hook_id, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), (_OnlineMerge, SideBranch))]:
            del hooks[hook_id]
            layer._forward_hooks_always_called.pop(hook_id, None)
    whole: dict[str, Recipe] = {}
    for name, recipe in (recipes or {}).items():
        changes = find_low_rank(layer, name, recipe)
        if changes is None:
            whole[name] = recipe
        else:
            layer.register_forward_hook(SideBranch(changes).add)
    if whole:
        merge = _OnlineMerge(whole)
        layer.register_forward_pre_hook(merge.enter)  # after the hooks that fetch the weight
        layer.register_forward_hook(merge.leave, prepend=True, always_call=True)  # before the hooks that release it


def find_low_rank(layer: nn.Module, name: str, recipe: Recipe) -> tuple[LowRank, ...] | None:
    """A recipe's changes of a layer's weight as products, with their strengths; None if one is no product, or the layer cannot have a side branch."""
    if name != "weight" or not can_have_branch(layer):
        return None
    changes = []
    for step in recipe:
        change = step.patch.low_rank()
        if change is None or step.strength_model != 1.0 or step.offset is not None or step.function is not None:
            return None
        changes.append(change._replace(scale=change.scale * step.strength_patch))
    return tuple(changes)


class _OnlineMerge:
    """The hooks of one layer, which swap in changed weights while it runs. Patches stay on the device where they were last used."""

    needs_whole_weight = True
    """Read by the hooks that dequantize (`storage.running`), which else give a table only the rows that are looked up."""

    def __init__(self, recipes: Mapping[str, Recipe]) -> None:
        self._recipes = dict(recipes)
        self._device: torch.device | None = None
        self._stored: dict[str, nn.Parameter] = {}

    def enter(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        for name, recipe in self._recipes.items():
            parameter = layer._parameters[name]
            assert parameter is not None
            self._recipes[name] = recipe = self._on_device(recipe, parameter.device)
            computation_dtype = args[0].dtype if args and isinstance(args[0], Tensor) and args[0].is_floating_point() else torch.float32
            storage = storage_of(parameter)
            merged = merge_recipe(storage.dequantize(torch.float32, copy=True), recipe).to(storage.run_dtype(computation_dtype))
            self._stored[name] = parameter
            layer._parameters[name] = _as_parameter(merged, parameter)

    def leave(self, layer: nn.Module, args: object, output: object) -> None:
        for name, parameter in self._stored.items():
            layer._parameters[name] = parameter
        self._stored.clear()

    def _on_device(self, recipe: Recipe, device: torch.device) -> Recipe:
        return tuple(step._replace(patch=step.patch.on(device)) for step in recipe)

    def __deepcopy__(self, memo: dict[int, Any]) -> _OnlineMerge:
        copied = memo[id(self)] = _OnlineMerge(self._recipes)
        return copied


def _as_parameter(tensor: Tensor, like: nn.Parameter) -> nn.Parameter:
    parameter = as_same_kind(tensor, like)
    assert isinstance(parameter, nn.Parameter)
    return parameter


@contextlib.contextmanager
def without_weight_patches(model: nn.Module) -> Iterator[None]:
    """A context in which the network has its original weights, for saving it."""
    loader = loader_of(model)
    loaded = dict(loader._loaded)
    loader.refresh({}, compute_device=loader._compute_device)
    try:
        yield
    finally:
        loader.refresh(loaded, compute_device=loader._compute_device)
