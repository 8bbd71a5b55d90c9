"""Routes about the server itself: settings, flags, memory, the loaded model, and stopping it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException, Response
from fastapi.concurrency import run_in_threadpool

from modules.api.models import ClusterItem, DrainRequest, LinkItem, MemoryResponse, MultiGpuResponse, PlanItem, SlotItem
from modules.api.settings import check_settings
from modules.api.waiting import wait_for_job

if TYPE_CHECKING:
    from modules.application import Application

_SECRET_FLAGS = ("api_auth", "api_auth_file", "gradio_auth", "gradio_auth_path", "ngrok", "ngrok_options")
_HIDDEN = "(not shown)"
NO_RESTART_STATUS = 501


class ServerRoutes:
    """One method per route."""

    def __init__(self, app: Application) -> None:
        self.app = app

    def get_options(self) -> dict[str, Any]:
        """Every setting's value, including defaults."""
        return {key: plain(value) for key, value in self.app.options.snapshot().items()}

    def set_options(self, body: dict[str, Any]) -> None:
        """Change and save settings: all of them, or none if one is invalid or the file cannot be written.

        Raises OptionError, UnknownCheckpointError, OSError.
        """
        options = self.app.options
        present = options.snapshot()
        changed = {key: value for key, value in body.items() if not _is_unchanged(present, key, value)}
        checked = check_settings(self.app, changed)
        done: dict[str, Any] = {}
        try:
            for key, value in checked.items():
                before = options.data.get(key)
                if options.set(key, value, is_api=True):
                    done[key] = before
            if done:
                self.app.save_options()
        except Exception:
            for key, before in done.items():
                options.data[key] = before
            raise

    def cmd_flags(self) -> dict[str, Any]:
        """The server's flags; passwords are hidden."""
        return {key: _HIDDEN if key in _SECRET_FLAGS and value else plain(value) for key, value in self.app.config.flags.items()}

    def memory(self) -> MemoryResponse:
        """Bytes of RAM and of the current CUDA device; `multi_gpu` has every slot."""
        return MemoryResponse(ram=describe_ram(), cuda=describe_cuda())

    def multi_gpu(self) -> MultiGpuResponse:
        """The slots, the current plan and the links. Does not wait for jobs."""
        from backend.parallel.running import status  # imports torch; only for this report

        plan = status.current_plan()
        return MultiGpuResponse(
            slots=[SlotItem.model_validate(slot) for slot in status.describe_slots()],
            plan=None if plan is None else PlanItem.model_validate(plan),
            links=[LinkItem.model_validate(link) for link in status.current_links()],
            cluster=None if self.app.remote_engine is None else ClusterItem.model_validate(self.app.remote_engine.describe()),
        )

    def drain(self, body: DrainRequest) -> dict[str, Any]:
        """Give a worker or machine no new jobs, so that it can be updated, or give it jobs again. 404 without --cluster."""
        if self.app.remote_engine is None:
            raise HTTPException(404, "This server has no workers: it was started without --cluster.")
        self.app.remote_engine.drain(body.worker, is_draining=body.draining)
        return {}

    async def unload_checkpoint(self) -> dict[str, Any]:
        """Unload the model; the next job loads it again. Waits for the jobs before it."""
        await wait_for_job(self.app.jobs.submit(None, "unload-checkpoint", self.app.models.unload))
        return {}

    async def reload_checkpoint(self) -> dict[str, Any]:
        """Load the selected model now. Raises NoCheckpointError, ModelLoadError."""
        await run_in_threadpool(self.app.models.resolve)
        if self.app.remote_engine is not None:
            return {}  # workers load a model with the first job that needs it
        await wait_for_job(self.app.jobs.submit(None, "reload-checkpoint", self._load))
        return {}

    def _load(self) -> None:
        self.app.models.ensure_loaded()

    def server_stop(self) -> Response:
        return self._command("stop", "Stopping.")

    def server_restart(self) -> Response:
        """Answers 501 if nothing would restart the server."""
        if not getattr(self.app, "restartable", False):
            return Response("This server cannot restart itself.", status_code=NO_RESTART_STATUS)
        return self._command("restart", "Restarting.")

    def server_kill(self) -> Response:
        return self._command("kill", "Stopping at once.")

    def _command(self, command: str, text: str) -> Response:
        self.app.state.interrupt()
        self.app.state.server_command = command
        return Response(text)


def _is_unchanged(present: Mapping[str, Any], key: str, value: Any) -> bool:
    return key in present and plain(present[key]) == value


def plain(value: Any) -> Any:
    """`value` in JSON-compatible form."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def describe_ram() -> dict[str, Any]:
    """Bytes of host memory: free (available to programs), used by this process, total."""
    import psutil  # only for this report

    try:
        machine, process = psutil.virtual_memory(), psutil.Process().memory_info()
    except (psutil.Error, OSError) as error:
        return {"error": str(error)}
    return {"free": machine.available, "used": process.rss, "total": machine.total}


def describe_cuda() -> dict[str, Any]:
    """torch's numbers for the current CUDA device; {"error": ...} if there is none."""
    import torch  # heavy; only for this report

    if not torch.cuda.is_available():
        return {"error": "unavailable"}
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    stats = dict(torch.cuda.memory_stats())

    def pair(name: str) -> dict[str, int]:
        return {"current": stats.get(f"{name}.all.current", 0), "peak": stats.get(f"{name}.all.peak", 0)}

    return {
        "system": {"free": free_bytes, "used": total_bytes - free_bytes, "total": total_bytes},
        "active": pair("active_bytes"),
        "allocated": pair("allocated_bytes"),
        "reserved": pair("reserved_bytes"),
        "inactive": pair("inactive_split_bytes"),
        "events": {"retries": stats.get("num_alloc_retries", 0), "oom": stats.get("num_ooms", 0)},
    }
