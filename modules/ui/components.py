"""The page's form components under the names extensions know: tool buttons, tight rows, the accordion with a checkbox in its header.

Must not know any tab, option or the application.
"""

from __future__ import annotations

import inspect
from abc import ABCMeta
from collections.abc import Sequence
from typing import Any

import gradio as gr
from gradio.component_meta import ComponentMeta, updateable
from gradio.context import get_blocks_context


class _ComponentMetaWithoutStub(ComponentMeta):
    """gradio's metaclass, but without the .pyi file that gradio writes next to every component's source.

    gradio sends the browser only the attributes named by a component's constructor, so the constructor takes its parent's signature.
    """

    def __new__(mcs, name: str, bases: tuple[type, ...], attrs: dict[str, Any]) -> Any:
        if "__init__" in attrs:
            attrs["__init__"] = updateable(attrs["__init__"])
            attrs["__init__"].__signature__ = inspect.signature(bases[0].__init__)  # type: ignore[misc]
        return ABCMeta.__new__(mcs, name, bases, attrs)


def _with_class(elem_classes: Sequence[str] | str | None, *names: str) -> list[str]:
    given = [elem_classes] if isinstance(elem_classes, str) else list(elem_classes or [])
    return [*names, *given]


class ToolButton(gr.Button, metaclass=_ComponentMetaWithoutStub):
    """A small square button. `icon_name` picks a drawing from style.css; without one the button shows its value."""

    def __init__(
        self,
        value: str = "",
        *args: Any,
        icon_name: str | None = None,
        elem_classes: Sequence[str] | str | None = None,
        min_width: int | None = None,
        **kwargs: Any,
    ) -> None:
        icon_classes = ["icon", f"icon-{icon_name}"] if icon_name else []
        super().__init__(
            value,
            *args,
            elem_classes=_with_class(elem_classes, "tool", *icon_classes),
            min_width=min_width or 0,
            scale=kwargs.pop("scale", 0),
            **kwargs,
        )

    def get_block_name(self) -> str:
        return "button"


class ResizeHandleRow(gr.Row, metaclass=_ComponentMetaWithoutStub):
    """The row with the settings on the left and the results on the right."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(elem_classes=_with_class(kwargs.pop("elem_classes", None), "resize-handle-row"), **kwargs)

    def get_block_name(self) -> str:
        return "row"


class FormRow(gr.Row, metaclass=_ComponentMetaWithoutStub):
    """A row whose parts stay close together."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, elem_classes=_with_class(kwargs.pop("elem_classes", None), "form-row"), **kwargs)

    def get_block_name(self) -> str:
        return "row"


class FormColumn(gr.Column, metaclass=_ComponentMetaWithoutStub):
    """A column whose parts stay close together."""

    def get_block_name(self) -> str:
        return "column"


class FormGroup(gr.Group, metaclass=_ComponentMetaWithoutStub):
    """A framed group of form parts."""

    def get_block_name(self) -> str:
        return "group"


class FormHTML(gr.HTML, metaclass=_ComponentMetaWithoutStub):
    """A piece of HTML inside a form."""

    def get_block_name(self) -> str:
        return "html"


class FormColorPicker(gr.ColorPicker, metaclass=_ComponentMetaWithoutStub):
    """A color picker inside a form."""

    def get_block_name(self) -> str:
        return "colorpicker"


class DropdownMulti(gr.Dropdown, metaclass=_ComponentMetaWithoutStub):
    """A dropdown that allows several choices."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("multiselect", True)
        super().__init__(**kwargs)

    def get_block_name(self) -> str:
        return "dropdown"


class DropdownEditable(gr.Dropdown, metaclass=_ComponentMetaWithoutStub):
    """A dropdown that also accepts typed text."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("allow_custom_value", True)
        super().__init__(**kwargs)

    def get_block_name(self) -> str:
        return "dropdown"


class InputAccordion(gr.Checkbox, metaclass=_ComponentMetaWithoutStub):
    """An accordion that is also a checkbox: opening it turns its feature on, closing it turns it off.

    The component itself is the hidden checkbox, so it can be an input. `with x` adds parts to the accordion, `with x.extra()` to its header.
    The page's script draws the visible checkbox in the header.
    DOM ids: `{elem_id}`, `{elem_id}-checkbox`, `{elem_id}-visible-checkbox`, `{elem_id}-extra`.
    """

    _next_number = 0

    def __init__(self, value: bool | None = None, *, accordion: gr.Accordion | None = None, **kwargs: Any) -> None:
        self.accordion_id = kwargs.pop("elem_id", None) or self._new_id()
        label, visible = kwargs.pop("label", "Accordion"), kwargs.pop("visible", True)
        super().__init__(value=bool(value), elem_id=f"{self.accordion_id}-checkbox", visible="hidden", label=label, **kwargs)
        self.accordion: gr.Accordion | None = accordion
        if get_blocks_context() is None:  # gradio makes a second instance when an event updates this one; it is never shown
            return
        if accordion is None:  # starts open so that its parts are created; the page's script closes it
            self.accordion = gr.Accordion(label, open=True, visible=visible, elem_id=self.accordion_id, elem_classes=["input-accordion"])
        self.change(
            fn=None, js=f"function(checked){{ inputAccordionChecked('{self.accordion_id}', checked); }}", inputs=[self], show_progress="hidden"
        )

    @classmethod
    def _new_id(cls) -> str:
        InputAccordion._next_number += 1
        return f"input-accordion-{InputAccordion._next_number}"

    def extra(self) -> gr.Row:
        """The row in the accordion's header, for `with x.extra():`."""
        return gr.Row(elem_id=f"{self.accordion_id}-extra", elem_classes=["input-accordion-extra"])

    def __enter__(self) -> InputAccordion:
        self._shown_accordion().__enter__()
        return self

    def __exit__(self, exc_type: Any = None, exc_value: Any = None, traceback: Any = None) -> None:
        self._shown_accordion().__exit__(exc_type, exc_value, traceback)

    def _shown_accordion(self) -> gr.Accordion:
        if self.accordion is None:
            raise RuntimeError(
                f"accordion {self.accordion_id}: it was created outside a page and cannot contain parts. Create it inside `with gr.Blocks()`."
            )
        return self.accordion

    def get_block_name(self) -> str:
        return "checkbox"
