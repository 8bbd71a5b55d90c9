"""The command line: all flags, and the parser that turns them into an `AppConfig`.

Imports in milliseconds. argv and the environment are passed in; this file reads neither.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from backend.args import ConfigError, add_backend_arguments, backend_config_from_namespace, flag_name
from modules.app_config import SCRIPT_DIR, AppConfig
from modules.launch.extension_folders import active_folders
from modules.launch.inert_flags import FLAG_ROWS, FlagFacts, find_inert_flags
from modules.launch.script_loading import preload_extensions

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
CHECKPOINT_SUFFIXES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth")

# Accepted for the sake of old scripts, without effect: flag -> (takes a value? None = optional value, what is true instead).
NO_EFFECT: Mapping[str, tuple[bool | None, str]] = MappingProxyType(
    {
        "--config": (True, "the network's configuration is read from the checkpoint itself"),
        "--vae-path": (True, "put the file into models/VAE and choose it on the page"),
        "--ngrok": (True, "ngrok is not built in; use --share, or run your own tunnel"),
        "--ngrok-options": (True, "ngrok is not built in"),
        "--ngrok-region": (True, "ngrok is not built in"),
        "--directml": (None, "DirectML is not supported"),
        "--use-ipex": (False, "torch's own xpu device is used if present"),
        "--disable-ipex-hijack": (False, "nothing is patched for IPEX"),
        "--medvram-sdxl": (False, "memory is planned per model; --medvram applies to all"),
        "--lowram": (False, "checkpoints are mapped from disk, not read into memory"),
        "--precision": (True, "use --all-in-fp32 or --all-in-fp16"),
        "--upcast-sampling": (False, "precision is chosen per device; --all-in-fp32 forces 32 bits"),
        "--always-batch-cond-uncond": (False, "they are batched whenever memory allows"),
        "--disable-safe-unpickle": (False, "pickled files are always read by the restricted unpickler"),
        "--disable-model-loading-ram-optimization": (False, "checkpoints are mapped from disk"),
        "--disable-opt-split-attention": (False, "choose with --attention-pytorch, --attention-split or --attention-quad"),
        "--opt-split-attention-v1": (False, "use --attention-split"),
        "--opt-split-attention-invokeai": (False, "use --attention-split"),
        "--sub-quad-q-chunk-size": (True, "chunk sizes depend on free memory"),
        "--sub-quad-kv-chunk-size": (True, "chunk sizes depend on free memory"),
        "--sub-quad-chunk-threshold": (True, "chunk sizes depend on free memory"),
        "--opt-channelslast": (False, "the memory format is chosen per device"),
        "--force-enable-xformers": (False, "use --xformers"),
        "--xformers-flash-attention": (False, "xformers chooses its own kernels"),
        "--skip-google-blockly": (False, "it is not part of this program"),
        "--do-not-download-clip": (False, "nothing is downloaded for it"),
        "--no-download-sd-model": (False, "no model is downloaded"),
        "--skip-load-model-at-start": (False, "models are loaded when needed"),
        "--gfpgan-dir": (True, "use --gfpgan-models-path"),
        "--gfpgan-model": (True, "use --gfpgan-models-path"),
        "--unload-gfpgan": (False, "memory is freed when needed"),
        "--no-progressbar-hiding": (False, "the progress bar is not hidden"),
        "--max-batch-count": (True, "there is no such limit"),
        "--show-negative-prompt": (False, "the field is always shown"),
        "--gradio-img2img-tool": (True, "there is one editor"),
        "--gradio-inpaint-tool": (True, "there is one editor"),
        "--gradio-queue": (False, "the queue is always on"),
        "--no-gradio-queue": (False, "the queue is always on"),
        "--gradio-debug": (False, "use --loglevel DEBUG"),
        "--administrator": (False, "nothing checks it"),
        "--deepdanbooru": (False, "it is not part of this program"),
        "--deepdanbooru-projects-path": (True, "it is not part of this program"),
        "--add-stop-route": (False, "use --api-server-stop"),
        "--skip-version-check": (False, "requirements_versions.txt fixes the versions"),
        "--skip-torch-cuda-test": (False, "without a GPU, the CPU is used"),
        "--update-check": (False, "extensions are not updated at start"),
        "--update-all-extensions": (False, "extensions are not updated at start"),
        "--lyco-dir-backcompat": (True, "put the files into models/Lora or use --lora-dir"),
        "--clip-models-path": (True, "text encoders come from the checkpoint or models/text_encoder"),
        "--controlnet-tracemalloc": (False, "use --profile"),
        "--test-server": (False, "use --data-dir with a separate folder"),
        "--ui-debug-mode": (False, "models are loaded when needed"),
        "--disable-tls-verify": (False, "the server never verifies its own certificate"),
        "--use-textbox-seed": (False, "there is only one kind of seed field"),
        "--textual-inversion-templates-dir": (True, "embeddings are not trained here"),
        "--enable-console-prompts": (False, "the terminal shows one line per job and load; see --loglevel"),
    }
)

# Flags for features that do not exist yet: flag -> what happens until then. `tests/contract/test_flags.py` tells when an entry can go.
NOT_YET: Mapping[str, str] = MappingProxyType(
    {
        "--controlnet-loglevel": "ControlNet uses --loglevel",
        "--hypernetwork-dir": "hypernetworks are not read",
        "--unix-filenames-sanitization": "file names are valid on all systems",
        "--codeformer-models-path": "there is no face restoration",
        "--gfpgan-models-path": "there is no face restoration",
    }
)

# Folders under the models folder that a flag can move: flag -> folder name.
MODEL_FOLDERS: Mapping[str, str] = MappingProxyType(
    {
        "--hypernetwork-dir": "hypernetworks",
        "--codeformer-models-path": "Codeformer",
        "--gfpgan-models-path": "GFPGAN",
        "--esrgan-models-path": "ESRGAN",
        "--bsrgan-models-path": "BSRGAN",
        "--realesrgan-models-path": "RealESRGAN",
        "--dat-models-path": "DAT",
        "--scunet-models-path": "ScuNET",
        "--swinir-models-path": "SwinIR",
        "--controlnet-preprocessor-models-dir": "ControlNetPreprocessor",
    }
)

# Folders searched in addition to a standard one: flag -> (base of the standard folder, its name, the folder used from an A1111 installation).
EXTRA_FOLDERS: Mapping[str, tuple[str, str, str | None]] = MappingProxyType(
    {
        "--ckpt-dir": ("models", "Stable-diffusion", "models/Stable-diffusion"),
        "--vae-dir": ("models", "VAE", "models/VAE"),
        "--text-encoder-dir": ("models", "text_encoder", None),
        "--lora-dir": ("models", "Lora", "models/Lora"),
        "--controlnet-dir": ("models", "ControlNet", "models/ControlNet"),
        "--embeddings-dir": ("data", "embeddings", "embeddings"),
    }
)


class FlagError(ValueError):
    """The command line names something that does not exist, or contradicts itself; the message is for the user."""


class _Parser(ArgumentParser):
    """An argument parser that raises instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise FlagError(f"{message[:1].upper()}{message[1:]}. `python launch.py --help` lists all flags.")


def build_parser() -> ArgumentParser:
    """The parser with every flag. Most callers want `parse_config`."""
    parser = _Parser(prog="launch.py", allow_abbrev=False, description="A WebUI for Stable Diffusion that uses more than one GPU.")
    add_backend_arguments(parser)
    _add_launcher_arguments(parser)
    _add_server_arguments(parser)
    _add_folder_arguments(parser)
    _add_cluster_arguments(parser)
    _add_page_arguments(parser)
    _add_extension_arguments(parser)
    _add_no_effect_arguments(parser)
    return parser


def _add_switches(group: Any, switches: Mapping[str, str]) -> None:
    for flag, what in switches.items():
        group.add_argument(flag, action="store_true", help=what)


def _add_launcher_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("setup and diagnostics")
    switches = {
        "--exit": "stop after setup",
        "--skip-install": "never install a package",
        "--no-install-extensions": "run no installers of extensions",
        "--skip-prepare-environment": "skip setup: no virtual environment, no packages, no extension installers",
        "--skip-python-version-check": "allow an unsupported Python",
        "--reinstall-torch": "install torch again",
        "--reinstall-xformers": "install xformers again",
        "--dump-sysinfo": "write information about this machine to a file, then stop",
        "--log-startup": "print how long each startup step took",
        "--list-gpus": "print the devices, then stop",
    }
    _add_switches(group, switches)
    group.add_argument("--log-format", choices=("text", "json"), default="text", help="json: one JSON object per line, with the job's id")
    group.add_argument("--loglevel", type=str.upper, choices=LOG_LEVELS, help="how much to print (default: INFO)")


def _add_server_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--listen", action="store_true", help="accept connections from other computers (host 0.0.0.0)")
    group.add_argument("--server-name", metavar="HOST", help="host name or address to listen on (default: 127.0.0.1)")
    group.add_argument("--port", type=int, metavar="N", help="port to listen on (default: 7860; 7861 with --nowebui)")
    group.add_argument("--subpath", metavar="PATH", help="path prefix of this server behind a reverse proxy")
    group.add_argument("--timeout-keep-alive", type=int, default=30, metavar="SECONDS", help="how long to keep idle connections open (default: 30)")
    group.add_argument("--api-auth", metavar="USER:PASSWORD", help="logins for API clients, separated by commas")
    group.add_argument("--api-auth-file", metavar="FILE", help="a file with USER:PASSWORD for API clients, separated by commas or newlines")
    group.add_argument("--gradio-auth", metavar="USER:PASSWORD", help="logins for the page, separated by commas")
    group.add_argument("--gradio-auth-path", metavar="FILE", help="a file with USER:PASSWORD for the page, separated by commas or newlines")
    group.add_argument(
        "--gradio-allowed-path", action="append", default=[], metavar="PATH", help="a folder whose files the page may show; may be repeated"
    )
    group.add_argument(
        "--allowed-hosts",
        metavar="NAMES",
        help="host names of this server behind a reverse proxy, separated by commas; *.example.org and * work",
    )
    group.add_argument("--cors-allow-origins", metavar="URLS", help="origins whose pages may call the API, separated by commas")
    group.add_argument("--cors-allow-origins-regex", metavar="PATTERN", help="the same, as a regular expression")
    group.add_argument("--tls-keyfile", metavar="FILE", help="private key, for https")
    group.add_argument("--tls-certfile", metavar="FILE", help="certificate, for https")
    switches = {
        "--api": "serve the REST API in addition to the page",
        "--nowebui": "serve the REST API without the page",
        "--api-log": "log API calls",
        "--api-server-stop": "let API clients stop or restart the server",
        "--allow-code": "run Python code from the page and the API (script Custom code), for users of this machine or with a password",
        "--share": "create a public link with gradio",
        "--autolaunch": "open the page in a browser",
    }
    _add_switches(group, switches)


def _add_cluster_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("more machines (docs/cluster.md)")
    group.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="make pictures on the workers of a Ray cluster: ray://HEAD:10001, HEAD:6379, auto (the cluster this machine belongs to) "
        "or local (a cluster of this machine alone)",
    )
    group.add_argument("--gpus-per-replica", type=float, metavar="N", help="GPUs of one worker, fractions too (default: all GPUs of its machine)")
    group.add_argument("--cluster-workers", metavar="MIN-MAX", help="how many workers to run, by queue length (default: one per machine)")
    group.add_argument("--queue-limit", type=int, default=256, metavar="N", help="jobs that may wait; more are answered 503 (default: 256)")


def _add_folder_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("files and folders")
    group.add_argument(
        "--data-dir", default=str(SCRIPT_DIR), metavar="DIR", help="folder for settings, outputs and models (default: this program's folder)"
    )
    group.add_argument("--models-dir", metavar="DIR", help="folder for models (default: models in the data folder)")
    group.add_argument("--ckpt", metavar="FILE", help="the checkpoint to start with")
    for flag, (_, folder, _) in EXTRA_FOLDERS.items():
        group.add_argument(flag, action="append", default=[], metavar="DIR", help=f"an additional folder besides {folder}; may be repeated")
    for flag, folder in MODEL_FOLDERS.items():
        group.add_argument(flag, metavar="DIR", help=f"use this folder instead of {folder} in the models folder")
    group.add_argument("--localizations-dir", metavar="DIR", help="use this folder instead of localizations")
    group.add_argument("--forge-ref-a1111-home", metavar="DIR", help="also use the models of this A1111 installation")
    group.add_argument("--ui-settings-file", metavar="FILE", help="settings file (default: config.json in the data folder)")
    group.add_argument("--ui-config-file", metavar="FILE", help="start values of the page's fields (default: ui-config.json in the data folder)")
    group.add_argument(
        "--styles-file", action="append", default=[], metavar="FILE", help="prompt styles (default: styles.csv in the data folder); repeatable"
    )
    group.add_argument("--filenames-max-length", type=int, default=128, metavar="N", help="maximum length of picture file names (default: 128)")
    group.add_argument("--unix-filenames-sanitization", action="store_true", help="allow every character that Linux allows in file names")
    group.add_argument("--no-hashing", action="store_true", help="do not compute sha256 of checkpoints")
    group.add_argument("--no-prompt-history", action="store_true", help="do not write params.txt")


def _add_page_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("page and settings")
    group.add_argument("--theme", choices=("light", "dark"), help="color scheme of the page")
    group.add_argument("--freeze-settings-in-sections", metavar="SECTIONS", help="lock the settings in these sections")
    group.add_argument("--freeze-specific-settings", metavar="NAMES", help="lock these settings")
    group.add_argument("--controlnet-loglevel", default="INFO", metavar="LEVEL", help="how much ControlNet prints")
    switches = {
        "--freeze-settings": "lock all settings",
        "--hide-ui-dir-config": "hide folder fields on the page",
        "--sdxl": "start with the first SDXL checkpoint and its sizes",
        "--controlnet": "open the ControlNet panel",
        "--disable-console-progressbars": "show no progress bars in the terminal",
        "--disable-nan-check": "do not check results for NaN",
    }
    _add_switches(group, switches)


def _add_extension_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("extensions")
    switches = {
        "--enable-insecure-extension-access": "allow turning extensions on and off from other computers",
        "--disable-all-extensions": "load no extension",
        "--disable-extra-extensions": "load built-in extensions only",
    }
    _add_switches(group, switches)


def _add_no_effect_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("accepted for old scripts, without effect")
    for flag, (takes_value, instead) in NO_EFFECT.items():
        text = instead.replace("%", "%%")
        if takes_value is None:
            group.add_argument(flag, nargs="?", const="-1", metavar="VALUE", help=text)
        elif takes_value:
            group.add_argument(flag, metavar="VALUE", help=text)
        else:
            group.add_argument(flag, action="store_true", help=text)


def split_command_line(text: str, *, windows: bool = os.name == "nt") -> list[str]:
    """Split `COMMANDLINE_ARGS` like a shell; on Windows a backslash is part of a path.

    Raises:
        FlagError: unclosed quotation mark.
    """
    try:
        return shlex.split(text.replace("\\", "\\\\") if windows else text)
    except ValueError as error:
        raise FlagError(f"COMMANDLINE_ARGS={text}: cannot be read ({error}). Close all quotation marks.") from error


def config_for_tests(data_dir: Path, **overrides: Any) -> AppConfig:
    """The configuration of `--data-dir DATA_DIR` without any other flag, with fields replaced; reads neither argv nor the environment."""
    config = parse_config(["--data-dir", str(data_dir)], {})
    same_name = {name: value for name, value in overrides.items() if name in config.flags}
    overrides.setdefault("use_demo", False)  # or no test could be without a checkpoint
    return dataclasses.replace(config, **{"flags": MappingProxyType({**config.flags, **same_name}), **overrides})


def parse_config(argv: Sequence[str], environ: Mapping[str, str]) -> AppConfig:
    """The configuration from `argv` (without the program name) and the variables COMMANDLINE_ARGS, IGNORE_CMD_ARGS_ERRORS, SD_WEBUI_LOG_LEVEL.

    A flag in `argv` wins over the same flag in COMMANDLINE_ARGS. Checks that named files exist; creates nothing.

    Raises:
        FlagError: unknown flags, invalid values, contradicting flags.
    """
    parser = build_parser()
    words = [*split_command_line(environ.get("COMMANDLINE_ARGS", "")), *argv]
    _add_flags_of_extensions(parser, parser.parse_known_args(words)[0])
    ns, unknown = parser.parse_known_args(words)
    notices = _check_unknown(parser, unknown, ignore=bool(environ.get("IGNORE_CMD_ARGS_ERRORS")))
    given = _given_flags(parser, words)
    notices += [f"{flag} has no effect: {NO_EFFECT[flag][1]}." for flag in given if flag in NO_EFFECT]
    notices += [f"{flag} has no effect yet: {NOT_YET[flag]}." for flag in given if flag in NOT_YET]
    notices += _unknown_cpu_parts(ns)
    notices += find_inert_flags(FLAG_ROWS, FlagFacts(flags=vars(ns), has_screen=_has_screen(environ)), given)
    try:
        return _make_config(ns, environ, notices)
    except ConfigError as error:
        raise FlagError(str(error)) from error


def _add_flags_of_extensions(parser: ArgumentParser, ns: Namespace) -> None:
    """Add the flags from `preload.py` of every extension that will be loaded. One that fails is logged, and startup continues."""
    data_dir = Path(ns.data_dir).expanduser().absolute()
    settings_file = Path(ns.ui_settings_file).expanduser() if ns.ui_settings_file else data_dir / "config.json"
    for folder in active_folders(data_dir / "extensions", settings_file, vars(ns)):
        preload_extensions(str(folder.parent), parser, [folder.name])


def _check_unknown(parser: ArgumentParser, unknown: Sequence[str], *, ignore: bool) -> list[str]:
    if not unknown:
        return []
    known = [option for action in parser._actions for option in action.option_strings]
    sentences = []
    for word in unknown:
        name = word.split("=")[0]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6) if name.startswith("-") else []
        sentences.append(f"{word}: there is no such flag" + (f"; did you mean {near[0]}?" if near else "."))
    if ignore:
        return [f"{sentence} It is ignored because IGNORE_CMD_ARGS_ERRORS is set." for sentence in sentences]
    raise FlagError(" ".join(sentences) + " `python launch.py --help` lists all flags.")


def _given_flags(parser: ArgumentParser, words: Sequence[str]) -> list[str]:
    """The flags among the words, each once, in order."""
    known = {option for action in parser._actions for option in action.option_strings}
    return list(dict.fromkeys(word.split("=")[0] for word in words if word.split("=")[0] in known))


def _unknown_cpu_parts(ns: Namespace) -> list[str]:
    parts = [part for part in ns.use_cpu if part.lower() not in ("all", "sd")]
    return [f"--use-cpu {' '.join(parts)} has no effect: only 'all' and 'sd' are known."] if parts else []


def _make_config(ns: Namespace, environ: Mapping[str, str], notices: list[str]) -> AppConfig:
    data_dir = Path(ns.data_dir).expanduser().absolute()
    if data_dir.is_file():
        raise FlagError(f"--data-dir {ns.data_dir}: this is a file. Give a folder.")
    models_dir = Path(ns.models_dir).expanduser().absolute() if ns.models_dir else data_dir / "models"
    folders, folder_notices = _collect_folders(ns, data_dir, models_dir)
    host = ns.server_name or ("0.0.0.0" if ns.listen else "127.0.0.1")
    remote = ns.share or ns.listen or ns.server_name is not None
    flags = _flags_mapping(ns, data_dir, models_dir)
    flags["disable_extension_access"] = remote and not ns.enable_insecure_extension_access
    return AppConfig(
        data_dir=data_dir,
        models_dir=models_dir,
        ckpt=_find_checkpoint(ns.ckpt, folders["ckpt_dirs"]),
        **folders,
        outputs_dir=data_dir / "outputs",
        extensions_dir=data_dir / "extensions",
        settings_file=Path(str(flags["ui_settings_file"])),
        ui_config_file=Path(str(flags["ui_config_file"])),
        styles_files=tuple(Path(name).expanduser().absolute() for name in ns.styles_file) or (data_dir / "styles.csv",),
        host=host,
        **_server_fields(ns),
        **{name: getattr(ns, name) for name in _PLAIN_FIELDS},
        filenames_max_length=_check_range("--filenames-max-length", ns.filenames_max_length, 8, 255),
        has_screen=_has_screen(environ),
        disable_extension_access=bool(flags["disable_extension_access"]),
        loglevel=_log_level(ns, environ),
        log_format=ns.log_format,
        **_cluster_fields(ns),
        backend=backend_config_from_namespace(ns),
        flags=MappingProxyType(flags),
        notices=(*notices, *folder_notices),
    )


_PLAIN_FIELDS = (
    *("share", "autolaunch", "theme", "api", "nowebui", "api_log", "api_server_stop", "allow_code", "no_hashing", "freeze_settings"),
    *("hide_ui_dir_config", "disable_console_progressbars", "sdxl", "controlnet", "list_gpus", "log_startup"),
)


_CLUSTER_ADDRESS = re.compile(r"auto|local|ray://[\w.-]+:\d{1,5}|[\w.-]+:\d{1,5}")


def _cluster_fields(ns: Namespace) -> dict[str, Any]:
    if ns.cluster is not None and not _CLUSTER_ADDRESS.fullmatch(ns.cluster):
        raise FlagError(f"--cluster {ns.cluster}: not an address. Give auto, local, ray://HEAD:10001 or HEAD:6379.")
    if ns.gpus_per_replica is not None and not 0 < ns.gpus_per_replica <= 64:
        raise FlagError(f"--gpus-per-replica {ns.gpus_per_replica}: must be above 0 and at most 64.")
    return {
        "cluster": ns.cluster,
        "gpus_per_replica": ns.gpus_per_replica,
        "cluster_workers": _read_range("--cluster-workers", ns.cluster_workers),
        "queue_limit": _check_range("--queue-limit", ns.queue_limit, 1, 1_000_000),
    }


def _read_range(flag: str, text: str | None) -> tuple[int, int] | None:
    """`"0-8"` -> `(0, 8)`, `"4"` -> `(4, 4)`."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if least > most or most < 1:
        raise FlagError(f"{flag} {text}: must be a number or MIN-MAX, such as 0-8.")
    return least, most


def _server_fields(ns: Namespace) -> dict[str, Any]:
    keyfile, certfile = _find_tls_files(ns)
    return {
        "port": None if ns.port is None else _check_range("--port", ns.port, 1, 65535),
        "subpath": ns.subpath.strip("/") or None if ns.subpath else None,
        "api_auth": _read_logins("--api-auth", ns.api_auth) + _read_login_file("--api-auth-file", ns.api_auth_file),
        "gradio_auth": _read_logins("--gradio-auth", ns.gradio_auth) + _read_login_file("--gradio-auth-path", ns.gradio_auth_path),
        "gradio_allowed_paths": tuple(ns.gradio_allowed_path),
        "allowed_hosts": _split_names(ns.allowed_hosts),
        "cors_origins": _split_names(ns.cors_allow_origins),
        "cors_origins_regex": _check_pattern(ns.cors_allow_origins_regex),
        "tls_keyfile": keyfile,
        "tls_certfile": certfile,
        "timeout_keep_alive_s": _check_range("--timeout-keep-alive", ns.timeout_keep_alive, 1, 86400),
    }


def _has_screen(environ: Mapping[str, str], platform: str = sys.platform) -> bool:
    """False on Linux without a display server: there is no browser to open."""
    return not platform.startswith("linux") or bool(environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY"))


def _check_range(flag: str, value: int, lowest: int, highest: int) -> int:
    if not lowest <= value <= highest:
        raise FlagError(f"{flag} {value}: must be a whole number from {lowest} to {highest}.")
    return value


def _check_pattern(pattern: str | None) -> str | None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise FlagError(f"--cors-allow-origins-regex {pattern}: not a regular expression ({error}).") from error
    return pattern


def _log_level(ns: Namespace, environ: Mapping[str, str]) -> str:
    level = ns.loglevel or environ.get("SD_WEBUI_LOG_LEVEL", "").upper() or "INFO"
    if level not in LOG_LEVELS:
        raise FlagError(f"SD_WEBUI_LOG_LEVEL={level}: unknown level. Choose one of: {', '.join(LOG_LEVELS)}.")
    return level


def _read_logins(source: str, text: str | None) -> tuple[tuple[str, str], ...]:
    """`"ann:secret,bob:pass:word"` -> `(("ann", "secret"), ("bob", "pass:word"))`. The message never repeats a password."""
    logins: list[tuple[str, str]] = []
    for part in re.split(r"[,\r\n]", text or ""):
        user, colon, password = part.strip().partition(":")
        if part.strip() and not (user and colon and password):
            raise FlagError(f"{source}: logins are written USER:PASSWORD, separated by commas; number {len(logins) + 1} is not.")
        if part.strip():
            logins.append((user, password))
    return tuple(logins)


def _read_login_file(flag: str, name: str | None) -> tuple[tuple[str, str], ...]:
    """The logins in a file. An empty file is an error: a user who names one wants password protection."""
    if not name:
        return ()
    try:
        text = _existing_file(flag, name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FlagError(
            f"{flag} {name}: cannot be read as UTF-8 text ({type(error).__name__}). Save it as plain text with USER:PASSWORD lines."
        ) from error
    found = _read_logins(f"{flag} {name}", text)
    if not found:
        raise FlagError(f"{flag} {name}: contains no login. Write USER:PASSWORD into it, one per line.")
    return found


def _split_names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _existing_file(flag: str, name: str) -> Path:
    path = Path(name).expanduser().absolute()
    if not path.is_file():
        raise FlagError(f"{flag} {name}: there is no such file. Check the path; relative paths start at {Path.cwd()}.")
    return path


def _find_tls_files(ns: Namespace) -> tuple[Path | None, Path | None]:
    if bool(ns.tls_keyfile) != bool(ns.tls_certfile):
        missing = "--tls-certfile" if ns.tls_keyfile else "--tls-keyfile"
        raise FlagError(f"https needs both --tls-keyfile and --tls-certfile; {missing} is missing.")
    if not ns.tls_keyfile:
        return None, None
    return _existing_file("--tls-keyfile", ns.tls_keyfile), _existing_file("--tls-certfile", ns.tls_certfile)


def _find_checkpoint(name: str | None, ckpt_dirs: Sequence[Path]) -> Path | None:
    """The file given with `--ckpt`, relative to the current folder or to a checkpoint folder."""
    if not name:
        return None
    candidates = [Path(name).expanduser().absolute(), *(folder / name for folder in ckpt_dirs)]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise FlagError(f"--ckpt {name}: there is no such file, neither in {Path.cwd()} nor in {ckpt_dirs[0]}. {_list_checkpoints(ckpt_dirs)}")
    return found


def _list_checkpoints(ckpt_dirs: Sequence[Path], limit: int = 5) -> str:
    names = sorted(path.name for folder in ckpt_dirs if folder.is_dir() for path in folder.iterdir() if path.suffix.lower() in CHECKPOINT_SUFFIXES)
    if not names:
        return "There is no checkpoint in it yet."
    return f"It contains: {', '.join(names[:limit])}{' ...' if len(names) > limit else ''}."


def _collect_folders(ns: Namespace, data_dir: Path, models_dir: Path) -> tuple[dict[str, Any], list[str]]:
    """The folders of each kind, standard folder first, and a notice for each given folder that does not exist."""
    a1111_dir = _find_a1111(ns.forge_ref_a1111_home)
    folders: dict[str, Any] = {}
    notices: list[str] = []
    for flag, (base, name, a1111_name) in EXTRA_FOLDERS.items():
        dest = flag[2:].replace("-", "_")
        named = [Path(text).expanduser().absolute() for text in getattr(ns, dest)]
        notices += [f"{flag} {path}: there is no such folder; it is ignored." for path in named if not path.is_dir()]
        if a1111_dir and a1111_name and (a1111_dir / a1111_name).is_dir():
            named.append(a1111_dir / a1111_name)
        standard = (models_dir if base == "models" else data_dir) / name
        folders[f"{dest}s"] = tuple(dict.fromkeys([standard, *named]))
    return folders, notices


def _find_a1111(name: str | None) -> Path | None:
    if not name:
        return None
    path = Path(name).expanduser().absolute()
    if not (path / "models").is_dir():
        raise FlagError(f"--forge-ref-a1111-home {name}: there is no models folder in it. Give the folder where A1111 is installed.")
    return path


def _flags_mapping(ns: Namespace, data_dir: Path, models_dir: Path) -> dict[str, Any]:
    """Every flag as extensions read it from `shared.cmd_opts`: single strings for folders, defaults filled in."""
    flags = dict(vars(ns))
    flags.update(data_dir=str(data_dir), models_dir=str(models_dir))
    for flag, folder in MODEL_FOLDERS.items():
        dest = flag[2:].replace("-", "_")
        flags[dest] = flags[dest] or str(models_dir / folder)
    standard = {"lora_dir": models_dir / "Lora", "embeddings_dir": data_dir / "embeddings"}
    for flag in EXTRA_FOLDERS:
        dest = flag[2:].replace("-", "_")
        default = str(standard[dest]) if dest in standard else None
        flags[dest] = flags[dest][-1] if flags[dest] else default
    for dest, name in (("ui_settings_file", "config.json"), ("ui_config_file", "ui-config.json")):
        flags[dest] = str(Path(flags[dest]).expanduser().absolute() if flags[dest] else data_dir / name)
    for dest in ("localizations_dir", "textual_inversion_templates_dir"):
        flags[dest] = flags[dest] or str(SCRIPT_DIR / dest.removesuffix("_dir"))
    return flags


def __getattr__(name: str) -> Any:
    """`parser`, the name extensions import; created on first use."""
    if name != "parser":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault("parser", build_parser())


__all__ = [
    "CHECKPOINT_SUFFIXES",
    "EXTRA_FOLDERS",
    "MODEL_FOLDERS",
    "NOT_YET",
    "NO_EFFECT",
    "FlagError",
    "build_parser",
    "flag_name",
    "parse_config",
    "split_command_line",
]
