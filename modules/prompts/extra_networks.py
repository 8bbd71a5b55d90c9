"""Networks named in a prompt, `<kind:name:value:key=value>`: finds them, removes them from the text, passes them to whoever registered the kind.

Extensions register kinds; LoRA is one. An unknown or failing kind is reported, and the picture is made without it. Must not know what any
kind does.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from backend.foreign_json import ForeignJsonError, read_json_file
from modules import errors

log = logging.getLogger(__name__)

re_extra_net = re.compile(r"<(\w+):([^>]+)>")
"""Pattern of a mention, for extensions that import it. Not used here: many `<a:` without a `>` make it quadratic."""
_OPENING = re.compile(r"<(\w+):")


class ExtraNetworkParams:
    """The values after the kind: `positional` ones, and `named` ones written key=value. Equal if written the same."""

    def __init__(self, items: Sequence[str] | None = None) -> None:
        self.items = list(items or [])
        self.positional: list[str] = []
        self.named: dict[str, str] = {}
        for item in self.items:
            key, equals, value = item.partition("=")
            if equals:
                self.named[key] = value
            else:
                self.positional.append(item)

    def __eq__(self, other: object) -> bool:
        return self.items == other.items if isinstance(other, ExtraNetworkParams) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.items))

    def __repr__(self) -> str:
        return f"ExtraNetworkParams({self.items!r})"


ExtraNetworkData = dict[str, list[ExtraNetworkParams]]


class ExtraNetwork:
    """A kind of network. `name` is the word after the `<`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def activate(self, p: Any, params_list: list[ExtraNetworkParams]) -> None:
        """Called before each batch with one entry per mention in the prompt, possibly none. Must undo what an earlier batch applied."""
        raise NotImplementedError

    def deactivate(self, p: Any) -> None:
        """Called at the end of a job."""
        raise NotImplementedError


extra_network_registry: dict[str, ExtraNetwork] = {}
extra_network_aliases: dict[str, ExtraNetwork] = {}


def initialize() -> None:
    """Forget all kinds."""
    extra_network_registry.clear()
    extra_network_aliases.clear()


def register_extra_network(extra_network: ExtraNetwork) -> None:
    """Register a kind under its name, replacing an earlier one with the same name."""
    extra_network_registry[extra_network.name] = extra_network


def register_extra_network_alias(extra_network: ExtraNetwork, alias: str) -> None:
    """Register an additional name for a kind."""
    extra_network_aliases[alias] = extra_network


# prompts


def parse_prompt(prompt: str) -> tuple[str, ExtraNetworkData]:
    """(the prompt without its networks, kind -> mentions in order)."""
    found: ExtraNetworkData = {}
    texts: list[str] = []
    position = 0
    for start, end, kind, values in _mentions(prompt):
        found.setdefault(kind, []).append(ExtraNetworkParams(values.split(":")))
        texts.append(prompt[position:start])
        position = end
    return "".join([*texts, prompt[position:]]), found


def _mentions(prompt: str) -> Iterator[tuple[int, int, str, str]]:
    """(start, end, kind, values) of each `<kind:values>`; values are never empty."""
    position = 0
    while (opening := _OPENING.search(prompt, position)) is not None:
        closing = prompt.find(">", opening.end())
        if closing < 0:
            return
        position = closing + 1
        if closing > opening.end():
            yield opening.start(), position, opening[1], prompt[opening.end() : closing]


def parse_prompts(prompts: Iterable[str]) -> tuple[list[str], ExtraNetworkData]:
    """(the prompts without their networks, the networks of the first prompt that names any). A batch has one set of networks."""
    parsed = [parse_prompt(prompt) for prompt in prompts]
    networks = [data for _, data in parsed if data]
    if any(data != networks[0] for data in networks):
        log.warning("The prompts of one batch name different extra networks. The first prompt's networks are used for the whole batch.")
    return [text for text, _ in parsed], networks[0] if networks else {}


# applying


def lookup_extra_networks(extra_network_data: Mapping[str, list[ExtraNetworkParams]]) -> dict[ExtraNetwork, list[ExtraNetworkParams]]:
    """Registered kind -> mentions, including those under an alias. Unknown kinds are left out."""
    found: dict[ExtraNetwork, list[ExtraNetworkParams]] = {}
    for name, params_list in extra_network_data.items():
        if (extra_network := _find(name)) is not None:
            found.setdefault(extra_network, []).extend(params_list)
    return found


def _find(name: str) -> ExtraNetwork | None:
    return extra_network_registry.get(name) or extra_network_aliases.get(name)


def activate(p: Any, extra_network_data: Mapping[str, list[ExtraNetworkParams]]) -> None:
    """Pass every registered kind its mentions, then run the scripts' `after_extra_networks_activate`.

    Unknown and failing kinds are reported as a comment on the job and in the log.
    """
    for name in extra_network_data:
        if _find(name) is None:
            known = ", ".join(sorted({*extra_network_registry, *extra_network_aliases})) or "none"
            _report(p, f"The prompt names an extra network of kind <{name}:...>, which is unknown and was ignored. Known kinds: {known}.")
    wanted = lookup_extra_networks(extra_network_data)
    for extra_network in _all_kinds(wanted):
        _activate_one(p, extra_network, wanted.get(extra_network, []))
    if getattr(p, "scripts", None) is not None:
        p.scripts.after_extra_networks_activate(
            p,
            batch_number=p.iteration,
            prompts=p.prompts,
            seeds=p.seeds,
            subseeds=p.subseeds,
            extra_network_data=extra_network_data,
        )


def _activate_one(p: Any, extra_network: ExtraNetwork, params_list: list[ExtraNetworkParams]) -> None:
    failures: list[str] = []

    def attempt() -> None:
        try:
            extra_network.activate(p, params_list)
        except Exception as error:
            failures.append(str(error) or type(error).__name__)
            raise

    errors.run(attempt, f"activating extra network {extra_network.name}")
    if failures:
        named = ", ".join(f"<{extra_network.name}:{':'.join(params.items)}>" for params in params_list) or f"Extra network {extra_network.name}"
        _report(p, f"{named} could not be applied and was ignored: {failures[0]}")


def deactivate(p: Any, extra_network_data: Mapping[str, list[ExtraNetworkParams]]) -> None:
    """Tell every registered kind that the job has ended. If one fails, the others are still told."""
    for extra_network in _all_kinds(lookup_extra_networks(extra_network_data)):
        errors.run(partial(extra_network.deactivate, p), f"deactivating extra network {extra_network.name}")


def _all_kinds(wanted: Iterable[ExtraNetwork]) -> list[ExtraNetwork]:
    return list(dict.fromkeys([*wanted, *extra_network_registry.values(), *extra_network_aliases.values()]))


def _report(p: Any, message: str) -> None:
    log.warning("%s", message)
    comment = getattr(p, "comment", None)
    if callable(comment):
        comment(message)


# descriptions


def get_user_metadata(filename: str | Path, lister: Any = None) -> dict[str, Any]:
    """The user's metadata of a model file, from the .json next to it; {} if there is none. `lister.exists(path)` avoids disk access."""
    path = Path(filename).with_suffix(".json")
    if not (lister.exists(str(path)) if lister is not None else path.is_file()):
        return {}
    try:
        data = read_json_file(path, max_bytes=16 * 2**20)
    except (OSError, ForeignJsonError) as error:
        log.warning("The description %s of a model cannot be read and is ignored: %s", path, error)
        return {}
    return data if isinstance(data, dict) else {}


def read_description(path: Path) -> dict[str, Any]:
    """A description about to be rewritten; {} if there is none. Raises OSError for a file whose content would be lost."""
    if not path.exists():
        return {}
    try:
        data = read_json_file(path, max_bytes=16 * 2**20)
    except ForeignJsonError as error:
        raise FileExistsError(f"{path.name} next to the model is not a readable description ({error}). Move it away, then save again.") from error
    if not isinstance(data, dict):
        raise FileExistsError(f"{path.name} next to the model is JSON, but not a description. Move it away, then save again.")
    return data
