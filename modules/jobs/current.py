"""The job that the running code belongs to, for logs. Standard library only: the launcher reads it."""

from __future__ import annotations

from contextvars import ContextVar

current_job_id: ContextVar[str | None] = ContextVar("current_job_id", default=None)
"""The task id; None outside of a job. Set by the job queue."""
