from __future__ import annotations

import io
import sys

import pytest

from modules.jobs.bar import JobBar


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _look_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> _Terminal:
    """Inside the test: pytest restores its own stderr between a fixture and the test."""
    made = _Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    return made


def test_one_bar_counts_the_steps_of_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, bar = _look_at_a_terminal(monkeypatch), JobBar()
    bar.begin(is_hidden=False)
    bar.begin_pass(3, passes_left=2)
    assert bar._bar.total == 6
    for _ in range(3):
        bar.note_step()
    bar.begin_pass(2, passes_left=1)
    assert (bar._bar.n, bar._bar.total) == (3, 5)
    bar.note_step()
    bar._bar.refresh()
    assert "4/5" in terminal.getvalue()
    bar.end()


@pytest.mark.parametrize("is_hidden", [True, False])
def test_nothing_is_drawn_where_nobody_looks(is_hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", written := _Terminal() if is_hidden else io.StringIO())
    bar = JobBar()
    bar.begin(is_hidden=is_hidden)
    bar.begin_pass(3, passes_left=1)
    bar.note_step()
    bar.end()
    assert written.getvalue() == ""


def test_a_sampler_outside_of_a_job_draws_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, bar = _look_at_a_terminal(monkeypatch), JobBar()
    bar.begin_pass(3, passes_left=1)
    bar.note_step()
    bar.end()
    assert terminal.getvalue() == ""
