"""The order of what the user can arrange: parts of a generation tab, and main tabs. Must not know any of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import gradio as gr
from gradio.blocks import BlockContext

PARTS = ("image", "inpaint", "sampler", "accordions", "dimensions", "cfg", "denoising", "seed", "override_settings", "scripts", "gpus")
"""Names for the setting ui_reorder_list; a tab has some of them."""
ALWAYS_SHOWN = frozenset({"Settings"})
"""A tab without which a hidden one could not be brought back."""


class PartOrder:
    """Notes which children of a column belong to which part while it is built, and arranges them at the end."""

    def __init__(self, column: BlockContext) -> None:
        self.column = column
        self._part_of: dict[int, str] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is built inside belongs to the part `name`."""
        before = len(self.column.children)
        yield
        for child in self.column.children[before:]:
            self._part_of[child._id] = name

    def arrange(self, wanted: Sequence[str]) -> None:
        """Put the wanted parts first, in their order; the others follow as they were built."""
        places = {name: place for place, name in enumerate(wanted)}
        self.column.children.sort(key=lambda child: places.get(self._part_of.get(child._id, ""), len(places)))


def arrange_tabs(tabs: gr.Tabs, *, order: Sequence[str], hidden: Sequence[str]) -> None:
    """Put the main tabs with the titles `order` first, and hide those in `hidden`. Call when all tabs are built."""
    places = {title.lower(): place for place, title in enumerate(order)}
    tabs.children.sort(key=lambda tab: places.get(str(getattr(tab, "label", "")).lower(), len(places)))
    titles = {title.lower() for title in hidden} - {title.lower() for title in ALWAYS_SHOWN}
    for tab in tabs.children:
        if isinstance(tab, gr.Tab) and str(tab.label).lower() in titles:
            tab.visible = False
    shown = next((tab for tab in tabs.children if isinstance(tab, gr.Tab) and tab.visible), None)
    tabs.selected = None if shown is None else shown.id
