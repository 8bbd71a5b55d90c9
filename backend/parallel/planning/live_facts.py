"""What the planner is told about this process: a denoiser's costs, and the current state of the slots. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from backend import memory_management
from backend.devices.inventory import describe_device
from backend.devices.slot import Slot
from backend.memory.vram_state import VRAMState
from backend.parallel.placing.fleet import Fleet
from backend.parallel.placing.placement import copies_of
from backend.parallel.planning.costs import ModelProfile, contains
from backend.parallel.planning.plan import Piece, Plan
from backend.parallel.planning.profiling import profile_network, with_stored_bytes
from backend.parallel.planning.slot_facts import HOST_BYTES_PER_MS, PINNED_BYTES_PER_MS, SlotFacts
from backend.patcher.unet import UnetPatcher

if TYPE_CHECKING:
    from backend.modules.k_model import KModel

FLOPS_PER_MS_OF_CPU_THREAD = 3e7
FLOPS_PER_MS_OF_VIRTUAL_GPU = 1e7
FLOPS_PER_MS_OF_UNKNOWN_GPU = 1e10
FLOPS_PER_MS_OF_CUDA_THROUGHPUT = 4e5
"""Half-precision work per ms for each unit of `DeviceFacts.throughput` (multiprocessors times MHz), from published SDXL step times of the
RTX 4090 and the A100. All four constants are first guesses; measured speeds replace them as soon as rows have run."""


def profile_of(network: KModel, shape: Sequence[int]) -> ModelProfile:
    """Costs of a denoiser's network for one row of latents (B, C, H, W), with its weights counted as they are stored.

    Networks of the same class and configuration share one count.
    """
    height, width = int(shape[2]), int(shape[3])
    profile = profile_network(
        network.diffusion_model, network.build_program, latent_height=height, latent_width=width, dtype=network.computation_dtype
    )
    return with_stored_bytes(profile, network.program)


def slot_facts(
    slot: Slot, unet: UnetPatcher, fleet: Fleet, work: str, budget_share: float, placed_by_plan: Set[nn.Module] = frozenset()
) -> SlotFacts:
    """A slot as the planner sees it now: the bytes that are free or can be freed, and its measured speed at this work.

    Copies that earlier plans made of this network count as the network's own, not as other models on the slot. So do the networks in
    `placed_by_plan`, which the plan also places.
    """
    store, device = memory_management.current_store(), slot.torch_device
    (room,) = store.rooms([slot], unet.model)
    copies = copies_of(unet.model)
    own = (copies.networks - copies.stages_of(unet.model)) | placed_by_plan
    copies_bytes = sum(entry.inclusive_memory for entry in store.residents if entry.device == device and entry.real_model in own)
    budget_bytes = room.free_bytes + room.evictable_bytes + room.present_bytes - _merge_bytes(unet)
    budget_bytes = max(0, int(budget_bytes * budget_share))
    return SlotFacts(
        index=slot.index,
        name=slot.name,
        kind=device.type,
        speed=speed_of(slot, fleet, work),
        budget_bytes=budget_bytes,
        fixed_bytes=min(max(0, room.evictable_bytes - copies_bytes), budget_bytes),
        total_bytes=slot.total_bytes,
        device_key=str(device),
        is_home=device == unet.load_device,
        host_bytes_per_ms=host_bytes_per_ms(slot),
        fetches_ahead=fetches_ahead(slot),
    )


def fetches_ahead(slot: Slot) -> bool:
    """Whether a streamed layer's weights come while the layer before it computes (--cuda-stream)."""
    return memory_management.current_store().config.cuda_stream and slot.torch_device.type == "cuda"


def host_bytes_per_ms(slot: Slot) -> float:
    """How fast weights come from main memory; 0 for a slot whose weights cannot stream."""
    config, device = memory_management.current_store().config, slot.torch_device
    if device.type == "cpu" or memory_management.vram_state_of(device) in (VRAMState.HIGH_VRAM, VRAMState.SHARED):
        return 0.0
    return PINNED_BYTES_PER_MS if config.pin_shared_memory or config.cuda_stream else HOST_BYTES_PER_MS


def _merge_bytes(unet: UnetPatcher) -> int:
    """Memory needed to patch weights: the largest weight in fp32, its change, and their sum."""
    if not unet.lora_patches:
        return 0
    return 3 * 4 * max(parameter.numel() for parameter in unet.model.parameters())


def assuming_idle_evicted(room: SlotFacts) -> SlotFacts:
    """The slot's facts as if every idle model had been evicted."""
    return replace(room, fixed_bytes=0)


def speed_of(slot: Slot, fleet: Fleet, work: str) -> float:
    """FLOPs per ms: measured, else a guess from what the device reports about itself."""
    return fleet.speeds.speed_of(slot.index, work) or guess_speed(slot)


def guess_speed(slot: Slot) -> float:
    kind = slot.torch_device.type
    if kind == "cpu":
        return FLOPS_PER_MS_OF_CPU_THREAD * (slot.cpu_threads or 1)
    if kind == "vgpu":
        return FLOPS_PER_MS_OF_VIRTUAL_GPU
    throughput = describe_device(slot.torch_device).throughput
    return FLOPS_PER_MS_OF_CUDA_THROUGHPUT * throughput if throughput > 0 else FLOPS_PER_MS_OF_UNKNOWN_GPU


def work_of_pieces(plan: Plan, profile: ModelProfile) -> dict[Piece, float]:
    """Work of each of the plan's pieces. One of them may consist of several of the profile's."""
    wanted = {piece for replica in plan.replicas for piece in replica.pieces}
    return {piece: sum(cost.work_per_row for cost in profile.pieces if contains(piece, cost.piece)) for piece in wanted}
