"""The scripts of the Script dropdown: what they make equals the same jobs one by one, and what cannot be made is refused in words."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modules import images, scripts
from modules.application import Application
from modules.errors import RequestError
from modules.processing import Processed
from modules.processing.chosen_script import process_with_scripts
from modules.scripts.arguments import start_values
from modules.scripts.without_page import build_controls
from tests.support.extensions import builtin_module, loaded_builtin
from tests.support.narrow_application import img2img, narrow_application, pixels, run, txt2img

PLOT = "X/Y/Z plot"
OFF = (False, False, False)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    folder = tmp_path_factory.mktemp("scripts")
    with narrow_application(folder, is_shallow=True) as (app, _):
        checkpoint = app.config.ckpt_dirs[0] / "sd15.safetensors"
        (checkpoint.parent / "second.safetensors").write_bytes(checkpoint.read_bytes())
        app.checkpoints.refresh()
        app.options.samples_save = app.options.grid_save = False
        with loaded_builtin(app, "selectable_scripts"):
            build_controls(app)
            yield app


def make(app: Application, title: str, request: Any, *args: Any) -> Processed:
    """The job with `title` selected and its first arguments `args`, the others as its controls stand."""
    runner = app.script_runners["img2img" if "Img2Img" in type(request).__name__ else "txt2img"]
    script = runner.script(title)
    slots = start_values(runner)
    values = [slots.get(slot) for slot in range(len(runner.inputs))]
    values[0] = runner.selectable_scripts.index(script) + 1
    values[script.args_from : script.args_from + len(args)] = args
    request.scripts, request.script_args = runner, tuple(values)
    return process_with_scripts(request)


def same(one: Any, other: Any) -> bool:
    return np.array_equal(pixels(one), pixels(other))


def axis(app: Application, label: str, tab: str = "txt2img") -> int:
    return [option.label for option in app.script_runners[tab].script(PLOT).current_axis_options].index(label)


def test_each_script_takes_the_arguments_that_clients_know(app: Application) -> None:
    runner = app.script_runners["img2img"]
    labels = {script.title(): [control.label for control in script.controls] for script in runner.selectable_scripts}
    assert labels["Prompt matrix"] == [
        "Put variable parts at start of prompt",
        "Use different seed for each picture",
        "Select prompt",
        "Select joining char",
        "Grid margins (px)",
    ]
    assert labels["Prompts from file or textbox"] == [
        "Iterate seed every line",
        "Use same random seed for all lines",
        "Insert prompts at the",
        "List of prompt inputs",
    ]
    assert labels["Loopback"][:3] == ["Loops", "Final denoising strength", "Denoising strength curve"]
    assert labels[PLOT] == [
        *(f"{letter} {what}" for letter in "XYZ" for what in ("type", "values", "values")),
        *("Draw legend", "Include Sub Images", "Include Sub Grids", "Keep -1 for seeds", "Vary seeds for X", "Vary seeds for Y", "Vary seeds for Z"),
        *("Grid margins (px)", "Use text inputs instead of dropdowns"),
    ]
    assert "Loopback" not in app.script_runners["txt2img"].titles
    plot = next(data for data in scripts.scripts_data if data.script_class.__module__ == "xyz_grid.py")
    assert plot.module.AxisOption is plot.module.axis_options[0].__class__


def test_a_prompt_matrix_is_every_combination(app: Application) -> None:
    result = make(app, "Prompt matrix", txt2img(prompt="a cat|in rain|at night"), False, False, "positive", "comma", 4)
    prompts = ["a cat", "a cat, in rain", "a cat, at night", "a cat, in rain, at night"]
    assert result.all_prompts == prompts
    assert (len(result.images), result.index_of_first_image) == (5, 1)
    assert set(result.all_seeds) == {1}
    assert same(result.images[2], run(txt2img(prompt=prompts[1])).images[0])
    assert result.images[0].width > 2 * 64 and result.images[0].height > 2 * 64


def test_a_prompt_matrix_of_the_negative_prompt(app: Application) -> None:
    result = make(app, "Prompt matrix", txt2img(negative_prompt="dog|bird"), True, True, "negative", "space", 0)
    assert result.all_negative_prompts == ["dog", "bird dog"]
    assert result.all_prompts == ["a red cat"] * 2
    assert result.all_seeds == [1, 2]
    with pytest.raises(RequestError, match="12 optional parts"):
        make(app, "Prompt matrix", txt2img(prompt="|".join("abcdefghijklm")))
    with pytest.raises(RequestError, match="choose one of comma, space"):
        make(app, "Prompt matrix", txt2img(), False, False, "positive", "semicolon")


def test_prompts_of_a_text_are_jobs_of_their_own(app: Application) -> None:
    text = 'a dog\n\n--prompt "two birds" --steps 2 --seed 9 --cfg_scale 2.5 --width 72\n'
    result = make(app, "Prompts from file or textbox", txt2img(prompt=""), False, False, "start", text)
    assert result.all_prompts == ["a dog", "two birds"]
    assert same(result.images[0], run(txt2img(prompt="a dog")).images[0])
    assert same(result.images[1], run(txt2img(prompt="two birds", steps=2, seed=9, cfg_scale=2.5, width=72)).images[0])
    assert "Steps: 2" in result.infotexts[1] and "Size: 72x64" in result.infotexts[1]
    counted = make(app, "Prompts from file or textbox", txt2img(prompt="big"), True, False, "end", "one\ntwo")
    assert (counted.all_prompts, counted.all_seeds) == (["big one", "big two"], [1, 2])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--outpath_samples /tmp --prompt x", "is not an option"),
        ('--prompt "x', "quotation marks"),
        ("--steps many", "--steps 'many'"),
        ("--prompt a --steps", "has no value"),
        ("--tiling perhaps", "true or false"),
        ("", "0 lines"),
    ],
)
def test_a_line_that_cannot_be_read_is_refused_before_anything_is_made(app: Application, line: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        make(app, "Prompts from file or textbox", txt2img(), False, False, "start", line)


def test_loopback_starts_each_picture_from_the_one_before(app: Application) -> None:
    result = make(app, "Loopback", img2img(denoising_strength=0.8), 3, 0.4, "Linear", "None")
    assert [text.split("Denoising strength: ")[1].split(",")[0] for text in result.infotexts[1:]] == ["0.8", "0.6", "0.4"]
    assert result.all_seeds == [1, 2, 3]
    second = run(img2img(init_images=[result.images[1]], denoising_strength=0.6, seed=2))
    assert same(result.images[2], second.images[0])
    assert len(result.images) == 4
    with pytest.raises(RequestError, match="Aggressive, Linear, Lazy"):
        make(app, "Loopback", img2img(denoising_strength=0.8), 3, 0.4, "Steep", "None")


def test_cells_of_a_plot_are_the_jobs_themselves(app: Application) -> None:
    steps, scale = axis(app, "Steps"), axis(app, "CFG Scale")
    result = make(app, PLOT, txt2img(), steps, "2, 3", [], scale, "1-5 (+4)", [], 0, "", [], True, True, False, False, *OFF, 2, False)
    assert (len(result.images), result.index_of_first_image) == (5, 1)
    cells = [(2, 1.0), (3, 1.0), (2, 5.0), (3, 5.0)]
    for picture, (num_steps, cfg_scale) in zip(result.images[1:], cells):
        assert same(picture, run(txt2img(steps=num_steps, cfg_scale=cfg_scale)).images[0])
    for part in ("Script: X/Y/Z plot", "X Type: Steps", 'X Values: "2, 3"', "Y Type: CFG Scale", "Y Values: 1-5 (+4)"):
        assert part in result.infotexts[0]
    plain = make(app, PLOT, txt2img(), steps, "2, 3", [], scale, "1-5 (+4)", [], 0, "", [], False, False, False, False, *OFF, 0, False)
    assert [image.size for image in plain.images] == [(128, 128)]
    assert same(plain.images[0].crop((64, 64, 128, 128)), result.images[4])


def test_three_axes_have_a_grid_for_each_value_of_the_third(app: Application) -> None:
    words, seed, sampler = axis(app, "Prompt S/R"), axis(app, "Seed"), axis(app, "Sampler")
    args = (words, "cat, dog", [], seed, "5,6", [], sampler, "", ["Euler", "Heun"])
    result = make(app, PLOT, txt2img(), *args, False, True, True, False, *OFF, 0, False)
    assert [image.size for image in result.images[:3]] == [(256, 128), (128, 128), (128, 128)]
    assert result.index_of_first_image == 3 and len(result.images) == 11
    assert same(result.images[3 + 5], run(txt2img(prompt="a red dog", seed=5, sampler_name="Heun")).images[0])


def test_seeds_count_up_along_an_axis_and_random_ones_are_fixed(app: Application) -> None:
    steps, seed = axis(app, "Steps"), axis(app, "Seed")
    varied = make(app, PLOT, txt2img(), steps, "1,1", [], steps, "1,1", [], 0, "", [], False, True, False, False, True, True, False, 0, False)
    assert varied.all_seeds == [1, 2, 3, 4]
    fixed = make(app, PLOT, txt2img(), seed, "-1, 7", [], steps, "1,2", [], 0, "", [], False, True, False, False, *OFF, 0, False)
    assert fixed.all_seeds[0] == fixed.all_seeds[2] != -1 and fixed.all_seeds[1] == fixed.all_seeds[3] == 7
    assert "Fixed X Values" in fixed.infotexts[0]


def test_a_checkpoint_is_loaded_once_for_each_value(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(app.models, "on_loaded", [*app.models.on_loaded, loaded.append])
    steps, checkpoint = axis(app, "Steps"), axis(app, "Checkpoint name")
    app.models.unload()
    result = make(app, PLOT, txt2img(), steps, "1,2,3", [], checkpoint, "", ["sd15", "second"], 0, "", [], False, True, False, False, *OFF, 0, False)
    assert len(loaded) == 2
    assert ["Model: sd15" in text for text in result.infotexts[1:]] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("label", "text", "says"),
    [
        ("Steps", "", "has 0 values"),
        ("Steps", "many", "is neither a number nor a range"),
        ("Steps", "1-999999", "1 to 1000"),
        ("Steps", "1-5 (+0)", "has 0 values"),
        ("Prompt S/R", "horse, cow", "did not find 'horse'"),
        ("Prompt order", "a, b, c, d, e, f, g", "at most 6"),
        ("Size", "wide", "is not a size"),
        ("Seed", "1-900", "megapixels"),
    ],
)
def test_values_that_make_no_picture_are_refused(app: Application, label: str, text: str, says: str) -> None:
    app.options.img_max_size_mp = 3
    try:
        with pytest.raises(RequestError, match=says):
            make(app, PLOT, txt2img(), axis(app, label), text, [])
    finally:
        app.options.img_max_size_mp = 200


@pytest.mark.parametrize(
    ("label", "text", "says"),
    [
        ("Steps", "1-1000," * 5000, "has 5000 values"),
        ("Steps", "9" * 400 + "-5", "neither a number nor a range"),
        ("Steps", "9" * 5000, "neither a number nor a range"),
        ("Seed", "1-5 [" + "9" * 5000 + "]", "neither a number nor a range"),
        ("Prompt S/R", "cat, " + "b" * 140_000, "cannot be read"),
        ("Prompt S/R", "e, " + "b" * 90_000, "would make a prompt of 270"),
        ("Size", "9" * 5000 + "x8", "is not a size"),
        ("Size", "64x64, 16384x16384", "megapixels"),
    ],
)
def test_values_without_end_are_refused_and_not_counted_out(app: Application, label: str, text: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        make(app, PLOT, txt2img(prompt="a red ember"), axis(app, label), text, [])


def test_a_plot_of_more_pictures_than_a_job_may_have_is_refused_whatever_the_settings_allow(app: Application) -> None:
    """A billion cells: their list alone would take all memory."""
    seed, variation, steps = (axis(app, label) for label in ("Seed", "Var. seed", "Steps"))
    app.options.img_max_size_mp = 1e9
    try:
        with pytest.raises(RequestError, match="1000000000 pictures were requested"):
            make(app, PLOT, txt2img(width=8, height=8), seed, "1-1000", [], variation, "1-1000", [], steps, "1-1000", [])
        with pytest.raises(RequestError, match="20000 pictures"):
            make(app, PLOT, txt2img(batch_size=20), seed, "1-1000", [])
    finally:
        app.options.img_max_size_mp = 200


ODD_NUMBERS = (float("nan"), 1e12, -1, 10**400, "wide", [1], None)


@pytest.mark.parametrize("margin", ODD_NUMBERS)
def test_margins_are_within_the_bounds_of_their_slider(app: Application, margin: Any) -> None:
    with pytest.raises(RequestError, match=r"Grid margins \(px\) is .*; send a number from 0 to 500"):
        make(app, "Prompt matrix", txt2img(), False, False, "positive", "comma", margin)
    args = (axis(app, "Seed"), "1", [], 0, "", [], 0, "", [], True, False, False, False, *OFF, margin, False)
    with pytest.raises(RequestError, match=r"Grid margins \(px\) is .*; send a number from 0 to 500"):
        make(app, PLOT, txt2img(), *args)


@pytest.mark.parametrize("number", ODD_NUMBERS)
def test_numbers_of_a_loopback_are_within_bounds(app: Application, number: Any) -> None:
    with pytest.raises(RequestError, match=r"Loops is .*; send a number from 1 to 32"):
        make(app, "Loopback", img2img(), number, 0.5, "Linear", "None")
    with pytest.raises(RequestError, match=r"Final denoising strength is .*; send a number from 0 to 1"):
        make(app, "Loopback", img2img(), 2, number, "Linear", "None")


@pytest.mark.parametrize("choice", [["Linear"], {}, 5, None, "linear"])
def test_choices_of_a_script_are_those_of_its_controls(app: Application, choice: Any) -> None:
    with pytest.raises(RequestError, match=r"curve is .*; choose one of Aggressive, Linear, Lazy"):
        make(app, "Loopback", img2img(), 2, 0.5, choice, "None")
    with pytest.raises(RequestError, match=r"Select prompt is .*; choose one of positive, negative"):
        make(app, "Prompt matrix", txt2img(), False, False, choice)


def test_a_matrix_of_a_prompt_with_line_breaks_has_its_grid(app: Application) -> None:
    result = make(app, "Prompt matrix", txt2img(prompt="a cat|in\nrain\t|\x00\ud800"), False, False, "positive", "comma", 0)
    assert len(result.images) == 5


def test_texts_of_jobs_are_bounded(app: Application) -> None:
    name = "Prompts from file or textbox"
    with pytest.raises(RequestError, match="a line has 100003 characters"):
        make(app, name, txt2img(), False, False, "start", "--a" + "b" * 100_000)
    with pytest.raises(RequestError, match="10001 lines"):
        make(app, name, txt2img(), False, False, "start", "a\n" * 10_001)
    with pytest.raises(RequestError, match="20000 pictures were requested"):
        make(app, name, txt2img(), False, False, "start", "--n_iter 100 --batch_size 200")
    with pytest.raises(RequestError, match="0 lines"):
        make(app, name, txt2img(), False, False, "start", None)


def test_a_grid_of_pictures_that_came_out_too_large_is_left_out_and_said(app: Application) -> None:
    app.options.img_max_size_mp = 0.02
    try:
        args = (axis(app, "Seed"), "1,2", [], 0, "", [], 0, "", [], True, False, False, False, *OFF, 0, False)
        result = make(app, PLOT, txt2img(enable_hr=True, hr_scale=2, denoising_strength=0.5, hr_second_pass_steps=1), *args)
    finally:
        app.options.img_max_size_mp = 200
    assert [picture.size for picture in result.images] == [(128, 128)] * 2
    assert "no grid of 0.0328 megapixels was drawn" in result.comments


def test_an_axis_and_a_choice_that_are_not_there_are_refused(app: Application) -> None:
    for index in (999, -1, "Steps", True, None):
        with pytest.raises(RequestError, match="is not an axis"):
            make(app, PLOT, txt2img(), index, "1", [])
    with pytest.raises(RequestError, match="'Faster' is unknown"):
        make(app, PLOT, txt2img(), axis(app, "Sampler"), "", ["Faster"])
    with pytest.raises(RequestError, match="no checkpoint 'gone'"):
        make(app, PLOT, txt2img(), axis(app, "Checkpoint name"), "", ["gone"])


def test_values_are_read_from_lists_ranges_and_orders() -> None:
    axes = builtin_module("xyz_axes")
    options = {option.label: option for option in axes.build_axis_options()}

    def read(label: str, text: str, chosen: tuple[str, ...] = (), *, csv_mode: bool = False) -> list[Any]:
        return list(axes.read_values(options[label], text, chosen, csv_mode=csv_mode))

    assert read("Steps", "1-5, 9") == [1, 2, 3, 4, 5, 9]
    assert read("Steps", "10-4 (-3)") == [10, 7, 4]
    assert read("CFG Scale", "1-2 (+0.25)") == [1, 1.25, 1.5, 1.75, 2]
    assert read("Denoising", "0-1 [5]") == [0, 0.25, 0.5, 0.75, 1]
    assert read("Seed", "-1") == [-1]
    assert read("Prompt S/R", 'a, "b, c"') == ["a", "b, c"]
    assert read("Prompt order", "x, y") == [("x", "y"), ("y", "x")]
    assert read("Sampler", "ignored", ("Euler",)) == ["Euler"]
    assert read("Sampler", "Heun, Euler", ("DDIM",), csv_mode=True) == ["Heun", "Euler"]
    assert read("Nothing", "1, 2") == [0]


def test_cells_that_differ_in_prompts_and_seeds_alone_share_a_job_on_several_slots(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    module = app.script_runners["txt2img"].script(PLOT).run.__func__.__globals__
    sizes: list[int] = []

    def counted(p: Any) -> Processed:
        sizes.append(p.batch_size)
        done: Processed = run(p)
        return done

    monkeypatch.setitem(module, "process_images", counted)
    monkeypatch.setitem(module, "memory_management", SimpleNamespace(current_store=lambda: SimpleNamespace(slots=("one", "two"))))
    seed, steps = axis(app, "Seed"), axis(app, "Steps")
    args = (seed, "5,6,7", [], steps, "2,3", [], 0, "", [], False, True, False, False, *OFF, 0, False)
    result = make(app, PLOT, txt2img(), *args)
    assert sizes == [2, 1, 2, 1]
    assert result.all_seeds == [5, 6, 7, 5, 6, 7]
    assert ["Steps: 2" in text for text in result.infotexts[1:]] == [True] * 3 + [False] * 3
    for picture, (num_steps, number) in zip(result.images[1:], [(steps, seed) for steps in (2, 3) for seed in (5, 6, 7)]):
        alone = pixels(run(txt2img(steps=num_steps, seed=number)).images[0])
        assert np.abs(pixels(picture).astype(int) - alone.astype(int)).max() <= 1  # a batch is rounded in another order
    sizes.clear()
    words = axis(app, "Prompt S/R")
    args = (words, "cat, dog <lora:none:1>", [], 0, "", [], 0, "", [], False, True, False, False, *OFF, 0, False)
    mixed = make(app, PLOT, txt2img(prompt="cat"), *args)
    assert sizes == [1, 1]  # a job has the networks of its first prompt
    assert len(mixed.images) == 3


def img2img_labels(app: Application, title: str) -> list[Any]:
    return [control.label for control in app.script_runners["img2img"].script(title).controls]


def test_scripts_of_img2img_take_forges_arguments(app: Application) -> None:
    assert img2img_labels(app, "SD upscale")[1:] == ["Tile overlap", "Upscaler", "Scale Factor"]
    assert img2img_labels(app, "Poor man's outpainting") == ["Pixels to expand", "Mask blur", "Masked content", "Outpainting direction"]
    assert img2img_labels(app, "Outpainting mk2")[1:] == [
        *("Pixels to expand", "Mask blur", "Outpainting direction", "Fall-off exponent (lower=higher detail)", "Color variation"),
    ]
    assert [label.split("?")[0] for label in img2img_labels(app, "img2img alternative test")[1:]] == [
        "Override `Sampling method` to Euler",
        "Override `prompt` to the same value as `original prompt`",
        *("Original prompt", "Original negative prompt"),
        "Override `Sampling Steps` to the same value as `Decode steps`",
        "Decode steps",
        "Override `Denoising strength` to 1",
        *("Decode CFG scale", "Randomness", "Sigma adjustment for finding noise for image"),
    ]
    assert "Custom code" not in app.script_runners["txt2img"].titles


@pytest.mark.parametrize("num_slots", [1, 2])
def test_sd_upscale_redraws_each_tile_with_its_own_seed(app: Application, monkeypatch: pytest.MonkeyPatch, num_slots: int) -> None:
    store = SimpleNamespace(slots=("slot",) * num_slots)
    monkeypatch.setattr(builtin_module("picture_tiles"), "memory_management", SimpleNamespace(current_store=lambda: store))
    request = {"width": 64, "height": 64, "steps": 2, "denoising_strength": 0.5, "seed": 40}
    result = make(app, "SD upscale", img2img(**request), None, 16, "Lanczos", 1.5)
    assert result.images[0].size == (96, 96)
    large = img2img().init_images[0].resize((96, 96), resample=1)
    grid = images.split_grid(large, 64, 64, 16)
    pieces = [piece for _, _, row in grid.tiles for piece in row]
    for number, piece in enumerate(pieces):
        piece[2] = run(img2img(**{**request, "seed": 40 + number, "init_images": [piece[2]]})).images[0]
    difference = np.abs(pixels(result.images[0]) - pixels(images.combine_grid(grid))).max()
    assert difference <= (0 if num_slots == 1 else 1), "a batch is rounded in another order"
    assert "SD upscale upscaler: Lanczos" in result.infotexts[0] and "SD upscale overlap: 16" in result.infotexts[0]
    with pytest.raises(RequestError, match="cannot overlap by 64 px"):
        make(app, "SD upscale", img2img(), None, 64, 0, 2.0)
    with pytest.raises(RequestError, match="Upscaler is 'Gone'"):
        make(app, "SD upscale", img2img(), None, 16, "Gone", 2.0)


def test_sd_upscale_makes_no_picture_larger_than_one_may_be(app: Application) -> None:
    """Pictures of 67 megapixels may come in: four times their sides would be a gigapixel."""
    large = Image.new("RGB", (4200, 4200), "red")
    with pytest.raises(RequestError, match="16800x16800 was requested"):
        make(app, "SD upscale", img2img(init_images=[large]), None, 16, "Lanczos", 4.0)


def test_poor_mans_outpainting_keeps_the_picture_and_paints_around_it(app: Application) -> None:
    request = img2img(width=128, height=128, steps=2, denoising_strength=0.9)
    result = make(app, "Poor man's outpainting", request, 64, 2, "fill", ["right"])
    assert result.images[0].size == (128, 64)
    before, after = pixels(img2img().init_images[0]), pixels(result.images[0])
    assert np.abs(after[:, :48] - before[:, :48]).max() <= 1
    assert after[:, 80:].std() > 1
    with pytest.raises(RequestError, match="choose one or more of left, right, up, down"):
        make(app, "Poor man's outpainting", img2img(), 8, 4, "fill", ["inside"])
    with pytest.raises(RequestError, match="128 px do not fit into tiles of 64x64"):
        make(app, "Poor man's outpainting", img2img(), 128, 4, "fill", ["left"])


def test_outpainting_mk2_goes_direction_by_direction(app: Application) -> None:
    args = (None, 16, 2, ["left", "down"], 1.0, 0.05)
    result = make(app, "Outpainting mk2", img2img(steps=2, denoising_strength=0.9, seed=5), *args)
    assert [image.size for image in result.images] == [(80, 80)]
    before, after = pixels(img2img().init_images[0]), pixels(result.images[0])
    assert np.abs(after[:40, 40:] - before[:40, 24:]).mean() < 2, "away from the new parts it is the picture"
    again = make(app, "Outpainting mk2", img2img(steps=2, denoising_strength=0.9, seed=5), *args)
    assert same(result.images[0], again.images[0])


def test_noise_for_a_new_part_has_the_colors_and_the_coarseness_of_the_picture() -> None:
    outpainting = builtin_module("outpainting")
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::2] = (200, 120, 40)
    canvas = outpainting.enlarge_canvas(Image.fromarray(stripes), outpainting.Margins(right=64))
    filled = np.asarray(outpainting.fill_with_matched_noise(canvas, falloff=1.0, color_variation=0.0, seed=1)).astype(float)
    new = filled[:, 80:]
    assert set(np.unique(new[..., 0].round(-1))) >= {0.0, 200.0} and new[..., 2].max() <= 41
    assert np.abs(np.diff(new[..., 0], axis=0)).mean() > 3 * np.abs(np.diff(new[..., 0], axis=1)).mean(), "stripes lie as in the picture"
    assert np.array_equal(filled[:, :50], stripes[:, :50].astype(float))
    assert outpainting.choose_margins(100, 128, ["left", "up"], 8) == outpainting.Margins(left=28, up=64)


@pytest.mark.parametrize("adjusts", [False, True])
def test_found_noise_is_that_of_the_exact_path(monkeypatch: pytest.MonkeyPatch, app: Application, adjusts: bool) -> None:
    """For data of deviation 1 the best denoiser is x / (1 + sigma^2), and Euler's path x0 sqrt(1 + sigma^2) (Song et al. 2021, equation 13)."""
    module = builtin_script("img2imgalt")
    latents = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(module, "sampling_prepare", lambda unet, x: None)
    monkeypatch.setattr(module, "sampling_cleanup", lambda unet: None)
    monkeypatch.setattr(module, "denoise_guided", lambda unet, x, sigma, **_: (x / (1 + sigma.view(-1, 1, 1, 1) ** 2), None, None))
    sigmas = torch.cat([torch.linspace(10, 0.01, 400), torch.zeros(1)])
    engine = SimpleNamespace(forge_objects=SimpleNamespace(unet=None), is_inpaint=False, get_learned_conditioning=len)
    request = SimpleNamespace(
        sd_model=engine, init_latent=latents, sampler=SimpleNamespace(get_sigmas=lambda p, steps: sigmas), image_conditioning=None,
        width=48, height=48,
        context=SimpleNamespace(state=SimpleNamespace(interrupted=False)),
    )  # fmt: skip
    found = module.find_noise(request, ("a", ""), 400, 1.0, adjusts=adjusts)
    expected = latents * (1 + 10.0**2) ** 0.5 / 10.0 if adjusts else latents / latents.std()
    assert (found - expected).abs().max() < 0.05
    assert torch.allclose(module.mix_noise(found, latents, 1.0), latents) and torch.equal(module.mix_noise(found, latents, 0.0), found)


def test_the_alternative_test_starts_from_the_found_noise(app: Application) -> None:
    args = (None, True, True, "a red cat", "", True, 3, True, 1.0)
    found, drawn = (make(app, "img2img alternative test", img2img(prompt="x"), *args, randomness, False) for randomness in (0.0, 1.0))
    assert found.all_prompts == ["a red cat"] and "Decode steps: 3" in found.infotexts[0] and "Steps: 3" in found.infotexts[0]
    assert not same(found.images[0], drawn.images[0])
    other_seed = make(app, "img2img alternative test", img2img(prompt="x", seed=99), *args, 0.0, False)
    assert same(found.images[0], other_seed.images[0]), "nothing is drawn"


def test_custom_code_runs_only_where_the_operator_allows_it(app: Application) -> None:
    module = builtin_script("custom_code")
    config = SimpleNamespace(allow_code=True, is_local=True, api_auth=(), gradio_auth=())
    assert module.run_as_function("x = 2\nreturn p + x", 4, {"p": 3}) == 5
    with pytest.raises(RequestError, match="Custom code: "):
        module.run_as_function("return (", 2, {})
    with pytest.raises(RequestError, match="indent level is 0"):
        module.read_indent(0)
    for allowed, is_api, changed in (
        (True, True, {}),
        (False, False, {"allow_code": False}),
        (False, True, {"is_local": False, "gradio_auth": (("a", "b"),)}),
        (True, False, {"is_local": False, "gradio_auth": (("a", "b"),)}),
        (False, False, {"is_local": False}),
    ):
        with pytest.MonkeyPatch.context() as patch:
            reached = SimpleNamespace(config=SimpleNamespace(**{**vars(config), **changed}))
            patch.setattr(module, "current_application", lambda reached=reached: reached)
            if allowed:
                module.check_allowed(is_api=is_api)
            else:
                with pytest.raises(RequestError, match=r"--allow-code|does not run for everyone"):
                    module.check_allowed(is_api=is_api)


def test_custom_code_is_the_job(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    module = builtin_script("custom_code")
    monkeypatch.setattr(module, "current_application", lambda: SimpleNamespace(config=SimpleNamespace(allow_code=True, is_local=True)))
    script = module.Script()
    made = script.run(txt2img(), "from modules.processing import process_images\np.seed = 77\nreturn process_images(p)", 2)
    assert same(made.images[0], run(txt2img(seed=77)).images[0])
    shown = script.run(txt2img(), "from PIL import Image\ndisplay(Image.new('RGB', (8, 8)), 5, 'words')", 2)
    assert [image.size for image in shown.images] == [(8, 8)] and (shown.seed, shown.info) == (5, "words")


def builtin_script(stem: str) -> Any:
    return next(data.module for data in scripts.scripts_data if data.path.endswith(f"{stem}.py"))
