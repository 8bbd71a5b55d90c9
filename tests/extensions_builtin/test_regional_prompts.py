"""Regional prompts: masks, the mean of the branches in each place, and whole jobs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from backend.patcher.unet import UnetPatcher
from backend.sampling.sampling_function import denoise_guided
from modules.application import Application
from modules.errors import RequestError
from modules.infotext.parameters import parse_generation_parameters
from modules.scripts.arguments import start_values
from modules.scripts.without_page import build_controls
from tests.backend.sampling.test_sampling_function import FakeModel
from tests.support.extensions import import_builtin, loaded_builtin
from tests.support.narrow_application import narrow_application, pixels, run, txt2img

TITLE = "Regional Prompts"


def masks() -> Any:
    return import_builtin("regional_prompts", "region_masks")


def test_regions_are_shares_of_the_picture() -> None:
    module = masks()
    left, right = module.divide_evenly(2, across=True)
    assert left.mask(4, 6)[:, :3].all() and not left.mask(4, 6)[:, 3:].any()
    assert torch.equal(left.mask(4, 6) + right.mask(4, 6), torch.ones(4, 6))
    assert module.divide_evenly(3, across=False)[1].mask(6, 1).flatten().tolist() == [0, 0, 1, 1, 0, 0]
    assert module.Region(0.99, 1.0, 0.0, 0.01).mask(3, 3).sum() == 1, "at least one place"
    assert module.read_regions("0:0.5, 0:1, 0.7\n\n0.5:1,0.25:1") == [module.Region(0.0, 0.5, 0.0, 1.0, 0.7), module.Region(0.5, 1.0, 0.25, 1.0, 1.0)]


@pytest.mark.parametrize("line", ["0:1", "a:b, 0:1", "0:1, 1:0", "0:2, 0:1", "0:1, 0:1, nan", "0:1, 0:1, 0", "0:1:1, 0:1"])
def test_a_line_that_is_no_region_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="line 2"):
        masks().read_regions(f"0:1, 0:1\n{line}")


def test_each_place_is_guided_by_its_regions_prompt() -> None:
    """The network answers with the mean of its text, so that the formula shows."""
    module = masks()
    model: Any = FakeModel()
    unet: Any = UnetPatcher.__new__(UnetPatcher)
    regions = [*module.divide_evenly(2, across=True), module.Region(0, 1, 0, 1, 0.5)]
    unet.model, unet.model_options = model, {"transformer_options": {}, "conditioning_modifiers": [module.RegionalConditions(regions)]}
    unet.extra_concat_condition, unet.controlnet_linked_list, unet.reference_latents = None, None, ()
    text = torch.tensor([3.0, 5.0, 9.0, 1.0]).view(4, 1, 1).expand(4, 7, 8)
    denoised = denoise_guided(
        unet, torch.zeros(1, 4, 2, 4), torch.ones(1), text_cond=text[:3], text_uncond=text[3:], cond_scale=2.0,
        cond_composition=[[(0, 1.0), (1, 1.0), (2, 1.0)]],
    )[0]  # fmt: skip
    expected = [1 + 2 * ((part + 0.5 * 9) / 1.5 - 1) for part in (3.0, 5.0)]
    assert torch.allclose(denoised[0, 0, 0], torch.tensor([expected[0]] * 2 + [expected[1]] * 2))
    assert sum(call["x"].shape[0] for call in model.calls) == 4, "a row for each region, and the negative prompt's"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with narrow_application(tmp_path_factory.mktemp("regions")) as (app, _):
        app.options.samples_save = app.options.grid_save = False
        with loaded_builtin(app, "regional_prompts"):
            build_controls(app)
            yield app


def give(app: Application, *args: Any, **fields: Any) -> Any:
    runner = app.script_runners["txt2img"]
    values = [0, *([None] * (len(runner.inputs) - 1))]
    for slot, value in start_values(runner).items():
        values[slot] = value
    script = runner.script(TITLE)
    values[script.args_from : script.args_from + len(args)] = args
    request = txt2img(**fields)
    request.scripts, request.script_args = runner, tuple(values)
    return request


def test_lines_that_say_the_same_make_the_plain_picture(app: Application) -> None:
    same = run(give(app, True, prompt="a red cat\na red cat"))
    difference = np.abs(pixels(same.images[0]) - pixels(run(txt2img(prompt="a red cat")).images[0]))
    assert difference.max() <= 1
    other = run(give(app, True, prompt="a red cat\na green tree"))
    assert not np.array_equal(pixels(other.images[0]), pixels(same.images[0]))
    written = parse_generation_parameters(other.infotexts[0])
    assert written["Prompt"] == "a red cat\na green tree" and written["regional_enabled"] == "True"
    mapped = run(give(app, True, "Advanced", "", "Horizontal", "First Line", 0.5, "0:1, 0:0.5", prompt="a photo\na red cat"))
    assert not np.array_equal(pixels(mapped.images[0]), pixels(other.images[0]))


@pytest.mark.parametrize(
    ("args", "prompt", "says"),
    [
        ((True,), "one line", "has 1 lines"),
        ((True,), "a AND b\nc", "AND composes prompts"),
        ((True, "Advanced", "", "Horizontal", "None", 0.5, "0:1, 0:1"), "a\nb", "1 regions and the prompt 2 lines"),
        ((True, "Advanced", "", "Horizontal", "None", 0.5, "hello"), "a\nb", "mapping line 1"),
        ((True, "Sideways"), "a\nb", "Region Assignment is 'Sideways'"),
    ],
)
def test_what_cannot_be_regions_is_refused(app: Application, args: tuple[Any, ...], prompt: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        run(give(app, *args, prompt=prompt))
