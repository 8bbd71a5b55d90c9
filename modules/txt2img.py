"""The name that extensions import: importing it gives `modules.jobs.txt2img`, the very same module."""

from __future__ import annotations

import sys

from modules.jobs import txt2img

sys.modules[__name__] = txt2img
