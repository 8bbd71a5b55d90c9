"""The program's version, in the form that clients and extensions of Forge parse.

`f2.0.1v1.10.1-multi-gpu-webui-0.1.0`: Forge's version, the A1111 version it follows, then this program's name and version. Extensions take a
leading "f2" for Forge; A1111 and Forge read no version of their own in it, so pasting the infotext sets no old defaults there.
"""

from __future__ import annotations

from modules_forge.forge_version import version as FORGE_VERSION

NAME = "multi-gpu-webui"
VERSION = "0.1.0"


def program_version() -> str:
    """`Version` in infotexts and of the API, the start of `git_tag()`."""
    return f"f{FORGE_VERSION}-{NAME}-{VERSION}"
