"""The name that extensions import: importing it gives `modules.checkpoints.vae_files`, the very same module."""

from __future__ import annotations

import sys

from modules.checkpoints import vae_files

sys.modules[__name__] = vae_files
