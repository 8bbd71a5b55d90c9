"""The front with real engines as workers, in this process: pictures equal those of a server alone."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modules import application
from modules.application import Application, build_application
from modules.cluster.dispatch import Dispatcher
from modules.cluster.fleet import WorkerLostError
from modules.cluster.front import ClusterFront, units_of
from modules.cluster.kept import pack_request, unpack_request
from modules.cluster.model_files import find_networks
from modules.cluster.start import build_front
from modules.errors import RequestError
from modules.launch.cmd_args import config_for_tests
from modules.processing import Processed, process_images
from tests.support.checkpoints import write_checkpoint
from tests.support.cluster import VERSIONS, EngineFleet, ScriptedFleet, report_of
from tests.support.narrow_application import img2img, pixels, txt2img

ALMOST = 1 / 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a narrow checkpoint."""
    folder = tmp_path_factory.mktemp("cluster")
    write_checkpoint(folder / "models" / "Stable-diffusion" / "narrow.safetensors", "sd15")
    return folder


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[tuple[Application, EngineFleet]]:
    """A front with two workers that have no model files of their own, and what it makes alone."""
    fleet = EngineFleet({"a": folder / "a", "b": folder / "b"})
    app = build_application(config_for_tests(folder, cluster="local"))
    app.options.live_previews_enable = False
    application.install(app)
    front = build_front(app, fleet, dict(VERSIONS))
    yield app, fleet
    application.install(None)
    app.close()
    front.close()


@pytest.fixture(scope="module")
def alone(cluster: tuple[Application, EngineFleet]) -> Callable[..., Processed]:
    """Makes the pictures of a request on this machine."""
    app, _ = cluster

    def make(p: Any) -> Processed:
        front, app.remote_engine = app.remote_engine, None
        try:
            return process_images(p)
        finally:
            app.remote_engine = front

    return make


def run(app: Application, p: Any, task_id: str | None = None) -> Processed:
    return app.jobs.submit(task_id, "txt2img", lambda: process_images(p), request=p).wait(120)


def compare(there: Processed, here: Processed, *, most: float = 0.0) -> None:
    """Pictures are equal within `most` of the full range, infotexts and seeds exactly."""
    assert there.infotexts == here.infotexts
    assert (there.all_seeds, there.index_of_first_image, there.width, there.height) == (
        here.all_seeds,
        here.index_of_first_image,
        here.width,
        here.height,
    )
    assert len(there.images) == len(here.images)
    for one, other in zip(there.images, here.images):
        assert np.abs(pixels(one) - pixels(other)).max() <= most * 255


def test_a_picture_equals_the_one_made_alone(cluster: Any, alone: Any) -> None:
    app, fleet = cluster
    fields = {"styles": [], "hr_prompt": "", "override_settings": {"CLIP_stop_at_last_layers": 2}}
    there = run(app, txt2img(**fields))
    compare(there, alone(txt2img(**fields)))
    assert "Clip skip: 2" in there.infotexts[0]
    received = [path for engine in fleet.engines.values() for path in engine.app.config.ckpt_dirs[-1].rglob("narrow.safetensors")]
    assert len(received) == 1  # the worker had no model: it was sent


def test_img2img_with_a_mask_and_hires_fix_equal_those_made_alone(cluster: Any, alone: Any) -> None:
    app, _ = cluster
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    compare(run(app, img2img(mask=mask)), alone(img2img(mask=mask)))
    hires = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "hr_prompt": "a blue dog"}
    compare(run(app, txt2img(**hires)), alone(txt2img(**hires)))


def test_many_batches_are_spread_and_come_back_in_order(cluster: Any, alone: Any) -> None:
    app, fleet = cluster
    front: Any = app.remote_engine
    front.dispatcher.router.load_s = 0.0  # or a load would not pay for such small pictures
    before = {name: engine._num_done for name, engine in fleet.engines.items()}
    wait_for_idle(app)
    compare(run(app, txt2img(n_iter=4, batch_size=2)), alone(txt2img(n_iter=4, batch_size=2)))
    assert all(engine._num_done > before[name] for name, engine in fleet.engines.items())


def wait_for_idle(app: Application) -> None:
    front: Any = app.remote_engine
    for _ in range(200):
        if front.dispatcher.num_idle() == 2:
            return
        threading.Event().wait(0.05)
    raise AssertionError("the workers are not idle")


def test_the_only_batch_is_spread_too(cluster: Any, alone: Any) -> None:
    """A batch of another size may round differently in the last bit."""
    app, _ = cluster
    wait_for_idle(app)
    varied = {"batch_size": 4, "subseed": 5, "subseed_strength": 0.3}
    compare(run(app, txt2img(**varied)), alone(txt2img(**varied)), most=ALMOST)


def test_the_front_saves_and_names_the_pictures(cluster: Any, folder: Path) -> None:
    app, _ = cluster
    processed = run(app, txt2img(n_iter=2, seed=77))
    saved = sorted(path.name for path in (folder / "outputs").rglob("*.png"))
    assert sum("-77" in name for name in saved) >= 1
    assert sum("-78" in name for name in saved) >= 1
    assert json.loads(processed.js())["all_seeds"] == [77, 78]
    assert not list((folder / "a").rglob("*.png")) and not list((folder / "b").rglob("*.png"))
    assert (folder / "params.txt").read_text().startswith("a red cat")


def test_a_random_seed_is_drawn_on_the_front(cluster: Any, alone: Any) -> None:
    app, _ = cluster
    there = run(app, txt2img(seed=-1))
    assert there.seed >= 0
    compare(there, alone(txt2img(seed=there.seed, subseed=there.subseed)))


def test_a_mistake_is_told_as_alone_and_costs_no_worker(cluster: Any) -> None:
    app, _ = cluster
    with pytest.raises(RequestError, match="steps"):
        run(app, txt2img(steps=-4))
    with pytest.raises(RequestError, match="cannot be sent to a worker"):
        run(app, txt2img(extra_generation_params={"x": object()}))
    wait_for_idle(app)


def test_interrupt_reaches_the_worker_and_its_pictures_come_back(cluster: Any, folder: Path) -> None:
    app, _ = cluster
    wait_for_idle(app)
    front: Any = app.remote_engine
    job = app.jobs.submit("task(stop)", "txt2img", lambda: process_images(p), request=(p := txt2img(n_iter=12, steps=8, seed=43210)))
    for _ in range(600):
        if "task(stop)" in app.jobs.tasks.running and app.state.of_job("task(stop)").job_no >= 1:
            break
        threading.Event().wait(0.05)
    app.state.of_job("task(stop)").interrupt()
    processed = job.wait(60)
    num_made = len(processed.infotexts) - processed.index_of_first_image
    assert 0 < num_made < 12
    saved = [path for path in (folder / "outputs").rglob("*.png") if "-432" in path.name and "grid" not in path.name]
    assert 1 <= len(saved) <= num_made  # finished pictures are saved, those cut short are not
    assert len(saved) == num_made - len(processed.incomplete)
    assert len(front.store) == 0
    wait_for_idle(app)


def test_a_worker_that_dies_loses_nothing_and_it_is_said_beside_the_picture(cluster: Any, alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    app, fleet = cluster
    wait_for_idle(app)
    real, killed = fleet.follow, list[str]()

    def follow(worker: str, order_id: str, known_preview: int) -> Any:
        if not killed or worker in killed:
            killed.append(worker)
            raise WorkerLostError("killed by the test")
        return real(worker, order_id, known_preview)

    monkeypatch.setattr(fleet, "follow", follow)
    there = run(app, txt2img(seed=5))
    monkeypatch.undo()
    compare(there, alone(txt2img(seed=5)))
    assert f"after {killed[0]} was lost" in there.comments
    front: Any = app.remote_engine
    front.dispatcher.beat()
    wait_for_idle(app)


def test_jobs_at_once_have_each_their_own_state(cluster: Any) -> None:
    app, _ = cluster
    jobs = [
        app.jobs.submit(f"task({n})", "txt2img", lambda p=p: process_images(p), request=p) for n, p in enumerate([txt2img(seed=n) for n in range(6)])
    ]
    assert [job.wait(120).seed for job in jobs] == list(range(6))
    assert app.jobs.tasks.running == []


# Requests in the store


def test_jobs_that_were_accepted_survive_a_restart_of_the_front(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "models", tmp_path / "models")
    nobody, order = ScriptedFleet({}), {"seed": 3, "prompt": "a dog", "override_settings": {"CLIP_stop_at_last_layers": 2}}
    app = build_application(config_for_tests(tmp_path, cluster="local"))
    application.install(app)
    first = ClusterFront(app, nobody, VERSIONS)
    first.start()
    p = txt2img(**order)
    app.jobs.submit("task(kept)", "txt2img", lambda: process_images(p), request=p)
    app.options.CLIP_stop_at_last_layers = 3  # changed later: the job keeps the settings it was accepted with
    app.jobs.close(1)
    first.close()
    assert nobody.is_closed
    made: list[Any] = []
    again = build_application(config_for_tests(tmp_path, cluster="local"))
    application.install(again)
    fleet = ScriptedFleet({"a": report_of("a")}, on_start=lambda worker, order: made.append(order) or {})
    second = ClusterFront(again, fleet, VERSIONS)
    second.start()
    second.take_up_jobs()
    for _ in range(200):
        if "task(kept)" in again.jobs.tasks.finished:
            break
        threading.Event().wait(0.05)
    assert again.jobs.tasks.wait_for_result("task(kept)", 1).all_seeds == [3]
    assert (made[0].fields["prompt"], made[0].options["CLIP_stop_at_last_layers"]) == (["a dog"], 2)
    assert len(second.store) == 0
    application.install(None)
    again.close()
    second.close()


def test_a_job_that_ended_the_front_again_and_again_is_dropped(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = build_application(config_for_tests(tmp_path, cluster="local"))
    application.install(app)
    front = ClusterFront(app, ScriptedFleet({}), VERSIONS, dispatcher=Dispatcher(ScriptedFleet({}), VERSIONS))
    front.store.add("task(bad)", "txt2img", pack_request(txt2img(), app.options.data_labels))
    front.store.add("task(broken)", "txt2img", b"no message")
    for _ in range(5):
        front.store.note_start("task(bad)")
    front.take_up_jobs()
    assert len(front.store) == 0
    assert "begun 5 times" in caplog.text
    assert "not a message of this program" in caplog.text
    application.install(None)
    app.close()
    front.close()


def test_a_request_comes_back_from_the_store_as_it_was(cluster: Any) -> None:
    app, _ = cluster
    for p in (txt2img(batch_size=2, hr_upscaler="Latent", styles=["x"]), img2img(mask=Image.new("L", (64, 64), 255), mask_blur_x=7)):
        back = unpack_request(pack_request(p, app.options.data_labels), app)
        assert type(back) is type(p)
        for name in ("prompt", "seed", "steps", "batch_size", "styles", "mask_blur_x", "hr_upscaler"):
            assert getattr(back, name, None) == getattr(p, name, None)
        mask = getattr(p, "image_mask", None)
        assert (mask is None) == (getattr(back, "image_mask", None) is None)


def test_networks_of_a_prompt_are_found_by_name(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("ink", "other"):
        (tmp_path / "sub" / f"{name}.safetensors").touch()
    assert find_networks(["a <lora:ink:0.5> b <lora:nowhere:1>", "<lora:ink:1>"], [tmp_path]) == [tmp_path / "sub" / "ink.safetensors"]
    assert find_networks(["plain"], [tmp_path]) == []


def test_what_is_not_taken_apart() -> None:
    several = img2img(batch_size=2, init_images=[Image.new("RGB", (8, 8))] * 2)
    several.all_prompts = ["a", "b"]
    assert units_of(several) == 1
    listed = txt2img(n_iter=2)
    listed.all_prompts = ["a"] * 3
    assert units_of(listed) == 1
