"""Routes of the page itself: is the server up, progress of a task, facts about this machine. Always installed, also without the API."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from fastapi import Response

from modules.api import models
from modules.launch.sysinfo import collect_sysinfo
from modules.launch.timer import startup_timer

if TYPE_CHECKING:
    from modules.application import Application


class InternalRoutes:
    """One method per route. Progress routes are in modules/api/jobs.py."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def ping(self) -> dict[str, Any]:
        """Uses no thread, so it answers even if all of them are busy."""
        return {}

    async def ready(self) -> Response:
        """200 if a picture could be made now, else 503 with the reason: for load balancers and Kubernetes."""
        reason = self._why_not_ready()
        status = 200 if reason is None else 503
        return Response(json.dumps({"ready": reason is None, "reason": reason or ""}), status_code=status, media_type="application/json")

    def _why_not_ready(self) -> str | None:
        if not len(self.app.checkpoints):
            return "There is no checkpoint."
        remote = self.app.remote_engine
        if remote is not None and not any(worker["state"] in ("idle", "busy") for worker in remote.describe()["workers"]):
            return "No worker is connected."
        return None

    def quicksettings_hint(self) -> list[models.QuicksettingsHint]:
        """Every setting by key and label."""
        return [models.QuicksettingsHint(name=key, label=info.label) for key, info in self.app.options.data_labels.items() if info.label]

    def profile_startup(self) -> dict[str, Any]:
        """Duration of each startup step, in seconds."""
        return {"total": startup_timer.total_s, "records": dict(startup_timer.spans_s)}

    def sysinfo(self, attachment: bool = False) -> Response:
        """Facts about this machine for a bug report; no passwords."""
        text = json.dumps(collect_sysinfo(self.app.config, {}), indent=2, default=str)
        if not attachment:
            return Response(text, media_type="text/plain")
        name = f"sysinfo-{time.strftime('%Y-%m-%d-%H-%M')}.json"
        return Response(text, media_type="application/json", headers={"Content-Disposition": f'attachment; filename="{name}"'})

    def sysinfo_download(self) -> Response:
        return self.sysinfo(attachment=True)
