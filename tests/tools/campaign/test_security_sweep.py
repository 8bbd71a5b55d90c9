"""Short version of the security sweep: every handler of the real page, with one forbidden picture and one forbidden text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from gradio.utils import get_upload_folder

from tools.campaign.security_pages import PageSweep
from tools.campaign.security_server import RunningServer, running_server
from tools.campaign.security_sweep import RouteSweep


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    # as with --share: not everyone who reaches the page is its owner
    with running_server(tmp_path_factory.mktemp("sweep"), share=True, disable_extension_access=True, api_server_stop=True) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.address, timeout=60) as client:
        yield client


def test_no_handler_of_the_page_gives_away_a_file(server: RunningServer, client: httpx.Client) -> None:
    bait = server.bait
    sweep = PageSweep(server, client, [str(bait.files[0])], is_short=True)
    assert len(sweep.handlers) > 120 and any(handler["queue"] for handler in sweep.handlers)
    assert sweep.run() == []
    assert sweep.unanswered == []
    assert sweep.num_calls > 250
    assert bait.copies([server.app.config.data_dir, Path(get_upload_folder())]) == []
    assert bait.changed_files() == []


def test_the_sweep_would_see_what_the_page_gives_away(server: RunningServer, client: httpx.Client) -> None:
    picture = server.app.config.outputs_dir / "mine.png"
    picture.write_bytes(server.bait.files[0].read_bytes())
    try:
        sweep = PageSweep(server, client, [str(picture)], is_short=True)
        sweep.handlers = [one for one in sweep.handlers if "gallery" in [sweep.kinds[number] for number in one["inputs"]] and not one["queue"]]
        assert sweep.run() != []
    finally:
        picture.unlink()


@pytest.mark.parametrize(("is_short", "num_calls"), [(True, 60), pytest.param(False, 500, marks=pytest.mark.nightly)])
def test_no_part_of_a_path_leads_to_a_file(server: RunningServer, client: httpx.Client, is_short: bool, num_calls: int) -> None:
    sweep = RouteSweep(server, client)
    assert list(sweep._paths(is_short=is_short)) == []
    assert sweep.num_calls["paths"] > num_calls


def test_the_sweep_would_see_a_file_behind_a_path(server: RunningServer, client: httpx.Client) -> None:
    sweep, inside = RouteSweep(server, client), server.app.config.outputs_dir / "seen.png"
    inside.write_bytes(server.bait.files[0].read_bytes())
    try:
        assert [finding.what for finding in sweep._call_raw(f"/gradio_api/file={inside}")] != []
    finally:
        inside.unlink()


def test_routes_that_end_something_are_called_and_leak_nothing(server: RunningServer, client: httpx.Client) -> None:
    sweep = RouteSweep(server, client)
    assert list(sweep._routes(last=True)) == []
    assert sweep.num_calls["routes"] > 0 and client.get("/internal/ping").status_code == 200
