"""The job that campaigns disturb: two pictures with a ControlNet, a LoRA and hires fix, under each plan on virtual GPUs."""

from __future__ import annotations

import gc
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from backend import memory_management
from backend.devices import virtual_gpu
from backend.devices.virtual_device import VirtualDevice
from modules.api.script_args import build_script_args
from modules.application import Application
from modules.jobs.queue import Job
from modules.processing import Processed, process_images
from modules.scripts.without_page import build_controls
from tests.support.controlnets import build_controlnet, write_controlnet
from tests.support.extensions import loaded_builtin
from tests.support.fleets import virtual_fleet
from tests.support.loras import write_lora
from tests.support.narrow_application import narrow_application, pixels, txt2img

PLANS = {"single": 1, "replicas": 2, "layers": 2, "hybrid": 3}
"""Plan -> number of virtual GPUs."""
CAP_BYTES = 256 * 2**20
WAIT_S = 300.0


GREY_LEVELS = 1
"""Plans in which conditions run one by one round like a batch of one."""
SLACK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Sound:
    """Results of an undisturbed job: its pictures, device bytes that belong to no model, threads."""

    pictures: np.ndarray
    unheld_bytes: int
    num_threads: int


@dataclass
class Bed:
    """An application whose jobs use one plan."""

    app: Application
    devices: list[VirtualDevice]

    def submit(self, **fields: Any) -> Job[Processed]:
        """Submit the guided job to the application's worker."""
        return self.app.jobs.submit(None, "txt2img", lambda: process_images(self._request(**fields)))

    def _request(self, **fields: Any) -> Any:
        unit = {"model": "guide", "module": "canny", "image": Image.fromarray(_guide())}
        runner = self.app.script_runners["txt2img"]
        p = txt2img(**{**_JOB, **fields})
        _, arguments = build_script_args(runner, script_name=None, script_args=[], alwayson_scripts={"ControlNet": {"args": [unit]}})
        p.is_api, p.scripts, p.script_args = True, runner, tuple(arguments)
        return p

    def picture(self, job: Job[Processed]) -> np.ndarray:
        """All pictures of a job. Raises what the job raised, or TimeoutError if it hangs."""
        return np.concatenate([pixels(image) for image in job.wait(timeout_s=WAIT_S).images])

    def settle(self) -> Sound:
        """Run the first jobs, which measure and re-partition the network. Freezes live objects, whose collection would take most of the time."""
        for _ in range(3):
            pictures = self.picture(self.submit())
        sound = Sound(pictures=pictures, unheld_bytes=self.unheld_bytes(), num_threads=self.num_threads())
        gc.freeze()
        return sound

    def differs(self, pictures: np.ndarray, sound: Sound) -> str:
        """How much pictures differ from the undisturbed ones, in words; empty if they are equal."""
        if pictures.shape != sound.pictures.shape:
            return f"{pictures.shape} in place of {sound.pictures.shape}"
        difference = int(np.abs(pictures - sound.pictures).max())
        return f"{difference} grey levels" if difference > GREY_LEVELS else ""

    def check_next(self, sound: Sound) -> list[str]:
        """Compare the next job's pictures, and leftovers on devices and in threads; returns all differences."""
        found = []
        try:
            difference = self.differs(self.picture(self.submit()), sound)
        except Exception as error:  # noqa: BLE001 - any error is what a campaign looks for
            return [f"the next job failed: {type(error).__name__}: {error}"]
        if difference:
            found.append(f"the next job's pictures differ by {difference}")
        if (grown := self.unheld_bytes() - sound.unheld_bytes) > SLACK_BYTES:
            found.append(f"{grown} bytes more than before are on the devices and belong to no model")
        if (more := self.num_threads() - sound.num_threads) > 0:
            found.append(f"{more} threads more than before")
        return found

    def check_emptied(self) -> list[str]:
        """Check that the devices are empty after unloading everything."""
        left = self.unload()
        return [f"after unloading everything {left} bytes stay on the devices"] if left > SLACK_BYTES else []

    def live_bytes(self) -> int:
        """Bytes of tensors on all devices."""
        gc.collect()
        return sum(device.live_bytes for device in self.devices)

    def unheld_bytes(self) -> int:
        """Those bytes not owned by a model known to memory management. Which models stay on which device may change after a fault."""
        held = sum(size_bytes for row in memory_management.describe_devices() for _, size_bytes in row.holders)
        return self.live_bytes() - held

    def unload(self) -> int:
        """Unload everything from the devices; returns the bytes that remain."""
        gc.unfreeze()
        for device in self.devices:
            device.set_faults(None)
        self.app.models.unload()
        memory_management.unload_all_models()
        return self.live_bytes()

    def num_threads(self) -> int:
        """Number of live threads of the program."""
        return threading.active_count()


_JOB: dict[str, Any] = {
    "prompt": "a red cat <lora:paint:0.7>", "steps": 2, "batch_size": 2, "do_not_save_grid": True, "do_not_save_samples": True, "enable_hr": True,
    "hr_scale": 1.5, "hr_upscaler": "Latent", "hr_second_pass_steps": 1, "denoising_strength": 0.9,
}  # fmt: skip


def _guide() -> np.ndarray:
    guide = np.zeros((64, 64, 3), dtype=np.uint8)
    guide[16:48, 16:48] = 255
    return guide


@contextmanager
def guided_bed(plan: str, *, cap_bytes: int = CAP_BYTES) -> Iterator[Bed]:
    """An application on virtual GPUs with a narrow random checkpoint, LoRA and ControlNet."""
    with tempfile.TemporaryDirectory(prefix="campaign-") as name, virtual_fleet(PLANS[plan], cap_bytes):
        folder = Path(name)
        with narrow_application(folder, "sd15") as (app, models), loaded_builtin(app, "sd_forge_controlnet", "sd_forge_lora"):
            write_lora(folder / "models" / "Lora" / "paint.safetensors", models["sd15"])
            write_controlnet(folder / "models" / "ControlNet" / "guide.safetensors", build_controlnet(models["sd15"], residual_scale=0.3))
            app.options.data["multi_gpu_strategy"] = plan
            build_controls(app)
            devices = [virtual_gpu.get_device(index) for index in range(PLANS[plan])]
            bed = Bed(app, devices)
            yield bed
            bed.unload()
