from __future__ import annotations

import datetime
import hashlib
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modules.pictures.filename_tokens import FilenameGenerator, fit_filename, sanitize_filename_part, sanitize_folder

NOW = datetime.datetime(2024, 3, 9, 14, 5, 6)
IMAGE = Image.new("RGB", (640, 480), "red")


def processing(**changes: object) -> SimpleNamespace:
    fields = {
        "steps": 20,
        "cfg_scale": 7.5,
        "sampler_name": "DPM++ 2M",
        "scheduler": "Karras",
        "styles": ["Oil", "None", "a/b"],
        "all_seeds": [11, 12, 13],
        "batch_size": 2,
        "n_iter": 3,
        "iteration": 1,
        "batch_index": 1,
        "negative_prompt": "blurry",
        "denoising_strength": 0.6,
        "sd_model_name": "demo",
        "sd_model_hash": "abc123",
        "sd_vae_name": "kl.safetensors",
        "job_timestamp": "20240309140506",
        "user": "ann",
        "clip_skip": 2,
    }
    return SimpleNamespace(**fields | changes)


def generator(p: object = None, *, prompt: str = "a Cat, sitting: on <lora:x:1>", **arguments: object) -> FilenameGenerator:
    return FilenameGenerator(processing() if p is None else p, 12, prompt, IMAGE, basename="base", now=NOW, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("[basename]", "base"),
        ("[seed]-[seed_first]-[seed_last]", "12-11-13"),
        ("[steps] [cfg] [width]x[height]", "20 7.5 640x480"),
        ("[styles]", "Oil, a_b"),
        ("[sampler]|[scheduler]|[sampler_scheduler]", "DPM++ 2M|Karras|DPM++ 2M Karras"),
        ("[model_hash]-[model_name]", "abc123-demo"),
        ("[date]", "2024-03-09"),
        ("[datetime]", "20240309140506"),
        ("[datetime<%Y_%H>]", "2024_14"),
        ("[job_timestamp]", "20240309140506"),
        ("[prompt_hash]", hashlib.sha256(b"a Cat, sitting: on <lora:x:1>").hexdigest()[:8]),
        ("[prompt_hash<12>]", hashlib.sha256(b"a Cat, sitting: on <lora:x:1>").hexdigest()[:12]),
        ("[negative_prompt_hash<4>]", hashlib.sha256(b"blurry").hexdigest()[:4]),
        ("[full_prompt_hash]", hashlib.sha256(b"a Cat, sitting: on <lora:x:1> blurry").hexdigest()[:8]),
        ("[image_hash<6>]", hashlib.sha256(IMAGE.tobytes()).hexdigest()[:6]),
        ("[prompt]", "a_Cat,_sitting__on__lora_x_1_"),
        ("[prompt_spaces]", "a Cat, sitting_ on _lora_x_1_"),
        ("[prompt_words]", "a Cat sitting on lora x 1"),
        ("[batch_number]/[batch_size]/[generation_number]", "2/2/4"),
        ("[hasprompt<cat|dog><horse|none><bird>]", "catnone"),
        ("[clip_skip]-[denoising]", "2-0.6"),
        ("[user]", "ann"),
        ("[vae_filename]", "kl.safetensors"),
        ("x[none]y", "xy"),
        ("[unknown]-[seed]", "[unknown]-12"),
        ("[Seed]", "12"),
        ("no tokens", "no tokens"),
        ("[]", "[]"),
        ("", ""),
    ],
)
def test_tokens(pattern: str, name: str) -> None:
    assert generator().apply(pattern) == name


def test_time_zone() -> None:
    utc = datetime.datetime(2024, 3, 9, 23, 30, tzinfo=datetime.timezone.utc)
    tokens = FilenameGenerator(None, 1, "a", IMAGE, now=utc)
    assert tokens.apply("[datetime<%Y%m%d %H><Asia/Tokyo>]") == "20240310 08"
    assert tokens.apply("[datetime<%Y><Nowhere/At All>]") == "2024"


def test_style_prompts_are_taken_out() -> None:
    tokens = generator(prompt="a cat, oil painting", style_prompts=["{prompt}, oil painting", None])
    assert tokens.apply("[prompt_no_styles]") == "a cat"


def test_numbers_without_meaning_take_the_text_before_them_along() -> None:
    single = processing(batch_size=1, n_iter=1, all_seeds=[11], denoising_strength=None)
    assert generator(single).apply("a-[seed]-b[batch_number]-c[generation_number]-d[seed_last]-e[denoising]-z") == "a-12-z"
    assert generator(zip=True).apply("a[batch_number]") == ""


def test_without_a_processing_object_its_tokens_stay() -> None:
    tokens = FilenameGenerator(None, 5, "a", IMAGE, now=NOW)
    assert tokens.apply("[steps]-[seed]-[styles]-[model_name]") == "[steps]-5-[styles]-[model_name]"


def test_automatic_schedule_is_not_named() -> None:
    assert generator(processing(scheduler="Automatic")).apply("[sampler_scheduler]") == "DPM++ 2M"


def test_wrong_token_arguments_leave_the_token() -> None:
    assert generator().apply("[seed<1>]") == "[seed<1>]"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('a<b>:"/\\|?*#c', "a_b_________c"),
        ("line\nbreak\ttab\x00nul\x7f", "line_break_tab_nul_"),
        (" lead and trail. . ", "lead and trail"),
        ("x" * 200, "x" * 128),
        ("\ud800 lone surrogate", "_ lone surrogate"),
    ],
)
def test_sanitized_parts(text: str, part: str) -> None:
    assert sanitize_filename_part(text, replace_spaces=False) == part
    assert sanitize_filename_part(None) is None


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("2024-03-09", "2024-03-09"),
        ("a/b\\c", "a/b/c"),
        ("../../etc", "etc"),
        ("/etc/passwd", "etc/passwd"),
        ("C:\\Windows", "C_/Windows"),
        ("./..", ""),
        ("", ""),
        ("con", "_con"),
    ],
)
def test_folders_stay_below_their_root(text: str, folder: str) -> None:
    assert sanitize_folder(text) == folder


@given(st.text(max_size=400), st.sampled_from([".png", "-mask.jpeg"]))
def test_file_names_fit_every_file_system(stem: str, ending: str) -> None:
    name = fit_filename(stem, ending)
    assert len(name.encode("utf-8")) <= 255
    assert name.endswith(ending)
