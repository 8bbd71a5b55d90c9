from __future__ import annotations

import re
from typing import Any

from modules.api.metrics import histogram, metric
from modules.jobs.meter import BOUNDS_S, Histogram
from modules.ui.gpus import workers_html

LINE = re.compile(r'webui_[a-z_]+(\{[a-z_]+="([^"\\\n]|\\.)*"(,[a-z_]+="([^"\\\n]|\\.)*")*\})? (-?\d+(\.\d+(e-?\d+)?)?)')

WORKER: dict[str, Any] = {
    "worker": "w1",
    "machine": 'gpu "one"',
    "address": "10.0.0.1",
    "pid": 12,
    "state": "busy",
    "reason": "<b>plan</b>",
    "running": 1,
    "checkpoint": "model.safetensors",
    "networks": ["ink"],
    "done": 3,
    "speed": 0.5,
    "busy_s": 6.5,
    "step_ms": None,
    "free_disk_bytes": 10,
    "slots": [{"index": 0, "device": "cuda:0", "name": "GPU", "total_bytes": 8 << 30, "free_bytes": 2 << 30, "utilization": 93.0}] * 2,
}
CLUSTER: dict[str, Any] = {"workers": [WORKER], "waiting": 2, "retries": 1, "loads": 4}


class Remote:
    """A front with one worker."""

    drained: tuple[str, bool] | None = None

    def describe(self) -> dict[str, Any]:
        return CLUSTER

    def drain(self, worker: str, *, is_draining: bool = True) -> None:
        self.drained = (worker, is_draining)


def values_of(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_metrics_are_what_prometheus_reads_and_count_jobs(server: Any) -> None:
    server.txt2img(prompt="secret")
    answer = server.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = values_of(answer.text)
    assert values['webui_jobs_ended_total{outcome="finished"}'] == 1
    assert values["webui_job_run_seconds_count"] == values["webui_job_wait_seconds_count"] == 1
    assert values['webui_job_run_seconds_bucket{le="+Inf"}'] == 1
    assert values["webui_jobs_waiting"] == 0
    assert any(name.startswith("webui_slot_memory_total_bytes{") for name in values)
    assert "secret" not in answer.text
    types = re.findall(r"# TYPE (\w+) (\w+)", answer.text)
    assert len(dict(types)) == len(types)


def test_a_fronts_workers_are_there(server: Any) -> None:
    server.app.remote_engine = Remote()
    values = values_of(server.client.get("/metrics").text)
    labels = 'worker="w1",machine="gpu \\"one\\""'
    assert values[f'webui_worker_state{{{labels},state="busy"}}'] == 1
    assert values[f"webui_worker_busy_seconds_total{{{labels}}}"] == 6.5
    assert f"webui_worker_step_milliseconds{{{labels}}}" not in values
    assert values[f'webui_worker_slot_utilization_percent{{{labels},slot="0",device="cuda:0"}}'] == 93
    assert values["webui_cluster_retries_total"] == 1


def test_metrics_need_the_apis_password(start_server: Any) -> None:
    with start_server(api_auth=(("me", "secret"),)) as server:
        assert server.client.get("/metrics").status_code == 401
        assert server.client.get("/metrics", auth=("me", "secret")).status_code == 200


def test_buckets_count_upwards() -> None:
    times = Histogram()
    for seconds in (0.001, 0.5, 1e6):
        times.note(seconds)
    lines = list(histogram("x_seconds", "Text.", times))
    assert lines[2] == 'webui_x_seconds_bucket{le="0.01"} 1'
    assert lines[2 + len(BOUNDS_S)] == 'webui_x_seconds_bucket{le="+Inf"} 3'
    assert list(metric("empty", "gauge", "Text.", [])) == []


def test_the_workers_are_listed_with_the_slots(server: Any) -> None:
    assert server.get("/sdapi/v1/multi-gpu")["cluster"] is None
    server.app.remote_engine = Remote()
    assert server.get("/sdapi/v1/multi-gpu")["cluster"] == CLUSTER


def test_a_worker_is_drained_over_the_api(server: Any) -> None:
    refused = server.client.post("/sdapi/v1/cluster/drain", json={"worker": "w1"})
    assert (refused.status_code, "without --cluster" in refused.text) == (404, True)
    server.app.remote_engine = remote = Remote()
    server.post("/sdapi/v1/cluster/drain", {"worker": "w1"})
    assert remote.drained == ("w1", True)
    server.post("/sdapi/v1/cluster/drain", {"worker": "w1", "draining": False})
    assert remote.drained == ("w1", False)
    assert server.client.post("/sdapi/v1/cluster/drain", json={"worker": ""}).status_code == 422


def test_ready_says_why_not(server: Any, start_server: Any) -> None:
    assert server.get("/internal/ready") == {"ready": True, "reason": ""}
    server.app.remote_engine = Remote()
    assert server.get("/internal/ready")["ready"] is True
    WORKER["state"] = "draining"
    try:
        answer = server.client.get("/internal/ready")
    finally:
        WORKER["state"] = "busy"
    assert (answer.status_code, answer.json()["reason"]) == (503, "No worker is connected.")


def test_a_server_without_a_checkpoint_is_not_ready(start_server: Any) -> None:
    with start_server(checkpoints=()) as server:
        assert server.client.get("/internal/ready").status_code == 503


def test_the_panel_shows_machines_workers_and_slots() -> None:
    text = workers_html(CLUSTER)
    assert "1 of 1 workers are busy; 2 wait for one." in text
    assert text.count("<tr>") == 3
    assert "&lt;b&gt;plan&lt;/b&gt;" in text
    assert text.count("gpu &quot;one&quot;") == 1
    assert "6.0 of 8.0 GiB" in text
    assert "python -m modules.cluster worker" in workers_html({**CLUSTER, "workers": []})
