"""Memory on a real GPU: what is free, what remains, what smaller storage or streaming saves, and what happens when it runs out."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from backend import memory_management
from backend.devices import virtual_gpu
from backend.memory.errors import OutOfMemory
from modules.processing import process_images
from tests.support.narrow_application import narrow_application
from tests.support.narrow_application import txt2img as narrow_txt2img
from tools.cuda_checks.machine import GB, GIB, MB, MIB, DriverPeak, Machine, driver_used_bytes
from tools.cuda_checks.networks import application, txt2img
from tools.cuda_checks.runner import Report
from tools.cuda_checks.slot_checks import pixels

FAMILIES = ("sd15", "sd20", "sdxl")
STORAGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "fp8": {"unet_dtype": "fp8_e4m3fn"},
    "--cpu-offload": {"cpu_offload": True},
    "--lowvram": {"vram_mode": "low"},
    "--always-no-vram": {"vram_mode": "no"},
    "--always-no-vram --pin-shared-memory --cuda-stream": {"vram_mode": "no", "pin_shared_memory": True, "cuda_stream": True},
}


def check_free_memory(machine: Machine, report: Report) -> None:
    """`get_free_memory` against the driver, before and after tensors of known size are allocated and freed."""
    held: list[Tensor] = []
    worst_bytes = 0
    for step, size_bytes in (("at the start", 0), ("after 1 GiB", GIB), ("after 3 GiB", 2 * GIB), ("a GiB freed, still cached", -GIB)):
        if size_bytes > 0:
            held.append(torch.empty(machine.pick(size_bytes, size_bytes // 1024), dtype=torch.uint8, device=machine.device))
        elif size_bytes < 0:
            held.pop(0)
        machine.sync()
        ours_bytes, torch_idle_bytes = memory_management.get_free_memory(machine.device, torch_free_too=True)
        figures = {"ours_gb": ours_bytes / GB, "torch_idle_gb": torch_idle_bytes / GB}
        if machine.is_cuda:
            driver_bytes, total_bytes = torch.cuda.mem_get_info(machine.device)
            idle_bytes = torch.cuda.memory_reserved(machine.device) - torch.cuda.memory_allocated(machine.device)
            nvml_bytes = driver_used_bytes()
            worst_bytes = max(worst_bytes, abs(ours_bytes - driver_bytes - idle_bytes))
            figures |= {"driver_free_gb": driver_bytes / GB, "allocator_idle_gb": idle_bytes / GB, "total_gb": total_bytes / GB}
            figures |= {} if nvml_bytes is None else {"nvml_used_gb": nvml_bytes / GB, "total_less_driver_free_gb": (total_bytes - driver_bytes) / GB}
        report.value(step, **{name: round(number, 4) for name, number in figures.items()})
    if machine.is_cuda:
        report.expect("free = the driver's + the allocator's idle, within 1 MB", worst_bytes <= MB, worst_bytes=worst_bytes)


def check_soak(machine: Machine, report: Report) -> None:
    """Jobs that switch between three narrow checkpoints, two sizes and a LoRA: live bytes at the same point of each round."""
    places = list(itertools.product(FAMILIES, ((64, 64), (96, 64))))
    levels: dict[int, list[int]] = {}
    for num_slots in (1, 2):
        machine.use(num_slots)
        levels.clear()
        with narrow_application(machine.shared_dir / f"soak{num_slots}", *FAMILIES) as (app, models):
            _write_lora(app.config.lora_dirs[0] / "style.safetensors", models["sd15"])
            for index in range(machine.pick(24, 14)):
                family, (width, height) = places[index % len(places)]
                lora = " <lora:style:0.8>" if family == "sd15" and width == 96 else ""
                override = {"sd_model_checkpoint": f"{family}.safetensors"}
                fields = {"override_settings": override, "width": width, "height": height, "steps": 2, "seed": index}
                process_images(narrow_txt2img(prompt=f"a red cat{lora}", **fields))
                machine.sync()
                gc.collect()
                levels.setdefault(index % len(places), []).append(machine.allocated_bytes())
            changed = {place: seen for place, seen in levels.items() if len(set(seen[1:])) > 1}
            report.expect(f"{num_slots} slot(s): levels stay", not changed, num_jobs=machine.pick(24, 14), changed=changed, levels=levels)
        memory_management.unload_all_models()
        gc.collect()
        machine.settle()
        report.value(f"{num_slots} slot(s): left after everything was unloaded", num_bytes=machine.allocated_bytes())


def _write_lora(path: Path, models: Any) -> None:
    """Write a LoRA in kohya's naming for the UNet's linear layers."""
    generator, tensors = torch.Generator().manual_seed(2), {}
    for name, weight in models.unet.named_parameters():
        if name.endswith(".weight") and weight.ndim == 2 and "embedding" not in name:
            layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            tensors[f"{layer}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=generator) * 0.3
            tensors[f"{layer}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=generator) * 0.3
            tensors[f"{layer}.alpha"] = torch.tensor(2.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"ss_base_model_version": "sd_v1"})


def check_storage(machine: Machine, report: Report) -> None:
    """The same request with weights entirely on the GPU, in fp8, offloaded and streamed: peak, time and the picture."""
    families = machine.pick(("sd15", "sdxl"), ("sd15",))
    for family in families:
        chosen = STORAGES if family == "sd15" else {name: STORAGES[name] for name in ("as it is", "fp8", "--cpu-offload", "--always-no-vram")}
        expected: np.ndarray | None = None
        for name, flags in chosen.items():
            machine.use(**flags)
            with application(machine, family, backend=memory_management.current_store().config) as app:
                fields = {"steps": machine.pick(6, 2)}
                process_images(txt2img(machine, family, steps=1))
                machine.settle()
                made: list[Any] = []
                with DriverPeak() as driver:
                    request = txt2img(machine, family, **fields)
                    seconds = machine.seconds(lambda made=made, request=request: made.append(process_images(request)))  # type: ignore[misc]
                picture = pixels(made[0])
                expected = picture if expected is None else expected
                diff = np.abs(picture - expected)
                app.models.unload()
            memory_management.unload_all_models()
            gc.collect()
            figures = {**machine.peak_gb(), "driver_gb": None if driver.used_bytes is None else driver.used_bytes / GB}
            machine.settle()
            report.value(
                f"{family}, {name}", seconds=round(seconds, 3), max_apart=int(diff.max()), mean_apart=round(float(diff.mean()), 4), **figures
            )
            if name != "fp8":
                report.expect(f"{family}, {name}: the picture stays", diff.max() <= 8, max=int(diff.max()))


@contextmanager
def _room(machine: Machine, free_bytes: int) -> Iterator[None]:
    """Allow only that much more to be allocated, without get_free_memory knowing."""
    if machine.is_cuda:
        total_bytes = torch.cuda.get_device_properties(machine.device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(machine.device) + free_bytes) / total_bytes, machine.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, machine.device)
    elif machine.kind == "virtual":
        device = virtual_gpu.get_device(machine.device)
        before = device.cap_bytes
        device.cap_bytes = device.live_bytes + free_bytes
        try:
            yield
        finally:
            device.cap_bytes = before
    else:
        yield


def check_out_of_memory(machine: Machine, report: Report) -> None:
    """Real memory shortages during a job, from mild to severe: same picture or a clear failure, and a correct next job."""
    rooms = machine.pick((4 * GIB, GIB, 300 * MIB, 100 * MIB, 20 * MIB), (16 * MIB, 4 * MIB, MIB // 2))
    with application(machine, "sd15") as app:
        size = machine.pick({"width": 768, "height": 768, "batch_size": 4}, {"batch_size": 2})
        fields = {**size, "steps": machine.pick(3, 2)}
        expected = pixels(process_images(txt2img(machine, "sd15", **fields)))
        machine.settle()
        process_images(txt2img(machine, "sd15", **fields))
        peak_gb, live_bytes = machine.peak_gb()["allocated_gb"], machine.allocated_bytes()
        report.value("undisturbed", peak_gb=peak_gb, weights_gb=round(live_bytes / GB, 3))
        for room_bytes in rooms:
            name = f"{room_bytes / MIB:.0f} MiB besides what is there"
            with _room(machine, room_bytes):
                try:
                    diff = np.abs(pixels(process_images(txt2img(machine, "sd15", **fields))) - expected)
                except (OutOfMemory, RuntimeError) as error:
                    clear = isinstance(error, OutOfMemory) or "out of memory" in str(error)
                    report.expect(f"{name}: fails clearly", clear, kind=type(error).__name__, message=str(error)[:600])
                else:
                    report.expect(f"{name}: same picture", diff.max() <= 8, max=int(diff.max()), mean=float(diff.mean()))
            diff = np.abs(pixels(process_images(txt2img(machine, "sd15", **fields))) - expected)
            report.expect(f"after {name}: the next job is whole", diff.max() <= 2, max=int(diff.max()))
        report.value("still placed", models=[str(type(one).__name__) for one in memory_management.current_loaded_models], options=bool(app.options))
