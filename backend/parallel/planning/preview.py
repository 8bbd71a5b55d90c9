"""The plan that a checkpoint's pictures would use, from the file's header and the current state of the slots. Loads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backend import memory_management
from backend.checkpoint_file import CheckpointError, TensorFile, open_tensor_file
from backend.checkpoint_prediction import V_PREDICTION, PredictionSpec, read_prediction
from backend.denoiser_types import choose_denoiser_types
from backend.devices.slot import Slot
from backend.families.family import Family, FoundDenoiser
from backend.families.registry import identify
from backend.parallel.placing.fleet import Fleet, current_fleet
from backend.parallel.planning.candidate import JobShape
from backend.parallel.planning.costs import ModelProfile
from backend.parallel.planning.live_facts import fetches_ahead, guess_speed, host_bytes_per_ms
from backend.parallel.planning.plan import Plan
from backend.parallel.planning.planner import WantedStrategy, make_plan
from backend.parallel.planning.profiling import profile_network, with_stored_bytes
from backend.parallel.planning.slot_facts import Link, SlotFacts
from backend.state_dict import assign_formats, check_plan, has_packed, matrix_dtypes, plan_denoiser
from backend.storage.running import set_types
from backend.tensor_file import refusing_odd_shapes


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """A plan and what it was made for."""

    plan: Plan
    model: str
    side_px: int
    images: int


def preview_plan(path: Path, *, images: int = 1, strategy: WantedStrategy = "auto") -> Preview:
    """The plan for square pictures of the family's native size with CFG. Speeds are guesses until a job has run. Raises: CheckpointError."""
    with open_tensor_file(path) as file:
        identified = identify(file)
        if identified is None:
            raise CheckpointError(f"{path.name}: contains no UNet, so there is nothing to plan. Name a checkpoint with --ckpt.")
        family, found = identified
        prediction = read_prediction(file, prefix=found.part.prefix)
        side_px = family.native_size_px(prediction or PredictionSpec(kind=V_PREDICTION, source="the larger of both"))
        with refusing_odd_shapes(file):
            profile = _profile(file, family, found, side_px // family.latent.factor)
    fleet = current_fleet()
    plan = make_plan(profile, _facts(fleet.working_slots), _links(fleet), JobShape(images=images), strategy=strategy)
    return Preview(plan=plan, model=family.title, side_px=side_px, images=images)


def _profile(file: TensorFile, family: Family, found: FoundDenoiser, side: int) -> ModelProfile:
    """Costs of the network as the loader would load it: with its storage type, or packed, and its computation type."""
    denoiser = family.build_denoiser(found)
    num_parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    wanted = memory_management.unet_dtype_from_flags()
    types = choose_denoiser_types(matrix_dtypes(file, found.part), num_parameters, wanted=wanted, supported=family.compute_dtypes)
    if has_packed(file, found.part):
        plan = plan_denoiser(denoiser, file, found.part, family.key_map(denoiser).places)
        check_plan(plan, file, family.denoiser_title)
        assign_formats(denoiser, plan, file)
    set_types(denoiser, types.storage_dtype, types.computation_dtype)
    profile = profile_network(denoiser, family.build_program, latent_height=side, latent_width=side, dtype=types.computation_dtype)
    return with_stored_bytes(profile, family.build_program(denoiser))


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
            host_bytes_per_ms=host_bytes_per_ms(slot),
            fetches_ahead=fetches_ahead(slot),
        )
        for slot in slots
    ]


def _links(fleet: Fleet) -> Sequence[Link]:
    return fleet.links if len(fleet.working_slots) > 1 else ()
