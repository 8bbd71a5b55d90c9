from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from modules.application import Application
from modules.errors import RequestError
from modules.jobs.img2img import ARGUMENTS, img2img_create_processing, process_batch
from modules.jobs.img2img import img2img as page_img2img
from modules.jobs.txt2img import txt2img, txt2img_create_processing
from modules.ui.requests import Img2imgBatch, carry_out
from tests.support.narrow_application import gradient, img2img, narrow_application


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with narrow_application(tmp_path_factory.mktemp("narrow"), is_shallow=True) as (app, _):
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


def page_arguments(**changed: Any) -> list[Any]:
    values: dict[str, Any] = {
        "mode": 0, "prompt": "a red cat", "negative_prompt": "", "styles": [], "mask_blur": 0, "inpainting_fill": 1, "n_iter": 1, "batch_size": 1,
        "cfg_scale": 4.0, "distilled_cfg_scale": 3.5, "denoising_strength": 0.7, "selected_scale_tab": 0, "height": 64, "width": 64, "scale_by": 1.0,
        "resize_mode": 0, "inpaint_full_res": False, "inpaint_full_res_padding": 32, "inpainting_mask_invert": 0, "override_settings_texts": [],
        **changed,
    }  # fmt: skip
    return [values.get(name) for name in ARGUMENTS]


def test_the_page_handler_takes_forges_arguments(app: Application) -> None:
    picture = gradient(64, 64)
    pictures, info, shown, comments = page_img2img("", None, *page_arguments(init_img=picture))
    assert len(pictures) == 1 and '"prompt": "a red cat"' in info and shown.startswith("<p>a red cat") and comments == "<p class='comments'></p>"
    with pytest.raises(RequestError, match="mode 2 has no picture"):
        page_img2img("", None, *page_arguments(mode=2))


def test_the_handlers_modes_hold_a_picture_and_a_mask(app: Application) -> None:
    picture, painted = gradient(64, 64), Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    painted.paste((255, 0, 0, 128), (0, 0, 32, 64))

    def built(**values: Any) -> Any:
        return img2img_create_processing(None, dict(zip(ARGUMENTS, page_arguments(**values))), (7,))

    masked = built(mode=2, init_img_with_mask=picture, init_img_with_mask_fg=painted)
    assert masked.image_mask.getpixel((1, 1)) == 128 and masked.image_mask.getpixel((60, 1)) == 0 and masked.script_args == (7,)
    assert masked.init_images[0].getpixel((1, 1)) == picture.getpixel((1, 1))
    sketch = built(mode=1, sketch=picture, sketch_fg=painted)
    assert sketch.image_mask is None and sketch.init_images[0].getpixel((60, 1))[:3] == picture.getpixel((60, 1))
    assert sketch.init_images[0].getpixel((1, 1))[0] > picture.getpixel((1, 1))[0] + 50
    both = built(mode=3, inpaint_color_sketch=picture, inpaint_color_sketch_fg=painted)
    assert both.image_mask.getpixel((1, 1)) == 255 and both.init_images[0].getpixel((1, 1))[0] > 100
    uploaded = built(mode=4, init_img_inpaint=picture, init_mask_inpaint=painted, selected_scale_tab=1, scale_by=2.0)
    assert uploaded.image_mask is painted and (uploaded.width, uploaded.height) == (128, 128)


def test_the_handler_runs_a_folder(app: Application, tmp_path: Path) -> None:
    gradient(64, 64).save(tmp_path / "a.png")
    out = tmp_path / "out"
    pictures, *_ = page_img2img("", None, *page_arguments(mode=5, batch_input_dir=str(tmp_path), batch_output_dir=str(out)))
    assert len(pictures) == 1 and len(list(out.rglob("*.png"))) == 1
