"""The ControlNets of a plan: what each costs, and its copies on the slots where it runs.

On its patcher's own load device a ControlNet is the network itself; elsewhere it is a replica module. Must not know hints, chains or samplers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from backend.memory.module_bytes import count_module_bytes
from backend.nn.controlnet import ControlNetwork
from backend.nn.empty_network import META
from backend.nn.owner import owner_of
from backend.parallel.placing.fleet import Fleet
from backend.parallel.placing.replica_modules import ReplicaModules, ReplicaPatcher
from backend.parallel.planning.costs import ComponentCost
from backend.parallel.planning.plan import Plan
from backend.parallel.running.residuals import ControlPlace
from backend.patcher.base import ModelPatcher


class ControlLink(Protocol):
    """A ControlNet in a chain that may run on any slot."""

    control_model_wrapped: ModelPatcher
    name: str


class CopyableNetwork(Protocol):
    """A network that can make an empty copy of itself."""

    def make_empty(self) -> nn.Module:
        """A network of the same kind with the same names and types; without weights inside `META`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlannedControlNetwork:
    """One ControlNet's network, which runs for every row. `links` is how many links of the chain use it, `work` the key of its measured speeds."""

    name: str
    patcher: ModelPatcher
    links: int
    work: str

    @property
    def network(self) -> nn.Module:
        network: nn.Module = self.patcher.model
        return network

    @property
    def networks(self) -> set[nn.Module]:
        """The network and its replica modules: all modules under which memory management knows it."""
        return {self.network, *owner_of(self.network).part(ReplicaModules).networks}


def collect_control_networks(links: Sequence[ControlLink], work: str) -> tuple[PlannedControlNetwork, ...]:
    """The networks of a chain's links, each once. `work` is the denoiser's key for measured speeds."""
    patchers = {owner_of(link.control_model_wrapped.model).serial: link.control_model_wrapped for link in links}
    control_networks = []
    for number, (key, patcher) in enumerate(patchers.items()):
        name = "ControlNet" if len(patchers) == 1 else f"ControlNet {number + 1}"
        count = sum(link.control_model_wrapped.model is patcher.model for link in links)
        control_networks.append(PlannedControlNetwork(name=name, patcher=patcher, links=count, work=f"{work} with {key}"))
    return tuple(control_networks)


def control_network_costs(
    control_networks: Sequence[PlannedControlNetwork], cost: ComponentCost, fleet: Fleet, work: str
) -> tuple[ComponentCost, ...]:
    """Costs for the planner, from the cost of one ControlNet for this denoiser.

    The planner divides work by a slot's speed at the denoiser's work (`work`), so each ControlNet's FLOPs are scaled by how much slower it was
    measured to run.
    """
    return tuple(
        replace(
            cost,
            name=control.name,
            weight_bytes=count_module_bytes(control.network).total_bytes,
            flops_per_row=cost.flops_per_row * control.links * _slowness(control, fleet, work),
            num_kernels=cost.num_kernels * control.links,
            tiles=cost.tiles if isinstance(control.network, ControlNetwork) and control.network.why_no_tiles() is None else None,
        )
        for control in control_networks
    )


def _slowness(control: PlannedControlNetwork, fleet: Fleet, work: str) -> float:
    """How much slower this network runs than the denoiser, averaged over slots where both were measured; 1 if there is no such slot."""
    pairs = [(fleet.speeds.speed_of(slot.index, work), fleet.speeds.speed_of(slot.index, control.work)) for slot in fleet.working_slots]
    ratios = [whole / own for whole, own in pairs if whole and own]
    return sum(ratios) / len(ratios) if ratios else 1.0


def place_control_networks(
    control_networks: Sequence[PlannedControlNetwork], plan: Plan, fleet: Fleet, cost: ComponentCost
) -> tuple[list[Mapping[nn.Module, ControlPlace]], list[ModelPatcher]]:
    """Where each replica's ControlNets run, and the patchers that must be resident for that, each once."""
    patchers: dict[int, ModelPatcher] = {}
    places: list[dict[nn.Module, ControlPlace]] = [{} for _ in plan.replicas]
    for control in control_networks:
        for found, slot in zip(places, plan.control_slots[control.name], strict=True):
            patcher = _patcher_on(control, fleet.device(slot))
            patchers[id(patcher)] = patcher
            found[control.network] = ControlPlace(slot=slot, network=patcher.model, work=control.work, work_per_row=cost.flops_per_row)
    return list(places), list(patchers.values())


def _patcher_on(control: PlannedControlNetwork, device: torch.device) -> ModelPatcher:
    if device == control.patcher.load_device:
        return control.patcher
    copies = owner_of(control.network).part(ReplicaModules)
    if device not in copies:
        with META:
            empty = control.network.make_empty()  # type: ignore[operator]
        copies[device] = ReplicaPatcher.make(control.patcher, empty, device)
    copies[device].source = control.patcher
    return copies[device]
