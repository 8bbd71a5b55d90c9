"""A server with a small real model, viewed with Chromium. Without Chromium everything skips, with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from modules.api.api import create_internal_api
from modules.application import Application
from modules.http_edge.server import WebServer, create_fastapi_app, mount_page
from modules.ui import choices, extra_networks_routes, file_routes, history_routes, queue_routes
from modules.ui import page as ui_page
from modules.ui import tabs as ui
from tests.browser import actions
from tests.support.applications import installed_application
from tests.support.checkpoints import write_checkpoint
from tests.support.extensions import loaded_builtin
from tests.support.fleets import configured_slots
from webui import files_of_extensions

CHECKPOINT = "models/Stable-diffusion/narrow.safetensors"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run")
TIMEOUT_MS = 300_000  # a busy machine is slow, not broken
PASSED = pytest.StashKey[bool]()
KNOWN_MESSAGES = ("Method not implemented",)  # from gradio's own picture component


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.slow)
            # warnings of libraries on the server's threads are not the page's fault; gradio and the browser leave sockets to the garbage collector
            for kind in ("DeprecationWarning", "FutureWarning", "ResourceWarning", "pytest.PytestUnraisableExceptionWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


@dataclass
class Site:
    """A running server and its application."""

    app: Application
    address: str


@contextmanager
def serve(data_dir: Path, *extensions: str, slots: int = 1) -> Iterator[Site]:
    """The page of an application over `data_dir` on CPU slots, with these built-in extensions and those in its own folder."""
    with (
        configured_slots(*["cpu"] * slots),
        installed_application(data_dir, port=0) as app,
        loaded_builtin(app, *extensions) if extensions else nullcontext(),
    ):
        app.options.show_progress_every_n_steps = 1
        app.options.live_preview_refresh_period = 100
        fastapi_app = create_fastapi_app(app.config)
        create_internal_api(app, fastapi_app)
        extra_networks_routes.add_routes(app, fastapi_app)
        file_routes.add_routes(app, fastapi_app)
        history_routes.add_routes(app, fastapi_app)
        queue_routes.add_routes(app, fastapi_app)
        settings = ui_page.page_settings(app.config, **files_of_extensions(), localization=choices.localization_table(app))
        mount_page(fastapi_app, ui.create_ui(app), app.config, settings)
        server = WebServer(app.config)
        server.start(fastapi_app)
        try:
            yield Site(app=app, address=server.address)
        finally:
            server.stop()


def put_checkpoint(data_dir: Path) -> Path:
    """A narrow random SD 1.x file that makes 64x64 pictures."""
    path = data_dir / CHECKPOINT
    write_checkpoint(path, "sd15", is_shallow=True, metadata={"modelspec.resolution": "64x64"})
    return path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    data_dir = Path(tmp_path_factory.mktemp("site"))
    put_checkpoint(data_dir)
    with serve(data_dir) as site:
        yield site


def remove_checkpoint(site: Site) -> None:
    """As on a first start: the file is gone, nothing is chosen or loaded."""
    (site.app.config.data_dir / CHECKPOINT).unlink(missing_ok=True)
    site.app.models.unload()
    site.app.options.sd_model_checkpoint = None
    site.app.checkpoints.refresh()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    program = next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=list(CHROMIUM_FLAGS))
        yield browser
        browser.close()


@dataclass
class Observed:
    """What must not happen while a page is open."""

    foreign_requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def watch(self, page: Any) -> None:
        page.on("request", lambda request: self._note_request(request.url))
        page.on("pageerror", lambda error: self.errors.append(f"script error: {error}"))
        page.on("console", lambda message: self._note_message(message.type, message.text))
        page.on("response", lambda response: self.errors.append(f"{response.status} {response.url}") if response.status >= 400 else None)

    def _note_request(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob") and parts.hostname != "127.0.0.1":
            self.foreign_requests.append(url)

    def _note_message(self, kind: str, text: str) -> None:
        if kind == "error" and not any(known in text for known in KNOWN_MESSAGES):
            self.errors.append(f"console: {text}")


@pytest.fixture
def observed() -> Observed:
    return Observed()


@pytest.fixture(scope="session")
def profile(browser: Any) -> Iterator[Any]:
    """Shared by all windows: the page's programs, fetched and compiled once."""
    context = browser.new_context(viewport=actions.WINDOW, accept_downloads=True)
    context.set_default_timeout(TIMEOUT_MS)
    yield context
    context.close()


@pytest.fixture
def new_page(profile: Any, observed: Observed) -> Iterator[Any]:
    """A new, isolated window, for `open_page`. The test fails if the page contacts another host or reports an error."""
    others = list(profile.pages)
    page = profile.new_page()
    observed.watch(page)
    yield page
    if page.url.startswith("http"):
        page.evaluate("() => { localStorage.clear(); sessionStorage.clear(); }")
    for window in profile.pages:
        if window not in others:
            window.close()
    profile.clear_cookies()
    assert observed.foreign_requests == []
    assert observed.errors == []


@dataclass
class SharedWindow:
    """A window with the file's page. Loading the page is most of a test's work, so tests that only need its controls take turns at one window."""

    profile: Any
    site: Site
    page: Any = None
    observed: Observed = field(default_factory=Observed)

    def open(self) -> Any:
        """The window with txt2img's controls as `start_over` sets them. The page is loaded the first time, and after a test that failed."""
        if self.page is None:
            self.page, self.observed = self.profile.new_page(), Observed()
            self.observed.watch(self.page)
            actions.open_page(self.page, self.site)
        self.page.bring_to_front()
        actions.start_over(self.page)
        return self.page

    def close(self) -> None:
        if self.page is not None:
            self.page.evaluate("() => { localStorage.clear(); sessionStorage.clear(); }")
            self.page.close()
        self.page = None


@pytest.fixture(scope="module")
def shared_window(profile: Any, site: Site) -> Iterator[SharedWindow]:
    window = SharedWindow(profile, site)
    yield window
    window.close()


@pytest.fixture
def page(request: pytest.FixtureRequest, shared_window: SharedWindow) -> Iterator[Any]:
    """The file's shared window, as earlier tests left it except for what `start_over` resets. Fails on the same things as `new_page`."""
    yield shared_window.open()
    observed = shared_window.observed
    if not request.node.stash.get(PASSED, False) or observed.foreign_requests or observed.errors:
        shared_window.close()
    assert observed.foreign_requests == []
    assert observed.errors == []
