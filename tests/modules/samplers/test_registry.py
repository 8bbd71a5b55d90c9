from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from modules.errors import UnknownSamplerError
from modules.samplers import registry, schedules
from modules.samplers.registry import SamplerData, get_sampler_and_scheduler


@pytest.fixture
def unchanged_list() -> Iterator[None]:
    samplers, samplers_map = list(registry.all_samplers), dict(registry.all_samplers_map)
    yield
    registry.all_samplers[:] = samplers
    registry.all_samplers_map.clear()
    registry.all_samplers_map.update(samplers_map)


@pytest.mark.parametrize(
    ("sampler", "schedule", "expected"),
    [
        ("Euler a", None, ("Euler a", "Automatic")),
        ("Euler a Karras", None, ("Euler a", "Karras")),
        ("DPM++ 2M Karras", None, ("DPM++ 2M", "Automatic")),
        ("DPM++ 2M", "Karras", ("DPM++ 2M", "Automatic")),
        ("DPM++ 2M", "SGM Uniform", ("DPM++ 2M", "SGM Uniform")),
        ("DPM++ 2M SDE Heun Exponential", None, ("DPM++ 2M SDE Heun", "Automatic")),
        ("DPM++ 2M SDE Karras", "Automatic", ("DPM++ 2M SDE", "Karras")),
        ("k_euler_a", "karras", ("Euler a", "Karras")),
        ("euler A", "sgm_uniform", ("Euler a", "SGM Uniform")),
        ("DDIM", None, ("DDIM", "Automatic")),
        (None, None, ("DPM++ 2M", "Automatic")),
        ("Euler Align Your Steps 11", None, ("Euler", "Align Your Steps 11")),
    ],
)
def test_names_are_brought_to_their_proper_form(sampler: str | None, schedule: str | None, expected: tuple[str, str]) -> None:
    assert get_sampler_and_scheduler(sampler, schedule) == expected


@pytest.mark.parametrize(("sampler", "schedule"), [("Eulr", None), ("Eulr Karras", None), ("Euler", "Karas"), ("Karras", None)])
def test_unknown_names_are_an_error_that_lists_what_there_is(sampler: str, schedule: str | None) -> None:
    with pytest.raises(UnknownSamplerError, match=r"'Euler'|'Karras'|SGM Uniform"):
        get_sampler_and_scheduler(sampler, schedule)


def test_all_names_of_the_contract_are_there() -> None:
    names = (
        "DPM++ 2M, DPM++ SDE, DPM++ 2M SDE, DPM++ 2M SDE Heun, DPM++ 2S a, DPM++ 3M SDE, Euler a, Euler, LMS, Heun, DPM2, DPM2 a, DPM fast, "
        "DPM adaptive, Restart, HeunPP2, IPNDM, IPNDM_V, DEIS, DDIM, DDIM CFG++, PLMS, UniPC, LCM, DDPM"
    )
    ours = names.split(", ")
    assert [sampler.name for sampler in registry.all_samplers][: len(ours)] == ours  # extensions of other tests may have added theirs


def test_second_order_samplers_ask_the_model_twice_a_step() -> None:
    config = registry.find_sampler_config("Heun")
    assert config is not None
    assert config.total_steps(10) == 20


def test_an_extension_can_add_a_sampler(unchanged_list: None) -> None:
    made = []

    class Mine:
        config = None

    def construct(model: object) -> Mine:
        made.append(model)
        return Mine()

    registry.add_sampler(SamplerData("Mine", construct, ["my_sampler"], {"scheduler": "karras"}))
    assert get_sampler_and_scheduler("MY_SAMPLER", None) == ("Mine", "Automatic")
    sampler = registry.create_sampler("Mine", "model")
    assert made == ["model"]
    assert sampler.config.name == "Mine"
    registry.add_sampler(SamplerData("Mine", construct, [], {}))
    assert [sampler.name for sampler in registry.all_samplers].count("Mine") == 1


def test_a_scheduler_is_called_as_extensions_call_it() -> None:
    karras = schedules.schedulers_map["Karras"]
    sigmas = karras.function(n=10, sigma_min=0.03, sigma_max=14.6, rho=karras.default_rho, device="cpu")
    assert len(sigmas) == 11
    assert torch.isclose(sigmas[[0, 9, 10]], torch.tensor([14.6, 0.03, 0.0])).all()
    uniform = schedules.schedulers_map["uniform"]
    assert len(uniform.function(n=5, sigma_min=0.03, sigma_max=14.6, inner_model=None, device="cpu")) == 6


def test_samplers_of_an_infotext() -> None:
    pairs = {"Sampler": "DPM++ 2M Karras", "Hires sampler": "Euler a", "Hires schedule type": "Karras"}
    assert registry.get_sampler_from_infotext(pairs) == "DPM++ 2M"
    assert registry.get_hr_sampler_and_scheduler(pairs) == ("Euler a", "Karras")
    assert registry.get_hr_sampler_and_scheduler({"Sampler": "Euler", "Schedule type": "Karras"}) == ("Use same sampler", "Use same scheduler")
