"""Settings that would break the program are rejected, and a broken settings file loses only its broken parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modules.api.limits import MAX_JSON_DEPTH
from modules.api.routes import parse_json
from modules.errors import OptionError
from modules.settings.options import OptionInfo, Options
from modules.settings.table import build_option_table


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def new_options() -> Options:
    table = build_option_table({})
    table.update(free=OptionInfo(None, "an extension's"), pairs=OptionInfo({}, "an extension's"), rows=OptionInfo([["a"]], "an extension's"))
    return Options(table)


BAD = [
    nested(900),
    nested(20),
    {"a": nested(30)},
    ["a", nested(2)],
    [{"a": 1}],
    "x\0",
    "\ud800",
    "x" * 100_001,
    ["x\ud800"],
    10**400,
    list(range(20_000)),
]
KEYS = ("sd_model_checkpoint", "upscaler_for_img2img", "xl_GPU_MB", "hidden_tabs", "samples_format", "outdir_save", "img_max_size_mp", "free")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("number", range(len(BAD)))
def test_values_that_are_no_setting_are_refused(key: str, number: int) -> None:
    options = new_options()
    for change in (lambda value: options.set(key, value), lambda value: options.snapshot({key: value})):
        if key == "free" and number == 3:
            continue  # an extension's setting without a type
        with pytest.raises(OptionError, match=key):
            change(BAD[number])
    assert json.loads(options.dumpjson())[key] == options.get_default(key)


def test_values_without_a_default_have_the_kind_of_their_control() -> None:
    options = new_options()
    for key, value, kept in (
        ("xl_GPU_MB", "2048", 2048),
        ("sd_model_checkpoint", "a.ckpt", "a.ckpt"),
        ("upscaler_for_img2img", 4, "4"),
        ("free", 3, 3),
    ):
        options.set(key, value)
        assert options.data[key] == kept
    for key, value in (("xl_GPU_MB", "much"), ("sd_model_checkpoint", {"a": 1}), ("hidden_tabs", "Extras"), ("pairs", [1]), ("hidden_tabs", [["x"]])):
        with pytest.raises(OptionError, match=key):
            options.set(key, value)
    options.set("rows", [["b"]])
    assert options.data["rows"] == [["b"]]


SOUND = '"eta_ancestral": 0.5'
DAMAGED = {
    "nested in a setting": ('{"hidden_tabs": ' + "[" * 100_000 + "]" * 100_000 + f", {SOUND}}}", "hidden_tabs"),
    "nested in an unknown one": ('{"x": ' + '{"a":' * 900 + "1" + "}" * 900 + f", {SOUND}}}", "x"),
    "of another type": ('{"samples_save": [1], ' + SOUND + "}", "samples_save"),
    "not JSON": ('{"samples_save": tru, ' + SOUND + "}", "samples_save"),
    "cut off": ("{" + SOUND + ', "jpeg_quality": 5', "ends early"),
    "not finite": ('{"jpeg_quality": NaN, ' + SOUND + "}", "jpeg_quality"),
    "out of limits": ('{"jpeg_quality": 1000, ' + SOUND + "}", "jpeg_quality"),
    "half a character": ('{"font": "\\ud800", ' + SOUND + "}", "font"),
    "digits": ('{"jpeg_quality": ' + "9" * 5000 + ", " + SOUND + "}", "jpeg_quality"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_loses_only_what_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    text, named = DAMAGED[kind]
    file = tmp_path / "config.json"
    file.write_text(text, encoding="utf8")
    for _ in range(2):
        caplog.clear()
        options = new_options()
        options.load(file)
        assert options.eta_ancestral == 0.5
        assert len(caplog.records) == 1 and named in caplog.text
        json.loads(options.dumpjson())
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["config.json", "config.json.unreadable"]
    assert (tmp_path / "config.json.unreadable").read_text(encoding="utf8") == text
    options.save(file)
    caplog.clear()
    new_options().load(file)
    assert caplog.text == ""


def test_bytes_that_are_not_utf8_cost_their_key_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b'\xef\xbb\xbf{"font": "caf\xe9", "eta_ancestral": 0.5}')
    options = new_options()
    options.load(file)
    assert (options.font, options.eta_ancestral) == ("", 0.5)
    assert "'font'" in caplog.text and len(caplog.records) == 1


def test_a_mark_of_the_byte_order_is_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b'\xef\xbb\xbf{"eta_ancestral": 0.5}')
    options = new_options()
    options.load(file)
    assert options.eta_ancestral == 0.5 and caplog.text == ""


def test_a_folder_in_its_place_is_moved_aside_and_settings_can_be_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "config.json"
    file.mkdir()
    (file / "mine").write_text("mine")
    options = new_options()
    options.load(file)
    options.save(file)
    assert file.is_file() and (tmp_path / "config.json.unreadable" / "mine").read_text() == "mine"
    assert "is not a file" in caplog.text


def test_every_copy_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for text in ("{1", "{2", "{1"):
        file.write_text(text)
        new_options().load(file)
    assert {path.name: path.read_text() for path in tmp_path.glob("*.unreadable*")} == {
        "config.json.unreadable": "{1",
        "config.json.unreadable-1": "{2",
    }


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [MAX_JSON_DEPTH + 1, 254, 900, 100_000])
def test_bodies_nested_too_deep_are_refused(opening: str, depth: int) -> None:
    closing = "]" if opening == "[" else "}"
    inner = opening * depth + "1" + closing * depth
    for name in ("comments", "script_args", "override_settings", "alwayson_scripts"):
        with pytest.raises(json.JSONDecodeError, match="nested"):
            parse_json(f'{{"{name}": {inner}}}'.encode())
    assert parse_json(b'{"a": {"b": [[{"c": [1]}]]}}') == {"a": {"b": [[{"c": [1]}]]}}
