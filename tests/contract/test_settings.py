"""No setting is silently ignored: some code reads it, or modules/settings/inert.py says what happens instead."""

from __future__ import annotations

import pytest

from modules.settings import inert
from modules.settings.inert import WHAT_IS_TRUE, find_inert
from modules.settings.table import build_option_table
from tools.unread_settings import find_unread, unread_settings


def test_every_setting_is_read_or_says_that_it_has_no_effect() -> None:
    silent = [key for key in unread_settings() if key not in WHAT_IS_TRUE]
    assert silent == [], "read these settings, or say in settings/inert.py what is true instead"


def test_what_is_said_to_have_no_effect_has_none() -> None:
    """An entry is removed when code starts to read the setting."""
    waiting = {key for keys in inert.NOT_READ.values() for key in keys.split()}
    assert sorted(waiting - set(unread_settings())) == [], "these are read now: take them out of NOT_READ in settings/inert.py"


def test_only_real_settings_are_named_each_once() -> None:
    waiting = [key for keys in inert.NOT_READ.values() for key in keys.split()]
    assert len(waiting) == len(set(waiting))
    assert not set(waiting) & set(inert.BY_DESIGN)
    assert set(WHAT_IS_TRUE) <= set(build_option_table({}))


def test_a_changed_setting_without_effect_is_said_with_the_truth() -> None:
    defaults = {key: info.default for key, info in build_option_table({}).items()}
    said = find_inert({**defaults, "temp_dir": "/t", "eta_ddim": 0.5}, defaults)
    assert said == ["temp_dir: '/t' has no effect; temporary pictures are in the system's temporary folder and are deleted at exit."]
    assert find_inert({**defaults, "temp_dir": "/t"}, defaults, keys=["eta_ddim"]) == []


@pytest.mark.parametrize(
    ("source", "unread"),
    [
        ("options.alpha_one", ["beta_two", "xl_t2i_other"]),
        ("options['beta_two']", ["alpha_one", "xl_t2i_other"]),
        ('options[f"alpha_{name}"]', ["beta_two", "xl_t2i_other"]),
        ('f"{a}_{b}"', ["alpha_one", "beta_two", "xl_t2i_other"]),
        ("", ["alpha_one", "beta_two", "xl_t2i_other"]),
    ],
)
def test_readers_are_found(source: str, unread: list[str]) -> None:
    assert find_unread(["alpha_one", "beta_two", "xl_t2i_other", "xl_t2i_width"], [source]) == unread
