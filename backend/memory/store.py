"""The store: which models are on which device, and the moves that make room. The decisions are in the pure modules of this package.

One lock guards it and is held while a model loads. Knows no job, no page and no settings except BackendConfig.
"""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from backend.devices.device_memory import DeviceBytes, empty_cache, read_device_bytes
from backend.devices.inventory import DeviceFacts, describe_device
from backend.devices.slot import Slot, canonical_device
from backend.memory.budget import load_need_bytes, partial_load_budget_bytes, reserve_bytes
from backend.memory.errors import DeviceRow, OutOfMemory
from backend.memory.eviction import Resident, plan_eviction
from backend.memory.module_bytes import count_module_bytes
from backend.memory.placement import SlotRoom
from backend.memory.recovery import Remedy
from backend.memory.residents import LoadedModel, Placeable
from backend.memory.vram_state import VRAMState, choose_vram_state

if TYPE_CHECKING:
    from backend.args import BackendConfig

logger = logging.getLogger(__name__)

_IDLE_SHARE_WORTH_FREEING = 0.25
_BUDGET_SLACK = 0.1
_STREAM_SHARES = (0.5, 0.0)


class Spare(Protocol):
    """Holds memory that work can do without, such as recorded launches."""

    name: str

    def bytes_on(self, device: torch.device) -> int:
        """Bytes it holds on a device."""
        ...

    def release(self, device: torch.device) -> int:
        """Give them back; returns how many."""
        ...


class MemoryStore:
    """The resident models of all devices, most recently used first."""

    def __init__(self, config: BackendConfig, slots: Sequence[Slot]) -> None:
        if not slots:
            raise ValueError("A memory store was created without slots. Pass the slots from probe_devices, which returns at least one.")
        self.config = config
        self.all_slots = self.slots = tuple(slots)
        """`all_slots`: the slots at startup. `slots`: those that still work."""
        self.residents: list[LoadedModel] = []
        self.wants_empty_cache = False
        self.lost_devices: frozenset[torch.device] = frozenset()
        self._in_use: list[LoadedModel] = []
        self._spares: weakref.WeakSet[Any] = weakref.WeakSet()
        self._held: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._states = {slot.torch_device: self._choose_state(slot) for slot in self.slots}

    @property
    def primary(self) -> Slot:
        return self.slots[0]

    def facts(self, device: torch.device) -> DeviceFacts:
        return describe_device(device)

    def state_of(self, device: torch.device) -> VRAMState:
        """VRAM state of a device. A device without a slot counts as DISABLED (the host) or NORMAL."""
        fallback = VRAMState.DISABLED if device.type == "cpu" else VRAMState.NORMAL_VRAM
        return self._states.get(device, fallback)

    def force_state(self, state: VRAMState | None) -> None:
        """Use all GPUs as `state` says, or as the flags say for None. Models are evicted first if that changes anything."""
        with self._lock:
            chosen = {slot.torch_device: self._choose_state(slot) for slot in self.all_slots}
            if state is not None:
                chosen = {device: old if old in (VRAMState.DISABLED, VRAMState.SHARED) else state for device, old in chosen.items()}
            if chosen != self._states:
                self.unload_all()
                self._states = chosen

    def bytes_of(self, device: torch.device) -> DeviceBytes:
        """Memory of a device now. Idle bytes that only `spares` may use do not count as free."""
        now = read_device_bytes(device)
        kept_bytes = min(now.idle_bytes, sum(spare.bytes_on(device) for spare in self.spares))
        return replace(now, free_bytes=now.free_bytes - kept_bytes, idle_bytes=now.idle_bytes - kept_bytes) if kept_bytes else now

    def add_spare(self, spare: Spare) -> None:
        """Count what `spare` holds, and take it back before any model is evicted. The store does not keep it alive."""
        self._spares.add(spare)

    @property
    def spares(self) -> tuple[Spare, ...]:
        return tuple(self._spares)

    def _release_spares(self, device: torch.device) -> str:
        freed_bytes = sum(spare.release(device) for spare in self.spares)
        if freed_bytes:
            self.empty_cache(device)
        return f"{freed_bytes / 2**20:.0f} MiB of recorded launches dropped on {device}" if freed_bytes else ""

    def lose(self, device: torch.device) -> None:
        """Drop a dead device and everything on it. The last slot stays, because there must be one."""
        with self._lock:
            self.lost_devices |= {device}
            self.residents[:] = [entry for entry in self.residents if entry.device != device]
            self.slots = tuple(slot for slot in self.slots if slot.torch_device != device) or self.slots

    # loading

    def load(self, models: Iterable[Placeable], *, memory_required_bytes: int, inference_bytes: int, preserved_bytes: int) -> None:
        """Make all `models` resident on their load devices, evicting the least recently used others and streaming what does not fit.

        Others are evicted until `memory_required_bytes` of working memory fit as well. The models themselves stream only if not even
        `inference_bytes`, the minimum for work, fit: work can be done in smaller parts, but streaming slows down everything.
        `preserved_bytes` always stay free. Raises: OutOfMemory; RuntimeError for a lost device.
        """
        with self._lock:
            self.drop_dead()
            models = _unique(models)
            self._refuse_lost_devices(models)
            entries = [self._find_or_enter(model) for model in models]
            self._in_use = entries
            for device in dict.fromkeys(entry.device for entry in entries):
                mine = [entry for entry in entries if entry.device == device]
                reserved_bytes = reserve_bytes(inference_bytes, self.bytes_of(device).total_bytes)
                self._make_room(device, mine, max(reserved_bytes, memory_required_bytes) + preserved_bytes)
                for entry in mine:
                    self._place(entry, reserved_bytes + preserved_bytes)

    def _refuse_lost_devices(self, models: Iterable[Placeable]) -> None:
        for model in models:
            if canonical_device(model.load_device) in self.lost_devices:
                raise RuntimeError(
                    f"{type(model.model).__name__} cannot be loaded on {model.load_device}, which has stopped working. Load the checkpoint again; "
                    "its parts then go to the remaining devices."
                )

    def _make_room(self, device: torch.device, entries: Sequence[LoadedModel], work_bytes: int) -> None:
        missing_bytes, present_bytes = sum(entry.exclusive_memory for entry in entries), sum(entry.inclusive_memory for entry in entries)
        need_bytes = work_bytes + (load_need_bytes(missing_bytes, present_bytes) if missing_bytes else 0)
        self.free(need_bytes, device, keep=entries)

    def _find_or_enter(self, model: Placeable) -> LoadedModel:
        """The entry of a model, moved to or added at the front of the list. An entry of the same network on another device is dropped."""
        entry = next((one for one in self.residents if one.holds(model)), None)
        self.forget_network(model, but=entry)
        if entry is None:
            entry = LoadedModel(model)
        else:
            self.residents.remove(entry)
            entry.adopt(model)
        self.residents.insert(0, entry)
        entry.compute_inclusive_exclusive_memory()
        return entry

    def _place(self, entry: LoadedModel, keep_free_bytes: int) -> None:
        budget_bytes = self._choose_budget(entry, keep_free_bytes)
        if _is_placed(entry, budget_bytes):
            entry.apply_patches()
            return
        try:
            entry.model_load(budget_bytes, pin=self.config.pin_shared_memory, ahead=self.config.cuda_stream)
        except torch.OutOfMemoryError as error:
            raise self._give_up(entry) from error
        self._log_placed(entry)

    def _give_up(self, entry: LoadedModel) -> OutOfMemory:
        """Unload a model that did not fit, and make the error."""
        self.residents.remove(entry)
        entry.model_unload()
        self.empty_cache(entry.device, collect=True)
        return self.out_of_memory(f"loading {entry.name}", entry.device, entry.exclusive_memory)

    def _choose_budget(self, entry: LoadedModel, keep_free_bytes: int) -> int:
        """-1 for the whole model, else the bytes that may be resident while the rest streams."""
        state = self.state_of(entry.device)
        if (
            getattr(entry.model, "must_be_whole", False)
            or entry.device == entry.offload_device
            or entry.device.type == "cpu"
            or state in (VRAMState.HIGH_VRAM, VRAMState.SHARED)
        ):
            return -1
        if state == VRAMState.NO_VRAM or self.config.cpu_offload:
            return 0
        free_bytes = self.bytes_of(entry.device).free_bytes
        planned_bytes: int | None = getattr(entry.model, "weight_budget_bytes", None)
        if free_bytes - entry.exclusive_memory - keep_free_bytes >= 0:
            return -1
        if planned_bytes is not None:
            return min(planned_bytes, free_bytes + entry.inclusive_memory)
        return partial_load_budget_bytes(free_bytes + entry.inclusive_memory, keep_free_bytes)

    def _log_placed(self, entry: LoadedModel) -> None:
        if entry.streamed is None:
            logger.info("%s on %s: %.0f MiB.", entry.name, entry.device, entry.inclusive_memory / 2**20)
        else:
            logger.info(
                "%s on %s: %.0f MiB resident, %.0f MiB streamed from main memory (it does not fit whole, or a flag requires it).",
                entry.name,
                entry.device,
                entry.streamed.resident_bytes / 2**20,
                entry.streamed.streamed_bytes / 2**20,
            )

    # freeing

    def free(self, need_bytes: int, device: torch.device, *, keep: Sequence[LoadedModel] = (), free_all: bool = False) -> None:
        """Evict from `device`, least recently used first, until more than `need_bytes` are free or only `keep` and the job's models are left."""
        with self._lock:
            self.drop_dead()
            before = self.bytes_of(device)
            if before.free_bytes <= need_bytes and self._release_spares(device):
                before = self.bytes_of(device)
            evict_all = free_all or self.config.always_offload or self.state_of(device) == VRAMState.NO_VRAM
            has_room = not evict_all and before.free_bytes > need_bytes  # usual, and counting bytes takes a walk through every network
            on_device = [] if has_room else [entry for entry in self.residents if entry.device == device]
            victims = plan_eviction(
                [
                    Resident(key=index, frees_bytes=_bytes_freed(entry), pinned=entry in keep or self._is_held(entry))
                    for index, entry in enumerate(on_device)
                ],
                need_bytes=need_bytes,
                free_bytes=before.free_bytes,
                evict_all=evict_all,
            )
            for victim in victims:
                self._evict(on_device[victim.key])
            if victims or before.idle_bytes > _IDLE_SHARE_WORTH_FREEING * max(1, before.free_bytes):
                self.empty_cache(device)

    def _evict(self, entry: LoadedModel) -> None:
        self.residents.remove(entry)
        entry.model_unload()
        logger.debug("%s was evicted from %s.", entry.name, entry.device)

    def hold(self, models: Iterable[Placeable]) -> None:
        """Protect these models from eviction, instead of those held before. Pass none when a job has ended."""
        with self._lock:
            self._held = weakref.WeakSet(model.model for model in models)

    def _is_held(self, entry: LoadedModel) -> bool:
        module = entry.real_model
        return module is not None and module in self._held

    def unload_all(self) -> None:
        """Take every model off every device."""
        with self._lock:
            self.drop_dead()
            leaving = list(self.residents)
            for entry in leaving:
                self._evict(entry)
        for device in dict.fromkeys(entry.device for entry in leaving):
            self.empty_cache(device, collect=True)

    def forget_network(self, model: Placeable, but: LoadedModel | None = None) -> None:
        """Drop the entries of a patcher's network without moving weights."""
        with self._lock:
            for entry in [one for one in self.residents if one is not but and one.real_model is model.model]:
                entry.model_unload(avoid_model_moving=True)
                self.residents.remove(entry)

    def drop_dead(self) -> None:
        """Drop the entries whose network no longer exists."""
        with self._lock:
            self._in_use = [entry for entry in self._in_use if entry.is_alive]
            self.residents[:] = [entry for entry in self.residents if entry.is_alive]

    def empty_cache(self, device: torch.device, *, collect: bool = False) -> None:
        """Return a device's idle memory to the driver. With `collect`, first run a full garbage collection, which frees reference cycles."""
        if collect:
            gc.collect()
        empty_cache(device)
        self.wants_empty_cache = False

    # recovering

    def remedies(self, device: torch.device, keep: Sequence[LoadedModel] | None = None) -> tuple[Remedy, ...]:
        """Remedies, mildest first, for work on `device` that runs out of memory while it uses `keep`.

        `keep` defaults to the models of the last `load` and those that a job holds.
        """
        if keep is None:
            keep = [entry for entry in self.residents if entry in self._in_use or self._is_held(entry)]
        streams = [partial(self._stream_more, entry, share) for share in _STREAM_SHARES for entry in keep if entry.device == device]
        return (partial(self._collect, device), partial(self._release_spares, device), partial(self._evict_others, device, keep), *streams)

    def _collect(self, device: torch.device) -> str:
        before = self.bytes_of(device)
        self.empty_cache(device, collect=True)
        freed_bytes = self.bytes_of(device).free_bytes - before.free_bytes
        return "idle memory was released" if before.idle_bytes > 0 or freed_bytes > 0 else ""

    def _evict_others(self, device: torch.device, keep: Sequence[LoadedModel]) -> str:
        with self._lock:
            before = list(self.residents)
            self.free(0, device, keep=keep, free_all=True)
            left = [entry.name for entry in before if entry not in self.residents]
        return f"{', '.join(left)} evicted from {device}" if left else ""

    def _stream_more(self, entry: LoadedModel, share: float) -> str:
        """Keep only this share of the network's resident weights on the device."""
        with self._lock:
            entry.compute_inclusive_exclusive_memory()
            if not entry.is_alive or entry.offload_device == entry.device or entry.inclusive_memory == 0:
                return ""
            entry.model_load(int(entry.inclusive_memory * share), pin=self.config.pin_shared_memory, ahead=self.config.cuda_stream)
            self.empty_cache(entry.device)
        return f"{entry.name} streams more of its weights from main memory"

    # choosing

    def rooms(self, slots: Sequence[Slot], model: nn.Module | None = None) -> tuple[SlotRoom, ...]:
        """The room that each slot has for `model` now: free, evictable, and the part of the model already there."""
        return tuple(self._room(slot, model) for slot in slots)

    def _room(self, slot: Slot, model: nn.Module | None) -> SlotRoom:
        device = slot.torch_device
        others = [entry for entry in self.residents if entry.device == device and not _is_part(entry.real_model, model)]
        return SlotRoom(
            index=slot.index,
            total_bytes=slot.total_bytes,
            free_bytes=self.bytes_of(device).free_bytes,
            evictable_bytes=sum(_bytes_freed(entry) for entry in others if not self._is_held(entry)),
            present_bytes=0 if model is None else count_module_bytes(model, lambda tensor: tensor.device == device).total_bytes,
        )

    # describing

    def describe(self) -> tuple[DeviceRow, ...]:
        """A row per device: total, free, and the models on it."""
        rows = []
        for device in dict.fromkeys(slot.torch_device for slot in self.slots):
            now, facts = self.bytes_of(device), self.facts(device)
            holders = tuple((entry.name, entry.inclusive_memory) for entry in self.residents if entry.device == device)
            holders += tuple((spare.name, held_bytes) for spare in self.spares if (held_bytes := spare.bytes_on(device)))
            rows.append(DeviceRow(device=str(device), name=facts.name, total_bytes=now.total_bytes, free_bytes=now.free_bytes, holders=holders))
        return tuple(rows)

    def out_of_memory(self, what: str, device: torch.device, need_bytes: int | None) -> OutOfMemory:
        """The error for `what`, with the current table of devices."""
        return OutOfMemory(what, device=str(device), need_bytes=need_bytes, table=self.describe())

    def _choose_state(self, slot: Slot) -> VRAMState:
        return choose_vram_state(self.facts(slot.torch_device).kind, self.config.vram_mode, slot.total_bytes)


def _is_placed(entry: LoadedModel, budget_bytes: int) -> bool:
    """Whether a model is already on its device as the budget requires. A streamed one may differ by a tenth, to avoid moves."""
    if budget_bytes < 0 or entry.streamed is None:
        return budget_bytes < 0 and entry.streamed is None and entry.exclusive_memory == 0
    return abs(budget_bytes - entry.streamed.budget_bytes) <= _BUDGET_SLACK * budget_bytes


def _is_part(module: nn.Module | None, model: nn.Module | None) -> bool:
    """Whether an entry's module is `model`, or a stage made of its layers, whose bytes are the model's own."""
    if module is None or model is None or module is model:
        return module is model
    first = next(module.parameters(), None)
    return first is not None and any(parameter is first for parameter in model.parameters())


def _bytes_freed(entry: LoadedModel) -> int:
    entry.compute_inclusive_exclusive_memory()
    return entry.inclusive_memory if entry.offload_device != entry.device else 0


def _unique(models: Iterable[Placeable]) -> list[Placeable]:
    """The models without repeated networks; the first of each is kept."""
    seen: dict[int, Placeable] = {}
    for model in models:
        seen.setdefault(id(model.model), model)
    return list(seen.values())
