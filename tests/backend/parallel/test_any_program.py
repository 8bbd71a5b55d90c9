"""A network that is not a UNet in the denoiser, the executor, the cost counter and the partition. Reference: its `forward`."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from backend.families.key_map import KeyMap
from backend.modules.k_model import KModel
from backend.modules.k_prediction import Prediction
from backend.nn.deferred_control import DeferredControl, Residuals, Send
from backend.nn.network_call import NetworkCall
from backend.nn.piece import Piece
from backend.nn.program import trace_tensors
from backend.parallel.placing.fleet import Fleet
from backend.parallel.planning.costs import ModelProfile
from backend.parallel.planning.cut_costs import PartitionJob
from backend.parallel.planning.partition import partition
from backend.parallel.planning.plan import ReplicaPlan
from backend.parallel.planning.profiling import profile_network
from backend.parallel.running.executor import Executor, Replica
from backend.parallel.running.residuals import ControlPlace
from tests.support.fleets import configured_slots, virtual_fleet
from tests.support.parallel_costs import fast_links, make_slot
from tests.support.token_program import NUM_BLOCKS, WIDTH, TokenNetwork, build_token_program, make_token_network, make_token_rows

ROWS, SIDE, TEXT = 3, 8, 5


@pytest.fixture(scope="module")
def network() -> TokenNetwork:
    return make_token_network()


def _expect(network: TokenNetwork, rows: dict[str, Tensor], residuals: list[Tensor] | None = None) -> Tensor:
    parts = [
        network(*(rows[name][row : row + 1] for name in ("x", "sigma", "text", "guidance")), [one[row : row + 1] for one in residuals or ()])
        for row in range(ROWS)
    ]
    return torch.cat(parts)


def _executor(network: TokenNetwork, fleet: Fleet, slots: tuple[int, ...], controls: dict[nn.Module, ControlPlace] | None = None) -> Executor:
    """One copy with a segment on each slot."""
    program = build_token_program(copy.deepcopy(network))
    plan = ReplicaPlan(pieces=program.whole_pieces(), slots=slots)
    for _, layer in program.embedding.named_layers:
        layer.to(fleet.device(slots[0]))
    for piece, slot in zip(plan.pieces, plan.slots):
        for _, layer in program.piece_layers(piece):
            layer.to(fleet.device(slot))
    return Executor([Replica(program=program, plan=plan, controls=controls or {})], fleet, deal=lambda rows: (rows,))


def _at_home(call: NetworkCall, fleet: Fleet) -> NetworkCall:
    return call.on(fleet.primary.torch_device, lambda tensor, device: tensor.to(device))


def test_running_all_segments_equals_the_networks_forward(network: TokenNetwork) -> None:
    program, rows = build_token_program(network), make_token_rows(ROWS)
    assert torch.equal(program.run(NetworkCall(rows=rows).start(program)), network(*(rows[name] for name in ("x", "sigma", "text", "guidance"))))


@pytest.mark.parametrize("slots", [(0, 0, 0), (0, 1, 1), (0, 1, 0), (1, 0, 2), (0, 1, 2)], ids=str)
def test_rows_go_through_any_cut_bit_for_bit(network: TokenNetwork, slots: tuple[int, ...]) -> None:
    rows = make_token_rows(ROWS)
    residuals = [torch.randn(ROWS, SIDE * SIDE, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(NUM_BLOCKS)]
    with virtual_fleet(3) as fleet:
        executor = _executor(network, fleet, slots)
        plain = executor.run(_at_home(NetworkCall(rows=rows), fleet)).cpu()
        controlled = executor.run(_at_home(NetworkCall(rows=rows, control={"joint": residuals}), fleet)).cpu()
        executor.close()
    assert torch.equal(plain, _expect(network, rows))
    assert torch.equal(controlled, _expect(network, rows, residuals))
    assert not torch.equal(plain, controlled)


def test_only_what_the_next_stage_reads_crosses(network: TokenNetwork) -> None:
    """Both streams after the first block, only the picture after the second; the modulation goes to both slots once."""
    rows, picture, text, modulation = make_token_rows(1), SIDE * SIDE * WIDTH * 4, TEXT * WIDTH * 4, WIDTH * 4
    crossed = {}
    for slots in ((0, 1, 1), (0, 0, 1)):
        with virtual_fleet(2) as fleet:
            executor, call = _executor(network, fleet, slots), _at_home(NetworkCall(rows=rows), fleet)
            before = sum(fleet.transport.stats.bytes_by_pair().values())
            executor.run(call)
            crossed[slots] = sum(fleet.transport.stats.bytes_by_pair().values()) - before
            executor.close()
    back = rows["x"].nbytes
    assert crossed == {(0, 1, 1): picture + text + modulation + back, (0, 0, 1): picture + modulation + back}


@dataclass(frozen=True, eq=False)
class _Pass:
    network: nn.Module
    residuals: list[Tensor]

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(("joint",))

    @property
    def home(self) -> torch.device:
        return torch.device("cpu")

    def rows(self, first: int, end: int) -> _Pass:
        return replace(self, residuals=[one[first:end] for one in self.residuals])

    def on(self, device: torch.device, send: Send) -> _Pass:
        return replace(self, residuals=[send(one, device) for one in self.residuals])

    def run(self, network: nn.Module) -> Residuals:
        return {"joint": [2 * one for one in self.residuals]}


def test_deferred_residuals_land_where_the_blocks_say(network: TokenNetwork) -> None:
    rows, control = make_token_rows(ROWS), nn.Linear(1, 1)
    halves = [torch.randn(ROWS, SIDE * SIDE, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(NUM_BLOCKS)]
    with virtual_fleet(2) as fleet:
        executor = _executor(network, fleet, (0, 1, 0), {control: ControlPlace(slot=1, network=control)})
        call = NetworkCall(rows=rows, control=DeferredControl((_Pass(control, halves),)))
        result = executor.run(_at_home(call, fleet)).cpu()
        executor.close()
    assert torch.equal(result, _expect(network, rows, [2 * one for one in halves]))


def test_the_denoiser_hands_over_what_the_program_reads_and_no_more(network: TokenNetwork) -> None:
    rows = make_token_rows(2)
    model = KModel(copy.deepcopy(network), Prediction(), build_program=build_token_program, key_map=KeyMap())
    with configured_slots("cpu"):
        arguments = {"text": rows["text"], "y": torch.ones(2, 3), "adapter": "no tensor"}
        one = model.apply_model(rows["x"], torch.tensor([3.0, 3.0]), guidance=rows["guidance"], **arguments)
        other = model.apply_model(rows["x"], torch.tensor([3.0, 3.0]), guidance=rows["guidance"] + 1, **arguments)
    assert one.shape == rows["x"].shape
    assert not torch.equal(one, other)  # guidance reaches the network
    empty = model.make_empty()
    assert {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    assert {tensor.device.type for tensor in empty.parameters()} == {"meta"}


# costs


@pytest.fixture(scope="module")
def profile(network: TokenNetwork) -> ModelProfile:
    return profile_network(network, build_token_program, latent_height=SIDE, latent_width=SIDE, context_length=TEXT, dtype=torch.float32)


def test_costs_follow_the_declaration(network: TokenNetwork, profile: ModelProfile) -> None:
    picture, text = SIDE * SIDE * WIDTH * 4, TEXT * WIDTH * 4
    assert [cost.piece for cost in profile.pieces] == [Piece(0), Piece(1), Piece(2)]
    assert [cost.hidden_bytes_per_row for cost in profile.pieces] == [picture + text, picture, SIDE * SIDE * 4 * 4]
    assert [cost.control_bytes_per_row for cost in profile.pieces] == [picture, picture, 0]
    assert all(cost.takes == () and cost.skip_bytes_per_row == 0 for cost in profile.pieces)
    assert (profile.emb_bytes_per_row, profile.context_bytes_per_row) == (WIDTH * 4, 0)
    assert profile.weight_bytes == sum(parameter.nbytes for parameter in network.parameters())
    assert profile.pieces[0].flops_per_row == profile.pieces[1].flops_per_row > profile.pieces[2].flops_per_row > 0


def test_it_is_cut_over_slots_and_the_cut_runs(network: TokenNetwork, profile: ModelProfile) -> None:
    slots = [make_slot(profile, index) for index in (0, 1)]
    found = partition(profile, slots, fast_links(2), PartitionJob(least_slots=2))
    assert found is not None
    assert set(found.replica.slots) == {0, 1}
    rows = make_token_rows(ROWS)
    by_piece = tuple(slot for piece, slot in zip(found.replica.pieces, found.replica.slots) for _ in [piece])
    with virtual_fleet(2) as fleet:
        executor = _executor(network, fleet, by_piece)
        assert torch.equal(executor.run(_at_home(NetworkCall(rows=rows), fleet)).cpu(), _expect(network, rows))
        executor.close()


# declarations


def test_readers_of_a_tensor_are_found_up_to_the_next_writer(network: TokenNetwork) -> None:
    program = build_token_program(network)
    found = {(one.name, one.source): one.readers for one in trace_tensors(program, program.whole_pieces())}
    assert found == {("picture", -1): (0,), ("prose", -1): (0,), ("picture", 0): (1,), ("prose", 0): (1,), ("picture", 1): (2,)}


def test_a_segment_that_reads_an_unproduced_tensor_is_refused(network: TokenNetwork) -> None:
    program = build_token_program(network)
    broken = replace(program.segments[0], consumes=("picture", "depth"))
    with pytest.raises(ValueError, match="joint 0 reads depth"):
        replace(program, segments=(broken, *program.segments[1:]))
    with pytest.raises(ValueError, match="produces the program's constant modulation"):
        replace(program, segments=(replace(program.segments[0], produces=("picture", "modulation")), *program.segments[1:]))
    with pytest.raises(ValueError, match="No segment produces the output 'answer'"):
        replace(program, segments=program.segments[:-1])


def test_a_call_without_latents_or_with_different_row_counts_is_refused() -> None:
    with pytest.raises(ValueError, match="but no latents"):
        NetworkCall(rows={"text": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match="A call of 2 rows got"):
        NetworkCall(rows={"x": torch.zeros(2, 1), "text": torch.zeros(3, 2)})
    whole = NetworkCall(rows={"x": torch.zeros(2, 1), "mask": torch.ones(1, 2)})
    assert whole.take_rows(1, 2).rows["mask"].shape == (1, 2)
