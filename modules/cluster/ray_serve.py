"""Workers as Ray Serve replicas. The only file that knows Ray: it connects, deploys, addresses one replica, and turns Ray's errors into ours.

The class of the replicas and the router's travel to the cluster by value, so that the head needs Ray alone and not this program.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import ProxyLocation, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from modules.app_config import SCRIPT_DIR
from modules.cluster.fleet import WorkerLostError
from modules.cluster.joining import check_reachable
from modules.launch.errors import SetupError

log = logging.getLogger(__name__)

APP_NAME, NAMESPACE = "multi-gpu-webui", "multi-gpu-webui"
CALL_TIMEOUT_S = 15.0
"""A worker that does not answer a call for so long is lost. Calls are short: an order is followed by many of them."""
START_TIMEOUT_S = 60.0
SEND_TIMEOUT_S = 300.0
"""With the last part of a file the worker computes the hash of all of it."""
REPORT_TIMEOUT_S = 3.0
OBJECT_STORE_BYTES = 200 << 20
MAX_CALLS = 100
_CPUS = 1


class AddressedRouter(RequestRouter):
    """Sends each call to the replica that its first argument names; the front has chosen it. A call to one that is gone fails at once."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The named replica."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        name = pending_request.args[0]
        found = [replica for replica in candidate_replicas if replica.replica_id.unique_id == name]
        if not found:
            if not pending_request.future.done():
                pending_request.future.set_exception(LookupError(f"worker {name} is gone"))
            return [candidate_replicas[:1]]  # ends the router's search, which looks at the future before it uses one
        return [found]


class EngineReplica:
    """A worker: our engine in a Ray Serve replica. The first argument of a call is the replica's own name, by which it was routed."""

    def __init__(self) -> None:
        from modules.cluster.commands import start_worker_engine  # this program, as it is on the worker's machine

        self._name = serve.get_replica_context().replica_tag
        self._engine = start_worker_engine(self._name, ray.util.get_node_ip_address())

    async def report(self) -> dict[str, Any]:
        """What modules.cluster.reports reads."""
        return await asyncio.to_thread(self._engine.report)

    async def start(self, name: str, order_id: str, message: bytes) -> dict[str, Any]:
        return await self._engine.start(order_id, message)

    async def follow(self, name: str, order_id: str, known_preview: int) -> dict[str, Any]:
        return await self._engine.follow(order_id, known_preview)

    async def control(self, name: str, order_id: str, action: str) -> None:
        self._engine.control(order_id, action)

    async def send_part(self, name: str, file: dict[str, Any], offset: int, data: bytes) -> dict[str, Any]:
        return await asyncio.to_thread(self._engine.send_part, file, offset, data)

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.close()


class RayFleet:
    """The replicas of our Serve application; see modules.cluster.fleet.Fleet."""

    def __init__(self, handle: Any, deployment_name: str, gpus_per_worker: float | None) -> None:
        self._handle = handle
        self._deployment_name = deployment_name
        self._gpus_per_worker = gpus_per_worker
        self._num_workers = 0

    def reports(self) -> Sequence[Any]:
        """Raises nothing: a worker that does not answer is missing."""
        try:
            answers = self._handle.broadcast("report").results(timeout_s=REPORT_TIMEOUT_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError, LookupError, OSError) as error:
            log.debug("No reports: %s", error)
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    def start(self, worker: str, order_id: str, message: bytes) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = self._call("start", worker, order_id, message, timeout_s=START_TIMEOUT_S)
        return answer

    def follow(self, worker: str, order_id: str, known_preview: int) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = self._call("follow", worker, order_id, known_preview)
        return answer

    def control(self, worker: str, order_id: str, action: str) -> None:
        self._call("control", worker, order_id, action)

    def send_part(self, worker: str, file: Mapping[str, Any], offset: int, data: bytes) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = self._call("send_part", worker, dict(file), offset, data, timeout_s=SEND_TIMEOUT_S)
        return answer

    def _call(self, method: str, worker: str, *arguments: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        response = getattr(self._handle, method).remote(worker, *arguments)
        try:
            return response.result(timeout_s=timeout_s)
        except TimeoutError:
            response.cancel()
            raise WorkerLostError(f"no answer within {timeout_s:.0f} s") from None
        except (RayError, RayServeException, LookupError, OSError) as error:
            raise WorkerLostError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error

    def num_places(self) -> int:
        try:
            nodes = [node for node in ray.nodes() if node["Alive"]]
        except (RayError, OSError, RuntimeError) as error:  # the head is away; Ray connects again when it is back
            log.debug("The machines are not known: %s", error)
            return self._num_workers
        if self._gpus_per_worker is None:
            return sum(1 for node in nodes if node["Resources"].get("CPU", 0) >= _CPUS)
        return sum(int(node["Resources"].get("GPU", 0) / self._gpus_per_worker + 1e-6) for node in nodes)

    def resize(self, num_workers: int) -> None:
        if num_workers == self._num_workers:
            return
        from ray.serve._private.common import DeploymentID  # what the external scaling API takes
        from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

        try:
            controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            target = DeploymentID(name=self._deployment_name, app_name=APP_NAME)
            ray.get(controller.update_deployment_replicas.remote(target, num_workers), timeout=CALL_TIMEOUT_S)
        except (RayError, ValueError, TimeoutError) as error:
            log.warning("The number of workers stays %d instead of %d: %s", self._num_workers, num_workers, error)
            return
        log.info("Workers wanted: %d.", num_workers)
        self._num_workers = num_workers

    def close(self) -> None:
        ray.shutdown()


def connect(address: str, *, gpus_per_worker: float | None, code: str) -> RayFleet:
    """Connect to the cluster and deploy the workers, or find those that an earlier front with the same `code` has deployed.

    Raises:
        SetupError: the head cannot be reached, runs another Ray, or is not there.
    """
    _connect(address)
    name = f"engine-{code}"
    try:
        serve.start(proxy_location=ProxyLocation.Disabled)
        application = serve.status().applications.get(APP_NAME)
        if application is not None and name in application.deployments:
            return RayFleet(serve.get_deployment_handle(name, APP_NAME), name, gpus_per_worker)
        return RayFleet(_deploy(name, gpus_per_worker), name, gpus_per_worker)
    except (RayError, RayServeException, TimeoutError, ValueError) as error:
        ray.shutdown()
        raise SetupError(f"--cluster {address}: Ray Serve could not be started there ({type(error).__name__}: {error}).") from error


def _deploy(name: str, gpus_per_worker: float | None) -> Any:
    ray.cloudpickle.register_pickle_by_value(sys.modules[EngineReplica.__module__])
    return serve._run(make_application(name, gpus_per_worker), name=APP_NAME, route_prefix=None, _blocking=False, external_scaler_enabled=True)


def make_application(name: str, gpus_per_worker: float | None) -> Any:
    """The Serve application whose replicas are our workers. It begins with one; the front says how many there are to be."""
    options: dict[str, Any] = {"num_cpus": _CPUS, **({} if gpus_per_worker is None else {"num_gpus": gpus_per_worker})}
    deployment = serve.deployment(EngineReplica).options(
        name=name,
        num_replicas=1,
        ray_actor_options=options,
        max_replicas_per_node=1 if gpus_per_worker is None else MAX_CALLS,
        max_ongoing_requests=MAX_CALLS,
        graceful_shutdown_timeout_s=600.0,  # a worker that is to go ends its order first
        health_check_period_s=5.0,
        health_check_timeout_s=30.0,
        request_router_config=RequestRouterConfig(request_router_class=AddressedRouter),
    )
    return deployment.bind()


def build_for_config(args: dict[str, str]) -> Any:
    """For a Serve config file (deploy/kubernetes/rayservice.yaml): `gpus_per_worker` may be an argument."""
    from modules.cluster.commands import versions_of, worker_config  # only where the program itself is

    gpus = args.get("gpus_per_worker")
    return make_application(f"engine-{versions_of(worker_config())['code']}", None if gpus is None else float(gpus))


def _connect(address: str) -> None:
    """Raises SetupError."""
    if address == "local":
        options: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": str(SCRIPT_DIR)}}
    else:
        check_reachable(address)
        options = {"address": address}
    ending = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level="warning", **options)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ending)  # Ray has set its own, which would not shut this server down cleanly
    except ConnectionError as error:
        remedy = "Start one with `python -m modules.cluster head`, or use --cluster local."
        raise SetupError(f"--cluster {address}: there is no Ray cluster ({_first_line(error)}). {remedy}") from error
    except (RuntimeError, RayError, ValueError, OSError) as error:
        remedy = f"The head and every worker must run Ray {ray.__version__} and the same Python; see requirements_cluster.txt."
        raise SetupError(f"--cluster {address}: the cluster cannot be joined ({_first_line(error)}). {remedy}") from error


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:500]
