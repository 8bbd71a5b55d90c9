"""The object that extensions of A1111 make of the API."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from modules.api import api as api_module
from modules.api import models
from modules.api.api import Api
from tests.modules.api.conftest import Server


def test_routes_are_called_from_python(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_module, "process_images", server.maker)
    held = Api(FastAPI(), threading.Lock())
    wanted = server.post("/sdapi/v1/txt2img", {"prompt": "a cat", "seed": 3, "steps": 1})
    answer = held.text2imgapi(models.StableDiffusionTxt2ImgProcessingAPI(prompt="a cat", seed=3, steps=1))
    assert answer.images == wanted["images"]
    changed = held.img2imgapi(models.StableDiffusionImg2ImgProcessingAPI(prompt="a cat", seed=3, steps=1, init_images=[answer.images[0]]))
    assert len(changed.images) == 1


def test_a_route_of_its_own_is_put_on_the_server(server: Server) -> None:
    app = FastAPI()

    def ask() -> dict[str, Any]:
        return {"told": True}

    Api(app).add_api_route("/guest/ask", ask, methods=["GET"])
    assert TestClient(app).get("/guest/ask").json() == {"told": True}
