"""Hands an order to a worker, and sends the model files that it lacks."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from modules.cluster.files import PART_BYTES, read_part
from modules.cluster.fleet import Fleet, WorkerRefusesError, check_answer
from modules.cluster.orders import FileName, Order

log = logging.getLogger(__name__)


def hand_over(fleet: Fleet, worker: str, order: Order, sources: Mapping[str, Path]) -> None:
    """Give an order to a worker, after the files it lacks; `sources` says where those with a hash are here.

    Raises WorkerLostError, WorkerRefusesError, MessageError, and the error that the worker answers with.
    """
    message = order.pack()
    for _ in range(2):
        missing = check_answer(fleet.start(worker, order.order_id, message)).get("missing")
        if not missing:
            return
        _send_files(fleet, worker, order.files, missing, sources)
    raise WorkerRefusesError("it still misses files that were sent to it.")


def _send_files(fleet: Fleet, worker: str, files: Sequence[FileName], missing: Sequence[Mapping[str, object]], sources: Mapping[str, Path]) -> None:
    by_hash = {file.sha256: file for file in files if file.sha256 is not None}
    for entry in missing:
        sha256, have_bytes = str(entry.get("sha256")), entry.get("have_bytes")
        if sha256 not in by_hash or sha256 not in sources or not isinstance(have_bytes, int):
            raise WorkerRefusesError("it asks for a file that does not belong to the job.")
        _send_file(fleet, worker, by_hash[sha256], sources[sha256], max(0, have_bytes))


def _send_file(fleet: Fleet, worker: str, file: FileName, source: Path, have_bytes: int) -> None:
    log.info("Sending %s (%.1f MB) to worker %s.", file.name, (file.size_bytes - have_bytes) / 1e6, worker)
    said_s, facts = time.monotonic(), {"kind": file.kind, "name": file.name, "size_bytes": file.size_bytes, "sha256": file.sha256}
    most_calls = 2 * file.size_bytes // PART_BYTES + 10  # twice, because another job may send the same file to the same machine
    for _ in range(most_calls):
        answer = check_answer(fleet.send_part(worker, facts, have_bytes, read_part(source, have_bytes)))
        if answer.get("is_whole"):
            return
        have_bytes = min(max(0, int(answer.get("have_bytes") or 0)), file.size_bytes)
        if time.monotonic() - said_s > 10:
            said_s = time.monotonic()
            log.info("Sending %s to worker %s: %.0f %%.", file.name, worker, 100 * have_bytes / max(1, file.size_bytes))
    raise WorkerRefusesError(f"{file.name} could not be sent: it changed on the front, or its disk takes no more.")
