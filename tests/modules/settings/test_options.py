from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from modules.errors import OptionError
from modules.settings.options import OptionInfo, Options, OptionsSnapshot, options_section
from modules.settings.table import build_option_table, restricted_opts


def make_options(**kwargs: object) -> Options:
    return Options(build_option_table({}), **kwargs)  # type: ignore[arg-type]


def test_defaults_of_the_contract() -> None:
    options = make_options()
    expected = {
        "samples_format": "png",
        "CLIP_stop_at_last_layers": 1,
        "randn_source": "GPU",
        "emphasis": "Original",
        "sd_model_checkpoint": None,
        "forge_additional_modules": [],
        "forge_inference_memory": 1024,
        "eta_ancestral": 1.0,
        "show_progress_type": "Approx NN",
        "n_rows": -1,
        "xl_t2i_sampler": "DPM++ 2M SDE",
        "tabs_without_quick_settings_bar": ["Spaces"],
        "keyedit_delimiters": ".,\\/!?%^*;:{}=`~() ",
        "control_net_unit_count": 3,
    }
    assert {key: getattr(options, key) for key in expected} == expected


def test_every_option_has_a_label_and_a_section() -> None:
    assert all(info.label and info.section for info in build_option_table({}).values())


@pytest.mark.parametrize(
    ("key", "value", "stored"),
    [
        ("samples_save", "false", False),
        ("samples_save", 1, True),
        ("jpeg_quality", "90", 90),
        ("eta_ancestral", 1, 1.0),
        ("sd_t2i_cfg", 5.5, 5.5),
        ("samples_format", "jpg", "jpg"),
        ("hidden_tabs", ("a", "b"), ["a", "b"]),
        ("eta_ancestral", None, 1.0),
    ],
)
def test_values_are_cast_to_the_type_of_the_default(key: str, value: object, stored: object) -> None:
    options = make_options()
    options.set(key, value)
    assert options.data[key] == stored
    assert type(options.data[key]) is type(stored)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("samples_save", "maybe", "true or false"),
        ("jpeg_quality", "high", "a number"),
        ("jpeg_quality", 1000, "outside 1..100"),
        ("eta_ancestral", math.nan, "finite"),
        ("eta_ancestral", [1], "a number"),
        ("samples_format", "exe", "'png'"),
        ("samples_format", {}, "a text"),
        ("hidden_tabs", "one", "a list"),
        ("CLIP_stop_at_last_layers", 0, "outside 1..12"),
        ("no_such_setting", 1, "no setting"),
    ],
)
def test_wrong_values_are_refused_and_change_nothing(key: str, value: object, said: str) -> None:
    options = make_options()
    before = dict(options.data)
    with pytest.raises(OptionError, match=said):
        options.set(key, value)
    assert options.data == before


def test_saved_settings_come_back_and_unknown_keys_survive(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"from_an_extension": {"a": [1]}, "jpeg_quality": 55}), encoding="utf8")
    options = make_options()
    options.load(path)
    options.samples_format = "webp"
    options.save(path)
    saved = json.loads(path.read_text(encoding="utf8"))
    assert (saved["from_an_extension"], saved["jpeg_quality"], saved["samples_format"]) == ({"a": [1]}, 55, "webp")
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_a_crash_while_saving_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    options = make_options()
    options.save(path)
    before = path.read_bytes()

    def fail(_handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("modules.settings.options.os.fsync", fail)
    options.jpeg_quality = 1
    with pytest.raises(OSError, match="disk full"):
        options.save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_an_unreadable_file_is_kept_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "config.json"
    path.write_text("{not json", encoding="utf8")
    options = make_options()
    options.load(path)
    assert options.samples_format == "png"
    assert (tmp_path / "config.json.unreadable").read_text(encoding="utf8") == "{not json"
    assert "cannot be read" in caplog.text


def test_a_wrong_value_in_the_file_falls_back_to_its_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"jpeg_quality": "loud"}), encoding="utf8")
    options = make_options()
    options.load(path)
    assert options.jpeg_quality == 80
    assert "jpeg_quality" in caplog.text


def test_a_setting_that_an_extension_adds_takes_its_saved_value(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"my_setting": 7}), encoding="utf8")
    options = make_options()
    options.load(path)
    options.add_option("my_setting", OptionInfo(1, "Mine", section=("mine", "Mine")))
    options.add_option("my_other", OptionInfo(2, "Other", section=("mine", "Mine")))
    assert (options.my_setting, options.my_other) == (7, 2)


def test_callbacks_run_on_change_and_undo_when_they_fail() -> None:
    options = make_options()
    calls: list[str] = []
    options.onchange("samples_format", lambda: calls.append(options.samples_format), call=False)
    assert options.set("samples_format", "jpg") is True
    assert options.set("samples_format", "jpg") is False
    assert calls == ["jpg"]

    def refuse() -> None:
        raise RuntimeError("no")

    options.onchange("samples_format", refuse, call=False)
    with pytest.raises(RuntimeError):
        options.set("samples_format", "webp")
    assert options.samples_format == "jpg"


def test_frozen_and_restricted_settings_cannot_be_changed() -> None:
    frozen = Options(build_option_table({}), frozen_keys=frozenset(build_option_table({})))
    with pytest.raises(OptionError, match="--freeze-settings"):
        frozen.samples_format = "jpg"
    restricted = Options(build_option_table({}), restricted_opts)
    with pytest.raises(OptionError, match="--hide-ui-dir-config"):
        restricted.set("outdir_samples", "/elsewhere")


def test_settings_closed_to_the_api_are_left_alone() -> None:
    options = make_options()
    assert options.set("api_forbid_local_requests", False, is_api=True) is False
    assert options.api_forbid_local_requests is True


def test_a_snapshot_does_not_follow_later_changes() -> None:
    options = make_options()
    snapshot = options.snapshot({"jpeg_quality": "33", "unknown_thing": 1})
    options.jpeg_quality = 10
    options.samples_format = "webp"
    assert (snapshot.jpeg_quality, snapshot["samples_format"]) == (33, "png")
    assert "unknown_thing" not in snapshot
    assert options.jpeg_quality == 10


def test_a_snapshot_cannot_be_written() -> None:
    snapshot = make_options().snapshot()
    with pytest.raises(AttributeError, match="override_settings"):
        snapshot.samples_format = "jpg"
    with pytest.raises(AttributeError, match="no setting"):
        _ = snapshot.nonsense


def test_overrides_of_the_wrong_type_are_refused() -> None:
    with pytest.raises(OptionError, match="jpeg_quality"):
        make_options().snapshot().with_overrides({"jpeg_quality": "loud"})


def test_a_snapshot_lists_all_settings() -> None:
    options = make_options()
    snapshot = options.snapshot()
    assert isinstance(snapshot, OptionsSnapshot)
    assert dict(snapshot) == options.data


def test_sections_and_order() -> None:
    table = options_section(("x", "X", "ui"), {"a": OptionInfo(1, "a")}) | options_section((None, "hidden"), {"b": OptionInfo(1, "b")})
    table |= options_section(("y", "Y"), {"c": OptionInfo(1, "c")}) | options_section(("x", "X"), {"d": OptionInfo(1, "d")})
    options = Options(table)
    options.reorder()
    assert list(options.data_labels) == ["a", "d", "c", "b"]
    assert json.loads(options.dumpjson())["_categories"] == [["ui", "X"]]


def test_chained_descriptions() -> None:
    info = OptionInfo(1, "a").info("why").link("docs", "http://x").js("b", "f").html("<i>").needs_restart().needs_reload_ui()
    assert "why" in info.comment_after
    assert "http://x" in info.comment_before
