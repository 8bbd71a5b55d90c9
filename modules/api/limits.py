"""Maximum values in a request. They keep one request from overloading a machine; every rejection names the limit.

Plain numbers. The page's controls have their own limits.
"""

from __future__ import annotations

MAX_STEPS = 1000
"""The number of noise levels in the models' training: more steps would have nothing to do."""

MIN_SIDE_PX = 8
MAX_SIDE_PX = 8192
MAX_PICTURE_PX = 4096 * 4096
MAX_BATCH_PX = 8 * MAX_PICTURE_PX
SIDE_MULTIPLE_PX = 8

MAX_BATCH_SIZE = 128
MAX_BATCH_COUNT = 1000
MAX_PICTURES = 1000

MAX_SEED = 2**63 - 1
MAX_CFG_SCALE = 100.0
MAX_PROMPT_CHARS = 100_000
MAX_MASK_BLUR_PX = 1024
MAX_INPUT_PICTURE_PX = MAX_SIDE_PX * MAX_SIDE_PX
MAX_REQUEST_PX = 2 * MAX_INPUT_PICTURE_PX
"""All pictures of one request together; decoded, they take 4 bytes per pixel."""
MAX_HELD_PX = 4 * MAX_REQUEST_PX
"""All requests being handled together."""
MAX_INPUT_PICTURES = 1000
MAX_UPSCALE_FACTOR = 16.0
MAX_DOWNLOAD_BYTES = 64 << 20
MAX_JSON_DEPTH = 32
"""Deeper than any field needs. The layers below process JSON recursively, which fails at some hundred levels."""


def json_depth(value: object) -> int:
    """Maximum nesting depth of lists and objects. No recursion, linear time; stops just above MAX_JSON_DEPTH."""
    depth, level = 0, [value]
    while level and depth <= MAX_JSON_DEPTH:
        level = [child for entry in level if isinstance(entry, (dict, list)) for child in (entry.values() if isinstance(entry, dict) else entry)]
        depth += 1 if level else 0
    return depth
