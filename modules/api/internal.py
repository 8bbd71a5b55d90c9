"""The page's own routes: is the server there, how far is a task, what is known about this machine. Installed with and without the API."""

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
    """One method for each route. Progress routes are in modules/api/jobs.py."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def ping(self) -> dict[str, Any]:
        """Takes no thread, so that it answers however busy all of them are."""
        return {}

    def quicksettings_hint(self) -> list[models.QuicksettingsHint]:
        """Every setting by key and label."""
        return [models.QuicksettingsHint(name=key, label=info.label) for key, info in self.app.options.data_labels.items() if info.label]

    def profile_startup(self) -> dict[str, Any]:
        """How long each part of the start took, in seconds."""
        return {"total": startup_timer.total_s, "records": dict(startup_timer.spans_s)}

    def sysinfo(self, attachment: bool = False) -> Response:
        """What is known about this machine, for a bug report; no passwords."""
        text = json.dumps(collect_sysinfo(self.app.config, {}), indent=2, default=str)
        if not attachment:
            return Response(text, media_type="text/plain")
        name = f"sysinfo-{time.strftime('%Y-%m-%d-%H-%M')}.json"
        return Response(text, media_type="application/json", headers={"Content-Disposition": f'attachment; filename="{name}"'})

    def sysinfo_download(self) -> Response:
        return self.sysinfo(attachment=True)
