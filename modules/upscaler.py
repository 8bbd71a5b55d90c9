"""The name that extensions import: importing it gives `modules.pictures.upscaler`, the very same module."""

from __future__ import annotations

import sys

from modules.pictures import upscaler

sys.modules[__name__] = upscaler
