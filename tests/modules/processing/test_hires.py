from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modules.application import Application, install
from modules.errors import RequestError, UnknownCheckpointError
from modules.processing import LATENT_UPSCALE_MODES, Processed
from modules.processing import hires as processing_hires
from modules.processing.hires import plan_target_size
from tests.support.checkpoints import write_checkpoint
from tests.support.narrow_application import gradient, narrow_application, pixels, run, submit, txt2img


@pytest.fixture(scope="module")
def shared_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with narrow_application(tmp_path_factory.mktemp("narrow"), is_shallow=True) as (app, _):
        app.options.samples_save = False
        app.options.grid_save = False
        yield app


@pytest.fixture
def app(shared_app: Application) -> Application:
    install(shared_app)
    return shared_app


def hires(**fields: Any) -> Any:
    return txt2img(**{"enable_hr": True, "hr_scale": 1.5, "hr_cfg": 4.0, "denoising_strength": 0.7, **fields})


def picture(result: Processed, index: int = 0) -> np.ndarray:
    return pixels(result.images[result.index_of_first_image + index])


@pytest.mark.parametrize(
    ("fields", "size", "cut"),
    [
        ({"hr_scale": 2.0}, (1024, 768), (0, 0)),
        ({"hr_scale": 1.1}, (560, 416), (0, 0)),
        ({"hr_resize_x": 1024}, (1024, 768), (0, 0)),
        ({"hr_resize_y": 1152}, (1536, 1152), (0, 0)),
        ({"hr_resize_x": 1024, "hr_resize_y": 1024}, (1360, 1024), (42, 0)),
        ({"hr_resize_x": 1536, "hr_resize_y": 768}, (1536, 1152), (0, 48)),
    ],
)
def test_the_size_of_the_second_pass(app: Application, fields: dict[str, Any], size: tuple[int, int], cut: tuple[int, int]) -> None:
    p = hires(width=512, height=384, **fields)
    plan_target_size(p)
    assert (p.hr_upscale_to_x, p.hr_upscale_to_y) == size
    assert (p.truncate_x, p.truncate_y) == cut


@pytest.mark.parametrize("upscaler", [*LATENT_UPSCALE_MODES, "Lanczos", "Nearest", "None"])
def test_every_upscaler_gives_the_size_that_was_asked_for(app: Application, upscaler: str) -> None:
    result = run(hires(hr_upscaler=upscaler))
    assert result.images[0].size == (96, 96)
    assert f"Hires upscale: 1.5, Hires upscaler: {upscaler}" in result.infotexts[0]
    assert "Denoising strength: 0.7" in result.infotexts[0]


@pytest.mark.parametrize("upscaler", ["Latent", "Lanczos"])
def test_an_exact_size_is_reached_by_cutting(app: Application, upscaler: str) -> None:
    result = run(hires(hr_upscaler=upscaler, hr_resize_x=112, hr_resize_y=80))
    assert result.images[0].size == (112, 80)
    assert "Hires resize: 112x80" in result.infotexts[0]


def test_the_second_pass_has_settings_of_its_own(app: Application) -> None:
    base = picture(run(hires()))
    changes: list[dict[str, Any]] = [
        {"hr_second_pass_steps": 6},
        {"hr_sampler_name": "Heun"},
        {"hr_scheduler": "Exponential"},
        {"hr_prompt": "a house"},
        {"hr_negative_prompt": "dark"},
        {"hr_cfg": 1.0},
        {"denoising_strength": 0.4},
    ]
    for change in changes:
        assert not np.array_equal(picture(run(hires(**change))), base), change


def test_what_is_of_its_own_is_in_the_infotext(app: Application) -> None:
    fields = {"hr_second_pass_steps": 2, "hr_sampler_name": "Heun", "hr_scheduler": "Karras", "hr_cfg": 6.0, "hr_prompt": "a house, big"}
    text = run(hires(**fields)).infotexts[0]
    assert (
        "Hires upscale: 1.5, Hires steps: 2, Hires upscaler: Latent, Hires sampler: Heun, Hires schedule type: Karras, Hires CFG Scale: 6.0, "
        'Hires prompt: "a house, big"'
    ) in text


def test_pictures_do_not_depend_on_their_batch(app: Application) -> None:
    alone = [picture(run(hires(seed=seed, sampler_name="Euler a"))) for seed in (3, 4)]
    together = run(hires(seed=3, batch_size=2, sampler_name="Euler a"))
    assert max(np.abs(picture(together, index) - expected).max() for index, expected in enumerate(alone)) <= 1


def test_a_finished_picture_can_take_the_place_of_the_first_pass(app: Application) -> None:
    one, other = (run(hires(firstpass_image=image, denoising_strength=0.1)) for image in (gradient(64, 64), gradient(64, 64).rotate(180)))
    assert one.images[0].size == (96, 96)
    assert not np.array_equal(picture(one), picture(other))


def test_the_picture_before_is_saved_where_the_setting_asks(app: Application, tmp_path: Path) -> None:
    overrides = {"samples_save": True, "save_images_before_highres_fix": True, "outdir_txt2img_samples": str(tmp_path)}
    run(hires(override_settings=overrides))
    sizes = {}
    for path in tmp_path.rglob("*.png"):
        with Image.open(path) as image:
            sizes[path.stem.endswith("-before-highres-fix")] = image.size
    assert sizes == {False: (96, 96), True: (64, 64)}


def test_progress_counts_both_passes(app: Application) -> None:
    submit(app, hires()).wait(60)
    assert app.state.processing_has_refined_job_count
    assert app.state.job_no == 2


def test_interrupting_the_first_pass_ends_the_job(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    from modules.samplers import cfg_denoiser

    calls, denoise = [], cfg_denoiser.denoise_guided

    def once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        app.state.interrupt()
        return denoise(*args, **kwargs)

    monkeypatch.setattr(cfg_denoiser, "denoise_guided", once)
    result = submit(app, hires()).wait(60)
    assert (len(calls), result.images[0].size) == (1, (64, 64))


def test_an_unknown_upscaler_or_checkpoint_is_an_error(app: Application) -> None:
    with pytest.raises(RequestError, match="Latent"):
        run(hires(hr_upscaler="No such thing"))
    with pytest.raises(UnknownCheckpointError, match="nowhere"):
        run(hires(hr_checkpoint_name="nowhere"))


@pytest.mark.parametrize("modules", [None, ["Use same choices"]])
def test_the_second_pass_may_use_another_checkpoint(app: Application, modules: list[str] | None) -> None:
    app.options.sd_model_checkpoint = "sd15"
    base = run(hires())
    path = app.config.ckpt_dirs[0] / "other.safetensors"
    write_checkpoint(path, "sd15", seed=7, is_shallow=True)
    try:
        fields = {"hr_checkpoint_name": "other", "hr_additional_modules": modules, "n_iter": 2}
        result = run(hires(**fields))
        assert not np.array_equal(picture(result), picture(base))
        assert "Hires checkpoint: other" in result.infotexts[-1]
        assert np.array_equal(picture(result, 1), picture(run(hires(**{**fields, "seed": 2, "n_iter": 1}))))
        assert np.array_equal(picture(run(hires())), picture(base))
    finally:
        app.options.sd_model_checkpoint = None
        path.unlink()


def test_old_sizes_name_the_final_size(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass would be at least 512 pixels wide: faster with three quarters of a small picture."""
    assert processing_hires.old_hires_fix_first_pass_dimensions(1024, 512) == (768, 384)
    monkeypatch.setattr(processing_hires, "old_hires_fix_first_pass_dimensions", lambda width, height: (width * 3 // 4, height * 3 // 4))
    overrides = {"use_old_hires_fix_width_height": True}
    result = run(hires(width=128, height=64, steps=1, override_settings=overrides, hr_upscaler="Nearest", hr_second_pass_steps=1))
    assert result.images[0].size == (128, 64)
    assert "Size: 96x48" in result.infotexts[0]
