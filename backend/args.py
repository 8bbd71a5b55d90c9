"""The engine's configuration: one frozen value, and the flags it is read from.

Knows no argv, no environment and no options page; imports in milliseconds. The owner of the command line passes in the parser.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

VRAM_MODES = ("auto", "always_gpu", "high", "normal", "low", "no", "cpu")
STRATEGIES = ("auto", "replicas", "tiles", "layers", "single")
GRAPH_MODES = ("off", "auto", "on")
STORAGE_TYPES = ("fp32", "fp16", "bf16", "fp8_e4m3fn", "fp8_e5m2")
ATTENTION_KINDS = ("auto", "pytorch", "split", "quad", "xformers")

_DEVICE_ID = re.compile(r"\d+|cpu|mps|xpu(:\d+)?")
_AMOUNT = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMGT]?)I?B?", re.IGNORECASE)
_UNIT_BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_MIN_VIRTUAL_GPU_BYTES = 2**20


dynamic_args: dict[str, Any] = {"embedding_dir": "./embeddings", "emphasis_name": "Original"}
"""Facts that Forge keeps here, for extensions that read them: the folder of embeddings, and of the last batch the emphasis, the stored type of the
denoiser (`forge_unet_storage_dtype`) and whether LoRAs are added while layers run (`online_lora`). The application writes; nothing here reads."""


class ConfigError(ValueError):
    """Two settings contradict each other, or one has an invalid value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendConfig:
    """The engine's settings at startup. `BackendConfig()` means one automatically chosen device.

    `device_ids` are as typed: `"0"` is the first CUDA (or virtual) GPU, `"cpu"` a CPU slot; empty means the best available device.
    `backend.devices.probe_devices` checks whether those devices exist.

    Raises:
        ConfigError: an invalid value, or a GPU named twice without `allow_shared_slots`.
    """

    device_ids: tuple[str, ...] = ()
    multi_gpu: bool = False
    multi_gpu_strategy: str = "auto"
    allow_shared_slots: bool = False
    virtual_gpus_bytes: tuple[int, ...] = ()
    cpu_threads_per_slot: int | None = None

    vram_mode: str = "auto"
    always_offload: bool = False
    cpu_offload: bool = False
    pin_shared_memory: bool = False
    cuda_stream: bool = False
    cuda_malloc: bool = False

    unet_dtype: str | None = None
    vae_dtype: str | None = None
    clip_dtype: str | None = None
    all_in: str | None = None
    vae_in_cpu: bool = False
    fast_fp8: bool = False
    compile_dequantization: bool = False

    attention: str = "auto"
    force_upcast_attention: bool = False
    disable_attention_upcast: bool = False
    deterministic: bool = False
    cuda_graphs: str = "off"

    profile: bool = False
    disable_gpu_warning: bool = False

    def __post_init__(self) -> None:
        _check_choice("--multi-gpu-strategy", self.multi_gpu_strategy, STRATEGIES)
        _check_choice("--cuda-graphs", self.cuda_graphs, GRAPH_MODES)
        _check_choice("the VRAM mode", self.vram_mode, VRAM_MODES)
        _check_choice("the attention kind", self.attention, ATTENTION_KINDS)
        for what, dtype in (("the UNet's type", self.unet_dtype), ("the VAE's type", self.vae_dtype), ("the text encoder's type", self.clip_dtype)):
            _check_choice(what, dtype, (None, *STORAGE_TYPES))
        _check_choice("--all-in", self.all_in, (None, "fp32", "fp16"))
        self._check_devices()
        if self.force_upcast_attention and self.disable_attention_upcast:
            raise ConfigError("--force-upcast-attention and --disable-attention-upcast contradict each other. Leave one out.")

    def _check_devices(self) -> None:
        for device_id in self.device_ids:
            if not _DEVICE_ID.fullmatch(device_id):
                raise ConfigError(
                    f"--device-id {','.join(self.device_ids)}: {device_id!r} is not a device. Use GPU numbers or cpu, as in 0,1 or cpu,cpu."
                )
        gpu_ids = [device_id for device_id in self.device_ids if device_id != "cpu"]
        twice = sorted({device_id for device_id in gpu_ids if gpu_ids.count(device_id) > 1})
        if twice and not self.allow_shared_slots:
            raise ConfigError(
                f"--device-id {','.join(self.device_ids)}: device {twice[0]} is named more than once, so two slots would share one card's memory "
                "and cores. Name each device once, or add --allow-shared-slots if that is what you want."
            )
        if self.vram_mode == "cpu" and gpu_ids:
            raise ConfigError(f"--always-cpu computes on the CPU, but --device-id names device {gpu_ids[0]}. Leave one out.")
        if self.vram_mode == "cpu" and self.virtual_gpus_bytes:
            raise ConfigError("--always-cpu uses no GPU, but --virtual-gpus creates some. Leave one out.")
        if any(need_bytes < _MIN_VIRTUAL_GPU_BYTES for need_bytes in self.virtual_gpus_bytes):
            raise ConfigError("--virtual-gpus: a virtual GPU needs at least 1MB. Give sizes with their unit, as in 6GB,4GB.")
        if self.cpu_threads_per_slot is not None and self.cpu_threads_per_slot < 1:
            raise ConfigError(f"--cpu-threads-per-slot {self.cpu_threads_per_slot}: give a whole number of at least 1.")


def _check_choice(what: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        known = ", ".join(choice for choice in choices if choice is not None)
        raise ConfigError(f"{what}: {value!r} is unknown. Choose one of: {known}.")


def parse_device_ids(text: str) -> tuple[str, ...]:
    """`"0, cuda:1,CPU"` -> `("0", "1", "cpu")`.

    Raises:
        ConfigError: an empty part, or a name that is not a device.
    """
    names = [part.strip().lower().removeprefix("cuda:") for part in text.split(",")]
    for name in names:
        if not _DEVICE_ID.fullmatch(name):
            raise ConfigError(f"--device-id {text}: {name!r} is not a device. Use GPU numbers or cpu, separated by commas, as in 0,1 or cpu,cpu.")
    return tuple(str(int(name)) if name.isdecimal() else name for name in names)


def parse_bytes(text: str) -> int:
    """`"6GB"`, `"6GiB"` and `"6G"` are all 6 * 2**30 bytes, as GPU makers count; `"512MB"` is 512 * 2**20.

    Raises:
        ConfigError: not a number, or an unknown unit.
    """
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is not an amount of memory. Give a number with its unit, as in 6GB or 512MB.")
    return int(float(match["number"]) * _UNIT_BYTES[match["unit"].upper()])


def parse_virtual_gpus(text: str) -> tuple[int, ...]:
    """`"6GB,4GB"` -> bytes of each virtual GPU.

    Raises:
        ConfigError: a part that is not an amount of memory.
    """
    try:
        return tuple(parse_bytes(part) for part in text.split(","))
    except ConfigError as error:
        raise ConfigError(f"--virtual-gpus {text}: {error}") from None


def add_backend_arguments(parser: ArgumentParser) -> None:
    """Add the engine's flags. `backend_config_from_namespace` reads the parsed values."""
    _add_device_arguments(parser)
    _add_precision_arguments(parser)
    _add_attention_arguments(parser)
    _add_memory_arguments(parser)


def _add_device_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("devices")
    group.add_argument("--device-id", metavar="0,1,2", help="devices to compute on, in order: GPU numbers, or cpu, or cpu,cpu")
    group.add_argument("--gpu-device-id", type=int, metavar="N", help="let the program see only this GPU (sets CUDA_VISIBLE_DEVICES)")
    group.add_argument("--multi-gpu", action="store_true", help="compute one picture on all devices of --device-id, or on all GPUs")
    group.add_argument("--multi-gpu-strategy", choices=STRATEGIES, default="auto", help="how the work is divided (default: the predicted fastest)")
    group.add_argument("--allow-shared-slots", action="store_true", help="allow one GPU to be named twice in --device-id, for testing")
    group.add_argument(
        "--virtual-gpus", metavar="6GB,4GB", help="simulate GPUs with this much memory each on the CPU, for testing and for trying out plans"
    )
    group.add_argument("--cpu-threads-per-slot", type=int, metavar="N", help="threads of each CPU slot (default: the cores, divided evenly)")
    group.add_argument(
        "--cuda-graphs", choices=GRAPH_MODES, default="off",
        help="record the launches of a step once and replay them (CUDA; auto: where launching takes longer than computing; default: off)",
    )  # fmt: skip
    group.add_argument("--profile", action="store_true", help="write logs/profile.json: what each device did and when")
    group.add_argument("--disable-gpu-warning", action="store_true", help="do not warn about a GPU with little memory or an idle one")


def _add_precision_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("number formats")
    group.add_argument("--all-in-fp32", action="store_true", help="everything in 32 bits")
    group.add_argument("--all-in-fp16", action="store_true", help="everything in 16 bits")
    for dtype in ("bf16", "fp16", "fp8-e4m3fn", "fp8-e5m2"):
        group.add_argument(f"--unet-in-{dtype}", action="store_true", help=f"store the UNet in {dtype}")
    for dtype in ("fp16", "fp32", "bf16"):
        group.add_argument(f"--vae-in-{dtype}", action="store_true", help=f"run the VAE in {dtype}")
    group.add_argument("--vae-in-cpu", action="store_true", help="run the VAE on the CPU")
    for dtype in ("fp8-e4m3fn", "fp8-e5m2", "fp16", "fp32"):
        group.add_argument(f"--clip-in-{dtype}", action="store_true", help=f"store the text encoders in {dtype}")
    group.add_argument(
        "--fast-fp8", action="store_true", help="multiply weights stored in fp8 e4m3 as they are, on cards that can (RTX 40 and later); less exact"
    )
    group.add_argument(
        "--compile-dequantization",
        action="store_true",
        help="compile the dequantization of GGUF weights on CUDA devices, which takes seconds at first",
    )
    group.add_argument("--no-half", action="store_true", help="same as --all-in-fp32")
    group.add_argument("--no-half-vae", action="store_true", help="same as --vae-in-fp32")
    group.add_argument("--pytorch-deterministic", action="store_true", help="use only algorithms that give the same bits every time")


def _add_attention_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("attention")
    group.add_argument("--xformers", action="store_true", help="install xformers and use it for attention")
    group.add_argument("--disable-xformers", action="store_true", help="never use xformers, even when it is installed")
    for kind, same in (("pytorch", "opt-sdp-attention"), ("split", "opt-split-attention"), ("quad", "opt-sub-quad-attention")):
        group.add_argument(f"--attention-{kind}", action="store_true", help=f"always use this kind of attention: {kind}")
        group.add_argument(f"--{same}", action="store_true", help=f"same as --attention-{kind}")
    group.add_argument("--opt-sdp-no-mem-attention", action="store_true", help="same as --attention-pytorch")
    group.add_argument("--force-upcast-attention", action="store_true", help="compute attention scores in 32 bits")
    group.add_argument("--disable-attention-upcast", action="store_true", help="never compute attention scores in more bits than the rest")


def _add_memory_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("memory")
    group.add_argument("--always-gpu", action="store_true", help="keep everything on the GPU, including intermediate results")
    group.add_argument("--always-high-vram", action="store_true", help="do not take models off the GPU after use")
    group.add_argument("--always-normal-vram", action="store_true", help="load models as they are used, unload idle ones when room is needed")
    group.add_argument("--always-low-vram", action="store_true", help="keep part of the UNet in main memory")
    group.add_argument("--always-no-vram", action="store_true", help="keep nearly all of the UNet in main memory")
    group.add_argument("--always-cpu", action="store_true", help="compute on the CPU")
    group.add_argument("--medvram", action="store_true", help="one model at a time on the GPU: --always-normal-vram with --always-offload-from-vram")
    group.add_argument("--lowvram", action="store_true", help="same as --always-low-vram")
    group.add_argument("--use-cpu", nargs="+", default=[], metavar="PART", help="'all' or 'sd': same as --always-cpu; other parts have no effect")
    group.add_argument("--always-offload-from-vram", action="store_true", help="take every model off the GPU as soon as it is done")
    group.add_argument("--cpu-offload", action="store_true", help="keep weights in main memory and copy them to the GPU as they are needed")
    group.add_argument("--pin-shared-memory", action="store_true", help="use page-locked main memory for weights that are copied as needed")
    group.add_argument("--cuda-stream", action="store_true", help="copy weights while the GPU computes")
    group.add_argument("--cuda-malloc", action="store_true", help="use CUDA's own asynchronous allocator")


# Flags that exclude each other: (flag, value). Two flags with the same value do not conflict.
_VRAM_FLAGS = (
    ("always_gpu", "always_gpu"),
    ("always_high_vram", "high"),
    ("always_normal_vram", "normal"),
    ("always_low_vram", "low"),
    ("always_no_vram", "no"),
    ("always_cpu", "cpu"),
    ("medvram", "normal"),
    ("lowvram", "low"),
)
_ATTENTION_FLAGS = (
    ("xformers", "xformers"),
    ("attention_pytorch", "pytorch"),
    ("attention_split", "split"),
    ("attention_quad", "quad"),
    ("opt_sdp_attention", "pytorch"),
    ("opt_sdp_no_mem_attention", "pytorch"),
    ("opt_split_attention", "split"),
    ("opt_sub_quad_attention", "quad"),
)
_ALL_IN_FLAGS = (("all_in_fp32", "fp32"), ("all_in_fp16", "fp16"), ("no_half", "fp32"))
_UNET_FLAGS = tuple((f"unet_in_{dtype}", dtype) for dtype in ("bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2"))
_VAE_FLAGS = (*((f"vae_in_{dtype}", dtype) for dtype in ("fp16", "fp32", "bf16")), ("no_half_vae", "fp32"))
_CLIP_FLAGS = tuple((f"clip_in_{dtype}", dtype) for dtype in ("fp8_e4m3fn", "fp8_e5m2", "fp16", "fp32"))


def flag_name(dest: str) -> str:
    """`unet_in_fp16` -> `--unet-in-fp16`."""
    return "--" + dest.replace("_", "-")


def _pick_one(ns: Namespace, table: tuple[tuple[str, str], ...]) -> str | None:
    """The value of the given flags of one table; None if none was given. Raises: ConfigError if they differ."""
    given = [(dest, value) for dest, value in table if getattr(ns, dest, False)]
    values = {value for _, value in given}
    if len(values) > 1:
        raise ConfigError(f"{' and '.join(flag_name(dest) for dest, _ in given)} contradict each other. Keep only one of them.")
    return given[0][1] if given else None


def _pick_vram_mode(ns: Namespace) -> str:
    to_cpu = sorted({"all", "sd"} & {part.lower() for part in ns.use_cpu})
    mode = _pick_one(ns, _VRAM_FLAGS)
    if to_cpu and mode not in (None, "cpu"):
        raise ConfigError(f"--use-cpu {to_cpu[0]} computes on the CPU, but another flag asks for VRAM mode {mode!r}. Leave one out.")
    return "cpu" if to_cpu else mode or "auto"


def _pick_attention(ns: Namespace) -> str:
    kind = _pick_one(ns, _ATTENTION_FLAGS)
    if kind == "xformers" and ns.disable_xformers:
        raise ConfigError("--xformers and --disable-xformers contradict each other. Leave one out.")
    return kind or ("pytorch" if ns.disable_xformers else "auto")


def backend_config_from_namespace(ns: Namespace) -> BackendConfig:
    """The engine's configuration from parsed flags.

    Raises:
        ConfigError: flags that contradict each other, or a value that cannot be read.
    """
    if ns.gpu_device_id is not None and ns.device_id is not None:
        raise ConfigError(
            f"--gpu-device-id {ns.gpu_device_id} and --device-id {ns.device_id} both choose devices, and the first changes the numbers that the "
            "second counts. Use only --device-id."
        )
    if ns.gpu_device_id is not None and ns.gpu_device_id < 0:
        raise ConfigError(f"--gpu-device-id {ns.gpu_device_id}: give the number of a GPU, counted from 0.")
    return BackendConfig(
        device_ids=parse_device_ids(ns.device_id) if ns.device_id is not None else (),
        multi_gpu=ns.multi_gpu,
        multi_gpu_strategy=ns.multi_gpu_strategy,
        allow_shared_slots=ns.allow_shared_slots,
        virtual_gpus_bytes=parse_virtual_gpus(ns.virtual_gpus) if ns.virtual_gpus is not None else (),
        cpu_threads_per_slot=ns.cpu_threads_per_slot,
        vram_mode=_pick_vram_mode(ns),
        always_offload=ns.always_offload_from_vram or ns.medvram,
        **_read_plain_flags(ns),
        unet_dtype=_pick_one(ns, _UNET_FLAGS),
        vae_dtype=_pick_one(ns, _VAE_FLAGS),
        clip_dtype=_pick_one(ns, _CLIP_FLAGS),
        all_in=_pick_one(ns, _ALL_IN_FLAGS),
        attention=_pick_attention(ns),
        deterministic=ns.pytorch_deterministic,
        cuda_graphs=ns.cuda_graphs,
    )


def _read_plain_flags(ns: Namespace) -> dict[str, Any]:
    """The on/off flags that have the same name as their field."""
    names = (
        "cpu_offload",
        "pin_shared_memory",
        "cuda_stream",
        "cuda_malloc",
        "vae_in_cpu",
        "fast_fp8",
        "compile_dequantization",
        "profile",
        "disable_gpu_warning",
    )
    return {name: getattr(ns, name) for name in (*names, "force_upcast_attention", "disable_attention_upcast")}
