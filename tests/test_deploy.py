"""The files of deploy/: what can be checked without a container engine or Kubernetes. They were not run; docs/cluster.md says so."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from modules.api.api import create_internal_api
from modules.application import build_application
from modules.http_edge.server import create_fastapi_app
from modules.launch.cmd_args import config_for_tests, parse_config

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "multi-gpu-webui"
API_VERSIONS = {
    "Deployment": "apps/v1",
    "Service": "v1",
    "PersistentVolumeClaim": "v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "RayService": "ray.io/v1",
}
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
QUANTITY = re.compile(r"\d+(\.\d+)?(m|[KMGT]i?)?")


def render(template: str, values: dict[str, Any], release: str = "webui") -> str:
    """A template of the chart, which uses nothing of Helm but values and the release's name."""

    def value_of(match: re.Match[str]) -> str:
        found: Any = {"Release": {"Name": release}, "Values": values}
        for part in match[1].split("."):
            found = found[part]
        return str(found)

    text = re.sub(r"\{\{ \.([\w.]+) \}\}", value_of, template)
    assert "{{" not in text
    return text


def documents() -> dict[str, list[dict[str, Any]]]:
    """Manifests by file, those of the chart rendered with its own values."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    texts = {f"kubernetes/{path.name}": path.read_text() for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))}
    texts |= {f"helm/{path.name}": render(path.read_text(), values) for path in sorted((CHART / "templates").glob("*.yaml"))}
    return {name: list(yaml.safe_load_all(text)) for name, text in texts.items()}


MANIFESTS = [(name, index, document) for name, found in documents().items() for index, document in enumerate(found)]
each_manifest = pytest.mark.parametrize(
    "document", [document for _, _, document in MANIFESTS], ids=[f"{name}-{index}" for name, index, _ in MANIFESTS]
)


def pods(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Pod templates, wherever they are."""
    if document["kind"] == "Deployment":
        yield document["spec"]["template"]
    if document["kind"] == "RayService":
        cluster = document["spec"]["rayClusterConfig"]
        yield cluster["headGroupSpec"]["template"]
        yield from (group["template"] for group in cluster["workerGroupSpecs"])


ALL_PODS = [pod for _, _, document in MANIFESTS for pod in pods(document)]


@each_manifest
def test_a_manifest_has_its_kind_version_and_a_valid_name(document: dict[str, Any]) -> None:
    assert document["apiVersion"] == API_VERSIONS[document["kind"]]
    assert NAME.fullmatch(document["metadata"]["name"])


@pytest.mark.parametrize("pod", ALL_PODS, ids=lambda pod: pod["spec"]["containers"][0]["name"])
def test_pods_run_without_privileges_and_with_limits(pod: dict[str, Any]) -> None:
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
    for container in pod["spec"]["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
        resources = container["resources"]
        assert "memory" in resources["limits"]
        amounts = [str(amount) for kind in resources.values() for amount in kind.values()]
        assert all(QUANTITY.fullmatch(amount) for amount in amounts)


def test_selectors_find_the_pods() -> None:
    labels = [pod["metadata"]["labels"].items() for pod in ALL_PODS]
    for _, _, document in MANIFESTS:
        if document["kind"] == "Deployment":
            assert document["spec"]["selector"]["matchLabels"].items() <= document["spec"]["template"]["metadata"]["labels"].items()
        if document["kind"] == "Service":
            assert any(document["spec"]["selector"].items() <= one for one in labels)


@pytest.mark.parametrize("name", [name for name in documents() if name.startswith("helm/")])
def test_the_chart_gives_the_manifests_with_its_own_values(name: str) -> None:
    chart, plain = documents()[name], documents()[name.replace("helm/", "kubernetes/")]
    for one, other in zip(chart, plain):
        assert (one["kind"], one["metadata"]["name"]) == (other["kind"], other["metadata"]["name"])
        for ours, theirs in zip(pods(one), pods(other)):
            left, right = (pod["spec"]["containers"][0] for pod in (ours, theirs))
            assert left["image"] == right["image"]
            assert left["resources"] == right["resources"]
            assert set(right.get("args", [])) <= set(left.get("args", []))


def test_a_release_of_another_name_and_size_fits_together() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    values["worker"].update(min=2, max=5, gpus=4)
    front, service = (
        list(yaml.safe_load_all(render((CHART / "templates" / name).read_text(), values, "studio"))) for name in ("front.yaml", "rayservice.yaml")
    )
    arguments = front[1]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert "--cluster=ray://studio-head-svc:10001" in arguments
    assert "--cluster-workers=2-5" in arguments
    (group,) = service[0]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (2, 5)
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 4


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of launch.py in the files, without the program's own name."""
    for name, _, document in MANIFESTS:
        for pod in pods(document):
            for container in pod["spec"]["containers"]:
                if container.get("args"):
                    yield name, container["args"]
                for variable in container.get("env", []):
                    if variable["name"] == "WEBUI_WORKER_FLAGS":
                        yield f"{name} worker", ["launch.py", *shlex.split(variable["value"])]
    yield "compose", compose()["services"]["webui"]["command"]
    for line in re.findall(r'^CMD (\[.*"launch\.py".*\])$', (DEPLOY / "Dockerfile").read_text(), re.MULTILINE):
        yield "Dockerfile", json.loads(line)


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return loaded


@pytest.mark.parametrize(("name", "words"), list(commands()))
def test_every_flag_is_one_of_launch_py(name: str, words: list[str], tmp_path: Path) -> None:
    login = tmp_path / "login"
    login.write_text("me:secret")
    replaced = [re.sub(r"/login/login|/run/secrets/login", str(login), word).replace("/data", str(tmp_path)) for word in words]
    assert replaced[0] == "launch.py"
    config = parse_config(replaced[1:], {})
    assert not [notice for notice in config.notices if "no effect" in notice]
    if "worker" not in name and name != "Dockerfile":
        assert config.api_auth == config.gradio_auth == (("me", "secret"),)


def test_probes_ask_paths_that_need_no_password(tmp_path: Path) -> None:
    app = build_application(config_for_tests(tmp_path))
    server = create_fastapi_app(app.config)
    create_internal_api(app, server)
    paths = {getattr(route, "path", "") for router in server.routes for route in [router, *getattr(getattr(router, "router", None), "routes", [])]}
    paths |= {path for route in server.routes for path in [str(getattr(route, "path", ""))]}
    asked = {
        probe["httpGet"]["path"]
        for pod in ALL_PODS
        for container in pod["spec"]["containers"]
        for key, probe in container.items()
        if key.endswith("Probe") and "httpGet" in probe
    }
    assert asked == {"/internal/ping", "/internal/ready"}
    assert asked <= set(server.openapi()["paths"]) | paths
    app.close()


def test_the_images_are_made_from_locked_requirements_and_run_as_a_user() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert set(re.findall(r"requirements_\w+\.txt", text)) == {"requirements_versions.txt", "requirements_cluster.txt"}
    stages = re.split(r"^FROM .* AS ", text, flags=re.MULTILINE)[1:]
    final = {stage.split("\n", 1)[0]: stage for stage in stages}
    for target in ("cpu", "cuda"):
        assert "\nUSER webui\n" in final[target]
        assert "\nHEALTHCHECK " in final[target]
        assert 'VOLUME ["/data/models", "/data/outputs"]' in final[target]
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert {".git", "outputs", "models/*"} <= set(ignored)


def test_the_compose_file_builds_a_target_that_exists() -> None:
    service = compose()["services"]["webui"]
    build = service["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    assert f" AS {build['target']}\n" in (DEPLOY / "Dockerfile").read_text()
    assert {volume.split(":")[0] for volume in service["volumes"]} == set(compose()["volumes"])
    assert set(service["secrets"]) == set(compose()["secrets"])


def test_only_pods_of_the_cluster_reach_rays_ports() -> None:
    policies = {document["metadata"]["name"]: document["spec"] for name, _, document in MANIFESTS if name == "kubernetes/networkpolicy.yaml"}
    rays = policies["webui-ray"]
    chosen = {entry["key"]: entry["values"] for entry in rays["podSelector"]["matchExpressions"]}
    assert chosen["app.kubernetes.io/component"] == ["head", "worker"]
    assert all("from" in rule for rule in rays["ingress"])


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    asked = {name for panel in dashboard["panels"] for target in panel["targets"] for name in re.findall(r"webui_\w+", target["expr"])}
    source = (ROOT / "modules" / "api" / "metrics.py").read_text()
    known = {f"webui_{name}" for name in re.findall(r'"(\w+)"', source)}
    slots = {
        f"webui_{prefix}_{name}" for prefix in ("slot", "worker_slot") for name in ("memory_total_bytes", "memory_free_bytes", "utilization_percent")
    }
    times = {f"webui_job_{kind}_seconds_{end}" for kind in ("wait", "run") for end in ("bucket", "sum", "count")}
    assert asked - known - slots - times == set()
    assert len(asked) > 10
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["kubernetes/rayservice.yaml", "helm/rayservice.yaml"])
def test_rays_own_schema_takes_the_serve_config_and_its_application_is_ours(name: str) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (requirements_cluster.txt)")
    import importlib

    schema = importlib.import_module("ray.serve.schema")
    (service,) = documents()[name]
    config = schema.ServeDeploySchema(**yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.external_scaler_enabled is True
    ray_serve = importlib.import_module("modules.cluster.ray_serve")
    assert application.name == ray_serve.APP_NAME
    module, _, attribute = application.import_path.partition(":")
    built = getattr(importlib.import_module(module), attribute)(application.args)
    assert built._bound_deployment.name.startswith("engine-")
    ray = importlib.import_module("ray")
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == ray.__version__
