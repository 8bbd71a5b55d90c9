"""NaN caused by the request is for the client to fix, and the answer names the cause. Each test runs a whole job."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from modules.api.script_args import build_script_args
from modules.application import Application
from modules.devices import NansException
from modules.errors import RequestError
from modules.processing.nans import NanCauseError
from modules.samplers.kdiffusion import KDiffusionSampler
from modules.scripts.without_page import build_controls
from tests.support.controlnets import build_controlnet, write_controlnet
from tests.support.extensions import loaded_builtin
from tests.support.loras import write_lora
from tests.support.narrow_application import gradient, narrow_application, pixels, run, txt2img

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    folder = tmp_path_factory.mktemp("nans")
    with narrow_application(folder, "sd15", is_shallow=True) as (app, models), loaded_builtin(app, "sd_forge_lora", "sd_forge_controlnet"):
        loras = folder / "models" / "Lora"
        for name, value in (("sound", None), ("holed", math.nan), ("endless", math.inf), ("huge", 1e30)):
            write_lora(loras / f"{name}.safetensors", models["sd15"])
            if value is not None:
                _spoil(loras / f"{name}.safetensors", value)
        control = folder / "models" / "ControlNet" / "holed-control.safetensors"
        write_controlnet(control, build_controlnet(models["sd15"], residual_scale=0.3))
        tensors = load_file(control)
        key = next(name for name in tensors if name.endswith("weight"))
        save_file({**tensors, key: torch.full_like(tensors[key], math.nan)}, control)
        build_controls(app)
        checkpoints = folder / "models" / "Stable-diffusion"
        tensors = load_file(checkpoints / "sd15.safetensors")
        key = next(name for name in tensors if name.endswith("time_embed.0.weight"))
        save_file({**tensors, key: torch.full_like(tensors[key], math.nan)}, checkpoints / "holed-model.safetensors")
        app.checkpoints.refresh()
        app.options.set("sd_model_checkpoint", "sd15.safetensors")
        yield app


def _spoil(path: Path, value: float) -> None:
    tensors = load_file(path)
    save_file(
        {key: torch.full_like(one, value) if one.ndim else one for key, one in tensors.items()}, path, metadata={"ss_base_model_version": "sd_v1"}
    )


def _run(app: Application, prompt: str, units: list[dict[str, Any]] | None = None, **fields: Any) -> np.ndarray:
    request, runner = txt2img(prompt=prompt, **fields), app.script_runners["txt2img"]
    _, arguments = build_script_args(runner, script_name=None, script_args=[], alwayson_scripts={"ControlNet": {"args": units or []}})
    request.is_api, request.scripts, request.script_args = True, runner, tuple(arguments)
    return pixels(run(request).images[0])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("x <lora:sound:1e38>", "LoRA sound has strength 1e\\+38"),
        ("x <lora:sound:-1e38>", "LoRA sound has strength"),
        ("x <lora:sound:1> <lora:holed:0.5>", "LoRA holed contains NaN"),
        ("x <lora:endless:0.5>", "LoRA endless contains NaN or infinite"),
        ("x <lora:huge:1>", "LoRA huge contains values far too large"),
    ],
)
def test_the_cause_is_named_and_the_next_job_is_right(app: Application, prompt: str, words: str) -> None:
    expected = _run(app, "x")
    with pytest.raises(NanCauseError, match=words) as caught:
        _run(app, prompt)
    assert caught.value.status == 422
    assert "sd15" not in str(caught.value)
    assert np.array_equal(_run(app, "x"), expected)


def test_a_checkpoint_with_nan_in_it_is_named(app: Application) -> None:
    with pytest.raises(NanCauseError, match=r"UNet of holed-model contains NaN or infinite values .*time_embed"):
        _run(app, "x", override_settings={"sd_model_checkpoint": "holed-model.safetensors"})


def test_a_controlnet_with_nan_in_it_is_named_and_the_next_job_is_right(app: Application) -> None:
    expected = _run(app, "x")
    unit = {"model": "holed-control", "module": "none", "image": gradient(64, 64)}
    with pytest.raises(NanCauseError, match=r"A ControlNet's file contains NaN or infinite values \(first in ") as caught:
        _run(app, "x", [unit])
    assert caught.value.status == 422
    assert "sd15" not in str(caught.value)
    assert np.array_equal(_run(app, "x"), expected)


@pytest.mark.parametrize("weight", [1e38, -1e38])
def test_a_controlnet_at_an_endless_weight(app: Application, weight: float) -> None:
    unit = {"model": "holed-control", "module": "none", "image": gradient(64, 64), "weight": weight}
    with pytest.raises(RequestError, match=r"ControlNet"):
        _run(app, "x", [unit])


@pytest.fixture
def nan_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sampling result is NaN."""
    sampled = KDiffusionSampler.sample
    monkeypatch.setattr(KDiffusionSampler, "sample", lambda *args, **named: sampled(*args, **named) * math.nan)


@pytest.mark.usefixtures("nan_samples")
def test_nan_without_a_cause_in_the_request_stays_the_servers(app: Application) -> None:
    with pytest.raises(NansException) as caught:
        _run(app, "x <lora:sound:1>")
    assert caught.value.status == 500


@pytest.mark.usefixtures("nan_samples")
def test_numbers_beyond_reason_are_named(app: Application) -> None:
    with pytest.raises(NanCauseError, match=r"part of the prompt has the weight 1e\+08"):
        _run(app, "a (cat:100000000)")
