"""A state per job, for a server that has several jobs running on other machines. Reads like a `State`.

A job's own thread reads and writes its own state, so that scripts see `shared.state` as ever. Any other thread sees the oldest running job's;
who knows a task id asks `of_job`. Commands to the server belong to no job.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from modules.jobs.state import State

_OF_SERVER = frozenset({"server_command", "_server_command", "_server_command_changed", "need_restart", "server_start"})
_OWN = ("_idle", "_states", "_guard", "_thread")


class JobStates(State):
    """Fields of `State`, each read from and written to the state that the calling thread works on."""

    def __init__(self) -> None:
        # not State.__init__: without fields of its own, every access is passed on
        for name, value in zip(_OWN, (State(), {}, threading.Lock(), threading.local())):
            self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chosen(name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._chosen(name), name, value)

    def of_job(self, task_id: str) -> State:
        """The state of a running job; an idle one if it does not run."""
        own: dict[str, Any] = self.__dict__
        with own["_guard"]:
            state: State = own["_states"].get(task_id) or own["_idle"]
            return state

    @contextmanager
    def of_thread(self, task_id: str) -> Iterator[None]:
        """The calling thread works on the job `task_id`, whose state is created with the first call."""
        own = self.__dict__
        with own["_guard"]:
            state = own["_states"].setdefault(task_id, State())
        before = getattr(own["_thread"], "state", None)
        own["_thread"].state = state
        try:
            yield
        finally:
            own["_thread"].state = before

    def drop(self, task_id: str) -> None:
        own = self.__dict__
        with own["_guard"]:
            own["_states"].pop(task_id, None)

    def running(self) -> list[State]:
        """The states of all running jobs, oldest first."""
        own = self.__dict__
        with own["_guard"]:
            return list(own["_states"].values())

    def _chosen(self, name: str) -> State:
        own = self.__dict__
        idle: State = own["_idle"]
        if name in _OF_SERVER:
            return idle
        state: State | None = getattr(own["_thread"], "state", None)
        if state is not None:
            return state
        with own["_guard"]:
            return next(iter(own["_states"].values()), idle)
