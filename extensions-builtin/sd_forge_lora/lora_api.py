"""API routes for LoRA files: /sdapi/v1/loras and /sdapi/v1/refresh-loras."""

from __future__ import annotations

from typing import Any

import networks
from fastapi import FastAPI

from modules.api.routes import RoutePolicy, create_router
from modules.application import current_application


def add_routes(_: Any, app: FastAPI) -> None:
    """Add them behind the API's password, if there is an API."""
    config = current_application().config
    if not (config.api or config.nowebui):
        return
    router = create_router(RoutePolicy(credentials=config.api_auth, log_calls=config.api_log))

    @router.get("/sdapi/v1/loras")
    def loras() -> list[dict[str, Any]]:
        """LoRA files; both `name` and `alias` work in prompts."""
        return [{"name": one.name, "alias": one.alias, "path": one.filename, "metadata": one.metadata} for one in networks.registry()]

    @router.post("/sdapi/v1/refresh-loras")
    def refresh_loras() -> None:
        networks.list_available_networks()

    app.include_router(router)
