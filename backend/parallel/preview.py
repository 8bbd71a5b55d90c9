"""The plan that a checkpoint's pictures would run by, from the file's header and the slots as they are now. Loads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backend import checkpoint_config, memory_management
from backend.checkpoint_file import CheckpointError, open_tensor_file
from backend.checkpoint_layout import find_text_encoders, find_unet
from backend.devices.slot import Slot
from backend.parallel.costs import profile_unet
from backend.parallel.fleet import Fleet, current_fleet
from backend.parallel.live_facts import guess_speed
from backend.parallel.plan import Plan
from backend.parallel.planner import JobShape, WantedStrategy, make_plan
from backend.parallel.slot_facts import Link, SlotFacts

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
        family = checkpoint_config.find_family(file, shape, text_prefixes=[text.prefix for text in find_text_encoders(file.infos)])
    fleet = current_fleet()
    side_px = _SIDES_PX.get(family, 512)
    side = side_px // _LATENT_PX
    config = checkpoint_config.unet_config(shape, family)
    profile = profile_unet(config, latent_height=side, latent_width=side, dtype=memory_management.unet_dtype(fleet.primary.torch_device))
    plan = make_plan(profile, _facts(fleet.working_slots), _links(fleet), JobShape(images=images), strategy=strategy)
    return Preview(plan=plan, model=checkpoint_config.FAMILY_TITLES[family], side_px=side_px, images=images)


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
