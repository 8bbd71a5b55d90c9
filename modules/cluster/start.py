"""Connects this server to its cluster: the parts of the front, put together."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from modules.cluster.commands import require_ray, versions_of
from modules.cluster.dispatch import Dispatcher
from modules.cluster.front import ClusterFront
from modules.cluster.sizing import Size, Sizing
from modules.launch.errors import SetupError

if TYPE_CHECKING:
    from modules.application import Application
    from modules.cluster.fleet import Fleet


def connect_front(app: Application) -> ClusterFront:
    """The front of the cluster that --cluster names, looking for workers. Raises SetupError."""
    require_ray()
    from modules.cluster import ray_serve  # imports ray

    config = app.config
    versions = versions_of(config)
    assert config.cluster is not None  # the caller has looked
    fleet = ray_serve.connect(config.cluster, gpus_per_worker=config.gpus_per_replica, code=versions["code"])
    try:
        return build_front(app, fleet, versions)
    except OSError as error:
        fleet.close()
        raise SetupError(f"The file of accepted jobs cannot be opened ({error}). Give a folder of its own with --data-dir.") from error


def build_front(app: Application, fleet: Fleet, versions: dict[str, str]) -> ClusterFront:
    """The started front of a fleet. Raises OSError if its store cannot be opened."""
    least, most = app.config.cluster_workers or (0, None)
    sizing = Sizing(Size(least=least, most=most))

    def fit_fleet() -> None:
        num_jobs = app.jobs.num_waiting + app.jobs.num_running
        fleet.resize(sizing.choose(num_jobs=num_jobs, num_places=fleet.num_places(), now_s=time.monotonic()))

    front = ClusterFront(app, fleet, versions, dispatcher=Dispatcher(fleet, versions, before_beat=fit_fleet))
    front.start()
    return front
