"""The name that extensions import: importing it gives `modules.jobs.queue`, the very same module."""

from __future__ import annotations

import sys

from modules.jobs import queue

sys.modules[__name__] = queue
