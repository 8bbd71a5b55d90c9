"""The version of Forge whose API is provided, and of the A1111 that it follows; extensions compare it."""

from __future__ import annotations

version = "2.0.1v1.10.1"
