"""A server for tests: the real application and the real routes; pictures come from a maker without a model."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from safetensors.numpy import save_file

from modules.api.api import create_api
from modules.application import Application
from modules.http_edge.server import create_fastapi_app
from modules.processing.result import Processed, create_infotext
from modules.processing.validation import fix_seed, set_all_seeds, validate_request
from tests.support.applications import installed_application


def write_checkpoint_header(path: Path, resolution: str | None = "64x64") -> None:
    """A file that the checkpoint list accepts as a model; nothing loads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {} if resolution is None else {"modelspec.resolution": resolution}
    save_file({"name": np.frombuffer(path.stem.encode(), dtype=np.uint8)}, str(path), metadata=metadata)


@dataclass
class PictureMaker:
    """Runs requests without a model: validates them like the product and fills each picture with noise from its seed."""

    app: Application
    requests: list[Any] = field(default_factory=list)
    before: Callable[[Any], None] = lambda p: None

    def __call__(self, p: Any) -> Processed:
        validate_request(p, self.app)
        self.requests.append(p)
        self.before(p)
        fix_seed(p)
        count = p.batch_size * p.n_iter
        p.all_prompts, p.all_negative_prompts = [p.prompt] * count, [p.negative_prompt] * count
        p.main_prompt, p.main_negative_prompt = p.prompt, p.negative_prompt
        p.sd_model_name, p.sd_model_hash = "tiny", "0123456789"
        set_all_seeds(p)
        pictures = []
        for seed in p.all_seeds:
            noise = np.random.default_rng(seed).integers(0, 256, (p.height, p.width, 3), dtype=np.uint8)
            pictures.append(Image.fromarray(noise))
        infotexts = [create_infotext(p, p.all_prompts, p.all_seeds, p.all_subseeds, index=index) for index in range(count)]
        return Processed(p, pictures, infotexts=infotexts, info=infotexts[0])


@dataclass
class Server:
    """A running API: its application, a client, and the maker of its pictures."""

    app: Application
    client: TestClient
    maker: PictureMaker

    def get(self, path: str, **arguments: Any) -> Any:
        """The JSON of a GET that must succeed."""
        answer = self.client.get(path, **arguments)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, body: Any = None, **arguments: Any) -> Any:
        """The JSON of a POST that must succeed."""
        answer = self.client.post(path, json=body, **arguments)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def txt2img(self, **body: Any) -> Any:
        return self.post("/sdapi/v1/txt2img", body)

    def img2img(self, **body: Any) -> Any:
        return self.post("/sdapi/v1/img2img", body)

    @property
    def last_request(self) -> Any:
        return self.maker.requests[-1]


ServerFactory = Callable[..., AbstractContextManager[Server]]


@contextmanager
def running_server(folder: Path, *, checkpoints: tuple[str, ...] = ("tiny.safetensors",), **config: Any) -> Iterator[Server]:
    """A server on the data folder `folder`; `checkpoints` are file names in its model folder, `config` fields of AppConfig."""
    for name in checkpoints:
        write_checkpoint_header(folder / "models" / "Stable-diffusion" / name)
    with installed_application(folder, **{"api": True, **config}) as app:
        maker = PictureMaker(app)
        fastapi_app = create_fastapi_app(app.config)
        create_api(app, fastapi_app, process=maker)
        with TestClient(fastapi_app, base_url="http://127.0.0.1:7860") as client:
            yield Server(app, client, maker)


@pytest.fixture
def start_server(tmp_path: Path) -> ServerFactory:
    """Starts a server on request: `with start_server(api_auth=...) as server`."""
    return partial(running_server, tmp_path)


@pytest.fixture
def server(start_server: ServerFactory) -> Iterator[Server]:
    with start_server() as server:
        yield server


def to_base64(image: Image.Image, image_format: str = "PNG", **arguments: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **arguments)
    return base64.b64encode(buffer.getvalue()).decode()


def from_base64(text: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image


def info_of(answer: Any) -> Any:
    return json.loads(answer["info"])
