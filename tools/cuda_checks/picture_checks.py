"""The demo checkpoint's picture on the GPU and the CPU, the machine itself, and the tests marked `gpu`."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from backend import memory_management
from backend.args import BackendConfig
from backend.devices.probing import probe_devices
from backend.devices.telemetry import read_telemetry
from modules.paths_internal import script_path
from modules.processing import process_images
from tests.support.applications import installed_application
from tools.benchmarking import describe_machine
from tools.cuda_checks.machine import GB, Machine
from tools.cuda_checks.networks import txt2img
from tools.cuda_checks.runner import Report
from tools.cuda_checks.slot_checks import pixels

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy")
PROMPT = "a large red circle on a blue background"
DEMO_SIDE_PX = 64


def check_machine(machine: Machine, report: Report) -> None:
    """Describe the machine. The first check, so that an unusable GPU is noticed immediately."""
    report.value("machine", machine=describe_machine(), python=sys.version.split()[0])
    report.value("packages", **{name: importlib.metadata.version(name) for name in PACKAGES})
    if not machine.is_cuda:
        return
    facts = torch.cuda.get_device_properties(0)
    total = torch.ones(1024, 1024, device=machine.device, dtype=torch.half).sum().item()
    report.expect("the card computes", total == 1024 * 1024 or total == float("inf"), total=total)
    report.value("card", model=facts.name, gb=facts.total_memory / GB, multiprocessors=facts.multi_processor_count, cuda=torch.version.cuda)
    report.value("telemetry", cards=[str(card) for card in read_telemetry()])
    slot = memory_management.compute_slots()[0]
    states = {"vram_state": str(memory_management.vram_state_of(slot.torch_device)), "unet": str(memory_management.unet_dtype())}
    report.value("our view", slot=str(slot), **states, vae=str(memory_management.vae_dtype()), relative_speed=slot.relative_speed)


def check_demo_picture(machine: Machine, report: Report) -> None:
    """The tracked demo checkpoint: fp32 on the CPU is the reference; the device in fp32, in its default dtype, and in fp16.

    demo.png has one row per variant.
    """
    found: dict[str, np.ndarray] = {}
    kinds: dict[str, dict[str, Any]] = {
        "CPU, fp32": {}, "device, fp32": {"all_in": "fp32", "vae_dtype": "fp32"},
        "device, its own types": {},
        "device, fp16": {"all_in": "fp16", "vae_dtype": "fp16"},
    }  # fmt: skip
    if not machine.is_cuda:
        del kinds["device, fp16"]
    for name, flags in kinds.items():
        if name == "CPU, fp32":
            config = BackendConfig(device_ids=("cpu",))
            memory_management.configure(config, probe_devices(config))
        else:
            machine.use(**flags)
        backend = memory_management.current_store().config
        checkpoints = (Path(script_path) / "models" / "Stable-diffusion",)
        with installed_application(machine.shared_dir / "demo", ckpt_dirs=checkpoints, backend=backend) as app:
            app.options.live_previews_enable = False
            app.options.samples_save = False
            app.options.set("randn_source", "CPU")  # the same noise everywhere
            done: list[Any] = []
            size = {"width": DEMO_SIDE_PX, "height": DEMO_SIDE_PX, "prompt": PROMPT, "negative_prompt": "", "batch_size": 4, "cfg_scale": 4.0}
            seconds = machine.seconds(lambda size=size, done=done: done.append(process_images(txt2img(machine, "sd15", **{**size, "steps": 20}))))  # type: ignore[misc]
            found[name] = pixels(done[0])
            app.models.unload()
        diff = np.abs(found[name] - found["CPU, fp32"])
        limit = {"CPU, fp32": 0, "device, fp32": 4}.get(name, 40)
        report.expect(f"{name}: near the CPU's", diff.max() <= limit, max=int(diff.max()), mean=float(diff.mean()), seconds=round(seconds, 2))
    rows = [np.concatenate(list(pictures), axis=1) for pictures in found.values()]
    Image.fromarray(np.concatenate(rows).astype(np.uint8)).save(machine.out_dir / "demo.png")
    machine.use()


def check_marked_tests(machine: Machine, report: Report) -> None:
    """`pytest -m gpu`, in its own process."""
    files = sorted({str(path.relative_to(script_path)) for path in _test_files()})
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-o", "filterwarnings=default", *files]
    done = subprocess.run(command, cwd=script_path, capture_output=True, text=True, check=False)
    skipped_only = done.returncode == 0 and not machine.is_cuda
    report.expect("pytest -m gpu", done.returncode == 0 or skipped_only, rc=done.returncode, tail=done.stdout[-3000:], errors=done.stderr[-500:])


def _test_files() -> list[Any]:
    return [path for path in Path(script_path, "tests", "backend").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
