"""The old name of modules.infotext_utils: importing it gives that very module."""

from __future__ import annotations

import sys

from modules import infotext_utils

sys.modules[__name__] = infotext_utils
