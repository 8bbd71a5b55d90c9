"""Finds hooks inside the network that tie it to one slot (own tensors, or all rows together) or to whole tensors. Knows no plan."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def find_bound_hook(options: dict[str, object]) -> str | None:
    """Why the network must stay on one slot, from the first hook inside it that ties it there; None if no hook does.

    A hook that needs all rows of a call says why in its attribute `keeps_rows_together`.
    """
    for hook in _hooks_of(options):
        if reason := getattr(hook, "keeps_rows_together", None):
            return str(reason)
        cells = [cell.cell_contents for cell in getattr(hook, "__closure__", None) or () if _is_filled(cell)]
        held = [hook, *cells, *getattr(getattr(hook, "__self__", None), "__dict__", {}).values(), *getattr(hook, "__dict__", {}).values()]
        if any(isinstance(one, (Tensor, nn.Module)) for one in held) or hasattr(hook, "to"):
            return f"{getattr(hook, '__qualname__', type(hook).__name__)} holds tensors of its own"
    return None


def find_whole_hook(options: dict[str, object]) -> str | None:
    """The name of the first hook inside the network that needs whole tensors; None if all of them work on tiles of a row.

    A hook works on tiles if it says so (`works_on_tiles = True`): a replaced cross-attention whose result for a token depends on that token alone.
    """
    for hook in _hooks_of(options):
        if not getattr(hook, "works_on_tiles", False):
            return str(getattr(hook, "__qualname__", type(hook).__name__))
    return None


def _is_filled(cell: object) -> bool:
    try:
        return cell.cell_contents is not None  # type: ignore[attr-defined]
    except ValueError:
        return False


def _hooks_of(options: dict[str, object]) -> Iterator[object]:
    for name in ("patches", "patches_replace"):
        for hooks in (options.get(name) or {}).values():  # type: ignore[attr-defined]
            yield from hooks.values() if isinstance(hooks, dict) else hooks
    for name in ("block_modifiers", "block_inner_modifiers"):
        yield from options.get(name) or ()  # type: ignore[misc]
    for name in ("group_norm_wrapper", "groupnorm_wrapper"):
        if options.get(name) is not None:
            yield options[name]
