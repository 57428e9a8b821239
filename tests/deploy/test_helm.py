"""The chart, rendered by Helm itself, is valid for Kubernetes, and asks the server for what the server has."""

import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from server.engine_settings import ENV_PREFIX
from server.settings import ServerSettings
from tests.metrics_page import metric_families, series_name
from tests.server.fakes import ScriptedEngine
from tests.server.harness import running

helm = pytest.importorskip("helm_python", reason="there is no build of helm-python-sdk for this machine")

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "cllm-server"

Values = dict[str, object]
Manifest = dict[str, object]

EVERYTHING: Values = {
    "settings": {"max_num_seqs": 64, "max_body_bytes": 67108864, "prefix_caching": False, "adapters": "sql=cllm-sql"},
    "image": {"tag": "1.2.3", "pullSecrets": [{"name": "registry"}]},
    "apiKeys": {"existingSecret": "keys"},
    "huggingFaceToken": {"existingSecret": "hub", "key": "hf"},
    "cache": {"existingClaim": "models"},
    "extraVolumes": [{"name": "model", "persistentVolumeClaim": {"claimName": "model"}}],
    "extraVolumeMounts": [{"name": "model", "mountPath": "/model", "readOnly": True}],
    "sharedMemory": "2Gi",
    "autoscaling": {"enabled": True, "maxReplicas": 8},
    "podAnnotations": {"team": "a"},
    "podLabels": {"tier": "inference"},
    "nodeSelector": {"kubernetes.io/arch": "amd64"},
    "tolerations": [{"key": "dedicated", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
}
VARIANTS: dict[str, Values] = {
    "cpu": {},
    "gpu": yaml.safe_load((CHART / "values-gpu.yaml").read_text(encoding="utf-8")),
    "everything": EVERYTHING,
}


def render(values: Values, release: str = "demo") -> dict[str, Manifest]:
    """Manifests by their kind; the chart has one of each."""
    with helm.Chart.load(str(CHART)) as chart:
        rendered = chart.render(values, name=release, namespace="inference")
    texts = [text for path, text in rendered.items() if not path.endswith("NOTES.txt")]
    manifests = [manifest for text in texts for manifest in yaml.safe_load_all(text) if manifest]
    return {str(manifest["kind"]): manifest for manifest in manifests}


def pick(manifest: object, path: str) -> object:
    """What lies at a path of keys and indices, such as "spec.ports.0.name"."""
    for key in path.split("."):
        manifest = manifest[int(key)] if isinstance(manifest, list) else manifest[key]  # type: ignore[index]
    return manifest


def container(manifests: dict[str, Manifest]) -> Manifest:
    """The pod's only one."""
    found = pick(manifests["Deployment"], "spec.template.spec.containers.0")
    assert isinstance(found, dict)
    return found


def environment(manifests: dict[str, Manifest]) -> dict[str, object]:
    """Variables by name; those that the cluster fills in have None."""
    entries = container(manifests)["env"]
    assert isinstance(entries, list)
    assert len({entry["name"] for entry in entries}) == len(entries)
    return {entry["name"]: entry.get("value") for entry in entries}


@pytest.mark.parametrize("version", ["1.25", "1.33", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_every_manifest_is_valid_for_the_api(values: Values, version: str) -> None:
    manifests = render(values)
    kinds = {"Deployment", "Service", "ServiceAccount", "PodDisruptionBudget"}
    assert manifests.keys() - {"HorizontalPodAutoscaler"} == kinds
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, version, strict=True)


def test_an_invalid_manifest_would_be_noticed() -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(render({"tolerations": [{"no such field": 1}]})["Deployment"], "1.33", strict=True)


def test_helm_finds_nothing_to_complain_about() -> None:
    report = helm.lint(str(CHART), strict=True)
    assert report["errors"] == []
    assert [message for message in report["messages"] if "icon is recommended" not in message["error"]] == []


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_the_environment_is_made_of_settings(values: Values) -> None:
    names = {f"{ENV_PREFIX}{name.upper()}" for name in ServerSettings.model_fields} | {"HF_TOKEN"}
    assert environment(render(values)).keys() <= names


def test_values_reach_the_settings_as_they_are() -> None:
    given = environment(render(EVERYTHING))
    assert given["CLLM_MAX_BODY_BYTES"] == "67108864"
    assert given["CLLM_PREFIX_CACHING"] == "false"
    assert given["CLLM_ADAPTERS"] == "sql=cllm-sql"
    settings = {name.removeprefix(ENV_PREFIX).lower(): value for name, value in given.items() if value is not None}
    assert ServerSettings.model_validate(settings).max_body_bytes == 67108864


def test_services_leave_no_settings_in_the_environment() -> None:
    """A service called cllm puts CLLM_PORT=tcp://... into each pod, unless links are off."""
    assert pick(render({}, release="cllm")["Deployment"], "spec.template.spec.enableServiceLinks") is False


@pytest.mark.parametrize("values", [{"replica": 3}, {"settings": {"model": "x"}}, {"image": {"variant": "rocm"}}])
def test_values_that_mean_nothing_are_refused(values: Values) -> None:
    with pytest.raises(helm.HelmError):
        render(values)


def test_probes_ask_endpoints_that_need_no_key() -> None:
    manifest = container(render({}))
    paths = {str(pick(manifest, f"{kind}Probe.httpGet.path")) for kind in ("startup", "readiness", "liveness")}
    assert paths == {"/health", "/ready"}
    with running(ScriptedEngine(), api_keys=("secret",)) as server, server.http() as http:
        assert [http.get(path).status_code for path in paths] == [200, 200]


def test_the_pod_is_killed_only_after_lame_duck_and_drain() -> None:
    slower: Values = {"shutdown": {"lameDuckSeconds": 25, "drainSeconds": 300}}
    for values in ({}, slower):
        manifests = render(values)
        grace = pick(manifests["Deployment"], "spec.template.spec.terminationGracePeriodSeconds")
        given = environment(manifests)
        assert int(str(grace)) >= int(str(given["CLLM_SHUTDOWN_DELAY"])) + int(str(given["CLLM_DRAIN_SECONDS"])) + 10


def test_the_container_is_the_one_of_the_dockerfile() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    manifests = render({})
    pod = pick(manifests["Deployment"], "spec.template.spec")
    assert f"USER {pick(pod, 'securityContext.runAsUser')}\n" in dockerfile
    assert f"EXPOSE {pick(pod, 'containers.0.ports.0.containerPort')}\n" in dockerfile
    assert pick(pod, "containers.0.securityContext") == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    written = {str(mount["mountPath"]) for mount in container(manifests)["volumeMounts"]}  # type: ignore[attr-defined]
    assert written == {*re.findall(r"^VOLUME (\S+)$", dockerfile, re.MULTILINE), "/tmp"}


def test_selectors_find_the_pods() -> None:
    manifests = render(EVERYTHING)
    labels = pick(manifests["Deployment"], "spec.template.metadata.labels")
    assert isinstance(labels, dict)
    for kind, path in (
        ("Deployment", "spec.selector.matchLabels"),
        ("Service", "spec.selector"),
        ("PodDisruptionBudget", "spec.selector.matchLabels"),
    ):
        selector = pick(manifests[kind], path)
        assert isinstance(selector, dict)
        assert selector.items() <= labels.items()


def test_replicas_follow_a_metric_that_servers_have() -> None:
    manifests = render(EVERYTHING)
    metric = pick(manifests["HorizontalPodAutoscaler"], "spec.metrics.0.pods.metric.name")
    assert metric in {series_name(family) for family in metric_families() if family.type == "gauge"}
    assert "replicas" not in pick(manifests["Deployment"], "spec")  # type: ignore[operator]
    target = pick(manifests["HorizontalPodAutoscaler"], "spec.scaleTargetRef.name")
    assert target == pick(manifests["Deployment"], "metadata.name")
    assert "HorizontalPodAutoscaler" not in render({})


def test_prometheus_is_sent_to_the_metrics() -> None:
    annotations = pick(render({})["Deployment"], "spec.template.metadata.annotations")
    assert annotations == {
        "prometheus.io/scrape": "true", "prometheus.io/port": "8000", "prometheus.io/path": "/metrics",
    }  # fmt: skip
    assert not pick(render({"monitoring": {"enabled": False}})["Deployment"], "spec.template.metadata.annotations")


def test_the_gpu_values_ask_for_a_gpu_and_the_cuda_image() -> None:
    pod = container(render(VARIANTS["gpu"]))
    assert pick(pod, "resources.limits")["nvidia.com/gpu"] == 1  # type: ignore[index]
    assert str(pod["image"]).endswith("-cuda")
    assert str(container(render({}))["image"]).endswith("-cpu")
