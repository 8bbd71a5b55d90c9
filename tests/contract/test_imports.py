"""Importing a module does no work: nothing is printed, created, started or probed; startup modules import nothing heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.sources import ROOT_DIR, module_name, product_sources

IMPORT_ALL = """
import contextlib, importlib, io, json, logging, os, sys, threading
report = {}
def environ():
    return {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}  # torch sets it for itself
for name in json.loads(sys.stdin.read()):
    output = io.StringIO()
    before = (list(sys.argv), environ(), threading.active_count(), list(logging.getLogger().handlers), os.getcwd())
    error = None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            importlib.import_module(name)
        except Exception as caught:
            error = caught
    after = (list(sys.argv), environ(), threading.active_count(), list(logging.getLogger().handlers), os.getcwd())
    faults = [f"{type(error).__name__}: {error}"] if error else []
    faults += [f"printed {output.getvalue()!r}"] if output.getvalue() else []
    faults += [what + " changed" for what, a, b in zip(("sys.argv", "os.environ", "threads", "log handlers", "folder"), before, after) if a != b]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        faults.append("CUDA was initialised")
    if faults:
        report[name] = faults
json.dump(report, open(sys.argv[1], "w"))
"""

HEAVY = ("torch", "numpy", "PIL", "gradio", "diffusers", "transformers", "fastapi", "pydantic", "safetensors", "requests", "psutil")


NEEDS_OPTIONAL_PACKAGE = {"modules.cluster.ray_serve"}  # Ray, which sets variables of its own when it is imported


def importable_names() -> list[str]:
    names = [module_name(source) for source in product_sources() if source.top in ("modules", "modules_forge", "backend")]
    return [name for name in names if name not in NEEDS_OPTIONAL_PACKAGE]


def list_files() -> set[Path]:
    """Everything in the working tree that importing could create, except Python's caches."""
    skipped = {"venv", ".venv", ".git", "__pycache__", "tmp", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}
    found: set[Path] = set()
    for folder, names, files in os.walk(ROOT_DIR):
        names[:] = [name for name in names if name not in skipped]
        found.update(Path(folder, name) for name in [*names, *files])
    return found


@pytest.mark.slow
def test_importing_every_module_does_no_work(tmp_path: Path) -> None:
    """Imports each in turn in one fresh process, so that heavy packages are imported once."""
    before = list_files()
    environ = {**os.environ, "PYTHONPATH": str(ROOT_DIR), "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("MPLCONFIGDIR", "GRADIO_TEMP_DIR"):
        environ.pop(name, None)
    report = tmp_path / "report.json"
    names = [*importable_names(), *(["webui"] if (ROOT_DIR / "webui.py").exists() else [])]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_ALL, str(report)],
        input=json.dumps(names),
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(report.read_text()) == {}
    assert {path.name for path in tmp_path.iterdir()} == {"report.json"}
    assert sorted(str(path) for path in list_files() - before) == []


def test_the_start_imports_nothing_heavy() -> None:
    names = [name for name in importable_names() if name.startswith("modules.launch")]
    names += ["backend.args", "modules.app_config", "modules.launch.cmd_args", "launch"]
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT_DIR, capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
