"""Extensions override A1111's methods of a request, on a class of their own or on the object; a job calls theirs, and else our functions directly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from modules.application import Application
from modules.processing import StableDiffusionProcessingTxt2Img
from modules.processing.overrides import overridden, step_of
from tests.support.narrow_application import SIDE_PX, narrow_application, pixels, run, txt2img

STEPS = ("setup_prompts", "init", "parse_extra_network_prompts", "setup_conds", "sample", "txt2img_image_conditioning")
HIRES_STEPS = ("calculate_target_resolution", "sample_hr_pass", "img2img_image_conditioning")


class Watched(StableDiffusionProcessingTxt2Img):
    """An extension's request: notes each method that the job calls, and does what ours does."""

    seen: list[str]


def _watch(name: str) -> Any:
    def method(self: Watched, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(name)
        return getattr(StableDiffusionProcessingTxt2Img, name)(self, *args, **kwargs)

    return method


for _name in (*STEPS, *HIRES_STEPS):
    setattr(Watched, _name, _watch(_name))


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with narrow_application(tmp_path_factory.mktemp("overrides"), is_shallow=True) as (app, _):
        yield app


def test_methods_of_an_extension_s_class_are_called_and_give_the_same_picture(app: Application) -> None:
    plain = txt2img(enable_hr=True, hr_scale=1.5, hr_upscaler="Latent", denoising_strength=0.6)
    watched = Watched(**{name: getattr(plain, name) for name in ("prompt", "seed", "steps", "width", "height", "sampler_name", "cfg_scale")})
    watched.enable_hr, watched.hr_scale, watched.hr_upscaler, watched.denoising_strength, watched.seen = True, 1.5, "Latent", 0.6, []
    assert np.array_equal(pixels(run(watched).images[0]), pixels(run(plain).images[0]))
    assert set(watched.seen) == {*STEPS, *HIRES_STEPS}
    assert watched.seen.index("setup_conds") < watched.seen.index("sample") < watched.seen.index("sample_hr_pass")


def test_a_method_replaced_on_the_object_is_called(app: Application) -> None:
    request = txt2img()
    seen: list[Any] = []
    ours = request.setup_conds

    def theirs() -> None:
        seen.append(request.prompts)
        ours()

    request.setup_conds = theirs  # type: ignore[method-assign]
    assert run(request).images[0].size == (SIDE_PX, SIDE_PX) and seen == [["a red cat"]]


def test_ours_are_known_and_called_with_the_request() -> None:
    request = StableDiffusionProcessingTxt2Img(prompt="x")
    assert all(overridden(request, name) is None for name in (*STEPS, *HIRES_STEPS))
    assert step_of(request, "setup_conds", lambda p, more: (p.prompt, more))(2) == ("x", 2)
