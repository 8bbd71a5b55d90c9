"""The name that extensions import: importing it gives `modules.samplers.registry`, the very same module."""

from __future__ import annotations

import sys

from modules.samplers import registry

sys.modules[__name__] = registry
