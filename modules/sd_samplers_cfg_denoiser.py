"""The name that extensions import: importing it gives `modules.samplers.cfg_denoiser`, the very same module."""

from __future__ import annotations

import sys

from modules.samplers import cfg_denoiser

sys.modules[__name__] = cfg_denoiser
