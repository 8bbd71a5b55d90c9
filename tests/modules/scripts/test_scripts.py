from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from gradio.state_holder import SessionState
from PIL import Image

from modules import scripts
from modules.api.api import create_api
from modules.application import Application
from modules.errors import RequestError
from modules.pictures import images
from modules.processing.chosen_script import process_with_scripts
from modules.samplers.lanes import may_use_lanes
from modules.scripts import callbacks
from modules.scripts.arguments import start_values
from modules.scripts.without_page import build_controls
from modules.ui import requests
from modules.ui import scripts as ui_scripts
from modules.ui import tabs as ui
from modules.ui.paste import Paster
from modules.ui.sections import Choices, Defaults
from modules.ui.txt2img import create_txt2img_tab
from tests.support import extensions
from tests.support.extensions import ALL_HOOKS, loaded_extensions, write_extension
from tests.support.narrow_application import img2img, narrow_application, pixels, run, txt2img


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with narrow_application(Path(tmp_path_factory.mktemp("data")), is_shallow=True) as (app, _):
        yield app


@pytest.fixture
def with_extensions(app: Application, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Returns a function that writes extensions, loads them and builds their controls."""
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
    """The arguments of all scripts from their controls' start values, with the slots of `changed` controls (by label) replaced."""
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
        *("setup", "before_process", "process", "before_process_batch", "after_extra_networks_activate", "process_batch"),
        *("process_before_every_sampling", "after_extra_networks_activate", "before_hr", "process_before_every_sampling", "post_sample"),
        *("postprocess_batch", "postprocess_batch_list", "postprocess_image", "postprocess_image_after_composite", "postprocess"),
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


def test_a_refusal_of_a_built_in_script_ends_the_job(app: Application, with_extensions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    files = extensions.failing_in("process", raises="RequestError('no')")
    with_extensions(failing=files)
    run(give(app, txt2img()))  # one from an extension is isolated like any other failure
    monkeypatch.setattr(app.script_runners["txt2img"], "_is_ours", lambda path: True)
    with pytest.raises(RequestError, match="no"):
        run(give(app, txt2img()))


def test_wrong_hooks_are_reported_when_they_are_loaded(app: Application, with_extensions: Any, caplog: pytest.LogCaptureFixture) -> None:
    text = """
        from modules import scripts

        class Wrong(scripts.Script):
            def title(self):
                return "Wrong"
            def show(self, is_img2img):
                return scripts.AlwaysVisible
            def before_process_batch(self, p):
                pass
            def postproces_image(self, p, pp):
                pass
            def post_sample(self, p):
                pass
            def process_batch(self, p, *, sigmas, **kwargs):
                pass
    """
    with caplog.at_level(logging.WARNING):
        with_extensions(wrong={"scripts/wrong.py": text})
    said = [record.getMessage() for record in caplog.records if "Wrong" in record.getMessage()]
    assert any("does not take batch_number, prompts, seeds, subseeds" in line for line in said)
    assert any("postproces_image() is not a hook" in line and "postprocess_image(self, p, pp, *args)" in line for line in said)
    assert any("post_sample() takes 2 arguments" in line for line in said)
    assert any("requires unknown sigmas" in line for line in said)


def test_a_script_that_cannot_build_its_controls_is_left_out(app: Application, with_extensions: Any, caplog: pytest.LogCaptureFixture) -> None:
    text = """
        import gradio as gr
        from modules import scripts

        class Broken(scripts.Script):
            def title(self):
                return "Broken"
            def ui(self, is_img2img):
                gr.Textbox(label="left behind")
                return [gr.NoSuchControl()]
    """
    with caplog.at_level(logging.ERROR):
        with_extensions(broken={"scripts/broken.py": text}, twice=extensions.SELECTABLE)
    runner = app.script_runners["txt2img"]
    assert [script.title() for script in runner.scripts] == ["Make it twice"]
    assert runner.titles == ["Make it twice"]
    assert "could not build its controls" in caplog.text
    assert len(process_with_scripts(give(app, txt2img(), 1)).images) == 2


def test_a_file_that_cannot_be_imported_is_left_out(app: Application, with_extensions: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        with_extensions(bad={"scripts/bad.py": "import no_such_package_here"}, changer=extensions.PROMPT_CHANGER)
    assert "bad/scripts/bad.py could not be loaded" in caplog.text
    assert [script.title() for script in app.script_runners["txt2img"].scripts] == ["Prompt Changer"]


def test_named_arguments_are_put_into_their_slots(app: Application, with_extensions: Any) -> None:
    with_extensions(changer=extensions.PROMPT_CHANGER)
    runner = app.script_runners["txt2img"]
    args = list(arguments(runner))
    runner.set_named_arg(args, "prompt changer", "words", "x")
    assert args == [0, False, "x", 1]
    runner.set_named_arg(args, "Prompt Changer", "_enabled", True, fuzzy=True)
    assert args[1] is True
    with pytest.raises(RuntimeError, match="no control"):
        runner.set_named_arg(args, "prompt changer", "nothing", 1)
    assert runner.script("PROMPT changer").elem_id("words") == "script_txt2img_prompt_changer_words"


# The API


@pytest.fixture
def client(app: Application) -> TestClient:
    server = FastAPI()
    object.__setattr__(app, "config", dataclasses.replace(app.config, api=True))
    create_api(app, server)
    return TestClient(server)


BODY = {"prompt": "a red cat", "seed": 1, "steps": 2, "width": 64, "height": 64, "sampler_name": "Euler", "cfg_scale": 4, "save_images": False}


def test_the_api_gives_scripts_their_arguments(app: Application, with_extensions: Any, client: TestClient) -> None:
    with_extensions(changer=extensions.PROMPT_CHANGER, twice=extensions.SELECTABLE)
    titles = client.get("/sdapi/v1/scripts").json()
    assert titles == {"txt2img": ["prompt changer", "make it twice"], "img2img": ["prompt changer", "make it twice"]}
    info = {entry["name"]: entry for entry in client.get("/sdapi/v1/script-info").json() if not entry["is_img2img"]}
    assert info["prompt changer"]["is_alwayson"]
    assert [entry["label"] for entry in info["prompt changer"]["args"]] == ["Prompt Changer", "Words", "Side"]
    for args in ([True, "in snow", 0], {"WORDS": "in snow", "prompt changer": True, "Side": 0}):
        answer = client.post("/sdapi/v1/txt2img", json={**BODY, "alwayson_scripts": {"PROMPT CHANGER": {"args": args}}})
        assert answer.status_code == 200, answer.text
        assert json.loads(answer.json()["info"])["all_prompts"] == ["in snow, a red cat"]
    short = client.post("/sdapi/v1/txt2img", json={**BODY, "alwayson_scripts": {"prompt changer": {"args": [True]}}})
    assert json.loads(short.json()["info"])["all_prompts"] == [
        "a red cat, in the rain"
    ]  # type="index": an omitted value becomes the index of its choice
    twice = client.post("/sdapi/v1/txt2img", json={**BODY, "script_name": "Make It Twice", "script_args": [2]})
    assert len(twice.json()["images"]) == 2
    wrong = client.post("/sdapi/v1/txt2img", json={**BODY, "alwayson_scripts": {"prompt changer": {"args": {"Colour": 1}}}})
    assert wrong.status_code == 422
    assert "Controls of this script: Prompt Changer, Words, Side" in wrong.text


# The page


def test_the_page_has_controls_tabs_and_settings_of_extensions(app: Application, with_extensions: Any) -> None:
    with_extensions(changer=extensions.PROMPT_CHANGER, twice=extensions.SELECTABLE, hello=extensions.TABS_AND_ROUTES)
    page = ui.create_ui(app)
    by_id = {block.elem_id: block for block in page.blocks.values() if block.elem_id}
    for tab in ("txt2img", "img2img"):
        assert f"script_{tab}_prompt_changer_words" in by_id
        assert f"{tab}_script_container" in by_id
    assert by_id["script_list"].choices == [("None", "None"), ("Make it twice", "Make it twice")]
    assert by_id["tab_hello_tab"].label == "Hello"
    assert by_id["hello_hidden"].visible == "hidden"
    assert by_id["hello_picture"].sources == ["upload"]
    assert by_id["hello_picture"].height == 480
    assert any(fn.js == "(x) => [x]" for fn in page.fns.values())
    assert app.options.hello_answer == 42
    page.get_config_file()
    server = FastAPI()
    callbacks.app_started_callback(page, server)
    assert TestClient(server).get("/hello/answer").json() == {"answer": 42}
    assert scripts.scripts_data[0].module is not None


def test_the_selected_script_is_shown(app: Application, with_extensions: Any) -> None:
    second = {"scripts/thrice.py": extensions.SELECTABLE["scripts/twice.py"].replace("Make it twice", "Make it thrice")}
    for named in ({"twice": extensions.SELECTABLE}, {"thrice": second}):
        with_extensions(**named)
        page = ui.create_ui(app)
        show = next(fn for fn in page.fns.values() if fn.inputs and fn.inputs[0].elem_id == "script_list")
        with ThreadPoolExecutor(max_workers=1) as pool:  # a browser test may have left its event loop on this thread
            answer = pool.submit(asyncio.run, page.process_api(show, ["Make it twice"], state=SessionState(page))).result()
        shown = [update["visible"] for update in answer["data"]]
        assert shown == [title == "Make it twice" for title in app.script_runners["txt2img"].titles]


def test_values_of_the_page_reach_the_scripts(app: Application, with_extensions: Any) -> None:
    with_extensions(changer=extensions.PROMPT_CHANGER)
    with gr.Blocks(analytics_enabled=False), ui_scripts.page_build(), ui_scripts.tab_scripts(app, "txt2img") as tab:
        built = create_txt2img_tab(
            app, Choices(samplers=["Euler", "Euler a"], schedulers=["Automatic"]), Defaults(width_px=64, height_px=64), [], tab
        )
    values = {name: control.value for name, control in built.inputs.items()}
    values |= {"prompt": "a red cat", "seed": 1, "steps": 2, "sampler_name": "Euler", "script_argument_0": 0}
    slots = {control.label: name for name, control in built.inputs.items() if name.startswith("script_argument_")}
    values |= {slots["Prompt Changer"]: True, slots["Words"]: "at sea", slots["Side"]: 1}
    result = requests.carry_out(requests.build_txt2img(app, values))
    assert result.all_prompts == ["a red cat, at sea"]
    updates = Paster(app, built.paste_target).updates(result.infotexts[0])
    assert len(updates) == len(Paster(app, built.paste_target).outputs())
    assert {"__type__": "update", "value": "at sea"} in updates


def depth_first(block: Any) -> Iterator[Any]:
    yield block
    for child in getattr(block, "children", ()):
        yield from depth_first(child)


def test_scripts_see_the_controls_of_the_page(app: Application, with_extensions: Any) -> None:
    text = """
        import gradio as gr
        from modules import script_callbacks, scripts

        seen, own, before = [], [], []

        class Watcher(scripts.Script):
            def __init__(self):
                self.on_after_component(lambda on: own.append(on.component.elem_id), elem_id="txt2img_steps")
            def title(self):
                return "Watcher"
            def show(self, is_img2img):
                return scripts.AlwaysVisible
            def before_component(self, component, **kwargs):
                before.append(kwargs.get("elem_id"))
            def after_component(self, component, **kwargs):
                if kwargs.get("elem_id") == "txt2img_prompt":
                    gr.Button("Mine", elem_id="mine_behind_the_prompt")

        script_callbacks.on_after_component(lambda component, **kwargs: seen.append(kwargs.get("elem_id")))
    """
    with_extensions(watcher={"scripts/watcher.py": text})
    page = ui.create_ui(app)
    module = scripts.scripts_data[0].module
    assert module.own == ["txt2img_steps"]
    assert {"txt2img_generate", "img2img_generate", "settings_json"} <= set(module.seen)
    assert "txt2img_generate" in module.before
    assert "settings_json" not in module.before  # scripts only see their tabs
    assert not [block for block in page.blocks.values() if "script-group" in block.elem_classes]  # no empty frame
    ids = [block.elem_id for block in depth_first(page) if block.elem_id]
    assert ids.index("mine_behind_the_prompt") == ids.index("txt2img_prompt") + 1
    assert gr.Button.__class__.__call__ is type.__call__  # watching has ended


# Callbacks of a job


def test_callbacks_of_steps_change_the_picture_and_see_whole_batches(app: Application, with_extensions: Any) -> None:
    text = """
        from modules import script_callbacks

        sizes, after = [], []

        def step(params):
            sizes.append((params.x.shape[0], params.sampling_step, params.total_sampling_steps))
            params.x = params.x * 0.9

        def guided(params):
            after.append(params.x.shape[0])

        script_callbacks.on_cfg_denoiser(step)
        script_callbacks.on_cfg_after_cfg(guided)
        script_callbacks.on_image_grid(lambda params: None)
    """
    plain = run(txt2img(batch_size=2))
    with_extensions(steps={"scripts/steps.py": text})
    changed = run(txt2img(batch_size=2))
    module = callbacks.callback_map["callbacks_cfg_denoiser"][0].callback.__globals__
    assert [size for size, _, _ in module["sizes"]] == [2, 2, 2]
    assert [step for _, step, _ in module["sizes"]] == [0, 1, 2]
    assert module["after"] == [2, 2, 2]
    assert not np.array_equal(pixels(plain.images[-1]), pixels(changed.images[-1]))


def test_callbacks_of_saving_change_picture_name_and_infotext(app: Application, with_extensions: Any, tmp_path: Path) -> None:
    text = """
        from pathlib import Path
        from modules import script_callbacks

        saved = []

        def before(params):
            params.image = params.image.convert("L").convert("RGB")
            params.filename = str(Path(params.filename).with_name("mine.png"))
            params.pnginfo["parameters"] += ", changed"

        script_callbacks.on_before_image_saved(before)
        script_callbacks.on_image_saved(lambda params: saved.append(params.filename))
    """
    with_extensions(saving={"scripts/saving.py": text})
    picture = Image.new("RGB", (8, 8), "red")
    path, _ = images.save_image(picture, str(tmp_path), "", info="a cat", extension="png")
    assert Path(path).name == "mine.png"
    module = callbacks.callback_map["callbacks_image_saved"][0].callback.__globals__
    assert module["saved"] == [path]
    with Image.open(path) as written:
        assert written.info["parameters"] == "a cat, changed"
        assert written.convert("RGB").getpixel((0, 0)) == (76, 76, 76)


def test_a_failing_callback_is_reported_and_the_others_are_told(app: Application, with_extensions: Any, caplog: pytest.LogCaptureFixture) -> None:
    text = """
        from modules import script_callbacks

        told = []

        def fail(*args):
            raise KeyError("nothing")

        for register in (script_callbacks.on_model_loaded, script_callbacks.on_before_ui, script_callbacks.on_ui_tabs):
            register(fail)
        script_callbacks.on_model_loaded(told.append)
        script_callbacks.on_list_unets(fail)
    """
    with caplog.at_level(logging.WARNING):
        with_extensions(fails={"scripts/fails.py": text})
        assert "listens to on_list_unets, which never fires here" in caplog.text
        app.models.on_loaded[0]("engine")
        assert callbacks.callback_map["callbacks_model_loaded"][1].callback.__self__ == ["engine"]
        assert callbacks.ui_tabs_callback() == []
    assert "fails/scripts/fails.py failed in on_model_loaded" in caplog.text
    callbacks.remove_callbacks_for_function(callbacks.callback_map["callbacks_model_loaded"][0].callback)
    assert len(callbacks.callback_map["callbacks_model_loaded"]) == 1
    names = [entry.name for entries in callbacks.callback_map.values() for entry in entries]
    assert names == ["fails/fails.py/model_loaded-1"]


def test_who_listens_to_cfg_denoised_changes_the_branches_before_guidance(app: Application, with_extensions: Any) -> None:
    with_extensions(changer=extensions.PROMPT_CHANGER)
    plain = run(give(app, txt2img(negative_prompt="a dog", cfg_scale=7.0)))
    without_guidance = run(give(app, txt2img(negative_prompt="a dog", cfg_scale=1.0)))
    seen: list[tuple[int, ...]] = []

    def no_guidance(params: Any) -> None:
        seen.append(tuple(params.x.shape))
        half = params.x.shape[0] // 2
        params.x = torch.cat([params.x[:half], params.x[:half]])

    callbacks.on_cfg_denoised(no_guidance)
    try:
        listened = run(give(app, txt2img(negative_prompt="a dog", cfg_scale=7.0)))
    finally:
        callbacks.remove_callbacks_for_function(no_guidance)
    assert {shape[0] for shape in seen} == {2}
    assert not np.array_equal(pixels(plain.images[0]), pixels(listened.images[0]))
    difference = np.abs(pixels(without_guidance.images[0]).astype(int) - pixels(listened.images[0]).astype(int))
    assert difference.max() <= 1  # u + 7 (c - u) with u = c is c but for the last bit


def test_a_replaced_callback_state_sees_every_step(app: Application, with_extensions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from modules.sd_samplers_kdiffusion import KDiffusionSampler

    with_extensions(changer=extensions.PROMPT_CHANGER)
    seen: list[int] = []
    original = KDiffusionSampler.callback_state

    def noted(self: Any, d: dict[str, Any]) -> None:
        seen.append(d["i"])
        assert d["x"].shape == d["denoised"].shape
        original(self, d)

    monkeypatch.setattr(KDiffusionSampler, "callback_state", noted)
    request = give(app, txt2img())
    run(request)
    assert seen == list(range(request.steps))


def test_a_loaded_script_has_the_name_of_its_file(app: Application, with_extensions: Any) -> None:
    with_extensions(changer=extensions.PROMPT_CHANGER)
    assert [data.script_class.__module__ for data in scripts.scripts_data] == ["changer.py"]
    assert scripts.scripts_data[0].module is sys.modules["changer.py"] is sys.modules["changer/scripts/changer.py"]


REGISTERING = """
    from modules import script_callbacks, scripts, shared

    class Registering(scripts.Script):
        def __init__(self):
            script_callbacks.on_ui_settings(self.add_settings)

        def add_settings(self):
            shared.opts.add_option("registering", shared.OptionInfo(3, "Set by a constructor", section=("own", "Own")))

        def title(self):
            return "Registering"
"""


def test_settings_that_a_constructor_asks_for_are_collected(app: Application, with_extensions: Any) -> None:
    with_extensions(registering={"scripts/registering.py": REGISTERING})
    assert app.options.registering == 3
    assert sum(script.title() == "Registering" for script in app.script_runners["txt2img"].scripts) == 1


def test_pictures_of_a_batch_go_their_own_ways_unless_someone_looks_on(app: Application, with_extensions: Any) -> None:
    def lanes(p: Any) -> bool:
        unet = SimpleNamespace(model_options={}, controlnet_linked_list=None)
        return may_use_lanes(SimpleNamespace(unet=unet, stop_at=None, funcname="euler"), p, 2)

    request = SimpleNamespace(scripts=None, mask="a mask", refiner=None, rng=SimpleNamespace(of_image=None))
    assert lanes(request)
    with_extensions(changer=extensions.PROMPT_CHANGER)
    request.scripts = app.script_runners["img2img"]
    assert lanes(request)
    callbacks.on_cfg_denoiser(print)
    assert not lanes(request)
    callbacks.remove_callbacks_for_function(print)
    with_extensions(blender=extensions.failing_in("on_mask_blend"))
    assert not lanes(request)
