"""VAE decoding on every slot: deals several pictures to the slots, or splits the rows of one picture over them.

The result equals decoding each picture whole and alone (for a split picture up to rounding). Knows no samplers, options or pages.

Shapes: BCHW latents as the network takes them, and pictures in -1..1.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from backend import memory_management, profiler
from backend.devices.slot import Slot
from backend.memory.errors import OutOfMemory
from backend.nn.empty_network import copy_without_weights
from backend.nn.owner import owner_of
from backend.parallel.exchange.tile_task import Submit
from backend.parallel.placing.fleet import Fleet, current_fleet
from backend.parallel.placing.replica_modules import ReplicaModules, ReplicaPatcher
from backend.parallel.planning.candidate import deal_by_speed
from backend.parallel.planning.live_facts import guess_speed
from backend.parallel.planning.vae_cost import DecoderSize, LinkCost, decode_macs, divide_rows, worth_splitting
from backend.parallel.running.lost_slots import drop_dead_slots
from backend.parallel.running.worker import SlotLost, SlotWorker
from backend.parallel.vae.layers import has_strips
from backend.parallel.vae.split import CannotSplit, DecoderShard, SplitDecoder
from backend.patcher.vae import DecodeJob

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

logger = logging.getLogger(__name__)

_SHARED_LINK = LinkCost(exchange_s=1e-4, bytes_per_s=4e9)
"""Slots that share one memory: an exchange only wakes threads."""
_HALO_MARGIN = 1.25
"""A strip also needs its neighbors' boundary rows, and all keys and values of the attention."""


def decode_on_all_slots(job: DecodeJob, latents_BCHW: Tensor) -> Tensor | None:
    """A `SlotDecoder`: pictures on the job's output device in fp32, -1..1. None if one slot should decode, including after a failure.

    Raises: Cancelled; SlotLost or torch.AcceleratorError if the VAE's own weights were on a lost slot.
    """
    fleet = current_fleet()
    slots = fleet.working_slots
    if len(slots) < 2 or not fleet.is_divided or job.device not in {slot.torch_device for slot in slots}:
        return None
    work = f"{owner_of(job.network).serial} decode"
    try:
        return _decode(job, latents_BCHW, fleet, slots, work)
    except (CannotSplit, OutOfMemory, torch.OutOfMemoryError) as error:
        logger.info("The VAE decodes on one slot: %s", error)
    except (SlotLost, torch.AcceleratorError) as error:
        drop_dead_slots(fleet)
        if job.device in memory_management.lost_devices():
            raise
        logger.warning("The VAE decodes on one slot: %s", error)
    memory_management.soft_empty_cache(force=True)
    return None


def _decode(job: DecodeJob, latents_BCHW: Tensor, fleet: Fleet, slots: Sequence[Slot], work: str) -> Tensor | None:
    num_images, _, height, width = latents_BCHW.shape
    speeds = [fleet.speeds.speed_of(slot.index, work) or guess_speed(slot) for slot in slots]
    size = DecoderSize.from_config(cast("Any", job.network).config)
    num_dealt = num_images - num_images % len(slots)
    macs = decode_macs(height, width, size)
    split_pays = has_strips(job.network) and worth_splitting(
        height,
        width,
        len(slots),
        speeds=[speed / max(speeds) for speed in speeds],
        macs_per_s=max(speeds) * 1000 / 2,
        link=_link_of(slots),
        bytes_per_number=job.dtype.itemsize,
        size=size,
    )
    if not split_pays and num_dealt < num_images:
        num_dealt = num_images if num_images > 1 else 0
    if num_dealt == 0 and not split_pays:
        return None
    rows_share = 1.0 if num_dealt else max(divide_rows(height, speeds)) / height
    networks = _place(job, slots, min(1.0, rows_share * _HALO_MARGIN))
    parts = []
    if num_dealt:
        parts.append(_deal(job, latents_BCHW[:num_dealt], fleet, slots, networks, deal_by_speed(num_dealt, speeds), work, macs))
    if num_dealt < num_images:
        shards = [
            DecoderShard(
                network=networks[slot.index], device=slot.torch_device, run=_timed(fleet.worker(slot.index), slot), speed=speed / max(speeds)
            )
            for slot, speed in zip(slots, speeds)
        ]
        decoder = SplitDecoder(shards, output_device=job.output_device, transport=fleet.transport)
        parts.append(decoder.decode(latents_BCHW[num_dealt:]).float())
    return torch.cat(parts)


def _timed(worker: SlotWorker, slot: Slot) -> Submit:
    """The worker's `submit` with a span around each function: what a strip computes between two waits for its neighbors."""

    def submit(function: Callable[[], None], /) -> Future[None]:
        def run() -> None:
            with profiler.recorder().measure("VAE", "decode a strip", device=slot.torch_device, slot=slot.index):
                function()

        return worker.submit(run)

    return submit


def _link_of(slots: Sequence[Slot]) -> LinkCost:
    return _SHARED_LINK if all(slot.torch_device.type in ("cpu", "vgpu") for slot in slots) else LinkCost()


def _place(job: DecodeJob, slots: Sequence[Slot], share: float) -> dict[int, AutoencoderKL]:
    """Put the VAE on every slot's device, with room for a share of the decode: the network itself on its device, replica modules elsewhere.

    Raises: OutOfMemory.
    """
    devices = dict.fromkeys(slot.torch_device for slot in slots)
    replicas = {device: _replica_on(job, device) for device in devices if device != job.device}
    memory_management.load_models_gpu([job.patcher, *replicas.values()], memory_required=int(share * job.need_bytes))
    for replica in replicas.values():
        replica.refresh_replica()
    return {slot.index: replicas[slot.torch_device].model if slot.torch_device in replicas else job.network for slot in slots}


def _replica_on(job: DecodeJob, device: torch.device) -> ReplicaPatcher:
    """The replica on a device. Made once per device and dtype, and kept by the network's owner."""
    replicas = owner_of(job.network).part(ReplicaModules)
    key = (device, job.dtype)
    if key not in replicas:
        replicas[key] = ReplicaPatcher.make(job.patcher, copy_without_weights(job.network), device)
    replicas[key].source = job.patcher
    return replicas[key]


def _deal(
    job: DecodeJob,
    latents_BCHW: Tensor,
    fleet: Fleet,
    slots: Sequence[Slot],
    networks: dict[int, AutoencoderKL],
    shares: Sequence[int],
    work: str,
    macs: int,
) -> Tensor:
    """Decode whole pictures, one at a time on each slot. Returns them in the order of the latents."""
    done: list[Future[Tensor]] = []
    for slot, share in zip(slots, shares):
        record = partial(fleet.speeds.record, slot.index, work, 2.0 * macs)
        for _ in range(share):
            latent_1CHW = latents_BCHW[len(done) : len(done) + 1]
            run = partial(_decode_one, networks[slot.index], latent_1CHW, slot, job, record)
            done.append(fleet.worker(slot.index).submit(run))
    failures = [failure for failure in (future.exception() for future in done) if failure is not None]
    if failures:
        raise failures[0]
    return torch.cat([future.result() for future in done])


def _decode_one(network: Any, latent_1CHW: Tensor, slot: Slot, job: DecodeJob, record_ms: Callable[[float], None]) -> Tensor:
    """Decode one picture, on the slot's worker."""
    started = time.perf_counter()
    with profiler.recorder().measure("VAE", "decode", device=slot.torch_device, slot=slot.index, rows=1):
        picture_1CHW: Tensor = network.decode(latent_1CHW.to(device=slot.torch_device, dtype=job.dtype), return_dict=False)[0]
        arrived_1CHW = picture_1CHW.to(device=job.output_device, dtype=torch.float32)
    record_ms((time.perf_counter() - started) * 1000.0)
    return arrived_1CHW
