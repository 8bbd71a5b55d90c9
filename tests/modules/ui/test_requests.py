from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from modules.application import Application
from modules.errors import RequestError
from modules.ui import requests
from modules.ui.img2img import create_img2img_tab
from modules.ui.sections import Choices, Defaults
from modules.ui.txt2img import create_txt2img_tab
from tests.support.applications import installed_application

CHOICES = Choices(samplers=["Euler a"], schedulers=["Automatic"], upscalers=["Latent"])


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path / "data") as app:
        yield app


def values_of(app: Application, create: Any, **changes: Any) -> dict[str, Any]:
    """What a tab sends if only `changes` were touched."""
    with gr.Blocks(analytics_enabled=False):
        tab = create(app, CHOICES, Defaults(width_px=64, height_px=72), [])
    values = {name: control.value for name, control in tab.inputs.items()}
    for name in ("resize_mode", "inpainting_mask_invert", "inpainting_fill", "inpaint_full_res"):
        if name in values:  # a radio sends the index of its choice
            values[name] = [label for label, _ in tab.inputs[name].choices].index(values[name])
    assert set(changes) <= set(values)
    return values | changes


def txt2img(app: Application, **changes: Any) -> Any:
    return requests.build_txt2img(app, values_of(app, create_txt2img_tab, **changes))


def img2img(app: Application, **changes: Any) -> Any:
    return requests.build_img2img(app, values_of(app, create_img2img_tab, **changes))


def picture(width: int = 40, height: int = 24, mode: str = "RGBA") -> Image.Image:
    return Image.new(mode, (width, height), 200 if mode == "L" else None)


def test_untouched_tab_asks_for_what_it_shows(app: Application) -> None:
    p = txt2img(app, prompt="a cat", negative_prompt="a dog")
    assert (p.prompt, p.negative_prompt, p.width, p.height, p.steps, p.cfg_scale) == ("a cat", "a dog", 64, 72, 20, 7)
    assert (p.sampler_name, p.scheduler, p.seed, p.n_iter, p.batch_size, p.enable_hr) == ("Euler a", "Automatic", -1, 1, 1, False)
    assert p.outpath_samples == app.options.outdir_txt2img_samples
    assert p.outpath_grids == app.options.outdir_txt2img_grids


def test_hires_fields_count_only_while_hires_fix_is_on(app: Application) -> None:
    changes = {"hr_scale": 1.5, "hr_second_pass_steps": 7, "denoising_strength": 0.3, "hr_upscaler": "Latent", "hr_additional_modules": []}
    assert txt2img(app, **changes).hr_scale == 2.0
    p = txt2img(app, enable_hr=True, **changes)
    assert (p.enable_hr, p.hr_scale, p.hr_second_pass_steps, p.denoising_strength) == (True, 1.5, 7, 0.3)
    assert p.hr_additional_modules == ["Use same choices"]


def test_extra_seed_controls_count_only_while_they_are_shown(app: Application) -> None:
    changes = {"subseed": 5, "subseed_strength": 0.5, "seed_resize_from_w": 128, "seed_resize_from_h": 256}
    assert txt2img(app, **changes).subseed_strength == 0
    p = txt2img(app, seed_enable_extras=True, **changes)
    assert (p.subseed, p.subseed_strength, p.seed_resize_from_w, p.seed_resize_from_h) == (5, 0.5, 128, 256)


def test_emptied_seed_means_a_new_one(app: Application) -> None:
    assert txt2img(app, seed=None).seed == -1


def test_override_texts_become_settings_of_this_job(app: Application) -> None:
    assert txt2img(app, override_settings=["Clip skip: 2"]).override_settings == {"CLIP_stop_at_last_layers": 2}


def test_img2img_starts_from_the_picture(app: Application) -> None:
    p = img2img(app, init_image=picture(), denoising_strength=0.4, resize_mode=2)
    assert [image.size for image in p.init_images] == [(40, 24)]
    assert (p.denoising_strength, p.resize_mode, p.width, p.height, p.image_mask) == (0.4, 2, 64, 72, None)


def test_resize_by_takes_the_size_of_the_picture(app: Application) -> None:
    p = img2img(app, init_image=picture(100, 50), selected_scale_tab=1, scale_by=2.0)
    assert (p.width, p.height) == (200, 96)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (0, "img2img needs a picture"),
        (1, "Sketch needs a picture"),
        (2, "Inpaint needs a picture"),
        (3, "Inpaint needs a picture"),
        (4, "a picture and a mask"),
        (5, "upload some"),
    ],
)
def test_missing_pictures_are_asked_for_in_words(app: Application, mode: int, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        img2img(app, mode=mode)


def editor(*layers: Image.Image) -> dict[str, Any]:
    return {"background": picture(), "layers": list(layers), "composite": picture()}


def painted(left: int, alpha: int = 255) -> Image.Image:
    layer = Image.new("RGBA", (40, 24), (0, 0, 0, 0))
    layer.paste((255, 255, 255, alpha), (left, 0, left + 4, 24))
    return layer


def test_paint_of_all_layers_is_the_mask(app: Application) -> None:
    p = img2img(app, mode=2, inpaint_editor=editor(painted(0), painted(20), painted(30, alpha=60)), mask_blur=9, inpaint_full_res=1)
    columns = np.asarray(p.image_mask).max(axis=0)
    assert [columns[x] for x in (2, 10, 22, 32)] == [255, 0, 255, 0]
    assert (p.mask_blur, p.inpaint_full_res, p.inpainting_fill, p.inpaint_full_res_padding) == (9, 1, 1, 32)


def test_unpainted_picture_is_told_in_words(app: Application) -> None:
    with pytest.raises(RequestError, match="Nothing is masked"):
        img2img(app, mode=2, inpaint_editor=editor(painted(0, alpha=0)))


def red(left: int, alpha: int = 255) -> Image.Image:
    layer = Image.new("RGBA", (40, 24), (0, 0, 0, 0))
    layer.paste((255, 0, 0, alpha), (left, 0, left + 4, 24))
    return layer


def test_a_sketch_starts_from_the_picture_with_its_paint(app: Application) -> None:
    p = img2img(app, mode=1, sketch=editor(red(8)), denoising_strength=0.6)
    (start,) = p.init_images
    assert (start.getpixel((9, 3)), start.getpixel((0, 0)), p.image_mask) == ((255, 0, 0, 255), picture().getpixel((0, 0)), None)


def test_paint_alone_is_a_sketch_on_white(app: Application) -> None:
    p = img2img(app, mode=1, sketch={"background": None, "layers": [red(8)], "composite": None})
    assert (p.init_images[0].getpixel((9, 3)), p.init_images[0].getpixel((0, 0))) == ((255, 0, 0, 255), (255, 255, 255, 255))


def test_inpaint_sketch_makes_anew_what_was_painted_over_from_the_paint(app: Application) -> None:
    p = img2img(app, mode=3, inpaint_sketch=editor(red(8)))
    assert p.init_images[0].getpixel((9, 3)) == (255, 0, 0, 255)
    assert (p.image_mask.getpixel((9, 3)), p.image_mask.getpixel((0, 0))) == (255, 0)


def test_refiner_counts_only_while_it_is_on(app: Application) -> None:
    assert txt2img(app, refiner_checkpoint="r", refiner_switch_at=0.7).refiner_checkpoint is None
    p = txt2img(app, enable_refiner=True, refiner_checkpoint="r", refiner_switch_at=0.7)
    assert (p.refiner_checkpoint, p.refiner_switch_at) == ("r", 0.7)


def test_a_batch_of_uploads_has_no_folders(app: Application, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    batch = img2img(app, mode=5, batch_files=[str(tmp_path / "a.png")], batch_output_dir="elsewhere", mask_blur=7)
    assert isinstance(batch, requests.Img2imgBatch)
    assert (batch.arguments["input"], batch.arguments["output_dir"], batch.request.mask_blur) == ([str(tmp_path / "a.png")], "", 7)


def test_a_batch_from_a_folder(app: Application) -> None:
    with pytest.raises(RequestError, match="name an input directory"):
        img2img(app, mode=5, batch_kind=1)
    batch = img2img(
        app,
        mode=5,
        batch_kind=1,
        batch_input_dir=" in ",
        batch_output_dir="out",
        batch_mask_dir="masks",
        batch_use_png_info=True,
        batch_png_info_props=["Seed"],
        selected_scale_tab=1,
        scale_by=1.5,
    )
    assert batch.arguments == {
        "input": "in",
        "output_dir": "out",
        "inpaint_mask_dir": "masks",
        "to_scale": True,
        "scale_by": 1.5,
        "use_png_info": True,
        "png_info_props": ["Seed"],
        "png_info_dir": None,
    }


def test_folders_of_the_server_can_be_forbidden(tmp_path: Path) -> None:
    with installed_application(tmp_path / "data", hide_ui_dir_config=True) as app, pytest.raises(RequestError, match="--hide-ui-dir-config"):
        img2img(app, mode=5, batch_kind=1, batch_input_dir="/etc")


def test_uploaded_mask_is_its_transparency_or_its_brightness(app: Application) -> None:
    transparent = Image.new("RGBA", (40, 24), (255, 255, 255, 0))
    transparent.putpixel((3, 3), (0, 0, 0, 255))
    mask = img2img(app, mode=4, inpaint_upload_image=picture(), inpaint_upload_mask=transparent).image_mask
    assert (mask.getpixel((3, 3)), mask.getpixel((0, 0))) == (255, 0)
    opaque = Image.new("RGBA", (40, 24), (0, 0, 0, 255))
    opaque.putpixel((3, 3), (255, 255, 255, 255))
    mask = img2img(app, mode=4, inpaint_upload_image=picture(), inpaint_upload_mask=opaque).image_mask
    assert (mask.getpixel((3, 3)), mask.getpixel((0, 0))) == (255, 0)


def test_upscale_makes_the_selected_picture_again_with_hires_fix(app: Application) -> None:
    app.config.outputs_dir.mkdir(parents=True, exist_ok=True)
    picture(64, 72, "RGB").save(app.config.outputs_dir / "b.png")
    shown = {
        "gallery": [("a.png", None), (str(app.config.outputs_dir / "b.png"), None)],
        "picture_index": 1,
        "generation_info": json.dumps({"infotexts": ["x", "a <cat>\nNegative prompt: dog\nSteps: 4, Sampler: Euler a, Seed: 77, Variation seed: 5"]}),
    }
    values = values_of(app, create_txt2img_tab, prompt="other", hr_scale=1.5, n_iter=4, batch_size=2, denoising_strength=0.2)
    p = requests.build_upscale(app, values | shown)
    assert (p.prompt, p.negative_prompt, p.seed, p.subseed) == ("a <cat>", "dog", 77, 5)
    assert (p.enable_hr, p.hr_scale, p.denoising_strength, p.n_iter, p.batch_size) == (True, 1.5, 0.2, 1, 1)
    assert (p.firstpass_image.size, p.width, p.height) == ((64, 72), 64, 72)


def test_upscale_without_a_picture_is_told_in_words(app: Application) -> None:
    values = values_of(app, create_txt2img_tab) | {"gallery": None, "picture_index": 0, "generation_info": ""}
    with pytest.raises(RequestError, match="no picture to upscale"):
        requests.build_upscale(app, values)


def test_upscale_takes_pictures_of_the_page_alone(app: Application, tmp_path: Path) -> None:
    picture(64, 72, "RGB").save(tmp_path / "private.png")
    shown = {"gallery": [(str(tmp_path / "private.png"), None)], "picture_index": 0, "generation_info": "{}"}
    with pytest.raises(RequestError, match="not a picture of this page"):
        requests.build_upscale(app, values_of(app, create_txt2img_tab) | shown)
