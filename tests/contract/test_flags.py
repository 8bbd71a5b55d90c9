"""No flag is silently ignored: it changes something that is read, or says that it has no effect."""

from __future__ import annotations

import argparse
import ast
import dataclasses
from functools import cache
from pathlib import Path

import pytest

from modules.app_config import AppConfig
from modules.launch.cmd_args import NO_EFFECT, NOT_YET, build_parser, parse_config
from tests.contract.sources import product_sources

# Files that define flags and turn them into fields: a name there does not count as use.
MAKERS = {"backend/args.py", "modules/launch/cmd_args.py", "modules/app_config.py", "modules/launch/inert_flags.py"}
COMMANDS = {"backend/parallel/simulate.py"}  # has its own options, some with the same names
NEED = {
    "--multi-gpu-strategy": ["--multi-gpu"],
    "--tls-keyfile": ["--tls-certfile", __file__],
    "--tls-certfile": ["--tls-keyfile", __file__],
    "--enable-insecure-extension-access": ["--listen"],
}
VALUES = {"--device-id": "1", "--virtual-gpus": "1GB", "--use-cpu": "all", "--api-auth": "a:b", "--gradio-auth": "a:b", "--loglevel": "DEBUG"} | {
    "--cluster": "local",
    "--gpus-per-replica": "1",
    "--cluster-workers": "0-4",
}
FILES = ("--tls-keyfile", "--tls-certfile", "--ckpt", "--api-auth-file", "--gradio-auth-path")


@cache
def names_read() -> frozenset[str]:
    """Every attribute, string and keyword in the product's code outside those files."""
    names: set[str] = set()
    for source in product_sources():
        if source.name not in MAKERS | COMMANDS:
            for node in ast.walk(source.tree):
                names.update([node.attr] if isinstance(node, ast.Attribute) else [])
                names.update([node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else [])
    return frozenset(names)


def fields_of(config: AppConfig) -> dict[str, object]:
    """Fields of both configurations; the dict of flags and the notices do not prove an effect."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in ("flags", "notices", "backend")}
    return fields | {field.name: getattr(config.backend, field.name) for field in dataclasses.fields(config.backend)}


def words_of(action: argparse.Action, folder: Path) -> list[str]:
    """The flag as a user might give it, with a non-default value."""
    flag = action.option_strings[0]
    if action.nargs == 0:
        return [flag]
    if flag in FILES:
        path = folder / "file.safetensors"
        path.write_text("a:b")
        return [flag, str(path)]
    if action.choices:
        return [flag, str(list(action.choices)[-1])]
    return [flag, VALUES.get(flag, "9" if action.type is int else str(folder))]


def find_readers(action: argparse.Action, folder: Path) -> set[str]:
    """What the flag changes that some code reads."""
    flag, need = action.option_strings[0], NEED.get(action.option_strings[0], [])
    (folder / "models" / "Stable-diffusion").mkdir(parents=True, exist_ok=True)
    base = [] if flag == "--data-dir" else ["--data-dir", str(folder / "data")]
    before = fields_of(parse_config([*base, *need] if not flag.startswith("--tls") else base, {}))
    after = fields_of(parse_config([*base, *need, *words_of(action, folder)], {}))
    changed = {name for name in before if before[name] != after[name]}
    return {name for name in {*changed, action.dest, flag} if name in names_read()}


ACTIONS = [action for action in build_parser()._actions if action.dest != "help" and action.option_strings[0] not in NO_EFFECT]


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.option_strings[0])
def test_a_flag_is_read_or_says_that_it_has_no_effect(action: argparse.Action, tmp_path: Path) -> None:
    flag = action.option_strings[0]
    readers = find_readers(action, tmp_path)
    if flag in NOT_YET:
        assert readers == set(), f"{flag} is read now ({readers}); take it out of NOT_YET"
    else:
        assert readers != set(), f"nothing reads what {flag} changes; implement it, or name it in NOT_YET"
