"""The old name of modules.infotext.parameters; importing it returns that very module."""

from __future__ import annotations

import sys

from modules.infotext import parameters

sys.modules[__name__] = parameters
