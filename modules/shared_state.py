"""The name that extensions import: importing it gives `modules.jobs.state`, the very same module."""

from __future__ import annotations

import sys

from modules.jobs import state

sys.modules[__name__] = state
