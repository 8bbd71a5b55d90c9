"""ControlNets on slots: rows of a pass, passes in parallel with the denoiser's input blocks, and failures.

Reference: the chain's `get_control` for all rows on one CPU slot, before the denoiser.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backend.devices import virtual_gpu
from backend.devices.virtual_gpu import Faults
from backend.modules.k_model import KModel
from backend.modules.k_prediction import Prediction
from backend.nn.controlnet import ControlNetwork
from backend.nn.deferred_control import DeferredControl, Residuals, Send
from backend.nn.network_call import NetworkCall
from backend.nn.tiles import Cut, Tile
from backend.nn.unet_program import UNetProgram as Program
from backend.nn.unet_program import build_program
from backend.parallel.placing.fleet import Fleet
from backend.parallel.planning.plan import ReplicaPlan
from backend.parallel.planning.tile_costs import TileCosts
from backend.parallel.running.executor import Cancelled, Executor, Replica, SlotFailure
from backend.parallel.running.residuals import ControlPlace, ResidualChain
from backend.parallel.running.session import SamplingRequest, SamplingSession
from backend.patcher.controlnet import ControlNet, apply_controlnet_advanced, soft_weights, zero_weights
from backend.patcher.controlnet_tasks import defer_control, list_deferrable
from backend.patcher.unet import UnetPatcher
from backend.sampling.sampling_function import denoise_guided, sampling_cleanup, sampling_prepare
from tests.support.checkpoints import build_models
from tests.support.controlnets import build_controlnet, hint
from tests.support.fleets import configured_slots, virtual_fleet
from tests.support.tiles import run_in_turns

IMAGES, SIDE = 2, 16
HINT_PX = 8 * SIDE
Setting = dict[str, Any]
SETTINGS: dict[str, Setting] = {
    "plain": {},
    "a hint for each picture": {"image_bchw": hint(HINT_PX, batch=IMAGES)},
    "branches weighed differently": {
        "positive_advanced_weighting": soft_weights(is_sdxl=False),
        "negative_advanced_weighting": zero_weights(),
    },
    "pictures weighed differently": {"advanced_frame_weighting": [0.25, 1.5]},
    "a noise level weighed": {"advanced_sigma_weighting": lambda sigmas: float(sigmas[0]) / 4},
    "a mask": {"advanced_mask_weighting": torch.linspace(0, 1, 64).view(1, 1, 8, 8)},
    "a mask for each picture": {"advanced_mask_weighting": torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])},
}


@pytest.fixture
def two_gpus() -> Iterator[Fleet]:
    with virtual_fleet(2) as fleet:
        yield fleet
        for device in (0, 1):
            virtual_gpu.get_device(device).set_faults(None)


def _unet(*settings: Setting) -> UnetPatcher:
    """A narrow denoiser on the primary slot, with a ControlNet for each of the settings."""
    models = build_models(Path("none"), "sd15")
    unet = UnetPatcher.from_model(KModel(models.unet, Prediction()), offload_device=torch.device("cpu"))
    for seed, setting in enumerate(settings):
        link = ControlNet(ControlNetwork(build_controlnet(models, seed=seed + 1)))
        arguments = {"image_bchw": hint(HINT_PX, seed=seed), "strength": 0.8, "start_percent": 0.0, "end_percent": 1.0, **setting}
        unet = apply_controlnet_advanced(unet, link, **arguments)
    return unet


def _prepare(unet: UnetPatcher, strategy: Any, *, images: int = IMAGES, branches: int = 2, **request: Any) -> SamplingSession | None:
    shape = torch.empty(images, 4, SIDE, SIDE, device=unet.load_device)
    return sampling_prepare(unet, shape, SamplingRequest(images=images, branches=branches, strategy=strategy, **request))


def _denoise(unet: UnetPatcher, *, images: int = IMAGES, cond_scale: float = 4.0) -> Tensor:
    generator, home = torch.Generator().manual_seed(5), unet.load_device
    x = torch.randn(images, 4, SIDE, SIDE, generator=generator).to(home)
    texts = [torch.randn(images, 77, 64, generator=generator).to(home) for _ in range(2)]
    return denoise_guided(unet, x, torch.full((images,), 3.0).to(home), text_cond=texts[0], text_uncond=texts[1], cond_scale=cond_scale)[0].cpu()


@cache
def _whole(num_controlnets: int, **job: Any) -> Tensor:
    with configured_slots("cpu"):
        unet = _unet(*[{}] * num_controlnets)
        assert _prepare(unet, "auto") is None
        result = _denoise(unet, **job)
        sampling_cleanup(unet)
    return result


@pytest.fixture(scope="module")
def networks() -> tuple[KModel, tuple[ControlNetwork, ...]]:
    models = build_models(Path("none"), "sd15")
    return KModel(models.unet, Prediction()), tuple(ControlNetwork(build_controlnet(models, seed=seed)) for seed in (1, 2))


@pytest.mark.parametrize("setting", SETTINGS)
@torch.no_grad()
def test_rows_computed_separately_equal_those_of_the_full_pass(setting: str, networks: tuple[KModel, tuple[ControlNetwork, ...]]) -> None:
    """Two pictures, uncond before cond, as parts of one, two and one row; with a second ControlNet without settings."""
    generator = torch.Generator().manual_seed(6)
    with configured_slots("cpu"):
        chain: ControlNet | None = None
        for seed, (network, arguments) in enumerate(zip(networks[1], (SETTINGS[setting], {}))):
            link = ControlNet(network)
            link.set_cond_hint(arguments.get("image_bchw", hint(HINT_PX, seed=seed)), 0.8)
            for name, value in arguments.items():
                setattr(link, name, value)
            link.set_previous_controlnet(chain)
            link.pre_run(networks[0], lambda percent: 1.0 - percent)
            link.timestep_range = None
            link.transformer_options = {"cond_or_uncond": [1, 0], "cond_mark": torch.tensor([1.0, 1.0, 0.0, 0.0]), "sigmas": torch.tensor([3.0, 3.0])}
            chain = link
        assert chain is not None
        inputs = (
            torch.randn(4, 4, SIDE, SIDE, generator=generator),
            torch.full((4,), 3.0),
            {"c_crossattn": torch.randn(4, 77, 64, generator=generator)},
            2,
        )
        whole, deferred = chain.get_control(*inputs), defer_control(chain, *inputs)
        assert whole is not None
        assert deferred is not None
        parts = [deferred.rows(first, end, 4).compute(torch.device("cpu")) for first, end in ((0, 1), (1, 3), (3, 4))]
    for kind in ("middle", "output"):
        for place, expected in enumerate(whole[kind]):
            assert expected is not None
            found = torch.cat([part[kind][place] for part in parts])  # type: ignore[misc]
            assert torch.allclose(found, expected, atol=1e-5)
            assert expected.std() > 1e-3


def test_rows_of_three_slots_make_the_full_picture() -> None:
    """Two copies of the denoiser with one ControlNet each, and the second ControlNet on the third slot."""
    with virtual_fleet(3):
        unet = _unet({}, {})
        session = _prepare(unet, "replicas")
        assert session is not None
        assert session.plan.control_slots == {"ControlNet 1": (0, 1), "ControlNet 2": (2, 2)}
        assert len(unet.model.deferred_networks) == 2
        result = _denoise(unet)
        sampling_cleanup(unet)
    assert not unet.model.deferred_networks
    assert torch.allclose(result, _whole(2), atol=1e-4)


@pytest.mark.parametrize("setting", SETTINGS)
@torch.no_grad()
def test_tiles_compute_their_own_residuals(setting: str, networks: tuple[KModel, tuple[ControlNetwork, ...]]) -> None:
    """Uneven tiles of an odd size, in fp32. Reference: the pass over the whole rows."""
    height, width, tiles, generator = 23, 9, (8, 15), torch.Generator().manual_seed(6)
    with configured_slots("cpu"):
        link = ControlNet(networks[1][0])
        link.set_cond_hint(SETTINGS[setting].get("image_bchw", hint(HINT_PX)), 0.8)
        for name, value in SETTINGS[setting].items():
            setattr(link, name, value)
        link.pre_run(networks[0], lambda percent: 1.0 - percent)
        link.timestep_range = None
        link.transformer_options = {"cond_or_uncond": [1, 0], "cond_mark": torch.tensor([1.0, 1.0, 0.0, 0.0]), "sigmas": torch.tensor([3.0, 3.0])}
        inputs = torch.randn(4, 4, height, width, generator=generator), torch.full((4,), 3.0)
        deferred = defer_control(link, *inputs, {"c_crossattn": torch.randn(4, 77, 64, generator=generator)}, 2)
        assert deferred is not None
        (task,) = deferred.parts
        assert not isinstance(task, dict) and task.has_tiles
        whole, cut = task.run(task.network), Cut.of_rows(tiles)
        parts, peers, _ = run_in_turns(lambda peers: task.run_on_tile(task.network, Tile(peers, cut)), len(tiles))
    assert peers[0].num_posts == networks[1][0].tile_traffic(height, width).num_exchanges
    for kind in ("middle", "output"):
        for place, expected in enumerate(whole[kind]):
            assert expected is not None
            found = torch.cat([part[kind][place] for part in parts], dim=2)
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.std()) + 1e-6)


def test_every_slot_of_a_team_has_the_controlnet_and_computes_its_tile(two_gpus: Fleet) -> None:
    unet = _unet({})
    session = _prepare(unet, "tiles", images=1, branches=1)
    assert session is not None and session.plan.control_slots == {"ControlNet": (0, 1)}
    result = _denoise(unet, images=1, cond_scale=1.0)
    sampling_cleanup(unet)
    assert torch.allclose(result, _whole(1, images=1, cond_scale=1.0), atol=1e-4)


def test_a_controlnet_that_needs_the_whole_picture_sends_each_tile_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first link averages its residuals over the picture, the second does not: one runs whole, the other in tiles, and they add up. Both have a
    copy on each slot, though one network on each would be as fast here."""
    monkeypatch.setattr(TileCosts, "control_places", lambda self, teams: iter((self,)))
    with configured_slots("cpu"):
        unet = _with_an_averaging_link()
        _prepare(unet, "auto", images=1, branches=1)
        expected = _denoise(unet, images=1, cond_scale=1.0)
        sampling_cleanup(unet)
    with virtual_fleet(2):
        unet = _with_an_averaging_link()
        session = _prepare(unet, "tiles", images=1, branches=1)
        assert session is not None and session.plan.control_slots == {"ControlNet 1": (0, 1), "ControlNet 2": (0, 1)}
        result = _denoise(unet, images=1, cond_scale=1.0)
        sampling_cleanup(unet)
    assert torch.allclose(result, expected, atol=1e-4)


def _with_an_averaging_link() -> UnetPatcher:
    unet = _unet({}, {})
    first = unet.controlnet_linked_list.previous_controlnet
    first.global_average_pooling = True
    return unet


def test_a_cut_network_gives_the_same(two_gpus: Fleet) -> None:
    unet = _unet({}, {})
    session = _prepare(unet, "layers")
    assert session is not None
    assert session.plan.strategy == "layers"
    result = _denoise(unet)
    sampling_cleanup(unet)
    assert torch.allclose(result, _whole(2), atol=1e-4)


def _session_with_control_elsewhere(unet: UnetPatcher, **request: Any) -> SamplingSession:
    """One picture without CFG: one row, which a hook keeps whole, with the ControlNet on the other slot."""
    unet.set_model_input_block_patch(lambda hidden, options: hidden)
    session = _prepare(unet, "auto", images=1, branches=1, **request)
    assert session is not None
    assert (session.plan.strategy, session.plan.used_slots) == ("single", (0,))
    return session


def test_a_single_row_has_its_controlnet_on_the_other_slot(two_gpus: Fleet) -> None:
    unet = _unet({})
    session = _session_with_control_elsewhere(unet)
    assert session.plan.control_slots == {"ControlNet": (1,)}
    assert "ControlNet on slot 1" in session.plan.reason
    assert virtual_gpu.get_device(1).live_bytes > 0
    result = _denoise(unet, images=1, cond_scale=1.0)
    (control,) = session.planning.control_networks
    assert two_gpus.speeds.speed_of(1, control.work) is not None
    assert two_gpus.speeds.speed_of(0, control.work) is None
    sampling_cleanup(unet)
    assert torch.allclose(result, _whole(1, images=1, cond_scale=1.0), atol=1e-4)


@pytest.mark.parametrize("faults", [Faults(out_of_memory_share=1.0), Faults(lost_at_operation=40)], ids=["full", "lost"])
def test_a_failing_slot_of_a_controlnet_does_not_change_the_picture(two_gpus: Fleet, faults: Faults) -> None:
    unet = _unet({})
    session = _session_with_control_elsewhere(unet)
    virtual_gpu.get_device(1).set_faults(faults)
    result = _denoise(unet, images=1, cond_scale=1.0)
    assert session.plan.control_slots == {"ControlNet": (0,)}
    sampling_cleanup(unet)
    assert torch.allclose(result, _whole(1, images=1, cond_scale=1.0), atol=1e-4)


def test_a_cancelled_run_ends_with_controlnets_under_way(two_gpus: Fleet) -> None:
    unet = _unet({}, {})
    _prepare(unet, "replicas", is_cancelled=lambda: True)
    with pytest.raises(Cancelled):
        _denoise(unet)
    sampling_cleanup(unet)


def test_hooks_that_need_full_passes_keep_them_in_one_piece(two_gpus: Fleet) -> None:
    seen: list[int] = []

    def wrapper(x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor, y: object, model: ControlNet, inner_model: Any) -> list[Tensor]:
        seen.append(x.shape[0])
        found: list[Tensor] = inner_model(x, hint, timesteps, context)
        return found

    unet = _unet({})
    assert len(list_deferrable(unet.controlnet_linked_list, unet.model_options)) == 1
    unet.model_options.setdefault("transformer_options", {})["controlnet_model_function_wrapper"] = wrapper
    assert list_deferrable(unet.controlnet_linked_list, unet.model_options) == []
    _prepare(unet, "replicas")
    result = _denoise(unet)
    sampling_cleanup(unet)
    assert seen == [2 * IMAGES]
    assert torch.allclose(result, _whole(1), atol=1e-4)


# the executor


@pytest.fixture(scope="module")
def program() -> Program:
    return build_program(build_models(Path("none"), "sd15").unet)


@dataclass(frozen=True, eq=False)
class _Pass:
    """Residuals of one row, returned when `run` permits."""

    network: nn.Module
    give: Callable[[], Residuals]

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(("middle", "output"))

    @property
    def home(self) -> torch.device:
        return torch.device("cpu")

    def rows(self, first: int, end: int) -> _Pass:
        return self

    def on(self, device: torch.device, send: Send) -> _Pass:
        return self

    def run(self, network: nn.Module) -> Residuals:
        return self.give()


def _call(program: Program, control: DeferredControl | Residuals, hook: Callable[..., Tensor] | None = None) -> NetworkCall:
    generator = torch.Generator().manual_seed(4)
    options = {} if hook is None else {"block_modifiers": [hook]}
    rows = {
        "x": torch.randn(1, 4, 16, 16, generator=generator),
        "timesteps": torch.tensor([500.0]),
        "context": torch.randn(1, 77, 64, generator=generator),
    }
    return NetworkCall(rows=rows, control=control, options=options)


def _residuals(program: Program, seed: int = 3) -> Residuals:
    """For the middle and the first output block."""
    width = program.embedding.unet.config.block_out_channels[-1]
    generator, levels = torch.Generator().manual_seed(seed), len(program.embedding.unet.config.block_out_channels)
    side = 16 // 2 ** (levels - 1)
    return {"middle": [torch.randn(1, width, side, side, generator=generator)], "output": [torch.randn(1, width, side, side, generator=generator)]}


def _executor(program: Program, fleet: Fleet, networks: dict[nn.Module, int]) -> Executor:
    pieces = program.whole_pieces()
    places = {network: ControlPlace(slot=slot, network=network) for network, slot in networks.items()}
    replica = Replica(program=program, plan=ReplicaPlan(pieces=pieces, slots=(0,) * len(pieces)), controls=places)
    return Executor([replica], fleet, deal=lambda rows: (rows,))


def _alone(program: Program, control: Residuals) -> Tensor:
    with torch.no_grad():
        return program.run(_call(program, control).start(program))


def test_a_controlnet_overlaps_the_input_blocks_and_the_row_waits_without_blocking_its_worker(program: Program) -> None:
    """The pass ends only after the row's last input block, when the worker does something else."""
    network, way_in_done = nn.Linear(1, 1), threading.Event()
    last_input = sum(segment.kind == "input" for segment in program.segments) - 1

    def note(h: Tensor, when: str, options: dict[str, Any]) -> Tensor:
        if options["block"] == ("input", last_input) and when == "after":
            way_in_done.set()
        return h

    with configured_slots("cpu", "cpu", cpu_threads_per_slot=1) as fleet:

        def give() -> Residuals:
            assert way_in_done.wait(30)
            assert fleet.worker(0).submit(lambda: True).result(30)
            return _residuals(program)

        executor = _executor(program, fleet, {network: 1})
        result = executor.run(_call(program, DeferredControl((_Pass(network, give),)), note))
        executor.close()
    assert torch.equal(result, _alone(program, _residuals(program)))


def test_links_add_up_in_their_order_on_any_slots(program: Program) -> None:
    """Three numbers of different magnitude: another order would round differently."""
    networks = [nn.Linear(1, 1) for _ in range(2)]
    found = [{kind: [one * scale for one in lists if one is not None] for kind, lists in _residuals(program, seed).items()} for seed, scale in
             ((1, 1.0), (2, 1e4), (3, 1e-3))]  # fmt: skip
    parts = (_Pass(networks[0], lambda: dict(found[0])), dict(found[1]), _Pass(networks[1], lambda: dict(found[2])))
    total = {kind: [found[2][kind][0] + (found[1][kind][0] + found[0][kind][0])] for kind in found[0]}  # type: ignore[operator]
    with configured_slots("cpu", "cpu", cpu_threads_per_slot=1) as fleet:
        executor = _executor(program, fleet, {networks[0]: 0, networks[1]: 1})
        result = executor.run(_call(program, DeferredControl(parts)))  # type: ignore[arg-type]
        executor.close()
    assert torch.equal(result, _alone(program, total))  # type: ignore[arg-type]


def test_a_failing_pass_ends_the_run_with_its_slot(program: Program) -> None:
    network = nn.Linear(1, 1)

    def fail() -> Residuals:
        raise ValueError("no residuals today")

    with configured_slots("cpu", "cpu", cpu_threads_per_slot=1) as fleet:
        executor = _executor(program, fleet, {network: 1})
        with pytest.raises(SlotFailure, match="slot 1: ValueError: no residuals today"):
            executor.run(_call(program, DeferredControl((_Pass(network, fail),))))
        executor.close()


def test_failures_are_reported_when_all_links_have_ended() -> None:
    done, failed, dropped = Future[Any](), Future[Any](), Future[Any]()
    control, told = ResidualChain([(0, done), (1, failed), (2, dropped)], ["middle"]), []
    control.when_ready(lambda: told.append(control.failures()))
    done.set_result({})
    failed.set_exception(ValueError())
    assert (told, control.is_ready) == ([], False)
    dropped.cancel()
    assert control.is_ready
    assert [slot for slot, _ in told[0]] == [1, 2]
