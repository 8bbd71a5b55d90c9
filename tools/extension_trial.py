"""Tries extensions as a user would: each folder alone in `extensions/`, the page in headless Chromium, a job on one slot and on two.

    python -m tools.extension_trial [--without-page] FOLDER...

Reports one row per extension and number of slots. `acts`: what differs from the same job without the extension when all its checkboxes are on.
Installers are not run. Needs requirements_test.txt and, unless --without-page, Chromium.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules import scripts
from modules.application import Application
from modules.launch.extension_folders import BUILTIN_DIR
from modules.processing.chosen_script import process_with_scripts
from modules.scripts.arguments import start_values
from modules.scripts.without_page import build_controls
from tests.browser.conftest import CHROMIUM_FLAGS, CHROMIUM_NAMES, Observed, Site, put_checkpoint, serve
from tests.support.fleets import configured_slots
from tests.support.narrow_application import narrow_application, pixels, txt2img

PAGE_TIMEOUT_MS = 120_000
SLOTS = (1, 2)
_MAX_SHOWN = 3


@dataclass
class Trial:
    """What one extension did with so many slots. `errors`: lines of the log, `console`: of the browser."""

    name: str
    num_slots: int
    num_classes: int = 0
    num_controls: int = 0
    num_shown: int = 0
    acts: str = "-"
    errors: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        return not (self.errors or self.console) and not self.acts.startswith("failed")

    def row(self) -> str:
        shown = f"{self.num_shown} of {self.num_controls}"
        return f"| {self.name} | {self.num_slots} | {self.num_classes} | {shown} | {len(self.console)} | {self.acts} | {len(self.errors)} |"


HEADER = "| extension | slots | classes loaded | controls on the page | console errors | acts | errors in the log |\n|---|---|---|---|---|---|---|"


class _Errors(logging.Handler):
    """Keeps what is logged as a warning or worse, by its first line."""

    def __init__(self, kept: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.kept = kept

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record.getMessage().splitlines()[0])


def try_extension(folder: Path, num_slots: int, browser: Any) -> Trial:
    """Serve a page with a copy of `folder` as its one extension and look at what comes of it."""
    trial = Trial(folder.name, num_slots)
    handler = _Errors(trial.errors)
    logging.getLogger().addHandler(handler)
    try:
        with tempfile.TemporaryDirectory() as data:
            data_dir = Path(data)
            put_checkpoint(data_dir)
            shutil.copytree(folder, data_dir / "extensions" / folder.name, symlinks=True)
            with serve(data_dir, "", slots=num_slots) as site:
                _look_at_page(site, trial, browser)
                trial.acts = _try_job(site.app, folder.name)
    finally:
        logging.getLogger().removeHandler(handler)
    return trial


def _own_scripts(app: Application, name: str, tab: str) -> list[Any]:
    folder = app.config.extensions_dir / name
    return [script for script in app.script_runners[tab].scripts if Path(script.filename or "").is_relative_to(folder)]


def _look_at_page(site: Site, trial: Trial, browser: Any) -> None:
    observed = Observed()
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PAGE_TIMEOUT_MS)
    observed.watch(page)
    try:
        page.goto(site.address)
        page.wait_for_function("typeof uiIsLoaded !== 'undefined' && uiIsLoaded && optionsAreAvailable")
        page.wait_for_timeout(1000)  # what its scripts do when the page stands
        own = [script for tab in ("txt2img", "img2img") for script in _own_scripts(site.app, trial.name, tab)]
        ids = [control.elem_id for script in own for control in script.controls or () if control.elem_id]
        trial.num_classes = sum(Path(data.path).is_relative_to(site.app.config.extensions_dir) for data in _all_classes())
        trial.num_controls = len(ids)
        trial.num_shown = page.evaluate("ids => ids.filter(id => document.getElementById(id)).length", ids)
        trial.console += observed.errors
    finally:
        context.close()


def _all_classes() -> list[Any]:
    return [*scripts.scripts_data, *scripts.postprocessing_scripts_data]


def _try_job(app: Application, name: str, plain: Any = None) -> str:
    """ "picture", "parameters", "nothing" or "failed: ...": what a job of two pictures with the extension has that one without it has not."""
    plain = process_with_scripts(_pair()) if plain is None else plain
    try:
        done = process_with_scripts(_with_everything_on(app, name))
    except Exception as error:  # noqa: BLE001 - whatever an extension raises is what this tool reports
        return f"failed: {type(error).__name__}: {str(error)[:80]}"
    one, other = ([pixels(picture).tobytes() for picture in result.images] for result in (plain, done))
    return "picture" if one != other else "parameters" if plain.infotexts != done.infotexts else "nothing"


def _pair() -> Any:
    return txt2img(batch_size=2, steps=2)


def _with_everything_on(app: Application, name: str) -> Any:
    """The job with every checkbox of the extension's scripts on, and its selectable script selected."""
    request, runner = _pair(), app.script_runners["txt2img"]
    values = start_values(runner)
    args = [values.get(slot) for slot in range(len(runner.inputs))]
    args[0] = 0
    for script in _own_scripts(app, name, "txt2img"):
        own = slice(script.args_from, script.args_to)
        args[own] = [True if isinstance(value, bool) else value for value in args[own]]
        if not script.alwayson:
            args[0] = runner.selectable_scripts.index(script) + 1
    request.scripts, request.script_args = runner, tuple(args)
    return request


class PageLess:
    """Trials in one application, without a page or a browser: folders lie in the application's own folder of extensions."""

    def __init__(self, app: Application) -> None:
        self.app = app
        self._plain: Any = None
        """The job without an extension."""

    @contextmanager
    def loaded(self, folders: Sequence[Path]) -> Iterator[None]:
        """These extensions alone, loaded, with the arguments of their scripts."""
        names, options = {folder.name for folder in folders}, self.app.options
        others = [path.name for folder in (BUILTIN_DIR, self.app.config.extensions_dir) for path in folder.iterdir() if path.name not in names]
        options.data["disabled_extensions"] = others
        scripts.load_scripts(self.app)
        build_controls(self.app)
        try:
            yield
        finally:
            scripts.unload_scripts()
            self.app.script_runners, self.app.extensions = {}, []
            options.data["disabled_extensions"] = []

    def try_extension(self, folder: Path, num_slots: int) -> Trial:
        """What one extension does."""
        trial = Trial(folder.name, num_slots)
        self._plain = self._plain or process_with_scripts(_pair())
        handler = _Errors(trial.errors)
        logging.getLogger().addHandler(handler)
        try:
            with self.loaded([folder]):
                trial.num_classes = len(_all_classes())
                trial.num_controls = sum(len(script.controls or ()) for script in _own_scripts(self.app, folder.name, "txt2img"))
                trial.acts = _try_job(self.app, folder.name, self._plain)
        finally:
            logging.getLogger().removeHandler(handler)
        return trial

    def pictures_with(self, folder: Path) -> list[Any]:
        """The pictures of the job with the extension, as arrays."""
        with self.loaded([folder]):
            return [pixels(picture) for picture in process_with_scripts(_with_everything_on(self.app, folder.name)).images]


def try_all_without_page(folders: Sequence[Path], slots: Sequence[int] = SLOTS) -> list[Trial]:
    """Every extension with every number of slots, as far as that shows without a page."""
    trials = []
    for num_slots in slots:
        with tempfile.TemporaryDirectory() as data, configured_slots(*["cpu"] * num_slots), narrow_application(Path(data)) as (app, _):
            trial = PageLess(app)
            for folder in folders:
                copied = shutil.copytree(folder, app.config.extensions_dir / folder.name, symlinks=True)
                trials.append(trial.try_extension(Path(copied), num_slots))
    return trials


def find_chromium() -> str:
    """Raises SystemExit where there is none."""
    found = next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise SystemExit("There is no Chromium on this machine (Debian: apt-get install chromium).")
    return found


def try_all(folders: Sequence[Path], slots: Sequence[int] = SLOTS) -> list[Trial]:
    """Every extension with every number of slots."""
    from playwright.sync_api import sync_playwright  # a test extra

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_chromium(), args=list(CHROMIUM_FLAGS))
        try:
            return [try_extension(folder, num_slots, browser) for folder in folders for num_slots in slots]
        finally:
            browser.close()


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all went well, 1 when one did not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="the folder of an extension")
    parser.add_argument("--without-page", action="store_true", help="load and run jobs only; no page, no browser")
    arguments = parser.parse_args(argv)
    trials = (try_all_without_page if arguments.without_page else try_all)(arguments.folders)
    print(HEADER)
    for trial in trials:
        print(trial.row())
    for trial in trials:
        for line in [*trial.errors[:_MAX_SHOWN], *trial.console[:_MAX_SHOWN]]:
            print(f"{trial.name}, {trial.num_slots} slot(s): {line}")
    return 0 if all(trial.is_well for trial in trials) else 1


if __name__ == "__main__":
    sys.exit(main())
