"""ModelPatcher: a network with its devices and the hooks of one job, under Forge's names.

Clones share the network but have their own hooks and weight patches. The memory store decides when the network moves, and applies the patches of
the clone in use. Must not know samplers, prompts or files. `weight_patches` changes the weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backend.memory.module_bytes import count_module_bytes
from backend.nn.owner import owner_of
from backend.patcher.lora_math import as_weight_patch
from backend.patcher.weight_patches import LoraLoader, LoraPatches, Step, WeightPatchError, loader_of

ModelOptions = dict[str, Any]
PatchKey = str | tuple[Any, ...]
"""A weight's name; (name, (dimension, start, length)) for a part of it; or these and a function applied to what is added."""


def copy_options(value: Any) -> Any:
    """A copy of options with new dicts and lists and shared leaves (functions, tensors, objects)."""
    if isinstance(value, dict):
        return {key: copy_options(item) for key, item in value.items()}
    return [copy_options(item) for item in value] if isinstance(value, list) else value


def set_model_options_patch_replace(
    model_options: ModelOptions, patch: object, name: str, block_name: str, number: int, transformer_index: int | None = None
) -> ModelOptions:
    """Replace attention `name` of one block. Copies the dicts along the path, so that other users of the options keep theirs."""
    options = dict(model_options["transformer_options"])
    replacements = options["patches_replace"] = dict(options.get("patches_replace", {}))
    key = (block_name, number) if transformer_index is None else (block_name, number, transformer_index)
    replacements[name] = {**replacements.get(name, {}), key: patch}
    model_options["transformer_options"] = options
    return model_options


def set_model_options_post_cfg_function(
    model_options: ModelOptions, post_cfg_function: object, disable_cfg1_optimization: bool = False
) -> ModelOptions:
    """Append a function that is called after guidance."""
    return _append_cfg_function(model_options, "sampler_post_cfg_function", post_cfg_function, disable_cfg1_optimization)


def set_model_options_pre_cfg_function(
    model_options: ModelOptions, pre_cfg_function: object, disable_cfg1_optimization: bool = False
) -> ModelOptions:
    """Append a function that is called before the conditions run."""
    return _append_cfg_function(model_options, "sampler_pre_cfg_function", pre_cfg_function, disable_cfg1_optimization)


def _append_cfg_function(model_options: ModelOptions, name: str, function: object, disable_cfg1_optimization: bool) -> ModelOptions:
    model_options[name] = [*model_options.get(name, []), function]
    if disable_cfg1_optimization:
        model_options["disable_cfg1_optimization"] = True
    return model_options


class _SwappedAttributes(dict[str, object]):
    """A network's attributes before they were swapped, by dotted path."""

    def copied_for(self, network: nn.Module) -> _SwappedAttributes:
        """The same backup: a copy of the network has the swapped attributes too, and can undo them."""
        return _SwappedAttributes(self)


class ModelPatcher:
    """`model` is on `load_device` while in use, otherwise on `offload_device`; `current_device` is where it is now.

    `model_options` contains the hooks. `object_patches` are attributes of the network that are swapped while it is loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        load_device: torch.device,
        offload_device: torch.device,
        size: int = 0,
        current_device: torch.device | None = None,
        **kwargs: object,
    ) -> None:
        self.model = model
        self.load_device = load_device
        self.offload_device = offload_device
        self.current_device = offload_device if current_device is None else current_device
        self.size = size
        self.object_patches: dict[str, object] = {}
        self.lora_patches: LoraPatches = {}
        self.model_options: ModelOptions = {"transformer_options": {}}

    @property
    def object_patches_backup(self) -> dict[str, object]:
        """The original values of swapped attributes. The network's owner keeps them, so that every clone can restore them."""
        return owner_of(self.model).part(_SwappedAttributes)

    # basics

    def model_size(self) -> int:
        """Bytes of the network's weights."""
        if self.size <= 0:
            self.size = count_module_bytes(self.model).total_bytes
        return self.size

    def clone(self) -> ModelPatcher:
        """A patcher for the same network with its own hooks."""
        return self._copy_hooks_to(type(self)(self.model, self.load_device, self.offload_device, self.size, self.current_device))

    def _copy_hooks_to(self, other: ModelPatcher) -> ModelPatcher:
        other.object_patches = dict(self.object_patches)
        other.lora_patches = dict(self.lora_patches)
        other.model_options = copy_options(self.model_options)
        return other

    def is_clone(self, other: object) -> bool:
        """Whether the other patcher has the same network."""
        return getattr(other, "model", None) is self.model

    def memory_required(self, input_shape: Sequence[int]) -> float:
        """The network's estimate of its working memory in bytes; 0 if it has no estimate."""
        estimate: Callable[..., float] | None = getattr(self.model, "memory_required", None)
        return 0.0 if estimate is None else estimate(input_shape)

    def model_dtype(self) -> torch.dtype | None:
        """The dtype in which the network computes."""
        dtype: torch.dtype | None = getattr(self.model, "computation_dtype", None)
        return dtype or next((parameter.dtype for parameter in self.model.parameters()), None)

    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, Tensor]:
        """The network's state dict, optionally only the keys that start with `filter_prefix`."""
        return {key: value for key, value in self.model.state_dict().items() if filter_prefix is None or key.startswith(filter_prefix)}

    # weights

    @property
    def lora_loader(self) -> LoraLoader:
        """The current changes of the network's weights, shared by all clones."""
        return loader_of(self.model)

    def add_patches(
        self,
        *,
        filename: str,
        patches: Mapping[Any, object],
        strength_patch: float = 1.0,
        strength_model: float = 1.0,
        online_mode: bool = False,
    ) -> set[PatchKey]:
        """Request weight changes by name: a WeightPatch each, or a Forge tuple such as ("lora", (up, down, alpha, mid, dora_scale)).

        Returns the keys that name a weight of this network; other keys are ignored. The weights change when the network is next loaded, or with
        `refresh_loras`. If one patch does not fit, none is added. Raises: WeightPatchError.
        """
        identifier = (filename, float(strength_patch), float(strength_model), online_mode)
        steps = {name: list(old) for name, old in self.lora_patches.get(identifier, {}).items()}
        shapes = {name: parameter.shape for name, parameter in self.model.named_parameters(remove_duplicate=False)}
        used: set[PatchKey] = set()
        for key, value in patches.items():
            name, offset, function = _split_patch_key(key)
            name = name if name in shapes else self._translate_weight_name(name)
            if name in shapes:
                step = Step(float(strength_patch), as_weight_patch(value), float(strength_model), offset, function)
                _check_fit(name, shapes[name], step, filename)
                steps.setdefault(name, []).append(step)
                used.add(key)
        if used:
            self.lora_patches = {**self.lora_patches, identifier: steps}
        return used

    def _translate_weight_name(self, name: str) -> str:
        """Our name for a weight given by a foreign name, or `name` itself."""
        return name

    def copy_patches_from(self, other: ModelPatcher) -> None:
        """Request the same weight changes as another patcher of this network or of one with the same names.

        If the originals are equal too, the host keeps them once for both.
        """
        self.lora_patches = dict(other.lora_patches)
        self.lora_loader.pool = other.lora_loader.pool

    def has_online_lora(self) -> bool:
        """Whether any change is added while layers run instead of being merged into the stored weights."""
        return any(online_mode for _, _, _, online_mode in self.lora_patches)

    def refresh_loras(self) -> None:
        """Apply this patcher's weight changes, each on the weight's device. Unchanged weights are not touched.

        Raises: WeightPatchError, torch.OutOfMemoryError. The network then has no patches at all.
        """
        self.lora_loader.refresh(self.lora_patches, self.offload_device, compute_device=self.load_device)

    # attributes of the network

    def add_object_patch(self, name: str, obj: object) -> None:
        """Swap the attribute at a dotted path while the network is loaded."""
        self.object_patches[name] = obj

    def get_model_object(self, name: str) -> Any:
        """The attribute at a dotted path, with this patcher's swaps but not those of others."""
        if name in self.object_patches:
            return self.object_patches[name]
        return self.object_patches_backup.get(name, _get_attribute(self.model, name))

    # moving

    def model_patches_to(self, device: torch.device) -> None:
        """Move hooks with a `to` method to `device`."""
        options = self.model_options["transformer_options"]
        for hooks in [*options.get("patches", {}).values(), *options.get("patches_replace", {}).values()]:
            for key, hook in list(hooks.items() if isinstance(hooks, dict) else enumerate(hooks)):
                if hasattr(hook, "to"):
                    hooks[key] = hook.to(device)
        wrapper = self.model_options.get("model_function_wrapper")
        if wrapper is not None and hasattr(wrapper, "to"):
            self.model_options["model_function_wrapper"] = wrapper.to(device)

    def forge_patch_model(self, target_device: torch.device | None = None) -> nn.Module:
        """Swap in the patched attributes, and move the network to `target_device` if given."""
        for name, value in self.object_patches.items():
            self.object_patches_backup.setdefault(name, _get_attribute(self.model, name))
            _set_attribute(self.model, name, value)
        self._move(target_device)
        return self.model

    def forge_unpatch_model(self, target_device: torch.device | None = None) -> None:
        """Restore the swapped attributes, and move the network to `target_device` if given."""
        for name, value in self.object_patches_backup.items():
            _set_attribute(self.model, name, value)
        self.object_patches_backup.clear()
        self._move(target_device)

    def _move(self, target_device: torch.device | None) -> None:
        if target_device is not None:
            self.model.to(target_device)
            self.current_device = target_device

    # hooks around guidance

    def set_model_sampler_cfg_function(self, sampler_cfg_function: Callable[..., Tensor], disable_cfg1_optimization: bool = False) -> None:
        """Replace the guidance formula with a function of a dict of arguments, or of (cond, uncond, cond_scale)."""
        if len(inspect.signature(sampler_cfg_function).parameters) == 3:
            old_form = sampler_cfg_function
            self.model_options["sampler_cfg_function"] = lambda args: old_form(args["cond"], args["uncond"], args["cond_scale"])
        else:
            self.model_options["sampler_cfg_function"] = sampler_cfg_function
        if disable_cfg1_optimization:
            self.model_options["disable_cfg1_optimization"] = True

    def set_model_sampler_pre_cfg_function(self, pre_cfg_function: object, disable_cfg1_optimization: bool = False) -> None:
        """Append a function (model, cond, uncond, x, timestep, model_options) that returns the same tuple."""
        self.model_options = set_model_options_pre_cfg_function(self.model_options, pre_cfg_function, disable_cfg1_optimization)

    def set_model_sampler_post_cfg_function(self, post_cfg_function: object, disable_cfg1_optimization: bool = False) -> None:
        """Append a function that takes a dict of arguments and returns the denoised picture."""
        self.model_options = set_model_options_post_cfg_function(self.model_options, post_cfg_function, disable_cfg1_optimization)

    def set_model_unet_function_wrapper(self, unet_wrapper_function: object) -> None:
        """Call this instead of the network: (apply_model, {"input", "timestep", "c", "cond_or_uncond"})."""
        self.model_options["model_function_wrapper"] = unet_wrapper_function

    def set_model_denoise_mask_function(self, denoise_mask_function: object) -> None:
        """Kept for extensions that call it."""
        self.model_options["denoise_mask_function"] = denoise_mask_function

    # hooks around the VAE

    def set_model_vae_encode_wrapper(self, wrapper_function: object) -> None:
        self.model_options["model_vae_encode_wrapper"] = wrapper_function

    def set_model_vae_decode_wrapper(self, wrapper_function: object) -> None:
        self.model_options["model_vae_decode_wrapper"] = wrapper_function

    def set_model_vae_regulation(self, vae_regulation: object) -> None:
        self.model_options["model_vae_regulation"] = vae_regulation

    # hooks inside the network

    def set_model_patch(self, patch: object, name: str) -> None:
        """Append a hook to the hooks called `name`."""
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches[name] = [*patches.get(name, []), patch]

    def set_model_patch_replace(self, patch: object, name: str, block_name: str, number: int, transformer_index: int | None = None) -> None:
        """Replace attention `name` ("attn1" or "attn2") in a block, or in one of its transformer blocks."""
        self.model_options = set_model_options_patch_replace(self.model_options, patch, name, block_name, number, transformer_index)

    def set_model_attn1_patch(self, patch: object) -> None:
        self.set_model_patch(patch, "attn1_patch")

    def set_model_attn2_patch(self, patch: object) -> None:
        self.set_model_patch(patch, "attn2_patch")

    def set_model_attn1_replace(self, patch: object, block_name: str, number: int, transformer_index: int | None = None) -> None:
        self.set_model_patch_replace(patch, "attn1", block_name, number, transformer_index)

    def set_model_attn2_replace(self, patch: object, block_name: str, number: int, transformer_index: int | None = None) -> None:
        self.set_model_patch_replace(patch, "attn2", block_name, number, transformer_index)

    def set_model_attn1_output_patch(self, patch: object) -> None:
        self.set_model_patch(patch, "attn1_output_patch")

    def set_model_attn2_output_patch(self, patch: object) -> None:
        self.set_model_patch(patch, "attn2_output_patch")

    def set_model_input_block_patch(self, patch: object) -> None:
        self.set_model_patch(patch, "input_block_patch")

    def set_model_input_block_patch_after_skip(self, patch: object) -> None:
        self.set_model_patch(patch, "input_block_patch_after_skip")

    def set_model_output_block_patch(self, patch: object) -> None:
        self.set_model_patch(patch, "output_block_patch")


def _split_patch_key(key: Any) -> tuple[str, tuple[int, int, int] | None, Callable[[Tensor], Tensor] | None]:
    if isinstance(key, str):
        return key, None, None
    name, offset, function = (*key, None, None)[:3]
    return name, None if offset is None else tuple(offset), function


def _check_fit(name: str, shape: torch.Size, step: Step, filename: str) -> None:
    part = shape
    if step.offset is not None:
        dimension, _, length = step.offset
        part = torch.Size([*shape[:dimension], length, *shape[dimension + 1 :]])
    if (misfit := step.patch.explain_misfit(part)) is not None:
        raise WeightPatchError(
            f"{filename} does not fit this model: {name} is {tuple(part)}, {misfit}. Nothing was applied; choose a file made for this model."
        )


def _get_attribute(root: object, path: str) -> Any:
    for name in path.split("."):
        root = getattr(root, name)
    return root


def _set_attribute(root: nn.Module, path: str, value: object) -> None:
    """Set the attribute at a dotted path, whether it is a plain attribute, a parameter, a buffer or a child module."""
    *parents, name = path.split(".")
    holder = _get_attribute(root, ".".join(parents)) if parents else root
    for registry in _registries(holder, value):
        registry.pop(name, None)
    setattr(holder, name, value)


def _registries(holder: object, value: object) -> Iterator[dict[str, Any]]:
    """A module's registries for attributes of other kinds than `value`, where an old entry would hide or refuse the new one."""
    if isinstance(holder, nn.Module):
        yield from (
            registry
            for registry, kind in ((holder._parameters, nn.Parameter), (holder._buffers, Tensor), (holder._modules, nn.Module))
            if not isinstance(value, kind)
        )  # fmt: skip
