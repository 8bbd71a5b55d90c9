from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import pytest
import torch
from safetensors.torch import save_file

from backend.families.family import PageDefaults
from backend.families.registry import all_families, find_family
from modules.application import Application
from modules.checkpoints.families import FamilyFacts
from modules.settings.presets import NAMES
from modules.ui import quicksettings as quick
from modules.ui.quicksettings import QuickSettingsHandlers
from tests.support.applications import installed_application


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path / "data") as app:
        yield app


def put_checkpoint(app: Application, name: str, resolution: str | None = None) -> None:
    folder = app.config.ckpt_dirs[0]
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"x": torch.zeros(2)}, folder / name, metadata={"modelspec.resolution": resolution} if resolution else None)
    app.checkpoints.refresh()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64x64", (64, 64)),
        ("1024 x 768", (1024, 768)),
        ("1024", (1024, 1024)),
        (512, (512, 512)),
        ("64X128", (64, 128)),
        (None, None),
        ("", None),
        ("large", None),
        ("32x32", None),
        ("4096x4096", None),
        ("65x64", None),
    ],
)
def test_native_size_is_read_only_when_the_sliders_can_take_it(text: object, size: tuple[int, int] | None) -> None:
    assert quick.parse_native_size(text) == size


def test_native_size_is_that_of_the_selected_checkpoint(app: Application) -> None:
    assert quick.native_size(app) is None
    put_checkpoint(app, "a.safetensors")
    put_checkpoint(app, "b.safetensors", "64x64")
    assert quick.native_size(app) is None
    app.options.set("sd_model_checkpoint", "b.safetensors")
    assert quick.native_size(app) == (64, 64)


def test_without_a_checkpoint_the_page_says_where_one_goes(app: Application) -> None:
    text = quick.notice_html(app)
    assert str(app.config.ckpt_dirs[0]) in text
    for suffix in (".safetensors", ".ckpt"):
        assert suffix in text
    put_checkpoint(app, "a.safetensors")
    assert quick.notice_html(app) == ""


def test_checkpoint_put_there_later_is_found_without_restart(app: Application) -> None:
    handlers = QuickSettingsHandlers(app)
    checkpoint, _, notice, watch = handlers.look_again()
    assert (checkpoint["choices"], checkpoint["value"], watch["active"]) == ([], None, True)
    assert notice
    put_checkpoint(app, "a.safetensors")
    checkpoint, _, notice, watch = handlers.look_again()
    assert (checkpoint["choices"], checkpoint["value"], watch["active"]) == (["a.safetensors"], "a.safetensors", False)
    assert notice == ""


def test_chosen_checkpoint_is_kept_in_the_settings_file(app: Application) -> None:
    put_checkpoint(app, "a.safetensors")
    put_checkpoint(app, "b.safetensors")
    assert QuickSettingsHandlers(app).choose_checkpoint("b.safetensors") == gr.skip()
    assert app.options.sd_model_checkpoint == "b.safetensors"
    assert "b.safetensors" in app.config.settings_file.read_text()


@pytest.mark.filterwarnings("ignore:There is no checkpoint")
def test_unknown_checkpoint_is_refused_and_the_old_one_comes_back(app: Application) -> None:
    put_checkpoint(app, "a.safetensors")
    update = QuickSettingsHandlers(app).choose_checkpoint("no such model")
    assert update["value"] == "a.safetensors"
    assert app.options.sd_model_checkpoint is None


@pytest.mark.filterwarnings("ignore:.*freeze-settings")
def test_frozen_settings_are_refused_in_words(tmp_path: Path) -> None:
    with installed_application(tmp_path / "data", freeze_settings=True) as app:
        before = app.options.CLIP_stop_at_last_layers
        QuickSettingsHandlers(app).choose_clip_skip(2)
        assert app.options.CLIP_stop_at_last_layers == before


def test_modules_are_kept_by_path_and_shown_by_name(app: Application) -> None:
    folder = app.config.vae_dirs[0]
    folder.mkdir(parents=True)
    save_file({"x": torch.zeros(2)}, folder / "v.safetensors")
    app.additional_modules.refresh()
    handlers = QuickSettingsHandlers(app)
    assert handlers.choose_modules(["v.safetensors", "gone.safetensors"])["value"] == ["v.safetensors"]
    assert app.options.forge_additional_modules == [str(folder / "v.safetensors")]
    assert quick.modules_dropdown(app) == {"choices": ["v.safetensors"], "value": ["v.safetensors"]}


def test_presets_give_the_values_users_know(app: Application) -> None:
    sd, xl = quick.preset_defaults(app.options, "sd", "txt2img"), quick.preset_defaults(app.options, "xl", "img2img")
    assert sd is not None and xl is not None
    assert (sd.width_px, sd.height_px, sd.cfg_scale, sd.sampler, sd.scheduler) == (512, 640, 7, "Euler a", "Automatic")
    assert (xl.width_px, xl.height_px, xl.cfg_scale, xl.sampler, xl.scheduler) == (1024, 1024, 5, "DPM++ 2M SDE", "Karras")
    assert quick.preset_defaults(app.options, "all", "txt2img") is None


def test_the_flux_preset_is_forge_s(app: Application) -> None:
    first, second = (quick.preset_defaults(app.options, "flux", tab) for tab in ("txt2img", "img2img"))
    assert first is not None and second is not None
    assert (first.width_px, first.height_px, first.cfg_scale, first.hires_cfg_scale, first.sampler, first.scheduler) == (
        896, 1152, 1.0, 1.0, "Euler", "Simple",
    )  # fmt: skip
    assert (second.width_px, second.height_px, second.cfg_scale, second.sampler, second.scheduler) == (1024, 1024, 1.0, "Euler", "Simple")
    app.options.set("flux_t2i_d_cfg", 2.5)
    app.options.set("flux_t2i_hr_d_cfg", 4.5)
    app.options.set("flux_i2i_d_cfg", 30)
    first, second = (quick.preset_defaults(app.options, "flux", tab) for tab in ("txt2img", "img2img"))
    assert first is not None and second is not None
    assert (first.distilled_cfg_scale, first.hires_distilled_cfg_scale, second.distilled_cfg_scale) == (2.5, 4.5, 30.0)


@pytest.mark.parametrize(
    ("preset", "low_bits_shown", "clip_skip_shown"), [("sd", False, True), ("xl", True, False), ("flux", True, False), ("all", True, True)]
)
def test_preset_is_kept_and_shows_its_controls(app: Application, preset: str, low_bits_shown: bool, clip_skip_shown: bool) -> None:
    *_, low_bits, clip_skip = QuickSettingsHandlers(app).choose_preset(preset)
    assert (low_bits["visible"], clip_skip["visible"]) == (low_bits_shown, clip_skip_shown)
    assert app.options.forge_preset == preset
    assert quick.start_preset(app) == preset


def facts(*, preset: str = "", distilled: bool = False) -> FamilyFacts:
    return FamilyFacts(name="some", takes_distilled=distilled, multiple_px=16, defaults=PageDefaults(preset=preset, cfg=2.0, width_px=640))


def test_distilled_sliders_follow_the_checkpoint_and_the_preset_where_it_says_nothing() -> None:
    assert {preset for preset in quick.PRESETS if quick.distilled_is_shown(preset, None)} == {"flux", "all"}
    assert all(quick.distilled_is_shown(preset, facts(distilled=True)) for preset in quick.PRESETS)
    assert not any(quick.distilled_is_shown(preset, facts()) for preset in quick.PRESETS)


@pytest.mark.parametrize(
    ("preset", "family_preset", "after"),
    [
        ("sd", "flux", "flux"), ("xl", "flux", "flux"), ("flux", "xl", "xl"), ("flux", "sd", "sd"), ("sd", "xl", "sd"), ("xl", "sd", "xl"),
        ("all", "flux", "all"), ("flux", "flux", "flux"), ("flux", "", "flux"), ("xl", "zit", "zit"), ("zit", "klein", "klein"), ("zit", "sd", "sd"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_the_other_kind_brings_its_preset(preset: str, family_preset: str, after: str) -> None:
    assert quick.preset_for(preset, facts(preset=family_preset)) == after
    assert quick.preset_for(preset, None) == preset


def test_presets_have_the_values_of_their_families(app: Application) -> None:
    """One table for the page, which starts without torch, and one for the families."""
    for family in all_families():
        own = family.defaults
        if not own.preset or getattr(app.options, f"{own.preset}_t2i_step", None) is None:
            continue
        made = quick.preset_defaults(app.options, own.preset, "txt2img")
        assert made is not None
        shown = (made.width_px, made.height_px, made.cfg_scale, made.sampler, made.scheduler, made.steps)
        assert shown == (own.width_px, own.height_px, own.cfg, own.sampler, own.schedule, own.steps), family.name
    assert {family.defaults.preset for family in all_families()} - {""} == set(NAMES)


def test_steps_are_set_by_newer_presets_and_taken_back_by_older_ones(app: Application) -> None:
    """Forge's presets leave the slider alone among themselves."""
    app.options.set("zit_t2i_step", 8)
    found = [quick.preset_defaults(app.options, preset, "txt2img", before) for preset, before in (("zit", "sd"), ("xl", "zit"), ("xl", "sd"))]
    assert [None if one is None else one.steps for one in found] == [8, 20, None]


@pytest.mark.parametrize(
    ("name", "steps", "cfg"),
    [
        ("z_image_turbo_bf16", 9, 1.0), ("z_image_bf16", 25, 4.0), ("z-image", 25, 4.0), ("my_zimage_tune_v2", 9, 1.0), ("Z-Image-Base-fp8", 25, 4.0),
    ],
)  # fmt: skip
def test_a_file_s_name_tells_a_base_model(name: str, steps: int, cfg: float) -> None:
    own = find_family("zimage").defaults.for_name(name)
    assert (own.steps, own.cfg) == (steps, cfg)


def test_a_base_model_brings_its_own_steps_and_scale(app: Application) -> None:
    app.options.set("klein_t2i_step", 6)
    usual = find_family("flux2").defaults
    base = usual.for_name("flux-2-klein-base-4b")
    known = [FamilyFacts(name="flux2", takes_distilled=False, multiple_px=16, defaults=own, is_variant=own is base) for own in (usual, base)]
    defaults = quick.preset_defaults(app.options, "klein", "txt2img", "sd")
    first, second = (quick.fit_variant(defaults, one) for one in known)
    assert first is not None and (first.steps, first.cfg_scale) == (6, 1.0)
    assert second is not None and (second.steps, second.cfg_scale, second.hires_cfg_scale) == (20, 5.0, 5.0)
    assert quick.is_other_variant("klein", *known) and quick.is_other_variant("klein", *reversed(known))
    assert not quick.is_other_variant("klein", known[0], known[0]) and not quick.is_other_variant("zit", *known)


def test_a_family_without_a_preset_proposes_its_own_values() -> None:
    defaults = quick.family_defaults(facts())
    assert (defaults.width_px, defaults.cfg_scale, defaults.hires_cfg_scale, defaults.sampler) == (640, 2.0, 2.0, "Euler")


def test_a_preset_brings_back_its_checkpoint_and_files(app: Application) -> None:
    for name in ("a", "b"):
        put_checkpoint(app, f"{name}.safetensors")
    put_modules(app, "clip.safetensors", "t5.safetensors")
    paths = {name: str(path) for name, path in app.additional_modules.files.items()}
    handlers = QuickSettingsHandlers(app)
    handlers.choose_checkpoint("a.safetensors")
    checkpoint, modules, *_ = handlers.choose_preset("flux")
    assert "a.safetensors" in checkpoint["value"] and modules["value"] == []  # nothing was chosen with flux yet
    handlers.choose_checkpoint("b.safetensors")
    handlers.choose_modules(["t5.safetensors", "clip.safetensors"])
    checkpoint, modules, *_ = handlers.choose_preset("sd")
    assert "a.safetensors" in checkpoint["value"] and modules["value"] == []
    checkpoint, modules, *_ = handlers.choose_preset("flux")
    assert "b.safetensors" in checkpoint["value"] and modules["value"] == ["t5.safetensors", "clip.safetensors"]
    assert app.options.forge_additional_modules == [paths["t5.safetensors"], paths["clip.safetensors"]]
    Path(paths["clip.safetensors"]).unlink()
    app.additional_modules.refresh()
    handlers.choose_preset("sd")
    _, modules, *_ = handlers.choose_preset("flux")
    assert modules["value"] == ["t5.safetensors"]


def put_modules(app: Application, *names: str) -> None:
    folder = app.additional_modules.text_encoder_roots[0]
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        save_file({"x": torch.zeros(2)}, folder / name)
    app.additional_modules.refresh()


def test_sdxl_flag_starts_with_the_xl_preset(tmp_path: Path) -> None:
    with installed_application(tmp_path / "data", sdxl=True) as app:
        assert quick.start_preset(app) == "xl"
