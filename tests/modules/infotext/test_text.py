from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.infotext.text import LEADING_KEYS, build_infotext, build_parameters_line, has_parameters, iterate_pairs, parse_infotext, quote, unquote

PARAMS = {
    "Steps": 20,
    "Sampler": "Euler a",
    "Schedule type": "Automatic",
    "CFG scale": 7,
    "Seed": 1234,
    "Size": "512x768",
    "Model hash": "6ce0161689",
}

# The text that A1111 1.10 writes for a hires picture, as users paste it.
A1111_TEXT = """masterpiece, (a cat:1.2), [sitting|standing]
on a mat
Negative prompt: blurry,
low quality
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: 6ce0161689, \
Model: v1-5-pruned-emaonly, Denoising strength: 0.7, Clip skip: 2, Hires upscale: 2, Hires steps: 10, Hires upscaler: Latent, \
Hires prompt: "a cat, bigger", Lora hashes: "one: 123, two: 456", Version: v1.10.1"""


def test_text_of_one_picture_has_the_three_parts_in_order() -> None:
    text = build_infotext("a cat\non a mat", "blurry", PARAMS)
    assert text == (
        "a cat\non a mat\nNegative prompt: blurry\n"
        "Steps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 1234, Size: 512x768, Model hash: 6ce0161689"
    )


def test_no_negative_prompt_no_line() -> None:
    assert "Negative prompt" not in build_infotext("a", "", PARAMS)


def test_keys_stand_in_the_known_order_extras_in_between_and_modules_last() -> None:
    given_order = {"Module 1": "ae", "Version": "v1", "Lora hashes": "a", "Seed": 1, "Steps": 2, "TI": "b", "Tiling": True}
    keys = [pair.split(":")[0] for pair in build_parameters_line(given_order).split(", ")]
    assert keys == ["Steps", "Seed", "Tiling", "Lora hashes", "TI", "Version", "Module 1"]
    assert LEADING_KEYS[0] == "Steps"


def test_none_is_left_out_and_a_key_equal_to_its_value_prints_once() -> None:
    assert build_parameters_line({"Steps": 1, "Extra": None, "Tiled": "Tiled"}) == "Steps: 1, Tiled"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain words", "plain words"),
        ("a, b", '"a, b"'),
        ("a: b", '"a: b"'),
        ("two\nlines", '"two\\nlines"'),
        ("ü, 漢", '"ü, 漢"'),
        (7.0, "7.0"),
        ('"quoted"', '"\\"quoted\\""'),
        (" outer ", '" outer "'),
    ],
)
def test_quoting(value: object, text: str) -> None:
    assert quote(value) == text
    assert unquote(text) == str(value)


def test_unquote_leaves_broken_quotes() -> None:
    assert unquote('"broken') == '"broken'
    assert unquote('"bad \\x"') == '"bad \\x"'


def test_a1111_text() -> None:
    parsed = parse_infotext(A1111_TEXT)
    assert parsed["Prompt"] == "masterpiece, (a cat:1.2), [sitting|standing]\non a mat"
    assert parsed["Negative prompt"] == "blurry,\nlow quality"
    assert parsed["Sampler"] == "DPM++ 2M"
    assert (parsed["Size-1"], parsed["Size-2"]) == ("512", "768")
    assert parsed["Hires prompt"] == "a cat, bigger"
    assert parsed["Lora hashes"] == "one: 123, two: 456"
    assert parsed["Version"] == "v1.10.1"


def test_fewer_than_three_pairs_are_prompt() -> None:
    parsed = parse_infotext("a picture\nmood: dark, time: night")
    assert parsed == {"Prompt": "a picture\nmood: dark, time: night", "Negative prompt": ""}
    assert not has_parameters("a picture")
    assert has_parameters(A1111_TEXT)


def test_lines_behind_the_parameters_do_not_hide_them() -> None:
    parsed = parse_infotext("a cat\nSteps: 20, Sampler: Euler, Seed: 3, Size: 64x64\nTemplate: a {cat|dog}")
    assert parsed["Prompt"] == "a cat"
    assert parsed["Seed"] == "3"


@pytest.mark.parametrize(
    "prompt",
    [
        "(tag:1.2), (other tag:1.3), (third:0.8)",
        "a fox\n(red, tag:1.2), (fine, other:1.3), [a, b:c:0.5], {d, e: f}",
        "a <lora:one:1>, <lora:two:0.5>, <lora:three:1>",
        "((deep, tag: 1.1), more: 1.2), (third, one: 1.3), (fourth, one: 1.3)",
    ],
)
def test_weights_in_brackets_are_no_parameters(prompt: str) -> None:
    assert parse_infotext(prompt) == {"Prompt": prompt, "Negative prompt": ""}
    both = parse_infotext(f"{prompt}\nNegative prompt: {prompt}")
    assert both == {"Prompt": prompt, "Negative prompt": prompt}
    assert parse_infotext(f"{prompt}\nSteps: 20, Sampler: Euler, Seed: 3")["Prompt"] == prompt


def test_parameters_with_brackets_in_values_or_without_blanks_stay_parameters() -> None:
    assert parse_infotext("a\nSteps: 20, Model: odd (name, Seed: 3, Size: 64x64")["Seed"] == "3"
    assert parse_infotext("a\nSteps:20,Sampler:Euler,Seed:3")["Sampler"] == "Euler"


@pytest.mark.parametrize("template", ["(a:1.2), (b:1.3), (c:1.1)", "mood: dark, time: night, place: home", "one\nSampler: x, two: y, three: z"])
def test_templates_behind_the_parameters_eat_nothing(template: str) -> None:
    parsed = parse_infotext(
        f"a cat\nNegative prompt: bad\nSteps: 20, Sampler: Euler, Seed: 3, Size: 64x32\nTemplate: {template}\nNegative Template: {template}"
    )
    assert {key: parsed.get(key) for key in ("Prompt", "Negative prompt", "Steps", "Seed", "Size-1", "Size-2", "Sampler")} == {
        "Prompt": "a cat",
        "Negative prompt": "bad",
        "Steps": "20",
        "Seed": "3",
        "Size-1": "64",
        "Size-2": "32",
        "Sampler": "Euler",
    }


def test_empty_text() -> None:
    assert parse_infotext("") == {"Prompt": "", "Negative prompt": ""}


def test_windows_line_ends() -> None:
    parsed = parse_infotext(A1111_TEXT.replace("\n", "\r\n"))
    assert parsed == parse_infotext(A1111_TEXT)


def test_civitai_lists_are_one_value() -> None:
    resources = '[{"type":"checkpoint","modelVersionId":128713,"modelName":"A, B"}]'
    pairs = dict(iterate_pairs(f"Steps: 25, Sampler: Euler a, Seed: 5, Civitai resources: {resources}, Civitai metadata: {{}}"))
    assert json.loads(pairs["Civitai resources"])[0]["modelName"] == "A, B"
    assert pairs["Civitai metadata"] == "{}"


def _reference_pairs(line: str) -> list[tuple[str, str]]:
    """The pairs found by the regular expression that A1111 tools use (slow for hostile text)."""
    pattern = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    return [(key, unquote(value)) for key, value in pattern.findall(line)]


@given(st.lists(st.tuples(st.sampled_from(["Steps", "Lora hashes", "CFG scale", "a/b", "x-y"]), st.text('ab,: "\\1x', max_size=12)), max_size=6))
def test_pairs_equal_those_of_the_known_pattern(pairs: list[tuple[str, str]]) -> None:
    line = ", ".join(f"{key}: {quote(value)}" for key, value in pairs)
    assert list(iterate_pairs(line)) == _reference_pairs(line)


KEYS = st.from_regex(r"[A-Za-z][A-Za-z0-9 /\-]{1,18}[A-Za-z0-9]", fullmatch=True)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=60)
PROMPTS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=80).filter(lambda text: "Negative prompt:" not in text)


@given(prompt=PROMPTS, negative=PROMPTS, extra=st.dictionaries(KEYS, TEXT, max_size=6), width=st.integers(8, 4096), seed=st.integers(0, 2**63 - 1))
def test_round_trip(prompt: str, negative: str, extra: dict[str, str], width: int, seed: int) -> None:
    extra = {
        key: value
        for key, value in extra.items()
        if key not in ("Prompt", "Negative prompt") and key != value and not re.fullmatch(r"\d+x\d+", value)
    }
    params = {"Steps": "20", "Sampler": "Euler a", "CFG scale": "7.5", "Seed": str(seed), "Size": f"{width}x512", **extra}
    parsed = parse_infotext(build_infotext(prompt, negative, params))
    expected = {key: value for key, value in params.items() if key != "Size"}
    if "Size" in params and re.fullmatch(r"\d+x\d+", params["Size"]):
        first, second = params["Size"].split("x")
        expected |= {"Size-1": first, "Size-2": second}
    assert parsed == {"Prompt": prompt.strip(), "Negative prompt": negative.strip(), **expected}
    assert parse_infotext(build_infotext(parsed.pop("Prompt"), parsed.pop("Negative prompt"), parsed)) == {
        "Prompt": prompt.strip(),
        "Negative prompt": negative.strip(),
        **expected,
    }
