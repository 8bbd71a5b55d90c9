"""The page as gradio serves it, but every payload is checked before a handler sees it.

gradio checks only paths that the payload itself marks as files. Any other path would reach the handlers of tabs and extensions unchecked.
A number outside of its control's bounds is brought into them: an event may be on its way while another one's answer changes the bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import _StaticFiles
from gradio.utils import get_upload_folder

from modules.ui.page_files import ForeignFileError, uploaded_file

MAX_PAYLOAD_DEPTH = 64


class GuardedBlocks(gr.Blocks):
    """Blocks whose handlers, listed or not, are given only files that were uploaded to the page or are shown by it, and numbers within bounds."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False) -> Any:
        for block, value in zip(block_fn.inputs, inputs):
            try:
                check_payload(value, is_plain_json=isinstance(block, gr.JSON))
            except ForeignFileError as error:
                raise gr.Error(str(error), print_exception=False) from error
        fitted = _fit_all(block_fn, inputs, state)
        while True:
            try:
                return await super().preprocess_data(block_fn, fitted, state, explicit_call)
            except gr.Error:
                before, fitted = fitted, _fit_all(block_fn, inputs, state)
                if fitted == before:  # else another event's answer changed the bounds in the meantime
                    raise


def _fit_all(block_fn: Any, inputs: list[Any], state: Any) -> list[Any]:
    shown = [block if state is None or block._id not in state else state[block._id] for block in block_fn.inputs]
    return [fit_to_bounds(*pair) for pair in zip(shown, inputs)]


def fit_to_bounds(block: Any, value: Any) -> Any:
    """The number that a slider or number field sent, within the bounds that it has now; any other value as it is."""
    if not isinstance(block, (gr.Slider, gr.Number)) or isinstance(value, bool) or not isinstance(value, (int, float)):
        return block.minimum if isinstance(block, gr.Slider) and value is None else value
    low = value if block.minimum is None else max(value, block.minimum)
    return low if block.maximum is None else min(low, block.maximum)


def check_payload(value: Any, *, is_plain_json: bool = False) -> None:
    """Raises ForeignFileError if `value` names a file, at any depth, that a browser may not name.

    `is_plain_json`: the control takes any JSON, so only what is marked as a file counts as one."""
    uploads, shown = Path(get_upload_folder()), list(_StaticFiles.all_paths)
    for entry in _files_in(value, only_marked=is_plain_json):
        uploaded_file(entry, uploads, shown)


def _files_in(value: Any, *, only_marked: bool) -> Iterator[Any]:
    waiting: list[tuple[Any, float]] = [(value, 0)]
    while waiting:
        entry, depth = waiting.pop()
        if isinstance(entry, dict):
            if entry.get("path") is not None and ("meta" in entry or not only_marked):
                yield entry["path"]
            children: Any = entry.values()
        elif isinstance(entry, (list, tuple)):
            children = entry
        else:
            continue
        if depth > (math.inf if only_marked else MAX_PAYLOAD_DEPTH):
            raise ForeignFileError(f"A value of this request is nested more than {MAX_PAYLOAD_DEPTH} deep; no control on the page sends that.")
        waiting.extend((child, depth + 1) for child in children)
