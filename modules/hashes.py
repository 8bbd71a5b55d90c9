"""The name that extensions import: importing it gives `modules.checkpoints.hashes`, the very same module."""

from __future__ import annotations

import sys

from modules.checkpoints import hashes

sys.modules[__name__] = hashes
