"""The version that extensions compare to detect Forge's API."""

from __future__ import annotations

version = "f2.0.1"
