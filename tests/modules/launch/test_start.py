"""The helpers that installers import, the console log, and the startup timer."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.jobs.current import current_job_id
from modules.launch import start
from modules.launch.timer import Timer
from modules.launch.version import program_version


def test_is_installed_knows_distributions_and_modules() -> None:
    assert start.is_installed("pytest")
    assert start.is_installed("json")
    assert not start.is_installed("no_such_package")
    assert not start.is_installed("no_such_package.sub")


def test_run_returns_the_output_and_raises_with_it() -> None:
    assert start.run(f'"{sys.executable}" -c "print(1)"').strip() == "1"
    with pytest.raises(RuntimeError, match="It failed") as caught:
        start.run(f'"{sys.executable}" -c "print(7); raise SystemExit(3)"', errdesc="It failed")
    assert "Error code: 3" in str(caught.value)
    assert "stdout: 7" in str(caught.value)


def test_run_pip_can_be_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []
    monkeypatch.setattr(start, "run", lambda command, **_: commands.append(command) or "")
    assert start.run_pip("install x", skip_install=True) is None
    start.run_pip("install x", "x", index_url="U")
    assert commands == [f'"{sys.executable}" -m pip install x --prefer-binary --index-url U']


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True).stdout.strip()


def test_git_clone_brings_a_clone_to_the_commit(tmp_path: Path) -> None:
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    origin.mkdir()
    git(origin, "init", "-q")
    commits = []
    for name in ("one", "two"):
        (origin / name).touch()
        git(origin, "add", ".")
        git(origin, "commit", "-qm", name)
        commits.append(git(origin, "rev-parse", "HEAD"))
    start.git_clone(str(origin), str(clone), "origin", commits[0])
    assert (git(clone, "rev-parse", "HEAD"), (clone / "two").exists()) == (commits[0], False)
    start.git_clone(str(origin), str(clone), "origin", commits[1])
    assert git(clone, "rev-parse", "HEAD") == commits[1]


def test_a_clone_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="git clone"):
        start.git_clone(str(tmp_path / "none"), str(tmp_path / "clone"), "none")
    assert list(tmp_path.iterdir()) == []


def test_outside_a_clone_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start.shutil, "which", lambda name: None)
    assert (start.git_tag(), start.commit_hash()) == (program_version(), "<none>")
    assert program_version().startswith("f2")


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield root
    root.setLevel(level)
    root.handlers[:] = handlers


def test_information_is_printed_plain_and_the_rest_with_its_level(root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    start.setup_logging("INFO")
    start.setup_logging("INFO")
    log = logging.getLogger("some.module")
    log.debug("not shown")
    log.info("shown")
    log.warning("careful")
    assert capsys.readouterr().out == "shown\nWARNING: careful\n"


def test_the_timer_adds_up() -> None:
    timer = Timer()
    timer.restart(timer.began_s - 2.0)
    timer.record("set-up")
    timer.record("import")
    assert timer.spans_s["set-up"] >= 2.0
    assert timer.total_s == pytest.approx(sum(timer.spans_s.values()))
    assert timer.summary().startswith("2.0 s (set-up 2.0 s")
    assert "import" not in timer.summary()


FORGED = "a\nERROR: forged\r\nWARNING: forged\x1b[2J\x1b]0;title\x07\u2028\x85\x0b\x0c\u202ez"


def test_no_text_of_a_client_begins_a_line_of_the_log_or_steers_the_terminal(root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    start.setup_logging("INFO")
    log = logging.getLogger("some.module")
    log.info("LoRA %r, %s", FORGED, FORGED)
    log.warning(f"as one text {FORGED}")
    log.info("%s", "ERROR: forged")
    try:
        raise ValueError(FORGED)
    except ValueError as error:
        log.error("failed: %s", error, exc_info=error)
    lines = capsys.readouterr().out.split("\n")
    assert [line for line in lines if line.startswith(("WARNING: forged", "ERROR: forged"))] == []
    begun = [line for line in lines if line and not line.startswith("    | ")]
    assert [line.split(" ")[0] for line in begun] == ["LoRA", "WARNING:", "INFO:", "ERROR:"]
    assert all(line.isprintable() for line in lines)
    assert "\\x1b[2J" in lines[0] + lines[1] + lines[2]


def test_half_a_letter_in_a_record_can_be_written(root_logger: logging.Logger) -> None:
    """Passed directly to the handler, because pytest could not forward it."""
    start.setup_logging("INFO")
    formatter = root_logger.handlers[-1].formatter
    assert formatter is not None
    assert formatter.format(logging.makeLogRecord({"msg": "a \ud800", "levelno": logging.INFO, "levelname": "INFO"})).encode("utf-8")


def test_logs_as_json_carry_the_jobs_id_and_stay_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    start.setup_logging("INFO", "json")
    token = current_job_id.set("task(1)")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("x").warning("a %s", "b\nERROR: forged", exc_info=True)
    finally:
        current_job_id.reset(token)
        start.setup_logging("INFO")
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert (record["job"], record["level"], record["message"], record["logger"]) == ("task(1)", "WARNING", "a b\nERROR: forged", "x")
    assert "ValueError: two" in record["error"]
