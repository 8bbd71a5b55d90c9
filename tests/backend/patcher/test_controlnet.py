"""Links of the ControlNet chain: weights by branch, picture, noise level and position, hints, ranges, copies, hooks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from backend import memory_management
from backend.args import BackendConfig
from backend.devices.probing import probe_devices
from backend.modules.k_model import KModel
from backend.modules.k_prediction import Prediction
from backend.nn.controlnet import ControlNetwork
from backend.patcher.controlnet import (
    ControlBase,
    ControlNet,
    ControlNetError,
    Residuals,
    apply_controlnet_advanced,
    compute_controlnet_weighting,
    soft_weights,
    zero_weights,
)
from backend.patcher.unet import UnetPatcher
from tests.support.checkpoints import build_models
from tests.support.controlnets import build_controlnet, hint

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cpu() -> None:
    memory_management.configure(BackendConfig(), probe_devices(BackendConfig(device_ids=("cpu",))))


class Ones(ControlBase):
    """A link whose residuals are all one: two skips and the middle."""

    def copy(self) -> ControlBase:
        other = Ones(CPU)
        self.copy_to(other)
        return other

    def _find_residuals(self, x_BCHW: Tensor, sigma_B: Tensor, cond: dict[str, Any], batched_number: int) -> Residuals:
        return {"input": [], "middle": [torch.ones(4, 1, 1, 1)], "output": [torch.ones(4, 1, 4, 4), torch.ones(4, 1, 2, 2)]}


def _link(**settings: Any) -> Ones:
    """Two pictures, uncond before cond."""
    link = Ones(CPU)
    link.transformer_options = {"cond_or_uncond": [1, 0], "cond_mark": torch.tensor([1.0, 1.0, 0.0, 0.0]), "sigmas": torch.tensor([3.0, 3.0])}
    for name, value in settings.items():
        setattr(link, name, value)
    return link


def _control(link: ControlBase) -> Residuals:
    found = link.get_control(torch.zeros(4, 4, 4, 4), torch.full((4,), 3.0), {}, 2)
    assert found is not None
    return found


def _rows(residual: Tensor | None) -> list[float]:
    assert residual is not None
    return residual.flatten(1).mean(1).tolist()


def test_branches_and_layers_have_separate_weights() -> None:
    positive, negative = {"middle": [0.5], "output": [0.25, 0.75]}, {"middle": [0.0], "output": [2.0, 0.0]}
    control = _control(_link(positive_advanced_weighting=positive, negative_advanced_weighting=negative, strength=2.0))
    assert _rows(control["middle"][0]) == [0, 0, 1, 1]
    assert _rows(control["output"][0]) == [4, 4, 0.5, 0.5]
    assert _rows(control["output"][1]) == [0, 0, 1.5, 1.5]


def test_one_branchs_weights_leave_the_other_alone() -> None:
    control = _control(_link(negative_advanced_weighting=zero_weights()))
    assert _rows(control["middle"][0]) == [0, 0, 1, 1]


def test_pictures_and_noise_levels_have_weights() -> None:
    control = _control(_link(advanced_frame_weighting=[1.0, 3.0], advanced_sigma_weighting=lambda sigma: float(sigma[0]) / 6))
    assert _rows(control["output"][0]) == [0.5, 1.5, 0.5, 1.5]
    with pytest.raises(ControlNetError, match="weights for 3 pictures"):
        _control(_link(advanced_frame_weighting=[1.0, 3.0, 4.0]))


def test_a_mask_weighs_places_at_every_size() -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1.0
    control = _control(_link(advanced_mask_weighting=mask))
    residual = control["output"][0]
    assert residual is not None
    assert residual[0, 0, 0].tolist() == [1, 1, 0, 0]
    assert _rows(control["output"][1]) == [0.5] * 4
    two = _control(_link(advanced_mask_weighting=torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])))
    assert _rows(two["output"][0]) == [0, 1, 0, 1]


def test_too_few_weights_are_reported() -> None:
    with pytest.raises(ControlNetError, match="1 weights for its output residuals"):
        _control(_link(positive_advanced_weighting={"middle": [1.0], "output": [1.0]}))


def test_weights_of_the_modes() -> None:
    sd, xl = soft_weights(is_sdxl=False), soft_weights(is_sdxl=True)
    assert sd["output"] == pytest.approx([0.825**12, *(0.825 ** (12 - i) for i in range(1, 12))])
    assert (sd["middle"], xl["middle"]) == ([1.0], [0.825**3])
    assert set(zero_weights()["output"]) == {0.0}
    assert compute_controlnet_weighting({"output": [None]}, _link())["output"] == [None]


def test_links_add_up_where_both_have_something() -> None:
    first, second = _link(strength=0.5), _link()
    second.set_previous_controlnet(first)
    first._find_residuals = lambda *_: {"input": [torch.ones(4, 1, 8, 8)], "middle": [None], "output": [None, torch.ones(4, 1, 2, 2)]}  # type: ignore[method-assign]
    control = _control(second)
    assert [_rows(one) for one in (control["input"][0], control["middle"][0], *control["output"])] == [[0.5] * 4, [1.0] * 4, [1.0] * 4, [1.5] * 4]


def test_a_link_out_of_its_range_leaves_the_others_alone() -> None:
    first, second = _link(), _link(timestep_range=(2.0, 1.0))
    second.set_previous_controlnet(first)
    assert _rows(_control(second)["middle"][0]) == [1.0] * 4
    first.timestep_range = (9.0, 4.0)
    assert second.get_control(torch.zeros(4, 4, 4, 4), torch.full((4,), 3.0), {}, 2) is None


def test_pooled_residuals_are_their_mean_everywhere() -> None:
    link = _link(global_average_pooling=True)
    ramp = torch.arange(4.0).view(1, 1, 2, 2).expand(4, 1, 2, 2)
    link._find_residuals = lambda *_: {"input": [], "middle": [], "output": [ramp]}  # type: ignore[method-assign]
    assert torch.equal(_control(link)["output"][0], torch.full((4, 1, 2, 2), 1.5))  # type: ignore[arg-type]


def test_conditioning_modifiers_change_what_goes_in() -> None:
    seen: list[Any] = []
    link = _link()
    link.transformer_options["controlnet_conditioning_modifiers"] = [lambda cnet, x, t, cond, n: (x + 1, t, {**cond, "more": 1}, n)]
    link._find_residuals = lambda x, t, cond, n: seen.append((float(x[0, 0, 0, 0]), cond)) or {"output": []}  # type: ignore[method-assign,func-returns-value]
    _control(link)
    assert seen == [(1.0, {"more": 1})]


# with a network


@pytest.fixture(scope="module")
def unet() -> UnetPatcher:
    return UnetPatcher(KModel(build_models(Path("none"), "sd15").unet, Prediction()), CPU, CPU)


@pytest.fixture
def network() -> ControlNet:
    return ControlNet(ControlNetwork(build_controlnet(build_models(Path("none"), "sd15"))))


def _run(unet: UnetPatcher, side: int = 8, rows: int = 2) -> Residuals:
    control = unet.controlnet_linked_list
    control.pre_run(unet.model, unet.model.predictor.percent_to_sigma)
    generator = torch.Generator().manual_seed(7)
    cond = {"c_crossattn": torch.randn(rows, 5, 64, generator=generator)}
    found: Residuals = control.get_control(torch.randn(rows, 4, side, side, generator=generator), torch.full((rows,), 3.0), cond, 2)
    return found


def test_a_link_is_a_copy_with_the_same_network(unet: UnetPatcher, network: ControlNet) -> None:
    patched = apply_controlnet_advanced(unet, network, hint(), 0.5, 0.2, 0.8)
    link = patched.controlnet_linked_list
    assert link is not network and link.control_model is network.control_model
    assert (network.cond_hint_original, network.strength) == (None, 1.0)
    assert unet.controlnet_linked_list is None
    assert link.copy().get_models() == network.get_models()
    assert (link.copy().strength, link.copy().timestep_percent_range, link.copy().previous_controlnet) == (0.5, (0.2, 0.8), None)


def test_a_controlnet_of_the_full_checkpoint_does_not_fit_the_distilled_one(network: ControlNet) -> None:
    small = UnetPatcher(KModel(build_models(Path("none"), "small-sd").unet, Prediction()), CPU, CPU)
    with pytest.raises(ControlNetError, match=r"2, 2, 2, 2. layers per level, and the checkpoint .1, 1, 1, 1. and no middle"):
        _run(apply_controlnet_advanced(small, network, hint(), 1.0, 0.0, 1.0))


def test_a_hint_is_cut_to_the_middle_and_resized(unet: UnetPatcher, network: ControlNet) -> None:
    wide = torch.zeros(1, 3, 32, 96)
    wide[..., 32:64] = hint(32)
    expected = torch.nn.functional.interpolate(hint(32), size=(64, 64), mode="nearest-exact")
    patched = apply_controlnet_advanced(unet, network, wide, 1.0, 0.0, 1.0)
    found = _run(patched)
    assert torch.equal(patched.controlnet_linked_list.cond_hint, expected)
    other = _run(apply_controlnet_advanced(unet, network, expected, 1.0, 0.0, 1.0))
    assert all(torch.equal(one, two) for one, two in zip(found["output"], other["output"]) if one is not None and two is not None)


def test_another_size_of_latents_gets_another_hint(unet: UnetPatcher, network: ControlNet) -> None:
    patched = apply_controlnet_advanced(unet, network, hint(), 1.0, 0.0, 1.0)
    assert _run(patched)["output"][0].shape[-2:] == (8, 8)  # type: ignore[union-attr]
    assert _run(patched, side=16)["output"][0].shape[-2:] == (16, 16)  # type: ignore[union-attr]


def test_a_hint_is_embedded_once_a_run(unet: UnetPatcher, network: ControlNet, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    embed = network.control_model.embed_hint
    monkeypatch.setattr(network.control_model, "embed_hint", lambda hint: (calls.append(1), embed(hint))[1])
    patched = apply_controlnet_advanced(unet, network, hint(), 1.0, 0.0, 1.0)
    _run(patched)
    _run(patched)
    assert len(calls) == 1
    patched.controlnet_linked_list.cleanup()
    assert patched.controlnet_linked_list.cond_hint is None
    _run(patched)
    assert len(calls) == 2


def test_one_channel_hints_and_wrong_numbers_of_hints(unet: UnetPatcher, network: ControlNet) -> None:
    gray = torch.full((1, 1, 64, 64), 0.5)
    _run(apply_controlnet_advanced(unet, network, gray, 1.0, 0.0, 1.0))
    with pytest.raises(ControlNetError, match="3 hints for a batch of 1 pictures"):
        _run(apply_controlnet_advanced(unet, network, hint(batch=3), 1.0, 0.0, 1.0))
    with pytest.raises(ControlNetError, match="Give one with 3"):
        _run(apply_controlnet_advanced(unet, network, torch.zeros(1, 5, 64, 64), 1.0, 0.0, 1.0))


def test_a_wrapper_runs_in_place_of_the_network(unet: UnetPatcher, network: ControlNet) -> None:
    patched = apply_controlnet_advanced(unet, network, hint(), 1.0, 0.0, 1.0)
    link = patched.controlnet_linked_list
    seen: dict[str, Any] = {}

    def wrapper(**arguments: Any) -> list[Tensor]:
        seen.update(arguments)
        return [2 * one for one in arguments["inner_model"](**{key: arguments[key] for key in ("x", "hint", "timesteps", "context", "y")})]

    plain = _run(patched)
    link.transformer_options = {"controlnet_model_function_wrapper": wrapper}
    doubled = _run(patched)
    assert seen["model"] is link
    torch.testing.assert_close(doubled["middle"][0], 2 * plain["middle"][0])  # type: ignore[operator]


def test_memory_grows_with_the_hint_and_the_chain(unet: UnetPatcher, network: ControlNet) -> None:
    small = apply_controlnet_advanced(unet, network, hint(64), 1.0, 0.0, 1.0)
    large = apply_controlnet_advanced(unet, network, hint(128), 1.0, 0.0, 1.0)
    both = apply_controlnet_advanced(small, network, hint(128), 1.0, 0.0, 1.0)
    needs = [one.controlnet_linked_list.inference_memory_requirements(torch.float32) for one in (small, large, both)]
    assert needs[1] == 4 * needs[0] and needs[2] == needs[0] + needs[1]
    residuals = _run(small)
    held = sum(one.nbytes for kind in residuals.values() for one in kind if one is not None)
    assert held <= needs[0]


def test_a_predictor_is_needed(network: ControlNet) -> None:
    network.set_cond_hint(hint())
    with pytest.raises(ControlNetError, match="pre_run"):
        network.get_control(torch.zeros(1, 4, 8, 8), torch.ones(1), {"c_crossattn": torch.zeros(1, 5, 64)}, 1)
    with pytest.raises(ControlNetError, match="without a hint"):
        link = network.copy()
        link._predictor, link.cond_hint_original = SimpleNamespace(), None
        link.get_control(torch.zeros(1, 4, 8, 8), torch.ones(1), {}, 1)
