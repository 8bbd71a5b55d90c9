"""Guidance against its formula with a fake model, and batched against separate calls with a real narrow UNet."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from backend import memory_management
from backend.memory.errors import OutOfMemory
from backend.modules.k_model import KModel
from backend.modules.k_prediction import Prediction
from backend.patcher.unet import UnetPatcher
from backend.sampling.branches import StepMemory
from backend.sampling.condition import ConditionNoiseShape, compile_conditions, compile_weighted_conditions
from backend.sampling.sampling_function import (
    calc_cond_uncond_batch,
    denoise_guided,
    sampling_cleanup,
    sampling_function,
    sampling_function_inner,
    sampling_prepare,
)
from tests.support.checkpoints import build_models

SIGMA = torch.tensor([2.0, 2.0])


class FakeModel:
    """x0 = the condition's number everywhere; remembers every call."""

    runner = None

    def __init__(self, *, bytes_per_row: float = 1.0, fails_above: int | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.bytes_per_row, self.fails_above = bytes_per_row, fails_above
        self.predictor = Prediction()

    def memory_required(self, input_shape: list[int]) -> float:
        return self.bytes_per_row * input_shape[0]

    def apply_model(self, x: Tensor, t: Tensor, c_crossattn: Tensor, **kwargs: Any) -> Tensor:
        self.calls.append({"x": x, "t": t, "c_crossattn": c_crossattn, **kwargs})
        if self.fails_above is not None and x.shape[0] > self.fails_above:
            raise torch.OutOfMemoryError("made up")
        return c_crossattn.mean(dim=(1, 2)).view(-1, 1, 1, 1).expand_as(x).clone()


def _text(*values: float, tokens: int = 77) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1).expand(len(values), tokens, 8).contiguous()


def _x() -> Tensor:
    return torch.randn(2, 4, 16, 16)


def _guide(model: FakeModel, cond: Any, uncond: Any, scale: float, options: dict[str, Any] | None = None) -> Tensor:
    result = sampling_function_inner(model, _x(), SIGMA, uncond, cond, scale, options)
    assert isinstance(result, Tensor)
    return result


def _only(tensor: Tensor) -> float:
    assert float(tensor.std()) < 1e-5
    return float(tensor.mean())


def test_guidance_is_its_formula() -> None:
    model = FakeModel()
    denoised = _guide(model, compile_conditions(_text(3.0, 3.0)), compile_conditions(_text(1.0, 1.0)), 7.0)
    assert _only(denoised) == pytest.approx(1.0 + 7.0 * (3.0 - 1.0))
    assert len(model.calls) == 1, "both branches in one call"


def test_at_scale_one_the_unconditional_branch_is_not_run() -> None:
    model = FakeModel()
    cond, uncond = compile_conditions(_text(3.0, 3.0)), compile_conditions(_text(1.0, 1.0))
    assert _only(_guide(model, cond, uncond, 1.0)) == 3.0
    assert model.calls[0]["x"].shape[0] == 2
    assert model.calls[0]["transformer_options"]["cond_or_uncond"] == [0]
    _guide(model, cond, uncond, 1.0, {"disable_cfg1_optimization": True})
    assert model.calls[1]["x"].shape[0] == 4


def test_both_predictions_are_returned_if_requested() -> None:
    model = FakeModel()
    cond, uncond = compile_conditions(_text(3.0, 3.0)), compile_conditions(_text(1.0, 1.0))
    result = sampling_function_inner(model, _x(), SIGMA, uncond, cond, 2.0, return_full=True)
    assert [_only(part) for part in result] == [5.0, 3.0, 1.0]
    result = sampling_function_inner(model, _x(), SIGMA, uncond, cond, 1.0, return_full=True)
    assert [_only(part) for part in result] == [3.0, 3.0, 0.0]


@pytest.mark.parametrize("scale", [1.0, 7.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, -0.5), (0.3, 0.9), (1.0, -1.0), (0.5, 0.5)])
def test_composed_prompts_add_their_weighted_differences(weights: tuple[float, float], scale: float) -> None:
    """uncond + scale * sum of weight * (part - uncond)."""
    first, second, uncond = 3.0, 5.0, 1.0
    composition = [[(0, weights[0]), (1, weights[1])]] * 2
    cond = compile_weighted_conditions(_text(first, second), composition)
    expected = uncond + scale * (weights[0] * (first - uncond) + weights[1] * (second - uncond))
    assert _only(_guide(FakeModel(), cond, compile_conditions(_text(uncond, uncond)), scale)) == pytest.approx(expected, abs=1e-4)


def test_one_part_with_a_weight_keeps_it_at_any_scale() -> None:
    cond = compile_weighted_conditions(_text(3.0), [[(0, 0.5)], [(0, 0.5)]])
    for scale in (1.0, 4.0):
        assert _only(_guide(FakeModel(), cond, compile_conditions(_text(1.0, 1.0)), scale)) == pytest.approx(1.0 + scale * 0.5 * 2.0)


def test_images_of_one_batch_may_be_composed_differently() -> None:
    cond = compile_weighted_conditions(_text(3.0, 5.0, 9.0), [[(0, 1.0)], [(1, 1.0), (2, 0.5)]])
    denoised = _guide(FakeModel(), cond, compile_conditions(_text(1.0, 1.0)), 2.0)
    assert denoised[0].mean() == pytest.approx(1 + 2 * (3 - 1), abs=1e-4)
    assert denoised[1].mean() == pytest.approx(1 + 2 * ((5 - 1) + 0.5 * (9 - 1)), abs=1e-4)


def test_prompts_of_other_lengths_share_a_call_and_keep_their_results() -> None:
    model = FakeModel()
    denoised = _guide(model, compile_conditions(_text(3.0, 3.0, tokens=231)), compile_conditions(_text(1.0, 1.0)), 2.0)
    assert _only(denoised) == pytest.approx(5.0, abs=1e-5)
    assert [call["c_crossattn"].shape[1] for call in model.calls] == [231]
    _guide(model, compile_conditions(_text(3.0, 3.0, tokens=385)), compile_conditions(_text(1.0, 1.0)), 2.0)
    assert sorted(call["c_crossattn"].shape[1] for call in model.calls[1:]) == [77, 385]


@pytest.mark.parametrize(("free_rows", "sizes"), [(100, [6]), (5, [4, 2]), (3, [2, 2, 2]), (1, [2, 2, 2])])
def test_conditions_are_batched_as_far_as_memory_allows(free_rows: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three conditions of two rows each; a call is made only if its estimate is below the free bytes, but at least one condition runs."""
    monkeypatch.setattr(memory_management, "get_free_memory", lambda device: free_rows + 0.5)
    model = FakeModel()
    cond = compile_weighted_conditions(_text(3.0, 5.0), [[(0, 1.0), (1, 1.0)]] * 2)
    denoised = _guide(model, cond, compile_conditions(_text(1.0, 1.0)), 2.0)
    assert sorted((call["x"].shape[0] for call in model.calls), reverse=True) == sizes
    assert _only(denoised) == pytest.approx(1 + 2 * (2 + 4))


def test_running_out_of_memory_falls_back_to_one_by_one() -> None:
    model = FakeModel(fails_above=2)
    denoised = _guide(model, compile_conditions(_text(3.0, 3.0)), compile_conditions(_text(1.0, 1.0)), 2.0)
    assert _only(denoised) == 5.0
    assert [call["x"].shape[0] for call in model.calls] == [4, 2, 2]
    with pytest.raises(OutOfMemory, match="denoising a step"):
        _guide(FakeModel(fails_above=1), compile_conditions(_text(3.0, 3.0)), None, 1.0)


def test_options_describe_the_batch() -> None:
    model = FakeModel()
    given = {"transformer_options": {"mine": 1}}
    _guide(model, compile_conditions(_text(3.0, 3.0)), compile_conditions(_text(1.0, 1.0)), 2.0, given)
    options = model.calls[0]["transformer_options"]
    assert options["cond_or_uncond"] == [1, 0]
    assert torch.equal(options["sigmas"], SIGMA)
    assert options["cond_mark"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert (options["uncond_indices"], options["cond_indices"]) == ([0, 1], [2, 3])
    assert options["mine"] == 1
    assert given == {"transformer_options": {"mine": 1}}


def test_cfg_hooks() -> None:
    seen: list[str] = []

    def before(model: Any, cond: Any, uncond: Any, x: Tensor, timestep: Tensor, options: Any) -> Any:
        seen.append("before")
        return model, compile_conditions(_text(4.0, 4.0)), uncond, x, timestep, options

    def replace(args: dict[str, Any]) -> Tensor:
        seen.append("instead")
        torch.testing.assert_close(args["cond"], args["input"] - args["cond_denoised"])
        torch.testing.assert_close(args["uncond"], args["input"] - args["uncond_denoised"])
        assert args["cond_scale"] == 2.0
        return args["uncond"] + 0.5 * (args["cond"] - args["uncond"])

    def after(args: dict[str, Any]) -> Tensor:
        seen.append("after")
        assert _only(args["uncond_denoised"]) == 1.0
        assert _only(args["cond_denoised"]) == 4.0
        return args["denoised"] + 100

    options = {"sampler_pre_cfg_function": [before], "sampler_cfg_function": replace, "sampler_post_cfg_function": [after]}
    denoised = _guide(FakeModel(), compile_conditions(_text(3.0, 3.0)), compile_conditions(_text(1.0, 1.0)), 2.0, options)
    assert seen == ["before", "instead", "after"]
    assert _only(denoised) == pytest.approx(1 + 0.5 * 3 + 100, abs=1e-4)


def test_the_models_wrapper_is_called_in_its_place() -> None:
    seen: list[Any] = []

    def wrapper(apply_model: Any, args: dict[str, Any]) -> Tensor:
        seen.append(args["cond_or_uncond"])
        output: Tensor = apply_model(args["input"], args["timestep"], **args["c"])
        return output * 2

    denoised = _guide(FakeModel(), compile_conditions(_text(3.0, 3.0)), compile_conditions(_text(1.0, 1.0)), 2.0, {"model_function_wrapper": wrapper})
    assert _only(denoised) == pytest.approx(2 * 5.0)
    assert seen == [[1, 0]]


def test_conditions_may_act_in_a_part_of_the_picture_and_of_the_way() -> None:
    inside, outside = compile_conditions(_text(3.0, 3.0))[0], compile_conditions(_text(1.0, 1.0))[0]
    left = torch.zeros(1, 16, 16)
    left[:, :, :8] = 1.0
    denoised, _ = calc_cond_uncond_batch(FakeModel(), [{**inside, "mask": left}, {**outside, "mask": 1 - left}], None, _x(), SIGMA, {})
    assert torch.equal(denoised[..., :8], torch.full((2, 4, 16, 8), 3.0))
    assert torch.equal(denoised[..., 8:], torch.full((2, 4, 16, 8), 1.0))

    area, _ = calc_cond_uncond_batch(FakeModel(), [outside, {**inside, "area": (16, 12, 0, 4)}], None, _x(), SIGMA, {})
    assert torch.allclose(area[..., :4], torch.tensor(1.0))
    assert (area[0, 0, 0, 4:].diff() >= -1e-6).all(), "feathered at the edge inside the picture"
    assert torch.allclose(area[..., 12:], torch.tensor(2.0))

    for limits, acts in (
        ({"timestep_start": 1.0}, False),
        ({"timestep_start": 3.0}, True),
        ({"timestep_end": 3.0}, False),
        ({"timestep_end": 1.0}, True),
    ):
        result, _ = calc_cond_uncond_batch(FakeModel(), [{**inside, **limits}], None, _x(), SIGMA, {})
        assert _only(result) == (3.0 if acts else 0.0)


def test_zeros_stand_for_a_kind_that_does_not_apply_at_this_noise_level() -> None:
    late = {**compile_conditions(_text(3.0, 3.0))[0], "timestep_start": 1.0}
    always = compile_conditions(_text(1.0, 1.0))
    assert [_only(one) for one in calc_cond_uncond_batch(FakeModel(), [late], always, _x(), SIGMA, {})] == [0.0, 1.0]
    assert [_only(one) for one in calc_cond_uncond_batch(FakeModel(), always, [late], _x(), SIGMA, {})] == [1.0, 0.0]


def test_what_a_run_prepared_is_used_again_only_for_the_same_tensors() -> None:
    model, memory = FakeModel(), StepMemory()
    cond, uncond, other = (compile_conditions(_text(value, value)) for value in (3.0, 1.0, 5.0))

    def step(*conditions: Any) -> Tensor:
        result = sampling_function_inner(model, _x(), SIGMA, conditions[1], conditions[0], 2.0, memory=memory)
        assert isinstance(result, Tensor)
        return result

    assert [_only(step(cond, uncond)), _only(step(cond, uncond)), _only(step(other, uncond)), _only(step(cond, uncond))] == [5.0, 5.0, 9.0, 5.0]
    first, second, third, _ = (call["c_crossattn"] for call in model.calls)
    assert first is second
    assert third is not first


def test_a_run_that_was_short_of_memory_once_goes_on_one_by_one() -> None:
    model, memory = FakeModel(fails_above=2), StepMemory()
    cond, uncond = compile_conditions(_text(3.0, 3.0)), compile_conditions(_text(1.0, 1.0))
    for _ in range(2):
        sampling_function_inner(model, _x(), SIGMA, uncond, cond, 2.0, memory=memory)
    assert [call["x"].shape[0] for call in model.calls] == [4, 2, 2, 2, 2]


def test_a_mask_of_another_size_is_refused() -> None:
    compiled = {**compile_conditions(_text(3.0, 3.0))[0], "mask": torch.ones(1, 8, 8)}
    with pytest.raises(ValueError, match=r"mask has \(8, 8\)"):
        calc_cond_uncond_batch(FakeModel(), [compiled], None, _x(), SIGMA, {})


class FakeControl:
    """One link of a ControlNet chain."""

    def __init__(self, previous: FakeControl | None = None) -> None:
        self.previous_controlnet, self.transformer_options, self.log = previous, None, []

    def get_control(self, x: Tensor, timestep: Tensor, cond: dict[str, Any], batched_number: int) -> dict[str, Any]:
        self.log.append((x.shape[0], batched_number, sorted(cond)))
        return {"middle": [torch.ones(1)]}

    def set_previous_controlnet(self, previous: Any) -> None:
        self.previous_controlnet = previous

    def inference_memory_requirements(self, dtype: Any) -> int:
        return 1000

    def get_models(self) -> list[Any]:
        return []

    def pre_run(self, model: Any, percent_to_sigma: Any) -> None:
        self.log.append(("pre_run", percent_to_sigma(1.0)))

    def cleanup(self) -> None:
        self.log.append("cleanup")


def _patcher(family: str = "sd15", inpaint: bool = False) -> UnetPatcher:
    unet = build_models(Path("none"), family, inpaint=inpaint).unet
    return UnetPatcher(KModel(unet, Prediction()), torch.device("cpu"), torch.device("cpu"))


def test_controlnets_are_called_once_per_call_and_bracket_the_run() -> None:
    unet, control = _patcher(), FakeControl()
    unet.add_patched_controlnet(control)
    unet.model.run_network = lambda call: call.rows["x"]  # type: ignore[method-assign]
    sampling_prepare(unet, _x())
    denoise_guided(unet, _x(), SIGMA, text_cond=torch.randn(2, 77, 64), text_uncond=torch.randn(2, 77, 64), cond_scale=2.0)
    sampling_cleanup(unet)
    assert control.log == [("pre_run", 0.0), (4, 2, ["c_crossattn", "transformer_options"]), "cleanup"]
    assert control.transformer_options["cond_or_uncond"] == [1, 0]


def test_preparing_asks_for_room_for_both_branches_and_leaves_the_patchers_list_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, asked = _patcher(), {}
    extra = unet.add_extra_torch_module_during_sampling(torch.nn.Linear(2, 2))
    unet.add_extra_preserved_memory_during_sampling(500)
    unet.add_patched_controlnet(FakeControl())
    monkeypatch.setattr(memory_management, "load_models_gpu", lambda **kwargs: asked.update(kwargs))
    for _ in range(2):
        sampling_prepare(unet, _x())
    assert asked["models"] == [unet, extra]
    assert asked["memory_required"] == int(unet.memory_required([4, 4, 16, 16]))
    assert asked["hard_memory_preservation"] == 1500
    unet.set_memory_peak_estimation_modifier(lambda shape: 42)
    sampling_prepare(unet, _x())
    assert asked["memory_required"] == 42


def test_conditioning_modifiers_change_what_goes_in() -> None:
    unet = _patcher()
    model = FakeModel()

    def modify(*args: Any) -> Any:
        _, x, timestep, uncond, cond, cond_scale, options, seed = args
        return model, x, timestep, uncond, cond, cond_scale * 2, options, seed

    unet.add_conditioning_modifier(modify)
    text = {"text_cond": _text(3.0, 3.0), "text_uncond": _text(1.0, 1.0)}
    denoised, cond_pred, uncond_pred = denoise_guided(unet, _x(), SIGMA, cond_scale=2.0, seed=1, **text)
    assert (_only(denoised), _only(cond_pred), _only(uncond_pred)) == (pytest.approx(9.0), 3.0, 1.0)


def test_forges_entry_takes_the_denoiser_and_its_parameters() -> None:
    unet, x = _patcher(), _x()
    params = SimpleNamespace(x=x, sigma=SIGMA, image_cond=None, text_cond=torch.randn(2, 77, 64), text_uncond=torch.randn(2, 77, 64))
    engine = SimpleNamespace(forge_objects=SimpleNamespace(unet=unet))
    expected = denoise_guided(unet, x, SIGMA, text_cond=params.text_cond, text_uncond=params.text_uncond, cond_scale=5.0)
    for inner in (engine, SimpleNamespace(inner_model=engine)):
        denoiser = SimpleNamespace(inner_model=inner, p=SimpleNamespace(seeds=[1, 2]))
        result = sampling_function(denoiser, params, 5.0, [[(0, 1.0)], [(1, 1.0)]])
        assert all(torch.equal(a, b) for a, b in zip(result, expected))


def test_an_inpainting_model_gets_its_extra_channels_and_only_if_they_fit() -> None:
    unet, x = _patcher(inpaint=True), _x()
    text = {"text_cond": torch.randn(2, 77, 64), "text_uncond": torch.randn(2, 77, 64), "cond_scale": 3.0}
    concat = torch.randn(2, 5, 16, 16)
    denoised, *_ = denoise_guided(unet, x, SIGMA, image_cond=concat, **text)
    assert denoised.shape == x.shape
    with pytest.raises(RuntimeError, match="9 channels"):
        denoise_guided(unet, x, SIGMA, image_cond=torch.zeros(2, 5, 1, 1), **text)
    unet.extra_concat_condition = concat
    assert torch.equal(denoise_guided(unet, x, SIGMA, image_cond=None, **text)[0], denoised)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_batched_is_separate_on_a_real_unet(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 1e-5, as the library uses other kernels for other batch sizes."""
    unet, x = _patcher(family), _x()
    width = unet.model.diffusion_model.config.cross_attention_dim

    def text(seed: int, tokens: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        crossattn = torch.randn(2, tokens, width, generator=generator)
        return crossattn if family == "sd15" else {"crossattn": crossattn, "vector": torch.randn(2, 1600, generator=generator)}

    arguments = {"text_cond": text(1, 154), "text_uncond": text(2, 77), "cond_scale": 7.0}
    together, *_ = denoise_guided(unet, x, SIGMA, **arguments)
    monkeypatch.setattr(memory_management, "get_free_memory", lambda device: 0)
    separate, *_ = denoise_guided(unet, x, SIGMA, **arguments)
    torch.testing.assert_close(together, separate, rtol=1e-5, atol=2e-4)


def test_latent_shaped_conditions_follow_the_area() -> None:
    compiled = compile_conditions(_text(3.0, 3.0))[0]
    compiled["model_conds"]["c_concat"] = ConditionNoiseShape(torch.randn(2, 5, 16, 16))
    model = FakeModel()
    calc_cond_uncond_batch(model, [{**compiled, "area": (8, 4, 2, 3)}], None, _x(), SIGMA, {})
    assert model.calls[0]["x"].shape == (2, 4, 8, 4)
    assert model.calls[0]["c_concat"].shape == (2, 5, 8, 4)
