"""A worker: our engine without page and API, which does one order after another for a front. Knows no Ray.

An order becomes a job of this process's own queue. Files, settings and prompts come with the order; this machine's settings file is not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from modules.api.errors import is_out_of_memory
from modules.cluster.files import FileCache
from modules.cluster.fleet import WorkerRefusesError
from modules.cluster.orders import FileName, Order, apply_options, build_request, pack_outcome, unpack_order
from modules.cluster.values import pack
from modules.errors import RequestError
from modules.jobs.queue import Job
from modules.processing import process_images

if TYPE_CHECKING:
    from modules.application import Application

log = logging.getLogger(__name__)

ORDERS_KEPT = 8
FOLLOW_S = 0.2
"""How long `follow` waits for the end of an order before it answers with progress."""
PREVIEW_PX = 512


@dataclass(kw_only=True, slots=True)
class RunningOrder:
    """An order and its job. `done` is set when the job has ended."""

    job: Job[bytes]
    done: asyncio.Event = field(default_factory=asyncio.Event)


class WorkerEngine:
    """Called from one event loop; the work itself is done on the job queue's thread."""

    def __init__(self, app: Application, cache: FileCache, *, facts: Mapping[str, Any]) -> None:
        """`facts`: name of the worker, its machine, address and versions, as in a report."""
        self.app = app
        self._cache = cache
        self._facts = dict(facts)
        settings = app.options.snapshot()
        self._own_options = {key: settings[key] for key, info in app.options.data_labels.items() if info.path_kind is not None}
        self._orders: OrderedDict[str, RunningOrder] = OrderedDict()
        self._model_key = ""
        self._networks: frozenset[str] = frozenset()
        self._num_done = 0

    async def start(self, order_id: str, message: bytes) -> dict[str, Any]:
        """Begin an order. {"missing": [...]} if files have to be sent first; {"error": ...} if it cannot be begun."""
        if order_id in self._orders:
            return {}
        try:
            order = await asyncio.to_thread(unpack_order, message)
            missing = await asyncio.to_thread(self._cache.missing, order.files)
        except (RequestError, WorkerRefusesError) as error:
            return {"error": _describe(error)}
        if missing:
            return {"missing": missing}
        self._begin(order)
        return {}

    def _begin(self, order: Order) -> None:
        loop = asyncio.get_running_loop()

        def end() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the worker ends, and nobody follows the order any more
                loop.call_soon_threadsafe(running.done.set)

        running = RunningOrder(job=self.app.jobs.submit(f"task({order.order_id})", order.kind, lambda: self._do(order)))
        running.job.add_done_callback(end)
        self._orders[order.order_id] = running
        while len(self._orders) > ORDERS_KEPT:
            self._orders.popitem(last=False)

    async def follow(self, order_id: str, known_preview: int) -> dict[str, Any]:
        """The order's outcome or error once it has ended; else, after a moment, its progress."""
        running = self._orders.get(order_id)
        if running is None:
            return {"error": {"kind": "lost", "text": f"it does not know the order {order_id}: it was restarted"}}
        try:
            await asyncio.wait_for(running.done.wait(), FOLLOW_S)
        except asyncio.TimeoutError:
            return await asyncio.to_thread(self._progress, order_id, known_preview)
        error = running.job.error
        return {"outcome": running.job.result} if error is None else {"error": _describe(error)}

    def control(self, order_id: str, action: str) -> None:
        """See modules.cluster.fleet.Fleet. An order that has ended or is not known is left alone."""
        if action == "forget":
            self._orders.pop(order_id, None)
            return
        task_id = f"task({order_id})"
        if self.app.jobs.tasks.current != task_id:
            if action == "interrupt":
                self.app.jobs.cancel(task_id)
            return
        state = self.app.state
        actions = {"interrupt": state.interrupt, "skip": state.skip, "stop": state.stop_generating}
        if action in actions:
            actions[action]()

    def send_part(self, file: Mapping[str, Any], offset: int, data: bytes) -> dict[str, Any]:
        """Write a part of a model file. {"error": ...} if it cannot be taken."""
        try:
            return self._cache.write_part(FileName(**file), offset, data)
        except (RequestError, WorkerRefusesError, TypeError) as error:
            return {"error": _describe(error)}

    def report(self) -> dict[str, Any]:
        """What modules.cluster.reports reads."""
        from backend.parallel.running import status  # imports torch

        plan, loaded = status.current_plan(), self.app.models.loaded_checkpoint
        return {
            **self._facts,
            "checkpoint": self._model_key if loaded else "",
            "checkpoint_name": loaded.path.name if loaded else "",
            "networks": sorted(self._networks),
            "running": self.app.jobs.tasks.current or "",
            "num_done": self._num_done,
            "plan": "" if plan is None else plan.reason,
            "step_ms": None if plan is None else plan.measured_ms,
            "slots": [_slot(slot) for slot in status.describe_slots()],
            "free_disk_bytes": _free_bytes(self._cache.folder),
        }

    def close(self) -> None:
        self.app.close()

    # On the job's thread

    def _do(self, order: Order) -> bytes:
        began_s = time.perf_counter()
        paths = self._paths(order)
        apply_options(self.app.options, self._own_options, {**order.options, **self._model_options(order, paths)})
        p = build_request(order, self.app.script_runners.get(order.kind), self.app)
        engine_before = self.app.models.engine
        engine = self.app.models.ensure_loaded(self.app.options.snapshot())
        load_s = time.perf_counter() - began_s if engine is not engine_before else 0.0
        self._model_key, self._networks = order.model_key, frozenset(file.name for file in order.files if file.kind == "network")
        processed = process_images(p)
        self._num_done += 1
        return pack_outcome(processed, p, run_s=time.perf_counter() - began_s, load_s=load_s)

    def _paths(self, order: Order) -> dict[FileName, str]:
        """Where the order's files are here. They were there when it was begun, but a user may have removed one."""
        found = {}
        for file in order.files:
            path = self._cache.locate(file)
            if path is None:
                raise WorkerRefusesError(f"its {file.kind} {file.name} has been removed.")
            found[file] = str(path)
        return found

    def _model_options(self, order: Order, paths: Mapping[FileName, str]) -> dict[str, Any]:
        """Settings that choose the checkpoint and additional modules by this machine's names."""
        modules = [path for file, path in paths.items() if file.kind == "module"]
        chosen: dict[str, Any] = {"forge_additional_modules": modules, "sd_vae": "Automatic"}
        checkpoint = next((path for file, path in paths.items() if file.kind == "checkpoint"), None)
        if checkpoint is not None:
            self.app.checkpoints.refresh()
            info = next((info for info in self.app.checkpoints if str(info.path) == checkpoint), None)
            if info is None:
                raise WorkerRefusesError(f"it does not take {checkpoint} for a checkpoint.")
            chosen["sd_model_checkpoint"] = info.title
        return chosen

    def _progress(self, order_id: str, known_preview: int) -> dict[str, Any]:
        if self.app.jobs.tasks.current != f"task({order_id})":
            return {}
        state = self.app.state
        found: dict[str, Any] = {name: getattr(state, name) for name in ("job_no", "job_count", "sampling_step", "sampling_steps")}
        picture, found["preview_id"] = state.current_image, state.id_live_preview
        if picture is not None and found["preview_id"] > known_preview:
            found["preview"] = pack(_small(picture), what="preview")
        return found


def _small(picture: Image.Image) -> Image.Image:
    if max(picture.size) <= PREVIEW_PX:
        return picture
    small = picture.copy()
    small.thumbnail((PREVIEW_PX, PREVIEW_PX))
    return small


def _slot(slot: Any) -> dict[str, Any]:
    names = ("name", "total_bytes", "free_bytes", "utilization")
    return {"device": slot.torch_device, **{name: getattr(slot, name) for name in names}}


def _free_bytes(folder: Any) -> int | None:
    import shutil  # only for this report

    existing = next((place for place in (folder, *folder.parents) if place.is_dir()), None)
    return None if existing is None else shutil.disk_usage(existing).free


def _describe(error: BaseException) -> dict[str, Any]:
    """An error as `fleet.read_progress` reads it."""
    if isinstance(error, WorkerRefusesError):
        return {"kind": "refused", "text": str(error)}
    if isinstance(error, RequestError):
        return {"kind": "request", "text": str(error), "status": error.status}
    if is_out_of_memory(error):
        return {"kind": "memory", "text": str(error)}
    return {"kind": "error", "text": f"{type(error).__name__}: {error}"}
