"""The front on a real Ray cluster of this machine: a head and two machines of one core, whose workers run the narrow checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed (requirements_cluster.txt)")

from modules import application
from modules.application import Application, build_application
from modules.cluster.commands import versions_of
from modules.cluster.fleet import WorkerLostError
from modules.cluster.joining import worker_environment
from modules.cluster.start import build_front
from modules.launch.cmd_args import config_for_tests
from modules.processing import Processed, process_images
from tests.support.checkpoints import write_checkpoint
from tests.support.narrow_application import pixels, txt2img
from tools.campaign.security_server import free_port

with warnings.catch_warnings():  # Ray's own
    warnings.simplefilter("ignore")
    from modules.cluster import ray_serve

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CLIENT_PORT = free_port()
MACHINE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}


@pytest.fixture(autouse=True, scope="module")
def close_event_loops() -> None:
    """Ray closes its own."""


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The cluster's machines; their workers get their models from the front."""
    from ray.cluster_utils import Cluster

    flags = ["--data-dir", str(tmp_path_factory.mktemp("worker")), "--disable-all-extensions", "--loglevel", "WARNING"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**worker_environment(os.environ, flags), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={**MACHINE, "num_cpus": 0, "ray_client_server_port": CLIENT_PORT})
        for _ in range(2):
            cluster.add_node(**MACHINE)
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def app(machines: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    """The front, with both workers there."""
    folder = tmp_path_factory.mktemp("front")
    write_checkpoint(folder / "models" / "Stable-diffusion" / "narrow.safetensors", "sd15")
    app = build_application(config_for_tests(folder, cluster=machines.address))
    app.options.live_previews_enable = False
    application.install(app)
    versions = versions_of(app.config)
    front = build_front(app, ray_serve.connect(machines.address, gpus_per_worker=None, code=versions["code"]), versions)
    wait_until(lambda: num_idle(app) == 2)
    yield app
    application.install(None)
    app.close()
    front.close()


def wait_until(is_true: Callable[[], bool], seconds: float = 60) -> None:
    deadline_s = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.05)


def num_idle(app: Application) -> int:
    front: Any = app.remote_engine
    return int(front.dispatcher.num_idle())


def submit(app: Application, **fields: Any) -> Any:
    p = txt2img(**fields)
    return app.jobs.submit(None, "txt2img", lambda: process_images(p), request=p)


def alone(app: Application, **fields: Any) -> Processed:
    front, app.remote_engine = app.remote_engine, None
    try:
        return process_images(txt2img(**fields))
    finally:
        app.remote_engine = front


def test_pictures_of_workers_equal_those_made_alone(app: Application) -> None:
    jobs = [submit(app, seed=seed) for seed in range(4)]
    made = [job.wait(120) for job in jobs]
    for seed, there in enumerate(made):
        here = alone(app, seed=seed)
        assert there.infotexts == here.infotexts
        assert np.array_equal(pixels(there.images[0]), pixels(here.images[0]))
    front: Any = app.remote_engine
    described = front.describe()
    assert sorted(worker["done"] > 0 for worker in described["workers"]) == [True, True]
    assert {worker["checkpoint"] for worker in described["workers"]} == {"narrow.safetensors"}


def test_a_request_with_many_pictures_is_spread(app: Application) -> None:
    wait_until(lambda: num_idle(app) == 2)
    there, here = submit(app, n_iter=4).wait(120), alone(app, n_iter=4)
    assert there.infotexts == here.infotexts
    assert all(np.array_equal(pixels(one), pixels(other)) for one, other in zip(there.images, here.images))


def test_interrupt_reaches_a_worker(app: Application) -> None:
    wait_until(lambda: num_idle(app) == 2)
    job = submit(app, n_iter=60, steps=30)
    wait_until(lambda: app.state.of_job(job.task_id).job_no >= 1 if job.task_id in app.jobs.tasks.running else False)
    began_s = time.monotonic()
    app.state.of_job(job.task_id).interrupt()
    assert 0 < len(job.wait(60).infotexts) < 60
    assert time.monotonic() - began_s < 10


def test_a_call_to_a_worker_that_is_gone_fails_at_once(app: Application) -> None:
    front: Any = app.remote_engine
    began_s = time.monotonic()
    with pytest.raises(WorkerLostError):
        front.fleet.follow("nobody", "x", -1)
    assert time.monotonic() - began_s < 5


OUTSIDE = """
import sys, time
from modules.cluster import ray_serve
from modules.cluster.fleet import WorkerLostError

fleet = ray_serve.connect(sys.argv[1], gpus_per_worker=None, code=sys.argv[2])
deadline = time.monotonic() + 60
while len(reports := fleet.reports()) < 2 and time.monotonic() < deadline:
    time.sleep(0.2)
answer = fleet.follow(reports[0]["worker"], "no such order", -1)
fleet.resize(2)
print(sorted(report["checkpoint_name"] for report in reports), answer["error"]["kind"], fleet.num_places())
fleet.close()
"""


def test_a_front_outside_of_the_cluster_reaches_the_workers(app: Application) -> None:
    """As `--cluster ray://HEAD:10001` does."""
    code = versions_of(app.config)["code"]
    command = [sys.executable, "-W", "ignore", "-c", OUTSIDE, f"ray://127.0.0.1:{CLIENT_PORT}", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.stdout.splitlines()[-1:] == ["['narrow.safetensors', 'narrow.safetensors'] lost 2"], done.stderr[-3000:]


def test_kill_9_of_a_worker_loses_no_job_and_a_new_one_takes_its_place(app: Application) -> None:
    wait_until(lambda: num_idle(app) == 2)
    jobs = [submit(app, seed=seed, steps=30) for seed in range(6)]
    wait_until(lambda: num_idle(app) == 0)
    os.kill(pid_of_a_worker(app), signal.SIGKILL)
    made = [job.wait(120) for job in jobs]
    assert [processed.seed for processed in made] == list(range(6))
    assert any("Made again on" in processed.comments for processed in made)
    here = alone(app, seed=3, steps=30)
    assert np.array_equal(pixels(made[3].images[0]), pixels(here.images[0]))
    wait_until(lambda: num_idle(app) == 2, seconds=90)


def pid_of_a_worker(app: Application) -> int:
    front: Any = app.remote_engine
    return int(front.describe()["workers"][0]["pid"])
