"""Pictures with a LoRA against diffusers' pipelines whose network weights include it, computed by hand: W + strength * alpha / rank * up @ down."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from modules.application import Application
from tests.modules.processing.test_processing_parity import as_floats, expected_picture, fields_of
from tests.support.checkpoints import ReferenceModels
from tests.support.extensions import loaded_builtin
from tests.support.fleets import virtual_fleet
from tests.support.loras import write_lora
from tests.support.narrow_application import narrow_application, run, txt2img

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")  # diffusers' own

FAMILIES = ("sd15", "sdxl")
ONE_LEVEL = 1 / 255
TE_STRENGTH, UNET_STRENGTH = 0.5, 0.8
FLEETS = [(1, "single"), (2, "replicas"), (3, "replicas"), (2, "layers"), (3, "layers")]
CASES = [(fleet, family) for fleet in FLEETS for family in FAMILIES if family == "sd15" or fleet != (3, "replicas")]
NIGHTLY = (((3, "replicas"), "sd15"), ((3, "layers"), "sdxl"))


@torch.no_grad()
def fuse_by_hand(reference: ReferenceModels, path: Path) -> ReferenceModels:
    """The networks with the file's changes added, layer by layer, without the product's code."""
    tensors, fused = load_file(path), copy.deepcopy(reference)
    num_changed = 0
    for prefix, model, strength in (
        ("lora_unet_", fused.unet, UNET_STRENGTH), ("lora_te_text_model_", fused.text_encoders[0], TE_STRENGTH),
    ):  # fmt: skip
        for name, weight in model.named_parameters():
            layer = prefix + name.removesuffix(".weight").replace(".", "_")
            if f"{layer}.lora_up.weight" in tensors:
                up, down = tensors[f"{layer}.lora_up.weight"], tensors[f"{layer}.lora_down.weight"]
                weight += strength * float(tensors[f"{layer}.alpha"]) / down.shape[0] * (up @ down)
                num_changed += 1
    assert num_changed == sum(key.endswith(".alpha") for key in tensors)
    return fused


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora_parity")


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By family: diffusers' picture with and without the LoRA."""
    found = {}
    with narrow_application(folder, *FAMILIES) as (_, models):
        for family in FAMILIES:
            path = folder / "models" / "Lora" / f"{family}.safetensors"
            write_lora(path, models[family], te=family == "sd15", scale=0.4)
            found[family] = (expected_picture(fuse_by_hand(models[family], path), "Euler"), expected_picture(models[family], "Euler"))
            assert np.abs(found[family][0] - found[family][1]).mean() > 4 * ONE_LEVEL
    return found


@pytest.fixture(scope="module", params=FLEETS)
def app(request: pytest.FixtureRequest, folder: Path, expected: object) -> Iterator[Application]:
    count, strategy = request.param
    fleet: AbstractContextManager[Any] = virtual_fleet(count)
    with fleet, narrow_application(folder, *FAMILIES) as (application, _), loaded_builtin(application, "sd_forge_lora"):
        application.options.set("multi_gpu_strategy", strategy)
        yield application


@pytest.mark.parametrize(
    ("app", "family"),
    [pytest.param(*case, marks=[pytest.mark.nightly] if case in NIGHTLY else []) for case in CASES],
    indirect=["app"],
    scope="module",
    ids=[f"{kind} on {count}-{family}" for (count, kind), family in CASES],
)
def test_a_lora_is_what_adding_it_by_hand_is(app: Application, expected: dict[str, tuple[np.ndarray, np.ndarray]], family: str) -> None:
    fields = fields_of(family, "Euler")
    with_lora = {**fields, "prompt": f"{fields['prompt']}<lora:{family}:{TE_STRENGTH}:{UNET_STRENGTH}>"}
    jobs = [(with_lora, expected[family][0]), (fields, expected[family][1])]
    for request, picture in jobs if family == "sd15" else jobs[:1]:  # and without it again
        done = run(txt2img(**request))
        assert not done.comments
        assert np.abs(as_floats(done) - picture).mean() < ONE_LEVEL
