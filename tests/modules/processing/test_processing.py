from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modules.application import Application, install
from modules.checkpoints.models import ModelLoadError
from modules.devices import NansException
from modules.errors import NoCheckpointError, RequestError
from modules.jobs.live_preview import preview_thread
from modules.processing import Processed, process_extra_images
from modules.samplers import cfg_denoiser
from tests.support.applications import installed_application
from tests.support.checkpoints import write_checkpoint
from tests.support.narrow_application import KnownPictures, narrow_application, pixels, run, submit, txt2img


@pytest.fixture(scope="module")
def shared_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with narrow_application(tmp_path_factory.mktemp("narrow"), is_shallow=True) as (app, _):
        yield app


@pytest.fixture
def app(shared_app: Application) -> Iterator[Application]:
    """The module's application, with its settings restored."""
    install(shared_app)
    saved = dict(shared_app.options.data)
    yield shared_app
    shared_app.options.data.clear()
    shared_app.options.data.update(saved)
    shared_app.state.end()


@pytest.fixture(scope="module")
def known(shared_app: Application) -> KnownPictures:
    return KnownPictures()


def picture(result: Processed, index: int = 0) -> np.ndarray:
    return pixels(result.images[result.index_of_first_image + index])


# Determinism


@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "DPM++ 2M SDE", "DPM++ SDE"])
def test_the_same_request_gives_the_same_picture(app: Application, sampler: str) -> None:
    first, second = run(txt2img(sampler_name=sampler)), run(txt2img(sampler_name=sampler))
    assert np.array_equal(picture(first), picture(second))
    assert picture(first).std() > 5


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ SDE"])
def test_a_picture_does_not_depend_on_its_batch(app: Application, sampler: str) -> None:
    """Batched kernels may sum in a different order: one level of 255 is allowed, the tolerance between two batch sizes."""
    alone = [picture(run(txt2img(sampler_name=sampler, seed=seed))) for seed in (5, 6, 7)]
    together = run(txt2img(sampler_name=sampler, seed=5, batch_size=3))
    by_count = run(txt2img(sampler_name=sampler, seed=5, n_iter=3))
    for index, expected in enumerate(alone):
        assert np.abs(picture(together, index) - expected).max() <= 1
        assert np.array_equal(picture(by_count, index), expected)
    assert together.all_seeds == [5, 6, 7]


def test_seed_prompt_and_scale_change_the_picture(app: Application, known: KnownPictures) -> None:
    base = known.txt2img()
    for change in ({"seed": 2}, {"prompt": "a house"}, {"cfg_scale": 9.0}, {"negative_prompt": "dark"}, {"steps": 5}, {"sampler_name": "Heun"}):
        assert not np.array_equal(picture(run(txt2img(**change))), base), change


def test_a_job_leaves_no_trace_in_the_next(app: Application) -> None:
    base = picture(run(txt2img()))
    overrides = {"CLIP_stop_at_last_layers": 2, "sd_noise_schedule": "Zero Terminal SNR", "enable_quantization": True, "randn_source": "NV"}
    run(txt2img(tiling=True, override_settings=overrides))
    assert np.array_equal(picture(run(txt2img())), base)


# Seeds


def test_variation_seeds_move_the_picture_and_count_up(app: Application, known: KnownPictures) -> None:
    result = run(txt2img(subseed=9, subseed_strength=0.3, n_iter=2))
    assert (result.all_seeds, result.all_subseeds) == ([1, 1], [9, 10])
    assert not np.array_equal(picture(result, 0), picture(result, 1))
    assert np.array_equal(picture(result, 1), picture(run(txt2img(subseed=10, subseed_strength=0.3))))
    assert np.array_equal(picture(run(txt2img(subseed=9, subseed_strength=0.0))), known.txt2img())
    assert "Variation seed: 10, Variation seed strength: 0.3" in result.infotexts[-1]


def test_seed_resize_starts_from_the_other_size(app: Application, known: KnownPictures) -> None:
    result = run(txt2img(seed_resize_from_w=32, seed_resize_from_h=48))
    assert not np.array_equal(picture(result), known.txt2img())
    assert "Seed resize from: 32x48" in result.infotexts[0]


def test_a_random_seed_is_told(app: Application) -> None:
    result = run(txt2img(seed=-1))
    assert np.array_equal(picture(result), picture(run(txt2img(seed=result.all_seeds[0]))))


@pytest.mark.parametrize("source", ["GPU", "CPU", "NV"])
def test_noise_comes_from_where_the_setting_says(app: Application, known: KnownPictures, source: str) -> None:
    result = run(txt2img(override_settings={"randn_source": source}))
    same = np.array_equal(picture(result), known.txt2img())
    assert same == (source != "NV")
    assert ("RNG" in result.infotexts[0]) == (source != "GPU")


# Prompts


def test_composed_scheduled_and_weighted_prompts_make_pictures(app: Application) -> None:
    pictures = [
        picture(run(txt2img(prompt=prompt)))
        for prompt in ("a cat", "a cat AND a dog :0.5", "a [dog:cat:0.5]", "a [cat|dog]", "a (cat:1.5)", "a cat BREAK a dog", "a cat # a comment")
    ]
    different = {image.tobytes() for image in pictures}
    assert len(different) == 6
    assert np.array_equal(pictures[0], pictures[-1])


def test_every_picture_may_have_its_own_prompt(app: Application) -> None:
    result = run(txt2img(prompt=["a cat", "a long list of many other words"], seed=[3, 4], batch_size=2))
    assert result.all_prompts == ["a cat", "a long list of many other words"]
    assert "Seed: 4" in result.infotexts[-1]
    assert np.abs(picture(result, 0) - picture(run(txt2img(prompt="a cat", seed=3)))).max() <= 1


def test_with_scale_one_the_negative_prompt_has_no_part(app: Application) -> None:
    without, with_one = run(txt2img(cfg_scale=1)), run(txt2img(cfg_scale=1, negative_prompt="dark"))
    assert np.array_equal(picture(without), picture(with_one))


def test_extra_networks_that_nobody_knows_are_named_and_left_out(app: Application, known: KnownPictures) -> None:
    result = run(txt2img(prompt="a red cat<wolf:gone:1>"))
    assert "wolf" in result.comments
    assert np.array_equal(picture(result), known.txt2img())
    assert "<wolf:gone:1>" in result.infotexts[0]


def test_encoded_prompts_are_kept_until_something_changes(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = app.models.ensure_loaded()
    calls = []
    encode = engine.get_learned_conditioning
    monkeypatch.setattr(engine, "get_learned_conditioning", lambda prompts: calls.append(list(prompts)) or encode(prompts))
    run(txt2img(prompt="kept", negative_prompt="also kept"))
    run(txt2img(prompt="kept", negative_prompt="also kept", seed=2, steps=4))
    assert calls == [["kept"], ["also kept"]]
    run(txt2img(prompt="kept", negative_prompt="also kept", override_settings={"CLIP_stop_at_last_layers": 2}))
    assert len(calls) == 4
    run(txt2img(prompt="[kept:new:2]", negative_prompt="also kept", override_settings={"CLIP_stop_at_last_layers": 2}))
    assert len(calls) == 5


# Infotext and saving


def test_the_infotext_has_the_keys_that_users_paste(app: Application) -> None:
    result = run(txt2img(negative_prompt="dark", sampler_name="DPM++ 2M", scheduler="SGM Uniform", override_settings={"CLIP_stop_at_last_layers": 2}))
    info = app.checkpoints.find("sd15")
    assert info is not None
    assert result.infotexts[0] == (
        "a red cat\nNegative prompt: dark\nSteps: 3, Sampler: DPM++ 2M, Schedule type: SGM Uniform, CFG scale: 4, Seed: 1, Size: 64x64, "
        f"Model hash: {info.shorthash}, Model: sd15, Clip skip: 2, Version: {result.version}"
    )


def test_sampler_settings_reach_the_sampler_and_the_infotext(app: Application, known: KnownPictures) -> None:
    plain = picture(run(txt2img(sampler_name="Euler a")))
    result = run(txt2img(sampler_name="Euler a", eta=0.5, override_settings={"eta_noise_seed_delta": 31337}))
    assert not np.array_equal(picture(result), plain)
    assert "ENSD: 31337" in result.infotexts[0]
    assert "Eta: 0.5" in result.infotexts[0]
    churned = run(txt2img(s_churn=5.0, s_noise=1.02))
    assert not np.array_equal(picture(churned), known.txt2img())
    assert "Sigma churn: 5.0, Sigma noise: 1.02" in churned.infotexts[0]
    ranged = run(txt2img(override_settings={"sigma_min": 0.1, "sigma_max": 10, "always_discard_next_to_last_sigma": True}, scheduler="Karras"))
    assert "Schedule min sigma: 0.1, Schedule max sigma: 10.0, Discard penultimate sigma: True" in ranged.infotexts[0]


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        ({"sd_noise_schedule": "Zero Terminal SNR"}, {}),
        ({"enable_quantization": True}, {"scheduler": "Karras"}),
        ({"sgm_noise_multiplier": True}, {}),
        ({"skip_early_cond": 0.5}, {}),
        ({"skip_late_cond": 0.5}, {}),
        ({"use_old_karras_scheduler_sigmas": True}, {"scheduler": "Karras"}),
        ({"uni_pc_variant": "bh2"}, {"sampler_name": "UniPC", "steps": 4}),
        ({"CLIP_stop_at_last_layers": 2}, {}),
        ({"emphasis": "No norm"}, {"prompt": "a (red:1.4) cat"}),
        ({"tiling": True}, {}),
    ],
)
def test_settings_of_the_sampler_page_act(app: Application, known: KnownPictures, overrides: dict[str, Any], fields: dict[str, Any]) -> None:
    assert not np.array_equal(picture(run(txt2img(**fields, override_settings=overrides))), known.txt2img(**fields))


def test_the_negative_prompt_is_skipped_below_its_sigma(app: Application) -> None:
    result = run(txt2img(s_min_uncond=100.0, override_settings={"s_min_uncond_all": True}))
    assert np.array_equal(picture(result), picture(run(txt2img(cfg_scale=1))))
    assert "NGMS: 100.0" in result.infotexts[0]


def test_the_negative_prompt_is_skipped_in_the_last_steps(app: Application) -> None:
    """The whole schedule is CFG 1. Lumina2's pipeline truncates where (i + 1) / n > ratio."""
    result = run(txt2img(override_settings={"skip_late_cond": 1.0}))
    assert np.array_equal(picture(result), picture(run(txt2img(cfg_scale=1))))
    assert "Skip Late CFG: 1.0" in result.infotexts[0]
    for num_steps, ratio in ((4, 0.25), (30, 0.25), (7, 0.5), (10, 0.3), (5, 1.0)):
        library = [(step + 1) / num_steps > ratio for step in range(num_steps)]
        assert [cfg_denoiser.is_truncated(step, num_steps, 1 - ratio) for step in range(num_steps)] == library


def test_files_are_saved_with_their_parameters(app: Application, tmp_path: Path) -> None:
    folders = {"outdir_txt2img_samples": str(tmp_path / "samples"), "outdir_txt2img_grids": str(tmp_path / "grids")}
    result = run(txt2img(batch_size=2, override_settings=folders))
    saved, grids = sorted((tmp_path / "samples").rglob("*.png")), list((tmp_path / "grids").rglob("*.png"))
    assert (len(saved), len(grids)) == (2, 1)
    with Image.open(saved[0]) as image:
        assert image.info["parameters"] == result.infotexts[1]
        assert np.array_equal(pixels(image), picture(result))
    assert result.index_of_first_image == 1
    assert result.images[0].size == (128, 64)


@pytest.mark.parametrize("folder", ["a file/below", "x" * 300])
def test_a_folder_that_cannot_be_written_costs_the_file_and_not_the_picture(app: Application, tmp_path: Path, folder: str) -> None:
    (tmp_path / "a file").write_text("in the way", encoding="utf8")
    folders = {"outdir_txt2img_samples": str(tmp_path / folder), "outdir_txt2img_grids": str(tmp_path / folder)}
    result = run(txt2img(batch_size=2, override_settings=folders))
    assert np.array_equal(picture(result), picture(run(txt2img(batch_size=2))))
    assert "Not saved: cannot write" in result.comments


def test_parts_joined_by_and_have_a_limit(app: Application) -> None:
    """Each part is a row in every step: ten thousand of them would block the queue for hours."""
    for kept in (txt2img(prompt=" AND ".join(["a"] * 10_000)), txt2img(enable_hr=True, hr_scale=1.25, hr_prompt="a AND " * 200)):
        with pytest.raises(RequestError, match=r"parts are joined by AND; the limit is 128"):
            run(kept)
    run(txt2img(prompt=" AND ".join(["a"] * 4), negative_prompt="AND " * 1000))


def test_a_grid_beyond_the_limit_is_left_out_and_said(app: Application) -> None:
    result = run(txt2img(batch_size=2, override_settings={"return_grid": True, "img_max_size_mp": 0.001}))
    assert len(result.images) == 2
    assert "img_max_size_mp" in result.comments


def test_saving_can_be_turned_off(app: Application, tmp_path: Path) -> None:
    folders = {"outdir_txt2img_samples": str(tmp_path / "samples"), "outdir_txt2img_grids": str(tmp_path / "grids")}
    result = run(txt2img(batch_size=2, do_not_save_samples=True, do_not_save_grid=True, override_settings=folders))
    assert list(tmp_path.rglob("*.png")) == []
    assert len(result.images) == 2


def test_params_txt_holds_the_last_parameters(app: Application) -> None:
    result = run(txt2img(prompt="the last one"))
    assert (app.config.data_dir / "params.txt").read_text(encoding="utf8") == result.infotexts[0]


def test_the_answer_has_the_keys_of_the_contract(app: Application) -> None:
    info = json.loads(run(txt2img(extra_generation_params={"Mine": lambda **_: "x"})).js())
    keys = (
        "prompt all_prompts negative_prompt all_negative_prompts seed all_seeds subseed all_subseeds subseed_strength width height sampler_name "
        "cfg_scale steps batch_size restore_faces face_restoration_model sd_model_name sd_model_hash sd_vae_name sd_vae_hash seed_resize_from_w "
        "seed_resize_from_h denoising_strength extra_generation_params index_of_first_image infotexts styles job_timestamp clip_skip "
        "is_using_inpainting_conditioning version comments"
    )
    assert list(info) == keys.split()
    assert (info["sampler_name"], info["sd_model_name"], info["all_seeds"]) == ("Euler", "sd15", [1])


def test_extra_parameters_may_be_lists_and_functions(app: Application) -> None:
    result = run(txt2img(n_iter=2, extra_generation_params={"Each": ["a", "b"], "Made": lambda p, index, **_: f"{p.steps}-{index}"}))
    assert "Each: b, Made: 3-1" in result.infotexts[-1]


# Jobs


class StopAt:
    """Changes the state when the denoiser is called the n-th time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: int, action: Any) -> None:
        self.calls = 0
        denoise = cfg_denoiser.denoise_guided

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == call:
                action()
            return denoise(*args, **kwargs)

        monkeypatch.setattr(cfg_denoiser, "denoise_guided", counted)


def test_interrupting_ends_the_job_within_one_step(app: Application, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stop = StopAt(monkeypatch, 3, app.state.interrupt)
    result = submit(app, txt2img(steps=50, n_iter=3, override_settings={"outdir_txt2img_samples": str(tmp_path)})).wait(60)
    assert stop.calls == 3
    assert len(result.images) == 1
    assert list(tmp_path.rglob("*.png")) == []
    assert app.state.job == ""


def test_an_interrupted_picture_is_saved_where_the_setting_asks_for_it(app: Application, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    StopAt(monkeypatch, 2, app.state.interrupt)
    submit(app, txt2img(override_settings={"outdir_txt2img_samples": str(tmp_path), "save_incomplete_images": True})).wait(60)
    assert len(list(tmp_path.rglob("*.png"))) == 1


def test_skipping_ends_the_batch_and_the_next_goes_on(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = picture(run(txt2img(seed=2)))
    stop = StopAt(monkeypatch, 2, app.state.skip)
    result = submit(app, txt2img(n_iter=2)).wait(60)
    assert stop.calls == 2 + 3
    assert np.array_equal(picture(result, 1), expected)


def test_stopping_lets_the_running_batch_finish(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = picture(run(txt2img()))
    stop = StopAt(monkeypatch, 2, app.state.stop_generating)
    result = submit(app, txt2img(n_iter=3)).wait(60)
    assert stop.calls == 3
    assert np.array_equal(picture(result), expected)


def test_progress_and_previews_are_made_by_the_worker(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    app.options.live_previews_enable = True
    app.options.show_progress_every_n_steps = 1
    app.options.live_preview_refresh_period = 0
    app.options.show_progress_type = "Approx cheap"
    seen: list[tuple[str, int]] = []
    state = app.state

    def note(name: str) -> None:
        shown = getattr(state, name)

        def assign(image: Image.Image, **facts: Any) -> None:
            seen.append((threading.current_thread().name.partition("_")[0], image.width))
            shown(image, **facts)

        monkeypatch.setattr(state, name, assign)

    note("assign_current_image")
    note("assign_preview")
    submit(app, txt2img()).wait(60)
    preview_thread.wait()
    previews = [thread for thread, width in seen if width == 8]
    assert previews
    assert set(previews) <= {"job-worker", "preview"}, "the first one may have to ask the VAE for its colors, on the job's thread"
    assert ("job-worker", 64) in seen, "the finished picture"


def test_a_second_order_sampler_counts_steps_not_calls(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopAt(monkeypatch, 99, lambda: None)
    submit(app, txt2img(sampler_name="Heun")).wait(60)
    assert stop.calls == 5
    assert app.state.sampling_steps == 3


def test_override_settings_are_not_written_into_the_settings(app: Application) -> None:
    before = dict(app.options.data)
    run(txt2img(override_settings={"CLIP_stop_at_last_layers": 2}))
    assert app.options.data == before
    run(txt2img(override_settings={"CLIP_stop_at_last_layers": 2}, override_settings_restore_afterwards=False))
    assert app.options.CLIP_stop_at_last_layers == 2


def test_extensions_see_the_overrides_of_the_running_job(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    StopAt(monkeypatch, 1, lambda: seen.append((app.options.jpeg_quality, txt2img().options.jpeg_quality)))
    run(txt2img(override_settings={"jpeg_quality": 11}))
    assert seen == [(11, 11)]
    assert app.options.jpeg_quality == 80


def test_all_nan_is_an_error_that_says_what_to_do(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(unet: Any, x: torch.Tensor, sigma: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        nan = torch.full_like(x, torch.nan)
        return nan, nan, nan

    with monkeypatch.context() as patch:
        patch.setattr(cfg_denoiser, "denoise_guided", broken)
        with pytest.raises(NansException, match="--all-in-fp32"):
            run(txt2img())
    assert picture(run(txt2img())).std() > 5


# Models


def test_without_a_checkpoint_the_job_says_where_to_put_one_and_works_when_it_is_there(tmp_path: Path) -> None:
    with installed_application(tmp_path) as app:
        with pytest.raises(NoCheckpointError, match="Stable-diffusion"):
            submit(app, txt2img()).wait(60)
        write_checkpoint(tmp_path / "models" / "Stable-diffusion" / "late.safetensors", "sd15", is_shallow=True)
        assert len(submit(app, txt2img()).wait(60).images) == 1


def test_a_broken_checkpoint_is_an_error_and_the_model_before_stays(app: Application, known: KnownPictures) -> None:
    expected = known.txt2img()
    broken = app.config.ckpt_dirs[0] / "broken.safetensors"
    broken.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not a model at all")
    engine = app.models.engine
    try:
        with pytest.raises(ModelLoadError, match=r"broken\.safetensors"):
            run(txt2img(override_settings={"sd_model_checkpoint": "broken"}))
        assert app.models.engine is engine
        assert np.array_equal(picture(run(txt2img(override_settings={"sd_model_checkpoint": "sd15"}))), expected)
    finally:
        broken.unlink()


def test_extra_images_are_pictures(app: Application) -> None:
    """Extensions leave arrays and other things there."""
    processed = run(txt2img(steps=1))
    processed.extra_images = [np.zeros((4, 6, 3), dtype=np.uint8), Image.new("RGB", (2, 2)), "not a picture", None]
    process_extra_images(processed)
    assert [image.size for image in processed.extra_images] == [(6, 4), (2, 2)]
