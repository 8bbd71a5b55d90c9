"""The built-in extensions that patch the UNet or the masks, in whole jobs: their panels as clients know them, on one slot and on two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from backend import memory_management
from backend.attention import attention_function
from backend.memory.vram_state import VRAMState
from backend.parallel.running import status
from modules.application import Application
from modules.errors import RequestError
from modules.infotext.parameters import parse_generation_parameters
from modules.scripts.arguments import start_values
from modules.scripts.without_page import build_controls
from tests.support.extensions import loaded_builtin
from tests.support.fleets import virtual_fleet
from tests.support.narrow_application import img2img, narrow_application, pixels, run, txt2img

FOLDERS = (
    *("sd_forge_dynamic_thresholding", "sd_forge_freeu", "sd_forge_sag", "sd_forge_perturbed_attention", "sd_forge_kohya_hrfix"),
    *("sd_forge_latent_modifier", "sd_forge_multidiffusion", "sd_forge_stylealign", "sd_forge_neveroom", "hypertile", "soft-inpainting"),
    "extra-options-section",
)
FREEU, SAG = "FreeU Integrated (SD 1.x, SD 2.x, SDXL)", "SelfAttentionGuidance Integrated (SD 1.x, SD 2.x, SDXL)"
PAG, HRFIX, ALIGN = "PerturbedAttentionGuidance Integrated", "Kohya HRFix Integrated", "StyleAlign Integrated"
THRESHOLD, MODIFIER, VIEWS = "DynamicThresholding (CFG-Fix) Integrated", "LatentModifier Integrated", "MultiDiffusion Integrated"
NEVER, SOFT = "Never OOM Integrated", "Soft Inpainting"
ROUNDING = 2  # of 255; docs/multi_gpu.md says why replicas differ at all

PANELS: dict[str, list[str]] = {
    THRESHOLD: [
        *("Enabled", "Mimic Scale", "Threshold Percentile", "Mimic Mode", "Mimic Scale Min", "Cfg Mode", "Cfg Scale Min", "Sched Val"),
        *("Separate Feature Channels", "Scaling Startpoint", "Variability Measure", "Interpolate Phi"),
    ],
    FREEU: [FREEU, "B1", "B2", "S1", "S2", "Start step", "End step"],
    SAG: [SAG, "Scale", "Blur Sigma", "Blur mask threshold"],
    PAG: [PAG, "Scale", "Attenuation (linear, % of scale)", "Start step", "End step"],
    HRFIX: [
        *(HRFIX, "Block Number", "Downscale Factor", "Start Percent", "End Percent", "Downscale After Skip", "Downscale Method"),
        "Upscale Method",
    ],
    MODIFIER: [
        *("Enabled", "Sharpness Multiplier", "Sharpness Method", "Tonemap Multiplier", "Tonemap Method", "Tonemap Percentile"),
        *("Contrast Multiplier", "Combat Method", "Combat Cfg Drift", "Rescale Cfg Phi", "Extra Noise Type", "Extra Noise Method"),
        *("Extra Noise Multiplier", "Extra Noise Lowpass", "Divisive Norm Size", "Divisive Norm Multiplier", "Spectral Mod Mode"),
        *("Spectral Mod Percentile", "Spectral Mod Multiplier", "Affect Uncond", "Dyn Cfg Augmentation"),
    ],
    VIEWS: ["Enabled", "Method", "Tile Width", "Tile Height", "Tile Overlap", "Tile Batch Size"],
    ALIGN: ["Share attention in batch", "Strength"],
    NEVER: ["Enabled for UNet (always maximize offload)", "Enabled for VAE (always tiled)"],
}
"""Forge's titles, in its order on the page, and the arguments of each, which API clients send by position."""

ACTING: dict[str, tuple[str, list[Any], dict[str, str]]] = {
    "freeu": (FREEU, [True, 1.6, 1.7, 0.9, 0.2], {"freeu_enabled": "True", "freeu_b1": "1.6", "freeu_end": "1.0"}),
    "freeu, last steps": (FREEU, [True, 1.6, 1.7, 0.9, 0.2, 0.5, 1.0], {"freeu_start": "0.5"}),
    "sag": (SAG, [True, 4.0, 2.0, 0.9], {"sag_enabled": "True", "sag_scale": "4.0", "sag_threshold": "0.9"}),
    "pag": (PAG, [True, 6.0], {"pagi_enabled": "True", "pagi_scale": "6.0", "pagi_attenuation": "0.0"}),
    "hrfix": (HRFIX, [True, 2, 2.0, 0.0, 0.9], {"kohya_hrfix_enabled": "True", "kohya_hrfix_block_number": "2"}),
    "dynamic thresholding": (THRESHOLD, [True, 1.5, 0.9], {"dynthres_enabled": "True", "dynthres_mimic_scale": "1.5"}),
    "latent modifier": (MODIFIER, [True, 90.0, "gaussian", 0.3], {"latent_modifier_enabled": "True", "latent_modifier_sharpness_method": "gaussian"}),
    "views": (VIEWS, [True, "Mixture of Diffusers", 48, 48, 16, 3], {"multidiffusion_enabled": "True", "multidiffusion_tile_width": "48"}),
    "token merging": ("", [], {"Token merging ratio": "0.5"}),
    "stylealign": (ALIGN, [True, 1.0], {"stylealign_enabled": "True", "stylealign_strength": "1.0"}),
}
"""Extension, its first arguments, and what the parameters say of them."""


FIELDS: dict[str, dict[str, Any]] = {
    "pag": {"width": 128},  # the middle block has more than one token
    "dynamic thresholding": {"cfg_scale": 30.0},
    "token merging": {"token_merging_ratio": 0.5},
}


@contextmanager
def _application(folder: Path) -> Iterator[Application]:
    with narrow_application(folder) as (app, _):
        app.options.samples_save = app.options.grid_save = False
        app.options.extra_options_txt2img = ["CLIP_stop_at_last_layers", "eta_noise_seed_delta", "outdir_samples", "nothing"]
        with loaded_builtin(app, *FOLDERS):
            build_controls(app)
            yield app


@contextmanager
def _replaced_forward(app: Application) -> Iterator[None]:
    """What an extension does to the model's inside: another attention, and a residual block that is damped."""
    inside = app.models.ensure_loaded().forge_objects.unet.model.diffusion_model
    attention, block = inside.input_blocks[1][1].transformer_blocks[0].attn2, inside.output_blocks[3][0]
    before = block.forward

    def attend(x: Any, context: Any = None, value: Any = None, **kwargs: Any) -> Any:
        k, v = attention.to_k(context), attention.to_v(context)
        return attention.to_out(attention_function(attention.to_q(x), k, v * 0.2, attention.heads))

    attention.forward, block.forward = attend, lambda x, emb, *args: before(x, emb) * 0.8
    try:
        yield
    finally:
        del attention.forward, block.forward


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with _application(tmp_path_factory.mktemp("guests")) as app:
        yield app


def give(app: Application, request: Any, title: str = "", *args: Any) -> Any:
    runner = app.script_runners["img2img" if "Img2Img" in type(request).__name__ else "txt2img"]
    slots = start_values(runner)
    values = [slots.get(slot) for slot in range(len(runner.inputs))]
    values[0] = 0
    if title:
        script = runner.script(title)
        values[script.args_from : script.args_from + len(args)] = args
    request.scripts, request.script_args = runner, tuple(values)
    return request


def _pair(**fields: Any) -> Any:
    return txt2img(**{"batch_size": 2, "do_not_save_grid": True, "steps": 2, **fields})


def _images(result: Any) -> list[np.ndarray]:
    return [pixels(image) for image in result.images[result.index_of_first_image :]]


@pytest.fixture(scope="module")
def plain(app: Application) -> list[np.ndarray]:
    return _images(run(give(app, _pair())))


@pytest.fixture(scope="module")
def made(app: Application) -> dict[str, list[np.ndarray]]:
    """The pictures of each extension on one slot."""
    pictures = {name: _images(run(give(app, _pair(**FIELDS.get(name, {})), title, *args))) for name, (title, args, _) in ACTING.items()}
    title, args, _ = ACTING["views"]
    pictures["views of one row"] = _images(run(give(app, _pair(batch_size=1, cfg_scale=1.0), title, *args)))
    with _replaced_forward(app):
        pictures["replaced forward"] = _images(run(give(app, _pair())))
    return pictures


def test_panels_have_the_titles_and_arguments_of_forge_in_its_order(app: Application) -> None:
    for tab in ("txt2img", "img2img"):
        scripts = [script for script in app.script_runners[tab].scripts if script.title() in PANELS]
        assert [script.title() for script in scripts] == list(PANELS)
        assert {script.title(): [control.label for control in script.controls] for script in scripts} == PANELS
        ids = [control.elem_id for script in app.script_runners[tab].scripts for control in script.controls]
        assert None not in ids and len(set(ids)) == len(ids)
    soft = app.script_runners["img2img"].script(SOFT)
    assert [control.elem_id for control in soft.controls] == [
        *("soft_inpainting_enabled-checkbox", "mask_blend_power", "mask_blend_scale", "inpaint_detail_preservation"),
        *("composite_mask_influence", "composite_difference_threshold", "composite_difference_contrast"),
    ]
    assert SOFT not in [script.title() for script in app.script_runners["txt2img"].scripts]


def test_extensions_that_are_off_change_nothing(app: Application, plain: list[np.ndarray]) -> None:
    assert all(np.array_equal(one, other) for one, other in zip(plain, _images(run(_pair())), strict=True))


@pytest.mark.parametrize("name", list(ACTING))
def test_an_extension_acts_and_says_so_in_the_parameters(app: Application, plain: list[np.ndarray], name: str) -> None:
    title, args, said = ACTING[name]
    fields = FIELDS.get(name, {})
    without = _images(run(give(app, _pair(**fields)))) if fields and title else plain
    result = run(give(app, _pair(**fields), title, *args))
    assert not result.comments
    assert not any(np.array_equal(one, other) for one, other in zip(without, _images(result), strict=True))
    written = parse_generation_parameters(result.infotexts[result.index_of_first_image])
    assert {key: written.get(key) for key in said} == said


@pytest.mark.parametrize(
    ("title", "args", "says"),
    [
        (FREEU, [True, "much"], "B1 is 'much'; send a number from 0 to 2"),
        (FREEU, [True, float("nan")], "B1 is nan"),
        (PAG, [True, 3.0, 1000.0], "Attenuation .* is 1000.0; send a number from 0 to 100"),
        (HRFIX, [True, 2, 2.0, 0, 1, True, "lanczos"], "Downscale Method is 'lanczos'; choose one of bicubic"),
        (THRESHOLD, ["maybe"], "Enabled is 'maybe'; send true or false"),
        (VIEWS, [True, "MultiDiffusion", 8], "Tile Width is 8; send a number from 16"),
        (VIEWS, [True, "MultiDiffusion", 16, 16, 2048], "are 1369 views of this picture; 1024 at most"),
    ],
)
def test_a_value_out_of_its_bounds_is_refused(app: Application, title: str, args: list[Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        run(give(app, _pair(width=304, height=304), title, *args))


def test_settings_in_the_tab_override_for_its_jobs(app: Application) -> None:
    script = app.script_runners["txt2img"].script("Extra options")
    assert script.setting_names == ["eta_noise_seed_delta"], "what the page shows anyway and folders are left out"
    request = give(app, _pair(sampler_name="Euler a"), "Extra options", 31337)
    assert "ENSD: 31337" in run(request).infotexts[0]
    assert app.options.eta_noise_seed_delta == 0
    asked = give(app, _pair(sampler_name="Euler a", override_settings={"eta_noise_seed_delta": 7}), "Extra options", 31337)
    assert "ENSD: 7" in run(asked).infotexts[0]


def test_hypertile_follows_its_settings_and_a_jobs_overrides(app: Application, plain: list[np.ndarray]) -> None:
    overrides = {"hypertile_enable_unet": True, "hypertile_max_tile_unet": 16, "hypertile_swap_size_unet": 1}
    result = run(give(app, _pair(override_settings=overrides)))
    assert all(np.abs(one - other).max() > 3 for one, other in zip(plain, _images(result), strict=True))
    written = parse_generation_parameters(result.infotexts[-1])
    assert (written["Hypertile U-Net"], written["Hypertile U-Net max tile size"]) == ("True", "16")


def test_soft_inpainting_shows_the_original_where_little_has_changed(app: Application) -> None:
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    fields = {"mask": mask, "mask_blur": 2, "inpainting_fill": 1, "inpaint_full_res": False, "denoising_strength": 0.9}
    hard, soft = run(give(app, img2img(**fields))), run(give(app, img2img(**fields), SOFT, True))
    original = pixels(img2img().init_images[0])
    assert not np.array_equal(pixels(hard.images[0]), pixels(soft.images[0]))
    difference = np.abs(pixels(soft.images[0]) - original).mean(axis=(0, 2))
    assert difference[60:].mean() < 0.5 * difference[:16].mean(), "what is masked changes, what is not hardly"
    written = parse_generation_parameters(soft.infotexts[0])
    assert written["Soft inpainting enabled"] == "True" and written["Soft inpainting transition contrast boost"] == "4.0"
    cropped = run(give(app, img2img(**{**fields, "inpaint_full_res": True}), SOFT, True))
    assert cropped.images[0].size == (64, 64)


@pytest.fixture(scope="module", params=["replicas", "layers"])
def app_of_two_gpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, plain: Any, made: Any) -> Iterator[Application]:
    """The same extensions on two virtual GPUs; one slot made its pictures before, because only one application can be installed at a time."""
    with virtual_fleet(2), _application(tmp_path_factory.mktemp("two")) as app:
        app.options.set("multi_gpu_strategy", request.param)
        yield app


@pytest.mark.parametrize("name", list(ACTING))
def test_two_slots_make_the_pictures_of_one(app_of_two_gpus: Application, made: dict[str, list[np.ndarray]], name: str) -> None:
    title, args, _ = ACTING[name]
    pictures = _images(run(give(app_of_two_gpus, _pair(**FIELDS.get(name, {})), title, *args)))
    assert max(np.abs(one - other).max() for one, other in zip(pictures, made[name], strict=True)) <= ROUNDING
    plan = status.current_plan()
    assert plan is not None
    if title == ALIGN:
        assert "StyleAlign shares attention among the pictures of a batch, so other slots cannot help" in plan.reason
    else:
        assert {slot for stages in plan.stages for slot in stages} == {0, 1}


def test_views_of_one_row_are_dealt_to_all_slots(app_of_two_gpus: Application, made: dict[str, list[np.ndarray]]) -> None:
    """One picture without CFG is one row, but its views are four."""
    title, args, _ = ACTING["views"]
    pictures = _images(run(give(app_of_two_gpus, _pair(batch_size=1, cfg_scale=1.0), title, *args)))
    assert np.abs(pictures[0] - made["views of one row"][0]).max() <= ROUNDING
    plan = status.current_plan()
    assert plan is not None and {slot for stages in plan.stages for slot in stages} == {0, 1}
    assert plan.strategy == app_of_two_gpus.options.multi_gpu_strategy


def test_a_replaced_forward_acts_on_every_slot(app_of_two_gpus: Application, plain: list[np.ndarray], made: dict[str, list[np.ndarray]]) -> None:
    with _replaced_forward(app_of_two_gpus):
        pictures = _images(run(give(app_of_two_gpus, _pair())))
    plan = status.current_plan()
    assert plan is not None and {slot for stages in plan.stages for slot in stages} == {0, 1}
    for one, other, without in zip(pictures, made["replaced forward"], plain, strict=True):
        assert np.abs(one - other).max() <= ROUNDING < np.abs(one - without).max()


def test_never_oom_streams_weights_and_tiles_the_vae_until_a_job_without_it(app_of_two_gpus: Application, plain: list[np.ndarray]) -> None:
    try:
        pictures = _images(run(give(app_of_two_gpus, _pair(), NEVER, True, True)))
        assert {memory_management.vram_state_of(slot.torch_device) for slot in memory_management.compute_slots()} == {VRAMState.NO_VRAM}
        assert memory_management.VAE_ALWAYS_TILED
        assert max(np.abs(one - other).max() for one, other in zip(pictures, plain, strict=True)) <= ROUNDING
    finally:
        run(give(app_of_two_gpus, _pair()))
    assert {memory_management.vram_state_of(slot.torch_device) for slot in memory_management.compute_slots()} == {VRAMState.NORMAL_VRAM}
    assert not memory_management.VAE_ALWAYS_TILED
