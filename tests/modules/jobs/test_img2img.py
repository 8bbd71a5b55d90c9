from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from modules.application import Application
from modules.errors import RequestError
from modules.jobs.img2img import process_batch
from modules.jobs.txt2img import txt2img, txt2img_create_processing
from modules.ui.requests import Img2imgBatch, carry_out
from tests.support.narrow_application import gradient, img2img, narrow_application


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with narrow_application(tmp_path_factory.mktemp("narrow")) as (app, _):
        yield app


def test_every_picture_of_a_folder_is_made_and_saved(app: Application, tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a.png", "b.png"):
        gradient(64, 64).save(source / name)
    (source / "broken.png").write_text("no picture", encoding="utf8")
    overrides = {"img2img_batch_use_original_name": True}
    result = process_batch(img2img(steps=2, override_settings=overrides), str(source), str(output), "")
    assert result is not None
    assert len(result.images) == len(result.infotexts) == 2
    assert len(list(output.glob("*.png"))) == 2
    assert sorted(path.stem.split("-")[-1] for path in output.rglob("*.png")) == ["a", "b"]


def test_sizes_follow_the_pictures_and_masks_their_names(app: Application, tmp_path: Path) -> None:
    gradient(64, 48).save(tmp_path / "a.png")
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.new("L", (64, 48), 0).save(masks / "a.png")
    request = img2img(steps=2, inpaint_full_res=False, do_not_save_samples=True)
    result = process_batch(request, [str(tmp_path / "a.png")], "", str(masks), to_scale=True, scale_by=2.0)
    assert result is not None
    assert result.images[0].size == (128, 96)


def test_parameters_can_come_from_each_picture(app: Application, tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", "a house\nSteps: 3, Sampler: Heun, CFG scale: 2.5, Seed: 77, Size: 64x64")
    gradient(64, 64).save(tmp_path / "a.png", pnginfo=info)
    request = img2img(prompt="big", do_not_save_samples=True)
    result = process_batch(request, str(tmp_path), "", "", use_png_info=True, png_info_props=["Prompt", "Seed", "Steps", "Sampler"])
    assert result is not None
    assert result.infotexts[0].startswith("big a house\nSteps: 3, Sampler: Heun, Schedule type: Automatic, CFG scale: 4, Seed: 77")


def test_the_page_carries_a_batch_out_through_the_queue(app: Application, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        gradient(64, 64).save(folder / name)
    arguments = {"input": str(folder), "output_dir": str(tmp_path / "out"), "inpaint_mask_dir": ""}
    batch = Img2imgBatch(request=img2img(steps=2), arguments=arguments)
    processed = app.jobs.submit("task(x)", "img2img", lambda: carry_out(batch)).wait(120)
    assert len(processed.images) == 2
    assert len(list((tmp_path / "out").rglob("*.png"))) == 2


def test_a_batch_interrupted_before_its_first_picture_is_empty(app: Application, tmp_path: Path) -> None:
    gradient(64, 64).save(tmp_path / "a.png")
    app.state.begin("test")
    try:
        app.state.interrupt()
        batch = Img2imgBatch(request=img2img(steps=2), arguments={"input": str(tmp_path), "output_dir": "", "inpaint_mask_dir": ""})
        assert carry_out(batch).images == []
    finally:
        app.state.end()
        app.state.interrupted = False


def test_the_model_of_each_picture_can_be_taken(app: Application, tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", "a house\nSteps: 3, Sampler: Heun, CFG scale: 2.5, Seed: 77, Size: 64x64, Model hash: 0123456789")
    gradient(64, 64).save(tmp_path / "a.png", pnginfo=info)
    request = img2img(steps=2, do_not_save_samples=True)
    result = process_batch(request, str(tmp_path), "", "", use_png_info=True, png_info_props=["Model hash"])
    assert result is not None
    assert "checkpoint '0123456789' is not in" in result.comments


def test_an_empty_folder_says_so(app: Application, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no pictures"):
        process_batch(img2img(), str(tmp_path), "", "")


def test_the_handler_takes_its_arguments_in_the_order_of_the_surface(app: Application) -> None:
    values = ["a cat", "dark", [], 1, 1, 4.0, 3.5, 64, 72, False, 0.5, 2.0, "Latent", 0, 0, 0, None, None, None, None, "", "", 1.0, 3.5, []]
    p = txt2img_create_processing("task(x)", None, *values, "of a script")
    assert (p.prompt, p.negative_prompt, p.height, p.width, p.cfg_scale, p.enable_hr, p.script_args) == (
        "a cat",
        "dark",
        64,
        72,
        4.0,
        False,
        ("of a script",),
    )
    app.options.do_not_show_images = False
    p.steps = 1
    images, facts, text, comments = txt2img("task(y)", None, *values)
    assert images[0].size == (72, 64)
    assert '"prompt": "a cat"' in facts
    assert text.startswith("<p>a cat<br>")
    assert comments == "<p class='comments'></p>"
