"""Closes what pages built in tests leave open."""

from __future__ import annotations

from tests.support.event_loops import close_event_loops as close_event_loops
