"""UnetPatcher: the denoiser's patcher, with everything else a sampling run needs: ControlNets, extra models, extra memory, extra hooks.

Must not know samplers, prompts or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from backend import memory_management
from backend.nn.references import REFERENCES, shape_of_cost
from backend.patcher.base import ModelPatcher

if TYPE_CHECKING:
    from backend.modules.k_model import KModel


class UnetPatcher(ModelPatcher):
    """`controlnet_linked_list` is the newest ControlNet; each has a `previous_controlnet`."""

    model: KModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.controlnet_linked_list: Any = None
        self.extra_preserved_memory_during_sampling = 0
        self.extra_model_patchers_during_sampling: list[ModelPatcher] = []
        self.extra_concat_condition: Tensor | None = None
        self.reference_latents: tuple[Tensor, ...] = ()
        """Latents (B or 1, C, H, W) of reference pictures, for a network that takes them (Kontext, Qwen-Image-Edit)."""

    @classmethod
    def from_model(cls, model: KModel, load_device: torch.device | None = None, offload_device: torch.device | None = None) -> UnetPatcher:
        """A patcher for a KModel. The devices default to those that memory management chooses for a UNet."""
        parameters = next(model.parameters())
        return cls(
            model,
            load_device=load_device or memory_management.get_torch_device(),
            offload_device=offload_device or memory_management.unet_offload_device(),
            current_device=parameters.device,
        )

    def _copy_hooks_to(self, other: ModelPatcher) -> ModelPatcher:
        super()._copy_hooks_to(other)
        assert isinstance(other, UnetPatcher)
        other.controlnet_linked_list = self.controlnet_linked_list
        other.extra_preserved_memory_during_sampling = self.extra_preserved_memory_during_sampling
        other.extra_model_patchers_during_sampling = list(self.extra_model_patchers_during_sampling)
        other.extra_concat_condition = self.extra_concat_condition
        other.reference_latents = self.reference_latents
        return other

    def clone(self) -> UnetPatcher:
        """A patcher for the same network with its own hooks, ControlNets and extra models."""
        clone = super().clone()
        assert isinstance(clone, UnetPatcher)
        return clone

    # weights

    def _translate_weight_name(self, name: str) -> str:
        """Also accepts names in the original layout ("diffusion_model.input_blocks..."), which extensions use."""
        prefix = "diffusion_model."
        if not name.startswith(prefix):
            return name
        ours = self.model.key_map.ours(name.removeprefix(prefix))
        return name if ours is None else prefix + ours

    def load_frozen_patcher(self, filename: str, state_dict: Mapping[str, Tensor], strength: float) -> None:
        """Add weight patches whose keys are `weight name::kind::index`."""
        found: dict[str, dict[str, dict[int, Tensor]]] = {}
        for key, tensor in state_dict.items():
            name, kind, index = key.split("::")
            found.setdefault(name, {}).setdefault(kind, {})[int(index)] = tensor
        for kind in {kind for kinds in found.values() for kind in kinds}:
            values = {name: kinds[kind] for name, kinds in found.items() if kind in kinds}
            patches = {name: (kind, tuple(parts[index] for index in sorted(parts))) for name, parts in values.items()}
            self.add_patches(filename=filename, patches=patches, strength_patch=strength)

    # what else a sampling run needs

    def add_extra_preserved_memory_during_sampling(self, memory_in_bytes: int) -> None:
        """Keep this much more memory free while sampling."""
        self.extra_preserved_memory_during_sampling += memory_in_bytes

    def add_extra_model_patcher_during_sampling(self, model_patcher: ModelPatcher) -> None:
        """Keep another model on its device while sampling."""
        self.extra_model_patchers_during_sampling.append(model_patcher)

    def add_extra_torch_module_during_sampling(self, m: nn.Module, cast_to_unet_dtype: bool = True) -> ModelPatcher:
        """Keep a module on the UNet's device while sampling, by default in the UNet's computation dtype."""
        if cast_to_unet_dtype:
            m.to(self.model_dtype())
        patcher = ModelPatcher(model=m, load_device=self.load_device, offload_device=self.offload_device)
        self.add_extra_model_patcher_during_sampling(patcher)
        return patcher

    def add_patched_controlnet(self, cnet: Any) -> None:
        """Put a ControlNet at the head of the chain."""
        cnet.set_previous_controlnet(self.controlnet_linked_list)
        self.controlnet_linked_list = cnet

    @property
    def most_references(self) -> int:
        """How many reference pictures the network takes."""
        return sum(name in self.model.program.reads for name in REFERENCES)

    def set_reference_latents(self, latents: Sequence[Tensor]) -> None:
        """Let the network read these references, scaled like the latents it makes, in every step. Raises: ValueError for more than it takes."""
        if len(latents) > self.most_references:
            raise ValueError(
                f"{len(latents)} reference pictures were given to a network that takes {self.most_references}. Use an editing model (Flux.1 Kontext, "
                "Flux.2-klein, Qwen-Image-Edit), or fewer pictures."
            )
        self.reference_latents = tuple(latents)

    def shape_of_cost(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of plain latents that cost as much as latents of `shape` with this run's references."""
        return shape_of_cost(shape, self.reference_latents)

    def list_controlnets(self) -> list[Any]:
        """The chain, newest first."""
        chain, link = [], self.controlnet_linked_list
        while link is not None:
            chain.append(link)
            link = link.previous_controlnet
        return chain

    # options

    def append_model_option(self, k: str, v: object, ensure_uniqueness: bool = False) -> None:
        _append(self.model_options, k, v, ensure_uniqueness)

    def append_transformer_option(self, k: str, v: object, ensure_uniqueness: bool = False) -> None:
        _append(self.model_options.setdefault("transformer_options", {}), k, v, ensure_uniqueness)

    def set_transformer_option(self, k: str, v: object) -> None:
        self.model_options.setdefault("transformer_options", {})[k] = v

    def add_conditioning_modifier(self, modifier: object, ensure_uniqueness: bool = False) -> None:
        """Before every step, call a function that maps (model, x, timestep, uncond, cond, cond_scale, model_options, seed) to such a tuple."""
        self.append_model_option("conditioning_modifiers", modifier, ensure_uniqueness)

    def add_sampler_pre_cfg_function(self, modifier: object, ensure_uniqueness: bool = False) -> None:
        self.append_model_option("sampler_pre_cfg_function", modifier, ensure_uniqueness)

    def set_guidance_rescale(self, rescale: object) -> None:
        """After CFG's own formula, a function maps (x, x0 of the positive prompt, combined x0) to the denoised batch (Qwen-Image's rule)."""
        self.model_options["guidance_rescale"] = rescale

    def set_memory_peak_estimation_modifier(self, modifier: object) -> None:
        """Set a function (input_shape) -> bytes that replaces the network's own estimate."""
        self.model_options["memory_peak_estimation_modifier"] = modifier

    def add_alphas_cumprod_modifier(self, modifier: object, ensure_uniqueness: bool = False) -> None:
        """Kept for extensions that call it; nothing uses it."""
        self.append_model_option("alphas_cumprod_modifiers", modifier, ensure_uniqueness)

    def add_block_modifier(self, modifier: object, ensure_uniqueness: bool = False) -> None:
        """(h, "before" | "after", transformer_options) -> h, around every block."""
        self.append_transformer_option("block_modifiers", modifier, ensure_uniqueness)

    def add_block_inner_modifier(self, modifier: object, ensure_uniqueness: bool = False) -> None:
        """(x, "before" | "after", layer, layer_index, layers, transformer_options) -> x, around every layer of a block."""
        self.append_transformer_option("block_inner_modifiers", modifier, ensure_uniqueness)

    def add_controlnet_conditioning_modifier(self, modifier: object, ensure_uniqueness: bool = False) -> None:
        self.append_transformer_option("controlnet_conditioning_modifiers", modifier, ensure_uniqueness)

    def set_group_norm_wrapper(self, wrapper: object) -> None:
        """(norm_layer, h, transformer_options) -> h, which replaces the resnets' norms and the last norm."""
        self.set_transformer_option("group_norm_wrapper", wrapper)

    def set_controlnet_model_function_wrapper(self, wrapper: object) -> None:
        self.set_transformer_option("controlnet_model_function_wrapper", wrapper)

    def set_model_replace_all(self, patch: object, target: str = "attn1") -> None:
        """Replace one kind of attention everywhere."""
        for block_name in ("input", "middle", "output"):
            for number in range(16):
                for transformer_index in range(16):
                    self.set_model_patch_replace(patch, target, block_name, number, transformer_index)


def _append(options: dict[str, Any], key: str, value: object, ensure_uniqueness: bool) -> None:
    values = options.setdefault(key, [])
    if not (ensure_uniqueness and value in values):
        values.append(value)
