"""The manifests are what Kubernetes and KEDA take, and agree with the images, the settings and the app."""

import importlib
import re
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from app.api.health import router
from app.contracts.settings import Settings
from app.supervisor import STOP_S
from tests.conftest import REPOSITORY
from tests.containers import Dockerfile
from tests.unit.test_monitoring_files import problems
from worker.engine_process import START_TIMEOUT_S

FOLDER = REPOSITORY / "docker" / "kubernetes"
FILES = sorted(path.name for path in FOLDER.iterdir())
VERSIONS = ("1.30", "1.37")
"""The oldest that the page names, because of `sleep` before a pod stops, and the newest that there are schemas of."""
SETTINGS = {f"MASKMERGE_{name.upper()}" for name in Settings.model_fields}
IMAGES = {
    name: Dockerfile.read(REPOSITORY / "docker" / f"{name.partition('-')[0]}.Dockerfile")
    for name in ("api", "worker-cpu", "worker-cuda")
}
PAGE = (REPOSITORY / "docs" / "scaling.md").read_text()


def objects(file: str) -> list[dict[str, Any]]:
    return [found for found in yaml.safe_load_all((FOLDER / file).read_text()) if found is not None]


BUILT_IN = [found for file in FILES if not file.startswith("keda") for found in objects(file)]


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {found["metadata"]["name"]: found["spec"] for found in BUILT_IN if found["kind"] == kind}


PODS = {name.removeprefix("maskmerge-"): spec["template"]["spec"] for name, spec in of_kind("Deployment").items()}
every_pod = pytest.mark.parametrize("part", IMAGES)


def container(part: str) -> dict[str, Any]:
    (found,) = PODS[part]["containers"]
    return dict(found)


def given(part: str) -> dict[str, Any]:
    """Variables of a container, by name: text, or where the value is from."""
    (config,) = container(part)["envFrom"]
    assert config == {"configMapRef": {"name": "maskmerge"}}
    found = _config() | {of["name"]: of.get("value") or of["valueFrom"] for of in container(part)["env"]}
    if part == "api":
        assert found.pop("POD_ADDRESS") == {"fieldRef": {"fieldPath": "status.podIP"}}
        found["MASKMERGE_ALLOWED_HOSTS"] = found["MASKMERGE_ALLOWED_HOSTS"].replace("$(POD_ADDRESS)", "10.1.2.3")
    return found


def _config() -> dict[str, str]:
    (found,) = [found for found in BUILT_IN if found["kind"] == "ConfigMap"]
    return dict(found["data"])


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_object(version: str) -> None:
    for found in BUILT_IN:
        kubernetes_validate.validate(found, version, strict=True)
    assert {found["kind"] for found in BUILT_IN} == {
        "ConfigMap", "Deployment", "PersistentVolumeClaim", "PodDisruptionBudget", "Service"
    }  # fmt: skip
    broken = deepcopy(BUILT_IN)
    deployment = next(found for found in broken if found["kind"] == "Deployment")
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 30
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(deployment, version, strict=True)


def test_there_is_a_deployment_for_each_image() -> None:
    assert set(PODS) == set(IMAGES)
    for part in IMAGES:
        assert re.fullmatch(rf"registry\.example\.org/maskmerge-{part}:\d+\.\d+\.\d+", container(part)["image"])
        assert not {"command", "args"} & set(container(part)), "the image's own command runs"


@every_pod
def test_variables_are_settings_and_their_values_are_taken(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = given(part)
    assert {name for name in variables if name.startswith("MASKMERGE_")} <= SETTINGS
    assert {name for name in variables if not name.startswith("MASKMERGE_")} <= {
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"
    }  # fmt: skip
    for name, value in {**IMAGES[part].environment, **variables}.items():
        if isinstance(value, str) and name.startswith("MASKMERGE_"):
            monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.artifact_store == _config()["MASKMERGE_ARTIFACT_STORE"]
    assert settings.log_format == "json"
    assert ("maskmerge" in settings.allowed_hosts and "10.1.2.3" in settings.allowed_hosts) == (part == "api")
    # A Service's links are variables too, and those of this one would be taken for settings.
    assert PODS[part]["enableServiceLinks"] is False


def test_secrets_come_from_the_one_that_the_page_makes() -> None:
    made = set(re.findall(r"--from-(?:literal|file)=([\w-]+)=", PAGE))
    references = [value["secretKeyRef"] for part in IMAGES for value in given(part).values() if "secretKeyRef" in value]
    assert {reference["name"] for reference in references} == {"maskmerge"}
    assert {reference["key"] for reference in references} == made | {"hf-token"}
    needed = {reference["key"] for reference in references if not reference.get("optional")}
    assert needed == {"redis-url"} <= made


@every_pod
def test_pods_are_confined_and_write_to_volumes_alone(part: str) -> None:
    pod, image = PODS[part], IMAGES[part]
    user, group = map(int, image.one("USER").split(":"))
    secured = pod["securityContext"]
    assert (secured["runAsNonRoot"], secured["runAsUser"], secured["runAsGroup"], secured["fsGroup"]) == (
        True, user, group, group
    )  # fmt: skip
    assert secured["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container(part)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["name"]: mount["mountPath"] for mount in container(part)["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert mounts.pop("tmp") == "/tmp"  # noqa: S108 - a place in a container
    assert mounts.pop("data") == image.environment["MASKMERGE_DATA_DIR"]
    assert set(mounts.values()) == {path for name, path in image.environment.items() if name == "HF_HOME"}
    (claimed,) = [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if volume["name"] == "data"]
    assert of_kind("PersistentVolumeClaim")[claimed]["accessModes"] == ["ReadWriteMany"]


@every_pod
def test_kubernetes_waits_longer_than_the_parts_take(part: str) -> None:
    before = container(part).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert PODS[part]["terminationGracePeriodSeconds"] > STOP_S + before


@every_pod
def test_memory_is_limited_to_what_is_asked_for_at_least(part: str) -> None:
    resources = container(part)["resources"]
    assert set(resources["requests"]) >= {"cpu", "memory"}
    assert "memory" in resources["limits"]
    assert ("nvidia.com/gpu" in resources["limits"]) == (part == "worker-cuda")


def test_probes_of_the_api_ask_a_path_and_a_port_that_there_are() -> None:
    (port,) = container("api")["ports"]
    assert str(port["containerPort"]) == IMAGES["api"].one("EXPOSE") == str(Settings().port)
    (service,) = of_kind("Service").values()
    (published,) = service["ports"]
    assert (published["port"], published["targetPort"]) == (port["containerPort"], port["name"])
    paths = {route.path for route in router.routes}  # type: ignore[attr-defined]
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container("api")[kind]["httpGet"]
        assert asked["path"] in paths
        assert asked["port"] == port["name"]
        assert asked["httpHeaders"] == [{"name": "Host", "value": "localhost"}], "the API goes by names"


@pytest.mark.parametrize("part", ["worker-cpu", "worker-cuda"])
def test_probes_of_workers_ask_what_compose_asks_and_end_none(part: str) -> None:
    found = container(part)
    for kind in ("startupProbe", "readinessProbe"):
        command = found[kind]["exec"]["command"]
        assert command[:2] == ["python", "-m"]
        assert importlib.import_module(command[2]).problem
    assert "livenessProbe" not in found
    assert found["startupProbe"]["periodSeconds"] * found["startupProbe"]["failureThreshold"] >= START_TIMEOUT_S
    threads = given(part)["MASKMERGE_THREADS"]["resourceFieldRef"]
    assert (threads["containerName"], threads["resource"]) == (found["name"], "requests.cpu")
    assert found["resources"]["requests"]["cpu"].isdecimal(), "a part of a core would be rounded up"


def test_selectors_find_the_pods_of_their_own() -> None:
    labels = {name: spec["template"]["metadata"]["labels"] for name, spec in of_kind("Deployment").items()}
    assert len({str(of) for of in labels.values()}) == len(labels)
    for name, spec in of_kind("Deployment").items():
        assert spec["selector"]["matchLabels"] == labels[name]
        assert of_kind("PodDisruptionBudget")[name]["selector"]["matchLabels"] == labels[name]
    (service,) = of_kind("Service").values()
    assert service["selector"] == labels["maskmerge-api"]
    assert (
        of_kind("Deployment")["maskmerge-api"]["replicas"]
        > of_kind("PodDisruptionBudget")["maskmerge-api"]["minAvailable"]
    )


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel)


class Prometheus(Strict):
    """A trigger, as KEDA's documentation of its Prometheus scaler has it."""

    class Metadata(Strict):
        server_address: Annotated[str, Field(pattern="^https?://")]
        query: Annotated[str, Field(min_length=1)]
        threshold: Annotated[str, Field(pattern="^[0-9]+$")]
        ignore_null_values: Literal["true", "false"]

    type: Literal["prometheus"]
    metadata: Metadata


class Scaled(Strict):
    """The specification of a ScaledObject, as KEDA 2.17's definition of it has it, as far as it is used here."""

    class Target(Strict):
        name: str

    class Fallback(Strict):
        failure_threshold: Annotated[int, Field(ge=0)]
        replicas: Annotated[int, Field(ge=0)]
        behavior: Literal["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]

    class Advanced(Strict):
        horizontal_pod_autoscaler_config: dict[
            Literal["behavior"], dict[Literal["scaleDown"], dict[Literal["stabilizationWindowSeconds"], int]]
        ]

    scale_target_ref: Target
    min_replica_count: Annotated[int, Field(ge=0)]
    max_replica_count: Annotated[int, Field(ge=1)]
    cooldown_period: Annotated[int, Field(ge=0)]
    fallback: Fallback
    advanced: Advanced
    triggers: Annotated[list[Prometheus], Field(min_length=1)]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_keda_scales_workers_by_a_series_that_there_is(kind: str) -> None:
    (found,) = objects(f"keda-{kind}.yaml")
    assert (found["apiVersion"], found["kind"]) == ("keda.sh/v1alpha1", "ScaledObject")
    scaled = Scaled.model_validate(found["spec"])
    assert scaled.scale_target_ref.name == f"maskmerge-worker-{kind}"
    assert scaled.scale_target_ref.name in of_kind("Deployment")
    assert scaled.min_replica_count < scaled.max_replica_count
    (trigger,) = scaled.triggers
    assert list(problems(trigger.metadata.query)) == []
    with pytest.raises(ValidationError, match="minReplicas"):
        Scaled.model_validate({**found["spec"], "minReplicas": 1})


def test_the_page_names_every_file() -> None:
    assert set(re.findall(r"docker/kubernetes/([\w-]+\.yaml)", PAGE)) == set(FILES)
    assert all(Path(file).suffix == ".yaml" for file in FILES)
