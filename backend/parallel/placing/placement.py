"""Puts a plan's networks in place: copies of the denoiser on other slots (replica modules), and the stages of one network on several devices.

Memory management moves the bytes, and counts and evicts them like those of any model. Every copy has the same parameter names.
Must not know guidance or samplers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from backend import memory_management
from backend.nn.owner import owner_of
from backend.parallel.placing.fleet import Fleet
from backend.parallel.placing.replica_modules import META, ReplicaModules, ReplicaPatcher
from backend.parallel.planning.plan import Piece, Plan, ReplicaPlan, StreamedWeights
from backend.parallel.running.executor import Replica
from backend.parallel.running.residuals import ControlPlace
from backend.patcher.base import ModelPatcher
from backend.patcher.unet import UnetPatcher

if TYPE_CHECKING:
    from backend.modules.k_model import KModel


class UNetStage(nn.Module):
    """The layers on one device, moved as one module. It shares its modules with the network and owns none."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


@dataclass(eq=False)
class StagePatcher:
    """A stage as memory management sees it. Its weights may stream if the device is too small."""

    model: UNetStage
    load_device: torch.device
    offload_device: torch.device
    current_device: torch.device
    replica: ReplicaPatcher | None = None
    must_be_whole: bool = False
    weight_budget_bytes: int | None = None
    """Room for its weights if the plan streams the rest; None leaves it to memory management."""

    def prepare_load(self, device: torch.device) -> None:
        """If the stage belongs to a replica module without weights, copy them."""
        if self.replica is not None:
            self.replica.fill(self.model, device)


@dataclass(eq=False)
class PlacedPlan:
    """A plan whose networks are in place, and the patchers that memory management keeps resident for it."""

    plan: Plan
    replicas: tuple[Replica, ...]
    patchers: tuple[UnetPatcher | ReplicaPatcher | StagePatcher, ...]


@dataclass(eq=False)
class Copies:
    """The copies and stages that plans have made of one network. Its owner keeps them for later plans."""

    replicas: ReplicaModules = field(default_factory=ReplicaModules)
    stages: dict[tuple[int, torch.device], tuple[frozenset[int], StagePatcher]] = field(default_factory=dict)

    @property
    def networks(self) -> set[nn.Module]:
        """The modules under which memory management knows these copies and stages."""
        return self.replicas.networks | {stage.model for _, stage in self.stages.values()}

    def stages_of(self, network: nn.Module) -> set[nn.Module]:
        """The stages that consist of this network's own layers."""
        return {stage.model for (serial, _), (_, stage) in self.stages.items() if serial == owner_of(network).serial}

    def release_stages(self, network: nn.Module) -> None:
        """Forget a network's stages. Its weights stay where they are."""
        for key in [key for key in self.stages if key[0] == owner_of(network).serial]:
            _, stage = self.stages.pop(key)
            memory_management.unload_model_clones(stage)


def copies_of(network: KModel) -> Copies:
    return owner_of(network).part(Copies)


def place_plan(
    unet: UnetPatcher, plan: Plan, fleet: Fleet, *, working_bytes: int, preserved_bytes: int = 0,
    extra_models: Sequence[ModelPatcher] = (), work_per_row: Mapping[Piece, float] | None = None,
    controls: Sequence[Mapping[nn.Module, ControlPlace]] = (),
) -> PlacedPlan:  # fmt: skip
    """Make the plan's networks resident, with room for `working_bytes` on each device, and protect them from eviction.

    `extra_models` (ControlNets) are loaded with them. `controls`: for each replica, where its ControlNets run.

    Raises: OutOfMemory, SlotLost.
    """
    placer = _Placer(unet, fleet, plan.streamed)
    places = controls or [{}] * len(plan.replicas)
    replicas = tuple(placer.add(replica, work_per_row or {}, controls) for replica, controls in zip(plan.replicas, places, strict=True))
    patchers = tuple(placer.patchers)
    placer.vacate_former_places()
    memory_management.load_models_gpu([*patchers, *extra_models], memory_required=working_bytes, hard_memory_preservation=preserved_bytes)
    memory_management.hold_models([*patchers, *extra_models])
    placer.finish()
    return PlacedPlan(plan, replicas, patchers)


def place_whole(unet: UnetPatcher) -> None:
    """Undo a split into stages, so that memory management places the network as a whole. Weights move when it does."""
    copies_of(unet.model).release_stages(unet.model)


class _Placer:
    """Gives each replica of a plan a network, and lists what must be loaded."""

    def __init__(self, unet: UnetPatcher, fleet: Fleet, streamed: Mapping[int, StreamedWeights]) -> None:
        self.unet, self.fleet = unet, fleet
        self._budgets = {fleet.device(slot): one.budget_bytes for slot, one in streamed.items()}
        self.copies = copies_of(unet.model)
        self.patchers: list[UnetPatcher | ReplicaPatcher | StagePatcher] = []
        self._whole_on: dict[torch.device, KModel] = {}
        self._own_is_given = False
        self._replicas: list[tuple[int, ReplicaPatcher]] = []
        self._is_split = False

    def add(self, replica: ReplicaPlan, work_per_row: Mapping[Piece, float], controls: Mapping[nn.Module, ControlPlace]) -> Replica:
        network = self._network_for(replica)
        return Replica(program=network.program, plan=replica, work_per_row=work_per_row, controls=controls)

    def _network_for(self, replica: ReplicaPlan) -> KModel:
        devices = {self.fleet.device(slot) for slot in replica.used_slots}
        device = next(iter(devices)) if len(devices) == 1 else None
        if device is not None and device in self._whole_on and self._can_be_shared():
            return self._whole_on[device]
        if not self._own_is_given:
            self._own_is_given = True
            copied, network = None, self.unet.model
        else:
            copied = self._replica_patcher_for(replica)
            network = cast("KModel", copied.model)
        if device is None or (copied is None and device != self.unet.load_device):
            self._add_stages(network, replica, copied)
        else:
            self.copies.release_stages(network)
            self.patchers.append(copied or self.unet)
            self._whole_on[device] = network
        return network

    def _can_be_shared(self) -> bool:
        """Whether two workers may run one network at once: not if layers change while they run."""
        return not self.unet.model.is_compact and not self.unet.has_online_lora()

    def _replica_patcher_for(self, replica: ReplicaPlan) -> ReplicaPatcher:
        key = tuple(sorted(replica.used_slots))
        device = self.fleet.device(replica.slots[0])
        copied = self.copies.replicas.get(key)
        if copied is None or copied.load_device != device:
            copied = self.copies.replicas[key] = ReplicaPatcher.make(self.unet, self.unet.model.make_empty(), device)
        copied.source = self.unet
        self._replicas.append((replica.slots[0], copied))
        return copied

    def _add_stages(self, network: KModel, replica: ReplicaPlan, copied: ReplicaPatcher | None) -> None:
        """One patcher per device, with all layers that run there. The time embedding belongs to the first device."""
        self._is_split = True
        by_device: dict[torch.device, list[nn.Module]] = {
            self.fleet.device(replica.slots[0]): [layer for _, layer in network.program.embedding.named_layers]
        }
        for piece, slot in zip(replica.pieces, replica.slots):
            by_device.setdefault(self.fleet.device(slot), []).extend(layer for _, layer in network.program.piece_layers(piece))
        for key in [key for key in self.copies.stages if key[0] == owner_of(network).serial and key[1] not in by_device]:
            memory_management.unload_model_clones(self.copies.stages.pop(key)[1])
        for device, layers in by_device.items():
            self.patchers.append(self._stage(network, device, layers, copied))

    def _stage(self, network: KModel, device: torch.device, layers: Sequence[nn.Module], copied: ReplicaPatcher | None) -> StagePatcher:
        key, held = (owner_of(network).serial, device), frozenset(id(layer) for layer in layers)
        known = self.copies.stages.get(key)
        if known is not None and known[0] == held:
            known[1].weight_budget_bytes = self._budgets.get(device)
            return known[1]
        if known is not None:
            memory_management.unload_model_clones(known[1])
        offload = META if copied is not None else self.unet.offload_device
        stage = StagePatcher(UNetStage(layers), device, offload, offload, replica=copied, must_be_whole=copied is not None)
        stage.weight_budget_bytes = self._budgets.get(device)
        self.copies.stages[key] = (held, stage)
        return stage

    def vacate_former_places(self) -> None:
        """Unload the patcher of a whole network if the network is split into stages now.

        Layers that change slots leave the old slot before any arrives on the new one. Otherwise, when two slots swap layers, one of them would
        have both for a moment, which would raise its peak.
        """
        for stage in self.patchers:
            if isinstance(stage, StagePatcher):
                _vacate_other_slots(stage)
        if owner_of(self.unet.model).serial in {key[0] for key in self.copies.stages}:
            memory_management.unload_model_clones(self.unet)
        for copied in self.copies.replicas.values():
            if owner_of(copied.model).serial in {key[0] for key in self.copies.stages}:
                memory_management.unload_model_clones(copied)

    def finish(self) -> None:
        """Apply the job's patches to attributes and weights, on all devices at once."""
        if owner_of(self.unet.model).serial in {key[0] for key in self.copies.stages}:
            self.unet.model.predictor.to(self.unet.load_device)
            self.unet.forge_patch_model(None)
            _changing_weights(self.unet.load_device, self.unet.refresh_loras)
        changes: list[tuple[ReplicaPatcher, Future[None]]] = [
            (copied, self.fleet.worker(slot).submit(copied.refresh_replica)) for slot, copied in self._replicas
        ]
        for copied, change in changes:
            _changing_weights(copied.load_device, change.result)


def _vacate_other_slots(stage: StagePatcher) -> None:
    """Move the stage's layers that are on other slots' devices to the stage's offload device."""
    for layer in stage.model.layers:
        devices = {tensor.device for tensor in (*layer.parameters(), *layer.buffers())}
        if devices - {stage.load_device, stage.offload_device, META, torch.device("cpu")}:
            memory_management.module_move(layer, stage.offload_device)


def _changing_weights(device: torch.device, run: Callable[[], object]) -> None:
    """`run()`. Raises: OutOfMemory for `device` if it runs out of memory."""
    try:
        run()
    except torch.OutOfMemoryError as error:
        raise memory_management.out_of_memory("changing weights (LoRA)", device) from error
