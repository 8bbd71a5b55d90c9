"""The commands of `python -m modules.cluster`, and the start of an engine on a worker. An entry point of its own, like launch.py: it reads the
command line and the environment.

    python -m modules.cluster head                              # once, on the machine that holds the cluster together
    python -m modules.cluster worker --address HEAD             # on every machine with GPUs
    python -m modules.cluster worker --address HEAD -- --models-dir /models --virtual-gpus ...
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import logging
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.app_config import SCRIPT_DIR, AppConfig
from modules.cluster import joining
from modules.cluster.versions import collect_versions
from modules.launch.cmd_args import FlagError, parse_config
from modules.launch.env import library_environment
from modules.launch.errors import SetupError
from modules.launch.start import setup_logging
from modules.launch.version import program_version

if TYPE_CHECKING:
    from modules.cluster.engine import WorkerEngine

log = logging.getLogger(__name__)

CACHE_FOLDER = "cache/cluster"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    setup_logging("INFO")
    words = list(sys.argv[1:] if argv is None else argv)
    own, flags = _split_flags(words)
    ns = build_parser().parse_args(own)
    try:
        return _run(ns, flags)
    except (SetupError, FlagError) as error:
        log.error("%s", error)
        return 1
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of both commands."""
    parser = argparse.ArgumentParser(prog="python -m modules.cluster", description="Joins machines to a cluster; see docs/cluster.md.")
    commands = parser.add_subparsers(dest="command", required=True)
    head = commands.add_parser("head", help="start the head of a cluster on this machine")
    head.add_argument("--port", type=int, default=joining.HEAD_PORT, help="port that workers and the front connect to (default: 6379)")
    head.add_argument("--no-worker", action="store_true", help="make no pictures on this machine")
    worker = commands.add_parser("worker", help="let this machine make pictures for the cluster; flags of launch.py follow --")
    worker.add_argument("--address", required=True, metavar="HEAD", help="host name or HOST:PORT of the head")
    worker.add_argument("--num-gpus", type=int, metavar="N", help="GPUs to offer (default: all)")
    return parser


def _split_flags(words: list[str]) -> tuple[list[str], list[str]]:
    """The command's own words, and the flags for the engine after `--`."""
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


def _run(ns: argparse.Namespace, flags: list[str]) -> int:
    parse_config(flags, {})  # a mistake is told here, and not by a worker that does not start
    require_ray()
    environ = joining.worker_environment(os.environ, flags)
    if ns.command == "head":
        return joining.run(joining.head_command(ns.port, computes=not ns.no_worker), environ)
    address = joining.complete_address(ns.address)
    joining.check_reachable(address)
    return joining.run(joining.worker_command(address, ns.num_gpus), environ)


def require_ray() -> None:
    """Raises SetupError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise SetupError("Ray is not installed. Run: pip install -r requirements_cluster.txt")


def versions_of(config: AppConfig) -> dict[str, str]:
    """What front and worker compare."""
    return collect_versions(SCRIPT_DIR, config.extensions_dir, program_version())


# On a worker


def worker_config() -> AppConfig:
    """The configuration of this machine's engine: its own flags, no page, and the folders of files that the front sends."""
    config = parse_config(shlex.split(os.environ.get(joining.FLAGS_VARIABLE, "")), {})
    cache = config.data_dir / CACHE_FOLDER
    nowhere = config.data_dir / CACHE_FOLDER / "no-settings.json"  # settings come with each order
    return dataclasses.replace(
        config,
        nowebui=True,
        cluster=None,
        settings_file=nowhere,
        ckpt_dirs=(*config.ckpt_dirs, cache / "checkpoint"),
        vae_dirs=(*config.vae_dirs, cache / "module"),
        lora_dirs=(*config.lora_dirs, cache / "network"),
        disable_console_progressbars=True,
    )


def start_worker_engine(name: str, address: str) -> WorkerEngine:
    """The engine of this process, ready for orders. Raises SetupError, DeviceError."""
    from modules import application, scripts  # they and what follows import the engine's parts, which --help does not need
    from modules.cluster.engine import WorkerEngine
    from modules.cluster.files import FileCache
    from modules.launch.devices import find_devices

    config = worker_config()
    os.environ.update(library_environment(config, os.environ))
    setup_logging(config.loglevel, config.log_format)
    find_devices(config)
    app = application.build_application(config)
    application.install(app)
    scripts.load_scripts(app)
    if scripts.scripts_data:
        from modules.scripts.without_page import build_controls  # imports gradio

        build_controls(app)
    place = {"machine": platform.node(), "address": address, "pid": os.getpid()}
    facts: dict[str, Any] = {"worker": name, **place, "versions": versions_of(config)}
    return WorkerEngine(app, FileCache(config.data_dir / CACHE_FOLDER, own_dirs_of(config)), facts=facts)


def own_dirs_of(config: AppConfig) -> dict[str, tuple[Path, ...]]:
    """This machine's model folders by the kind of file."""
    return {"checkpoint": config.ckpt_dirs, "module": (*config.vae_dirs, *config.text_encoder_dirs), "network": config.lora_dirs}
