from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from modules.application import Application
from modules.prompts import extra_networks
from tests.support.narrow_application import narrow_application, pixels, run, txt2img


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with narrow_application(tmp_path_factory.mktemp("networks"), is_shallow=True) as (app, _):
        app.options.samples_save = app.options.grid_save = False
        yield app


@pytest.fixture
def marks() -> Iterator[list[int]]:
    """A network kind that marks the UNet, and records the marks present at each activation."""
    found: list[int] = []

    class Marker(extra_networks.ExtraNetwork):
        def activate(self, p: Any, params_list: list[Any]) -> None:
            objects = p.sd_model.forge_objects
            found.append(objects.unet.model_options.get("marks", 0))
            objects.unet = objects.unet.clone()
            objects.unet.model_options["marks"] = objects.unet.model_options.get("marks", 0) + 1

        def deactivate(self, p: Any) -> None:
            pass

    extra_networks.register_extra_network(Marker("marker"))
    yield found
    extra_networks.extra_network_registry.pop("marker")


def test_networks_are_put_on_the_model_as_it_was_loaded_in_each_batch_and_pass(app: Application, marks: list[int]) -> None:
    run(txt2img(steps=1, n_iter=2, enable_hr=True, hr_scale=1.5, hr_upscaler="Latent", hr_cfg=4.0))
    assert marks == [0, 0, 0, 0]
    engine = app.models.engine
    assert engine is not None
    assert engine.forge_objects_after_applying_lora.unet.model_options["marks"] == 1
    assert "marks" not in engine.forge_objects_original.unet.model_options


def test_none_are_applied_where_a_request_forbids_it(app: Application, marks: list[int]) -> None:
    run(txt2img(steps=1, disable_extra_networks=True))
    assert marks == []


def test_an_embedding_put_into_the_folder_counts_from_the_next_job_on(app: Application) -> None:
    folder = app.config.embeddings_dirs[0]
    folder.mkdir(parents=True, exist_ok=True)
    before = pixels(run(txt2img(prompt="newword", steps=2)).images[0])
    torch.save({"string_to_param": {"*": torch.randn(2, 64, generator=torch.Generator().manual_seed(0))}}, folder / "newword.pt")
    kept = run(txt2img(prompt="newword", steps=2, do_not_reload_embeddings=True))
    assert (pixels(kept.images[0]) == before).all()
    result = run(txt2img(prompt="newword", steps=2))
    assert (pixels(result.images[0]) != before).any()
    assert "newword" in result.infotexts[0].split("TI hashes")[1]
    (folder / "newword.pt").unlink()
    assert (pixels(run(txt2img(prompt="newword", steps=2)).images[0]) == before).all()


# the end of a job


class Witness(extra_networks.ExtraNetwork):
    """Records when it was called with what."""

    def __init__(self, fails_at_end: bool = False) -> None:
        super().__init__("witness")
        self.fails_at_end = fails_at_end
        self.told: list[str] = []

    def activate(self, p: Any, params_list: list[Any]) -> None:
        self.told.append("on")

    def deactivate(self, p: Any) -> None:
        self.told.append("off")
        if self.fails_at_end:
            raise ValueError("cannot let go")


@pytest.fixture
def witness() -> Iterator[Witness]:
    kind = Witness()
    extra_networks.register_extra_network(kind)
    yield kind
    extra_networks.extra_network_registry.pop("witness")


def test_networks_are_told_once_when_a_job_ends(app: Application, witness: Witness) -> None:
    """After all batches, whether or not the prompt names one; the next job starts from scratch."""
    run(txt2img(prompt="a <witness:x>", steps=1, n_iter=2))
    assert witness.told == ["on", "on", "off"]
    run(txt2img(steps=1))
    assert witness.told == ["on", "on", "off", "on", "off"]


def test_networks_are_told_when_a_job_fails(app: Application, witness: Witness) -> None:
    request = txt2img(steps=1)

    def fail() -> None:
        raise ValueError("no conditions today")

    request.setup_conds = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no conditions today"):
        run(request)
    assert witness.told == ["on", "off"]


def test_networks_are_told_when_a_job_is_interrupted(app: Application, witness: Witness) -> None:
    request = txt2img(steps=2, n_iter=2)
    setup = request.setup_conds

    def interrupt() -> None:
        setup()
        app.state.interrupt()

    request.setup_conds = interrupt  # type: ignore[method-assign]
    run(request)
    assert witness.told == ["on", "off"]


def test_networks_that_were_not_asked_for_are_not_told(app: Application, witness: Witness) -> None:
    run(txt2img(steps=1, disable_extra_networks=True))
    assert witness.told == []


def test_a_kind_that_fails_at_the_end_does_not_cost_the_picture(app: Application, witness: Witness) -> None:
    witness.fails_at_end = True
    assert len(run(txt2img(steps=1)).images) == 1
    assert witness.told == ["on", "off"]
