"""A real application in a temporary folder for tests: settings, checkpoints, jobs; the test provides the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modules import application
from modules.launch.cmd_args import config_for_tests


@contextmanager
def installed_application(data_dir: Path, *, load: Any = None, **config: Any) -> Iterator[application.Application]:
    """An installed application with data folder `data_dir`; `load` replaces the loading of checkpoints. Closed and removed afterwards."""
    arguments = {} if load is None else {"load": load}
    app = application.build_application(config_for_tests(data_dir, **config), **arguments)
    application.install(app)
    try:
        yield app
    finally:
        application.install(None)
        app.close()
