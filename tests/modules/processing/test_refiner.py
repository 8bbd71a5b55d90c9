"""Two models in one pass, against diffusers: its two SDXL pipelines with denoising_end and denoising_start, and one pipeline whose networks
are swapped between two steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from backend.text_processing.clip_tokenizer import build_clip_tokenizer
from modules.application import Application, install
from modules.errors import RequestError, UnknownCheckpointError
from modules.processing import Processed, conditions
from modules.prompts import extra_networks
from modules.samplers.common import apply_refiner
from tests.support.applications import installed_application
from tests.support.checkpoints import ReferenceModels, write_checkpoint
from tests.support.fleets import virtual_fleet
from tests.support.narrow_application import SIDE_PX, gradient, img2img, narrow_application, pixels, run, txt2img

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")  # diffusers' own

STEPS, SCALE, SEED, SWITCH_AT = 5, 4.0, 3, 0.5
PROMPT, NEGATIVE = "a red cat on a sofa", "dark, blurry"
ONE_LEVEL = 1 / 255

Loaded = tuple[Application, dict[str, ReferenceModels]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    data_dir = tmp_path_factory.mktemp("refiner")
    with narrow_application(data_dir, "sd15", "sdxl", "sdxl_refiner", is_shallow=True) as (app, models):
        folder = data_dir / "models" / "Stable-diffusion"
        models["second"] = write_checkpoint(folder / "second.safetensors", "sd15", seed=9, is_shallow=True)
        models["inpaint"] = write_checkpoint(folder / "inpaint.safetensors", "sd15", seed=4, inpaint=True, is_shallow=True)
        app.checkpoints.refresh()
        app.options.samples_save = app.options.grid_save = False
        yield app, models


@pytest.fixture
def loaded(shared: Loaded) -> Loaded:
    install(shared[0])
    return shared


@pytest.fixture
def app(loaded: Loaded) -> Application:
    return loaded[0]


def fields(checkpoint: str = "sd15", **more: Any) -> dict[str, Any]:
    overrides = {"sd_model_checkpoint": checkpoint, "randn_source": "CPU", **more.pop("override_settings", {})}
    common = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "steps": STEPS, "cfg_scale": SCALE, "seed": SEED, "scheduler": "Karras"}
    return {**common, "refiner_checkpoint": "second", "refiner_switch_at": SWITCH_AT, "override_settings": overrides, **more}


def as_floats(result: Processed) -> np.ndarray:
    return np.asarray(result.images[0].convert("RGB"), dtype=np.float64) / 255


def euler(reference: ReferenceModels) -> EulerDiscreteScheduler:
    config = {**reference.scheduler_config(), "timestep_spacing": "linspace", "steps_offset": 0, "use_karras_sigmas": True}
    return EulerDiscreteScheduler.from_config(config)


def start_of(scheduler: EulerDiscreteScheduler) -> torch.Tensor:
    noise = torch.randn(1, 4, SIDE_PX // 8, SIDE_PX // 8, generator=torch.Generator().manual_seed(SEED))
    scheduler.set_timesteps(STEPS)
    return noise * float(scheduler.sigmas[0]) / float(scheduler.init_noise_sigma)


def two_sdxl_pipelines(base: ReferenceModels, refiner: ReferenceModels, scores: tuple[float, float]) -> np.ndarray:
    scheduler = euler(base)
    first = StableDiffusionXLPipeline(
        vae=base.vae,
        unet=base.unet,
        scheduler=scheduler,
        text_encoder=base.text_encoders[0],
        text_encoder_2=base.text_encoders[1],
        tokenizer=build_clip_tokenizer(),
        tokenizer_2=build_clip_tokenizer(pad_token_id=0),
        add_watermarker=False,
    )
    second = StableDiffusionXLImg2ImgPipeline(
        vae=refiner.vae,
        unet=refiner.unet,
        scheduler=euler(refiner),
        text_encoder=None,
        text_encoder_2=refiner.text_encoders[0],
        tokenizer=None,
        tokenizer_2=build_clip_tokenizer(pad_token_id=0),
        requires_aesthetics_score=True,
        add_watermarker=False,
    )
    for pipeline in (first, second):
        pipeline.set_progress_bar_config(disable=True)
    common = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": SCALE, "num_inference_steps": STEPS}
    size = {"width": SIDE_PX, "height": SIDE_PX}
    latents = first(**common, **size, latents=start_of(scheduler), denoising_end=SWITCH_AT, output_type="latent").images
    measures = {"original_size": (SIDE_PX, SIDE_PX), "target_size": (SIDE_PX, SIDE_PX)}
    aesthetic = {"aesthetic_score": scores[0], "negative_aesthetic_score": scores[1]}
    picture: np.ndarray = second(**common, **measures, **aesthetic, image=latents, denoising_start=SWITCH_AT, output_type="np").images[0]
    return picture


@pytest.mark.parametrize("scores", [(6.0, 2.5), (9.0, 1.0)])
def test_sdxl_base_and_refiner_are_diffusers_two_pipelines(loaded: Loaded, scores: tuple[float, float]) -> None:
    models = loaded[1]
    overrides = {"sdxl_refiner_high_aesthetic_score": scores[0], "sdxl_refiner_low_aesthetic_score": scores[1]}
    result = run(txt2img(**fields("sdxl", refiner_checkpoint="sdxl_refiner", override_settings=overrides)))
    expected = two_sdxl_pipelines(models["sdxl"], models["sdxl_refiner"], scores)
    assert np.abs(as_floats(result) - expected).mean() < ONE_LEVEL
    assert np.abs(as_floats(run(txt2img(**fields("sdxl", refiner_checkpoint=None)))) - expected).mean() > 5 * ONE_LEVEL


def test_aesthetic_scores_change_the_picture(app: Application) -> None:
    def picture(score: float) -> np.ndarray:
        overrides = {"sdxl_refiner_high_aesthetic_score": score}
        return pixels(run(txt2img(**fields("sdxl", refiner_checkpoint="sdxl_refiner", override_settings=overrides))).images[0])

    assert (picture(1.0) != picture(9.0)).any()


def exchanged_between_steps(first: ReferenceModels, second: ReferenceModels, at_step: int) -> np.ndarray:
    """diffusers' pipeline; before step `at_step` its networks are replaced with those of `second`."""
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False, "tokenizer": build_clip_tokenizer()}
    scheduler = euler(first)
    pipeline = StableDiffusionPipeline(vae=first.vae, unet=first.unet, text_encoder=first.text_encoders[0], scheduler=scheduler, **parts)
    pipeline.set_progress_bar_config(disable=True)

    def after_step(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step + 1 != at_step:
            return {}
        pipe.register_modules(unet=second.unet, vae=second.vae, text_encoder=second.text_encoders[0])
        cond, uncond = pipe.encode_prompt(PROMPT, "cpu", 1, True, negative_prompt=NEGATIVE)
        return {"prompt_embeds": torch.cat([uncond, cond])}

    picture: np.ndarray = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        guidance_scale=SCALE,
        num_inference_steps=STEPS,
        width=SIDE_PX,
        height=SIDE_PX,
        latents=start_of(scheduler),
        output_type="np",
        callback_on_step_end=after_step,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    ).images[0]
    return picture


@pytest.mark.parametrize(("switch_at", "at_step"), [(0.4, 2), (0.5, 3), (0.8, 4)])
def test_two_models_of_one_family_by_steps(loaded: Loaded, switch_at: float, at_step: int) -> None:
    models = loaded[1]
    request = txt2img(**fields(refiner_switch_at=switch_at, override_settings={"refiner_switch_by_sample_steps": True}))
    expected = exchanged_between_steps(models["sd15"], models["second"], at_step)
    assert np.abs(as_floats(run(request)) - expected).mean() < ONE_LEVEL


def test_the_whole_pass_or_none_of_it(app: Application) -> None:
    alone = {name: pixels(run(txt2img(**fields(name, refiner_checkpoint=None))).images[0]) for name in ("sd15", "second")}
    all_refined, never, same = (
        run(txt2img(**fields(**more))) for more in ({"refiner_switch_at": 0}, {"refiner_switch_at": 1}, {"refiner_checkpoint": "sd15.safetensors"})
    )
    assert (pixels(all_refined.images[0]) == alone["second"]).all()
    assert (pixels(never.images[0]) == alone["sd15"]).all()
    assert (pixels(same.images[0]) == alone["sd15"]).all()
    assert "Refiner" not in never.infotexts[0] + same.infotexts[0]


def test_the_infotext_says_it_and_the_next_job_has_the_first_model(app: Application) -> None:
    before = pixels(run(txt2img(**fields(refiner_checkpoint=None))).images[0])
    result = run(txt2img(**fields(n_iter=2, override_settings={"return_grid": False})))
    assert "Refiner: second [" in result.infotexts[0]
    assert "Refiner switch at: 0.5" in result.infotexts[0]
    assert "Model: sd15" in result.infotexts[0]
    single = run(txt2img(**fields(seed=SEED + 1)))
    assert (pixels(result.images[1]) == pixels(single.images[0])).all()
    assert (pixels(run(txt2img(**fields(refiner_checkpoint=None))).images[0]) == before).all()


def test_a_request_without_a_point_takes_the_pages(app: Application) -> None:
    assert "Refiner switch at: 0.8" in run(txt2img(**fields(refiner_switch_at=None))).infotexts[0]


@pytest.mark.parametrize("sampler", ["DPM++ 2M", "Heun", "DPM++ 2M SDE", "UniPC", "DDIM CFG++", "Restart"])
def test_samplers_with_a_history_go_on_with_it(app: Application, sampler: str) -> None:
    """The same networks as "refiner" give exactly the picture of one model: the swap loses nothing of the sampler's state."""
    copy = app.checkpoints.roots[0] / "copy.safetensors"
    if not copy.exists():
        copy.write_bytes((app.checkpoints.roots[0] / "sd15.safetensors").read_bytes())
    scheduler = {"scheduler": "Automatic", "sampler_name": sampler}
    alone = run(txt2img(**fields(refiner_checkpoint=None, **scheduler)))
    both = run(txt2img(**fields(refiner_checkpoint="copy", **scheduler)))
    assert (pixels(alone.images[0]) == pixels(both.images[0])).all()
    assert "Refiner: copy" in both.infotexts[0]


@pytest.mark.parametrize(("wanted", "differs_from_unrefined"), [("first pass", True), ("second pass", True), ("both passes", True)])
def test_hires_fix_refines_the_passes_that_the_setting_names(app: Application, wanted: str, differs_from_unrefined: bool) -> None:
    hires = {"enable_hr": True, "hr_scale": 1.5, "hr_cfg": SCALE, "hr_upscaler": "Latent", "denoising_strength": 0.7}
    switched: list[tuple[bool, str]] = []

    def watch(p: Any, network_data: Any) -> None:
        switched.append((p.is_hr_pass, Path(p.sd_model.filename).stem))

    kind = extra_networks.ExtraNetwork("watcher")
    kind.activate = watch  # type: ignore[method-assign]
    extra_networks.register_extra_network(kind)
    try:
        result = run(txt2img(**fields(**hires, override_settings={"hires_fix_refiner_pass": wanted})))
    finally:
        extra_networks.extra_network_registry.pop("watcher")
    refined = [is_second for is_second, name in switched if name == "second"]
    assert refined == {"first pass": [False], "second pass": [True], "both passes": [False, True]}[wanted]
    assert next(name for is_second, name in switched if is_second) == "sd15"
    assert ("Hires refiner" in result.infotexts[0]) == (wanted != "second pass")
    plain = run(txt2img(**fields(**hires, refiner_checkpoint=None)))
    assert (pixels(result.images[0]) != pixels(plain.images[0])).any() == differs_from_unrefined


def test_img2img_and_a_second_batch_of_it(app: Application) -> None:
    two = run(img2img(**fields(n_iter=2, denoising_strength=0.9, override_settings={"return_grid": False})))
    second = run(img2img(**fields(seed=SEED + 1, denoising_strength=0.9)))
    plain = run(img2img(**fields(seed=SEED + 1, denoising_strength=0.9, refiner_checkpoint=None)))
    assert (pixels(two.images[1]) == pixels(second.images[0])).all()
    assert (pixels(second.images[0]) != pixels(plain.images[0])).any()


@pytest.mark.parametrize(("first", "then"), [("inpaint", "sd15"), ("sd15", "inpaint")])
def test_an_inpainting_model_before_or_behind_another(app: Application, first: str, then: str) -> None:
    result = run(txt2img(**fields(first, refiner_checkpoint=then)))
    assert result.images[0].size == (SIDE_PX, SIDE_PX)
    assert run(img2img(**fields(first, refiner_checkpoint=then, init_images=[gradient(SIDE_PX, SIDE_PX)]))).images


def test_conditions_of_both_models_are_kept(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    run(txt2img(**fields()))
    encoded: list[str] = []
    encode = conditions.prompt_parser.get_learned_conditioning
    monkeypatch.setattr(conditions.prompt_parser, "get_learned_conditioning", lambda *args: encoded.append("x") or encode(*args))
    run(txt2img(**fields(seed=77)))
    assert encoded == []


def test_refiners_that_cannot_be(app: Application) -> None:
    with pytest.raises(UnknownCheckpointError, match="refiner_checkpoint: there is no checkpoint 'nobody'"):
        run(txt2img(**fields(refiner_checkpoint="nobody")))
    with pytest.raises(RequestError, match="whose latents differ"):
        run(txt2img(**fields(refiner_checkpoint="sdxl_refiner")))
    with pytest.raises(RequestError, match="refiner_switch_at"):
        run(txt2img(**fields(refiner_switch_at=2)))


def test_extensions_may_ask_for_the_exchange_themselves(app: Application) -> None:
    class Denoiser:
        p = txt2img(**fields())

    assert apply_refiner(Denoiser(), torch.zeros(1, 4, 8, 8)) is False


@pytest.mark.parametrize("strategy", ["layers", "replicas"])
def test_both_models_work_on_several_slots(loaded: Loaded, tmp_path: Path, strategy: str) -> None:
    """The plan is computed again for the second model. Equals one slot's picture up to the rounding of another batch shape."""
    request = {"batch_size": 2, "override_settings": {"return_grid": False, "multi_gpu_strategy": strategy}}
    alone = run(txt2img(**fields(**request)))
    folder = tmp_path / "models" / "Stable-diffusion"
    folder.mkdir(parents=True)
    for name in ("sd15", "second"):
        (folder / f"{name}.safetensors").write_bytes((loaded[0].checkpoints.roots[0] / f"{name}.safetensors").read_bytes())
    with virtual_fleet(2), installed_application(tmp_path) as app:
        app.options.samples_save = app.options.grid_save = app.options.live_previews_enable = False
        split = run(txt2img(**fields(**request)))
    assert "Refiner: second" in split.infotexts[0]
    for one, other in zip(alone.images, split.images):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
