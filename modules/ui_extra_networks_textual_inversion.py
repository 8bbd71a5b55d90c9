"""The name that extensions import: importing it gives `modules.ui.extra_networks_textual_inversion`, the very same module."""

from __future__ import annotations

import sys

from modules.ui import extra_networks_textual_inversion

sys.modules[__name__] = extra_networks_textual_inversion
