"""The machine that runs the checks: its device, its folders, timing and counting on it."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backend import memory_management
from backend.args import BackendConfig
from backend.devices.device_memory import empty_cache
from backend.devices.peak_memory import read_peak, reset_peak
from backend.devices.probing import probe_devices
from backend.parallel.placing.fleet import Fleet, current_fleet

GIB, MIB, MB, GB = 2**30, 2**20, 1e6, 1e9
VIRTUAL_CAP_BYTES = 4 * GIB
_ROOMY_BYTES = 24 * GIB
_RAM_DISK = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """`kind`: "cuda", "cpu" or "virtual". With `tiny`, networks are narrow and pictures small: the checks are rehearsed, not measured.

    `shared_dir` holds checkpoints that several checks use; `out_dir` is for files that the reader looks at.
    """

    kind: str
    tiny: bool
    shared_dir: Path
    out_dir: Path

    @property
    def device(self) -> torch.device:
        return torch.device({"cuda": "cuda:0", "cpu": "cpu", "virtual": "vgpu:0"}[self.kind])

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of networks: half precision on a GPU."""
        return torch.float16 if self.is_cuda else torch.float32

    @contextlib.contextmanager
    def working(self, name: str) -> Iterator[None]:
        """Wraps a check: its own seed, and a device in its initial state."""
        torch.manual_seed(len(name))
        if not self.is_cuda:
            torch.set_num_threads(1)  # as in slot workers, so that sums round the same
        self.use()
        with torch.inference_mode(False), torch.no_grad():
            yield

    def use(self, num_slots: int = 1, **flags: Any) -> Fleet:
        """From now on, compute on this device, as that many slots."""
        ids = ("cpu" if self.kind == "cpu" else "0",) * num_slots
        shared: dict[str, Any] = {"cpu": {"cpu_threads_per_slot": 1}, "virtual": {"virtual_gpus_bytes": (VIRTUAL_CAP_BYTES,)}, "cuda": {}}[self.kind]
        config = BackendConfig(device_ids=ids, multi_gpu=num_slots > 1, allow_shared_slots=num_slots > 1, **{**shared, **flags})
        memory_management.configure(config, probe_devices(config))
        return current_fleet()

    def sync(self) -> None:
        memory_management.synchronize(self.device)

    def settle(self) -> None:
        """Return cached memory to the driver, and reset the peak."""
        self.sync()
        empty_cache(self.device)
        reset_peak(self.device)

    def allocated_bytes(self) -> int:
        """Bytes of live tensors on the device; 0 if it does not count them."""
        if self.is_cuda:
            return int(torch.cuda.memory_allocated(self.device))
        return 0 if self.kind == "cpu" else memory_management.get_total_memory(self.device) - memory_management.get_free_memory(self.device)

    def peak_gb(self) -> dict[str, float | None]:
        """Peak since the last `settle`, in GB."""
        self.sync()
        peak = read_peak(self.device)
        as_gb = [None if number is None else round(number / GB, 3) for number in (peak.allocated_bytes, peak.reserved_bytes)]
        return {"allocated_gb": as_gb[0], "reserved_gb": as_gb[1]}

    def seconds(self, call: Callable[[], object]) -> float:
        """Duration of one call, with the device idle before and after."""
        self.sync()
        began_s = time.perf_counter()
        call()
        self.sync()
        return time.perf_counter() - began_s

    def median_ms(self, call: Callable[[], object], times: int = 5, warmups: int = 2) -> float:
        for _ in range(warmups):
            call()
        return statistics.median(self.seconds(call) for _ in range(times)) * 1000

    def pick(self, full: Any, tiny: Any) -> Any:
        """`full` for a measurement, `tiny` for a rehearsal."""
        return tiny if self.tiny else full


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for full-size checkpoints, in memory if there is room."""
    in_memory = _RAM_DISK.is_dir() and shutil.disk_usage(_RAM_DISK).free > _ROOMY_BYTES
    with tempfile.TemporaryDirectory(prefix="cuda-checks-", dir=_RAM_DISK if in_memory else None, ignore_cleanup_errors=True) as name:
        yield Path(name)


class DriverPeak:
    """The peak memory use of the GPU according to the driver, sampled every few milliseconds by a thread. None without a driver."""

    def __init__(self) -> None:
        self.used_bytes: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> DriverPeak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            used_bytes = driver_used_bytes()
            if used_bytes is None:
                return
            self.used_bytes = max(self.used_bytes or 0, used_bytes)


def driver_used_bytes() -> int | None:
    """NVML's number for the first GPU; None without a driver."""
    import pynvml  # optional

    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
    except pynvml.NVMLError:
        return None


def difference(one: Any, other: Any) -> dict[str, Any]:
    """Difference of two tensors: maximum, mean, and maximum relative to the spread of `other`."""
    one, other = torch.as_tensor(one).float().cpu(), torch.as_tensor(other).float().cpu()
    diff = (one - other).abs()
    spread = float(other.std()) or 1.0
    return {
        "equal": bool(torch.equal(one, other)),
        "max": float(diff.max()),
        "mean": float(diff.mean()),
        "max_of_spread": float(diff.max()) / spread,
        "finite": bool(torch.isfinite(one).all() and torch.isfinite(other).all()),
    }
