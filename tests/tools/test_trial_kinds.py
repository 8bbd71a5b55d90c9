"""Forty kinds of extensions without a browser: each loads without a word in the log and does in a job what it is there for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from modules.application import Application
from modules.ui import tabs as ui
from tests.support.event_loops import close_event_loops as close_event_loops
from tests.support.extensions import write_extension
from tests.support.fleets import virtual_fleet
from tests.support.narrow_application import narrow_application
from tests.support.trial_extensions import KINDS, PICTURE
from tools.extension_trial import PageLess


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with narrow_application(tmp_path_factory.mktemp("kinds")) as (app, _):
        app.options.samples_save = app.options.grid_save = False
        yield app


@pytest.fixture(scope="module")
def pageless(app: Application) -> PageLess:
    return PageLess(app)


def test_there_are_at_least_thirty_kinds() -> None:
    assert len(KINDS) >= 30


@pytest.mark.parametrize("name", list(KINDS))
def test_a_kind_of_extension_loads_and_acts(app: Application, pageless: PageLess, name: str) -> None:
    kind = KINDS[name]
    folder = write_extension(app.config.extensions_dir, f"trial-{name}", kind.files)
    trial = pageless.try_extension(folder, num_slots=1)
    assert (trial.acts, trial.errors) == (kind.acts, [])
    assert trial.is_well


def test_a_page_with_every_kind_is_built(app: Application, pageless: PageLess) -> None:
    folders = [write_extension(app.config.extensions_dir, f"trial-{name}", kind.files) for name, kind in KINDS.items()]
    with pageless.loaded(folders):
        page = ui.create_ui(app)
    ids = {block.elem_id for block in page.blocks.values() if block.elem_id}
    assert {"tab_trial_canvas_tab", "tab_hello_tab"} <= ids


@pytest.mark.nightly
@pytest.mark.parametrize("plan", ["replicas", "layers"])
def test_every_kind_that_changes_pictures_makes_them_the_same_on_two_slots(
    tmp_path_factory: pytest.TempPathFactory, app: Application, plan: str
) -> None:
    def pictures(on: Application) -> dict[str, Any]:
        found = {}
        for name, kind in KINDS.items():
            if kind.acts == PICTURE:
                folder = write_extension(on.config.extensions_dir, f"trial-{name}", kind.files)
                found[name] = PageLess(on).pictures_with(folder)
        return found

    one = pictures(app)
    with virtual_fleet(2), narrow_application(tmp_path_factory.mktemp(plan)) as (other, _):
        other.options.samples_save = other.options.grid_save = False
        other.options.set("multi_gpu_strategy", plan)
        two = pictures(other)
    assert {name: max(abs(a - b).max() for a, b in zip(one[name], two[name], strict=True)) <= 2 for name in one} == dict.fromkeys(one, True)
