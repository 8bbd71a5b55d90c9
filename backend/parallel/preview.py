"""The plan that a checkpoint's pictures would run by, from the file's header and the slots as they are now. Loads no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from backend import checkpoint_config, memory_management
from backend.checkpoint_file import CheckpointError, open_tensor_file
from backend.checkpoint_layout import find_text_encoders, find_unet
from backend.denoiser_types import choose_denoiser_types
from backend.devices.slot import Slot
from backend.nn.unet_program import build_program
from backend.parallel.costs import ModelProfile
from backend.parallel.fleet import Fleet, current_fleet
from backend.parallel.live_facts import guess_speed
from backend.parallel.plan import Plan
from backend.parallel.planner import JobShape, WantedStrategy, make_plan
from backend.parallel.profiling import profile_unet, with_stored_bytes
from backend.parallel.slot_facts import Link, SlotFacts
from backend.state_dict import build_empty, matrix_dtypes
from backend.storage.running import set_types

_LATENT_PX = 8
_SIDES_PX = {"sdxl": 1024, "sdxl_refiner": 1024, "sd20": 768}


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """A plan, and what it was made for."""

    plan: Plan
    model: str
    side_px: int
    images: int


def preview_plan(path: Path, *, images: int = 1, strategy: WantedStrategy = "auto") -> Preview:
    """The plan for square pictures of the family's usual size with CFG. Speeds are guesses until a job has run. Raises: CheckpointError."""
    with open_tensor_file(path) as file:
        part = find_unet(file.infos)
        if part is None:
            raise CheckpointError(f"{path.name}: holds no UNet, so there is nothing to plan. Name a checkpoint with --ckpt.")
        shape = checkpoint_config.read_unet_shape(file, part)
        stored = matrix_dtypes(file, part)
        family = checkpoint_config.find_family(file, shape, text_prefixes=[text.prefix for text in find_text_encoders(file.infos)])
    fleet = current_fleet()
    side_px = _SIDES_PX.get(family, 512)
    side = side_px // _LATENT_PX
    profile = _profile(checkpoint_config.unet_config(shape, family), stored, side)
    plan = make_plan(profile, _facts(fleet.working_slots), _links(fleet), JobShape(images=images), strategy=strategy)
    return Preview(plan=plan, model=checkpoint_config.FAMILY_TITLES[family], side_px=side_px, images=images)


def _profile(config: Mapping[str, Any], stored: Sequence[torch.dtype], side: int) -> ModelProfile:
    """Costs of the network as the loader would keep it: the bytes it stores, the type it computes in."""
    unet = build_empty(lambda: UNet2DConditionModel(**config))
    types = choose_denoiser_types(stored, sum(parameter.numel() for parameter in unet.parameters()), wanted=memory_management.unet_dtype_from_flags())
    set_types(unet, types.storage_dtype, types.computation_dtype)
    profile = profile_unet(config, latent_height=side, latent_width=side, dtype=types.computation_dtype)
    return with_stored_bytes(profile, build_program(unet))


def _facts(slots: Sequence[Slot]) -> list[SlotFacts]:
    return [
        SlotFacts(
            index=slot.index,
            name=slot.name,
            kind=slot.torch_device.type,
            speed=guess_speed(slot),
            budget_bytes=memory_management.get_free_memory(slot.torch_device),
            total_bytes=slot.total_bytes,
            device_key=str(slot.torch_device),
        )
        for slot in slots
    ]


def _links(fleet: Fleet) -> Sequence[Link]:
    return fleet.links if len(fleet.working_slots) > 1 else ()
