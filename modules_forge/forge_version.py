"""The version that extensions compare to learn whether they run on Forge's surface."""

from __future__ import annotations

version = "f2.0.1"
