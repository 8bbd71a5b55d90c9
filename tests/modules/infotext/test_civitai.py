"""What Civitai writes of Flux pictures, in the spellings seen on its pages."""

from __future__ import annotations

from typing import Any

import pytest

from modules.infotext.parameters import parse_generation_parameters

RESOURCES = '[{"type":"checkpoint","modelVersionId":691639,"modelName":"FLUX","modelVersionName":"Dev"}]'
GENERATED = (
    "a cat\nSteps: 25, Sampler: Undefined, CFG scale: 3.5, Seed: 1234, Size: 832x1216, Clip skip: 2, Created Date: 2024-10-19T0758:00.8Z, "
    f"Civitai resources: {RESOURCES}, Civitai metadata: {{}}"
)


def parse(text: str) -> dict[str, Any]:
    return parse_generation_parameters(text, [])


def test_sampler_schedule_and_scales_are_flux_s() -> None:
    params = parse(GENERATED)
    assert (params["Sampler"], params["Schedule type"], params["CFG scale"], params["Distilled CFG Scale"]) == ("Euler", "Simple", "1", "3.5")
    assert params["Clip skip"] == "1"
    assert (params["Hires CFG Scale"], params["Hires Distilled CFG Scale"]) == ("1", "3.5")


def test_a_sampler_that_it_names_stays() -> None:
    params = parse(GENERATED.replace("Undefined", "DPM++ 2M"))
    assert (params["Sampler"], params["Schedule type"]) == ("DPM++ 2M", "Automatic")


def test_a_distilled_scale_that_it_names_stays() -> None:
    params = parse(GENERATED.replace("CFG scale: 3.5", "CFG scale: 1, Distilled CFG Scale: 2"))
    assert (params["CFG scale"], params["Distilled CFG Scale"]) == ("1", "2")


@pytest.mark.parametrize("name", ["Flux.1 Dev fp8", "FluxMania", "flux"])
def test_a_flux_checkpoint_by_any_spelling(name: str) -> None:
    assert parse(GENERATED.replace("FLUX", name))["Distilled CFG Scale"] == "3.5"


@pytest.mark.parametrize(
    "text",
    [
        GENERATED.replace("FLUX", "Pony Diffusion V6"),
        GENERATED.replace('"checkpoint"', '"lora"').replace("FLUX", "Flux style"),
        GENERATED.replace(RESOURCES, "not JSON"),
        GENERATED.replace(RESOURCES, "[1, null]"),
        "FLUX\nSteps: 25, Sampler: Undefined, CFG scale: 3.5, Seed: 1234",
    ],
)
def test_others_are_left_as_they_are(text: str) -> None:
    params = parse(text)
    assert params["CFG scale"] == "3.5" and "Distilled CFG Scale" not in params and "Sampler" not in params


def test_both_spellings_of_beta_s_numbers_are_read() -> None:
    params = parse("Steps: 5, Schedule type: Beta, Beta scheduler alpha: 0.5, Beta scheduler beta: 0.7, Sampler: Euler")
    assert (params["Beta schedule alpha"], params["Beta schedule beta"]) == ("0.5", "0.7")
    assert parse("Steps: 5, Beta schedule alpha: 0.4, Sampler: Euler, Seed: 1")["Beta schedule alpha"] == "0.4"


def test_a_flux_picture_of_forge_asks_for_forge_s_schedules_where_they_differ() -> None:
    text = "Steps: 5, Sampler: Euler, Schedule type: {}, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 1, Version: {}"
    forge = "f2.0.1v1.10.1-previous-313-g8a042934"
    assert parse(text.format("Beta", forge))["Forge flow schedules"] == "True"
    assert parse(text.format("Simple", forge))["Forge flow schedules"] == "False"
    assert parse(text.format("Beta", "neo"))["Forge flow schedules"] == "False"
    assert parse(text.format("Beta", forge).replace("Distilled CFG Scale: 3.5, ", ""))["Forge flow schedules"] == "False"
