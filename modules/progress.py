"""The name that extensions import: importing it gives `modules.jobs.progress`, the very same module."""

from __future__ import annotations

import sys

from modules.jobs import progress

sys.modules[__name__] = progress
