"""Each flag that has no effect in a run says so in one line."""

from __future__ import annotations

from typing import Any

import pytest

from modules.launch.cmd_args import build_parser, parse_config
from modules.launch.inert_flags import DEVICE_ROWS, FLAG_ROWS, FlagFacts, find_inert_flags

FLAG_CASES = (
    (["--multi-gpu-strategy", "auto"], "--multi-gpu-strategy", ["--multi-gpu"]),
    (["--device-id", "0,1"], "--device-id", ["--multi-gpu"]),
    (["--nowebui", "--share"], "--share", None),
    (["--nowebui", "--autolaunch"], "--autolaunch", None),
    (["--nowebui", "--theme", "dark"], "--theme", None),
    (["--nowebui", "--controlnet"], "--controlnet", None),
    (["--nowebui", "--gradio-auth", "a:b"], "--gradio-auth", None),
    (["--nowebui", "--api"], "--api", None),
    (["--nowebui", "--sdxl", "--ckpt", __file__], "--sdxl", None),
    (["--api-auth", "a:b"], "--api-auth", ["--api"]),
    (["--api-auth", "a:b"], "--api-auth", ["--nowebui"]),
    (["--api-server-stop"], "--api-server-stop", ["--api"]),
    (["--listen", "--server-name", "127.0.0.2"], "--listen", None),
    (["--enable-insecure-extension-access"], "--enable-insecure-extension-access", ["--listen"]),
    (["--freeze-settings", "--freeze-specific-settings", "samples_format"], "--freeze-specific-settings", None),
    (["--disable-all-extensions", "--disable-extra-extensions"], "--disable-extra-extensions", None),
    (["--disable-all-extensions", "--controlnet"], "--controlnet", None),
    (["--skip-prepare-environment", "--skip-install"], "--skip-install", None),
    (["--skip-install", "--reinstall-torch"], "--reinstall-torch", None),
    (["--reinstall-xformers"], "--reinstall-xformers", ["--xformers"]),
    (["--always-gpu", "--cpu-offload"], "--cpu-offload", None),
    (["--always-high-vram", "--cuda-stream"], "--cuda-stream", None),
    (["--no-half", "--force-upcast-attention"], "--force-upcast-attention", None),
)
DEVICE_CASES: tuple[tuple[str, object, tuple[str, ...], tuple[str, ...]], ...] = (
    ("--medvram", True, ("cpu",), ("cpu", "cuda")),
    ("--always-low-vram", True, ("cpu", "cpu"), ("virtual",)),
    ("--lowvram", True, ("mps",), ("cuda",)),
    ("--vae-in-cpu", True, ("cpu",), ("mps",)),
    ("--always-offload-from-vram", True, ("cpu",), ("virtual", "virtual")),
    ("--cpu-offload", True, ("mps",), ("rocm",)),
    ("--pin-shared-memory", True, ("virtual",), ("cuda",)),
    ("--cuda-stream", True, ("cpu",), ("virtual", "cuda")),
    ("--cuda-malloc", True, ("xpu",), ("cuda",)),
    ("--cuda-graphs", "on", ("cpu", "virtual"), ("cuda",)),
    ("--fast-fp8", True, ("rocm", "virtual"), ("cuda",)),
    ("--compile-dequantization", True, ("cpu", "virtual"), ("rocm",)),
    ("--gpu-device-id", 0, ("virtual",), ("cuda",)),
    ("--disable-gpu-warning", True, ("virtual",), ("rocm",)),
    ("--cpu-threads-per-slot", 2, ("virtual", "virtual"), ("virtual", "cpu")),
    ("--multi-gpu", True, ("cuda",), ("cuda", "cuda")),
    ("--virtual-gpus", "1GB", ("cpu",), ("virtual",)),
    ("--disable-attention-upcast", True, ("virtual", "cpu"), ("cuda",)),
)


def notices_of(flag: str, words: list[str], **environ: str) -> list[str]:
    return [notice for notice in parse_config(words, {"DISPLAY": ":0", **environ}).notices if notice.startswith(f"{flag} has no effect")]


@pytest.mark.parametrize(("words", "flag", "cure"), FLAG_CASES, ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_what_follows_from_the_flags_is_said_once_and_only_then(words: list[str], flag: str, cure: list[str] | None) -> None:
    assert len(notices_of(flag, words)) == 1
    alone = words[words.index(flag) :] if cure is None else [*words, *cure]
    if cure is None:
        alone = alone[:2] if len(alone) > 1 and not alone[1].startswith("--") else alone[:1]
    assert notices_of(flag, alone) == []


@pytest.mark.parametrize(("flag", "value", "inert", "acting"), DEVICE_CASES)
def test_what_follows_from_the_devices_is_said_once_and_only_then(flag: str, value: object, inert: tuple[str, ...], acting: tuple[str, ...]) -> None:
    flags: dict[str, Any] = {flag[2:].replace("-", "_"): value}
    (sentence,) = find_inert_flags(DEVICE_ROWS, FlagFacts(flags=flags, kinds=inert))
    assert sentence.startswith(f"{flag} has no effect")
    assert find_inert_flags(DEVICE_ROWS, FlagFacts(flags=flags, kinds=acting)) == []
    assert find_inert_flags(DEVICE_ROWS, FlagFacts(flags={}, kinds=inert)) == []


def test_slots_are_shared_where_a_gpu_is_named_twice() -> None:
    flags = {"allow_shared_slots": True}
    assert find_inert_flags(DEVICE_ROWS, FlagFacts(flags=flags, kinds=("cuda", "cuda"), gpus=("cuda:0", "cuda:0"))) == []
    assert len(find_inert_flags(DEVICE_ROWS, FlagFacts(flags=flags, kinds=("cpu", "cpu")))) == 1


def test_a_browser_needs_a_screen() -> None:
    flags = {"autolaunch": True}
    assert find_inert_flags(FLAG_ROWS, FlagFacts(flags=flags)) == []
    assert "screen" in find_inert_flags(FLAG_ROWS, FlagFacts(flags=flags, has_screen=False))[0]


def test_the_tables_name_flags_and_facts_that_exist() -> None:
    known = {option for action in build_parser()._actions for option in action.option_strings}
    assert {flag for row in (*FLAG_ROWS, *DEVICE_ROWS) for flag in row.flags} <= known
