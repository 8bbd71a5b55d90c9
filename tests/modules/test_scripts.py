from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modules import scripts
from modules.application import Application
from modules.processing_scripts import process_with_scripts
from modules.scripts_without_page import build_controls
from tests.support import extensions
from tests.support.extensions import ALL_HOOKS, loaded_extensions, write_extension
from tests.support.narrow_application import img2img, narrow_application, pixels, run, txt2img


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with narrow_application(Path(tmp_path_factory.mktemp("data"))) as (app, _):
        yield app


@pytest.fixture
def with_extensions(app: Application, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Gives a function that writes extensions, loads them and builds their controls."""
    import shutil

    opened = []

    def load(**named: dict[str, str]) -> None:
        for name, files in named.items():
            write_extension(app, name, files)
        context = loaded_extensions(app)
        context.__enter__()
        opened.append(context)
        build_controls(app)

    yield load
    for context in opened:
        context.__exit__(None, None, None)
    shutil.rmtree(app.config.extensions_dir, ignore_errors=True)


def arguments(runner: Any, **changed: Any) -> tuple[Any, ...]:
    """The arguments of all scripts as their controls stand, with the slots of `changed` controls (by label) replaced."""
    from modules.scripts_controls import start_values

    values = [0] + [None] * (len(runner.inputs) - 1)
    for slot, value in start_values(runner).items():
        values[slot] = value
    for slot, control in enumerate(runner.inputs):
        if slot and control.label in changed:
            values[slot] = changed[control.label]
    return tuple(values)


def give(app: Application, request: Any, selected: int = 0, **changed: Any) -> Any:
    runner = app.script_runners["txt2img" if "Txt2Img" in type(request).__name__ else "img2img"]
    request.scripts, request.script_args = runner, (selected, *arguments(runner, **changed)[1:])
    return request


def test_a_script_of_the_tab_changes_the_prompt(app: Application, with_extensions: Any) -> None:
    with_extensions(changer=extensions.PROMPT_CHANGER)
    request = give(app, txt2img(), **{"Prompt Changer": True, "Words": "at night"})
    result = run(request)
    assert result.all_prompts == ["a red cat, at night"]
    assert "Changed by: at night" in result.infotexts[0]
    unchanged = run(give(app, txt2img()))
    assert unchanged.all_prompts == ["a red cat"]


def test_the_selected_script_makes_the_pictures(app: Application, with_extensions: Any) -> None:
    with_extensions(changer=extensions.PROMPT_CHANGER, twice=extensions.SELECTABLE)
    runner = app.script_runners["txt2img"]
    assert runner.titles == ["Make it twice"]
    result = process_with_scripts(give(app, txt2img(), 1, **{"Seed step": 3}))
    assert len(result.images) == 2
    assert np.array_equal(pixels(result.images[1]), pixels(run(txt2img(seed=4)).images[0]))
    assert len(process_with_scripts(give(app, txt2img(), 0)).images) == 1


def test_hooks_come_in_their_order_with_what_they_are_promised(app: Application, with_extensions: Any) -> None:
    with_extensions(recorder=extensions.recording_hooks())
    module = scripts.scripts_data[0].module
    run(give(app, txt2img(enable_hr=True, hr_scale=1.25, hr_upscaler="Latent", hr_second_pass_steps=2, denoising_strength=0.6)))
    names = [name for name, _, _ in module.calls]
    assert names == [
        "setup",
        "before_process",
        "process",
        "before_process_batch",
        "after_extra_networks_activate",
        "process_batch",
        "process_before_every_sampling",
        "after_extra_networks_activate",
        "before_hr",
        "process_before_every_sampling",
        "post_sample",
        "postprocess_batch",
        "postprocess_batch_list",
        "postprocess_image",
        "postprocess_image_after_composite",
        "postprocess",
    ]
    by_name = {name: (args, kwargs) for name, args, kwargs in module.calls}
    assert set(by_name["before_process_batch"][1]) == {"batch_number", "prompts", "seeds", "subseeds"}
    assert set(by_name["process_before_every_sampling"][1]) == {"x", "noise", "c", "uc"}
    assert tuple(by_name["postprocess_batch"][1]["images"].shape[:2]) == (1, 3)
    module.calls.clear()
    mask = img2img().init_images[0].convert("L").point(lambda value: 255 if value > 100 else 0)
    run(give(app, img2img(mask=mask, denoising_strength=0.9)))
    names = [name for name, _, _ in module.calls]
    assert names[:4] == ["setup", "before_process", "process", "before_process_init_images"]
    assert names.count("on_mask_blend") > 2
    assert "postprocess_maskoverlay" in names


@pytest.mark.parametrize("hook", ALL_HOOKS)
def test_a_failing_hook_leaves_the_picture_and_other_scripts_unharmed(
    app: Application, with_extensions: Any, caplog: pytest.LogCaptureFixture, hook: str
) -> None:
    with_extensions(failing=extensions.failing_in(hook), zz_changer=extensions.PROMPT_CHANGER)
    mask = img2img().init_images[0].convert("L").point(lambda value: 255 if value > 100 else 0)
    hires = {"enable_hr": True, "hr_scale": 1.25, "hr_upscaler": "Latent", "hr_second_pass_steps": 2}
    make = (lambda: txt2img(**hires)) if hook == "before_hr" else (lambda: img2img(mask=mask, denoising_strength=0.9))
    with caplog.at_level(logging.ERROR):
        result = run(give(app, make(), **{"Prompt Changer": True}))
    expected = make()
    expected.prompt = "a red cat, in the rain"
    assert np.array_equal(pixels(result.images[0]), pixels(run(expected).images[0]))
    assert f"failed in {hook}" in caplog.text
    assert "it broke" in caplog.text
    assert "failing/scripts/failing.py" in caplog.text
    if hook != "postprocess":
        assert f"failed in {hook}" in result.comments
