"""Full-width checkpoint files of random numbers, and the cost of loading one in a new process. Linux only: memory is read from /proc."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from backend.families.registry import find_family

MB = 1e6
_BLOCK_NUMBERS = 32 * 2**20


def _text(cls: type[nn.Module], width: int, layers: int, activation: str, projection: int) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act=activation,
        projection_dim=projection,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return cls(config)


def _vae(widths: tuple[int, ...]) -> AutoencoderKL:
    count = len(widths)
    return AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
    )


def sdxl_networks() -> tuple[UNet2DConditionModel, AutoencoderKL, list[nn.Module]]:
    """SDXL base at its published size."""
    unet = UNet2DConditionModel(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    texts = [_text(CLIPTextModel, 768, 12, "quick_gelu", 768), _text(CLIPTextModelWithProjection, 1280, 32, "gelu", 1280)]
    return unet, _vae((128, 256, 512, 512)), texts


def small_networks() -> tuple[UNet2DConditionModel, AutoencoderKL, list[nn.Module]]:
    """SD 1.x at two fifths of its width: about 410 MB in half precision."""
    unet = UNet2DConditionModel(block_out_channels=(128, 256, 512, 512), cross_attention_dim=512, attention_head_dim=8)
    return unet, _vae((64, 128, 256, 256)), [_text(CLIPTextModel, 512, 6, "quick_gelu", 512)]


def write_random(path: Path, family: str, networks: tuple[nn.Module, nn.Module, list[nn.Module]]) -> None:
    """Write the networks' original-layout file in fp16, tensor by tensor from a block of random numbers. `networks` may be on the meta device."""
    shapes = {key: tuple(tensor.shape) for key, tensor in find_family(family).join_checkpoint(*networks).items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for chunk in _random_bytes(end):
            stream.write(chunk)


def _random_bytes(num_bytes: int) -> Iterator[bytes]:
    block = (torch.randn(_BLOCK_NUMBERS, generator=torch.Generator().manual_seed(0)) * 0.02).half().numpy().tobytes()
    for start in range(0, num_bytes, len(block)):
        yield block[: min(len(block), num_bytes - start)]


# --- in the child -------------------------------------------------------------------------------------------------------------------


def _memory_mb() -> dict[str, float]:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {name: int(fields[name].split()[0]) * 1024 / MB for name in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}


class _Watch(threading.Thread):
    """The highest anonymous and file-backed memory seen, every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.peaks = {"RssAnon": 0.0, "RssFile": 0.0}

    def run(self) -> None:
        while not self.done.wait(0.005):
            now = _memory_mb()
            self.peaks = {name: max(value, now[name]) for name, value in self.peaks.items()}


def _read_raw(path: Path) -> object:
    """The file's bytes in new memory, in the pieces and order of its tensors: what any loader that copies must do."""
    from backend.checkpoint_file import SafetensorsFile

    held, stored = [], SafetensorsFile(path)
    with path.open("rb", buffering=0) as stream:
        for key, info in stored.infos.items():
            tensor = torch.empty(info.stored_bytes, dtype=torch.uint8)
            stream.seek(stored._data_start + stored._starts[key])
            stream.readinto(memoryview(tensor.numpy()))
            held.append(tensor)
    return held


def _load_here(path: Path, how: str) -> object:
    if how == "raw":
        return _read_raw(path)
    if how == "safetensors":
        from safetensors.torch import load_file

        # Like a loader that keeps the file's tensors and copies them into networks.
        return {key: tensor.clone() for key, tensor in load_file(path).items()}
    from backend import memory_management
    from backend.args import BackendConfig
    from backend.devices.probing import probe_devices
    from backend.loader import load_checkpoint

    flags: dict[str, Any] = {} if how == "fp32" else {"unet_dtype": how, "vae_dtype": how, "clip_dtype": how}
    config = BackendConfig(device_ids=("cpu",), **flags)
    memory_management.configure(config, probe_devices(config))
    return load_checkpoint(path, config=config)


def _report_from_child(path: Path, how: str) -> None:
    for name in ("safetensors.torch", "backend.loader"):  # before measuring, as in a running server
        importlib.import_module(name)

    torch.set_num_threads(1)
    before = _memory_mb()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark
    watch = _Watch()
    watch.start()
    began_s, cpu_began_s = time.perf_counter(), time.process_time()
    held = _load_here(path, how)
    load_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_began_s
    watch.done.set()
    watch.join()
    after = _memory_mb()
    peak_mb = after["VmHWM"] - before["VmRSS"]
    file_mb = path.stat().st_size / MB
    print(
        json.dumps(
            {
                "load s": load_s,
                "CPU s": cpu_s,
                "peak RSS added MB": peak_mb,
                "of it file pages MB": watch.peaks["RssFile"] - before["RssFile"],
                "RSS added after MB": after["VmRSS"] - before["VmRSS"],
                "file MB": file_mb,
                "peak / file": peak_mb / file_mb,
            }
        )
    )
    del held


def measure_in_child(path: Path, how: str) -> Mapping[str, float]:
    """Load `path` in a new process: `how` is "fp16" or "fp32" (this loader), "safetensors" (load_file and a copy) or "raw" (only read)."""
    done = subprocess.run([sys.executable, "-m", "benchmarks._checkpoint_files", str(path), how], check=True, capture_output=True, text=True)
    numbers: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return numbers


if __name__ == "__main__":
    _report_from_child(Path(sys.argv[1]), sys.argv[2])
