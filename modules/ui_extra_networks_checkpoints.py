"""The name that extensions import: importing it gives `modules.ui.extra_networks_checkpoints`, the very same module."""

from __future__ import annotations

import sys

from modules.ui import extra_networks_checkpoints

sys.modules[__name__] = extra_networks_checkpoints
