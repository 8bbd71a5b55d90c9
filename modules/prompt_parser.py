"""The name that extensions import: importing it gives `modules.prompts.schedules`, the very same module."""

from __future__ import annotations

import sys

from modules.prompts import schedules

sys.modules[__name__] = schedules
