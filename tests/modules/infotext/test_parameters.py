from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from modules import extras, generation_parameters_copypaste
from modules.application import Application
from modules.infotext import parameters as infotext_utils
from modules.infotext import paste
from modules.infotext.text import build_infotext
from modules.prompts.styles import PromptStyle
from tests.support.applications import installed_application

LAST_LINE = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x768"


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    checkpoints = tmp_path / "models" / "Stable-diffusion"
    checkpoints.mkdir(parents=True)
    for name in ("one", "two"):
        (checkpoints / f"{name}.safetensors").write_bytes(name.encode())
    vae = tmp_path / "models" / "VAE"
    vae.mkdir()
    (vae / "kl.safetensors").write_bytes(b"vae")
    with installed_application(tmp_path) as app:
        yield app


def parse(last_line: str, prompt: str = "a cat", **arguments: Any) -> dict[str, Any]:
    return infotext_utils.parse_generation_parameters(f"{prompt}\n{last_line}", **arguments)


def test_what_is_left_out_has_its_default() -> None:
    parsed = parse(LAST_LINE)
    assert parsed["Clip skip"] == "1"
    assert parsed["Schedule type"] == "Automatic"
    assert parsed["RNG"] == "GPU"
    assert parsed["Hires sampler"] == "Use same sampler"
    assert parsed["Hires CFG Scale"] == "7" and "Hires Distilled CFG Scale" not in parsed
    assert parse("Steps: 20, CFG scale: 1, Distilled CFG Scale: 4, Seed: 1")["Hires Distilled CFG Scale"] == "4"
    assert "Hires CFG Scale" not in infotext_utils.parse_generation_parameters("only a prompt")


def test_skipped_fields() -> None:
    assert "Seed" not in parse(LAST_LINE, skip_fields=["Seed"])


def test_skipped_fields_of_the_settings(app: Application) -> None:
    app.options.set("infotext_skip_pasting", ["CFG scale"])
    assert "CFG scale" not in parse(LAST_LINE)


@pytest.mark.parametrize(
    ("written", "sampler", "schedule"),
    [
        ("dpmpp_2m_sde_karras", "DPM++ 2M SDE", "Karras"),
        ("euler_ancestral", "Euler a", "Automatic"),
        ("dpmpp_2m sgm_uniform", "DPM++ 2M", "SGM Uniform"),
        ("DPM++ 2M Karras", "DPM++ 2M Karras", "Automatic"),
        ("Euler", "Euler", "Automatic"),
    ],
)
def test_other_programs_sampler_names(written: str, sampler: str, schedule: str) -> None:
    parsed = parse(f"Steps: 20, Sampler: {written}, Seed: 1, Size: 8x8")
    assert (parsed["Sampler"], parsed["Schedule type"]) == (sampler, schedule)


def test_comfy_saver_text() -> None:
    parsed = parse("Steps: 20, Sampler: euler, Schedule type: normal, CFG scale: 8.0, Seed: 3, Size: 512x512, Version: ComfyUI")
    assert (parsed["Sampler"], parsed["Schedule type"]) == ("Euler", "Normal")


def test_civitai_undefined_sampler_leaves_the_default() -> None:
    assert "Sampler" not in parse("Steps: 25, Sampler: Undefined, CFG scale: 3.5, Seed: 5, Size: 832x1216")


@pytest.mark.parametrize(
    ("first_pass", "size", "final"),
    [("640x384", ("640", "384"), ("1280", "768")), ("0x0", ("704", "448"), ("1280", "768"))],
)
def test_old_hires_sizes(first_pass: str, size: tuple[str, str], final: tuple[str, str]) -> None:
    parsed = parse(f"Steps: 20, Sampler: Euler, Seed: 1, Size: 1280x768, First pass size: {first_pass}")
    assert (parsed["Size-1"], parsed["Size-2"]) == size
    assert (parsed["Hires resize-1"], parsed["Hires resize-2"]) == final


def test_styles_are_found_in_the_prompt(app: Application) -> None:
    app.styles.styles["Oil"] = PromptStyle("Oil", "{prompt}, in oil", "photo")
    text = f"a cat, in oil\nNegative prompt: photo\n{LAST_LINE}"
    found = infotext_utils.parse_generation_parameters(text)
    assert (found["Prompt"], found["Negative prompt"], found["Styles array"]) == ("a cat", "", ["Oil"])
    app.options.set("infotext_styles", "Ignore")
    left = infotext_utils.parse_generation_parameters(text)
    assert left["Prompt"] == "a cat, in oil"
    assert "Styles array" not in left
    app.options.set("infotext_styles", "Discard")
    dropped = infotext_utils.parse_generation_parameters(text)
    assert dropped["Prompt"] == "a cat"
    assert "Styles array" not in dropped


def test_old_versions_change_meaning_unless_told_not_to(app: Application) -> None:
    line = LAST_LINE + ", Version: v1.5.0"
    assert parse(line, "[a:b:0.5]")["Old prompt editing timelines"] == "True"
    app.options.set("auto_backcompat", False)
    assert "Old prompt editing timelines" not in parse(line, "[a:b:0.5]")


def wanted(last_line: str, **arguments: Any) -> dict[str, Any]:
    return {setting: value for _, setting, value in infotext_utils.get_override_settings(parse(last_line), **arguments)}


def test_settings_that_differ_are_wanted(app: Application) -> None:
    changed = {"CLIP_stop_at_last_layers": 2, "eta_noise_seed_delta": 31337, "randn_source": "NV"}
    assert wanted(LAST_LINE + ", Clip skip: 2, ENSD: 31337, RNG: NV") == changed
    app.options.set("CLIP_stop_at_last_layers", 2)
    assert wanted(LAST_LINE + ", Clip skip: 2") == {}
    assert wanted(LAST_LINE) == {"CLIP_stop_at_last_layers": 1}
    assert wanted(LAST_LINE, skip_fields=["Clip skip"]) == {}
    assert wanted(LAST_LINE + ", Clip skip: many") == {}


def test_checkpoint_is_wanted_only_if_allowed_and_there(app: Application) -> None:
    first, second = list(app.checkpoints)
    app.options.set("sd_model_checkpoint", first.title)
    line = f"{LAST_LINE}, Model hash: {second.calculate_shorthash()}, Model: two"
    assert "sd_model_checkpoint" not in wanted(line)  # the default settings say so
    app.options.set("disable_weights_auto_swap", False)
    assert wanted(line)["sd_model_checkpoint"] == second.title
    assert "sd_model_checkpoint" not in wanted(f"{LAST_LINE}, Model hash: ffffffffff, Model: elsewhere")
    assert "sd_model_checkpoint" not in wanted(f"{LAST_LINE}, Model hash: {first.hash}")


def test_modules_by_their_stems(app: Application) -> None:
    [path] = [str(path) for path in app.additional_modules.files.values()]
    assert wanted(LAST_LINE + ", Module 1: kl, Module 2: missing")["forge_additional_modules"] == [path]


def test_override_texts_become_settings(app: Application) -> None:
    pairs = ["Clip skip: 2", "Emphasis: No norm", "nonsense", "Unknown key: 3", f"Module 1: ['{app.config.vae_dirs[0] / 'kl.safetensors'}']"]
    assert infotext_utils.create_override_settings_dict(pairs) == {
        "CLIP_stop_at_last_layers": 2,
        "emphasis": "No norm",
        "forge_additional_modules": [str(app.config.vae_dirs[0] / "kl.safetensors")],
    }


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    clip_skip=st.integers(1, 12),
    ensd=st.integers(0, 2**31),
    noise=st.sampled_from(["GPU", "CPU", "NV"]),
    emphasis=st.sampled_from(["Original", "No norm"]),
)
def test_settings_survive_a_round_trip(app: Application, clip_skip: int, ensd: int, noise: str, emphasis: str) -> None:
    params = {"Steps": 20, "Sampler": "Euler", "Seed": 1, "Clip skip": clip_skip, "ENSD": ensd, "RNG": noise, "Emphasis": emphasis}
    parsed = infotext_utils.parse_generation_parameters(build_infotext("a", "", params))
    pairs = [f"{key}: {value}" for key, _, value in infotext_utils.get_override_settings(parsed)]
    changed = {"CLIP_stop_at_last_layers": clip_skip, "eta_noise_seed_delta": ensd, "randn_source": noise, "emphasis": emphasis}
    expected = {key: value for key, value in changed.items() if value != app.options.get_default(key)}
    assert infotext_utils.create_override_settings_dict(pairs) == expected


def test_old_module_name() -> None:
    import modules.generation_parameters_copypaste as old  # the name extensions use

    assert old is infotext_utils or old.parse_generation_parameters is infotext_utils.parse_generation_parameters
    assert generation_parameters_copypaste.ParamBinding is infotext_utils.ParamBinding


def test_paste_field_is_a_pair() -> None:
    field = infotext_utils.PasteField("component", "Seed", api="seed")
    component, target = field
    assert (component, target, field.api, field.label, field.function) == ("component", "Seed", "seed", "Seed", None)


def test_fields_get_values_of_their_own_type() -> None:
    steps, cfg, hires, prompt = gr.Slider(1, 150, 20, step=1), gr.Number(7.5), gr.Checkbox(False), gr.Textbox("")
    fields = [(steps, "Steps"), (cfg, "CFG scale"), (hires, lambda params: "Denoising strength" in params), (prompt, "Prompt"), (prompt, "Missing")]
    updates = paste.field_updates(fields, f"a cat\n{LAST_LINE}, Denoising strength: 0.5")
    assert [update.get("value") for update in updates] == [20, 7.0, True, "a cat", None]


class ButtonOfTest:
    """Records what a click is connected to."""

    def __init__(self) -> None:
        self.clicks: list[dict[str, Any]] = []

    def click(self, **connection: Any) -> None:
        self.clicks.append(connection)


def test_buttons_are_connected_to_the_tabs_that_are_there() -> None:
    infotext_utils.reset()
    gallery, text, image, width, height, prompt = gr.Gallery(), gr.Textbox(), gr.Image(), gr.Number(), gr.Number(), gr.Textbox()
    buttons = {tab: ButtonOfTest() for tab in ("txt2img", "img2img", "elsewhere")}
    from_tab = ButtonOfTest()
    infotext_utils.add_paste_fields("txt2img", None, [(prompt, "Prompt")])
    infotext_utils.add_paste_fields("img2img", image, [(prompt, "Prompt"), (width, "Size-1"), (height, "Size-2")])
    infotext_utils.bind_buttons(buttons, gallery, text)
    infotext_utils.register_paste_params_button(infotext_utils.ParamBinding(from_tab, "img2img", source_tabname="txt2img"))
    infotext_utils.connect_paste_params_buttons()
    infotext_utils.reset()

    picture, parameters, switch = buttons["img2img"].clicks
    assert picture["outputs"] == [image, width, height]
    assert picture["fn"](Image.new("RGB", (24, 16)))[1:] == [24, 16]
    assert parameters["outputs"] == [prompt, width, height]
    assert [update["value"] for update in parameters["fn"](f"a cat\n{LAST_LINE}")] == ["a cat", 512, 768]
    assert switch["js"] == "switch_to_img2img"
    assert len(buttons["txt2img"].clicks) == 2
    assert buttons["elsewhere"].clicks == []
    assert from_tab.clicks[0]["fn"]("the prompt") == "the prompt"
    assert infotext_utils.registered_param_bindings == []
    assert list(infotext_utils.create_buttons(["a", "b"])) == ["a", "b"]


def test_pictures_from_values(app: Application, tmp_path: Path) -> None:
    image = Image.new("RGB", (24, 16), "red")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    outside, inside = tmp_path / "secret.png", app.config.outputs_dir / "a.png"
    inside.parent.mkdir(parents=True)
    image.save(outside)
    image.save(inside)
    for value in (image, [(image, "caption")], url, str(inside), f"{inside}?time=1", {"path": str(inside)}):
        found = infotext_utils.image_from_url_text(value)
        assert found is not None
        assert found.size == (24, 16)
    for value in (None, [], str(outside), "data:image/png;base64,xx", "data:image/png", {"path": None}, 7):
        assert infotext_utils.image_from_url_text(value) is None
    assert infotext_utils.send_image_and_dimensions(image) == (image, 24, 16)
    app.options.set("send_size", False)
    assert infotext_utils.send_image_and_dimensions(image)[0] is image
    assert infotext_utils.send_image_and_dimensions(image)[1] != 24


def test_png_info_tab() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a <b>cat</b>")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="PNG", pnginfo=info)
    _, text, html = extras.run_pnginfo(Image.open(buffer))
    assert text == "a <b>cat</b>"
    assert "a &lt;b&gt;cat&lt;/b&gt;" in html
    assert extras.run_pnginfo(None) == ("", "", "")
    assert "Nothing found" in extras.run_pnginfo(Image.new("RGB", (8, 8)))[2]
