"""Turns flags and the machine's devices into slots. `choose_slots` is pure; `probe_devices` queries the machine for it."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

from backend.devices.inventory import DeviceFacts, Inventory, take_inventory
from backend.devices.slot import Slot, format_bytes

if TYPE_CHECKING:
    from backend.args import BackendConfig

logger = logging.getLogger(__name__)


class DeviceError(ValueError):
    """The flags ask for devices that are not available. The message lists the devices that exist."""


def probe_devices(config: BackendConfig) -> tuple[Slot, ...]:
    """The slots of this process, the primary first. Logs one line of slots and one of GPUs that stay idle.

    Raises: DeviceError.
    """
    inventory = take_inventory(config.virtual_gpus_bytes)
    slots = choose_slots(inventory, config)
    logger.info("Devices: %s", "; ".join(str(slot) for slot in slots))
    idle = describe_idle_gpus(inventory, slots, config)
    if idle:
        logger.info("%s", idle)
    return slots


def choose_slots(inventory: Inventory, config: BackendConfig) -> tuple[Slot, ...]:
    """Slots for the devices that the flags name, in that order.

    Without a name: every GPU with `--multi-gpu`, otherwise the first. Without GPUs, or with `--always-cpu`: one CPU slot.
    Raises: DeviceError.
    """
    if config.vram_mode == "cpu" and not _names_only_cpus(config.device_ids):
        chosen: tuple[DeviceFacts, ...] = (inventory.cpu,)
    elif config.device_ids:
        chosen = tuple(_find_device(name, inventory) for name in config.device_ids)
        _refuse_shared(chosen, config)
    elif inventory.gpus:
        chosen = inventory.gpus if config.multi_gpu else inventory.gpus[:1]
    else:
        chosen = (inventory.cpu,)
    return _make_slots(chosen, inventory, config)


def describe_idle_gpus(inventory: Inventory, slots: tuple[Slot, ...], config: BackendConfig) -> str:
    """One line with the GPUs that will get no work and the flag that would change that; empty if there are none."""
    working = {slot.torch_device for slot in (slots if config.multi_gpu else slots[:1])}
    idle = [f"{facts.torch_device} ({facts.name})" for facts in inventory.gpus if facts.torch_device not in working]
    if not idle:
        return ""
    if not config.multi_gpu:
        remedy = "--multi-gpu uses every GPU, or those that --device-id names"
    elif config.device_ids:
        remedy = f"--device-id {','.join(config.device_ids)} does not name it" if len(idle) == 1 else "--device-id does not name them"
    else:
        remedy = "--always-cpu keeps work on the CPU"
    return f"{len(idle)} GPU{'s' if len(idle) > 1 else ''} idle: {', '.join(idle)}; {remedy}."


def _names_only_cpus(device_ids: tuple[str, ...]) -> bool:
    return bool(device_ids) and all(name.strip().lower() == "cpu" for name in device_ids)


def _find_device(name: str, inventory: Inventory) -> DeviceFacts:
    """A device by its GPU number, its torch name ("cuda:1", "mps"), or "cpu"."""
    wanted = name.strip().lower()
    if wanted == "cpu":
        return inventory.cpu
    for index, facts in enumerate(inventory.gpus):
        names = {str(index), str(facts.torch_device)} | ({facts.torch_device.type} if index == 0 else set())
        if wanted in names:
            return facts
    raise DeviceError(f"--device-id {name}: there is no such device. Available: {_list_devices(inventory)}. {_device_remedy(inventory)}")


def _list_devices(inventory: Inventory) -> str:
    gpus = [f"{index} = {facts.torch_device} ({facts.name}, {format_bytes(facts.total_bytes)})" for index, facts in enumerate(inventory.gpus)]
    return ", ".join([*gpus, f"cpu ({inventory.num_cpu_cores} cores, {format_bytes(inventory.cpu.total_bytes)})"])


def _device_remedy(inventory: Inventory) -> str:
    if inventory.gpus:
        return "Name one of these, or omit --device-id to use the first."
    return (
        f"torch {inventory.torch_build} sees no GPU: check the driver (nvidia-smi) and that torch is built for your GPU, "
        "or use --device-id cpu, or try --virtual-gpus 4GB,4GB."
    )


def _refuse_shared(chosen: tuple[DeviceFacts, ...], config: BackendConfig) -> None:
    counts = Counter(str(facts.torch_device) for facts in chosen if facts.kind != "cpu")
    shared = [device for device, count in counts.items() if count > 1]
    if shared and not config.allow_shared_slots:
        raise DeviceError(
            f"--device-id {','.join(config.device_ids)}: names {shared[0]} {counts[shared[0]]} times. One device is one slot. Name it once, or "
            "add --allow-shared-slots to put several slots on it (for tests of order and numerics, not for speed)."
        )


def _make_slots(chosen: tuple[DeviceFacts, ...], inventory: Inventory, config: BackendConfig) -> tuple[Slot, ...]:
    counts = Counter(facts.torch_device for facts in chosen)
    threads = config.cpu_threads_per_slot or max(1, inventory.num_cpu_cores // max(1, counts[inventory.cpu.torch_device]))
    return tuple(
        Slot(
            index=index,
            torch_device=facts.torch_device,
            name=facts.name,
            total_bytes=facts.total_bytes // counts[facts.torch_device],
            relative_speed=_relative_speed(facts, chosen[0]),
            cpu_threads=threads if facts.kind == "cpu" else None,
        )
        for index, facts in enumerate(chosen)
    )


def _relative_speed(facts: DeviceFacts, first: DeviceFacts) -> float:
    known = facts.kind == first.kind and facts.throughput > 0 and first.throughput > 0
    return facts.throughput / first.throughput if known else 1.0
