"""The name that extensions import: importing it gives `modules.samplers.kdiffusion`, the very same module."""

from __future__ import annotations

import sys

from modules.samplers import kdiffusion

sys.modules[__name__] = kdiffusion
