"""The name that extensions import: importing it gives `modules.samplers.noise`, the very same module."""

from __future__ import annotations

import sys

from modules.samplers import noise

sys.modules[__name__] = noise
