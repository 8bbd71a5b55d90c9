"""Flags that do nothing in this run, and why. Each is one table row; only `find_inert_flags` reads the table.

`FLAG_ROWS` depend on the command line alone, `DEVICE_ROWS` also on the devices found. Imports in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CPU, MPS, VIRTUAL = "cpu", "mps", "virtual"
CUDA_KINDS = frozenset({"cuda", "rocm"})


@dataclass(frozen=True, kw_only=True, slots=True)
class FlagFacts:
    """Facts that decide whether a flag acts: all flags by name with underscores, the kind of each computing device, and the GPUs of all slots."""

    flags: Mapping[str, Any]
    kinds: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    has_screen: bool = True

    def has(self, *names: str) -> bool:
        """Whether any of these flags was given."""
        return any(is_given(self.flags.get(name)) for name in names)

    def has_only(self, *kinds: str) -> bool:
        """Whether every computing device is of these kinds."""
        return set(self.kinds) <= set(kinds)


@dataclass(frozen=True, slots=True)
class Row:
    """`flags` have no effect if `applies`; `reason` completes the sentence "... has no effect"."""

    flags: tuple[str, ...]
    applies: Callable[[FlagFacts], bool]
    reason: str


def is_given(value: object) -> bool:
    """Whether a flag's value differs from that of an absent flag. 0 counts as a value."""
    return not (value is None or value is False or value in ([], "auto"))


def find_inert_flags(rows: Iterable[Row], facts: FlagFacts, given: Collection[str] | None = None) -> list[str]:
    """One sentence per flag that was given but does nothing, from the first matching row. `given`: flags as typed; default: derived from values."""
    found: dict[str, str] = {}
    for row in rows:
        flags = [flag for flag in row.flags if (flag in given if given is not None else facts.has(flag[2:].replace("-", "_")))]
        if flags and row.applies(facts):
            for flag in flags:
                found.setdefault(flag, f"{flag} has no effect{row.reason}.")
    return list(found.values())


def _is_without_api(facts: FlagFacts) -> bool:
    return not facts.has("api", "nowebui")


def _is_without_page(facts: FlagFacts) -> bool:
    return facts.has("nowebui")


def _stays_whole(facts: FlagFacts) -> bool:
    return facts.has("always_gpu", "always_high_vram")


def _computes_in_full(facts: FlagFacts) -> bool:
    return facts.has("all_in_fp32", "no_half")


def _names_more_than_one(facts: FlagFacts) -> bool:
    return len(str(facts.flags.get("device_id") or "").split(",")) > 1


FLAG_ROWS = (
    Row(("--multi-gpu-strategy",), lambda f: not f.has("multi_gpu"), " without --multi-gpu"),
    Row(
        ("--device-id",), lambda f: _names_more_than_one(f) and not f.has("multi_gpu"),
        " beyond its first device: without --multi-gpu only one device is used",
    ),
    Row(("--gpus-per-replica", "--cluster-workers"), lambda f: not f.has("cluster"), " without --cluster"),
    Row(("--share",), _is_without_page, " with --nowebui: it shares the page"),
    Row(("--autolaunch",), _is_without_page, " with --nowebui: there is no page to open"),
    Row(("--autolaunch",), lambda f: not f.has_screen, ": this machine has no screen for a browser"),
    Row(("--theme", "--controlnet", "--enable-insecure-extension-access"), _is_without_page, " with --nowebui: there is no page"),
    Row(
        ("--gradio-auth", "--gradio-auth-path"), _is_without_page,
        " on /sdapi: with --nowebui there is no page. Use --api-auth USER:PASSWORD or --api-auth-file FILE",
    ),
    Row(
        ("--api-auth", "--api-auth-file"), _is_without_api,
        " on the page: there is no API without --api. Use --gradio-auth USER:PASSWORD or --gradio-auth-path FILE",
    ),
    Row(("--api-server-stop",), _is_without_api, ": there is no API without --api or --nowebui"),
    Row(("--api",), _is_without_page, ": --nowebui serves the API already"),
    Row(("--listen",), lambda f: f.has("server_name"), ": --server-name sets the address"),
    Row(
        ("--enable-insecure-extension-access",), lambda f: not f.has("listen", "server_name", "share"),
        ": only this machine can reach the page, and it may change extensions anyway. The flag matters with --listen, --server-name or --share",
    ),
    Row(("--freeze-settings-in-sections", "--freeze-specific-settings"), lambda f: f.has("freeze_settings"), ": --freeze-settings freezes all"),
    Row(("--disable-extra-extensions", "--controlnet"), lambda f: f.has("disable_all_extensions"), ": --disable-all-extensions loads none"),
    Row(("--sdxl",), lambda f: f.has("nowebui") and f.has("ckpt"), ": --ckpt names the checkpoint, and there is no page with --nowebui"),
    Row(
        ("--skip-install", "--no-install-extensions", "--reinstall-torch", "--reinstall-xformers"), lambda f: f.has("skip_prepare_environment"),
        ": --skip-prepare-environment skips setup",
    ),
    Row(
        ("--no-install-extensions", "--reinstall-torch", "--reinstall-xformers"), lambda f: f.has("skip_install"), ": --skip-install installs nothing"
    ),
    Row(("--reinstall-xformers",), lambda f: not f.has("xformers"), " without --xformers"),
    Row(("--cpu-offload", "--pin-shared-memory", "--cuda-stream"), _stays_whole, ": --always-gpu and --always-high-vram keep models whole on GPU"),
    Row(("--force-upcast-attention", "--disable-attention-upcast"), _computes_in_full, ": everything is computed in 32 bits"),
)  # fmt: skip

_VRAM_FLAGS = ("--always-high-vram", "--always-normal-vram", "--always-low-vram", "--always-no-vram", "--lowvram", "--cpu-offload")
_OFFLOAD_FLAGS = ("--always-gpu", "--medvram", "--always-offload-from-vram", "--vae-in-cpu")
_HAS_NO_GPU = ": no GPU is in use; weights stay in main memory"


def _has_no_cuda(facts: FlagFacts) -> bool:
    return not CUDA_KINDS & set(facts.kinds)


def _has_one_slot(facts: FlagFacts) -> bool:
    return len(facts.kinds) == 1


def _names_no_gpu_twice(facts: FlagFacts) -> bool:
    return len(set(facts.gpus)) == len(facts.gpus)


DEVICE_ROWS = (
    Row(_VRAM_FLAGS + _OFFLOAD_FLAGS, lambda f: f.has_only(CPU), _HAS_NO_GPU),
    Row(_VRAM_FLAGS, lambda f: f.has_only(MPS), ": the GPU shares main memory; weights stay there"),
    Row(("--cuda-stream",), _has_no_cuda, ": no CUDA device is in use; weights are moved when their layer runs"),
    Row(("--compile-dequantization",), _has_no_cuda, ": no CUDA device is in use; weights are dequantized step by step"),
    Row(("--pin-shared-memory", "--cuda-malloc", "--gpu-device-id"), _has_no_cuda, ": no CUDA device is in use"),
    Row(("--cuda-graphs",), lambda f: f.flags.get("cuda_graphs") != "off" and _has_no_cuda(f), ": no CUDA device is in use"),
    Row(("--fast-fp8",), lambda f: "cuda" not in f.kinds, ": no NVIDIA GPU is in use; weights are dequantized"),
    Row(("--disable-gpu-warning",), _has_no_cuda, ": the warning is only about CUDA devices"),
    Row(("--cpu-threads-per-slot",), lambda f: CPU not in f.kinds, ": no slot computes on the CPU"),
    Row(("--multi-gpu", "--multi-gpu-strategy"), _has_one_slot, ": there is one device. Name more with --device-id"),
    Row(("--virtual-gpus",), lambda f: VIRTUAL not in f.kinds, ": --device-id names no virtual GPU"),
    Row(("--allow-shared-slots",), _names_no_gpu_twice, ": no GPU is named twice in --device-id"),
    Row(
        ("--force-upcast-attention", "--disable-attention-upcast"), lambda f: f.has_only(CPU, VIRTUAL) and not f.has("all_in_fp16"),
        ": the CPU computes in 32 bits",
    ),
)  # fmt: skip
