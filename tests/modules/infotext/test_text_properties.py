"""Infotexts of generated parameters: everything the product writes is read back unchanged, and written again."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.infotext.stealth import add_stealth_infotext, read_info_from_image_stealth
from modules.infotext.text import (
    LEADING_KEYS,
    PAIRED_KEYS,
    TRAILING_KEYS,
    build_infotext,
    build_parameters_line,
    iterate_pairs,
    parse_infotext,
    quote,
    unquote,
)
from modules.pictures.metadata import read_info_from_image, user_comment_exif
from modules.settings.table import build_option_table

TEXT_KEYS = (
    "Sampler", "Schedule type", "Face restoration", "Model hash", "Model", "Init image hash", "Version", "User", "Diffusion in Low Bits", "Module 1",
    "Module 12", "Hires upscaler", "Hires sampler", "Hires schedule type", "Hires checkpoint", "Hires Module 1", "Hires prompt",
    "Hires negative prompt", "Hires refiner", "Mask mode", "Masked content", "Inpaint area", "Refiner", "Lora hashes", "TI hashes", "TI", "Hypernet",
    "Emphasis", "VAE Encoder", "VAE Decoder", "Noise Schedule", "UniPC variant", "UniPC skip type", "Script", "ControlNet 0",
    "Postprocess upscale by", "Postprocess upscaler", "X Values", "Y Type", "Civitai resources",
)  # fmt: skip
NUMBER_KEYS = (
    "Steps", "CFG scale", "Distilled CFG Scale", "Image CFG scale", "Seed", "Variation seed", "Variation seed strength", "Denoising strength",
    "Conditional mask weight", "Clip skip", "ENSD", "Token merging ratio", "Token merging ratio hr", "Hires upscale", "Hires steps",
    "Hires CFG Scale",
    "Hires Distilled CFG Scale", "Mask blur", "Masked area padding", "Noise multiplier", "Extra noise", "Refiner switch at", "NGMS", "Skip Early CFG",
    "Skip Late CFG",
    "Schedule min sigma", "Schedule max sigma", "Schedule rho", "Beta schedule alpha", "Beta schedule beta", "Eta", "Eta DDIM", "Sigma churn",
    "Sigma tmin", "Sigma tmax", "Sigma noise", "UniPC order", "Shift",
)  # fmt: skip
FLAG_KEYS = (
    "Tiling", "NGMS all steps", "Pad conds", "Discard penultimate sigma", "SGM noise multiplier", "UniPC lower order final",
    "Downcast alphas_cumprod", "Shift by size", "Forge flow schedules", "SD3 T5",
    "Refiner switch by sampling steps",
)  # fmt: skip
RESERVED = {"Prompt", "Negative prompt"}

CHARACTERS = st.characters(codec="utf-8", exclude_characters="\0")
AWKWARD = st.sampled_from([
    'say "yes"', "a, b", "a: b", "one\ntwo", "\r\n", '"', '""', '"open', "back\\slash", '\\"', "[1, 2]", "{}", '{"a": [1, {"b": "c, d"}]}',
    "Steps: 3, Seed: 4",
    "Negative prompt: x", "漢字, ü: é", "🎨", "\u2028line", "\x0bv", " padded ", "", "None", "True", "x", "3 x 4", "<lora:a:0.5>", "a:1,b:2,c:3",
])  # fmt: skip
VALUES = (st.text(CHARACTERS, max_size=40) | AWKWARD | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(CHARACTERS, max_size=8), lambda part: st.lists(part, max_size=3), max_leaves=6
).map(lambda value: json.dumps(value, ensure_ascii=False))).filter(lambda value: not re.fullmatch(r"\d+x\d+", value))  # fmt: skip
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
SIZES = st.tuples(st.integers(0, 16384), st.integers(0, 16384)).map(lambda size: f"{size[0]}x{size[1]}")
PROMPTS = (st.text(CHARACTERS.filter(lambda char: char != "\r"), max_size=80) | AWKWARD.map(lambda text: text.replace("\r", ""))).filter(
    lambda text: "Negative prompt:" not in text
)


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Possible parameters of a picture: always the first three, any of the rest."""
    chosen: dict[str, Any] = {
        "Steps": draw(st.integers(1, 150)),
        "Sampler": draw(st.sampled_from(["Euler a", "DPM++ 2M"])),
        "Seed": draw(st.integers(0, 2**64)),
    }
    chosen |= draw(st.dictionaries(st.sampled_from(TEXT_KEYS[1:]), VALUES, max_size=8))
    chosen |= draw(st.dictionaries(st.sampled_from(NUMBER_KEYS[1:]), NUMBERS, max_size=8))
    chosen |= draw(st.dictionaries(st.sampled_from(FLAG_KEYS), st.booleans(), max_size=3))
    chosen |= draw(st.dictionaries(st.sampled_from(PAIRED_KEYS), SIZES, max_size=3))
    return {key: value for key, value in chosen.items() if key != str(value)}


def read_as(params: dict[str, Any]) -> dict[str, str]:
    """The dict that a parser must return: every value as text, sizes as two keys."""
    expected: dict[str, str] = {}
    for key, value in params.items():
        size = re.fullmatch(r"(\d+)x(\d+)", str(value))
        expected |= {f"{key}-1": size[1], f"{key}-2": size[2]} if size else {key: str(value)}
    return expected


@given(prompt=PROMPTS, negative=PROMPTS, params=parameters())
def test_everything_written_is_read_and_written_again(prompt: str, negative: str, params: dict[str, Any]) -> None:
    text = build_infotext(prompt, negative, params)
    parsed = parse_infotext(text)
    assert {key: value for key, value in parsed.items() if key not in RESERVED} == read_as(params)
    assert (parsed["Prompt"], parsed["Negative prompt"]) == (prompt.strip(), negative.strip())
    again = {key: value for key, value in parsed.items() if key not in RESERVED}
    assert parse_infotext(build_infotext(parsed["Prompt"], parsed["Negative prompt"], again)) == parsed
    assert sorted(iterate_pairs(build_parameters_line(again))) == sorted(iterate_pairs(build_parameters_line(params)))


@given(VALUES)
def test_a_value_stays_one_value_between_others(value: str) -> None:
    line = f"Steps: 1, Key: {quote(value)}, Seed: 2"
    assert list(iterate_pairs(line)) == [("Steps", "1"), ("Key", value), ("Seed", "2")]
    assert unquote(quote(value)) == value


@given(st.text(CHARACTERS, max_size=300))
def test_any_text_is_read_without_an_error_and_its_reading_is_stable(text: str) -> None:
    parsed = parse_infotext(text)
    assert set(parsed) >= RESERVED
    assert all(isinstance(value, str) for value in parsed.values())


def test_no_key_of_the_product_is_missing_here() -> None:
    """Keys at a fixed position, and those from which settings are pasted."""
    known = {*TEXT_KEYS, *NUMBER_KEYS, *FLAG_KEYS, *PAIRED_KEYS}
    from_settings = {info.infotext for info in build_option_table({}).values() if getattr(info, "infotext", None)}
    only_read = {"FP8 weight", "Cache FP16 weight for LoRA", "RNG", "Hires fix old size", "Old prompt editing timelines", "Pad conds v0", "VAE"}
    assert {*LEADING_KEYS, *TRAILING_KEYS} - only_read <= known
    assert from_settings - only_read <= known
    key = re.compile(r"\w[\w \-/]+")
    assert all(key.fullmatch(name) for name in known | only_read)


@given(prompt=PROMPTS, params=parameters())
def test_exif_and_the_hidden_text_carry_it_unchanged(prompt: str, params: dict[str, Any]) -> None:
    import io

    from PIL import Image

    text = build_infotext(prompt, "", params)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="JPEG", exif=user_comment_exif(text))
    assert read_info_from_image(Image.open(io.BytesIO(buffer.getvalue())))[0] == text
    hidden = add_stealth_infotext(Image.new("RGB", (128, 128)), text, "Alpha")
    assert read_info_from_image_stealth(hidden) == text


# Texts as written by other programs and versions


FOREIGN = {
    "A1111 1.10 with scripts and networks": (
        'a "quoted" cat, <lora:detail:0.7>\nNegative prompt: (worst quality:1.4), EasyNegative\n'
        'Steps: 25, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 7, Seed: 3711241234, Size: 512x768, Model hash: 6ce0161689, '
        'Model: v1-5-pruned-emaonly, VAE hash: 735e4c3a44, VAE: vae-ft-mse.safetensors, Denoising strength: 0.45, Clip skip: 2, '
        'ADetailer model: face_yolov8n.pt, ADetailer confidence: 0.3, Hires upscale: 2, Hires steps: 15, Hires upscaler: 4x-UltraSharp, '
        'Lora hashes: "detail: 1a2b3c4d5e6f", TI hashes: "EasyNegative: c74b4e810b03", Script: X/Y/Z plot, X Type: Seed, X Values: "1-3, 7", '
        'Fixed X Values: "1, 2, 3, 7", Version: v1.10.1',
        {"Sampler": "DPM++ 2M SDE", "Schedule type": "Karras", "X Values": "1-3, 7", "TI hashes": "EasyNegative: c74b4e810b03", "Size-2": "768"},
    ),
    "A1111 1.4, schedule in the sampler's name": (
        "castle\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 1, Size: 512x512, Model hash: 81761151, Model: sd-v1-4, ENSD: 31337",
        {"Sampler": "DPM++ 2M Karras", "ENSD": "31337", "CFG scale": "7.5"},
    ),
    "A1111 before 1.0, no model name": (
        "castle\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model hash: 7460a6fa, First pass size: 0x0, Denoising "
        "strength: 0.7",
        {"First pass size-1": "0", "Model hash": "7460a6fa"},
    ),
    "Forge with modules and low bits": (
        "a cat holding a sign\nSteps: 20, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 5, Size: 896x1152, "
        "Model hash: 275ef623d3, Model: flux1-dev-fp8, Version: f2.0.1v1.10.1-previous-501-g668e87f92, Diffusion in Low Bits: bnb-nf4 (fp16 LoRA), "
        "Module 1: ae, Module 2: clip_l, Module 3: t5xxl_fp16",
        {"Distilled CFG Scale": "3.5", "Module 3": "t5xxl_fp16", "Diffusion in Low Bits": "bnb-nf4 (fp16 LoRA)"},
    ),
    "Forge ControlNet": (
        'a room\nSteps: 20, Sampler: Euler a, Seed: 9, Size: 512x512, ControlNet 0: "Module: canny, Model: control_v11p_sd15_canny '
        '[d14c016b], Weight: 1, '
        'Resize Mode: Crop and Resize, Processor Res: 512, Threshold A: 100, Threshold B: 200, Guidance Start: 0, Guidance End: 1, Pixel '
        'Perfect: True, '
        'Control Mode: Balanced", Version: f1.0.0v1.9.4',
        {"Seed": "9", "Version": "f1.0.0v1.9.4"},
    ),
    "a multi-line prompt that has colons and numbers": (
        "scene: night, time: 12:30\nratio 16:9, iso: 200, f: 2.8\nNegative prompt: day: no\nSteps: 20, Sampler: Euler, Seed: 1, Size: 64x64",
        {"Prompt": "scene: night, time: 12:30\nratio 16:9, iso: 200, f: 2.8", "Negative prompt": "day: no"},
    ),
    "an image site's copy, with its resources": (
        'cat\nNegative prompt: dog\nSteps: 30, Sampler: Euler a, CFG scale: 5, Seed: 2, Size: 832x1216, Clip skip: 2, Created Date: '
        '2024-05-01T10:11:12.131Z, '
        'Civitai resources: [{"type":"checkpoint","modelVersionId":290640,"modelName":"Pony, V6","modelVersionName":"v6: start"}], Civitai '
        'metadata: {}',
        {"Civitai metadata": "{}", "Clip skip": "2", "Size-1": "832"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_texts_of_other_programs_and_versions(name: str) -> None:
    text, expected = FOREIGN[name]
    parsed = parse_infotext(text)
    assert {key: parsed.get(key) for key in expected} == expected
    assert (
        parse_infotext(build_infotext(parsed["Prompt"], parsed["Negative prompt"], {k: v for k, v in parsed.items() if k not in RESERVED})) == parsed
    )
