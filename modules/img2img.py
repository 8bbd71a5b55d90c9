"""The name that extensions import: importing it gives `modules.jobs.img2img`, the very same module."""

from __future__ import annotations

import sys

from modules.jobs import img2img

sys.modules[__name__] = img2img
