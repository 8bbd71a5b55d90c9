"""Whole extensions written like public ones (tests/modules/guests), on one device and on two virtual GPUs under each plan."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from modules import scripts
from modules.api.api import create_api
from modules.application import Application
from modules.infotext.parameters import parse_generation_parameters
from modules.processing.chosen_script import process_with_scripts
from modules.scripts import callbacks
from modules.scripts.without_page import build_controls
from modules.ui import tabs as ui
from tests.modules.scripts.test_scripts import give
from tests.support.event_loops import close_event_loops as close_event_loops
from tests.support.extensions import loaded_extensions
from tests.support.fleets import virtual_fleet
from tests.support.narrow_application import img2img, narrow_application, pixels, txt2img

GUESTS_DIR = Path(__file__).parent / "guests"
Pictures = dict[str, list[np.ndarray]]
TEMPLATE = "a cat in the __weather__ and __nothing__"
ROUNDING = 2  # of 255; docs/multi_gpu.md says why replicas differ at all


@contextmanager
def _with_guests(data_dir: Path) -> Iterator[Application]:
    with narrow_application(data_dir, "sd15", is_shallow=True) as (app, _):
        shutil.copytree(GUESTS_DIR, app.config.extensions_dir)
        with loaded_extensions(app):
            build_controls(app)
            yield app


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with _with_guests(tmp_path_factory.mktemp("data")) as app:
        yield app


def _images(result: Any) -> list[np.ndarray]:
    return [pixels(image) for image in result.images[result.index_of_first_image :]]


@pytest.fixture(scope="module")
def pictures_of_one_device(app: Application) -> Pictures:
    return {name: _images(process_with_scripts(make(app))) for name, make in JOBS.items()}


def _plain(app: Application) -> Any:
    return give(app, txt2img(batch_size=2, do_not_save_grid=True))


def _shaped(app: Application) -> Any:
    return give(app, txt2img(batch_size=2, do_not_save_grid=True), **{"Skip Shaper Integrated": True})


def _shaped_hires(app: Application) -> Any:
    request = txt2img(enable_hr=True, hr_scale=1.5, hr_upscaler="Latent", hr_second_pass_steps=2, denoising_strength=0.7)
    return give(app, request, **{"Skip Shaper Integrated": True, "Skip": 0.4})


def _watched(app: Application) -> Any:
    return give(app, img2img(batch_size=2, do_not_save_grid=True), Active=True)


def _rounds(app: Application) -> Any:
    request = txt2img(prompt="a cat in the __weather__", n_iter=2, do_not_save_grid=True, outpath_grids=app.options.outdir_txt2img_grids)
    return give(app, request, _number_of(app, "Many rounds"), **{"Rounds": 2, "Words by round": "red\nblue", "Frame px": 8})


JOBS = {"plain": _plain, "shaped": _shaped, "shaped hires": _shaped_hires, "watched": _watched, "rounds": _rounds}


def _number_of(app: Application, title: str) -> int:
    return app.script_runners["txt2img"].titles.index(title) + 1


@pytest.fixture(scope="module", params=["replicas", "layers"])
def app_of_two_gpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pictures_of_one_device: Any) -> Iterator[Application]:
    """The same extensions on two virtual GPUs. The one-device application made its pictures before, because only one can be installed at a time."""
    with virtual_fleet(2), _with_guests(tmp_path_factory.mktemp("two")) as app:
        app.options.set("multi_gpu_strategy", request.param)
        yield app


def test_hooks_of_guests_change_pictures(pictures_of_one_device: Pictures) -> None:
    plain, shaped = pictures_of_one_device["plain"], pictures_of_one_device["shaped"]
    assert len(plain) == len(shaped) == 2
    assert all(np.abs(one - other).mean() > 1 for one, other in zip(plain, shaped, strict=True))


def test_words_are_dealt_by_seed_and_kept_in_infotext_and_file(app: Application, pictures_of_one_device: Any) -> None:
    result = process_with_scripts(give(app, txt2img(prompt=TEMPLATE, batch_size=2, seed=3)))
    words = {prompt.split()[4] for prompt in result.all_prompts}
    assert words <= {"snow", "rain", "fog"}
    assert all(prompt.endswith("__nothing__") for prompt in result.all_prompts)
    assert parse_generation_parameters(result.infotexts[result.index_of_first_image])["Dealt words"] == TEMPLATE
    saved = _module("dealt_words").saved
    with Image.open(saved[-1] if "grid" not in saved[-1] else saved[-2]) as written:
        assert written.info["dealt"] == result.all_prompts[0]
    again = process_with_scripts(give(app, txt2img(prompt=TEMPLATE, batch_size=2, seed=3)))
    assert again.all_prompts == result.all_prompts


def test_a_watcher_sees_every_step_of_the_whole_batch_and_is_gone_afterwards(app: Application, pictures_of_one_device: Any) -> None:
    process_with_scripts(_watched(app))
    watcher = next(script for script in app.script_runners["img2img"].scripts if script.title() == "Step watcher")
    assert watcher.shapes == {(2, 4, 8, 8)}
    steps = [step for step, _ in watcher.steps]
    assert steps == list(range(len(steps)))
    assert len(steps) >= 3
    process_with_scripts(give(app, img2img()))
    assert watcher.steps == []


def test_rounds_make_a_grid_and_name_their_round(app: Application, pictures_of_one_device: Any) -> None:
    result = process_with_scripts(_rounds(app))
    assert len(result.images) == 1 + 2 * (2 + 1), "a grid, and two pictures a round with what the other guest adds to each round"
    assert result.images[0].size == (192, 128)
    assert [parse_generation_parameters(text)["Round"] for text in result.infotexts[1:]] == ["1"] * 3 + ["2"] * 3
    assert all(pixels(image)[0, 0].tolist() == [255, 0, 0] for image in result.images[1:])


@pytest.mark.parametrize("name", list(JOBS))
def test_guests_make_the_same_pictures_over_two_gpus(app_of_two_gpus: Application, pictures_of_one_device: Pictures, name: str) -> None:
    pictures = _images(process_with_scripts(JOBS[name](app_of_two_gpus)))
    differences = [np.abs(one - other).max() for one, other in zip(pictures, pictures_of_one_device[name], strict=True)]
    assert max(differences) <= ROUNDING


def test_the_page_and_the_api_have_what_guests_bring(tmp_path: Path) -> None:
    with _with_guests(tmp_path) as app:
        page = ui.create_ui(app)
        by_id = {block.elem_id: block for block in page.blocks.values() if block.elem_id}
        assert by_id["tab_dealt_words_tab"].label == "Dealt Words"
        assert "script_txt2img_dealt_words_refresh" in by_id
        assert app.options.dealt_words_count == 3
        assert any("'__' + name" in (fn.js or "") for fn in page.fns.values() if isinstance(fn.js, str))
        boxes = {tab: script.prompt_box for tab, runner in app.script_runners.items() for script in runner.scripts if script.title() == "Dealt Words"}
        assert {tab: box.elem_id for tab, box in boxes.items()} == {"txt2img": "txt2img_prompt", "img2img": "img2img_prompt"}
        server = FastAPI()
        object.__setattr__(app, "config", dataclasses.replace(app.config, api=True))
        create_api(app, server)
        callbacks.app_started_callback(page, server)
        client = TestClient(server)
        assert client.get("/dealt-words/lists").json() == {"lists": ["weather"]}
        body = {"prompt": "a cat", "steps": 1, "width": 64, "height": 64, "sampler_name": "Euler"}
        answer = client.post("/sdapi/v1/txt2img", json={**body, "alwayson_scripts": {"skip shaper integrated": {"args": [True, 1.2, 0.9, 0]}}})
        assert answer.status_code == 200, answer.text
        assert "shaper_backbone: 1.2" in answer.json()["info"]


def _module(stem: str) -> Any:
    return next(entry.module for entry in scripts.scripts_data if Path(entry.path).stem == stem)
